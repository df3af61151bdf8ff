"""What changing neurons does to the answer, the whole of it, by teacher forcing."""

import functools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from jaxneurons.engine.logits import logits_at_once
from jaxneurons.engine.rows import Prefill
from jaxneurons.errors import DataError
from jaxneurons.model import layers, rotary
from jaxneurons.model.axis_types import any_axes
from jaxneurons.model.config import ModelConfig
from jaxneurons.model.transformer import Params
from jaxneurons.neurons.sets import NeuronSet, Site, site_width


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


def last_rows(last: LastPosition, first: int, end: int) -> LastPosition:
    """Some of the prompts, from the first to the one before `end`."""
    if (first, end) == (0, len(last.targets)):
        return last
    k, v, *of_prompts = last
    return LastPosition(k[:, first:end], v[:, first:end], *(a[first:end] for a in of_prompts))


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


Change = tuple[NeuronSet, float | int] | Mapping[str, np.ndarray]
"""Neurons with the factor of all of them, or multipliers [layer, width] by site."""


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


def changes(trials: Sequence[Sequence[Change]], *, site: Site) -> Changes:
    """`Changes` of a site for each trial and prompt; room for a power of two of neurons.

    Hundreds of trials that each change a few neurons are cheap because only these cross to the
    device: here multipliers become the neurons whose multiplier is not 1.

    Args:
      trials: for each trial and prompt, neurons and the factor of all of them; or multipliers
        [layer, width] by site, as `NeuronSet.scales` gives them.
      site: the only one that is changed.

    Raises:
      DataError: neurons or multipliers of another site.
    """
    sparse = [[_sparse(change, site) for change in trial] for trial in trials]
    most = max((len(pairs) for trial in sparse for pairs, _ in trial), default=0)
    shape = (len(trials), len(trials[0]) if trials else 0, 1 << max(0, most - 1).bit_length())
    layer = np.full(shape, NO_LAYER, np.int32)
    index, factor = np.zeros(shape, np.int32), np.ones(shape, np.float32)
    for t, trial in enumerate(sparse):
        for b, (pairs, factors) in enumerate(trial):
            layer[t, b, : len(pairs)], index[t, b, : len(pairs)] = pairs.T
            factor[t, b, : len(pairs)] = factors
    return Changes(jnp.asarray(layer), jnp.asarray(index), jnp.asarray(factor))


def unchanged(prompts: int) -> Changes:
    """`Changes` of one trial that leaves the model as it is."""
    shape = (1, prompts, 1)
    layer, index = np.full(shape, NO_LAYER, np.int32), np.zeros(shape, np.int32)
    return Changes(jnp.asarray(layer), jnp.asarray(index), jnp.ones(shape, jnp.float32))


def _sparse(change: Change, site: Site) -> tuple[np.ndarray, np.ndarray | float]:
    """[n, 2] neurons of a site and what they are multiplied by."""
    if isinstance(change, Mapping):
        sites = [name for name, values in change.items() if name != site and np.any(values != 1)]
        scales = np.asarray(change.get(site, np.ones((0, 0))))
        pairs = np.argwhere(scales != 1)
        factors = scales[tuple(pairs.T)]
    else:
        neurons, factors = change
        sites = [name for name in neurons.codes if name != site]
        pairs = neurons.pairs(site)
    if sites:
        raise DataError(f"neurons of site {site!r} can be changed here, not of {', '.join(sites)}")
    return pairs, factors


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


def trials_at_once(config: ModelConfig, prompts: int) -> int:
    """Trials of a batch that are run together: `TRIALS`, or fewer of a large vocabulary."""
    return logits_at_once(config, TRIALS, each=prompts)


