"""What changing neurons does to the answer, beside a control that should do nothing."""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from jaxneurons import layers
from jaxneurons.config import EVERYTHING, ModelConfig
from jaxneurons.errors import DataError
from jaxneurons.neurons import Neuron, site_width
from jaxneurons.rows import Prefill


class LastPosition(NamedTuple):
    """The last position of prompts that have been run: all that scaling its neurons needs.

    Attributes:
      k: keys of every position.
      v: values of every position.
      residual: the stream as it enters the first layer there.
      position: where the prompt ends, counted from 0.
      length: tokens of the whole sequence (some rotary angles depend on it).
      target: the answer's first token.
    """

    k: Float[Array, "layer batch key kv_heads dim"]
    v: Float[Array, "layer batch key kv_heads dim"]
    residual: Float[Array, "batch hidden"]
    position: Int[Array, " batch"]
    length: Int[Array, " batch"]
    target: Int[Array, " batch"]


def last_position(pre: Prefill) -> LastPosition:
    """The last prompt position of a prefill."""
    return LastPosition(
        pre.cache.k,
        pre.cache.v,
        pre.residual[0][:, 0],
        pre.positions[:, 0],
        pre.cache.length,
        pre.targets[:, 0],
    )


class Changes(NamedTuple):
    """Neurons and what their activations are multiplied by, for each trial and prompt.

    Attributes:
      layer: of each neuron; one that the model does not have stands for none.
      neuron: its index in the layer.
      factor: its multiplier.
    """

    layer: Int[Array, "trial batch neuron"]
    neuron: Int[Array, "trial batch neuron"]
    factor: Float[Array, "trial batch neuron"]


def changes(trials: Sequence[Sequence[tuple[Sequence[Neuron], float]]]) -> Changes:
    """`Changes` of (neurons, factor) for each trial and prompt; room for a power of two of them."""
    most = max((len(neurons) for trial in trials for neurons, _ in trial), default=0)
    shape = (len(trials), len(trials[0]) if trials else 0, 1 << max(0, most - 1).bit_length())
    layer = np.full(shape, NO_LAYER, np.int32)
    index, factor = np.zeros(shape, np.int32), np.ones(shape, np.float32)
    for t, trial in enumerate(trials):
        for b, (neurons, by) in enumerate(trial):
            if neurons:
                layer[t, b, : len(neurons)], index[t, b, : len(neurons)] = np.array(neurons).T
                factor[t, b] = by
    return Changes(jnp.asarray(layer), jnp.asarray(index), jnp.asarray(factor))


NO_LAYER = np.iinfo(np.int32).max


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


TRIALS = 32
"""Trials that are run together: more keep the platform busy and need more memory."""


@functools.partial(jax.jit, static_argnames=("config", "site"))
def scaled_answers(
    params: Any,
    last: LastPosition,
    change: Changes,
    *,
    config: ModelConfig,
    site: str = "up",
    options: Int[Array, "batch option"] | None = None,
) -> Answers:
    """The answer's (first token's) probability with neurons scaled at the last prompt position.

    One token per trial on the cached prompt, `TRIALS` of them together.

    Args:
      params: the model's parameters.
      last: the prompts, run once.
      change: which neurons of the site are scaled, for each trial and prompt.
      config: the model's shape.
      site: which activation is scaled.
      options: first tokens of each prompt's options; default: none.
    """
    target = last.target
    position = last.position[:, None]
    cos, sin = layers.rope_angles(position, config, last.length)
    keys = jnp.broadcast_to(jnp.arange(last.k.shape[2]), (len(target), last.k.shape[2]))
    rows = jnp.arange(len(target))[:, None]
    none = options is None or not options.shape[1]
    # lax.map cannot flatten an array of no options.
    asked = jnp.zeros((len(target), 1), jnp.int32) if none else jnp.asarray(options)
    windows = config.layer_windows
    if windows is None:
        windows = (config.sliding_window or EVERYTHING,) * config.num_layers

    def trial(change: Changes) -> Answers:
        scales = jnp.ones((config.num_layers, len(target), site_width(config, site)), jnp.float32)
        scales = scales.at[change.layer, rows, change.neuron].set(change.factor, mode="drop")

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
            jnp.asarray(last.residual)[:, None],
            (params["layers"], last.k, last.v, scales, jnp.asarray(windows, jnp.int32)),
        )
        logits = layers.unembed(params, x[:, 0], config)
        own = jnp.take_along_axis(logits, target[:, None], axis=-1)[:, 0]
        others = jnp.where(jnp.arange(config.vocab_size) == target[:, None], -jnp.inf, logits)
        highest, rest = others.max(-1), jax.nn.logsumexp(others, axis=-1)
        chance = jnp.take_along_axis(logits, asked, axis=-1) - jnp.logaddexp(rest, own)[:, None]
        # As in `layers.token_probability`: exact where the answer is nearly certain.
        return Answers(jax.nn.sigmoid(own - rest), own >= highest, chance)

    # In parts of equal size: another size would be another program.
    count = len(change.layer)
    if not count:
        raise DataError("no trials: give a set of neurons, or none of them, for each prompt")
    parts = -(-count // TRIALS)
    each = -(-count // parts)
    filled = Changes(
        *(jnp.pad(a, ((0, parts * each - count), (0, 0), (0, 0)), mode="edge") for a in change)
    )
    found: Answers = jax.lax.map(trial, filled, batch_size=each)
    found = Answers(*(a[:count] for a in found))
    return found._replace(options=found.options[..., :0]) if none else found
