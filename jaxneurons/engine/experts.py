"""Expertise: how well one neuron's response tells examples of a relation from others.

Average precision of every neuron's responses as a score for "belongs to the relation" (Cuadros et
al. 2022, used by arXiv 2502.17355, section 3), equal to scikit-learn's, ties included.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxneurons.errors import DataError
from jaxneurons.model.axis_types import any_axes
from jaxneurons.model.config import ModelConfig
from jaxneurons.neurons.sets import NeuronSet, neuron_count, site_width
from jaxneurons.storage.progress import Progress

NEURONS = 512
"""Neurons compared at a time on a CPU: what its caches hold."""

TOGETHER = 16
"""Scores compared in one pass over the counts."""


@any_axes
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
    width = -(-count // chunks)

    def split(responses: Array) -> Array:
        padded = jnp.pad(responses, ((0, 0), (0, chunks * width - count)))
        return jnp.moveaxis(padded.reshape(len(responses), chunks, width), 1, 0)

    def of_chunk(part: tuple[Array, Array]) -> Array:
        positive, negative = part
        reached = _reaching(positive, positive)
        return jnp.mean(reached / (reached + _reaching(negative, positive)), axis=0)

    return jax.lax.map(of_chunk, (split(positives), split(negatives))).reshape(-1)[:count]


def _reaching(
    scores: Float[Array, "example neuron"], thresholds: Float[Array, "positive neuron"]
) -> Float[Array, "positive neuron"]:
    """How many scores reach each threshold, neuron by neuron."""

    def add(total: Array, some: Array) -> Array:
        # Spelled out: counts stay in registers while a handful of scores is compared.
        for score in some:
            total = total + (score >= thresholds).astype(total.dtype)
        return total

    grouped = len(scores) // TOGETHER * TOGETHER
    groups = scores[:grouped].reshape(-1, TOGETHER, scores.shape[1])
    total = jnp.zeros(thresholds.shape, jnp.int32)
    total, _ = jax.lax.scan(lambda total, some: (add(total, some), None), total, groups)
    return add(total, scores[grouped:]).astype(jnp.float32)


def separation(
    positives: Float[np.ndarray, "positive neuron"], negatives: Float[np.ndarray, "negative neuron"]
) -> Float[np.ndarray, " neuron"]:
    """How far positives are above negatives: difference of the means in pooled standard deviations.

    0 for a constant response. With few positives, thousands of neurons reach an average precision
    of 1; this says which of them do so by a wide margin.
    """
    difference = positives.mean(0) - negatives.mean(0)
    spread = np.sqrt((positives.var(0) + negatives.var(0)) / 2)
    return np.where(spread > 0, difference / np.where(spread > 0, spread, 1), 0.0)


def top_neurons(
    scores: Float[np.ndarray, " neuron"], k: int, ties: Float[np.ndarray, " neuron"] | None = None
) -> Int[np.ndarray, " k"]:
    """Indices of the k neurons with the highest scores, best first.

    Args:
      scores: of every neuron.
      k: how many.
      ties: what decides between equal scores, the higher first; then, or by default, the index.
    """
    keys = (-scores,) if ties is None else (-ties, -scores)
    return np.lexsort(keys)[:k]


class Examples(NamedTuple):
    """Which examples a concept is told from which others by: rows of the responses."""

    positives: Int[np.ndarray, " positive"]
    negatives: Int[np.ndarray, " negative"]


@dataclasses.dataclass(frozen=True)
class Expertise:
    """How well every neuron tells a concept's examples from others.

    Attributes:
      scores: average precision by site, [layer, width].
      separations: `separation` by site, [layer, width]; decides between equal scores.
      medians: median response to the positives by site, [layer, width]: the value that users give
        a neuron who force it rather than turn it off.
    """

    scores: dict[str, Float[np.ndarray, "layer width"]]
    separations: dict[str, Float[np.ndarray, "layer width"]]
    medians: dict[str, Float[np.ndarray, "layer width"]]

    def ranked(self, sites: Sequence[str], k: int) -> Int[np.ndarray, " k"]:
        """The k best neurons of some sites, best first, as flat positions for `NeuronSet.of_flat`.

        Highest average precision first, then the widest separation.

        Raises:
          DataError: k is not between 1 and the number of neurons.
        """
        flat, ties = (
            np.concatenate([table[site].reshape(-1) for site in sites])
            for table in (self.scores, self.separations)
        )
        if not 1 <= k <= len(flat):
            raise DataError(f"{k} neurons asked for, the sites {', '.join(sites)} have {len(flat)}")
        return top_neurons(flat, k, ties)

    def top(self, sites: Sequence[str], k: int, config: ModelConfig) -> NeuronSet:
        """The k best neurons of some sites, as `ranked`."""
        return NeuronSet.of_flat(self.ranked(sites, k), config, sites)


def resolve_k(k: int | float, config: ModelConfig, sites: Sequence[str]) -> int:
    """A number of neurons: an integer as it is, a number below 1 as a share of all.

    Raises:
      DataError: not positive, or more than there are.
    """
    count = neuron_count(config, sites)
    neurons = round(k * count) if isinstance(k, float) and k < 1 else int(k)
    if not 1 <= neurons <= count or (isinstance(k, float) and k >= 1 and k != neurons):
        raise DataError(
            f"k = {k}: give a number from 1 to {count}, the neurons of {', '.join(sites)}, "
            "or a share below 1"
        )
    return neurons


@any_axes
def expertise(
    read: Callable[[str, int], Float[np.ndarray, "example width"]],
    examples: Mapping[str, Examples],
    *,
    config: ModelConfig,
    sites: Sequence[str],
    progress: Progress | None = None,
) -> dict[str, Expertise]:
    """Average precision of every neuron for several concepts, one layer in memory at a time.

    Args:
      read: responses of all examples at one site and layer; `ResponseStore.read`.
      examples: by concept, rows of positives and negatives.
      config: the model's shape.
      sites: whose neurons.
      progress: called with how many layers are done, and of how many.

    Raises:
      DataError: a concept without positives or without negatives.
    """
    for name, (positives, negatives) in examples.items():
        if not len(positives) or not len(negatives):
            raise DataError(f"{name!r}: average precision needs positives and negatives")
    tables = {
        name: Expertise(*({s: _table(config, s) for s in sites} for _ in range(3)))
        for name in examples
    }
    steps = [(site, layer) for site in sites for layer in range(config.num_layers)]
    for step, (site, layer) in enumerate(steps, 1):
        responses = read(site, layer)
        for name, rows in examples.items():
            positives, negatives = responses[rows.positives], responses[rows.negatives]
            scores = average_precision(jnp.asarray(positives), jnp.asarray(negatives))
            tables[name].scores[site][layer] = np.asarray(scores)
            tables[name].separations[site][layer] = separation(positives, negatives)
            tables[name].medians[site][layer] = np.median(positives, axis=0)
        if progress is not None:
            progress(step, len(steps))
    return tables


def _table(config: ModelConfig, site: str) -> np.ndarray:
    return np.zeros((config.num_layers, site_width(config, site)), np.float32)
