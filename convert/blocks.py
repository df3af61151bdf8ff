"""Blocks: what this process's devices hold of a parameter, and what must be read to fill them.

A parameter without a sharding is one block. A sharded one is as many as this process's devices hold
different parts of it; parts that other processes hold are never read. Blocks are filled from rows
and columns of stored tensors, in the order in which they lie in the file.
"""

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import Sharding

_ALIGNMENT = 64  # bytes
_CHUNK = 1 << 20  # values read at a time

Box = tuple[slice, ...]
"""Along each axis of an array, the part from `start` to `stop`."""


class Block(NamedTuple):
    """A part of a parameter, on the host.

    Attributes:
      box: which part.
      host: its values, to be filled.
    """

    box: Box
    host: np.ndarray


@dataclasses.dataclass(frozen=True)
class Form:
    """How checkpoints store a parameter, as far as reading parts of it depends on that.

    Attributes:
      stacked: one tensor a layer, for axis 0 of the parameter.
      transposed: a layer's two axes are swapped.
      whole_rows: rows that are read together; heads whose rows are interleaved, say.
    """

    stacked: bool
    transposed: bool
    whole_rows: int = 1

    def stored(self, box: Box) -> tuple[range | None, slice, slice | None]:
        """Layers, rows and columns of stored tensors that a box of the parameter is made of."""
        layers, rest = (box[0], box[1:]) if self.stacked else (None, box)
        rows, *columns = rest[::-1] if self.transposed else rest
        return (
            None if layers is None else range(layers.start, layers.stop),
            rows,
            columns[0] if columns else None,
        )


class Reading(NamedTuple):
    """Part of a stored tensor.

    Attributes:
      layer: of the tensor, if there is one a layer.
      rows: along its axis 0.
      columns: along its axis 1; None: of a tensor that has one axis.
    """

    layer: int | None
    rows: slice
    columns: slice | None


def blocks_of(shape: Sequence[int], dtype: np.dtype, sharding: Sharding | None) -> list[Block]:
    """The different parts of an array that this process's devices hold, to be filled.

    Args:
      shape: of the whole array.
      dtype: of it.
      sharding: None: one block, the whole of it.
    """
    if sharding is None:
        boxes = [_box((), shape)]
    else:
        indices = sharding.addressable_devices_indices_map(tuple(shape)).values()
        boxes = [_box(index or (), shape) for index in indices]
    unique = {_key(box): box for box in boxes}
    return [Block(box, aligned([s.stop - s.start for s in box], dtype)) for box in unique.values()]


def of_expert(blocks: Sequence[Block], expert: int | None) -> Sequence[Block]:
    """What blocks hold of one expert's kernels (axis 1 of the parameter), by layer; None: all."""
    if expert is None:
        return blocks
    parts = []
    for (layers, experts, *rest), host in blocks:
        if experts.start <= expert < experts.stop:
            parts.append(Block((layers, *rest), host[:, expert - experts.start]))
    return parts


def to_devices(
    blocks: Iterable[Block], shape: Sequence[int], sharding: Sharding | None
) -> jax.Array:
    """The array that filled blocks are the parts of; without a sharding, on the default device."""
    values = {_key(block.box): block.host for block in blocks}
    if sharding is None:
        (host,) = values.values()
        return jax.device_put(host)
    return jax.make_array_from_callback(
        tuple(shape), sharding, lambda index: values[_key(_box(index or (), shape))]
    )


def readings(blocks: Iterable[Block], form: Form, stored_shape: Sequence[int]) -> Iterator[Reading]:
    """What must be read of stored tensors to fill blocks: everything that is needed, once.

    Bounded in size, so that no temporary array is large. Columns between two blocks' are not read.
    """
    wanted: dict[tuple[int, int, int], tuple[list[tuple[int, int]], slice]] = {}
    for block in blocks:
        layers, rows, columns = form.stored(block.box)
        interval = (0, 1) if columns is None else (columns.start, columns.stop)
        for layer in (0,) if layers is None else layers:
            key = (layer, rows.start, rows.stop)
            wanted.setdefault(key, ([], rows))[0].append(interval)
    for (layer, *_), (intervals, rows) in sorted(wanted.items(), key=lambda item: item[0]):
        for start, stop in joined(intervals):
            columns = slice(start, stop) if len(stored_shape) > 1 else None
            for part in _parts(rows, stop - start, form.whole_rows, stored_shape[0]):
                yield Reading(layer if form.stacked else None, part, columns)


def put_into(
    blocks: Iterable[Block],
    form: Form,
    reading: Reading,
    values: np.ndarray,
    assign: Callable[[np.ndarray, np.ndarray], None],
) -> None:
    """Hand `assign` every block's place for values that were read, and those that belong there.

    Args:
      blocks: of a parameter.
      form: how it is stored.
      reading: what the values are.
      values: [row, column] as stored, or [row].
      assign: puts values, as stored, into a place, which is transposed if `form` says so.
    """
    for block in blocks:
        layers, rows, columns = form.stored(block.box)
        host = block.host
        if layers is not None:
            assert reading.layer is not None
            if reading.layer not in layers:
                continue
            host = host[reading.layer - layers.start]
        here, there = meet(rows, reading.rows)
        if here is None or there is None:
            continue
        if columns is None or reading.columns is None:
            assign(host[here], values[there])
            continue
        across, from_ = meet(columns, reading.columns)
        if across is not None and from_ is not None:
            place = host[across, here] if form.transposed else host[here, across]
            assign(place, values[there, from_])


def aligned(shape: Sequence[int], dtype: np.dtype) -> np.ndarray:
    """An empty array that a CPU device can adopt as it is: XLA copies what is not aligned."""
    nbytes = math.prod(shape) * dtype.itemsize
    raw = np.empty(nbytes + _ALIGNMENT, np.uint8)
    start = -raw.ctypes.data % _ALIGNMENT
    return raw[start : start + nbytes].view(dtype).reshape(shape)


def _box(index: Sequence[slice], shape: Sequence[int]) -> Box:
    """The part that an index means, with numbers."""
    full = itertools.chain(index, itertools.repeat(slice(None)))
    return tuple(slice(*part.indices(size)[:2]) for part, size in zip(full, shape, strict=False))


def _key(box: Box) -> tuple[tuple[int, int], ...]:
    """A box that can be looked up: slices have no hash before Python 3.12."""
    return tuple((part.start, part.stop) for part in box)


def joined(intervals: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """Intervals, in order; those that touch or overlap are one."""
    joined: list[tuple[int, int]] = []
    for start, stop in sorted(intervals):
        if joined and start <= joined[-1][1]:
            joined[-1] = (joined[-1][0], max(stop, joined[-1][1]))
        else:
            joined.append((start, stop))
    return joined


def _parts(rows: slice, width: int, unit: int, count: int) -> Iterator[slice]:
    """Rows in parts of a bounded size, each of whole units."""
    step = max(1, _CHUNK // max(1, width) // unit) * unit
    first, last = rows.start // unit * unit, min(-(-rows.stop // unit) * unit, count)
    for start in range(first, last, step):
        yield slice(start, min(start + step, last))


def meet(inner: slice, outer: slice) -> tuple[slice | None, slice | None]:
    """Where two intervals overlap, counted from the start of each."""
    start, stop = max(inner.start, outer.start), min(inner.stop, outer.stop)
    if start >= stop:
        return None, None
    return (
        slice(start - inner.start, stop - inner.start),
        slice(start - outer.start, stop - outer.start),
    )
