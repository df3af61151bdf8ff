"""Neurons of experts: (layer, expert, index) for people, one row of the site for all else."""

import numpy as np
import pytest
from support.models import tiny_config

from jaxneurons import ConfigError, NeuronSet
from jaxneurons.neurons.sets import show_neuron

CONFIG = tiny_config(experts=4, experts_per_token=2, intermediate_size=12)


def test_neurons_are_named_by_expert_and_shown_so():
    neurons = NeuronSet.of_experts(CONFIG, up=[(1, 2, 5), (0, 0, 3)], act=[(2, 3, 11)])
    assert neurons == NeuronSet.of(up=[(1, 29), (0, 3)], act=[(2, 47)])
    assert neurons.shown(CONFIG) == "up (0, 0, 3), (1, 2, 5); act (2, 3, 11)"
    assert show_neuron((1, 29), "down", CONFIG) == "(1, 29)"
    assert NeuronSet.of(up=[(1, 29)]).shown(tiny_config()) == "up (1, 29)"
    scales = neurons.scales(CONFIG, 0.0)["up"].reshape(3, 4, 12)
    assert np.argwhere(scales == 0).tolist() == [[0, 0, 3], [1, 2, 5]]


@pytest.mark.parametrize(
    ("site", "neuron", "message"),
    [
        ("up", (0, 4, 0), "4 experts of 12 neurons"),
        ("up", (0, 0, 12), "4 experts of 12 neurons"),
        ("up", (0, -1, 0), "4 experts of 12 neurons"),
        ("up", (-1, 0, 0), "counted from 0"),
        ("down", (0, 0, 0), "belong to no expert"),
        ("upp", (0, 0, 0), "unknown site"),
    ],
)
def test_experts_that_there_are_not(site, neuron, message):
    with pytest.raises(ConfigError, match=message):
        NeuronSet.of_experts(CONFIG, **{site: [neuron]})


def test_a_model_without_experts():
    with pytest.raises(ConfigError, match=r"NeuronSet\.of"):
        NeuronSet.of_experts(tiny_config(), up=[(0, 0, 0)])
