"""Which parameters belong to neurons, and how functions reach them without gathering an array.

Read off the table of `model/parameters.py`: a multiplier of a site multiplies those arrays of the
site's projection that lie along the site's axis (of `act`: the inputs of the down projection).
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.core import Tracer
from jax.typing import ArrayLike

from jaxneurons.edit.experts import of_experts
from jaxneurons.errors import ConfigError, DataError
from jaxneurons.model.config import ModelConfig
from jaxneurons.model.parameters import (
    LAYERS,
    SITE_AXES,
    Parameter,
    Params,
    check_site,
    get,
    list_parameters,
    replace,
    site_widths,
)
from jaxneurons.neurons.sets import NeuronSet

WRITERS = {"up": "down", "gate": "down", "act": "down", "v": "o"}
"""The projection that has the output rows of a site's neurons."""
_NO_ROW = {
    "q": "its value only weighs positions against each other",
    "k": "its value only weighs positions against each other",
    "o": "it is a coordinate of the residual stream itself",
    "down": "it is a coordinate of the residual stream itself",
}


def map_neurons(
    params: Params,
    site: str,
    function: Callable[..., ArrayLike],
    tables: Sequence[Array],
    config: ModelConfig,
    *,
    chosen: Array | None = None,
    other: Params | None = None,
) -> Params:
    """Apply a function, entry by entry, to the parameters that a multiplier of a site multiplies.

    Elementwise, so that sharded arrays stay where they are.

    Args:
      params: the parameters.
      site: one.
      function: of an array of the parameters, of the tables broadcast to it, and of the same array
        of `other`, if that is given; the result is rounded to the array's dtype.
      tables: [layer, width].
      config: the model's shape.
      chosen: [layer, width]; entries of other neurons keep their bits. None: all are chosen.
      other: parameters of the same shapes.
    """
    for parameter, axis in neuron_arrays(site, config):
        x = leaf_of(params, parameter, "parameters")
        arguments = [_along(table, parameter, axis) for table in tables]
        if other is not None:
            arguments.append(leaf_of(other, parameter, "other parameters"))
        new = jnp.asarray(function(x, *arguments)).astype(x.dtype)
        if chosen is not None:
            new = jnp.where(_along(chosen, parameter, axis), new, x)
        params = replace(params, parameter.path, new)
    return params


def by_site(
    neurons: NeuronSet, values: ArrayLike, config: ModelConfig, *, name: str
) -> list[tuple[str, np.ndarray, Array]]:
    """Site, pairs [n, 2] and values [n] of the neurons of each site of a set.

    Raises:
      ConfigError: neither one value nor one for each neuron; `name` says of what.
      DataError: a neuron that this model does not have.
    """
    neurons.check(config)
    values = wide(values)
    if values.shape not in ((), (len(neurons),)):
        raise ConfigError(
            f"{name} are of shape {values.shape}; {len(neurons)} neurons need one number, or "
            f"({len(neurons)},) in the order in which the set iterates"
        )
    values = jnp.broadcast_to(values, (len(neurons),))
    parts, start = [], 0
    for site in neurons.codes:
        pairs = neurons.pairs(site)
        parts.append((site, pairs, values[start : start + len(pairs)]))
        start += len(pairs)
    return parts


def wide(x: ArrayLike) -> Array:
    """An array in float32, or in its own type if that is wider."""
    x = jnp.asarray(x)
    return x if x.dtype == jnp.float64 else x.astype(jnp.float32)


def neuron_arrays(site: str, config: ModelConfig) -> list[tuple[Parameter, int]]:
    """The arrays that a multiplier of a site multiplies, and their axis along which neurons lie."""
    module, axis = "down" if site == "act" else site, SITE_AXES[site]
    return [
        (parameter, parameter.axes.index(axis))
        for parameter in list_parameters(config)
        if parameter.per_layer and parameter.path[-2] == module and axis in parameter.axes
    ]


def leaf_of(params: Params, parameter: Parameter, what: str) -> Array:
    """One array of the parameters, once it is clear that they are of this configuration."""
    try:
        leaf = jnp.asarray(get(params, parameter.path))
    except (KeyError, TypeError):
        raise DataError(
            f"the {what} have no {'.'.join(parameter.path)}, which a model of this config has: "
            "give the config that belongs to them"
        ) from None
    if leaf.shape != parameter.shape:
        raise DataError(
            f"the {what} have a {'.'.join(parameter.path)} of shape {leaf.shape}, a model of this "
            f"config {parameter.shape}: give the config that belongs to them"
        )
    return leaf


