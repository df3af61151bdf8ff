"""What an edit changes in a model's parameters, as small values, and how they are applied.

An edit never is a second tree of parameters: it is a sequence of changes, each a few arrays that
say which module of which layer (or which neurons) they are about. `apply` makes the edited
parameters of them, purely; a `Patch` writes them down.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxneurons.model.config import ModelConfig
from jaxneurons.model.parameters import Params, get


@dataclasses.dataclass(frozen=True, eq=False)
class LowRank:
    """`left @ right` is added to the kernel of one layer.

    Attributes:
      module: below `layers`, joined by dots: "ffn.down".
      layer: from 0.
      left: float32, inputs of the kernel x rank.
      right: float32, rank x outputs of the kernel.
    """

    module: str
    layer: int
    left: Float[Array, "input rank"]
    right: Float[Array, "rank output"]


@dataclasses.dataclass(frozen=True, eq=False)
class Rows:
    """Rows of the kernel of one layer, what neurons of its input write, are set to values.

    Attributes:
      module: below `layers`, joined by dots: "ffn.down".
      layer: from 0.
      index: which rows.
      values: float32, what they become.
    """

    module: str
    layer: int
    index: Int[Array, " row"]
    values: Float[Array, "row output"]


@dataclasses.dataclass(frozen=True, eq=False)
class Multipliers:
    """Neurons of a site are multiplied by factors.

    Attributes:
      site: of all of them.
      layer: of each neuron.
      index: of each neuron.
      factor: float32, of each neuron.
    """

    site: str
    layer: Int[Array, " neuron"]
    index: Int[Array, " neuron"]
    factor: Float[Array, " neuron"]


Change = LowRank | Rows | Multipliers

# Pytrees, so that `apply` composes with `jit` and `vmap` over the arrays of changes.
jax.tree_util.register_dataclass(LowRank, ["left", "right"], ["module", "layer"])
jax.tree_util.register_dataclass(Rows, ["index", "values"], ["module", "layer"])
jax.tree_util.register_dataclass(Multipliers, ["layer", "index", "factor"], ["site"])


def apply(params: Params, changes: Sequence[Change], *, config: ModelConfig) -> Params:
    """The parameters with changes applied in their order. Pure; `params` are not touched.

    Composes with `jit` and `vmap` (over the arrays of changes), and keeps shardings. Sums are made
    in float32 and rounded once to the parameters' dtype.

    Args:
      params: the parameters.
      changes: what to change.
      config: the model's shape.

    Raises:
      DataError: a module, layer or neuron that this model does not have, or arrays of another
        shape.
    """
    for change in changes:
        params = _apply(params, change, config)
    return params


def _apply(params: Params, change: Change, config: ModelConfig) -> Params:
    if isinstance(change, Multipliers):
        raise NotImplementedError("multipliers")
    path = ("layers", *change.module.split("."), "kernel")
    kernel = get(params, path)
    if isinstance(change, LowRank):
        base = kernel[change.layer].astype(jnp.float32)
        new = (base + change.left @ change.right).astype(kernel.dtype)
        return replace(params, path, kernel.at[change.layer].set(new))
    values = change.values.astype(kernel.dtype)
    return replace(params, path, kernel.at[change.layer, change.index].set(values))


def replace(params: Params, path: tuple[str, ...], leaf: Any) -> Params:
    """Nested parameters with one leaf replaced; all others are the same objects."""
    key, *rest = path
    inner = replace(params[key], tuple(rest), leaf) if rest else leaf
    return {**params, key: inner}
