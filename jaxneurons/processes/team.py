"""The processes that work together: what one of them knows of the others, and how all agree.

All of them run the same program in the same order. `gather` is the one operation; each is numbered,
so that processes which are at different places are an error and not a wrong result.
"""

import contextlib
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from jaxneurons.errors import DataError, JaxneuronsError
from jaxneurons.processes.channel import Channel
from jaxneurons.processes.watching import Watch

SHORTEST, LONGEST = 0.01, 0.5
"""Seconds between two looks at what the others have left."""


class Processes:
    """One process among those that share a job.

    Args:
      channel: between them; None: this process is alone.
      index: of this process, from 0.
      hosts: the host of each.
      local_disks: results are written to a disk that the other processes do not see.
      watch: looks after the others.

    Attributes:
      has_left: nobody waits for this process any more.
    """

    def __init__(
        self,
        channel: Channel | None = None,
        index: int = 0,
        hosts: Sequence[str] = ("localhost",),
        *,
        local_disks: bool = False,
        watch: Watch | None = None,
    ):
        self._channel, self.index, self.hosts = channel, index, tuple(hosts)
        self.local_disks = local_disks
        self._watch = watch
        self._calls = 0
        self.has_left = watch is None

    def __repr__(self) -> str:
        return f"<Processes: {self.name(self.index)} of {self.count}>"

    @property
    def count(self) -> int:
        """How many there are."""
        return len(self.hosts)

    @property
    def first(self) -> bool:
        """Whether this is process 0, which writes what is not a part of a run."""
        return self.index == 0

    @property
    def writes(self) -> bool:
        """Whether this process writes results into a directory: on local disks each does."""
        return self.first or self.local_disks

    def name(self, index: int) -> str:
        """A process for messages: its number and host."""
        return f"process {index} (host {self.hosts[index]})"

    def names(self, indices: Sequence[int]) -> str:
        """Some processes for messages."""
        shown = ", ".join(self.name(index) for index in indices[:8])
        return shown + (f" and {len(indices) - 8} more" if len(indices) > 8 else "")

    def gather(self, label: str, value: Any = None) -> list[Any]:
        """What each process gives here, in order; nobody goes on before all have come.

        Args:
          label: what this is about; the same in all.
          value: of JSON; small.

        Raises:
          DataError: another process is somewhere else in the program.
        """
        if self._channel is None or self.count == 1:
            return [value]
        self._calls += 1
        directory = f"call/{self._calls}"
        self._channel.set(f"{directory}/{self.index}", json.dumps([label, value]))
        entries = _await(self._channel, directory, self.count)
        if self._calls > 1:  # all have come here, so that all have read what was before
            self._channel.delete(f"call/{self._calls - 1}/{self.index}")
        given = [json.loads(entries[str(index)]) for index in range(self.count)]
        for index, (other, _) in enumerate(given):
            if other != given[0][0]:
                raise DataError(
                    f"{self.name(index)} is at {other!r} where {self.name(0)} is at "
                    f"{given[0][0]!r}: run the same program in every process"
                )
        return [each for _, each in given]

    def wait(self, label: str) -> None:
        """Go on when all processes have come here."""
        self.gather(label)

    def of_first(self, label: str, make: Callable[[], Any]) -> Any:
        """What process 0 makes, in every process; JSON."""
        return self.gather(label, make() if self.first else None)[0]

    def compare(self, what: str, values: Mapping[str, Any]) -> None:
        """Raise unless all processes have the same values; before anything is computed with them.

        Args:
          what: they are, for the message.
          values: of JSON by name.

        Raises:
          DataError: says which differ, between which processes, and how.
        """
        if self.count == 1:
            return
        mine = json.loads(json.dumps(dict(values)))
        for index, other in enumerate(self.gather(what, mine)):
            if other == mine:
                continue
            differences = list(_differences("", other, mine))
            shown = "; ".join(
                f"{place}: {_short(theirs)} in {self.name(index)}, {_short(ours)} in "
                f"{self.name(self.index)}"
                for place, theirs, ours in differences[:3]
            )
            raise DataError(
                f"{what} differ between processes: {shown}; start every process in the same way"
            )

    @contextlib.contextmanager
    def all_or_none(self, label: str) -> Iterator[Callable[[], bool]]:
        """Wait for all at the end of the context; an error of one is an error of all.

        So that none goes on, or handles what the others have not met. What the input is not at
        fault for passes at once, and ends all processes.

        Args:
          label: what is done here.

        Yields:
          Whether another has met an error: then there is no need to finish.

        Raises:
          DataError: another's error.
        """
        call = f"trouble/{self._calls}"

        def troubled() -> bool:
            return self._channel is not None and bool(self._channel.read(call))

        error: JaxneuronsError | None = None
        try:
            yield troubled
        except JaxneuronsError as mine:
            error = mine
            if self._channel is not None:
                self._channel.set(f"{call}/{self.index}", str(error))
        texts = self.gather(label, None if error is None else str(error))
        if error is not None:
            raise error
        for index, text in enumerate(texts):
            if text is not None:
                raise DataError(f"{self.name(index)}: {text}")

    def fail(self, reason: str) -> None:
        """Tell the other processes that this one ends, and why: they end too."""
        if self._watch is not None:
            self._watch.fail(reason)
            self._watch = None

    def leave(self) -> None:
        """Part from the others: when all have come here nobody looks after anyone any more."""
        if self._watch is not None:
            self.wait("the end")
            self._watch.stop()
            self._watch, self.has_left = None, True


def meet(channel: Channel, index: int, count: int, host: str) -> list[str]:
    """The hosts of so many processes, once all of them are there."""
    channel.set(f"host/{index}", host)
    hosts = _await(channel, "host", count)
    return [hosts[str(each)] for each in range(count)]


def _await(channel: Channel, directory: str, count: int) -> dict[str, str]:
    """The texts below a directory, once there are so many."""
    pause = SHORTEST
    while len(entries := channel.read(directory)) < count:
        time.sleep(pause)
        pause = min(LONGEST, pause * 1.5)
    return entries


def _differences(place: str, other: Any, mine: Any) -> Iterator[tuple[str, Any, Any]]:
    if isinstance(other, Mapping) and isinstance(mine, Mapping):
        for key in dict.fromkeys((*other, *mine)):
            inner = f"{place}.{key}".lstrip(".")
            yield from _differences(inner, other.get(key), mine.get(key))
    elif other != mine:
        yield place, other, mine


def _short(value: Any) -> str:
    text = "none" if value is None else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 40 else f"{text[:37]}..."


ALONE = Processes()
_joined: list[Processes] = []
"""Those of this process, once it has joined: as JAX has one coordination in a process."""


def current() -> Processes:
    """The processes that this one works with; `ALONE` where it has joined none."""
    return _joined[-1] if _joined else ALONE


@contextlib.contextmanager
def working_with(processes: Processes) -> Iterator[Processes]:
    """Make these the current processes."""
    _joined.append(processes)
    try:
        yield processes
    finally:
        _joined.remove(processes)
