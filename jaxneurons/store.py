"""Results on disk: a run directory whose finished parts survive whatever happens next.

Every file is written under another name and moved into place, so that a file that is there is
whole. A directory belongs to one identity (model, data, settings): another one is refused.
"""

import hashlib
import io
import json
import os
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jaxneurons.errors import DataError

_IDENTITY = "identity.json"
_DIGEST = hashlib.sha256().digest_size


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically."""
    write_bytes(path, text.encode("utf-8"))


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file atomically, indented, keys in the order given."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def write_json_lines(path: Path, records: Iterable[Any]) -> None:
    """Write a JSON Lines file atomically, one record a line."""
    write_text(path, "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records))


def write_bytes(path: Path, data: bytes) -> None:
    """Write a file atomically: whatever happens, it is the old one or the whole new one."""
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        mask = os.umask(0)
        os.umask(mask)
        os.chmod(name, 0o666 & ~mask)
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def digest(value: Any) -> str:
    """SHA-256 of a JSON-serialisable value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


class RunDirectory:
    """A directory of results with numbered or named parts that a later run picks up.

    Args:
      path: the directory; made if it is missing.
      identity: what the parts depend on. A directory with parts of another identity is refused.

    Raises:
      DataError: the directory holds another run, or other files.
    """

    def __init__(self, path: str | os.PathLike[str], identity: Mapping[str, Any]):
        self.path = Path(path)
        self.parts = self.path / "parts"
        if self.path.exists() and not self.path.is_dir():
            raise DataError(f"{self.path}: is a file; give a directory to write results to")
        known = self.parts / _IDENTITY
        if known.is_file():
            self._check(known, identity)
        elif self.path.is_dir() and any(self.path.iterdir()):
            raise DataError(
                f"{self.path}: holds files but no run of ours; give a new or empty directory"
            )
        try:
            self.parts.mkdir(parents=True, exist_ok=True)
            write_json(known, dict(identity))
        except OSError as error:
            raise DataError(f"{self.path}: cannot be written ({error.strerror})") from None

    def _check(self, known: Path, identity: Mapping[str, Any]) -> None:
        try:
            there = json.loads(known.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            raise DataError(f"{known}: unreadable; give a new directory") from None
        wanted = json.loads(json.dumps(dict(identity)))
        if not isinstance(there, dict):
            raise DataError(f"{known}: unreadable; give a new directory")
        other = [key for key in wanted if there.get(key) != wanted[key]]
        if other or there.keys() != wanted.keys():
            raise DataError(
                f"{self.path}: holds a run with another {', '.join(other) or 'layout'}; "
                "give a new directory, or delete this one"
            )

    def _part(self, name: int | str) -> Path:
        return self.parts / (f"{name:05d}.npz" if isinstance(name, int) else f"{name}.npz")

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