def tabulate(
    site: str,
    layer: ArrayLike,
    index: ArrayLike,
    values: ArrayLike,
    rest: float,
    config: ModelConfig,
) -> tuple[Array, Array]:
    """[layer, width]: values at some neurons and `rest` elsewhere; and which are those neurons.

    Raises:
      ConfigError: an unknown site, or arrays of shapes or types that do not name neurons.
      DataError: as `check_neurons`.
    """
    check_site(site)
    layer, index, values = _integers(layer), _integers(index), wide(values)
    if layer.ndim != 1 or index.shape != layer.shape or values.shape not in ((), layer.shape):
        raise ConfigError(
            f"layer, index and values of neurons are of shapes {layer.shape}, {index.shape} and "
            f"{values.shape}: as many of each are needed, or one value"
        )
    check_neurons(site, layer, index, config)
    shape = (config.num_layers, site_widths(config)[site])
    table = jnp.full(shape, rest, values.dtype).at[layer, index].set(values)
    return table, jnp.zeros(shape, bool).at[layer, index].set(True)


def _integers(values: Any) -> Array | np.ndarray:
    """An array of whole numbers, as wide as it comes."""
    numbers = values if isinstance(values, Array) else np.asarray(values)
    if numbers.dtype.kind not in "iu":
        raise ConfigError(f"layers and neurons are whole numbers, got {numbers.dtype}")
    return numbers


def _along(table: Array, parameter: Parameter, axis: int) -> Array:
    """[layer, width] as it broadcasts to an array whose axis `axis` is the width."""
    shape = [1] * len(parameter.shape)
    shape[0], shape[axis] = parameter.shape[0], parameter.shape[axis]
    if parameter.axes[axis] == "intermediate" and of_experts(parameter):
        shape[1] = parameter.shape[1]
    return table.reshape(shape)


def check_neurons(
    site: str, layer: Array | np.ndarray, index: Array | np.ndarray, config: ModelConfig
) -> None:
    """Raise unless neurons exist and are there once each; inside of `jit` nothing is known.

    Raises:
      ConfigError: numbers that are negative.
      DataError: a neuron that this model does not have, or one that is there twice.
    """
    for numbers in (layer, index):
        if isinstance(numbers, Tracer):
            return
        if isinstance(numbers, Array) and not numbers.is_fully_addressable:
            return  # of several processes
    pairs = np.stack([np.asarray(layer), np.asarray(index)], axis=1)
    neurons = NeuronSet.of(**{site: pairs})
    neurons.check(config)
    if len(neurons) < len(pairs):
        values, counts = np.unique(pairs, axis=0, return_counts=True)
        twice = tuple(values[counts > 1][0].tolist())
        raise DataError(f"site {site!r}: neuron {twice} is there more than once")


def as_pairs(neurons: Any) -> Array | np.ndarray:
    """[pair, 2] of one (layer, index) or several.

    Raises:
      ConfigError: anything else.
    """
    pairs = _integers(neurons)
    if pairs.ndim not in (1, 2) or pairs.shape[-1] != 2:
        raise ConfigError(
            f"neurons are (layer, index) or an array [pair, 2] of them, got shape {pairs.shape}"
        )
    return pairs.reshape(-1, 2)


def output_rows(site: str, index: np.ndarray, config: ModelConfig) -> tuple[Parameter, np.ndarray]:
    """The kernel that has the output rows of a site's neurons, and which they are, [neuron, row].

    Of experts, rows are counted through the kernels of all of them.

    Raises:
      ConfigError: a site that has none.
    """
    if site not in WRITERS:
        raise ConfigError(
            f"a neuron of site {site!r} has no output row: {_NO_ROW[site]}; rows are those of "
            f"{', '.join(WRITERS)}; `scale`, `interpolate` and `force` work on every site"
        )
    path = {p.path[-2:]: p for p in list_parameters(config) if p.path[0] == LAYERS}
    parameter = path[WRITERS[site], "kernel"]
    if site != "v":
        return parameter, index[:, None]
    # Key/value head h is read by the query heads h * group to (h + 1) * group - 1.
    group = config.num_heads // config.num_kv_heads
    head, dimension = np.divmod(index, config.head_dim)
    heads = head[:, None] * group + np.arange(group)
    return parameter, heads * config.head_dim + dimension[:, None]


def check_shared_rows(neurons: NeuronSet) -> None:
    """Raise if feed-forward neurons of two sites write the same row."""
    sites = [site for site in neurons.codes if WRITERS.get(site) == "down"]
    pairs = [tuple(pair) for site in sites for pair in neurons.pairs(site).tolist()]
    if len({*pairs}) < len(pairs):
        raise DataError(
            f"sites {', '.join(sites)} have the same output rows, of the down kernel: give each "
            "neuron in one site"
        )
