"""Causal attention in blocks of queries: memory grows with a prompt's length, not with its square.

A block holds the scores of some queries against all keys that they may see, so each softmax is the
plain one over a whole row and nothing is approximated. Blocks are made so long that one of them has
`MOST_SCORES` scores for each head, whatever the prompt's length; what needs no more than that in
all, short prompts and single tokens, is not cut.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxneurons.model.config import ModelConfig
from jaxneurons.model.layers import attention, visible

MOST_SCORES = 1 << 20
"""Scores of a head that are held at once: those of a prompt of 1,024 tokens."""

PARTS = 4
"""Parts of a prompt that differ in how many keys they may see; as many programs are compiled."""


def causal_attention(
    q: Float[Array, "batch query heads dim"],
    k: Float[Array, "batch key kv_heads dim"],
    v: Float[Array, "batch key kv_heads dim"],
    positions: Int[Array, "batch query"],
    keys: Int[Array, "batch key"],
    window: int | Array | None,
    config: ModelConfig,
) -> Float[Array, "batch query heads dim"]:
    """Grouped-query attention of consecutive queries to the keys before them and their own.

    Gradients take no more memory than values: a block's scores are computed again.

    Args:
      q: rotated queries, of consecutive tokens.
      k: rotated keys: of the same tokens, or of a cache that holds them.
      v: values of the keys.
      positions: of the queries.
      keys: positions of the keys: those of the queries, or 0, 1, ... of a cache.
      window: how many keys a query sees at most; None: all.
      config: the model's shape.
    """
    queries, held = q.shape[1], k.shape[1]
    if queries == 1 or queries * held <= MOST_SCORES:
        return attention(q, k, v, visible(positions, keys, window), config)
    size = -(-queries // PARTS)
    parts = []
    for start in range(0, queries, size):
        end = min(start + size, queries)
        # A cache has room for all queries, so before the first one are at most held - queries keys.
        seen = end + held - queries
        attend = functools.partial(
            _attend,
            k=k[:, :seen],
            v=v[:, :seen],
            keys=keys[:, :seen],
            window=window,
            config=config,
        )
        count = -(-(end - start) * seen // MOST_SCORES)
        parts.append(_in_blocks(attend, q[:, start:end], positions[:, start:end], count))
    return jnp.concatenate(parts, axis=1)


def _attend(
    q: Array,
    positions: Array,
    *,
    k: Array,
    v: Array,
    keys: Array,
    window: int | Array | None,
    config: ModelConfig,
) -> Array:
    return attention(q, k, v, visible(positions, keys, window), config)


def _in_blocks(
    attend: Callable[[Array, Array], Array], q: Array, positions: Array, count: int
) -> Array:
    """`attend` to `count` blocks of queries, one after the other."""
    batch, queries = positions.shape
    size = -(-queries // count)
    pad = count * size - queries

    def split(x: Array) -> Array:
        x = jnp.pad(x, ((0, 0), (0, pad), *((0, 0),) * (x.ndim - 2)))
        return jnp.moveaxis(x.reshape(batch, count, size, *x.shape[2:]), 1, 0)

    body = jax.checkpoint(lambda block: attend(*block), prevent_cse=False)
    attended = jax.lax.map(body, (split(q), split(positions)))
    attended = jnp.moveaxis(attended, 0, 1)
    return attended.reshape(batch, count * size, *q.shape[2:])[:, :queries]
