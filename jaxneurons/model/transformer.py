"""The decoder as a Flax Linen module with explicit activation scaling.

`Transformer(config).apply({"params": params}, tokens, scales=...)` is the whole model; `forward`
is the same call as a plain function. This is the only file that imports Flax.
"""

from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from jaxneurons.errors import ConfigError
from jaxneurons.model import experts, layers, rotary
from jaxneurons.model.axis_types import any_axes
from jaxneurons.model.blockwise import causal_attention
from jaxneurons.model.config import ModelConfig
from jaxneurons.model.parameters import (
    LAYERS,
    Parameter,
    Params,
    check_site,
    parameter_tree,
    site_widths,
)
from jaxneurons.model.token_ids import check_ids

Scales = Mapping[str, Array | np.ndarray]
"""By site, multipliers: [layer, width], as `NeuronSet.scales` gives them; [batch, layer, width],
one set for each row; or [layer, batch, seq, width], where batch and seq may be 1."""
LowRankTerms = Mapping[str, tuple[Array, Array]]
"""By module below `layers` ("ffn.down"), factors [layer, input, rank] and [layer, rank, output]."""


class Cache(NamedTuple):
    """Keys (rotated) and values of the tokens seen so far.

    Attributes:
      k: [layers, batch, capacity, kv_heads, head_dim]
      v: [layers, batch, capacity, kv_heads, head_dim]
      length: [batch] tokens held; what lies beyond is never looked at.
    """

    k: Float[Array, "layer batch capacity kv_heads dim"]
    v: Float[Array, "layer batch capacity kv_heads dim"]
    length: Int[Array, " batch"]


class Output(NamedTuple):
    """What a forward pass returns.

    Attributes:
      logits: float32 [batch, at, vocab] at the requested positions.
      cache: the cache with the new tokens in it; None if none was given.
      activations: by name, [layers, batch, at, width] (`reduce="at"`) or [layers, batch, width]
        (`reduce="mean"`).
      final: residual stream as it leaves the last layer, at the requested positions.
    """

    logits: Float[Array, "batch at vocab"]
    cache: Cache | None
    activations: dict[str, Array]
    final: Float[Array, "batch at hidden"]


def init_cache(
    config: ModelConfig, batch: int, capacity: int, dtype: DTypeLike = jnp.float32
) -> Cache:
    """An empty cache for `batch` sequences of up to `capacity` tokens."""
    shape = (config.num_layers, batch, capacity, config.num_kv_heads, config.head_dim)
    return Cache(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype), jnp.zeros(batch, jnp.int32))


class Weights(nn.Module):
    """A nested group of parameters, declared by the table and returned as a plain dict."""

    declared: Mapping[str, Any]

    @nn.compact
    def __call__(self) -> dict[str, Any]:
        """The parameters (one layer's, inside of the scan), nested as `declared` is."""
        return {
            name: self.param(name, value.initializer, value.layer_shape)
            if isinstance(value, Parameter)
            else Weights(value, name=name)()
            for name, value in self.declared.items()
        }


def _declared(config: ModelConfig) -> dict[str, Any]:
    """A `Parameter` in place of every array."""
    return parameter_tree(config, lambda parameter: parameter)


