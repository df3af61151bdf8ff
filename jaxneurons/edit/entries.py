"""The entries of parameters that changes touch: which they are, what is there, and putting it back.

A patch restores its base from them, and two patches conflict where theirs meet.
"""

import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from jaxneurons.checkpoints.provenance import layer_values
from jaxneurons.edit.changes import Change, LowRank, Multipliers, Rows
from jaxneurons.edit.experts import as_matrix, matrix_shape, of_experts, rows_at
from jaxneurons.edit.neuron_parameters import neuron_arrays
from jaxneurons.errors import DataError
from jaxneurons.model.config import ModelConfig
from jaxneurons.model.parameters import LAYERS, Parameter, Params, get, list_parameters, replace

Axis = Literal["all", "input", "output"]
_AXIS: dict[str, int] = {"input": 0, "output": -1}


@dataclasses.dataclass(frozen=True, eq=False)
class Entries:
    """Entries of one layer's array, and their values.

    Attributes:
      array: below `layers`, joined by dots: "ffn.down.kernel".
      layer: from 0.
      axis: that `index` counts along: a kernel's inputs or its outputs; "all": the whole array.
      index: which; empty for "all".
      values: float32, [index, ...]; for "all" the array's shape.
    """

    array: str
    layer: int
    axis: Axis
    index: np.ndarray
    values: np.ndarray


@dataclasses.dataclass(frozen=True, eq=False)
class Region:
    """Entries that a change touches, and how: `set`, `scale` or `add`."""

    array: str
    layer: int
    axis: Axis
    index: np.ndarray
    how: Literal["set", "scale", "add"]

    def meets(self, other: "Region") -> int:
        """Rows, columns or arrays of one in which both touch entries; 0 if they are apart.

        Additions add up, and a row and a column that are scaled are two neurons: neither counts.
        """
        if (self.array, self.layer) != (other.array, other.layer):
            return 0
        if self.how == other.how == "add":
            return 0
        if "all" in (self.axis, other.axis):
            return max(len(self.index), len(other.index), 1)
        if self.axis != other.axis:
            scaled = self.how == other.how == "scale"
            return 0 if scaled else min(len(self.index), len(other.index))
        return len(np.intersect1d(self.index, other.index))

    @property
    def place(self) -> str:
        """For messages."""
        return f"{self.array} of layer {self.layer}"


_NO_INDEX = np.zeros(0, np.int32)


def regions(changes: Iterable[Change], config: ModelConfig) -> list[Region]:
    """What changes touch."""
    return [region for change in changes for region in _regions(change, config)]


def _regions(change: Change, config: ModelConfig) -> Iterator[Region]:
    if isinstance(change, LowRank):
        yield Region(f"{change.module}.kernel", change.layer, "all", _NO_INDEX, "add")
    elif isinstance(change, Rows):
        index = np.asarray(change.index)
        yield Region(f"{change.module}.kernel", change.layer, "input", index, "set")
    elif isinstance(change, Multipliers):
        layers, index = np.asarray(change.layer), np.asarray(change.index)
        for layer in np.unique(layers).tolist():
            here = index[layers == layer]
            for parameter, axis in neuron_arrays(change.site, config):
                along: Axis = "input" if axis < len(parameter.shape) - 1 else "output"
                yield Region(".".join(parameter.path[1:]), layer, along, here, "scale")


def take(params: Params, touched: Sequence[Region], config: ModelConfig) -> tuple[Entries, ...]:
    """What is there now: each entry's value once, as float32 on the host."""
    entries = []
    arrays = _arrays(config)
    for array, layer in dict.fromkeys((region.array, region.layer) for region in touched):
        here = [region for region in touched if (region.array, region.layer) == (array, layer)]
        values = layer_values(get(params, _path(array)), layer).astype(np.float32)
        values = as_matrix(values, arrays[array])
        if any(region.axis == "all" for region in here):
            entries.append(Entries(array, layer, "all", _NO_INDEX, values))
            continue
        for axis, number in _AXIS.items():
            indices = [region.index for region in here if region.axis == axis]
            if indices:
                index = np.unique(np.concatenate(indices)).astype(np.int32)
                rows = np.moveaxis(values, number, 0)[index]
                entries.append(Entries(array, layer, axis, index, np.ascontiguousarray(rows)))  # pyright: ignore[reportArgumentType]
    return tuple(entries)


def put(params: Params, entries: Sequence[Entries]) -> Params:
    """Parameters in which entries have these values again; pure, shardings are kept."""
    for part in entries:
        path = _path(part.array)
        array: jax.Array = get(params, path)
        values = jnp.asarray(part.values).astype(array.dtype)
        if part.axis == "all":
            array = array.at[part.layer].set(values)
        elif part.axis == "input" or array.ndim == 2:
            place = (part.layer, part.index)
            if array.ndim == 4:
                place = rows_at(array, part.layer, part.index)
            array = array.at[place].set(values)
        elif array.ndim == 4 and part.array == "ffn.down.kernel":
            parts = values.reshape(len(values), *array.shape[1:3])
            array = array.at[part.layer, :, :, part.index].set(parts)
        elif array.ndim == 4:  # columns of other kernels of experts
            expert, index = np.divmod(part.index, array.shape[-1])
            array = array.at[part.layer, expert, :, index].set(values)
        else:
            array = array.at[part.layer, :, part.index].set(values)
        params = replace(params, path, array)
    return params


def check_entries(entries: Sequence[Entries], *, config: ModelConfig, where: str = "") -> None:
    """Raise unless a model of this shape has these entries.

    Raises:
      DataError: it has not; says which, and why.
    """
    shapes = {name: matrix_shape(parameter) for name, parameter in _arrays(config).items()}
    for part in entries:
        at = f"{where}kept entries of {part.array!r:.60}, layer {part.layer}"
        if part.array not in shapes or not 0 <= part.layer < config.num_layers:
            raise DataError(f"{at}: not in this model")
        if part.axis == "all" and of_experts(_arrays(config)[part.array]):
            raise DataError(f"{at}: kernels of experts change by rows or columns only")
        shape: Any = shapes[part.array]
        if part.axis != "all":
            number = _AXIS[part.axis]
            size = shape[number]
            rest = tuple(np.delete(shape, number).tolist())
            shape = (len(part.index), *rest)
            if part.index.size and not 0 <= part.index.min() <= part.index.max() < size:
                raise DataError(f"{at}: the array has {size} along its {part.axis} axis")
        if part.values.shape != shape:
            raise DataError(f"{at}: have the shape {part.values.shape}, not {shape}")


def _arrays(config: ModelConfig) -> dict[str, Parameter]:
    """Every layer's arrays, by name below `layers`."""
    return {".".join(p.path[1:]): p for p in list_parameters(config) if p.per_layer}


def _path(array: str) -> tuple[str, ...]:
    return (LAYERS, *array.split("."))
