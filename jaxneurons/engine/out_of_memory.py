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
      size: what is tried next.
      what: is counted, for the warning.
      least: below which it is not halved: then the error goes on to the caller.
    """

    def __init__(self, size: int, *, what: str, least: int = 1):
        check_number("size", size, least=1)
        check_number("least", least, least=1)
        self.size, self.what, self.least = size, what, least

    def run_rows(
        self,
        function: Callable[[int, int], Result],
        count: int,
        *,
        axis: int,
        most: int | None = None,
    ) -> Result:
        """The arrays of `count` rows, fetched: as `function(start, end)` makes them of some.

        Args:
          function: of the first row and the one behind the last: arrays of so many rows, nested.
          count: rows in all.
          axis: of rows, in each array that comes out.
          most: as `run` takes it.
        """

        def in_parts(size: int) -> Result:
            parts = [
                fetch(function(start, min(start + size, count))) for start in range(0, count, size)
            ]
            if len(parts) == 1:
                return parts[0]
            return jax.tree.map(lambda *arrays: np.concatenate(arrays, axis), *parts)

        return self.run(in_parts, most=most)

    def run(self, function: Callable[[int], Result], *, most: int | None = None) -> Result:
        """What `function` makes with at most `size` at once; halved while that is too much.

        Args:
          function: of the size; called again from the start with half of it, so that nothing of a
            call that failed may be kept.
          most: what this call begins with at most, of what memory is known to have room for.

        Raises:
          Exception: as the function's; for want of memory, where the size is `least` already.
        """
        size = self.size if most is None else max(self.least, min(self.size, most))
        while True:
            try:
                # Memory may run out after the call has returned.
                return jax.block_until_ready(function(size))
            except (MemoryError, RuntimeError) as error:
                if not is_out_of_memory(error) or size <= self.least:
                    raise
                reason = " ".join(str(error).split())[:120]
            # Out of the handler: the error's traceback holds the arrays of the call.
            smaller = max(self.least, size // 2)
            warnings.warn(
                f"memory ran out with {size:,} {self.what} at once ({reason}); going on with "
                f"{smaller:,}",
                SmallerChunkWarning,
                stacklevel=3,
            )
            self.size = size = smaller
