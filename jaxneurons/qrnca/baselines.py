"""Other ways to choose a query's neurons, with as many as QRNCA chooses: what it must beat.

Section "evaluation" of arXiv 2406.10868, and a control matched in layer and activation.
"""

import math
from collections.abc import Iterable, Mapping, Sequence

from jaxneurons.model.config import ModelConfig
from jaxneurons.neurons.controls import generator, random_positions
from jaxneurons.neurons.sets import Neuron, NeuronSet, Ranking, site_width
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
"""`controls.activation_matched`, drawn for each prompt."""
SHARED = 0.5
"""Knowledge Neuron*: a neuron must be in the coarse sets of more than this share of the prompts."""


def knowledge_neurons(prompts: Sequence[PromptScores], count: int) -> list[int]:
    """Knowledge Neuron* (Dai et al. 2022, on this task): above the threshold in most prompts.

    Args:
      prompts: a query's; their coarse sets hold what is above the threshold.
      count: neurons to keep, by attribution summed over the prompts.

    Returns:
      Flat indices, best first; fewer where fewer are shared.
    """
    sums: dict[int, float] = {}
    occurrences: dict[int, int] = {}
    for prompt in prompts:
        for neuron, score in zip(prompt.neurons.tolist(), prompt.scores.tolist(), strict=True):
            sums[neuron] = sums.get(neuron, 0.0) + score
            occurrences[neuron] = occurrences.get(neuron, 0) + 1
    shared = [n for n in sums if occurrences[n] > SHARED * len(prompts)]
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


def method_sets(
    prompts: Mapping[str, Sequence[PromptScores]],
    located: Mapping[str, QueryNeurons],
    common: NeuronSet,
    *,
    config: ModelConfig,
    settings: QRNCAConfig,
    seed: int = 0,
) -> dict[str, dict[str, Ranking]]:
    """By method and query, neurons: as many as QRNCA has for the query, at most.

    Args:
      prompts: what is known of each query's prompts.
      located: QRNCA's neurons of each query.
      common: the neurons that QRNCA leaves out.
      config: the model's shape.
      settings: of the run.
      seed: of the random sets.

    Returns:
      Rankings, each method's best first; the random ones in the order of the draw.
    """
    site, width = settings.site, site_width(config, settings.site)
    left_out = set(common.flat(config, (site,)).tolist())
    clusters = {name: qrnca.merge(scores, settings) for name, scores in prompts.items()}
    counts: dict[int, int] = {}
    for cluster in clusters.values():
        for neuron in cluster:
            counts[neuron] = counts.get(neuron, 0) + 1
    rng = generator(seed)
    sets: dict[str, dict[str, Ranking]] = {method: {} for method in METHODS}
    for name, query in located.items():
        cluster, size = clusters[name], len(query.ranking)
        naica = {n: na * math.log(len(clusters) / (counts[n] + 1)) for n, na in cluster.items()}
        flat = {
            "with common neurons": _best(naica, cluster, size),
            "without ICA": _best(cluster, [n for n in cluster if n not in left_out], size),
            "Knowledge Neuron*": knowledge_neurons(prompts[name], size),
            "activation": active_neurons(prompts[name], size),
            "random": random_positions(config, (site,), size, rng).tolist(),
        }
        for method, positions in flat.items():
            ranking = tuple(Neuron(*divmod(int(n), width)) for n in positions)
            sets[method][name] = Ranking(ranking, site)
        sets["QRNCA"][name] = Ranking(tuple(query.ranking), query.site)
    return sets


def _best(scores: Mapping[int, float], allowed: Iterable[int], size: int) -> list[int]:
    return sorted(allowed, key=lambda neuron: (-scores[neuron], neuron))[:size]
