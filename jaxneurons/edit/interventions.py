"""Interventions on neurons as transformations of parameters: `params -> params`, all pure.

A neuron of a site is, among the parameters, what a multiplier of that site multiplies: its column
of the site's kernel with its entry of the bias (`up`, `gate`, `q`, `k`, `v`, `o`, `down`), or its
row of the down kernel (`act`). `scale` multiplies it, so that

    forward(scale(params, neurons, s, config=config), x)
    == forward(params, x, scales=neurons.scales(config, s))

for all texts and positions. What a neuron writes to the residual stream is its *output row* (and
passes the layer's post norm, where the model has one): `add` and `set_rows` change that.

Everything here composes with `jit`, `vmap`, `grad` and `lax.scan`, and no array of sharded
parameters is gathered; checks of values happen where values are known, outside of `jit`. There,
arrays that an edit does not change are the same objects as before, too (a compiled function that
returns parameters copies them all). Where models differ in multipliers only, a batch of edited
models is a batch of multipliers, never of parameters:

    scales = stack_scales(sets, config, 0.0)  # [set, layer, width] by site
    jax.vmap(lambda s: forward(params, tokens, config=config, scales=s).logits)(scales)
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike

from jaxneurons.edit.experts import neurons_at, rows_at
from jaxneurons.edit.neuron_parameters import (
    WRITERS,
    as_pairs,
    by_site,
    check_neurons,
    check_shared_rows,
    leaf_of,
    map_neurons,
    neuron_arrays,
    output_rows,
    tabulate,
    wide,
)
from jaxneurons.errors import ConfigError
from jaxneurons.model.axis_types import any_axes
from jaxneurons.model.config import ModelConfig
from jaxneurons.model.parameters import Params, check_site, replace, site_widths
from jaxneurons.neurons.sets import NeuronSet


@any_axes
def scale(
    params: Params,
    neurons: NeuronSet | Mapping[str, ArrayLike],
    factor: ArrayLike | None = None,
    *,
    config: ModelConfig,
) -> Params:
    """The parameters with which neurons are multiplied by factors, at every position.

    Products are made in float32 and rounded once to the parameters' dtype. Arrays without a chosen
    neuron are the same objects as before; entries of other neurons keep their bits.

    Args:
      params: the parameters; not touched.
      neurons: a set, of any sites; or multipliers [layer, width] by site, as `NeuronSet.scales`
        gives them (then without `factor`).
      factor: one, or [neuron], in the order in which the set iterates.
      config: the model's shape.

    Raises:
      ConfigError: an unknown site; multipliers or factors of another shape; no factor for a set.
      DataError: a neuron that this model does not have, or parameters of another shape.
    """
    if not isinstance(neurons, NeuronSet):
        if factor is not None:
            raise ConfigError("multipliers by site hold their factors: leave `factor` out")
        return _scale_by_tables(params, neurons, config)
    if factor is None:
        raise ConfigError("a set of neurons needs a factor (0 turns them off)")
    for site, pairs, factors in by_site(neurons, factor, config, name="factors"):
        params = scale_at(params, site, pairs[:, 0], pairs[:, 1], factors, config=config)
    return params


@any_axes
def scale_at(
    params: Params,
    site: str,
    layer: ArrayLike,
    index: ArrayLike,
    factor: ArrayLike,
    *,
    config: ModelConfig,
) -> Params:
    """`scale` of some neurons of a site that are given as arrays, which may be traced.

    Args:
      params: the parameters; not touched.
      site: of all of the neurons.
      layer: [neuron], from 0.
      index: [neuron], from 0. No neuron may be there twice.
      factor: [neuron], or one for all.
      config: the model's shape.

    Raises:
      ConfigError: an unknown site, or arrays of other shapes.
      DataError: a neuron that this model does not have or that is there twice (where values are
        known: inside `jit`, neurons that there are not are left out, and which factor of one that
        is there twice counts is not defined).
    """
    table, chosen = tabulate(site, layer, index, factor, 1.0, config)
    return map_neurons(params, site, lambda x, s: wide(x) * s, (table,), config, chosen=chosen)


def sparse_scales(
    site: str, layer: ArrayLike, index: ArrayLike, factor: ArrayLike, *, config: ModelConfig
) -> dict[str, Array]:
    """`NeuronSet.scales` of neurons that are given as arrays, which may be traced.

    For `forward(..., scales=...)` inside of `vmap`, so that a batch of interventions is a few
    numbers for each; arguments and errors as of `scale_at`.
    """
    return {site: tabulate(site, layer, index, factor, 1.0, config)[0]}


@any_axes
def ablate(params: Params, neurons: NeuronSet, *, config: ModelConfig) -> Params:
    """The parameters with which neurons are 0 at every position: `scale` by 0.

    Raises:
      DataError: a neuron that this model does not have, or parameters of another shape.
    """
    return scale(params, neurons, 0.0, config=config)


@any_axes
def interpolate(
    params: Params, other: Params, neurons: NeuronSet, weight: ArrayLike, *, config: ModelConfig
) -> Params:
    """(1 - weight) of what neurons are in `params` and `weight` of what they are in `other`.

    What a neuron is: what `scale` multiplies. For a whole feed-forward neuron, take it in the three
    sites `up`, `gate` and `act`.

    Args:
      params: the parameters; not touched.
      other: parameters of the same shapes.
      neurons: a set, of any sites.
      weight: one, or [neuron], in the order in which the set iterates; any number.
      config: the model's shape.

    Raises:
      ConfigError: weights of another shape.
      DataError: a neuron that this model does not have, or parameters of another shape.
    """

    def mix(x: Array, w: Array, y: Array) -> Array:
        return (1 - w) * wide(x) + w * wide(y)

    for site, pairs, weights in by_site(neurons, weight, config, name="weights"):
        table, chosen = tabulate(site, pairs[:, 0], pairs[:, 1], weights, 0.0, config)
        params = map_neurons(params, site, mix, (table,), config, chosen=chosen, other=other)
    return params


@any_axes
def restore(params: Params, base: Params, neurons: NeuronSet, *, config: ModelConfig) -> Params:
    """Everything of neurons as it is in `base`, bit for bit.

    That is whatever functions of this package change for them: what `scale` multiplies, and the
    output rows of neurons that have some; for `act`, which `force` holds by them, also the `up` and
    the `gate` neuron of that index. So for each such function,
    `restore(function(params, neurons, ...), params, neurons, config=config)` equals `params`.

    Args:
      params: the parameters; not touched.
      base: parameters of the same shapes.
      neurons: a set, of any sites.
      config: the model's shape.

    Raises:
      DataError: a neuron that this model does not have, or parameters of another shape.
    """
    neurons.check(config)
    for site in neurons.codes:
        layer, index = neurons.pairs(site).T
        for part in ("up", "gate", "act") if site == "act" else (site,):
            _, chosen = tabulate(part, layer, index, 0.0, 0.0, config)
            params = map_neurons(
                params, part, lambda x, y: y, (), config, chosen=chosen, other=base
            )
        if site in WRITERS:
            parameter, rows = output_rows(site, index, config)
            marks = np.zeros(parameter.shape[:-1], bool)
            marks[rows_at(marks[..., None], layer[:, None], rows)] = True
            here = leaf_of(params, parameter, "parameters")
            there = leaf_of(base, parameter, "base parameters")
            params = replace(params, parameter.path, jnp.where(marks[..., None], there, here))
    return params


@any_axes
def add(params: Params, neurons: NeuronSet, vectors: ArrayLike, *, config: ModelConfig) -> Params:
    """The parameters with vectors added to what neurons write, times their activation.

    A neuron's output row is a row of the down kernel (`act`, `up`, `gate`); for `v`, it is a row of
    the o kernel for each query head that reads the neuron, and the vector is added to all of them.
    Sums are made in float32 and rounded once to the parameters' dtype.

    Args:
      params: the parameters; not touched.
      neurons: a set of sites that have output rows.
      vectors: [hidden], for all, or [neuron, hidden], in the order in which the set iterates.
      config: the model's shape.

    Raises:
      ConfigError: a site without output rows, or vectors of another shape.
      DataError: a neuron that this model does not have, neurons that share a row, or parameters of
        another shape.
    """
    return _write_rows(
        params, neurons, vectors, lambda rows, vector: wide(rows) + wide(vector), config
    )


@any_axes
def set_rows(
    params: Params, neurons: NeuronSet, vectors: ArrayLike, *, config: ModelConfig
) -> Params:
    """The parameters in which what neurons write, times their activation, is these vectors.

    Arguments and errors as of `add`.
    """
    return _write_rows(params, neurons, vectors, lambda rows, vector: vector, config)


@any_axes
def swap(
    params: Params,
    site: str,
    first: ArrayLike | Sequence[Any],
    second: ArrayLike | Sequence[Any],
    *,
    config: ModelConfig,
) -> Params:
    """Neurons of a site exchange what `scale` multiplies, pair by pair.

    In one layer, whatever reads the site then sees the two values exchanged: after a swap of `up`
    neurons 3 and 5, `act` 3 is `up` 5 times silu(`gate` 3); after one of `act` neurons, the
    activation of each is written as the other's was. (A swap of all of `up`, `gate` and `act`
    renames two neurons and changes nothing.) In two layers, each neuron moves to the other's place.
    Twice is not at all, bit for bit.

    Args:
      params: the parameters; not touched.
      site: of all of the neurons.
      first: (layer, index), or [pair, 2] of them.
      second: as many, the partners.
      config: the model's shape.

    Raises:
      ConfigError: an unknown site, or no pairs of layer and index.
      DataError: a neuron that this model does not have or that is there twice (where values are
        known), or parameters of another shape.
    """
    check_site(site)
    neurons, partners = as_pairs(first), as_pairs(second)
    if neurons.shape != partners.shape:
        raise ConfigError(f"{len(neurons)} neurons and {len(partners)} partners make no pairs")
    traced = isinstance(neurons, Array) or isinstance(partners, Array)
    join = jnp.concatenate if traced else np.concatenate
    to, source = join([neurons, partners]), join([partners, neurons])
    check_neurons(site, to[:, 0], to[:, 1], config)
    for parameter, axis in neuron_arrays(site, config):
        x = leaf_of(params, parameter, "parameters")
        moved = x[neurons_at(parameter, axis, source[:, 0], source[:, 1])]
        new = x.at[neurons_at(parameter, axis, to[:, 0], to[:, 1])].set(moved)
        params = replace(params, parameter.path, new)
    return params


def _scale_by_tables(
    params: Params, scales: Mapping[str, ArrayLike], config: ModelConfig
) -> Params:
    for site in scales:
        check_site(site)
    for site, values in scales.items():
        table, width = wide(values), site_widths(config)[site]
        if table.shape not in ((config.num_layers, width), (config.num_layers, 1)):
            raise ConfigError(
                f"multipliers of site {site!r} are of shape {table.shape}; an edit of this model "
                f"needs [layer, width] = ({config.num_layers}, {width}). Multipliers for single "
                "rows or positions are no edit: give them to `forward`, or use `jax.vmap`"
            )
        params = map_neurons(params, site, lambda x, s: wide(x) * s, (table,), config)
    return params


def _write_rows(
    params: Params,
    neurons: NeuronSet,
    vectors: ArrayLike,
    function: Callable[[Array, Array], Array],
    config: ModelConfig,
) -> Params:
    neurons.check(config)
    vectors = jnp.asarray(vectors)
    count, hidden = len(neurons), config.hidden_size
    if vectors.shape not in ((hidden,), (count, hidden)):
        raise ConfigError(
            f"vectors are of shape {vectors.shape}; {count} neurons of this model need "
            f"[hidden] = ({hidden},) or [neuron, hidden] = ({count}, {hidden})"
        )
    vectors = jnp.broadcast_to(vectors, (count, hidden))
    rows = {site: output_rows(site, neurons.pairs(site)[:, 1], config) for site in neurons.codes}
    check_shared_rows(neurons)
    start = 0
    for site, (parameter, index) in rows.items():
        layer = neurons.pairs(site)[:, :1]
        x = leaf_of(params, parameter, "parameters")
        here = vectors[start : start + len(layer), None]
        place = rows_at(x, layer, index)
        new = jnp.broadcast_to(function(x[place], here), (*index.shape, hidden))
        params = replace(params, parameter.path, x.at[place].set(new.astype(x.dtype)))
        start += len(layer)
    return params
