"""Expertise: how well one neuron's response tells examples of a relation from others.

Average precision of every neuron's responses as a score for "belongs to the relation" (Cuadros et
al. 2022, used by arXiv 2502.17355, section 3), equal to scikit-learn's, ties included.
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

NEURONS = 512
"""Neurons compared at a time on a CPU: what its caches hold."""

TOGETHER = 16
"""Scores compared in one pass over the counts."""


@functools.partial(jax.jit, static_argnames=("chunk",))
def average_precision(
    positives: Float[Array, "positive neuron"],
    negatives: Float[Array, "negative neuron"],
    *,
    chunk: int | None = None,
) -> Float[Array, " neuron"]:
    """Average precision of every neuron: the step-wise area under its precision-recall curve.

    The mean over positives of the precision at that positive's score as threshold; equal scores
    are one threshold, because all that reach a threshold are counted.

    Args:
      positives: responses to examples of the relation.
      negatives: responses to others.
      chunk: neurons at a time; default: all, on a CPU as many as its caches hold.

    Returns:
      In (0, 1], float32. The share of positives for a constant response.
    """
    count = positives.shape[1]
    if chunk is None:
        chunk = NEURONS if jax.default_backend() == "cpu" else count
    chunks = max(1, -(-count // chunk))
    each = -(-count // chunks)

    def split(responses: Array) -> Array:
        padded = jnp.pad(responses, ((0, 0), (0, chunks * each - count)))
        return jnp.moveaxis(padded.reshape(len(responses), chunks, each), 1, 0)

    def one(part: tuple[Array, Array]) -> Array:
        found, others = part
        reached = _reaching(found, found)
        return jnp.mean(reached / (reached + _reaching(others, found)), axis=0)

    return jax.lax.map(one, (split(positives), split(negatives))).reshape(-1)[:count]


def _reaching(
    scores: Float[Array, "example neuron"], thresholds: Float[Array, "positive neuron"]
) -> Float[Array, "positive neuron"]:
    """How many scores reach each threshold, neuron by neuron."""

    def add(total: Array, some: Array) -> Array:
        # Spelled out: counts stay in registers while a handful of scores is compared.
        for score in some:
            total = total + (score >= thresholds)
        return total

    whole = len(scores) // TOGETHER * TOGETHER
    groups = scores[:whole].reshape(-1, TOGETHER, scores.shape[1])
    total = jnp.zeros(thresholds.shape, jnp.int32)
    total, _ = jax.lax.scan(lambda total, some: (add(total, some), None), total, groups)
    return add(total, scores[whole:]).astype(jnp.float32)


def top_neurons(scores: Float[Array, " neuron"], k: int) -> Int[Array, " k"]:
    """Indices of the k neurons with the highest scores, best first; ties by index."""
    return jax.lax.top_k(scores, k)[1]
