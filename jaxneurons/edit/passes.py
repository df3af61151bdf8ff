"""Prompts run in two parts, before an edited place and from it on.

An edit adds to what one layer writes at the subject's last token. Before that token nothing changes
anywhere, and below that layer nothing changes at all. So prompts run once (`before_subject`,
`from_subject`), and each trial of an edit runs a few tokens, the subject's last and those after it,
through the layers above against cached keys and values (`above`).
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxneurons.model import layers, rotary
from jaxneurons.model.blockwise import causal_attention
from jaxneurons.model.config import ModelConfig
from jaxneurons.model.parameters import Params

Carry = Callable[[Params, Array, dict[str, Array], Array], Array]
"""What a layer's output becomes: of the layer's parameters, of the stream as it leaves it, its
activations and its index."""


class Split(NamedTuple):
    """Sequences cut before the subject's last token; both parts are right-padded.

    Attributes:
      before: ids of what comes before that token.
      after: ids of that token and what follows.
      last: where that token stands: so many tokens are real in `before`.
      length: tokens of the whole sequence (some rotary angles depend on it).
    """

    before: Int[Array, "row before"]
    after: Int[Array, "row after"]
    last: Int[Array, " row"]
    length: Int[Array, " row"]


class Cached(NamedTuple):
    """Rotated keys and values of every layer at the positions before the subject's last token."""

    k: Float[Array, "layer row before kv_heads dim"]
    v: Float[Array, "layer row before kv_heads dim"]


class AtSubject(NamedTuple):
    """Every layer up to an edited one at the subject's last token, float32.

    Attributes:
      act: what enters the down projection, the keys.
      down: what it puts out in the unedited model, its bias included, before a norm of it.
      stream: as it leaves the layer.
    """

    act: Float[Array, "layer row width"]
    down: Float[Array, "layer row hidden"]
    stream: Float[Array, "layer row hidden"]


def before_subject(params: Params, split: Split, *, config: ModelConfig) -> Cached:
    """Keys and values before the subject's last token, at every layer."""
    seq = split.before.shape[1]
    positions = jnp.broadcast_to(jnp.arange(seq), split.before.shape)

    def attend(window: Any, index: Array, q: Array, k: Array, v: Array) -> Array:
        return causal_attention(q, k, v, positions, positions, window, config)

    _, kv = _run(
        params,
        layers.embed(params, split.before, config),
        positions,
        split.length,
        attend,
        span=range(config.num_layers),
        config=config,
        emit=lambda y, activations, k, v: (k, v),
    )
    return Cached(*kv)


def from_subject(
    params: Params, split: Split, cached: Cached, *, layer: int, config: ModelConfig
) -> tuple[Float[Array, "row after hidden"], AtSubject]:
    """The stream as it leaves a layer from the subject's last token on, and that token itself."""
    x, seen = _run(
        params,
        layers.embed(params, split.after, config),
        *_following(split, cached, config),
        span=range(layer + 1),
        config=config,
        emit=lambda y, activations, *_: _at(y, activations, jnp.zeros_like(split.last)),
    )
    return x, seen


def above(
    params: Params,
    x: Float[Array, "row after hidden"],
    split: Split,
    cached: Cached,
    *,
    layer: int,
    config: ModelConfig,
) -> Float[Array, "row after hidden"]:
    """The stream as it leaves the last layer, from how it leaves `layer`; differentiable in `x`."""
    x, _ = _run(
        params,
        x,
        *_following(split, cached, config),
        span=range(layer + 1, config.num_layers),
        config=config,
        differentiable=True,
    )
    return x


