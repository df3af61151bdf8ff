"""What one device of a mesh holds: its share of the parameters, and the model that it computes.

A model that is split over devices by heads, neurons and rows of the vocabulary is, on each of them,
a smaller model of the same kind (`on_one_device`). Where the width of the residual stream is split,
parameters lie in parts and are gathered layer by layer as they are used. Pure arithmetic over the
table of parameters.
"""

import dataclasses
import math

from jaxneurons.model.config import ModelConfig
from jaxneurons.model.device_share import SPLIT, Held, held_by, model_of_parts
from jaxneurons.model.parameters import Parameter
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


def held(config: ModelConfig, placement: Placement, itemsize: int) -> Held:
    """What a device holds of a model's parameters of `itemsize` bytes each."""
    specs = partition_specs(config, placement.sizes, placement.rules)
    return held_by(config, specs, placement.sizes, itemsize)


def on_one_device(config: ModelConfig, placement: Placement) -> ModelConfig:
    """The model that a device computes: see `model_of_parts`."""
    return model_of_parts(config, {name: placement.parts(name) for name in SPLIT})


def layer_bytes(parameters: tuple[Parameter, ...], itemsize: int) -> int:
    """Of one layer's parameters."""
    return itemsize * sum(math.prod(p.layer_shape) for p in parameters if p.per_layer)
