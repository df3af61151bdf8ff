"""Token ids are rows of the embedding; an array would answer for an id beyond it with its last row.

A tokenizer may be longer than its model (Llama-2-13b and CodeLlama-34b as published: 32,004 tokens
of 32,000), so ids are checked where they are used, not tokenizers where they are read.
"""

from typing import Any

import jax
import numpy as np
from jax.core import Tracer

from jaxneurons.errors import DataError


def check_ids(ids: Any, vocab_size: int, tokenizer: Any = None) -> None:
    """Raise for the first token id that has no row in the embedding.

    Args:
      ids: integers, in an array or nested sequences of one length; empty is fine. Inside `jit`
        nothing is known of them, and nothing is checked.
      vocab_size: rows of the embedding.
      tokenizer: a transformers tokenizer that can name the token.

    Raises:
      DataError: names the token, its id and the number of rows.
    """
    if isinstance(ids, Tracer):
        return
    if isinstance(ids, jax.Array) and not ids.is_fully_addressable:
        return  # of several processes; each has checked its own texts
    values = np.asarray(ids)
    outside = values[(values < 0) | (values >= vocab_size)] if values.size else values
    if not outside.size:
        return
    first = int(outside.flat[0])
    name = None if tokenizer is None or first < 0 else tokenizer.convert_ids_to_tokens(first)
    token = "the token" if name is None else f"the token {name!r}"
    raise DataError(
        f"{token} has the id {first}, but the model's vocabulary has {vocab_size} tokens "
        f"(0 to {vocab_size - 1}): it was never given that token; leave it out of the text"
    )
