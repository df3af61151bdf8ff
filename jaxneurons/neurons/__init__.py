"""Neuron sites, sets of neurons with their multipliers, random controls."""

from jaxneurons.neurons.controls import (
    activation_matched,
    generator,
    layer_matched,
    layer_matched_sets,
    random_neurons,
    random_sets,
)
from jaxneurons.neurons.sets import (
    FFN,
    SITES,
    Neuron,
    NeuronSet,
    Ranking,
    Site,
    neuron_count,
    neuron_table,
    read_neurons,
    show_neuron,
    site_width,
    stack_scales,
)

__all__ = [
    "FFN",
    "SITES",
    "Neuron",
    "NeuronSet",
    "Ranking",
    "Site",
    "activation_matched",
    "generator",
    "layer_matched",
    "layer_matched_sets",
    "neuron_count",
    "neuron_table",
    "random_neurons",
    "random_sets",
    "read_neurons",
    "show_neuron",
    "site_width",
    "stack_scales",
]
