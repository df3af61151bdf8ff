"""What changing neurons does to the answer, beside a control that should do nothing."""

from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from jaxneurons import layers, transformer
from jaxneurons.config import ModelConfig
from jaxneurons.neurons import Neuron
from jaxneurons.rows import Prefill


def scale_array(
    neurons: Iterable[Neuron], factor: float, *, num_layers: int, width: int
) -> np.ndarray:
    """Multipliers [layers, width], `factor` at `neurons` and 1 elsewhere, float32."""
    scales = np.ones((num_layers, width), np.float32)
    for layer, index in neurons:
        scales[layer, index] = factor
    return scales


def scaled_answers(
    params: Any,
    pre: Prefill,
    last: Int[Array, " batch"],
    scales: Float[Array, "trial batch layer width"],
    *,
    config: ModelConfig,
    site: str = "up",
) -> tuple[Float[Array, "trial batch"], Bool[Array, "trial batch"]]:
    """The answer's (first token's) probability with neurons scaled at the last prompt position.

    One token per trial on the cached prompt; trials one after another, prompts together.

    Args:
      params: the model's parameters.
      pre: the prompts, run once.
      last: the last token of each prompt.
      scales: multipliers of every neuron of the site, for each trial and prompt.
      config: the model's shape.
      site: which activation is scaled.

    Returns:
      Probability of the answer, and whether it is the most probable token.
    """
    target = pre.targets[:, 0]
    cache = pre.cache._replace(length=pre.positions[:, 0])

    def trial(scales: Array) -> tuple[Array, Array]:
        out = transformer.forward(
            params,
            last[:, None],
            config=config,
            scales={site: scales.swapaxes(0, 1)[:, :, None]},
            cache=cache,
        )
        p = layers.token_probability(params, out.final[:, 0], target, config)
        return p, out.logits[:, 0].argmax(-1) == target

    return jax.lax.map(trial, jnp.asarray(scales))
