"""Runs in which activations are replaced by those of another run: clean, noised, restored.

Section 2.1 of Meng et al. 2022 (arXiv 2202.05262): the embeddings of a subject are noised, and one
state of the noised run is set to what it was without noise. Three kinds of states are restored at
one token:

- `residual`: the stream as it leaves a layer;
- `down`: what the feed-forward parts of a window of layers add to the stream (where it is normed
  before: what is normed);
- `o`: what the attention parts of a window of layers add to it.

A restored run is the noised one up to the layer where it is first restored, so it enters there.
What attention adds is replaced before its output projection, where `layers.block` lets it be; what
the feed-forward part adds, and the stream, behind the block. Everything is pure: parameters come
first and are not touched.
"""

import math
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxneurons.model import layers, rotary
from jaxneurons.model.axis_types import any_axes
from jaxneurons.model.blockwise import causal_attention
from jaxneurons.model.config import ModelConfig
from jaxneurons.model.parameters import Params

Kind = Literal["residual", "down", "o"]
KINDS: tuple[Kind, ...] = ("residual", "down", "o")
"""Kinds of states; a run's kind is its place here."""

TOGETHER = 5
"""Layers whose restored runs start together, at the lowest of them."""


class NoisedPrompts(NamedTuple):
    """Prompts with their answers, and noise for the embeddings of their subjects.

    Attributes:
      tokens: prompt and all but the last token of the answer, right-padded.
      lengths: real tokens.
      targets: the answer, of equal length for all.
      noise: added to the embeddings; zero but at the tokens of the subject.
      positions: where states are restored; -1 for none.
    """

    tokens: Int[Array | np.ndarray, "batch seq"]
    lengths: Int[Array | np.ndarray, " batch"]
    targets: Int[Array | np.ndarray, "batch answer"]
    noise: Float[Array | np.ndarray, "sample batch seq hidden"]
    positions: Int[Array | np.ndarray, "batch position"]


class States(NamedTuple):
    """What a run can be restored to.

    Attributes:
      residual: the stream as it enters each layer, and as it leaves the last.
      mixed: values that attention has mixed, as they enter its output projection.
      down: what the feed-forward part adds, before its norm, where there is one.
    """

    residual: Float[Array, "layer_or_end batch seq hidden"]
    mixed: Float[Array, "layer batch seq heads dim"]
    down: Float[Array, "layer batch seq hidden"]


class Restored(NamedTuple):
    """Probability of the answer, whole, by teacher forcing.

    Attributes:
      clean: of the untouched model.
      noised: with the subject noised.
      restored: with the subject noised and states of a kind restored, around a layer at a position.
    """

    clean: Float[Array, " batch"]
    noised: Float[Array, "sample batch"]
    restored: Float[Array, "sample kind layer position batch"]


class _Setting(NamedTuple):
    """What all layers of a run share."""

    angles: rotary.Angles
    positions: Array


def window_of(config: ModelConfig) -> int:
    """Layers of the windows of `down` and `o`: 10 of 48 in the paper, as many for each layer."""
    return max(1, round(config.num_layers * 10 / 48))


@any_axes
def restored_probabilities(
    params: Params,
    prompts: NoisedPrompts,
    *,
    config: ModelConfig,
    kinds: tuple[Kind, ...] = KINDS,
    window: int | None = None,
) -> Restored:
    """The answer's probability in the clean, the noised and every restored run.

    Composes with `jit` (`config`, `kinds` and `window` static), `vmap` and sharded parameters.
    Runs of a few layers and all positions are batched; samples follow each other.

    Args:
      params: the model's parameters.
      prompts: with the noise of every sample.
      config: the model's shape.
      kinds: of states.
      window: layers that are restored together in `down` and `o`, around each layer, as many of
        them as there are; default: `window_of(config)`.
    """
    window = window_of(config) if window is None else window
    tokens, lengths = jnp.asarray(prompts.tokens), jnp.asarray(prompts.lengths)
    setting = _setting(tokens, lengths, config)
    embedded = layers.embed(params, tokens, config)
    answer = prompts.targets.shape[1]
    at = (lengths - answer)[:, None] + jnp.arange(answer)
    targets = jnp.asarray(prompts.targets)

    def probability(x: Array) -> Array:
        final = jnp.take_along_axis(x, at[..., None], axis=1)
        return layers.token_probability(params, final, targets, config).prod(-1)

    clean = run(params, embedded, setting, config=config)
    places = jnp.asarray(prompts.positions).T

    def sample(noise: Array) -> tuple[Array, Array]:
        noised = run(params, embedded + noise.astype(embedded.dtype), setting, config=config)

        def chunk(part: tuple[Array, Array, Array, Array]) -> Array:
            kind, first, low, high = part

            def restored(low: Array, high: Array, place: Array) -> Array:
                what = (kind, low, high, place)
                x = _restored(params, clean, noised, setting, first, what, config=config)
                return probability(x)

            by_place = jax.vmap(restored, in_axes=(None, None, 0))
            return jax.vmap(by_place, in_axes=(0, 0, None))(low, high, places)

        p = jax.lax.map(chunk, _chunks(config.num_layers, kinds, window))
        p = p.reshape(len(kinds), -1, *p.shape[2:])[:, : config.num_layers]
        return probability(noised.residual[-1]), p

    noised, restored = jax.lax.map(sample, jnp.asarray(prompts.noise))
    return Restored(probability(clean.residual[-1]), noised, restored)


