"""The parts of a block as plain functions of arrays.

Each function takes its parameters first and knows nothing of the others; `block` puts them
together. A *site* is a named point of the block whose output can be scaled: see `block`.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from jaxneurons.model.config import ModelConfig, RopeConfig
from jaxneurons.model.parameters import Params

MASKED = -1e30  # finite, so that a row without any visible key stays free of NaN

Rotate = Callable[[Array], Array]
Attend = Callable[[Array, Array, Array], Array]


def rms_norm(
    x: Float[Array, "*batch hidden"],
    scale: Float[Array, " hidden"],
    eps: float,
    offset: float = 0.0,
) -> Float[Array, "*batch hidden"]:
    """Root-mean-square normalisation, in float32, then weighted in the dtype of `x`.

    With an offset the weight is `offset + scale`, and the product is float32 too (Gemma).
    """
    wide = x.astype(jnp.float32)
    normed = wide * jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + eps)
    if offset:
        return (normed * (offset + scale.astype(jnp.float32))).astype(x.dtype)
    return scale * normed.astype(x.dtype)


def norm(x: Array, params: Params, config: ModelConfig) -> Array:
    """A norm of the model, by its parameters (`{"scale": ...}`)."""
    return rms_norm(x, params["scale"], config.norm_eps, config.norm_offset)


def norm_weight(params: Params, config: ModelConfig) -> Array:
    """What a norm multiplies by, in the parameters' dtype."""
    return params["scale"] + config.norm_offset if config.norm_offset else params["scale"]


def embed(
    params: Params, tokens: Int[Array, "*batch"], config: ModelConfig
) -> Float[Array, "*batch hidden"]:
    """The stream as it enters the first layer."""
    embedded = params["embed"]["embedding"][tokens]
    if config.embed_scale == 1:
        return embedded
    return embedded * jnp.asarray(config.embed_scale, embedded.dtype)


def rope_frequencies(rope: RopeConfig, head_dim: int) -> np.ndarray:
    """Inverse frequencies of the rotary embedding, float32 [dimensions / 2], in radians per token.

    For `dynamic` and `longrope`: those of sequences within the original context.
    """
    head_dim = rope.dim or head_dim
    exponents = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    inv_freq = (1.0 / np.float32(rope.theta) ** exponents).astype(np.float32)
    if rope.inv_freq_divisors is not None:
        return (inv_freq / np.asarray(rope.inv_freq_divisors, np.float32)).astype(np.float32)
    if rope.short_divisors is not None:
        return (inv_freq / np.asarray(rope.short_divisors, np.float32)).astype(np.float32)
    if rope.rope_type == "linear":
        return (inv_freq / np.float32(rope.factor)).astype(np.float32)
    if rope.rope_type in ("llama3", "yarn"):
        keep = _kept(rope, head_dim, inv_freq)
        return ((1 - keep) * inv_freq / rope.factor + keep * inv_freq).astype(np.float32)
    return inv_freq


