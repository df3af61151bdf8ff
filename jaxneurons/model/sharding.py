"""Parameters and prompts over several devices: logical axes, and rules that map them to a mesh.

Every axis of every parameter has a name of the model's own (`vocab`, `heads`, ...). A frozen
`ShardingRules` says which mesh axis each name is split over; everything else follows. Nothing in
the model knows of it: XLA partitions whatever is computed from the sharded arrays.

    mesh = jax.make_mesh((2, 4), ("data", "model"))
    params = shard_params(lm.params, lm.config, mesh)
    tokens = jax.device_put(tokens, batch_sharding(mesh))
    scores = jax.jit(lambda p, x, y: integrated_gradients(p, x, y, config=lm.config))
    scores(params, tokens, targets)
"""

import dataclasses
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxneurons.errors import ConfigError, near_matches
from jaxneurons.model.config import ModelConfig
from jaxneurons.model.parameters import Parameter, Params, axes, parameter_tree
from jaxneurons.storage.settings import check_fields


@dataclasses.dataclass(frozen=True)
class ShardingRules:
    """The mesh axis that each logical axis is split over; None = not split.

    The default splits prompts over `data` and the model over `model`, Megatron-style: heads and
    feed-forward neurons stay whole on one device, and each block is summed over devices twice.

    Attributes:
      batch: prompts.
      vocab: rows of the embedding, columns of the unembedding.
      hidden: width of the residual stream.
      intermediate: neurons of the feed-forward.
      heads: query heads.
      kv_heads: key and value heads.
      layers: the stacked layers.
    """

    batch: str | None = "data"
    vocab: str | None = "model"
    hidden: str | None = None
    intermediate: str | None = "model"
    heads: str | None = "model"
    kv_heads: str | None = "model"
    layers: str | None = None

    def __post_init__(self) -> None:
        check_fields(self)


def logical_axes(config: ModelConfig) -> dict[str, Any]:
    """Names of every parameter's axes, nested as the parameters are: a tuple for each array.

    For example `logical_axes(config)["layers"]["ffn"]["up"]["kernel"]` is
    `("layers", "hidden", "intermediate")`. The names are those of `parameters.axes`; `heads` and
    `kv_heads` stand for heads times head_dim.
    """
    return parameter_tree(config, lambda parameter: parameter.axes)


def param_shardings(
    config: ModelConfig, mesh: Mesh, rules: ShardingRules = ShardingRules()
) -> dict[str, Any]:
    """A `NamedSharding` for every parameter, nested as the parameters are.

    A logical axis that the mesh axis does not divide is not split: 3 key/value heads stay whole on
    2 devices. Heads are never cut: `heads` and `kv_heads` are split by whole heads.

    Args:
      config: the model's shape.
      mesh: the devices; its axes may be of any type, arrays come out with `Auto` axes.
      rules: logical axis -> mesh axis.

    Raises:
      ConfigError: a rule names an axis that the mesh has not, or splits a parameter twice over
        the same mesh axis.
    """
    mesh = _checked(mesh, rules)
    sizes = axes(config)

    def place(name: str) -> str | None:
        mesh_axis: str | None = getattr(rules, name, None)
        whole = mesh_axis is None or sizes[name].parts % mesh.shape[mesh_axis]
        return None if whole else mesh_axis

    def sharding(parameter: Parameter) -> NamedSharding:
        places = [place(name) for name in parameter.axes]
        used = [axis for axis in places if axis is not None]
        if len(set(used)) < len(used):
            raise ConfigError(
                f"rules split the parameter axes {parameter.axes} over the mesh axes "
                f"{tuple(places)}: the same mesh axis twice; set one of the rules to None"
            )
        return NamedSharding(mesh, PartitionSpec(*places))

    return parameter_tree(config, sharding)


def shard_params(
    params: Params, config: ModelConfig, mesh: Mesh, rules: ShardingRules = ShardingRules()
) -> Params:
    """The same parameters, laid out over the mesh: see `param_shardings`."""
    return jax.device_put(params, param_shardings(config, mesh, rules))


def batch_sharding(mesh: Mesh, rules: ShardingRules = ShardingRules()) -> NamedSharding:
    """For tokens, targets and lengths: the first axis is split, which the mesh axis must divide.

    Raises:
      ConfigError: a rule names an axis that the mesh has not.
    """
    return NamedSharding(_checked(mesh, rules), PartitionSpec(rules.batch))


def _checked(mesh: Mesh, rules: ShardingRules) -> Mesh:
    """The mesh with `Auto` axes (XLA propagates shardings), once all rules name its axes."""
    for field in dataclasses.fields(rules):
        axis = getattr(rules, field.name)
        if axis is not None and axis not in mesh.axis_names:
            raise ConfigError(
                f"rule {field.name}={axis!r}: the mesh has no such axis, "
                f"{near_matches(axis, map(str, mesh.axis_names))} (a size of 1 is fine)"
            )
    return Mesh(mesh.devices, mesh.axis_names)
