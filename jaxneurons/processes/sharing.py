"""Parts of a run shared out over processes: each makes its own, all read all of them.

What a part holds does not depend on who makes it, nor on how many there are, so that a run goes on
on another number of processes to the same results.
"""

import functools
import os
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxneurons.errors import DataError, JaxneuronsError
from jaxneurons.processes.team import Processes, current
from jaxneurons.storage.progress import Progress
from jaxneurons.storage.store import PARTS, Memory, Parts, RunDirectory, digest

Name = int | str
Make = Callable[[], Mapping[str, np.ndarray]]
SEEN = 30.0
"""Seconds in which a file that one process has written is to be seen by all: NFS keeps what it knew
of a directory for as long."""


class ToMerge(JaxneuronsError):
    """What this process was to make lies on its own disk; nothing is wrong, `merge` goes on."""


def open_parts(
    path: str | os.PathLike[str] | None,
    identity: Mapping[str, Any],
    *,
    team: Processes | None = None,
) -> Parts:
    """Finished parts in a directory that all processes share, or in memory.

    Args:
      path: the directory; None: in memory, where each process makes all parts.
      identity: what the parts depend on.
      team: the processes; default: the current ones.

    Raises:
      DataError: another identity in another process, or in the directory; a directory that not all
        processes see.
      WriteError: it cannot be written.
    """
    if path is None:
        return Memory()
    team = team or current()
    team.compare("what the results depend on", identity)
    if team.count == 1 or team.local_disks:
        return RunDirectory(path, identity)
    store = RunDirectory(path, identity) if team.first else None
    check_shared(Path(path), team)
    return store or RunDirectory(path, identity)


def check_shared(path: Path, team: Processes) -> None:
    """Raise `DataError` unless all processes see the run directory that process 0 has made."""

    def leave_sign() -> str:
        name = f".shared.{uuid.uuid4().hex}"
        (path / PARTS / name).touch()
        return name

    name = team.of_first("a sign", leave_sign)
    sign = path / PARTS / name
    seen = team.gather("seen", _is_seen(sign.parent, [name], SEEN / 3))
    if team.first:
        sign.unlink(missing_ok=True)
    blind = [index for index, sees in enumerate(seen) if not sees]
    if blind:
        raise DataError(
            f"{path}: made by {team.name(0)}, not seen by {team.names(blind)}; give a directory on "
            "a disk that all share, or --local-disks and `jaxneurons merge` afterwards"
        )


def _is_seen(directory: Path, names: Sequence[str], seconds: float) -> bool:
    """Whether files are in a directory, or come to be seen there within some seconds."""
    deadline = time.monotonic() + seconds
    while True:
        try:
            there = set(os.listdir(directory))  # asks the server, where a look-up may not
        except OSError:
            there = set[str]()
        if there.issuperset(names):
            return True
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)


def spread(params: Any) -> bool:
    """Whether parameters lie on the devices of several processes, which then compute together."""
    return any(
        isinstance(leaf, jax.Array) and not leaf.is_fully_addressable
        for leaf in jax.tree.leaves(params)
    )


def fetch(tree: Any) -> Any:
    """Arrays on the host, those too that lie on the devices of several processes.

    All processes of these devices call it together.
    """

    def get(leaf: Any) -> Any:
        if not isinstance(leaf, jax.Array) or leaf.is_fully_addressable or leaf.is_fully_replicated:
            return np.asarray(leaf)
        from jax.experimental import multihost_utils

        return np.asarray(multihost_utils.process_allgather(leaf, tiled=True))

    return jax.tree.map(get, tree) if spread(tree) else jax.device_get(tree)


