"""What each device does of a batch where parameters lie on several: its prompts, its part.

Read from the arrays' own shardings, so that whoever lays parameters out says it once.
"""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple, TypeVar

import jax
import numpy as np
from jax.core import Tracer
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxneurons.model.config import ModelConfig
from jaxneurons.model.parameters import Params, axes, get, list_parameters
from jaxneurons.model.sharding import MeshAxes, as_entry, devices_along, entry_axes

Batch = TypeVar("Batch")

SPLIT = ("vocab", "intermediate", "heads", "kv_heads")
"""Axes by which the work is split, and not only what is stored."""


def spread_batch(params: Params, batch: Batch, *, config: ModelConfig) -> Batch:
    """Arrays whose first axis is prompts, split over the axes of the parameters' mesh.

    Over those that split no heads, feed-forward neurons, vocabulary or layers, as far as they
    divide the prompts: then no two devices run the same prompt with the same part of the model.
    Without a mesh, and inside of a trace, the arrays are what they were.

    Args:
      params: the model's parameters, wherever they lie.
      batch: arrays, in any nesting.
      config: the model's shape.
    """
    mesh = _mesh_of(params)
    if mesh is None:
        return batch
    free = _prompt_axes(params, config, mesh)

    def split(array: Any) -> Any:
        if isinstance(array, Tracer) or not np.ndim(array):
            return array
        names: list[str] = []
        for axis in free:
            if len(array) % devices_along([*names, axis], mesh.shape) == 0:
                names.append(axis)
        return jax.device_put(array, NamedSharding(mesh, PartitionSpec(as_entry(names))))

    return jax.tree.map(split, batch)


def device_share(params: Params, config: ModelConfig) -> tuple[ModelConfig, int]:
    """The model that each device computes, and how many of them share the prompts of a batch.

    Of parameters that lie on one device, or are traced, the whole model and 1.

    Args:
      params: the model's parameters, wherever they lie.
      config: the model's shape.
    """
    mesh = _mesh_of(params)
    if mesh is None:
        return config, 1
    parts: dict[str, int] = dict.fromkeys(SPLIT, 1)
    for name, entry in _splits(params, config):
        if name in parts:
            parts[name] = max(parts[name], devices_along(entry_axes(entry), mesh.shape))
    of_prompts = devices_along(_prompt_axes(params, config, mesh), mesh.shape)
    return model_of_parts(config, parts), of_prompts


def model_of_parts(config: ModelConfig, devices: Mapping[str, int]) -> ModelConfig:
    """What one of several devices computes: its heads, neurons and rows of the vocabulary.

    What the devices do not divide stays whole on each; key and value heads as far as its query
    heads are divided by them.

    Args:
      config: the whole model's shape.
      devices: that each axis of `SPLIT` is split over.
    """
    parts = {name: axis.parts for name, axis in axes(config).items()}
    local = {
        name: parts[name] // devices[name] if parts[name] % devices[name] == 0 else parts[name]
        for name in SPLIT
    }
    kv_heads = local["kv_heads"]
    while local["heads"] % kv_heads:
        kv_heads -= 1
    return dataclasses.replace(
        config,
        num_heads=local["heads"],
        num_kv_heads=kv_heads,
        intermediate_size=local["intermediate"],
        vocab_size=local["vocab"],
    )


def _mesh_of(params: Params) -> Mesh | None:
    """The mesh of several devices that parameters lie on."""
    embedding = get(params, ("embed", "embedding"))
    sharding = None if isinstance(embedding, Tracer) else getattr(embedding, "sharding", None)
    if not isinstance(sharding, NamedSharding) or sharding.mesh.size == 1:
        return None
    assert isinstance(sharding.mesh, Mesh)
    return sharding.mesh


def _splits(params: Params, config: ModelConfig) -> Iterator[tuple[str, MeshAxes]]:
    """Every axis of every parameter on a mesh, and what it is split over there."""
    for parameter in list_parameters(config):
        spec = get(params, parameter.path).sharding.spec
        yield from zip(parameter.axes, spec, strict=False)


def _prompt_axes(params: Params, config: ModelConfig, mesh: Mesh) -> list[str]:
    """Axes of the mesh that split no heads, feed-forward neurons, vocabulary or layers."""
    taken = {
        axis
        for name, entry in _splits(params, config)
        if name != "hidden"
        for axis in entry_axes(entry)
    }
    return [axis for axis in mesh.axis_names if axis not in taken]


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


def held_by(
    config: ModelConfig,
    specs: Mapping[str, Any],
    sizes: Mapping[str, int],
    itemsize: int,
) -> Held:
    """What a device holds of a model's parameters.

    Args:
      config: the model's shape.
      specs: a `PartitionSpec` of each parameter, nested as they are.
      sizes: devices along each axis of the mesh.
      itemsize: bytes of a value.
    """
    resting = moved = layer = others = 0
    for parameter in list_parameters(config):
        entries = [entry_axes(entry) for entry in get(specs, parameter.path)]
        share = parameter.size // devices_along([n for names in entries for n in names], sizes)
        resting += share
        hidden = [
            n
            for axis, names in zip(parameter.axes, entries, strict=False)
            if axis == "hidden"
            for n in names
        ]
        whole = devices_along(hidden, sizes) * share
        if whole == share:
            continue
        moved += whole - share
        if parameter.per_layer:
            layer += whole // config.num_layers
        else:
            others = max(others, whole)
    return Held(resting * itemsize, max(layer, others) * itemsize, moved * itemsize)


def held_here(params: Params, config: ModelConfig) -> Held:
    """What each device holds of parameters, wherever they lie."""
    mesh = _mesh_of(params)
    leaves = jax.tree.leaves(params)
    if mesh is None:
        return Held(sum(leaf.nbytes for leaf in leaves), 0, 0)
    specs = jax.tree.map(lambda leaf: leaf.sharding.spec, params)
    return held_by(config, specs, mesh.shape, max(leaf.dtype.itemsize for leaf in leaves))
