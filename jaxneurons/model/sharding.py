"""Parameters and prompts over several devices: logical axes, and rules that map them to a mesh.

Every axis of every parameter has a name of the model's own (`vocab`, `heads`, ...). A frozen
`ShardingRules` says which axes of the mesh each name is split over; everything else follows.
Nothing in the model knows of it: XLA partitions whatever is computed from the sharded arrays.

    mesh = make_mesh("2x4")  # data x model
    params = shard_params(lm.params, lm.config, mesh, PRESETS["fsdp-tensor"])
    tokens = jax.device_put(tokens, batch_sharding(mesh, PRESETS["fsdp-tensor"]))
    scores = integrated_gradients(params, tokens, targets, config=lm.config)

`partition_specs` and `undivided` are arithmetic over a mesh's shape: they need no devices.
"""

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from jaxneurons.errors import ConfigError, near_matches
from jaxneurons.model.config import ModelConfig
from jaxneurons.model.parameters import (
    Parameter,
    Params,
    axes,
    get,
    list_parameters,
    parameter_tree,
)
from jaxneurons.storage.printable import counted
from jaxneurons.storage.settings import check_fields

MESH_AXES = ("data", "model")
"""The axes of every mesh that this library makes."""

MeshAxes = str | tuple[str, ...] | None
"""What a logical axis is split over: an axis of the mesh, several (the first one's parts are the
largest), or none."""


@dataclasses.dataclass(frozen=True)
class ShardingRules:
    """The mesh axes that each logical axis is split over: one, a tuple of several, or None.

    The default splits prompts over `data` and the model over `model`, Megatron-style: heads and
    feed-forward neurons stay whole on one device, and each block is summed over devices twice.
    `PRESETS` has others by name.

    Attributes:
      batch: prompts.
      vocab: rows of the embedding, columns of the unembedding.
      hidden: width of the residual stream.
      intermediate: neurons of the feed-forward.
      heads: query heads.
      kv_heads: key and value heads.
      layers: the stacked layers.
      experts: the experts of a layer; their own neurons are `intermediate`.
    """

    batch: MeshAxes = "data"
    vocab: MeshAxes = "model"
    hidden: MeshAxes = None
    intermediate: MeshAxes = "model"
    heads: MeshAxes = "model"
    kv_heads: MeshAxes = "model"
    layers: MeshAxes = None
    experts: MeshAxes = None

    def __post_init__(self) -> None:
        check_fields(self)
        for field in dataclasses.fields(self):
            names = self.mesh_axes(field.name)
            if len(set(names)) < len(names):
                raise ConfigError(
                    f"rule {field.name}={names!r} names a mesh axis twice; once is enough"
                )

    def mesh_axes(self, axis: str) -> tuple[str, ...]:
        """The mesh axes that a logical axis is split over; empty: none."""
        value: MeshAxes = getattr(self, axis, None)
        return (value,) if isinstance(value, str) else value or ()


_NOTHING = ShardingRules(None, None, None, None, None, None, None)
PRESETS: Mapping[str, ShardingRules] = MappingProxyType(
    {
        "tensor": ShardingRules(),
        "fsdp": dataclasses.replace(_NOTHING, batch=MESH_AXES, hidden=MESH_AXES),
        "fsdp-tensor": ShardingRules(hidden="data"),
        "data": dataclasses.replace(_NOTHING, batch=MESH_AXES),
    }
)
"""Rules by name: `tensor` (the default), the model over `model`, copied along `data`; `fsdp`, every
parameter over all devices, gathered layer by layer as it is used; `fsdp-tensor`, both, each over
its own axis; `data`, prompts over all devices and the parameters whole on each."""


def resolve_rules(rules: ShardingRules | str) -> ShardingRules:
    """Rules, or those of a preset's name.

    Raises:
      ConfigError: neither.
    """
    if isinstance(rules, ShardingRules):
        return rules
    if isinstance(rules, str) and rules in PRESETS:
        return PRESETS[rules]
    if isinstance(rules, str):
        raise ConfigError(f"unknown sharding {rules!r}; {near_matches(rules, PRESETS)}")
    raise ConfigError(f"rules must be ShardingRules or a preset's name; got {rules!r:.60}")