class Block(nn.Module):
    """One layer as a step of `nn.scan`; the arithmetic is `layers.block`."""

    config: ModelConfig
    capture: tuple[str, ...]
    reduce: str

    @nn.compact
    def __call__(self, x: Array, per_layer: Any, shared: Any) -> tuple[Array, Any]:
        """Carry the residual through; emit the layer's new keys, values and activations."""
        scales, low_rank, cached, index = per_layer
        angles, positions, at, real, stacks = shared
        kind = layers.layer_kind(self.config, index)
        store: tuple[Array, Array] | None = None

        def attend(q: Array, k: Array, v: Array) -> Array:
            nonlocal store
            keys = positions
            if cached is not None:
                k, v = _write(cached[0], k, positions), _write(cached[1], v, positions)
                keys = jnp.broadcast_to(jnp.arange(k.shape[1]), (k.shape[0], k.shape[1]))
                store = (k, v)
            return causal_attention(q, k, v, positions, keys, kind.window, self.config)

        declared = _declared(self.config)[LAYERS]
        params = {name: Weights(group, name=name)() for name, group in declared.items()}
        if stacks is not None:
            params["ffn"] |= {
                name: {"kernel": experts.Stacked(kernels, index)}
                for name, kernels in stacks.items()
            }
        y, activations = layers.block(
            params,
            x,
            config=self.config,
            rotate=lambda heads: rotary.rotate(heads, angles, kind.rope),
            attend=attend,
            scales=scales,
            low_rank=low_rank,
        )
        activations["residual"] = x
        captured = {
            name: _take(activations[name], at, self.config)
            if self.reduce == "at"
            else _mean(activations[name], real, self.config)
            for name in self.capture
        }
        return y, (store, captured)


def _write(cached: Array, new: Array, positions: Array) -> Array:
    """Put new keys or values [batch, seq, ...] at their positions in the cache."""
    return jax.vmap(
        lambda row, update, start: jax.lax.dynamic_update_slice_in_dim(row, update, start, 0)
    )(cached, new.astype(cached.dtype), positions[:, 0])


def _by_layer(scales: Scales) -> Scales:
    """Multipliers with the layers in front, whose rest broadcasts to [batch, seq, width]."""
    return {
        site: jnp.swapaxes(values, 0, 1)[:, :, None] if jnp.ndim(values) == 3 else values
        for site, values in scales.items()
    }


def _check_sites(config: ModelConfig, scales: Scales, capture: tuple[str, ...]) -> None:
    """Raise `ConfigError` for sites that there are not, or multipliers of another model's shape."""
    widths = site_widths(config)
    others = ("residual", "router") if config.experts else ("residual",)
    for site in (*scales, *(name for name in capture if name not in others)):
        check_site(site)
    for site, values in scales.items():
        shape = np.shape(values)
        layers_at = 1 if len(shape) == 3 else 0
        if (
            len(shape) not in (2, 3, 4)
            or shape[layers_at] != config.num_layers
            or shape[-1] not in (1, widths[site])
        ):
            raise ConfigError(
                f"scales of site {site!r} are of shape {shape}; this model needs [layer, width] = "
                f"({config.num_layers}, {widths[site]}), [batch, layer, width] or "
                "[layer, batch, seq, width]"
            )


def _take(x: Array | experts.ChosenNeurons, at: Array, config: ModelConfig) -> Array:
    """[batch, seq, width] at [batch, at] -> [batch, at, width]."""
    if isinstance(x, experts.ChosenNeurons):
        return x.at(at).dense(config.experts)
    return jnp.take_along_axis(x, at[..., None], axis=1)


def _mean(x: Array | experts.ChosenNeurons, real: Array, config: ModelConfig) -> Array:
    """Mean over real tokens, float32: [batch, seq, width] -> [batch, width]."""
    weights = real.astype(jnp.float32)
    if isinstance(x, experts.ChosenNeurons):
        total = x.total(weights, config.experts)
    else:
        # 0 times what is not finite is not 0.
        x = jnp.where(real[..., None], x.astype(jnp.float32), 0)
        total = jnp.einsum("bsw,bs->bw", x, weights)
    return total / jnp.maximum(weights.sum(-1, keepdims=True), 1.0)


