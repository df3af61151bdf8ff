"""Random controls: every draw of random neurons, in one place, and how each is seeded.

- `random_neurons`: of the whole model; `random_sets`: several of them, each of its own stream.
- `layer_matched`: as many in the same layers; `layer_matched_sets`: several of them.
- `activation_matched`: others of the same layer that are about as active.

All draw from a generator that `generator` makes of a run's seed and of what it is for, so that a
control depends on nothing that was drawn before it for something else.
"""

from collections.abc import Iterable, Mapping

import numpy as np

from jaxneurons.errors import ConfigError, DataError
from jaxneurons.model.config import ModelConfig
from jaxneurons.neurons.sets import SITES, Neuron, NeuronSet, Ranking, neuron_count, site_width

WHOLE_MODEL, SAME_LAYERS, CONCEPTS = 2, 3, 4
"""What a stream of numbers is for: `random_sets`, `layer_matched_sets`, controls of concepts."""
NEAREST = 16
"""An activation-matched neuron is one of so many of the layer whose activation is nearest."""


def generator(seed: int, *purpose: int | str) -> np.random.Generator:
    """The random generator of a seed and of what is drawn: NumPy's of `[seed, *purpose]`.

    Text counts as its UTF-8 bytes. Another purpose is another stream, independent of the first.

    Raises:
      ConfigError: a seed or a number below 0.
    """
    numbers = [seed]
    for part in purpose:
        numbers += part.encode() if isinstance(part, str) else [part]
    if min(numbers) < 0:
        raise ConfigError(f"seeds are counted from 0, got {min(numbers)}")
    return np.random.default_rng(numbers)


def random_positions(
    config: ModelConfig, sites: Iterable[str], k: int, rng: np.random.Generator
) -> np.ndarray:
    """[k]: different positions among all neurons of some sites, in the order of the draw.

    `NeuronSet.of_flat` says which neurons they are.

    Raises:
      DataError: the model has fewer neurons there.
    """
    count = neuron_count(config, sites)
    if not 0 <= k <= count:
        raise DataError(f"{k} random neurons cannot be drawn of {count}")
    return rng.choice(count, size=k, replace=False)


def random_neurons(
    config: ModelConfig, sites: Iterable[str], k: int, rng: np.random.Generator
) -> NeuronSet:
    """k neurons drawn at random, without replacement, from some sites of the whole model.

    Raises:
      DataError: the model has fewer neurons there.
    """
    sites = tuple(sites)
    return NeuronSet.of_flat(random_positions(config, sites, k, rng), config, sites)


def random_sets(
    config: ModelConfig, sites: Iterable[str], k: int, *, seed: int, count: int
) -> list[NeuronSet]:
    """Several `random_neurons`: the first ones are the same however many are drawn."""
    sites = tuple(sites)
    numbers = [SITES.index(site) for site in sites]
    return [
        random_neurons(config, sites, k, generator(seed, WHOLE_MODEL, number, k, *numbers))
        for number in range(count)
    ]


def layer_matched(neurons: NeuronSet, config: ModelConfig, rng: np.random.Generator) -> NeuronSet:
    """As many random neurons in the same layers of the same sites, none of them a member.

    Raises:
      DataError: a layer has not enough other neurons, or a neuron is not of this model.
    """
    codes = {}
    for site, layer, taken, others in _layers(neurons, config):
        if len(others) < len(taken):
            raise DataError(
                f"layer {layer}: {len(taken)} of {len(taken) + len(others)} neurons "
                "leave no control set"
            )
        drawn = rng.choice(others, size=len(taken), replace=False)
        codes.setdefault(site, []).extend((layer, index) for index in drawn)
    return NeuronSet.of(**codes)


def layer_matched_at_most(
    neurons: NeuronSet, config: ModelConfig, rng: np.random.Generator
) -> NeuronSet:
    """As `layer_matched`, and all other neurons of a layer where these are fewer.

    A draw of its own kind: with the same generator it draws others than `layer_matched`.
    """
    codes = {}
    for site, layer, taken, others in _layers(neurons, config):
        drawn = rng.permutation(others)[: len(taken)]
        codes.setdefault(site, []).extend((layer, index) for index in drawn)
    return NeuronSet.of(**codes)


def layer_matched_sets(
    neurons: NeuronSet, config: ModelConfig, *, seed: int, name: str, count: int
) -> list[NeuronSet]:
    """Several `layer_matched` for neurons of that name, one after the other from one stream.

    Raises:
      DataError: a layer has not enough other neurons.
    """
    rng = generator(seed, SAME_LAYERS, name)
    return [layer_matched(neurons, config, rng) for _ in range(count)]


def activation_matched(
    neurons: NeuronSet | Ranking,
    activations: Mapping[str, np.ndarray],
    rng: np.random.Generator,
) -> NeuronSet:
    """For each neuron a random other one of its layer that is about as active, none of them twice.

    Neurons are matched in order: a ranking's best ones first. Where a layer is used up there are
    fewer.

    Args:
      neurons: to be matched.
      activations: |activation| of every neuron, [layer, width] by site.
      rng: draws among the `NEAREST`.
    """
    taken: dict[tuple[str, int], list[int]] = {}
    for site, (layer, index) in neurons:
        taken.setdefault((site, layer), []).append(index)
    matched: dict[str, list[Neuron]] = {}
    for site, (layer, index) in neurons:
        excluded = taken[site, layer]
        gaps = np.abs(activations[site][layer] - activations[site][layer, index])
        gaps[excluded] = np.inf
        free = min(NEAREST, len(gaps) - len(excluded))
        if free < 1:  # the layer is used up
            continue
        close = np.flatnonzero(gaps <= np.partition(gaps, free - 1)[free - 1])
        near = close[np.argsort(gaps[close], kind="stable")][:free]
        drawn = int(near[int(rng.integers(free))])
        matched.setdefault(site, []).append(Neuron(layer, drawn))
        excluded.append(drawn)
    return NeuronSet.of(**matched)


def _layers(
    neurons: NeuronSet, config: ModelConfig
) -> Iterable[tuple[str, int, np.ndarray, np.ndarray]]:
    """Site, layer, indices of the neurons there and of all others, in order."""
    neurons.check(config)
    for site in neurons.codes:
        layers, indices = neurons.pairs(site).T
        everything = np.arange(site_width(config, site))
        for layer in np.unique(layers).tolist():
            taken = indices[layers == layer]
            yield site, layer, taken, np.setdiff1d(everything, taken)