def _chunks(count: int, kinds: tuple[Kind, ...], window: int) -> tuple[Array, Array, Array, Array]:
    """Kind, first layer, and where windows begin and end, of runs that start together."""
    size = -(-count // math.ceil(count / TOGETHER))
    parts = -(-count // size)
    middle = np.minimum(np.arange(parts * size), count - 1)
    low, high, number = [], [], []
    for kind in kinds:
        around = 1 if kind == "residual" else window
        low.append(np.maximum(middle - around // 2, 0))
        high.append(np.minimum(middle - around // 2 + around, count))
        number.append(np.full(parts, KINDS.index(kind)))
    shape = (len(kinds) * parts, size)
    low, high = (np.concatenate(ends).reshape(shape).astype(np.int32) for ends in (low, high))
    number = np.concatenate(number).astype(np.int32)
    first = low.min(axis=1)
    return jnp.asarray(number), jnp.asarray(first), jnp.asarray(low), jnp.asarray(high)


def _setting(tokens: Array, lengths: Array, config: ModelConfig) -> _Setting:
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    return _Setting(rotary.rope_angles(positions, config, lengths), positions)


def run(
    params: Params, x: Float[Array, "batch seq hidden"], setting: _Setting, *, config: ModelConfig
) -> States:
    """The states of a run that begins with these embeddings."""

    def step(x: Array, index: Array) -> tuple[Array, tuple[Array, ...]]:
        kind = layers.layer_kind(config, index)
        kept: list[Array] = []

        def attend(q: Array, k: Array, v: Array) -> Array:
            positions = setting.positions
            mixed = causal_attention(q, k, v, positions, positions, kind.window, config)
            kept.append(mixed)
            return kept[0]

        y, activations = layers.block(
            layers.layer_params(params, index, config),
            x,
            config=config,
            rotate=lambda heads: rotary.rotate(heads, setting.angles, kind.rope),
            attend=attend,
        )
        return y, (x, kept[0], activations["down"])

    end, (residual, mixed, down) = jax.lax.scan(step, x, jnp.arange(config.num_layers))
    return States(jnp.concatenate([residual, end[None]]), mixed, down)


def _restored(
    params: Params,
    clean: States,
    noised: States,
    setting: _Setting,
    first: Array,
    what: tuple[Array, Array, Array, Array],
    *,
    config: ModelConfig,
) -> Float[Array, "batch seq hidden"]:
    """The stream as it leaves the last layer of a noised run that is restored from `first` on.

    Args:
      params: the model's parameters.
      clean: the states to restore to.
      noised: the states of the run that is restored.
      setting: of both runs.
      first: the layer that this run enters at; below it nothing is restored.
      what: the kind's number, the first layer and the one behind the last, and the position of
        each prompt.
      config: the model's shape.
    """
    state, low, high, place = what
    at_place = setting.positions == place[:, None]

    def step(number: Array, x: Array) -> Array:
        here = at_place & (low <= number) & (number < high)
        kind = layers.layer_kind(config, number)

        def restore(name: Kind, new: Array, old: Array) -> Array:
            chosen = here & (state == KINDS.index(name))
            return jnp.where(chosen.reshape(*chosen.shape, *(1,) * (old.ndim - 2)), new, old)

        def attend(q: Array, k: Array, v: Array) -> Array:
            positions = setting.positions
            mixed = causal_attention(q, k, v, positions, positions, kind.window, config)
            return restore("o", clean.mixed[number], mixed)

        of_layer = layers.layer_params(params, number, config)
        y, activations = layers.block(
            of_layer,
            x,
            config=config,
            rotate=lambda heads: rotary.rotate(heads, setting.angles, kind.rope),
            attend=attend,
        )
        down = activations["down"]
        change = restore("down", clean.down[number], down) - down
        y = layers.change_down(of_layer, y, down, change, config)
        return restore("residual", clean.residual[number + 1], y)

    return jax.lax.fori_loop(first, config.num_layers, step, noised.residual[first])