class Transformer(nn.Module):
    """A decoder: embedding, `nn.scan` over stacked blocks, unembedding."""

    config: ModelConfig

    @nn.compact
    def __call__(
        self,
        tokens: Int[Array, "batch seq"],
        *,
        lengths: Int[Array, " batch"] | None = None,
        at: Int[Array, "batch at"] | Literal["last", "all"] = "last",
        scales: Scales | None = None,
        low_rank: LowRankTerms | None = None,
        cache: Cache | None = None,
        capture: tuple[str, ...] = (),
        reduce: Literal["at", "mean"] = "at",
    ) -> Output:
        """Run the model over right-padded tokens; see `forward` for the arguments."""
        config = self.config
        batch, seq = tokens.shape
        if lengths is None:
            lengths = jnp.full((batch,), seq, jnp.int32)
        if isinstance(at, str):
            everywhere = jnp.broadcast_to(jnp.arange(seq), (batch, seq))
            at = everywhere if at == "all" else lengths[:, None] - 1
        real = jnp.arange(seq) < lengths[:, None]
        start = jnp.zeros((batch,), jnp.int32) if cache is None else cache.length
        positions = start[:, None] + jnp.arange(seq)
        angles = rotary.rope_angles(positions, config, start + lengths)

        params = {
            name: Weights(group, name=name)()
            for name, group in _declared(config).items()
            if name != LAYERS
        }

        stack = nn.scan(
            Block,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=(0, nn.broadcast),  # pyright: ignore[reportArgumentType]
            length=config.num_layers,
        )(config, capture, reduce, name=LAYERS)
        x, (store, activations) = stack(
            layers.embed(params, tokens, config),
            (
                _by_layer(scales) if scales else None,
                dict(low_rank) if low_rank else None,
                None if cache is None else (cache.k, cache.v),
                jnp.arange(config.num_layers),
            ),
            (angles, positions, at, real, self._stacks()),
        )
        if cache is not None:
            cache = Cache(store[0], store[1], cache.length + lengths)
        final = _take(x, at, config)
        return Output(layers.unembed(params, final, config), cache, activations, final)

    def _stacks(self) -> dict[str, Array] | None:
        """Kernels of the experts of all layers, which no layer takes its part of."""
        if not self.config.experts or self.is_initializing():
            return None
        ffn = self.variables["params"][LAYERS]["ffn"]
        return {name: ffn[name]["kernel"] for name in ("gate", "up", "down")}


@any_axes
def forward(
    params: Params,
    tokens: Int[Array, "batch seq"],
    *,
    config: ModelConfig,
    lengths: Int[Array, " batch"] | None = None,
    at: Int[Array, "batch at"] | Literal["last", "all"] = "last",
    scales: Scales | None = None,
    low_rank: LowRankTerms | None = None,
    cache: Cache | None = None,
    capture: tuple[str, ...] = (),
    reduce: Literal["at", "mean"] = "at",
) -> Output:
    """Run a model over tokens. Pure: composes with jit, vmap, grad and sharding.

    Args:
      params: the parameters, as `jaxneurons.load` returns them.
      tokens: ids, right-padded.
      config: the model's shape.
      lengths: real tokens in each row; default: all.
      at: positions (of `tokens`) to return logits for: indices, "last" real one, or "all".
      scales: multipliers by site: [layer, width], or [batch, layer, width] for one set a row, or
        [layer, batch, seq, width]; a site or the whole argument absent = untouched.
      low_rank: by module below `layers` ("ffn.down"), factors [layer, input, rank] and
        [layer, rank, output]: their product is added to the module's kernel and never formed, so
        that `vmap` over factors reads the kernels once for all of them; absent = untouched.
      cache: what came before, from `init_cache` or an earlier pass; tokens are appended to it.
        Its capacity must hold them: nothing checks that inside jit.
      capture: sites whose activations (after scaling) to return; also "residual", the stream as
        it enters each layer, and, of a model with experts, "router", the weight of every expert, 0
        for those that a token does not run. Neurons of such experts are 0.
      reduce: "at" returns activations at the same positions as the logits, "mean" the mean over
        the real tokens (float32).

    Returns:
      Logits, the extended cache and the activations: see `Output`.

    Raises:
      ConfigError: a site that there is not, in `scales` or `capture`, or multipliers of a shape
        that does not fit this model.
      DataError: a token id that the vocabulary does not have (outside of `jit`).
    """
    check_ids(tokens, config.vocab_size)
    _check_sites(config, scales or {}, capture)
    output: Any = Transformer(config).apply(
        {"params": params},
        tokens,
        lengths=lengths,
        at=at,
        scales=scales,
        low_rank=low_rank,
        cache=cache,
        capture=capture,
        reduce=reduce,
    )
    return output