@any_axes
@functools.partial(jax.jit, static_argnames=("config", "site"))
def scaled_answers(
    params: Params,
    last: LastPosition,
    change: Changes,
    *,
    config: ModelConfig,
    site: Site = "up",
    options: Int[Array, "batch option token"] | None = None,
) -> Answers:
    """The answer's probability with neurons scaled from the last prompt position on.

    The whole answer is read by teacher forcing, at the positions that attribution attributes it
    at: the last of the prompt, and those of the answer's own tokens but the last. The neurons are
    scaled at each of them. An answer's tokens pass the cached prompt together, `TRIALS` trials at
    once, fewer of a large vocabulary.

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
    count = len(change.layer)
    if not count:
        raise DataError("no trials: give a set of neurons, or none of them, for each prompt")
    without = options is None or not options.shape[1]
    # lax.map cannot flatten an array of no options.
    some = jnp.zeros((len(last.targets), 1, 1), jnp.int32) if without else jnp.asarray(options)
    # In parts of equal size: another size would be another program.
    parts = -(-count // trials_at_once(config, len(last.targets)))
    size = -(-count // parts)
    missing = ((0, parts * size - count), (0, 0), (0, 0))
    filled = Changes(*(jnp.pad(array, missing, mode="edge") for array in change))
    trial = functools.partial(_trial, params, last, some, config=config, site=site)
    answers = Answers(*(a[:count] for a in jax.lax.map(trial, filled, batch_size=size)))
    return answers._replace(options=answers.options[..., :0]) if without else answers


def _trial(
    params: Params,
    last: LastPosition,
    options: Int[Array, "batch option token"],
    change: Changes,
    *,
    config: ModelConfig,
    site: Site,
) -> Answers:
    """The answers of one trial, [batch, ...]; the arrays of its changes are [batch, neuron]."""
    batch, length = last.targets.shape
    scales = jnp.ones((config.num_layers, batch, site_width(config, site)), jnp.float32)
    rows = jnp.arange(batch)[:, None]
    scales = scales.at[change.layer, rows, change.neuron].set(change.factor, mode="drop")
    scales = {site: scales[:, :, None]}
    x = _teacher_forced(params, last, last.targets, scales, config)
    first_target = last.targets[:, 0]
    if options.shape[2] == 1:  # options of one token are read where the answer's first one is
        odds, first, chance = _token(params, x[:, 0], first_target, options[..., 0], config)
    else:
        odds, first, _ = _token(params, x[:, 0], first_target, options[:, :0, 0], config)

        def whole(tokens: Array) -> Array:
            y = _teacher_forced(params, last, tokens, scales, config)
            return _steps(params, y, tokens, config)[0]

        chance = jax.lax.map(whole, options.swapaxes(0, 1)).T
    if length == 1:  # as in `layers.token_probability`: exact where it is nearly certain
        return Answers(jax.nn.sigmoid(odds), first, chance)
    logp, rest = _steps(params, x[:, 1:], last.targets[:, 1:], config)
    return Answers(jnp.exp(jax.nn.log_sigmoid(odds) + logp), first & rest, chance)


def _teacher_forced(
    params: Params,
    last: LastPosition,
    tokens: Int[Array, "batch token"],
    scales: dict[str, Float[Array, "layer batch 1 width"]],
    config: ModelConfig,
) -> Float[Array, "batch token hidden"]:
    """The stream as it leaves the last layer before each of the tokens, a site scaled there."""
    steps = tokens.shape[1]
    positions = last.position[:, None] + jnp.arange(steps)
    angles = rotary.rope_angles(positions, config, last.length)
    keys = jnp.broadcast_to(jnp.arange(last.k.shape[2]), (len(tokens), last.k.shape[2]))

    def step(x: Array, per_layer: Any) -> tuple[Array, None]:
        k, v, scales, index = per_layer
        window, rope = layers.layer_kind(config, index)
        # The last position is in the cache as it was: it sees earlier keys, and itself anew.
        mask = layers.visible(positions, keys, window) & (keys < last.position[:, None])[:, None]

        def attend(q: Array, new_k: Array, new_v: Array) -> Array:
            if steps == 1:
                return layers.row_attention(q, new_k, new_v, k, v, mask, config)
            new_mask = layers.visible(positions, positions, window)
            return layers.continued_attention(q, new_k, new_v, new_mask, k, v, mask, config)

        y, _ = layers.block(
            layers.layer_params(params, index, config),
            x,
            config=config,
            rotate=lambda heads: rotary.rotate(heads, angles, rope),
            attend=attend,
            scales=scales,
        )
        return y, None

    x = jnp.asarray(last.residual)[:, None]
    if steps > 1:
        after = layers.embed(params, jnp.maximum(tokens[:, :-1], 0), config)
        x = jnp.concatenate([x, after.astype(x.dtype)], axis=1)
    stack = (last.k, last.v, scales, jnp.arange(config.num_layers))
    return jax.lax.scan(step, x, stack)[0]


def _token(
    params: Params, x: Array, token: Array, others: Array, config: ModelConfig
) -> tuple[Array, Array, Array]:
    """Log odds of a token [batch], whether it comes first, log-probabilities of others."""
    logits = layers.unembed(params, x, config)
    logit = jnp.take_along_axis(logits, token[:, None], axis=-1)[:, 0]
    rest = jnp.where(jnp.arange(config.vocab_size) == token[:, None], -jnp.inf, logits)
    highest, rest = rest.max(-1), jax.nn.logsumexp(rest, axis=-1)
    chance = jnp.take_along_axis(logits, others, axis=-1) - jnp.logaddexp(rest, logit)[:, None]
    return logit - rest, logit >= highest, chance


def _steps(params: Params, x: Array, tokens: Array, config: ModelConfig) -> tuple[Array, Array]:
    """Log-probability of all tokens together [batch], and whether each comes first; -1 is none.

    One position after the other: the logits of all of them would be large.
    """

    def step(at: tuple[Array, Array]) -> tuple[Array, Array]:
        x, token = at
        real = token >= 0
        odds, first, _ = _token(params, x, jnp.maximum(token, 0), token[:, None][:, :0], config)
        return jnp.where(real, jax.nn.log_sigmoid(odds), 0.0), first | ~real

    logp, first = jax.lax.map(step, (x.swapaxes(0, 1), tokens.T))
    return logp.sum(0), first.all(0)
