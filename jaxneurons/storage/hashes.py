"""SHA-256 of files."""

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

_THREADS = 4  # that hash files


def hash_file(path: Path) -> str:
    """SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def hash_each(paths: Iterable[Path]) -> dict[Path, str]:
    """SHA-256 of each file, several at a time."""
    paths = list(paths)
    with ThreadPoolExecutor(_THREADS) as pool:
        return dict(zip(paths, pool.map(hash_file, paths), strict=True))


def hash_files(paths: Sequence[Path], digests: Mapping[Path, str] | None = None) -> str:
    """SHA-256 of a file, or of the list of several files' names and hashes.

    Args:
      paths: the files.
      digests: of those that have been hashed already.
    """
    known = dict(digests or {})
    known |= hash_each(path for path in paths if path not in known)
    if len(paths) == 1:
        return known[paths[0]]
    listing = "".join(f"{known[path]}  {path.name}\n" for path in sorted(paths))
    return hashlib.sha256(listing.encode()).hexdigest()
