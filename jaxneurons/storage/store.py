"""Results on disk: a run directory whose finished parts survive whatever happens next.

Every file is written under another name and moved into place, so that a file that is there is
whole. A directory belongs to one identity (model, data, settings): another one is refused.
"""

import abc
import hashlib
import io
import json
import math
import os
import re
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jaxneurons.errors import DataError, WriteError

PARTS, IDENTITY = "parts", "identity.json"
"""Of a run directory: where its parts are, and in it what they depend on."""
_DIGEST = hashlib.sha256().digest_size


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically.

    Raises:
      WriteError: as `write_bytes`.
    """
    # Bytes of a file name that are no UTF-8 come as halves of surrogate pairs; JSON reads their
    # escapes back.
    write_bytes(path, text.encode("utf-8", "backslashreplace"))


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file atomically, indented, keys in the order given.

    Raises:
      DataError: a NaN or an infinity, which JSON does not have; says where. `null_for_nan` makes
        them null where a value may be missing.
      WriteError: as `write_bytes`.
    """
    write_text(path, _json(path, value, indent=2) + "\n")


def write_json_lines(path: Path, records: Iterable[Any]) -> None:
    """Write a JSON Lines file atomically, one record a line; as `write_json`."""
    write_text(path, "".join(_json(path, record) + "\n" for record in records))


def _json(path: Path, value: Any, indent: int | None = None) -> str:
    try:
        return json.dumps(value, indent=indent, ensure_ascii=False, allow_nan=False)
    except ValueError as error:
        where = next(_not_numbers(value), None)
        reason = str(error) if where is None else f"{where} has no place in JSON"
        raise DataError(f"{path}: not written: {reason}") from None


def _not_numbers(value: Any, where: str = "") -> Iterator[str]:
    """Where NaN and infinities are in a JSON value."""
    if isinstance(value, float) and not math.isfinite(value):
        yield f"{where.lstrip('.') or 'the value'} = {value}"
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _not_numbers(inner, f"{where}.{key}")
    if isinstance(value, list | tuple):
        for number, inner in enumerate(value):
            yield from _not_numbers(inner, f"{where}[{number}]")


def null_for_nan(value: Any) -> Any:
    """A JSON value whose NaN and infinities are null: for what may be missing."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: null_for_nan(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [null_for_nan(inner) for inner in value]
    return value


def write_bytes(path: Path, data: bytes) -> None:
    """Write a file atomically: whatever happens, it is the old one or the whole new one.

    A link is followed; a pipe or a device (/dev/stdout) is written into.

    Raises:
      WriteError: no room, no permission, no such directory; names the path and the cause.
    """
    try:
        target = Path(os.path.realpath(path))
        if target.exists() and not target.is_file() and not target.is_dir():
            target.write_bytes(data)
            return
        handle, name = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name[:40]}.")
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            mask = os.umask(0)
            os.umask(mask)
            os.chmod(name, 0o666 & ~mask)
            os.replace(name, target)
        except BaseException:
            Path(name).unlink(missing_ok=True)
            raise
    except OSError as error:
        raise WriteError(path, error) from None


def make_directory(path: Path) -> None:
    """Make a directory and its parents, unless it is there.

    Raises:
      WriteError: it cannot be made; names the path and the cause.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise WriteError(path, error) from None


def check_writable(path: Path) -> None:
    """Raise `WriteError` unless files can be made in a directory, which is made if it is missing.

    For a start: before hours of work whose results would have no place.

    Raises:
      DataError: it is a file.
    """
    if path.exists() and not path.is_dir():
        raise DataError(f"{path}: is a file; give a directory to write results to")
    make_directory(path)
    try:
        with tempfile.TemporaryFile(dir=path):
            pass
    except OSError as error:
        raise WriteError(path, error) from None


def check_not_input(output: Path, *inputs: Path) -> None:
    """Raise `DataError` if an output would take the place of an input, by whatever name."""
    for source in inputs:
        try:
            same = os.path.samefile(output, source)
        except OSError:  # one of them is not there
            same = os.path.abspath(output) == os.path.abspath(source)
        if same:
            raise DataError(f"{output}: is what is read ({source}); give another file to write to")


