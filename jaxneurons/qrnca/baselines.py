"""Other ways to choose a query's neurons, with as many as QRNCA chooses: what it must beat.

Section "evaluation" of arXiv 2406.10868, and a control matched in layer and activation.
"""

import math
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from jaxneurons.neurons.sets import Neuron
from jaxneurons.qrnca import method as qrnca
from jaxneurons.qrnca.method import PromptScores, QRNCAConfig, QueryNeurons

METHODS = (
    "QRNCA",
    "with common neurons",
    "without ICA",
    "Knowledge Neuron*",
    "activation",
    "random",
)
MATCHED = "matched random"
"""`matched_neurons`, drawn for each prompt."""
SHARED = 0.5
"""Knowledge Neuron*: a neuron must be in the coarse sets of more than this share of the prompts."""
NEAREST = 16
"""A matched neuron is one of so many of the layer whose activation is nearest."""


def knowledge_neurons(prompts: Sequence[PromptScores], count: int) -> list[int]:
    """Knowledge Neuron* (Dai et al. 2022, on this task): above the threshold in most prompts.

    Args:
      prompts: a query's; their coarse sets hold what is above the threshold.
      count: neurons to keep, by attribution summed over the prompts.

    Returns:
      Flat indices, best first; fewer where fewer are shared.
    """
    sums: dict[int, float] = {}
    seen: dict[int, int] = {}
    for prompt in prompts:
        for neuron, score in zip(prompt.neurons.tolist(), prompt.scores.tolist(), strict=True):
            sums[neuron] = sums.get(neuron, 0.0) + score
            seen[neuron] = seen.get(neuron, 0) + 1
    shared = [n for n in sums if seen[n] > SHARED * len(prompts)]
    return _best(sums, shared, count)


def active_neurons(prompts: Sequence[PromptScores], count: int) -> list[int]:
    """The neurons of highest |activation| at the last position, summed over a query's prompts.

    Of each prompt the `qrnca.ACTIVE` highest are known; what is not among them counts 0.
    """
    sums: dict[int, float] = {}
    for prompt in prompts:
        for neuron, value in zip(prompt.active.tolist(), prompt.activation.tolist(), strict=True):
            sums[neuron] = sums.get(neuron, 0.0) + value
    return _best(sums, sums, count)


def matched_neurons(
    neurons: Sequence[Neuron], activations: np.ndarray, rng: np.random.Generator
) -> list[Neuron]:
    """For each neuron a random other one of its layer that is about as active, none of them twice.

    Args:
      neurons: to be matched.
      activations: |activation| of every neuron, [layer, width].
      rng: draws among the `NEAREST`.
    """
    taken: dict[int, list[int]] = {}
    for layer, index in neurons:
        taken.setdefault(layer, []).append(index)
    found = []
    for layer, index in neurons:
        gaps = np.abs(activations[layer] - activations[layer, index])
        gaps[taken[layer]] = np.inf
        free = min(NEAREST, len(gaps) - len(taken[layer]))
        if free < 1:  # the layer is used up
            continue
        close = np.flatnonzero(gaps <= np.partition(gaps, free - 1)[free - 1])
        near = close[np.argsort(gaps[close], kind="stable")][:free]
        found.append(Neuron(layer, int(near[int(rng.integers(free))])))
        taken[layer].append(found[-1].index)
    return found


def method_sets(
    prompts: Mapping[str, Sequence[PromptScores]],
    own: Mapping[str, QueryNeurons],
    common: Iterable[Neuron],
    *,
    layers: int,
    width: int,
    settings: QRNCAConfig,
    seed: int = 0,
) -> dict[str, dict[str, list[Neuron]]]:
    """By method and query, neurons: as many as QRNCA has for the query, at most.

    Args:
      prompts: what is known of each query's prompts.
      own: QRNCA's neurons of each query.
      common: the neurons that QRNCA leaves out.
      layers: of the model.
      width: neurons of the site in a layer.
      settings: of the run.
      seed: of the random sets.
    """
    left_out = {neuron.layer * width + neuron.index for neuron in common}
    clusters = {name: qrnca.merge(found, settings) for name, found in prompts.items()}
    counts: dict[int, int] = {}
    for cluster in clusters.values():
        for neuron in cluster:
            counts[neuron] = counts.get(neuron, 0) + 1
    rng = np.random.default_rng(seed)
    found: dict[str, dict[str, list[Neuron]]] = {method: {} for method in METHODS}
    for name, neurons in own.items():
        cluster, size = clusters[name], len(neurons.neurons)
        naica = {n: na * math.log(len(clusters) / (counts[n] + 1)) for n, na in cluster.items()}
        flat = {
            "with common neurons": _best(naica, cluster, size),
            "without ICA": _best(cluster, [n for n in cluster if n not in left_out], size),
            "Knowledge Neuron*": knowledge_neurons(prompts[name], size),
            "activation": active_neurons(prompts[name], size),
            "random": rng.choice(layers * width, size, replace=False).tolist(),
        }
        for method, members in flat.items():
            found[method][name] = [Neuron(*divmod(int(n), width)) for n in members]
        found["QRNCA"][name] = list(neurons.neurons)
    return found


def _best(scores: Mapping[int, float], allowed: Iterable[int], size: int) -> list[int]:
    return sorted(allowed, key=lambda neuron: (-scores[neuron], neuron))[:size]
