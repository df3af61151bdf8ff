"""Neuron sites, sets of neurons with their multipliers, random controls."""

from jaxneurons.neurons.sets import (
    FFN,
    SITES,
    Neuron,
    NeuronSet,
    matched_random,
    neuron_count,
    neuron_table,
    random_neurons,
    read_neurons,
    site_width,
)

__all__ = [
    "FFN",
    "SITES",
    "Neuron",
    "NeuronSet",
    "matched_random",
    "neuron_count",
    "neuron_table",
    "random_neurons",
    "read_neurons",
    "site_width",
]
