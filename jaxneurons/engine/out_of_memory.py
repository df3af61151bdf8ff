"""How much is run at once where memory may not hold it: halved when it runs out, with a warning."""

import warnings
from collections.abc import Callable
from typing import TypeVar

import jax
import numpy as np

from jaxneurons.errors import is_out_of_memory
from jaxneurons.processes.sharing import fetch
from jaxneurons.storage.settings import check_number

Result = TypeVar("Result")


class SmallerChunkWarning(UserWarning):
    """Memory ran out: less is run at once from now on, with the same results."""


class ChunkSize:
    """How much is run at once, of something that can be cut: prompts, edits, bytes of rows.

    Attributes:
      what: is counted, for the warning.
      least: below which it is not halved: then the error goes on to the caller.
    """

    def __init__(self, size: int, *, what: str, least: int = 1):
        check_number("size", size, least=1)
        check_number("least", least, least=1)
        self.what, self.least = what, least
        self._whole, self._divisor = size, 1

    @property
    def size(self) -> int:
        """What is tried next, at most."""
        return self._begin(None)

    def _begin(self, most: int | None) -> int:
        size = self._whole if most is None else min(self._whole, most)
        return max(self.least, size // self._divisor)

    def run_rows(
        self,
        function: Callable[[int, int], Result],
        count: int,
        *,
        axis: int,
        most: int | None = None,
        parts: int = 1,
    ) -> Result:
        """The arrays of `count` rows, fetched: as `function(start, end)` makes them of some.

        Args:
          function: of the first row and the one behind the last: arrays of so many rows, nested.
          count: rows in all.
          axis: of rows, in each array that comes out.
          most: as `run` takes it.
          parts: devices that rows are split over: so many, or a multiple, are run at once.
        """

        def in_parts(size: int) -> Result:
            size = max(parts, size - size % parts)
            made = [
                fetch(function(start, min(start + size, count))) for start in range(0, count, size)
            ]
            if len(made) == 1:
                return made[0]
            return jax.tree.map(lambda *arrays: np.concatenate(arrays, axis), *made)

        return self.run(in_parts, most=count if most is None else min(count, most), least=parts)

    def run(
        self,
        function: Callable[[int], Result],
        *,
        most: int | None = None,
        least: int = 1,
    ) -> Result:
        """What `function` makes with at most `size` at once; halved while that is too much.

        What ran out of memory once is halved in later calls too.

        Args:
          function: of the size; called again from the start with half of it, so that nothing of a
            call that failed may be kept.
          most: what this call begins with at most, of what memory is known to have room for.
          least: below which this call is not halved, if that is more than the usual.

        Raises:
          Exception: as the function's; for want of memory, where the size is the least already.
        """
        least = max(self.least, least)
        size = max(least, self._begin(most))
        while True:
            try:
                # Memory may run out after the call has returned.
                return jax.block_until_ready(function(size))
            except (MemoryError, RuntimeError) as error:
                if not is_out_of_memory(error) or size <= least:
                    raise
                reason = " ".join(str(error).split())[:120]
            # Out of the handler: the error's traceback holds the arrays of the call.
            smaller = max(least, size // 2)
            warnings.warn(
                f"memory ran out with {size:,} {self.what} at once ({reason}); going on with "
                f"{smaller:,}",
                SmallerChunkWarning,
                stacklevel=3,
            )
            self._divisor *= 2
            size = smaller
