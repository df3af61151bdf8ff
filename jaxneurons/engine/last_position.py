"""What changing neurons does to the answer, the whole of it, by teacher forcing."""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from jaxneurons.engine.rows import Prefill
from jaxneurons.errors import DataError
from jaxneurons.model import layers
from jaxneurons.model.config import EVERYTHING, ModelConfig
from jaxneurons.neurons.sets import Neuron, site_width


class LastPosition(NamedTuple):
    """The last position of prompts that have been run: all that scaling its neurons needs.

    Attributes:
      k: keys of every position.
      v: values of every position.
      residual: the stream as it enters the first layer there.
      position: where the prompt ends, counted from 0.
      length: tokens of the whole sequence (some rotary angles depend on it).
      targets: the answer's tokens.
    """

    k: Float[Array, "layer batch key kv_heads dim"]
    v: Float[Array, "layer batch key kv_heads dim"]
    residual: Float[Array, "batch hidden"]
    position: Int[Array, " batch"]
    length: Int[Array, " batch"]
    targets: Int[Array, "batch answer"]


def last_position(pre: Prefill) -> LastPosition:
    """The last prompt position of a prefill."""
    return LastPosition(
        pre.cache.k,
        pre.cache.v,
        pre.residual[0][:, 0],
        pre.positions[:, 0],
        pre.cache.length,
        pre.targets,
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
    """What the model says with neurons scaled, by teacher forcing.

    Attributes:
      probability: of the answer: the product over its tokens, each after those before it.
      first: whether every one of them is the most probable token there.
      options: log-probability of each option, whole.
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
    options: Int[Array, "batch option token"] | None = None,
) -> Answers:
    """The answer's probability with neurons scaled from the last prompt position on.

    The whole answer is read by teacher forcing, at the positions that attribution attributes it
    at: the last of the prompt, and those of the answer's own tokens but the last. The neurons are
    scaled at each of them. An answer's tokens pass the cached prompt together, `TRIALS` trials at
    once.

    Args:
      params: the model's parameters.
      last: the prompts, run once.
      change: which neurons of the site are scaled, for each trial and prompt.
      config: the model's shape.
      site: which activation is scaled.
      options: tokens of each prompt's options, right-padded with -1; default: none.

    Raises:
      DataError: no trials.
    """
    batch, answers = last.targets.shape
    rows = jnp.arange(batch)[:, None]
    width = site_width(config, site)
    none = options is None or not options.shape[1]
    # lax.map cannot flatten an array of no options.
    asked = jnp.zeros((batch, 1, 1), jnp.int32) if none else jnp.asarray(options)

    def trial(change: Changes) -> Answers:
        scales = jnp.ones((config.num_layers, batch, width), jnp.float32)
        scales = scales.at[change.layer, rows, change.neuron].set(change.factor, mode="drop")
        scales = {site: scales[:, :, None]}
        x = _teacher_forced(params, last, last.targets, scales, config)
        if asked.shape[2] == 1:  # options of one token are read where the answer's first one is
            odds, first, chance = _said(params, x[:, 0], last.targets[:, 0], asked[..., 0], config)
        else:
            odds, first, _ = _said(params, x[:, 0], last.targets[:, 0], asked[:, :0, 0], config)

            def whole(tokens: Array) -> Array:
                y = _teacher_forced(params, last, tokens, scales, config)
                return _steps(params, y, tokens, config)[0]

            chance = jax.lax.map(whole, asked.swapaxes(0, 1)).T
        if answers == 1:  # as in `layers.token_probability`: exact where it is nearly certain
            return Answers(jax.nn.sigmoid(odds), first, chance)
        logp, rest = _steps(params, x[:, 1:], last.targets[:, 1:], config)
        return Answers(jnp.exp(jax.nn.log_sigmoid(odds) + logp), first & rest, chance)

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


def _teacher_forced(
    params: Any,
    last: LastPosition,
    tokens: Int[Array, "batch token"],
    scales: dict[str, Float[Array, "layer batch 1 width"]],
    config: ModelConfig,
) -> Float[Array, "batch token hidden"]:
    """The stream as it leaves the last layer before each of the tokens, a site scaled there."""
    steps = tokens.shape[1]
    positions = last.position[:, None] + jnp.arange(steps)
    cos, sin = layers.rope_angles(positions, config, last.length)
    keys = jnp.broadcast_to(jnp.arange(last.k.shape[2]), (len(tokens), last.k.shape[2]))
    windows = config.layer_windows
    if windows is None:
        windows = (config.sliding_window or EVERYTHING,) * config.num_layers

    def step(x: Array, per_layer: Any) -> tuple[Array, None]:
        layer, k, v, scales, window = per_layer
        # The last position is in the cache as it was: it sees earlier keys, and itself anew.
        mask = layers.visible(positions, keys, window) & (keys < last.position[:, None])[:, None]

        def attend(q: Array, own_k: Array, own_v: Array) -> Array:
            if steps == 1:
                return layers.row_attention(q, own_k, own_v, k, v, mask)
            own = layers.visible(positions, positions, window)
            return layers.continued_attention(q, own_k, own_v, own, k, v, mask)

        y, _ = layers.block(
            layer,
            x,
            config=config,
            rotate=lambda heads: layers.rotate(heads, cos, sin),
            attend=attend,
            scales=scales,
        )
        return y, None

    x = jnp.asarray(last.residual)[:, None]
    if steps > 1:
        after = params["embed"]["embedding"][jnp.maximum(tokens[:, :-1], 0)]
        x = jnp.concatenate([x, after.astype(x.dtype)], axis=1)
    stack = (params["layers"], last.k, last.v, scales, jnp.asarray(windows, jnp.int32))
    return jax.lax.scan(step, x, stack)[0]


def _said(
    params: Any, x: Array, token: Array, others: Array, config: ModelConfig
) -> tuple[Array, Array, Array]:
    """Log odds of a token [batch], whether it comes first, log-probabilities of others."""
    logits = layers.unembed(params, x, config)
    own = jnp.take_along_axis(logits, token[:, None], axis=-1)[:, 0]
    rest = jnp.where(jnp.arange(config.vocab_size) == token[:, None], -jnp.inf, logits)
    highest, rest = rest.max(-1), jax.nn.logsumexp(rest, axis=-1)
    chance = jnp.take_along_axis(logits, others, axis=-1) - jnp.logaddexp(rest, own)[:, None]
    return own - rest, own >= highest, chance


def _steps(params: Any, x: Array, tokens: Array, config: ModelConfig) -> tuple[Array, Array]:
    """Log-probability of all tokens together [batch], and whether each comes first; -1 is none.

    One position after the other: the logits of all of them would be large.
    """

    def one(at: tuple[Array, Array]) -> tuple[Array, Array]:
        x, token = at
        real = token >= 0
        odds, first, _ = _said(params, x, jnp.maximum(token, 0), token[:, None][:, :0], config)
        return jnp.where(real, jax.nn.log_sigmoid(odds), 0.0), first | ~real

    logp, first = jax.lax.map(one, (x.swapaxes(0, 1), tokens.T))
    return logp.sum(0), first.all(0)