def at_subject(
    params: Params,
    split: Split,
    left: Float[Array, "layer group width rank"],
    right: Float[Array, "layer group rank hidden"],
    *,
    config: ModelConfig,
) -> AtSubject:
    """The subject's last token in the first layers of a model whose down kernels are edited.

    Args:
      params: the parameters, which are not edited.
      split: the sequences; each group of edits has the same number of consecutive rows.
      left: with `right` what is added to the down kernels, for each layer that is run.
      right: see `left`.
      config: the model's shape.
    """
    rows = jnp.arange(len(split.last))[:, None]
    tokens = jnp.pad(split.before, ((0, 0), (0, 1)))
    tokens = tokens.at[rows, split.last[:, None]].set(split.after[:, :1])
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)

    def attend(window: Any, index: Array, q: Array, k: Array, v: Array) -> Array:
        return causal_attention(q, k, v, positions, positions, window, config)

    def carry(of_layer: Params, y: Array, activations: dict[str, Array], index: Array) -> Array:
        act = activations["act"]
        grouped = act.reshape(left.shape[1], -1, act.shape[-1]).astype(jnp.float32)
        change = ((grouped @ _pick(left, index)) @ _pick(right, index)).reshape(y.shape)
        wide, down = y.astype(jnp.float32), activations["down"]
        return layers.change_down(of_layer, wide, down, change, config).astype(y.dtype)

    _, seen = _run(
        params,
        layers.embed(params, tokens, config),
        positions,
        split.length,
        attend,
        span=range(len(left)),
        config=config,
        emit=lambda y, activations, *_: _at(y, activations, split.last),
        carry=carry,
    )
    return seen


def _at(y: Array, activations: dict[str, Array], at: Array) -> AtSubject:
    def take(x: Array) -> Array:
        return jnp.take_along_axis(x, at[:, None, None], axis=1)[:, 0].astype(jnp.float32)

    return AtSubject(take(activations["act"]), take(activations["down"]), take(y))


def _pick(stack: Array, index: Array) -> Array:
    return jax.lax.dynamic_index_in_dim(stack, index, 0, keepdims=False)


def _following(
    split: Split, cached: Cached, config: ModelConfig
) -> tuple[Array, Array, Callable[..., Array]]:
    """Positions from the subject's last token on, whole lengths, and attention to the cache."""
    positions = split.last[:, None] + jnp.arange(split.after.shape[1])
    held = cached.k.shape[2]
    keys = jnp.broadcast_to(jnp.arange(held), (len(split.last), held))
    real = (keys < split.last[:, None])[:, None]

    def attend(window: Any, index: Array, q: Array, k: Array, v: Array) -> Array:
        return layers.continued_attention(
            q,
            k,
            v,
            layers.visible(positions, positions, window),
            _pick(cached.k, index),
            _pick(cached.v, index),
            layers.visible(positions, keys, window) & real,
            config,
        )

    return positions, split.length, attend


def _run(
    params: Params,
    x: Array,
    positions: Array,
    lengths: Array,
    attend: Callable[..., Array],
    *,
    span: range,
    config: ModelConfig,
    emit: Callable[..., Any] = lambda *_: None,
    carry: Carry = lambda of_layer, y, activations, index: y,
    differentiable: bool = False,
) -> tuple[Array, Any]:
    """Tokens through some consecutive layers.

    Returns:
      The stream after the last of them; by layer what `emit` takes of the stream as it leaves it,
      its activations, rotated keys and values.
    """
    angles = rotary.rope_angles(positions, config, lengths)

    def step(x: Array, index: Array) -> tuple[Array, Any]:
        new: list[Array] = []
        kind = layers.layer_kind(config, index)

        def attend_here(q: Array, k: Array, v: Array) -> Array:
            new.extend((k, v))
            return attend(kind.window, index, q, k, v)

        of_layer = layers.layer_params(params, index, config)
        y, activations = layers.block(
            of_layer,
            x,
            config=config,
            rotate=lambda heads: rotary.rotate(heads, angles, kind.rope),
            attend=attend_here,
        )
        y = carry(of_layer, y, activations, index)
        return y, emit(y, activations, *new)

    if differentiable:  # as in `engine.rows`: or every layer's weights would be kept
        keep = jax.checkpoint_policies.dots_saveable
        step = jax.checkpoint(step, policy=keep, prevent_cse=False)
    return jax.lax.scan(step, x, jnp.arange(span.start, span.stop))
