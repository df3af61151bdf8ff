"""Functions that long work reports its progress to."""

from collections.abc import Callable

Progress = Callable[[int, int], None]
"""Called with how much is done (prompts, batches, files, ...) and how much there is to do."""

Advance = Callable[[int], None]
"""Called with how much has been done since the last call (bytes, generations), no total known."""

StageProgress = Callable[[str, int, int], None]
"""Called with the stage, how much of it is done and how much there is to do."""
