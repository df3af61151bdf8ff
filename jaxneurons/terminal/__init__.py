"""The console, progress bars, and how a command ends."""

__all__: list[str] = []
