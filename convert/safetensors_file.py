"""Safetensors files, read by rows and written tensor by tensor.

The `safetensors` package maps the file into memory and writes from tensors that are all in memory
at once. Here nothing is held but the rows in hand, and every field of a header is checked before
it is used.
"""

import dataclasses
import json
import math
import os
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from io import FileIO
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from jaxneurons.errors import SourceError
from jaxneurons.storage.progress import Advance
from jaxneurons.storage.settings import as_path

DTYPES: dict[str, np.dtype] = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16),
    "I8": np.dtype(np.int8),
    "U64": np.dtype(np.uint64),
    "U32": np.dtype(np.uint32),
    "U16": np.dtype(np.uint16),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
_MAX_HEADER = 100_000_000  # bytes, as the format's own reader allows


@dataclasses.dataclass(frozen=True)
class Entry:
    """Where a tensor lies in a file.

    Attributes:
      dtype: as stored.
      shape: slowest axis first.
      offset: of its data, in bytes from the start of the file.
    """

    dtype: np.dtype
    shape: tuple[int, ...]
    offset: int

    @property
    def nbytes(self) -> int:
        """Of its data."""
        return math.prod(self.shape) * self.dtype.itemsize


def open_safetensors(path: str | os.PathLike[str]) -> dict[str, Entry]:
    """The tensors of a file, by name, in the order of their data.

    Raises:
      SourceError: the file cannot be read, or is damaged or truncated: says how.
    """
    path = as_path("path", path)
    header, data, size = _header(path)
    header.pop("__metadata__", None)
    entries = {name: _entry(path, name, values, data, size) for name, values in header.items()}
    entries = dict(sorted(entries.items(), key=lambda item: (item[1].offset, item[1].nbytes)))
    at = data
    for name, entry in entries.items():
        if entry.offset != at:
            raise _damaged(path, f"tensor {name} does not begin where the one before it ends")
        at += entry.nbytes
    if at != size:
        raise _damaged(path, f"{size} bytes, its tensors end at {at}")
    return entries