def share_parts(
    parts: Parts,
    jobs: Mapping[int, Make] | Mapping[str, Make],
    *,
    together: bool = False,
    sizes: Sequence[int] | None = None,
    progress: Progress | None = None,
    team: Processes | None = None,
) -> int | None:
    """Make the parts that are missing, each in one of the processes, and wait until all are there.

    Does nothing where this process is alone, or keeps its parts in memory.

    Args:
      parts: where they are kept.
      jobs: what makes each part, by name; the same in all processes.
      together: all processes are needed for each part (see `spread`); process 0 keeps it.
      sizes: of each part, in the unit of `progress`; default: 1.
      progress: called with how much of what falls to this process is done, and of how much.
      team: the processes; default: the current ones.

    Returns:
      How many parts were missing; None where nothing was done.

    Raises:
      ToMerge: the processes write to disks of their own, and this one's parts are there.
      DataError: other jobs in another process; a part that another could not make, and why; parts
        of others that cannot be seen.
    """
    team = team or current()

    def make(name: Name, work: Make) -> None:
        if not together:
            parts.part(name, work)
            return
        arrays = {key: np.asarray(value) for key, value in work().items()}
        if team.writes:
            parts.save(name, arrays)

    units = [Unit((name,), functools.partial(make, name, work)) for name, work in jobs.items()]
    return share_units(parts, units, together=together, sizes=sizes, progress=progress, team=team)


class Unit(NamedTuple):
    """Work that one process does at a time.

    Attributes:
      names: of the parts that it keeps.
      run: does it; what is there is not made again.
    """

    names: tuple[Name, ...]
    run: Callable[[], object]


def share_units(
    parts: Parts,
    units: Sequence[Unit],
    *,
    together: bool = False,
    sizes: Sequence[int] | None = None,
    progress: Progress | None = None,
    team: Processes | None = None,
) -> int | None:
    """`share_parts` where several parts are made at a time; a unit that lacks one is run."""
    team = team or current()
    if team.count == 1 or parts.path is None:
        return None
    names = [list(unit.names) for unit in units]
    team.compare("parts", {"parts": digest(names)})
    missing = _missing(parts, names, team)
    mine = missing if together else missing[team.index :: team.count]
    sizes = sizes or [1] * len(units)
    done, total = 0, sum(sizes[number] for number in mine)
    with team.all_or_none("parts are made") as troubled:
        for number in mine:
            if troubled():
                break
            units[number].run()
            done += sizes[number]
            if progress is not None:
                progress(done, total)
    wanted = [name for number in missing for name in names[number]]
    _check_there(parts, wanted, team, together=together)
    return len(missing)


def agreed_missing(parts: Parts, names: Mapping[str, Name]) -> list[str]:
    """The keys of those parts that are not there: the same in all processes that share them."""

    def look() -> list[str]:
        return [key for key, name in names.items() if parts.load(name) is None]

    team = current()
    if team.local_disks or parts.path is None:
        return look()
    return team.of_first("missing", look)


def write_once(label: str, write: Callable[[], object]) -> None:
    """Let process 0 write results (on local disks each does), and go on when it has."""
    team = current()
    if team.writes:
        write()
    team.wait(label)


def _missing(parts: Parts, names: Sequence[Sequence[Name]], team: Processes) -> list[int]:
    """Numbers of the units that no process has: as process 0 sees it, where all see the same."""

    def look() -> list[int]:
        return [
            number
            for number, of_unit in enumerate(names)
            if any(parts.load(name) is None for name in of_unit)
        ]

    if not team.local_disks:
        return team.of_first("missing parts", look)
    everywhere = team.gather("missing parts", look())
    # A disk of its own may have what a stopped run left there: who has it is the one to keep it.
    return sorted(set.intersection(*map(set, everywhere)))


def _check_there(parts: Parts, names: Sequence[Name], team: Processes, *, together: bool) -> None:
    """Raise unless this process sees the parts that all have made."""
    assert parts.path is not None
    if team.local_disks:
        absent = [name for name in names if parts.load(name) is None]
        lacking = team.gather("parts of others", len(absent))
        if any(lacking) and not together:
            raise ToMerge(
                f"{parts.path}: holds the parts that {team.name(team.index)} made; bring the "
                "directories of all processes to one place, join them with `jaxneurons merge "
                "DIR... --out DIR`, and run the same command on that without --local-disks"
            )
        return
    files = [RunDirectory.file_name(name) for name in names]
    if not _is_seen(parts.path / PARTS, files, SEEN):
        raise DataError(
            f"{parts.path}: {team.name(team.index)} does not see the parts of other processes; "
            "give a directory on a disk that all share"
        )
