"""Where the program `jaxneurons` begins: a signal ends it cleanly while its libraries are loaded.

Nothing but the standard library is imported before the signals are heeded: JAX takes a second or
more, in which Python would print a traceback, or drop a Ctrl-C that arrives in a callback of JAX's.
"""

import os
import signal


def _end(number: int, _: object) -> None:
    """Nothing has begun and nothing is to be cleaned up."""
    os.write(2, b"stopped\n")
    os._exit(128 + number)


def main() -> None:
    """The command line."""
    for name in ("SIGINT", "SIGTERM", "SIGHUP"):
        number = getattr(signal, name, None)
        if number is not None and signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, _end)
    from jaxneurons.cli import main as command

    try:
        command()
    except SystemExit as stop:
        if not stop.code:
            raise
        # What a failure has left in threads would print tracebacks during Python's own shutdown.
        from jaxneurons.terminal.stopping import leave

        leave(stop.code if isinstance(stop.code, int) else 1)


if __name__ == "__main__":
    main()