def parse_mesh(text: str) -> tuple[int, int]:
    """The shape (data, model) of a mesh that is written DATAxMODEL, such as "4x2".

    Raises:
      ConfigError: it is not written so.
    """
    match = re.fullmatch(r"\s*(\d{1,6})\s*[xX×]\s*(\d{1,6})\s*", text)
    shape = tuple(map(int, match.groups())) if match else (0, 0)
    if not all(shape):
        raise ConfigError(f"a mesh is written DATAxMODEL, such as 4x2; got {text!r}")
    return shape[0], shape[1]


def make_mesh(shape: str | tuple[int, int], devices: Sequence[Any] | None = None) -> Mesh:
    """A mesh of the axes `data` and `model`, over as many of the devices as it needs.

    Args:
      shape: (data, model), or "4x2".
      devices: to choose from; default: all that JAX has, of all processes.

    Raises:
      ConfigError: a shape that is no shape, or more devices than there are.
    """
    sizes = parse_mesh(shape) if isinstance(shape, str) else tuple(shape)
    if len(sizes) != 2 or not all(type(n) is int and n > 0 for n in sizes):
        raise ConfigError(f"a mesh has a shape (data, model) of two counts; got {shape!r}")
    there = list(jax.devices() if devices is None else devices)
    needed = math.prod(sizes)
    if needed > len(there):
        kind = f" ({there[0].device_kind})" if there else ""
        raise ConfigError(
            f"a mesh of {sizes[0]}x{sizes[1]} needs {needed} devices, but there "
            f"{'is' if len(there) == 1 else 'are'} {counted(len(there), 'device')}{kind}"
        )
    auto = (AxisType.Auto,) * len(MESH_AXES)
    return jax.make_mesh(sizes, MESH_AXES, axis_types=auto, devices=there[:needed])


def resolve_mesh(mesh: Mesh | str | tuple[int, int]) -> Mesh:
    """A mesh, or the one of this shape: see `make_mesh`."""
    return mesh if isinstance(mesh, Mesh) else make_mesh(mesh)


def logical_axes(config: ModelConfig) -> dict[str, Any]:
    """Names of every parameter's axes, nested as the parameters are: a tuple for each array.

    For example `logical_axes(config)["layers"]["ffn"]["up"]["kernel"]` is
    `("layers", "hidden", "intermediate")`, with "experts" behind "layers" where there are any. The
    names are those of `parameters.axes`; `heads` and `kv_heads` stand for heads times head_dim.
    """
    return parameter_tree(config, lambda parameter: parameter.axes)


def partition_specs(
    config: ModelConfig, sizes: Mapping[str, int], rules: ShardingRules = ShardingRules()
) -> dict[str, Any]:
    """A `PartitionSpec` for every parameter, nested as the parameters are.

    A logical axis that its mesh axes together do not divide is not split: 3 key/value heads stay
    whole on 2 devices; `undivided` says so. Heads are never cut: `heads` and `kv_heads` are split
    by whole heads.

    Args:
      config: the model's shape.
      sizes: devices along each axis of the mesh, as `Mesh.shape` has them.
      rules: logical axis -> mesh axes.

    Raises:
      ConfigError: a rule names an axis that the mesh has not, or the rules split a parameter twice
        over the same mesh axis.
    """
    check_rules(rules, sizes)
    parts = {name: axis.parts for name, axis in axes(config).items()}

    def spec(parameter: Parameter) -> PartitionSpec:
        wanted = [rules.mesh_axes(name) for name in parameter.axes]
        used = [axis for names in wanted for axis in names]
        if len(set(used)) < len(used):
            raise ConfigError(
                f"rules split the parameter axes {parameter.axes} over the mesh axes "
                f"{tuple(as_entry(names) for names in wanted)}: the same mesh axis twice; set one "
                "of the rules to None"
            )
        return PartitionSpec(
            *(
                None if parts[name] % devices_along(names, sizes) else as_entry(names)
                for name, names in zip(parameter.axes, wanted, strict=True)
            )
        )

    return parameter_tree(config, spec)


@dataclasses.dataclass(frozen=True)
class Undivided:
    """A logical axis that the mesh does not divide, so that it stays whole.

    Attributes:
      axis: its name.
      parts: that would have to be split evenly: heads, or single values.
      mesh_axes: that the rules name for it.
      devices: along these together.
      parameters: the arrays that have the axis, keys joined by dots.
    """

    axis: str
    parts: int
    mesh_axes: tuple[str, ...]
    devices: int
    parameters: tuple[str, ...]

    def __str__(self) -> str:
        where = " x ".join(self.mesh_axes)
        return (
            f"{self.axis} ({self.parts}) cannot be divided over {self.devices} devices ({where}) "
            f"and is not split: {', '.join(self.parameters)}"
        )


