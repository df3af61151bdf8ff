"""The neurons of every baseline, on clusters worked out by hand."""

import numpy as np
import pytest
from support.models import tiny_config

from jaxneurons.neurons.sets import Neuron, NeuronSet
from jaxneurons.qrnca import method as qrnca
from jaxneurons.qrnca.baselines import (
    METHODS,
    active_neurons,
    knowledge_neurons,
    method_sets,
)
from jaxneurons.qrnca.method import PromptScores, QRNCAConfig

WIDTH, LAYERS = 10, 3
CONFIG = tiny_config(intermediate_size=WIDTH, num_layers=LAYERS)


def prompt(scores, active=()):
    neurons = np.array(sorted(scores))
    values = np.array([scores[n] for n in neurons.tolist()], np.float32)
    layers = np.zeros(LAYERS, np.float32)
    active = dict(active)
    return PromptScores(
        neurons=neurons,
        scores=values,
        total=float(values.sum()),
        probability=0.5,
        option_mass=1.0,
        correct=True,
        gap=layers,
        error=layers,
        nodes=1,
        active=np.array(list(active), np.int32),
        activation=np.array(list(active.values()), np.float32),
    )


def test_knowledge_neurons_are_shared_by_most_prompts():
    prompts = [prompt({1: 0.9, 2: 0.5}), prompt({2: 0.4, 3: 0.8}), prompt({2: 0.1, 3: 0.3, 4: 2.0})]
    assert knowledge_neurons(prompts, 10) == [3, 2]  # 4 and 1 are in one prompt only
    assert knowledge_neurons(prompts, 1) == [3]


def test_active_neurons_by_summed_activation():
    prompts = [prompt({1: 1.0}, {5: 3.0, 6: 2.5}), prompt({1: 1.0}, {6: 2.5, 7: 4.0})]
    assert active_neurons(prompts, 2) == [6, 7]


@pytest.fixture(scope="module")
def sets():
    """Neuron 0 is in every cluster, thus common; neuron 10 + i is the query's own."""
    prompts = {
        f"q{i}": [
            prompt({0: 1.0, 10 + i: 0.6, 20 + i % 2: 0.5}, {29: 9.0, 28: 8.0, i: 7.0}),
            prompt({0: 1.0, 10 + i: 0.6}, {29: 9.0, 28: 8.0, i: 7.0}),
        ]
        for i in range(8)
    }
    settings = QRNCAConfig(top=5, common=0.6)
    clusters = {name: qrnca.merge(found, settings) for name, found in prompts.items()}
    own, common = qrnca.rank(clusters, width=WIDTH, settings=settings)
    assert [neuron for neuron, _ in common] == [Neuron(0, 0)]
    common = NeuronSet.of(up=[(0, 0)])
    return own, method_sets(prompts, own, common, config=CONFIG, settings=settings)


def test_common_neurons_and_ica_decide():
    """Neuron 1 is in three clusters of eight: common at 30 %, and still of positive ICA."""
    prompts = {
        f"q{i}": [
            prompt({**({1: 1.0} if i < 3 else {}), **({5: 0.9} if i < 4 else {}), 10 + i: 0.4})
        ]
        for i in range(8)
    }
    settings = QRNCAConfig(top=2, common=0.3, threshold=0.0)
    clusters = {name: qrnca.merge(found, settings) for name, found in prompts.items()}
    own, common = qrnca.rank(clusters, width=WIDTH, settings=settings)
    left_out = [neuron for neuron, _ in common]
    assert left_out == [Neuron(0, 5), Neuron(0, 1)]
    found = method_sets(prompts, own, NeuronSet.of(up=left_out), config=CONFIG, settings=settings)
    assert own["q0"].ranking == [Neuron(1, 0)]
    assert found["with common neurons"]["q0"].ranking == (Neuron(0, 1),)  # naica: log 2 > 0.4 log 4
    assert found["without ICA"]["q0"].ranking == (Neuron(1, 0),)  # without the common ones
    assert found["Knowledge Neuron*"]["q0"].ranking == (Neuron(0, 1),)  # by attribution alone


def test_every_method_gives_every_query_at_most_as_many(sets):
    own, found = sets
    assert set(found) == set(METHODS)
    for method, by_query in found.items():
        assert set(by_query) == set(own)
        for name, neurons in by_query.items():
            assert len(neurons) <= len(own[name].ranking), method
            assert len(neurons.neurons) == len(neurons)


def test_what_each_method_prefers(sets):
    own, found = sets
    assert own["q3"].ranking == [Neuron(1, 3), Neuron(2, 1)]
    assert list(found["QRNCA"]["q3"].ranking) == own["q3"].ranking
    # ICA of a neuron in every cluster is log(8 / 9) < 0: without the filter it still comes last.
    assert list(found["with common neurons"]["q3"].ranking) == own["q3"].ranking
    # By attribution alone: the common one would be first, but is left out.
    assert found["without ICA"]["q3"].ranking == (
        Neuron(1, 3),
        Neuron(2, 1),
    )
    # No ICA, and common neurons stay; neuron 21 is in one of two prompts.
    assert found["Knowledge Neuron*"]["q3"].ranking == (
        Neuron(0, 0),
        Neuron(1, 3),
    )
    assert found["activation"]["q3"].ranking == (
        Neuron(2, 9),
        Neuron(2, 8),
    )
    assert len({neurons.ranking for neurons in found["random"].values()}) > 4
