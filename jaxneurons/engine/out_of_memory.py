"""How much is run at once where memory may not hold it: halved when it runs out, with a warning."""

import warnings
from collections.abc import Callable
from typing import TypeVar

import jax

from jaxneurons.errors import is_out_of_memory
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

    def run(self, function: Callable[[int], Result]) -> Result:
        """What `function` makes with at most `size` at once; halved while that is too much.

        Args:
          function: of the size; called again from the start with half of it, so that nothing of a
            call that failed may be kept.

        Raises:
          Exception: as the function's; for want of memory, where the size is `least` already.
        """
        while True:
            try:
                # Memory may run out after the call has returned.
                return jax.block_until_ready(function(self.size))
            except (MemoryError, RuntimeError) as error:
                if not is_out_of_memory(error) or self.size <= self.least:
                    raise
                reason = " ".join(str(error).split())[:120]
            # Out of the handler: the error's traceback holds the arrays of the call.
            smaller = max(self.least, self.size // 2)
            warnings.warn(
                f"memory ran out with {self.size:,} {self.what} at once ({reason}); going on with "
                f"{smaller:,}",
                SmallerChunkWarning,
                stacklevel=3,
            )
            self.size = smaller
