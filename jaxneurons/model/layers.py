"""The parts of a Llama block as plain functions of arrays.

Each function takes its parameters first and knows nothing of the others; `block` puts them
together. A *site* is a named point of the block whose output can be scaled: see `block`.
"""

import math
from collections.abc import Callable, Mapping

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
    x: Float[Array, "*batch hidden"], scale: Float[Array, " hidden"], eps: float
) -> Float[Array, "*batch hidden"]:
    """Root-mean-square normalisation, in float32, then weighted in the dtype of `x`."""
    wide = x.astype(jnp.float32)
    normed = wide * jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + eps)
    return scale * normed.astype(x.dtype)


def rope_frequencies(rope: RopeConfig, head_dim: int) -> np.ndarray:
    """Inverse frequencies of the rotary embedding, float32 [head_dim / 2], in radians per token.

    For `dynamic`: those of sequences within the original context.
    """
    exponents = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    inv_freq = (1.0 / np.float32(rope.theta) ** exponents).astype(np.float32)
    if rope.inv_freq_divisors is not None:
        return (inv_freq / np.asarray(rope.inv_freq_divisors, np.float32)).astype(np.float32)
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


def rope_angles(
    positions: Int[Array, "batch seq"],
    config: ModelConfig,
    lengths: Int[Array, " batch"],
) -> tuple[Float[Array, "batch seq half"], Float[Array, "batch seq half"]]:
    """Cosines and sines of the rotary angles at `positions`, float32.

    Args:
      positions: of the tokens.
      config: the model's shape.
      lengths: tokens of each whole sequence, which `dynamic` depends on.
    """
    rope, dim = config.rope, config.head_dim
    frequencies: Array = jnp.asarray(rope_frequencies(rope, dim))
    if rope.rope_type == "dynamic":
        context = rope.original_max_position
        longest = jnp.maximum(lengths, context).astype(jnp.float32)
        stretch = rope.factor * longest / context - (rope.factor - 1)
        theta = rope.theta * stretch ** (dim / (dim - 2))
        exponents = jnp.arange(0, dim, 2, dtype=jnp.float32) / dim
        scaled = 1.0 / theta[:, None] ** exponents
        frequencies = jnp.where(lengths[:, None] > context, scaled, frequencies)[:, None]
    angles = positions[..., None].astype(jnp.float32) * frequencies
    return jnp.cos(angles) * rope.attention_factor, jnp.sin(angles) * rope.attention_factor


def rotate(
    x: Float[Array, "*batch heads dim"],
    cos: Float[Array, "*batch half"],
    sin: Float[Array, "*batch half"],
) -> Float[Array, "*batch heads dim"]:
    """Rotate each head's (i, i + dim / 2) pairs by the given angles."""
    cos, sin = cos[..., None, :].astype(x.dtype), sin[..., None, :].astype(x.dtype)
    first, second = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


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
) -> Float[Array, "batch query heads dim"]:
    """Grouped-query attention: each key/value head serves heads / kv_heads query heads."""
    scores = _scores(q, k, mask)
    weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
    return _mix(weights, v)


def row_attention(
    q: Float[Array, "batch row heads dim"],
    k: Float[Array, "batch row kv_heads dim"],
    v: Float[Array, "batch row kv_heads dim"],
    cached_k: Float[Array, "batch key kv_heads dim"],
    cached_v: Float[Array, "batch key kv_heads dim"],
    mask: Bool[Array, "batch row key"],
) -> Float[Array, "batch row heads dim"]:
    """Attention of independent one-token rows: each sees the cached keys under `mask` and itself.

    The rows of a prompt share its cache but not each other's keys.
    """
    batch, rows, heads, dim = q.shape
    kv_heads = k.shape[2]
    grouped = q.reshape(batch, rows, kv_heads, heads // kv_heads, dim)
    to_itself = jnp.einsum("brkgd,brkd->bkgr", grouped, k).astype(jnp.float32) / math.sqrt(dim)
    scores = jnp.concatenate([_scores(q, cached_k, mask), to_itself[..., None]], axis=-1)
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
) -> Float[Array, "batch query heads dim"]:
    """Attention of tokens that follow a cache, which is neither written nor copied.

    Each sees the cached keys under `mask` and those of the tokens themselves under `mask_of_new`.
    """
    count = cached_k.shape[1]
    scores = jnp.concatenate([_scores(q, cached_k, mask), _scores(q, k, mask_of_new)], axis=-1)
    weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
    return _mix(weights[..., :count], cached_v) + _mix(weights[..., count:], v)


