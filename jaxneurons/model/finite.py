"""Numbers that are not finite: in which layer of a prompt they first appear.

float16 holds nothing above 65,504, and some models' activations are larger. What follows is NaN,
which compares with nothing: no neuron would be found, and nothing said. Stages that hold concrete
results check them and raise an error that this file words; nothing here runs inside a caller's jit.
"""

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int

from jaxneurons.errors import DataError
from jaxneurons.model.config import ModelConfig
from jaxneurons.model.parameters import Params
from jaxneurons.model.transformer import forward

ORDER = ("residual", "q", "k", "v", "o", "up", "gate", "act", "down")
"""What a layer computes, in order; `residual` is what enters it."""


class NotFiniteError(DataError):
    """Results of a prompt that are not finite.

    Attributes:
      index: which prompt.
      where: what `explain` says of it.
    """

    def __init__(self, index: int, where: str):
        super().__init__(f"prompt {index + 1}: {where}")
        self.index, self.where = index, where


@functools.partial(jax.jit, static_argnames=("config",))
def finite_sites(
    params: Params,
    tokens: Int[Array, "batch seq"],
    *,
    config: ModelConfig,
    scales: Mapping[str, Any] | None = None,
) -> Bool[Array, "layer site"]:
    """Whether each layer's activations are finite, at all positions, by site in `ORDER`."""
    out = forward(
        params, tokens, config=config, scales=scales, capture=ORDER, reduce="mean", at="last"
    )
    return jnp.stack([jnp.isfinite(out.activations[name]).all((1, 2)) for name in ORDER], axis=-1)


def explain(
    params: Params,
    tokens: Sequence[int] | np.ndarray,
    *,
    config: ModelConfig,
    scales: Mapping[str, Any] | None = None,
) -> str:
    """In which layer the activations of a prompt are no longer finite, and the way out.

    Runs the prompt once more. Part of an error message, in lower case.

    Args:
      params: the model's parameters.
      tokens: the prompt's ids, without padding.
      config: the model's shape.
      scales: as the prompt was run with; see `transformer.forward`.
    """
    ids = jnp.asarray(np.asarray(tokens, np.int32))[None]
    finite = np.asarray(finite_sites(params, ids, config=config, scales=scales))
    dtype = str(params["embed"]["embedding"].dtype)
    if finite.all():
        what = f"its activations are finite in {dtype}, what is computed from them is not"
    else:
        layer, site = divmod(int(np.argmin(finite.reshape(-1))), len(ORDER))
        what = f"activations are not finite from layer {layer} on (first: {ORDER[site]!r}, {dtype})"
    if dtype == "float16":
        return f"{what}; load the model in bfloat16 or float32"
    return f"{what}; its weights may be damaged, or scaled too far"
