"""What one device of a mesh holds: its share of the parameters, and the model that it computes.

A model that is split over devices by heads, neurons and rows of the vocabulary is, on each of them,
a smaller model of the same kind (`on_one_device`). Where the width of the residual stream is split,
parameters lie in parts and are gathered layer by layer as they are used. Pure arithmetic over the
table of parameters.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import NamedTuple

from jaxneurons.model.config import ModelConfig
from jaxneurons.model.device_share import SPLIT, model_of_parts
from jaxneurons.model.parameters import Parameter, get, list_parameters
from jaxneurons.model.sharding import (
    MESH_AXES,
    PRESETS,
    ShardingRules,
    partition_specs,
)


@dataclasses.dataclass(frozen=True)
class Placement:
    """A mesh and the rules that split a model over it.

    Attributes:
      data: devices along the mesh's first axis.
      model: along its second.
      preset: name of the rules, of `model.sharding.PRESETS`.
    """

    data: int = 1
    model: int = 1
    preset: str = "tensor"

    @property
    def devices(self) -> int:
        """Of the whole mesh."""
        return self.data * self.model

    @property
    def sizes(self) -> dict[str, int]:
        """Devices along each axis."""
        return dict(zip(MESH_AXES, (self.data, self.model), strict=True))

    @property
    def rules(self) -> ShardingRules:
        """The preset's."""
        return PRESETS[self.preset]

    @property
    def mesh(self) -> str:
        """As `--mesh` takes it."""
        return f"{self.data}x{self.model}"

    def parts(self, axis: str) -> int:
        """Devices that an axis is split over, if they divide it."""
        return math.prod(self.sizes[name] for name in self.rules.mesh_axes(axis))


class Held(NamedTuple):
    """Parameters on one device, in bytes.

    Attributes:
      resting: its share of all of them.
      gathered: the largest module that is put together from all devices' shares to be used: a
        layer, or an embedding; 0 where none is.
      moved: what it receives when every parameter is used once.
    """

    resting: int
    gathered: int
    moved: int


def held(config: ModelConfig, placement: Placement, itemsize: int) -> Held:
    """What a device holds of a model's parameters of `itemsize` bytes each."""
    specs = partition_specs(config, placement.sizes, placement.rules)
    hidden = placement.rules.mesh_axes("hidden")
    resting = moved = layer = others = 0
    for parameter in list_parameters(config):
        spec = get(specs, parameter.path)
        share = parameter.size // _devices(spec, placement.sizes)
        resting += share
        whole = _devices([n for n in _names(spec) if n in hidden], placement.sizes) * share
        if whole == share:
            continue
        moved += whole - share
        if parameter.per_layer:
            layer += whole // config.num_layers
        else:
            others = max(others, whole)
    return Held(resting * itemsize, max(layer, others) * itemsize, moved * itemsize)


def _names(spec: object) -> list[str]:
    entries = list(spec)  # pyright: ignore[reportCallIssue, reportArgumentType, reportUnknownVariableType]
    return [n for e in entries if e is not None for n in ((e,) if isinstance(e, str) else e)]


def _devices(spec: object, sizes: Mapping[str, int]) -> int:
    return math.prod(sizes[name] for name in _names(spec))


def on_one_device(config: ModelConfig, placement: Placement) -> ModelConfig:
    """The model that a device computes: see `model_of_parts`."""
    return model_of_parts(config, {name: placement.parts(name) for name in SPLIT})


def layer_bytes(parameters: tuple[Parameter, ...], itemsize: int) -> int:
    """Of one layer's parameters."""
    return itemsize * sum(math.prod(p.layer_shape) for p in parameters if p.per_layer)