def _kept(rope: RopeConfig, head_dim: int, inv_freq: np.ndarray) -> np.ndarray:
    """How far each frequency is left alone (1) rather than divided by the factor (0)."""
    if rope.rope_type == "llama3":
        # Linear in the number of turns that fit into the original context.
        turns = rope.original_max_position * inv_freq / (2 * math.pi)
        low, high = rope.low_freq_factor, rope.high_freq_factor
        return np.clip((turns - low) / (high - low), 0.0, 1.0)

    def dimension(turns: float) -> float:
        """The (fractional) pair of dimensions that turns so often in the original context."""
        length = rope.original_max_position / (turns * 2 * math.pi)
        return head_dim * math.log(length) / (2 * math.log(rope.theta))

    # Linear in the dimension's number.
    low, high = dimension(rope.beta_fast), dimension(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    if low == high:
        high += 0.001
    ramp = (np.arange(head_dim // 2, dtype=np.float32) - np.float32(low)) / np.float32(high - low)
    return 1 - np.clip(ramp, 0.0, 1.0)


class Angles(NamedTuple):
    """Cosines and sines of rotary angles at some positions, float32, for each of `config.ropes`.

    Attributes:
      cos: for each pair of dimensions that rotates.
      sin: the same.
    """

    cos: Float[Array, "rope batch seq pair"]
    sin: Float[Array, "rope batch seq pair"]


class LayerKind(NamedTuple):
    """In what layers differ beside their parameters.

    Attributes:
      window: how many keys a query sees at most; None: all.
      rope: index of the layer's rotary embedding in `config.ropes`; -1: it has none.
    """

    window: Any
    rope: Any


def layer_kind(config: ModelConfig, index: Any) -> LayerKind:
    """The kind of a layer, by its index, which may be traced: plain numbers if all are alike."""
    windows, ropes = config.layer_windows, config.layer_ropes
    return LayerKind(
        config.sliding_window if windows is None else jnp.asarray(windows, jnp.int32)[index],
        ropes[0] if len(set(ropes)) == 1 else jnp.asarray(ropes, jnp.int32)[index],
    )


def rope_angles(
    positions: Int[Array, "batch seq"],
    config: ModelConfig,
    lengths: Int[Array, " batch"],
) -> Angles:
    """Cosines and sines of the rotary angles at `positions`.

    Args:
      positions: of the tokens.
      config: the model's shape.
      lengths: tokens of each whole sequence, which `dynamic` and `longrope` depend on.
    """
    every = [_angles(positions, rope, config.head_dim, lengths) for rope in config.ropes]
    return Angles(*(jnp.stack(values) for values in zip(*every, strict=True)))


def _angles(
    positions: Array, rope: RopeConfig, head_dim: int, lengths: Array
) -> tuple[Float[Array, "batch seq pair"], Float[Array, "batch seq pair"]]:
    dim = rope.dim or head_dim
    frequencies: Array = jnp.asarray(rope_frequencies(rope, head_dim))
    context = rope.original_max_position
    if rope.rope_type == "dynamic":
        longest = jnp.maximum(lengths, context).astype(jnp.float32)
        stretch = rope.factor * longest / context - (rope.factor - 1)
        theta = rope.theta * stretch ** (dim / (dim - 2))
        exponents = jnp.arange(0, dim, 2, dtype=jnp.float32) / dim
        scaled = 1.0 / theta[:, None] ** exponents
        frequencies = jnp.where(lengths[:, None] > context, scaled, frequencies)[:, None]
    if rope.long_divisors is not None:
        short, long = np.asarray(rope.short_divisors), np.asarray(rope.long_divisors)
        stretched = frequencies * jnp.asarray(short / long, jnp.float32)
        frequencies = jnp.where(lengths[:, None] > context, stretched, frequencies)[:, None]
    angles = positions[..., None].astype(jnp.float32) * frequencies
    return jnp.cos(angles) * rope.attention_factor, jnp.sin(angles) * rope.attention_factor


def rotate(
    x: Float[Array, "batch seq heads dim"], angles: Angles, rope: int | Array = 0
) -> Float[Array, "batch seq heads dim"]:
    """Rotate each head's (i, i + pairs) pairs of dimensions; the dimensions behind them stay.

    Args:
      x: queries or keys.
      angles: at their positions.
      rope: which of the angles' embeddings, as `LayerKind.rope`; it may be traced.
    """
    if isinstance(rope, int):
        if rope < 0:
            return x
        cos, sin = angles.cos[rope], angles.sin[rope]
    else:  # the last entry, -1, leaves all as it is
        cos = jnp.concatenate([angles.cos, jnp.ones_like(angles.cos[:1])])[rope]
        sin = jnp.concatenate([angles.sin, jnp.zeros_like(angles.sin[:1])])[rope]
    cos, sin = cos[..., None, :].astype(x.dtype), sin[..., None, :].astype(x.dtype)
    pairs = cos.shape[-1]
    first, second, rest = jnp.split(x, (pairs, 2 * pairs), axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin, rest], axis=-1)


def visible(
    queries: Int[Array, "*batch query"], keys: Int[Array, "*batch key"], window: int | Array | None
) -> Bool[Array, "*batch query key"]:
    """Which key positions a query position sees: itself and before, at most `window` of them."""
    gap = queries[..., :, None] - keys[..., None, :]
    return (gap >= 0) if window is None else (gap >= 0) & (gap < window)


def attention(
    q: Float[Array, "batch query heads dim"],
    k: Float[Array, "batch key kv_heads dim"],
    v: Float[Array, "batch key kv_heads dim"],
    mask: Bool[Array, "batch query key"],
    config: ModelConfig,
) -> Float[Array, "batch query heads dim"]:
    """Grouped-query attention: each key/value head serves heads / kv_heads query heads."""
    scores = _scores(q, k, mask, config)
    weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
    return _mix(weights, v)


def row_attention(
    q: Float[Array, "batch row heads dim"],
    k: Float[Array, "batch row kv_heads dim"],
    v: Float[Array, "batch row kv_heads dim"],
    cached_k: Float[Array, "batch key kv_heads dim"],
    cached_v: Float[Array, "batch key kv_heads dim"],
    mask: Bool[Array, "batch row key"],
    config: ModelConfig,
) -> Float[Array, "batch row heads dim"]:
    """Attention of independent one-token rows: each sees the cached keys under `mask` and itself.

    The rows of a prompt share its cache but not each other's keys.
    """
    batch, rows, heads, dim = q.shape
    kv_heads = k.shape[2]
    grouped = q.reshape(batch, rows, kv_heads, heads // kv_heads, dim)
    to_itself = _scaled(jnp.einsum("brkgd,brkd->bkgr", grouped, k), config)
    scores = jnp.concatenate([_scores(q, cached_k, mask, config), to_itself[..., None]], axis=-1)
    weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
    from_itself = jnp.einsum("bkgr,brkd->brkgd", weights[..., -1], v).reshape(q.shape)
    return _mix(weights[..., :-1], cached_v) + from_itself


def continued_attention(
    q: Float[Array, "batch query heads dim"],
    k: Float[Array, "batch query kv_heads dim"],
    v: Float[Array, "batch query kv_heads dim"],
    mask_of_new: Bool[Array, "batch query query"],
    cached_k: Float[Array, "batch key kv_heads dim"],
    cached_v: Float[Array, "batch key kv_heads dim"],
    mask: Bool[Array, "batch query key"],
    config: ModelConfig,
) -> Float[Array, "batch query heads dim"]:
    """Attention of tokens that follow a cache, which is neither written nor copied.

    Each sees the cached keys under `mask` and those of the tokens themselves under `mask_of_new`.
    """
    count = cached_k.shape[1]
    both = _scores(q, cached_k, mask, config), _scores(q, k, mask_of_new, config)
    scores = jnp.concatenate(both, axis=-1)
    weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
    return _mix(weights[..., :count], cached_v) + _mix(weights[..., count:], v)


def _scaled(products: Array, config: ModelConfig) -> Array:
    """Scores of products of queries and keys, float32."""
    scores = products.astype(jnp.float32)
    if config.query_scale is None:
        scores = scores / math.sqrt(config.head_dim)
    else:
        scores = scores * config.query_scale
    return _softcap(scores, config.attention_softcap)


def _softcap(x: Array, most: float | None) -> Array:
    """c tanh(x / c): about x where it is small, never beyond c."""
    return x if most is None else most * jnp.tanh(x / most)


def _scores(q: Array, k: Array, mask: Array, config: ModelConfig) -> Array:
    """Scaled and masked scores, float32 [batch, kv_heads, group, query, key]."""
    batch, queries, heads, dim = q.shape
    kv_heads = k.shape[2]
    grouped = q.reshape(batch, queries, kv_heads, heads // kv_heads, dim)
    scores = _scaled(jnp.einsum("bqkgd,bskd->bkgqs", grouped, k), config)
    return jnp.where(mask[:, None, None], scores, MASKED)


def _mix(weights: Array, v: Array) -> Array:
    """Values [batch, key, ...] mixed by the weights: [batch, query, heads, dim]."""
    batch, kv_heads, group, queries, _ = weights.shape
    mixed = jnp.einsum("bkgqs,bskd->bqkgd", weights, v)
    return mixed.reshape(batch, queries, kv_heads * group, v.shape[-1])


def block(
    params: Params,
    x: Float[Array, "batch seq hidden"],
    *,
    config: ModelConfig,
    rotate: Rotate,
    attend: Attend,
    scales: Mapping[str, Array] | None = None,
    added: Mapping[str, Array] | None = None,
    low_rank: Mapping[str, tuple[Array, Array]] | None = None,
) -> tuple[Float[Array, "batch seq hidden"], dict[str, Array]]:
    """One block: attention and gated feed-forward, each around a residual connection.

    Args:
      params: this layer's parameters, nested as `parameters.TABLE` says.
      x: residual stream as it enters the layer.
      config: the model's shape.
      rotate: applies the rotary embedding to [batch, seq, heads, dim].
      attend: rotated q, rotated k and v to [batch, seq, heads, dim].
      scales: multipliers by site, broadcastable to [batch, seq, width]; absent = untouched.
      added: what is added to a site's activation, after its multipliers; absent = nothing.
      low_rank: by module ("ffn.down"), factors [input, rank] and [rank, output] whose product is
        added to its kernel, but never formed.

    Returns:
      The residual stream as it leaves the layer, and the activation at every site after scaling:
      `q`, `k`, `v` as they leave their projections (before their norm and the rotary embedding),
      `o` and `down` as they leave theirs (before their norm, where there is one, and the residual),
      `up`, `gate` (before its activation function) and `act`, the product of the two, as it enters
      the down projection.
    """
    activations: dict[str, Array] = {}

    def site(name: str, value: Array) -> Array:
        if scales is not None and name in scales:
            value = value * scales[name].astype(value.dtype)
        if added is not None and name in added:
            value = value + added[name].astype(value.dtype)
        activations[name] = value
        return value

    def linear(group: str, name: str, value: Array) -> Array:
        return _project_by(params[group][name], value, (low_rank or {}).get(f"{group}.{name}"))

    h = norm(x, params["attn_norm"], config) if config.pre_norms else x
    q = _normed_heads(site("q", linear("attn", "q", h)), params["attn"].get("q_norm"), config)
    k = _normed_heads(site("k", linear("attn", "k", h)), params["attn"].get("k_norm"), config)
    v = _heads(site("v", linear("attn", "v", h)), config.head_dim)
    mixed = attend(rotate(q), rotate(k), v)
    o = site("o", linear("attn", "o", mixed.reshape(*x.shape[:-1], -1)))
    x = x + (norm(o, params["attn_post_norm"], config) if config.post_norms else o)

    h = norm(x, params["ffn_norm"], config) if config.pre_norms else x
    up = site("up", linear("ffn", "up", h))
    gate = site("gate", linear("ffn", "gate", h))
    act = site("act", up * activate(gate, config))
    return add_down(params, x, site("down", linear("ffn", "down", act)), config), activations


def activate(gate: Array, config: ModelConfig) -> Array:
    """The activation function of the gate."""
    return jax.nn.silu(gate) if config.activation == "silu" else jax.nn.gelu(gate, approximate=True)


def add_down(params: Params, x: Array, down: Array, config: ModelConfig) -> Array:
    """The stream as it leaves a layer: what its feed-forward adds, normed where it is."""
    return x + (norm(down, params["ffn_post_norm"], config) if config.post_norms else down)


def change_down(
    params: Params,
    y: Float[Array, "*batch hidden"],
    down: Float[Array, "*batch hidden"],
    change: Float[Array, "*batch hidden"],
    config: ModelConfig,
) -> Float[Array, "*batch hidden"]:
    """The stream as it would leave a layer if something were added to `down`.

    Args:
      params: this layer's parameters.
      y: the stream as it leaves the layer without.
      down: what the layer's down projection puts out without.
      change: what is added to that, before its norm, where there is one.
      config: the model's shape.
    """
    if config.post_norms:
        weight = {"scale": params["ffn_post_norm"]["scale"].astype(jnp.float32)}
        wide = down.astype(jnp.float32)
        changed = norm(wide + change.astype(jnp.float32), weight, config)
        change = changed - norm(wide, weight, config)
    return y + change.astype(y.dtype)


def _normed_heads(x: Array, params: Params | None, config: ModelConfig) -> Array:
    """Queries or keys [batch, seq, heads, dim], normed where the model norms them."""
    if params is not None and config.qk_norm == "width":
        x = norm(x, params, config)
    x = _heads(x, config.head_dim)
    if params is not None and config.qk_norm == "head":
        x = norm(x, params, config)
    return x


def _project_by(params: Params, x: Array, term: tuple[Array, Array] | None) -> Array:
    y = x @ params["kernel"]
    if term is not None:
        y = y + (x @ term[0].astype(x.dtype)) @ term[1].astype(x.dtype)
    return y + params["bias"] if "bias" in params else y


def _heads(x: Array, head_dim: int) -> Array:
    return x.reshape(*x.shape[:-1], -1, head_dim)


def unembed(
    params: Params, x: Float[Array, "*batch hidden"], config: ModelConfig
) -> Float[Array, "*batch vocab"]:
    """Final norm and projection to the vocabulary: logits, float32."""
    return project(params, norm(x, params["final_norm"], config), config)


def token_probability(
    params: Params,
    x: Float[Array, "*batch hidden"],
    tokens: Int[Array, "*batch"],
    config: ModelConfig,
) -> Float[Array, "*batch"]:
    """Probability of one token at each position, float32.

    As sigmoid(its logit - log of the sum of the others' exponentials): rounding of the logits then
    moves P by P (1 - P) times as much, also where P is close to 1, and the gradient needs no
    scatter into an array of the vocabulary's size.
    """
    h = norm(x, params["final_norm"], config)
    if config.tied:
        chosen = params["embed"]["embedding"][tokens]
    else:
        chosen = jnp.moveaxis(params["unembed"]["kernel"][:, tokens], 0, -1)
    logit = jnp.einsum("...h,...h->...", h, chosen, preferred_element_type=jnp.float32)
    logit = _softcap(logit, config.final_softcap)
    is_target = jnp.arange(config.vocab_size) == tokens[..., None]
    others = jnp.where(is_target, MASKED, project(params, h, config))
    return jax.nn.sigmoid(logit - jax.nn.logsumexp(others, axis=-1))


def project(params: Params, h: Array, config: ModelConfig) -> Array:
    """A normed residual times the unembedding: logits, float32."""
    weights = params["embed"]["embedding"] if config.tied else params["unembed"]["kernel"]
    equation = "...h,vh->...v" if config.tied else "...h,hv->...v"
    logits = jnp.einsum(equation, h, weights, preferred_element_type=jnp.float32)
    return _softcap(logits, config.final_softcap)
