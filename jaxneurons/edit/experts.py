"""Kernels of experts, as edits see them.

The neurons of all experts of a layer are one row, and an edit of neurons reads and writes the
kernels of a layer's experts as one matrix: its rows are the down kernels' rows, expert after
expert, or its columns those of the up or gate kernels. Methods that change the map of a whole
kernel have no such matrix to change: a token runs a few experts of many.
"""

from typing import Any

import numpy as np

from jaxneurons.errors import ConfigError
from jaxneurons.model.config import ModelConfig
from jaxneurons.model.parameters import Parameter


def check_one_kernel(config: ModelConfig, what: str) -> None:
    """Raise unless a layer of this model has one down kernel, which a method changes.

    Raises:
      ConfigError: its layers have experts; names what can be changed instead.
    """
    if config.experts:
        raise ConfigError(
            f"{what} changes the down kernel of a layer, but a layer of this model has one for "
            f"each of its {config.experts} experts, of which a token runs "
            f"{config.experts_per_token}: change neurons of named experts instead, whose index is "
            f"expert * {config.intermediate_size} + i (`scale`, `add`, `set_rows`, "
            "`LearnedNeurons`, `KnowledgeNeurons`)"
        )


def of_experts(parameter: Parameter) -> bool:
    """Whether an array holds the kernels of a layer's experts."""
    return "experts" in parameter.axes[:-1]


def matrix_shape(parameter: Parameter) -> tuple[int, ...]:
    """The shape of one layer's array, where kernels of experts are one matrix."""
    if not of_experts(parameter):
        return parameter.layer_shape
    experts, inputs, outputs = parameter.layer_shape
    wide = parameter.axes[-1] == "intermediate"
    return (inputs, experts * outputs) if wide else (experts * inputs, outputs)


def as_matrix(values: np.ndarray, parameter: Parameter) -> np.ndarray:
    """One layer's array, where kernels of experts are one matrix."""
    if of_experts(parameter) and parameter.axes[-1] == "intermediate":
        values = np.moveaxis(values, 0, 1)
    return values.reshape(matrix_shape(parameter))


def rows_at(kernel: Any, layer: Any, index: Any) -> tuple[Any, ...]:
    """Where rows of a down kernel are, or of those of all experts: an index of the array."""
    if kernel.ndim == 3:
        return layer, index
    width = kernel.shape[2]
    return layer, index // width, index % width


def neurons_at(parameter: Parameter, axis: int, layer: Any, index: Any) -> tuple[Any, ...]:
    """Where neurons are that lie along an axis of an array: an index of the array."""
    place: list[Any] = [slice(None)] * (axis + 1)
    place[0], place[axis] = layer, index
    if of_experts(parameter) and parameter.axes[axis] == "intermediate":
        width = parameter.shape[axis]
        place[1], place[axis] = index // width, index % width
    return tuple(place)