def check_new_file(output: Path, *inputs: Path) -> None:
    """Raise unless a file can be made: before anything is read for it, or computed.

    What is no file of its own, a pipe or a device, can be written into.

    Args:
      output: the file; its directory is made if it is missing.
      inputs: what is read.

    Raises:
      DataError: it is an input, or is there already, as a file or a directory.
      WriteError: its directory cannot be written.
    """
    check_not_input(output, *inputs)
    if output.is_dir():
        raise DataError(f"{output} is a directory; give the name of a file to write")
    if output.is_file():
        raise DataError(f"{output} exists already; delete it or give another name")
    check_writable(output.absolute().parent)


def digest(value: Any) -> str:
    """SHA-256 of a JSON-serialisable value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


class Parts(abc.ABC):
    """Finished results by name: loaded where they are there, else made and kept."""

    @property
    @abc.abstractmethod
    def path(self) -> Path | None:
        """The directory that they are in; None: in memory."""

    @abc.abstractmethod
    def load(self, name: int | str) -> dict[str, np.ndarray] | None:
        """A finished part, or None if it is not there."""

    @abc.abstractmethod
    def save(self, name: int | str, arrays: Mapping[str, np.ndarray]) -> None:
        """Keep a part."""

    @abc.abstractmethod
    def remove(self, name: int | str) -> None:
        """Forget a part, if it is there."""

    def part(
        self, name: int | str, make: Callable[[], Mapping[str, np.ndarray]]
    ) -> dict[str, np.ndarray]:
        """The part of that name; made and kept where it is not there."""
        arrays = self.load(name)
        if arrays is None:
            arrays = {key: np.asarray(value) for key, value in make().items()}
            self.save(name, arrays)
        return arrays


class Memory(Parts):
    """Parts that live as long as this object."""

    def __init__(self) -> None:
        self._parts: dict[int | str, dict[str, np.ndarray]] = {}

    @property
    def path(self) -> None:
        """In no directory."""

    def load(self, name: int | str) -> dict[str, np.ndarray] | None:
        """A finished part, or None if it is not there."""
        return self._parts.get(name)

    def save(self, name: int | str, arrays: Mapping[str, np.ndarray]) -> None:
        """Keep a part."""
        self._parts[name] = dict(arrays)

    def remove(self, name: int | str) -> None:
        """Forget a part, if it is there."""
        self._parts.pop(name, None)


class Overlay(Parts):
    """Parts that are looked for in several places; new ones go to the first, which alone changes.

    Args:
      first: where parts are kept.
      others: where they are looked for next, in this order.
    """

    def __init__(self, first: Parts, *others: Parts):
        self._first = first
        self._others = others

    @property
    def path(self) -> Path | None:
        """The directory of the first place."""
        return self._first.path

    def load(self, name: int | str) -> dict[str, np.ndarray] | None:
        """A finished part, from the first place that has it; None if none has."""
        for parts in (self._first, *self._others):
            if (arrays := parts.load(name)) is not None:
                return arrays
        return None

    def save(self, name: int | str, arrays: Mapping[str, np.ndarray]) -> None:
        """Keep a part in the first place."""
        self._first.save(name, arrays)

    def remove(self, name: int | str) -> None:
        """Forget a part of the first place, if it is there."""
        self._first.remove(name)


class RunDirectory(Parts):
    """A directory of results with numbered or named parts that a later run picks up.

    Args:
      path: the directory; made if it is missing.
      identity: what the parts depend on. A directory with parts of another identity is refused.

    Raises:
      DataError: the directory holds another run, or other files.
      WriteError: it cannot be written.
    """

    def __init__(self, path: str | os.PathLike[str], identity: Mapping[str, Any]):
        self._path = Path(path)
        self.parts = self._path / PARTS
        if self.check(path, identity, whole=True):
            return
        make_directory(self.parts)
        write_json(self.parts / IDENTITY, dict(identity))

    @property
    def path(self) -> Path:
        """The directory."""
        return self._path

    @staticmethod
    def check(
        path: str | os.PathLike[str], identity: Mapping[str, Any], *, whole: bool = False
    ) -> bool:
        """Whether a run of this identity is in a directory; nothing is written.

        Args:
          path: the directory; it may be missing.
          identity: what is known of it.
          whole: nothing else is to be known of it.

        Raises:
          DataError: the directory holds another run, or other files.
        """
        path = Path(path)
        if path.exists() and not path.is_dir():
            raise DataError(f"{path}: is a file; give a directory to write results to")
        known = path / PARTS / IDENTITY
        there = known.is_file()
        if not there and path.is_dir() and not _is_new(path):
            there = known.is_file()  # another process may have made the directory meanwhile
            if not there:
                raise DataError(
                    f"{path}: holds files but no run of ours; give a new or empty directory"
                )
        if there:
            _check_identity(known, identity, whole)
        return there

    @staticmethod
    def file_name(name: int | str) -> str:
        """The file of a part, in the directory `PARTS`."""
        return f"{name:05d}.npz" if isinstance(name, int) else f"{name}.npz"

    def _part(self, name: int | str) -> Path:
        return self.parts / self.file_name(name)

    def load(self, name: int | str) -> dict[str, np.ndarray] | None:
        """A finished part, or None if it is not there or cannot be read (it is then made again)."""
        try:
            content = self._part(name).read_bytes()
        except OSError:
            return None
        content, digest = content[:-_DIGEST], content[-_DIGEST:]
        if hashlib.sha256(content).digest() != digest:
            return None
        try:
            return dict(np.load(io.BytesIO(content), allow_pickle=False))
        except Exception:  # whole, and yet not a part: zipfile and numpy raise this and that
            return None

    def save(self, name: int | str, arrays: Mapping[str, np.ndarray]) -> None:
        """Write a part atomically, followed by its SHA-256: a zip file checks less than all."""
        buffer = io.BytesIO()
        np.savez(buffer, allow_pickle=False, **arrays)
        content = buffer.getvalue()
        write_bytes(self._part(name), content + hashlib.sha256(content).digest())

    def remove(self, name: int | str) -> None:
        """Delete a part, if it is there."""
        self._part(name).unlink(missing_ok=True)


def _is_new(path: Path) -> bool:
    """Whether nothing is there but what a first write, stopped or refused, leaves behind."""
    parts, begun = path / PARTS, f".{IDENTITY}."
    return all(entry == parts for entry in path.iterdir()) and (
        not parts.exists()
        or (parts.is_dir() and all(entry.name.startswith(begun) for entry in parts.iterdir()))
    )


def _check_identity(known: Path, identity: Mapping[str, Any], whole: bool) -> None:
    try:
        there = json.loads(known.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        raise DataError(f"{known}: unreadable; give a new directory") from None
    wanted = json.loads(json.dumps(dict(identity)))
    if not isinstance(there, dict):
        raise DataError(f"{known}: unreadable; give a new directory")
    names = [*wanted, *(name for name in there if whole and name not in wanted)]
    other = [name for name in names if _value(there, name) != _value(wanted, name)]
    if other:
        differences = ", ".join(_difference(name, there, wanted) for name in other)
        raise DataError(
            f"{known.parent.parent}: holds a run with {differences}; give a new directory, or "
            "delete this one"
        )


_MISSING = object()
_MOST = 3
"""Values within a setting of which it is said how they differ, at most."""


def _value(identity: Mapping[str, Any], name: str) -> Any:
    return identity.get(name, _MISSING)


def _difference(name: str, there: Mapping[str, Any], here: Mapping[str, Any]) -> str:
    """What of a run is another: its name, and both values where they can be read."""
    pairs = list(_leaves("", _value(there, name), _value(here, name)))
    shown = [
        f"{place} {_short(old)} there, {_short(new)} here".strip()
        for place, old, new in pairs
        if not (_is_digest(old) or _is_digest(new))
    ]
    values = "; ".join([*shown[:_MOST], *(["..."] if len(shown) > _MOST else [])])
    article = "other" if name.endswith("s") else "another"
    return f"{article} {name}{f' ({values})' if values else ''}"


def _leaves(place: str, old: Any, new: Any) -> Iterator[tuple[str, Any, Any]]:
    """Where two JSON values differ, and both values there."""
    if isinstance(old, dict) and isinstance(new, dict):
        for key in dict.fromkeys((*old, *new)):
            inner = f"{place}.{key}".lstrip(".")
            yield from _leaves(inner, _value(old, key), _value(new, key))
    elif old != new:
        yield place, old, new


def _is_digest(value: Any) -> bool:
    """Whether a value says nothing to people."""
    return isinstance(value, str) and bool(re.fullmatch("[0-9a-f]{32,}", value))


def _short(value: Any) -> str:
    text = "none" if value is _MISSING else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 40 else f"{text[:37]}..."
