"""How a command ends early: Ctrl-C, a signal, a closed pipe, memory that does not suffice.

What is being written is cleaned up as the stack unwinds. Then the process leaves without Python's
own shutdown, which would take down structures that XLA's threads are still computing with.
"""

import contextlib
import errno
import io
import os
import signal
import sys
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any, NoReturn

from jaxneurons.errors import is_out_of_memory
from jaxneurons.processes.watching import leave

BROKEN_PIPE = 141
"""Exit code when nobody reads on, as of a program that SIGPIPE ends."""

SIGNALS = [
    getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)
]
"""Those that ask a process to end, on this system."""

PROMISE = "stopped; what was finished is kept, the same command goes on from there"


class Stops:
    """Signals that ask for an end, as `KeyboardInterrupt` wherever the main thread is.

    Attributes:
      number: of the last one that came; that of Ctrl-C before.
    """

    def __init__(self) -> None:
        self.number = int(signal.SIGINT)
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "Stops":
        """Take every signal over that is not ignored (`nohup` ignores one)."""
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                handler = signal.getsignal(number)
                if handler not in (signal.SIG_IGN, None):
                    self._before[number] = signal.signal(number, self._raise)
        self._hook, sys.unraisablehook = sys.unraisablehook, self._again
        return self

    def __exit__(self, *_: object) -> None:
        """Leave them to whom they belonged."""
        sys.unraisablehook = self._hook
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def ignore(self) -> None:
        """Let no further one disturb the end."""
        for number in self._before:
            signal.signal(number, signal.SIG_IGN)

    def _raise(self, number: int, _: FrameType | None) -> None:
        self.number = number
        raise KeyboardInterrupt

    def _again(self, raised: Any) -> None:
        """Python drops what is raised in a callback of its garbage collector: raise it again."""
        if isinstance(raised.exc_value, KeyboardInterrupt):
            again = threading.Timer(0.02, _to_main_thread, [self.number])
            again.daemon = True
            again.start()
        else:
            self._hook(raised)


def _to_main_thread(number: int) -> None:
    main = threading.main_thread().ident
    if main is not None and hasattr(signal, "pthread_kill"):
        signal.pthread_kill(main, number)  # wakes it from what it waits for
    else:
        signal.raise_signal(number)


def lenient_streams() -> None:
    """Print what an encoding lacks as escapes instead of failing on it, whoever prints."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            with contextlib.suppress(ValueError):
                stream.reconfigure(errors="backslashreplace")


def is_broken_pipe(error: OSError) -> bool:
    """Whether who read our output has gone."""
    return isinstance(error, BrokenPipeError) or error.errno == errno.EPIPE


def too_much(error: BaseException) -> str | None:
    """What to say of an error for want of memory or of a number beyond all bounds, else None."""
    message = " ".join(str(error).split())
    if is_out_of_memory(error):
        return (
            f"not enough memory ({message[:200] or 'an allocation failed'}); ask for less at once"
        )
    if isinstance(error, OverflowError):
        return f"a number is too large to compute with ({message[:200]})"
    return None


def until_stopped(command: Callable[[], object], say: Callable[[str], object]) -> None:
    """Call `command`; a signal or a closed pipe ends the process, anything else passes.

    Args:
      command: the command line; it may raise SystemExit.
      say: prints a line on standard error.
    """
    with Stops() as stops:
        try:
            try:
                command()
            except OSError as error:
                if not is_broken_pipe(error):
                    raise
                _close_standard_output()
                leave(BROKEN_PIPE)
            except KeyboardInterrupt:
                _stop(stops, say)
        except KeyboardInterrupt:  # once more, on the way
            _stop(stops, say)


def _stop(stops: Stops, say: Callable[[str], object]) -> NoReturn:
    stops.ignore()
    with contextlib.suppress(Exception):
        say(PROMISE)
    leave(128 + stops.number)


def _close_standard_output() -> None:
    """Nobody reads: let nothing that is still buffered fail again."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