def undivided(
    config: ModelConfig, sizes: Mapping[str, int], rules: ShardingRules = ShardingRules()
) -> tuple[Undivided, ...]:
    """The logical axes that rules would split and the mesh does not divide; `str()` says why.

    Arguments and errors as of `partition_specs`.
    """
    check_rules(rules, sizes)
    result = []
    for name, axis in axes(config).items():
        names = rules.mesh_axes(name)
        devices = devices_along(names, sizes)
        arrays = tuple(".".join(p.path) for p in list_parameters(config) if name in p.axes)
        if axis.parts % devices and arrays:
            result.append(Undivided(name, axis.parts, names, devices, arrays))
    return tuple(result)


def whole_parameters(
    config: ModelConfig, sizes: Mapping[str, int], rules: ShardingRules = ShardingRules()
) -> dict[str, str]:
    """Every parameter that each device holds all of, with the reason; keys joined by dots.

    Arguments and errors as of `partition_specs`.
    """
    specs = partition_specs(config, sizes, rules)
    odd = undivided(config, sizes, rules)
    result = {}
    for parameter in list_parameters(config):
        names = [name for entry in get(specs, parameter.path) for name in entry_axes(entry)]
        if devices_along(names, sizes) > 1:
            continue
        reasons = [
            f"{entry.axis} ({entry.parts}) cannot be divided over {entry.devices} devices"
            for entry in odd
            if entry.axis in parameter.axes
        ]
        result[".".join(parameter.path)] = "; ".join(reasons) or "no rule splits its axes"
    return result


def param_shardings(
    config: ModelConfig, mesh: Mesh, rules: ShardingRules = ShardingRules()
) -> dict[str, Any]:
    """A `NamedSharding` for every parameter, nested as the parameters are.

    Args:
      config: the model's shape.
      mesh: the devices; its axes may be of any type, arrays come out with `Auto` axes.
      rules: logical axis -> mesh axes; see `partition_specs`.

    Raises:
      ConfigError: as `partition_specs`.
    """
    specs = partition_specs(config, mesh.shape, rules)
    return jax.tree.map(
        lambda spec: NamedSharding(auto_mesh(mesh), spec),
        specs,
        is_leaf=lambda node: isinstance(node, PartitionSpec),
    )


def shard_params(
    params: Params, config: ModelConfig, mesh: Mesh, rules: ShardingRules = ShardingRules()
) -> Params:
    """The same parameters, laid out over the mesh: see `param_shardings`."""
    return jax.device_put(params, param_shardings(config, mesh, rules))


def batch_sharding(mesh: Mesh, rules: ShardingRules = ShardingRules()) -> NamedSharding:
    """For tokens, targets and lengths: the first axis is split, which the devices must divide.

    Raises:
      ConfigError: a rule names an axis that the mesh has not.
    """
    check_rules(rules, mesh.shape)
    return NamedSharding(auto_mesh(mesh), PartitionSpec(as_entry(rules.mesh_axes("batch"))))


def check_rules(rules: ShardingRules, sizes: Mapping[str, int]) -> None:
    """Raise `ConfigError` with near matches unless the mesh has every axis that rules name."""
    known = list(map(str, sizes))
    for field in dataclasses.fields(rules):
        for axis in rules.mesh_axes(field.name):
            if axis not in known:
                raise ConfigError(
                    f"rule {field.name}={getattr(rules, field.name)!r}: the mesh has no axis "
                    f"{axis!r}, {near_matches(axis, known)} (a size of 1 is fine)"
                )


def auto_mesh(mesh: Mesh) -> Mesh:
    """The same devices with `Auto` axes, along which XLA propagates shardings."""
    return Mesh(mesh.devices, mesh.axis_names)


def devices_along(names: Sequence[str], sizes: Mapping[str, int]) -> int:
    """Devices along some axes of a mesh together."""
    return math.prod(sizes[name] for name in names)


def as_entry(names: Sequence[str]) -> MeshAxes:
    """Mesh axes as a `PartitionSpec` has them."""
    return None if not names else names[0] if len(names) == 1 else tuple(names)


def entry_axes(entry: MeshAxes) -> tuple[str, ...]:
    """Mesh axes of an entry of a `PartitionSpec`."""
    return (entry,) if isinstance(entry, str) else entry or ()
