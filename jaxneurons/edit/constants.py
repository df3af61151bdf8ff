"""Neurons forced to constants instead of multiplied: a column of zeros, and the constant as bias.

That is how expert units are driven (self-conditioning, arXiv 2110.02802) and what a response is
replaced by in the ablations of arXiv 2502.17355: the median response, say, whatever the text. A
constant is no multiple of an activation, so it needs a place of its own among the parameters: the
bias. Qwen2 has biases at `q`, `k` and `v`, Llama and its kin where `config.biases` names them;
`with_biases` gives any model some, which are zeros and change nothing.
"""

import dataclasses
from collections.abc import Iterable

import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from jaxneurons.edit.neuron_parameters import by_site, leaf_of, neuron_arrays, tabulate
from jaxneurons.errors import ConfigError, DataError, near_matches
from jaxneurons.model.axis_types import any_axes
from jaxneurons.model.config import PROJECTIONS, ModelConfig
from jaxneurons.model.parameters import Params, list_parameters, replace
from jaxneurons.neurons.sets import NeuronSet

_OPEN = 32.0
"""A gate that the activation function (silu, gelu_tanh) leaves as it is in float32, float16 and
bfloat16, and a power of two, so that `act` = (c / 32) * silu(32) is c without rounding."""


@any_axes
def force(params: Params, neurons: NeuronSet, values: ArrayLike, *, config: ModelConfig) -> Params:
    """The parameters with which neurons have constant activations, for all texts and positions.

    Their columns become zeros and their biases the constants. An `act` neuron is a product: its
    `gate` is forced to 32, where the activation function is the identity, and its `up` to a 32nd of the constant.

    Args:
      params: the parameters; not touched.
      neurons: a set, of sites whose projections have a bias; for `act`: those of `up` and `gate`.
      values: one, or [neuron], in the order in which the set iterates; may be traced.
      config: the model's shape.

    Raises:
      ConfigError: a projection without a bias, or values of another shape.
      DataError: a neuron that this model does not have, neurons of `act` that are also there as
        `up` or `gate`, or parameters of another shape.
    """
    _check_biases(neurons, config)
    _check_parts(neurons)
    for site, pairs, constants in by_site(neurons, values, config, name="values"):
        parts = [("up", constants / _OPEN), ("gate", _OPEN)] if site == "act" else []
        for part, constant in parts or [(site, constants)]:
            table, chosen = tabulate(part, pairs[:, 0], pairs[:, 1], constant, 0.0, config)
            params = _set_column(params, part, table, chosen, config)
    return params


@any_axes
def with_biases(
    params: Params, projections: Iterable[str], *, config: ModelConfig
) -> tuple[Params, ModelConfig]:
    """The same model with biases of zeros at some projections, and its configuration.

    It computes what it computed. Hugging Face's formats hold biases at `q`, `k`, `v` (Qwen2), at
    `q`, `k`, `v`, `o` together, and at `gate`, `up`, `down` together (Llama); the native format
    holds any.

    Args:
      params: the parameters; not touched.
      projections: of `q`, `k`, `v`, `o`, `gate`, `up`, `down`; those with a bias stay as they are.
      config: the model's shape.

    Raises:
      ConfigError: an unknown projection.
      DataError: parameters of another shape.
    """
    wanted = tuple(projections)
    for name in wanted:
        if name not in PROJECTIONS:
            raise ConfigError(f"unknown projection {name!r}; {near_matches(name, PROJECTIONS)}")
    biases = tuple(name for name in PROJECTIONS if name in (*wanted, *config.biases))
    for kernel in list_parameters(config):
        module = kernel.path[-2] if kernel.path[-1] == "kernel" else None
        if module in biases and module not in config.biases:
            zeros = jnp.zeros_like(leaf_of(params, kernel, "parameters")[:, 0])
            params = replace(params, (*kernel.path[:-1], "bias"), zeros)
    return params, dataclasses.replace(config, biases=biases)


def _check_biases(neurons: NeuronSet, config: ModelConfig) -> None:
    for site in neurons.codes:
        needed = ("up", "gate") if site == "act" else (site,)
        if missing := [name for name in needed if name not in config.biases]:
            raise ConfigError(
                f"site {site!r}: a constant is a bias, and this model ({config.family}) has none "
                f"at {' and '.join(missing)}; make one with `params, config = with_biases(params, "
                f"{missing!r}, config=config)`, or scale the neurons instead"
            )


def _check_parts(neurons: NeuronSet) -> None:
    """Raise if a neuron is to be forced as `act` and as what that is the product of."""
    act = {*map(tuple, neurons.pairs("act").tolist())}
    for site in ("up", "gate"):
        if both := act & {*map(tuple, neurons.pairs(site).tolist())}:
            raise DataError(
                f"neuron {min(both)} is to be forced at 'act' and at {site!r}, which 'act' is made "
                "of: give it in one site"
            )


def _set_column(
    params: Params, site: str, constants: Array, chosen: Array, config: ModelConfig
) -> Params:
    """Neurons' columns become zeros, their entries of the bias the constants."""
    for parameter, _ in neuron_arrays(site, config):
        x = leaf_of(params, parameter, "parameters")
        if parameter.path[-1] == "bias":
            new = jnp.where(chosen, constants.astype(x.dtype), x)
        else:
            new = jnp.where(chosen[:, None, :], jnp.zeros((), x.dtype), x)
        params = replace(params, parameter.path, new)
    return params
