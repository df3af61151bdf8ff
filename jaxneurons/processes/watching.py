"""Does every process still live? A thread says so for this one and looks after the others.

XLA cannot be interrupted, and a collective whose partner is gone never ends. So the thread ends the
process, with a line that names the one that is lost. A process gives a sign every two seconds. A
second thread sees to the store itself, which process 0 keeps.
"""

import contextlib
import ctypes
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from typing import NoReturn

from jaxneurons.processes.channel import Channel

PERIOD = 2.0
"""Seconds between two signs of life."""
SILENT = 20
"""Signs that fail to come, one after the other, until a process counts as lost: 40 seconds."""
FAREWELL = 10.0
"""Seconds that process 0 waits for the others to have read why it ends."""
ALIVE, FAILED, GONE = "alive", "failed", "gone"

KEPT = "what was finished is kept, the same command goes on from there"

Leave = Callable[[str], None]


class Watch:
    """The thread of one process.

    Args:
      channel: between the processes.
      index: of this process.
      hosts: of all, in order.
      leave: says a line and ends the process.
      period: seconds between two signs.
    """

    def __init__(
        self,
        channel: Channel,
        index: int,
        hosts: Sequence[str],
        *,
        leave: Leave | None = None,
        period: float = PERIOD,
    ):
        self._channel, self.index, self.hosts = channel, index, tuple(hosts)
        self._leave, self._period = leave or end_process, period
        self._stopped = threading.Event()
        self._seen: dict[int, tuple[str, int]] = {}
        self._answered = time.monotonic()

    def start(self) -> None:
        """Begin to give signs and to look for those of the others."""
        self._answered = time.monotonic()
        for run in (self._look_after, self._await_answers):
            threading.Thread(target=run, name="processes", daemon=True).start()

    def stop(self) -> None:
        """Give and await no more signs."""
        self._stopped.set()

    def fail(self, reason: str) -> None:
        """Tell the others why this process ends; process 0 waits until they have read it.

        Where it ends because the store is lost, that is what is said. Until the others are told the
        thread looks on: a store that goes now would keep this call for ever.
        """
        if self.index != 0 and self._channel.is_closed():
            self._end(f"{self._name(0)} has ended or is out of reach")
        with contextlib.suppress(Exception):
            self._channel.set(f"{FAILED}/{self.index}", reason)
        self.stop()
        with contextlib.suppress(Exception):
            self._see_off(self.count)

    def _see_off(self, count: int) -> None:
        """In process 0, whose store goes with it: wait until so many have left, or some seconds."""
        deadline = time.monotonic() + FAREWELL
        while self.index == 0 and time.monotonic() < deadline:
            if len({*self._channel.read(GONE), *self._channel.read(FAILED)}) >= count:
                break
            time.sleep(self._period / 10)

    @property
    def count(self) -> int:
        """How many processes there are."""
        return len(self.hosts)

    def _look_after(self) -> None:
        beat = 0
        while not self._stopped.wait(self._period if beat else 0):
            beat += 1
            reason = self._look(beat)
            self._answered = time.monotonic()
            if reason is not None and not self._stopped.is_set():
                with contextlib.suppress(Exception):
                    self._channel.set(f"{GONE}/{self.index}", reason)
                    self._see_off(self.count - 1)  # all but the one that is lost
                self._end(reason)

    def _await_answers(self) -> None:
        """End the process when the store no longer answers: its calls may hang for ever."""
        while not self._stopped.wait(self._period / 4):
            waited = time.monotonic() - self._answered
            long = waited > SILENT * self._period
            if long or (waited > 1.2 * self._period and self._channel.is_closed()):
                self._end(f"{self._name(0)} has ended or is out of reach")

    def _end(self, reason: str) -> None:
        if not self._stopped.is_set():
            self.stop()
            self._leave(f"{reason}; {self._name(self.index)} ends too: {KEPT}")

    def _look(self, beat: int) -> str | None:
        """Give a sign and see to the others; why this process must end, if it must."""
        try:
            self._channel.set(f"{ALIVE}/{self.index}", str(beat))
            signs, failed, gone = (self._channel.read(key) for key in (ALIVE, FAILED, GONE))
        except Exception:  # JAX has no type for a store that is out of reach
            return f"{self._name(0)} has ended or is out of reach"
        for index, reason in sorted(failed.items()):
            if int(index) != self.index:
                return f"{self._name(int(index))} failed: {reason}"
        for index, reason in sorted(gone.items()):
            if int(index) != self.index:  # what it knows may not have come here yet
                return reason
        for index in range(self.count):
            sign = signs.get(str(index), "")
            before, missed = self._seen.get(index, ("", 0))
            self._seen[index] = (sign, missed + 1 if sign == before else 0)
            if index != self.index and self._seen[index][1] >= SILENT:
                return (
                    f"{self._name(index)} has ended or is out of reach (no sign of life for "
                    f"{SILENT * self._period:.0f} s)"
                )
        return None

    def _name(self, index: int) -> str:
        return f"process {index} (host {self.hosts[index]})"


def end_process(text: str) -> None:
    """Say why on standard error, and end this process whatever its other threads do."""
    with contextlib.suppress(OSError, ValueError):
        os.write(2, f"error: {' '.join(text.split())}\n".encode("utf-8", "backslashreplace"))
    leave(1)


def leave(code: int) -> NoReturn:
    """End this process with what was printed so far, without what Python does at its end."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError, AttributeError):
            stream.flush()
    os._exit(code)


def delay_abort() -> None:
    """Let six seconds pass before an abort, in which the thread can say who is lost.

    JAX's client aborts as soon as process 0 is gone, with a message that knows no host. The handler
    is the C library's `sleep`, which may be called in one; its argument, the signal's number, is 6.
    """
    if not hasattr(signal, "SIGABRT") or os.name != "posix":
        return
    with contextlib.suppress(OSError, AttributeError):
        library = ctypes.CDLL(None)
        library.signal.argtypes = [ctypes.c_int, ctypes.c_void_p]
        library.signal.restype = ctypes.c_void_p
        library.signal(signal.SIGABRT, ctypes.cast(library.sleep, ctypes.c_void_p))
