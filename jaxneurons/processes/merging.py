"""Parts of one run, written by several processes to disks of their own, joined in one directory."""

import os
from collections.abc import Sequence
from pathlib import Path

from jaxneurons.errors import DataError
from jaxneurons.storage.store import (
    IDENTITY,
    PARTS,
    RunDirectory,
    check_writable,
    write_bytes,
)
from jaxneurons.storage.tables import read_json


def merge_runs(directories: Sequence[str | os.PathLike[str]], out: str | os.PathLike[str]) -> int:
    """Join the parts of one run that several directories hold; they stay as they are.

    The command or the call that made them then goes on in `out`, from all of them.

    Args:
      directories: of one run.
      out: a run directory to write to; it may be new, one of them, or hold parts already.

    Returns:
      How many parts were added.

    Raises:
      DataError: no directories, one without parts, or parts of another run: says of what.
      WriteError: `out` cannot be written to.
    """
    sources = [Path(directory) for directory in directories]
    if not sources:
        raise DataError("no directories to merge; give those that the processes wrote")
    for source in sources:
        if not _is_run(source):
            raise DataError(f"{source}: no parts of a run here; give what a process has written")
    added = 0
    for inner in dict.fromkeys(path for source in sources for path in _runs(source)):
        having = [source / inner for source in sources if _is_run(source / inner)]
        added += _merge(having, Path(out) / inner)
    return added


def _is_run(path: Path) -> bool:
    return (path / PARTS / IDENTITY).is_file()


def _runs(source: Path) -> list[Path]:
    """The run in a directory, and those that it made on the way, below it."""
    found = sorted(source.rglob(f"{PARTS}/{IDENTITY}"))
    return [path.parent.parent.relative_to(source) for path in found]


def _merge(sources: Sequence[Path], out: Path) -> int:
    identity = read_json(sources[0] / PARTS / IDENTITY)
    for source in (*sources[1:], out):
        try:
            RunDirectory.check(source, identity, whole=True)
        except DataError as error:
            raise DataError(f"{source} is not of the run of {sources[0]}: {error}") from None
    check_writable(out)
    target = RunDirectory(out, identity)
    return sum(_join(source, target) for source in sources)


def _join(source: Path, target: RunDirectory) -> int:
    """Bring over what one directory has and the other does not; how many parts that were."""
    parts, added = RunDirectory(source, read_json(source / PARTS / IDENTITY)), 0
    for path in sorted((source / PARTS).glob("*.npz")):
        name = int(path.stem) if path.stem.isdecimal() else path.stem
        if parts.load(name) is not None and target.load(name) is None:
            write_bytes(target.parts / path.name, path.read_bytes())
            added += 1
    for path in sorted(source.iterdir()):
        there = target.path / path.name
        if path.is_file() and not path.name.startswith(".") and not there.exists():
            write_bytes(there, path.read_bytes())
    return added