def read_metadata(path: str | os.PathLike[str]) -> dict[str, str]:
    """The texts that a file carries beside its tensors.

    Raises:
      SourceError: the file cannot be read, or its header is damaged.
    """
    path = as_path("path", path)
    metadata = _header(path)[0].get("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise _damaged(path, "its metadata are not texts")
    return metadata


def _header(path: Path) -> tuple[dict[str, Any], int, int]:
    """The header, where the data begin, and the size of the file."""
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            start = file.read(8)
            length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
            if not 2 <= length <= min(_MAX_HEADER, size - 8):
                raise _damaged(path, f"{size} bytes, the header claims {length}")
            raw = file.read(length)
    except OSError as error:
        raise SourceError(f"{path}: cannot be read: {error.strerror or error}") from None
    try:
        header = json.loads(raw, object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise _damaged(path, f"its header is not valid: {' '.join(str(error).split())}") from None
    if not isinstance(header, dict):
        raise _damaged(path, "its header is not an object")
    return header, 8 + length, size


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) != len(pairs):
        raise ValueError("a name appears twice")
    return values


def _entry(path: Path, name: str, values: Any, start: int, size: int) -> Entry:
    if not isinstance(values, dict) or set(values) != {"dtype", "shape", "data_offsets"}:
        raise _damaged(path, f"tensor {name}: dtype, shape and data_offsets are needed")
    shape, offsets = values["shape"], values["data_offsets"]
    if not (_counts(shape) and _counts(offsets) and len(offsets) == 2 and len(shape) <= 8):
        raise _damaged(path, f"tensor {name}: shape or data_offsets are not counts")
    if not isinstance(values["dtype"], str) or values["dtype"] not in DTYPES:
        raise SourceError(f"{path}: tensor {name} has the unsupported dtype {values['dtype']!r}")
    entry = Entry(DTYPES[values["dtype"]], tuple(shape), start + offsets[0])
    if offsets[1] - offsets[0] != entry.nbytes or start + offsets[1] > size:
        raise _damaged(
            path, f"tensor {name} of shape {entry.shape} does not fit its bytes {tuple(offsets)}"
        )
    return entry


def _counts(values: Any) -> bool:
    return isinstance(values, list) and all(
        isinstance(v, int) and not isinstance(v, bool) and 0 <= v < 2**63 for v in values
    )


def read_rows(
    path: Path,
    name: str,
    entry: Entry,
    rows: slice = slice(None),
    columns: slice = slice(None),
) -> np.ndarray:
    """Some rows (of axis 0, without a step) of a tensor, as stored; of them some columns (axis 1).

    No other bytes of the file are read.

    Raises:
      SourceError: the file has changed since its header was read.
    """
    if not entry.shape:
        rows, entry = slice(None), dataclasses.replace(entry, shape=(1,))
    first, last, _ = rows.indices(entry.shape[0])
    shape = (max(last - first, 0), *entry.shape[1:])
    row = entry.nbytes // max(entry.shape[0], 1)
    skipped = 0  # bytes of every row
    if len(shape) > 1:
        start, stop, _ = columns.indices(shape[1])
        skipped = start * (row // max(shape[1], 1))
        shape = (shape[0], max(stop - start, 0), *shape[2:])
    values = np.empty(shape, entry.dtype)
    pieces = [values] if values.nbytes == row * shape[0] else list(values)
    try:
        with path.open("rb", buffering=0) as file:
            for number, piece in enumerate(pieces, first):
                file.seek(entry.offset + number * row + skipped)
                _read_into(file, piece, path, name)
    except OSError as error:
        raise SourceError(f"{path}: cannot be read: {error.strerror or error}") from None
    return values


def _read_into(file: FileIO, values: np.ndarray, path: Path, name: str) -> None:
    """Fill an array from where a file is."""
    view = memoryview(values.reshape(-1).view(np.uint8).data)
    while view:
        count = file.readinto(view)
        if not count:
            raise SourceError(f"{path}: truncated: tensor {name} is cut off")
        view = view[count:]


def _damaged(path: Path, why: str) -> SourceError:
    return SourceError(f"{path}: damaged or truncated safetensors file ({why})")


@dataclasses.dataclass(frozen=True)
class ToWrite:
    """A tensor to be written.

    Attributes:
      dtype: to store it as.
      shape: slowest axis first.
      pieces: makes its values, some rows at a time, in order.
    """

    dtype: np.dtype
    shape: tuple[int, ...]
    pieces: Callable[[], Iterable[np.ndarray]]


def write_safetensors(
    path: str | os.PathLike[str],
    tensors: Mapping[str, ToWrite],
    *,
    progress: Advance | None = None,
) -> None:
    """Write a file, tensor by tensor; it is on the disk when this returns."""
    with Path(path).open("wb") as file:
        file.write(_encode_header(tensors, {"format": "pt"}))
        for tensor in tensors.values():
            for piece in ahead(_contiguous(tensor)):
                file.write(piece.reshape(-1).view(np.uint8).data)
                if progress is not None:
                    progress(piece.nbytes)
        file.flush()
        os.fsync(file.fileno())


def encode_safetensors(tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str]) -> bytes:
    """A small file with texts beside its tensors, in memory.

    Args:
      tensors: by name.
      metadata: what `read_metadata` returns.
    """
    entries = {
        name: ToWrite(tensor.dtype, tensor.shape, lambda: ()) for name, tensor in tensors.items()
    }
    return _encode_header(entries, metadata) + b"".join(
        np.ascontiguousarray(tensor).tobytes() for tensor in tensors.values()
    )


def _encode_header(tensors: Mapping[str, ToWrite], metadata: Mapping[str, str]) -> bytes:
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    at = 0
    for name, tensor in tensors.items():
        end = at + math.prod(tensor.shape) * tensor.dtype.itemsize
        header[name] = {
            "dtype": NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [at, end],
        }
        at = end
    raw = json.dumps(header, separators=(",", ":")).encode()
    raw += b" " * (-len(raw) % 8)
    return struct.pack("<Q", len(raw)) + raw


def _contiguous(tensor: ToWrite) -> Iterator[np.ndarray]:
    for piece in tensor.pieces():
        yield np.ascontiguousarray(piece, dtype=tensor.dtype)


def ahead(pieces: Iterator[np.ndarray]) -> Iterator[np.ndarray]:
    """The same pieces, the next one made while one is used."""
    with ThreadPoolExecutor(1) as pool:
        following = pool.submit(next, pieces, None)
        while (piece := following.result()) is not None:
            following = pool.submit(next, pieces, None)
            yield piece
