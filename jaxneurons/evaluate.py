"""What changing neurons does to the answer, beside a control that should do nothing."""

from collections.abc import Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from jaxneurons import layers
from jaxneurons.config import EVERYTHING, ModelConfig
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


class Answers(NamedTuple):
    """What the model says with neurons scaled.

    Attributes:
      probability: of the answer's first token.
      first: whether it is the most probable token.
      options: log-probability of each option's first token.
    """

    probability: Float[Array, "trial batch"]
    first: Bool[Array, "trial batch"]
    options: Float[Array, "trial batch option"]


TRIALS = 16
"""Trials that are run together: more keep the platform busy and need more memory."""


def scaled_answers(
    params: Any,
    pre: Prefill,
    scales: Float[Array, "trial batch layer width"],
    *,
    config: ModelConfig,
    site: str = "up",
    options: Int[Array, "batch option"] | None = None,
) -> Answers:
    """The answer's (first token's) probability with neurons scaled at the last prompt position.

    One token per trial on the cached prompt, `TRIALS` of them together.

    Args:
      params: the model's parameters.
      pre: the prompts, run once.
      scales: multipliers of every neuron of the site, for each trial and prompt.
      config: the model's shape.
      site: which activation is scaled.
      options: first tokens of each prompt's options; default: none.
    """
    target = pre.targets[:, 0]
    position = pre.positions[:, :1]
    cos, sin = layers.rope_angles(position, config, pre.cache.length)
    keys = jnp.broadcast_to(jnp.arange(pre.cache.k.shape[2]), (len(target), pre.cache.k.shape[2]))
    none = options is None or not options.shape[1]
    # lax.map cannot flatten an array of no options.
    asked = jnp.zeros((len(target), 1), jnp.int32) if none else jnp.asarray(options)
    windows = config.layer_windows
    if windows is None:
        windows = (config.sliding_window or EVERYTHING,) * config.num_layers

    def trial(scales: Array) -> Answers:
        def step(x: Array, per_layer: Any) -> tuple[Array, None]:
            layer, k, v, scale, window = per_layer
            # The last position is in the cache as it was: it sees earlier keys, and itself anew.
            mask = layers.visible(position, keys, window) & (keys < position)[:, None]
            y, _ = layers.block(
                layer,
                x,
                config=config,
                rotate=lambda heads: layers.rotate(heads, cos, sin),
                attend=lambda q, own_k, own_v: layers.row_attention(q, own_k, own_v, k, v, mask),
                scales={site: scale[:, None]},
            )
            return y, None

        x, _ = jax.lax.scan(
            step,
            pre.residual[0][:, :1],
            (
                params["layers"],
                pre.cache.k,
                pre.cache.v,
                scales.swapaxes(0, 1),
                jnp.asarray(windows, jnp.int32),
            ),
        )
        logits = layers.unembed(params, x[:, 0], config)
        chance = jax.nn.log_softmax(logits)
        return Answers(
            layers.token_probability(params, x[:, 0], target, config),
            logits.argmax(-1) == target,
            jnp.take_along_axis(chance, asked, axis=-1),
        )

    found = jax.lax.map(trial, jnp.asarray(scales), batch_size=TRIALS)
    return found._replace(options=found.options[..., :0]) if none else found