def _scores(q: Array, k: Array, mask: Array) -> Array:
    """Scaled and masked scores, float32 [batch, kv_heads, group, query, key]."""
    batch, queries, heads, dim = q.shape
    kv_heads = k.shape[2]
    grouped = q.reshape(batch, queries, kv_heads, heads // kv_heads, dim)
    scores = jnp.einsum("bqkgd,bskd->bkgqs", grouped, k).astype(jnp.float32) / math.sqrt(dim)
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
    low_rank: Mapping[str, tuple[Array, Array]] | None = None,
) -> tuple[Float[Array, "batch seq hidden"], dict[str, Array]]:
    """One Llama block: attention and gated feed-forward, each around a residual connection.

    Args:
      params: this layer's parameters: `attn_norm`, `attn`, `ffn_norm`, `ffn`.
      x: residual stream as it enters the layer.
      config: the model's shape.
      rotate: applies the rotary embedding to [batch, seq, heads, dim].
      attend: rotated q, rotated k and v to [batch, seq, heads, dim].
      scales: multipliers by site, broadcastable to [batch, seq, width]; absent = untouched.
      low_rank: by module ("ffn.down"), factors [input, rank] and [rank, output] whose product is
        added to its kernel, but never formed.

    Returns:
      The residual stream as it leaves the layer, and the activation at every site after scaling:
      `q`, `k`, `v` before the rotary embedding, `o` and `down` as they are added to the residual,
      `up`, `gate` (before SiLU) and their product `act` as it enters the down projection.
    """
    activations: dict[str, Array] = {}

    def site(name: str, value: Array) -> Array:
        if scales is not None and name in scales:
            value = value * scales[name].astype(value.dtype)
        activations[name] = value
        return value

    def linear(group: str, name: str, value: Array) -> Array:
        return _project_by(params[group][name], value, (low_rank or {}).get(f"{group}.{name}"))

    h = rms_norm(x, params["attn_norm"]["scale"], config.norm_eps)
    q = _heads(site("q", linear("attn", "q", h)), config.head_dim)
    k = _heads(site("k", linear("attn", "k", h)), config.head_dim)
    v = _heads(site("v", linear("attn", "v", h)), config.head_dim)
    mixed = attend(rotate(q), rotate(k), v)
    x = x + site("o", linear("attn", "o", mixed.reshape(*x.shape[:-1], -1)))

    h = rms_norm(x, params["ffn_norm"]["scale"], config.norm_eps)
    up = site("up", linear("ffn", "up", h))
    gate = site("gate", linear("ffn", "gate", h))
    act = site("act", up * jax.nn.silu(gate))
    return x + site("down", linear("ffn", "down", act)), activations


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
    return project(params, rms_norm(x, params["final_norm"]["scale"], config.norm_eps), config)


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
    h = rms_norm(x, params["final_norm"]["scale"], config.norm_eps)
    if config.tied:
        chosen = params["embed"]["embedding"][tokens]
    else:
        chosen = jnp.moveaxis(params["unembed"]["kernel"][:, tokens], 0, -1)
    logit = jnp.einsum("...h,...h->...", h, chosen, preferred_element_type=jnp.float32)
    is_target = jnp.arange(config.vocab_size) == tokens[..., None]
    others = jnp.where(is_target, MASKED, project(params, h, config))
    return jax.nn.sigmoid(logit - jax.nn.logsumexp(others, axis=-1))


def project(params: Params, h: Array, config: ModelConfig) -> Array:
    """A normed residual times the unembedding: logits, float32."""
    weights = params["embed"]["embedding"] if config.tied else params["unembed"]["kernel"]
    equation = "...h,vh->...v" if config.tied else "...h,hv->...v"
    return jnp.einsum(equation, h, weights, preferred_element_type=jnp.float32)
