"""Parts of the uncompressed Zarr arrays that the native format holds, and no other bytes.

TensorStore, which Orbax reads with, takes whole chunks from the file system. A chunk that is not
compressed is its values in C order, so what a process needs of it can be read by itself: with rules
that split the chunks' axes finely, many times less.
"""

import dataclasses
import functools
import itertools
import json
import math
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
from jax.sharding import Sharding

from jaxneurons.convert.blocks import Block, Box, blocks_of, joined, meet, to_devices
from jaxneurons.convert.fill import THREADS
from jaxneurons.errors import SourceError
from jaxneurons.storage.progress import Advance

_DTYPES = {
    "<f4": np.dtype("<f4"),
    "<f2": np.dtype("<f2"),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
}


@dataclasses.dataclass(frozen=True)
class ZarrArray:
    """An array of the native format.

    Attributes:
      path: its directory.
      shape: of the array.
      chunks: shape of every chunk; those at the end are padded to it.
      dtype: as stored.
    """

    path: Path
    shape: tuple[int, ...]
    chunks: tuple[int, ...]
    dtype: np.dtype

    def pieces(self, box: Box) -> Iterator[tuple[tuple[int, ...], Box]]:
        """The chunks that a part of the array lies in, and the part of it in each."""
        numbers = [
            range(part.start // size, -(-part.stop // size))
            for part, size in zip(box, self.chunks, strict=True)
        ]
        for chunk in itertools.product(*numbers):
            bounds = zip(box, chunk, self.chunks, strict=True)
            yield (
                chunk,
                tuple(
                    slice(max(part.start, n * size), min(part.stop, (n + 1) * size))
                    for part, n, size in bounds
                ),
            )

    def read(self, chunk: tuple[int, ...], box: Box) -> np.ndarray:
        """A part of the array that lies in one chunk.

        Raises:
          OSError: the chunk is not there, or ends too early.
        """
        start = [part.start - n * s for part, n, s in zip(box, chunk, self.chunks, strict=True)]
        shape = tuple(part.stop - part.start for part in box)
        values = np.empty(shape, self.dtype)
        # Trailing axes that are taken whole make one run with the axis before them.
        axis = len(shape)
        while axis > 1 and shape[axis - 1] == self.chunks[axis - 1]:
            axis -= 1
        leading = shape[: axis - 1]
        strides = [math.prod(self.chunks[n + 1 :]) for n in range(len(shape))]
        runs = values.reshape(math.prod(leading), -1).view(np.uint8)
        with (self.path / ".".join(map(str, chunk))).open("rb", buffering=0) as file:
            for run, index in zip(runs, np.ndindex(*leading), strict=True):
                at = [first + n for first, n in itertools.zip_longest(start, index, fillvalue=0)]
                offset = sum(n * stride for n, stride in zip(at, strides, strict=True))
                file.seek(offset * self.dtype.itemsize)
                view = memoryview(run.data)
                while view:
                    if not (count := file.readinto(view)):
                        raise OSError(f"{file.name} ends too early")
                    view = view[count:]
        return values


def open_array(path: Path) -> ZarrArray | None:
    """An array of the native format; None if it is stored in another way than is read here.

    Raises:
      OSError, ValueError: there is none, or its description is damaged.
    """
    about: dict[str, Any] = json.loads((path / ".zarray").read_text())
    plain = {"zarr_format": 2, "compressor": None, "filters": None, "order": "C"}
    shape: Any = about.get("shape")
    chunks: Any = about.get("chunks")
    if (
        any(about.get(key) != value for key, value in plain.items())
        or about.get("dimension_separator", ".") != "."
        or about.get("dtype") not in _DTYPES
        or not (_counts(shape) and _counts(chunks) and len(shape) == len(chunks) > 0)
    ):
        return None
    return ZarrArray(path, tuple(shape), tuple(chunks), _DTYPES[about["dtype"]])


def parts_to_read(blocks: Sequence[Block]) -> Iterator[Box]:
    """What blocks hold, with those that are beside each other on the last axis together."""
    wanted: dict[tuple[tuple[int, int], ...], tuple[Box, list[tuple[int, int]]]] = {}
    for block in blocks:
        *leading, last = block.box
        key = tuple((part.start, part.stop) for part in leading)
        wanted.setdefault(key, (tuple(leading), []))[1].append((last.start, last.stop))
    for leading, intervals in wanted.values():
        for start, stop in joined(intervals):
            yield (*leading, slice(start, stop))


def put_part(blocks: Sequence[Block], box: Box, values: np.ndarray) -> None:
    """Copy a part of an array into every block that holds some of it, in the block's dtype."""
    for block in blocks:
        pairs = [meet(here, part) for here, part in zip(block.box, box, strict=True)]
        if all(here is not None for here, _ in pairs):
            here, there = (tuple(side) for side in zip(*pairs, strict=True))
            block.host[here] = values[there]


def read_array(
    array: ZarrArray, sharding: Sharding, dtype: np.dtype, *, progress: Advance | None = None
) -> jax.Array:
    """An array in its sharding; of its bytes, this process reads those that its devices hold.

    Args:
      array: which.
      sharding: where it goes.
      dtype: that it gets.
      progress: called with the bytes of every piece that has been read.

    Raises:
      SourceError: chunks that are not there, or values that are not finite.
    """
    blocks = blocks_of(array.shape, dtype, sharding)
    pieces = (piece for box in parts_to_read(blocks) for piece in array.pieces(box))
    copy = functools.partial(_copy, array, blocks)
    with ThreadPoolExecutor(THREADS) as pool:
        for nbytes in pool.map(copy, pieces):
            if progress is not None:
                progress(nbytes)
    for block in blocks:
        if not np.isfinite(block.host).all():  # read as finite
            raise SourceError(
                f"{array.path.parent}: {array.path.name} holds NaN or infinite values in "
                f"{dtype.name}; load with dtype=bfloat16"
            )
    return to_devices(blocks, array.shape, sharding)


def _copy(array: ZarrArray, blocks: Sequence[Block], piece: tuple[tuple[int, ...], Box]) -> int:
    chunk, box = piece
    try:
        values = array.read(chunk, box)
    except OSError as error:
        reason = error.strerror or error
        raise SourceError(f"{array.path.parent}: cannot be restored: {reason}") from None
    if not np.isfinite(values).all():
        raise SourceError(f"{array.path.parent}: {array.path.name} holds NaN or infinite values")
    with np.errstate(over="ignore"):
        put_part(blocks, box, values)
    return values.nbytes


def _counts(values: Any) -> bool:
    return isinstance(values, list) and all(type(v) is int and v > 0 for v in values)
