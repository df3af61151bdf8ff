"""How many bytes hold arrays that are alive at different times, as the compiler lays them out."""

import math
from collections.abc import Sequence
from typing import NamedTuple


class Buffer(NamedTuple):
    """An array that is alive from one tick of the program to another, both included.

    It ends a tick after its last use: a kernel does not write where the one before it has read.
    """

    size: int
    start: int
    end: int


def arena(buffers: Sequence[Buffer]) -> int:
    """Bytes that hold buffers whose times overlap side by side: the largest are placed first.

    XLA's global best fit by decreasing size: each goes into the smallest gap that holds it.
    """
    return min(
        _placed(sorted(buffers, key=lambda b: (-b.size, b.start))),
        _placed(sorted(buffers, key=lambda b: (b.start - b.end, -b.size))),
    )


def _placed(buffers: Sequence[Buffer]) -> int:
    placed: list[tuple[int, Buffer]] = []
    height = 0
    for buffer in buffers:
        beside = sorted(
            (offset, offset + other.size)
            for offset, other in placed
            if other.start <= buffer.end and buffer.start <= other.end
        )
        at, best, room = 0, None, math.inf
        for low, high in beside:
            if buffer.size <= low - at < room:
                best, room = at, low - at
            at = max(at, high)
        offset = at if best is None else best
        placed.append((offset, buffer))
        height = max(height, offset + buffer.size)
    return height
