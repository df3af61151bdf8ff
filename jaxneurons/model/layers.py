"""The parts of a block as plain functions of arrays.

Each function takes its parameters first and knows nothing of the others; `block` puts them
together. A *site* is a named point of the block whose output can be scaled: see `block`.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxneurons.errors import ConfigError
from jaxneurons.model import experts
from jaxneurons.model.config import ModelConfig
from jaxneurons.model.parameters import Params, neuron_place

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
    low_rank: Mapping[str, tuple[Array, Array]] | None = None,
) -> tuple[Float[Array, "batch seq hidden"], dict[str, Any]]:
    """One block: attention and gated feed-forward, each around a residual connection.

    Args:
      params: this layer's parameters, nested as `parameters.TABLE` says.
      x: residual stream as it enters the layer.
      config: the model's shape.
      rotate: applies the rotary embedding to [batch, seq, heads, dim].
      attend: rotated q, rotated k and v to [batch, seq, heads, dim].
      scales: multipliers by site, broadcastable to [batch, seq, width]; absent = untouched.
      low_rank: by module ("ffn.down"), factors [input, rank] and [rank, output] whose product is
        added to its kernel, but never formed.

    Returns:
      The residual stream as it leaves the layer, and the activation at every site after scaling:
      `q`, `k`, `v` as they leave their projections (before their norm and the rotary embedding),
      `o` and `down` as they leave theirs (before their norm, where there is one, and the residual),
      `up`, `gate` (before its activation function) and `act`, the product of the two, as it enters
      the down projection. Where there are experts, these three are `ChosenNeurons`, before the
      router's weight, `down` is the weighted sum over experts, and `router` has the weights of all
      experts, 0 for those that are not chosen.

    Raises:
      ConfigError: `low_rank` names a projection of the experts.
    """
    activations: dict[str, Any] = {}

    def site(name: str, value: Array, routing: experts.Routing | None = None) -> Array:
        if scales is not None and name in scales:
            factor = scales[name].astype(value.dtype)
            value = value * (factor if routing is None else routing.pick(factor, config.experts))
        activations[name] = (
            value if routing is None else experts.ChosenNeurons(value, routing.experts)
        )
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
    if config.experts:
        _check_kernels(low_rank)
        down, routing = experts.feed_forward(
            params["ffn"],
            h,
            config=config,
            activate=lambda gate: activate(gate, config),
            site=site,
        )
        activations["router"] = routing.dense(config.experts)
    else:
        up = site("up", linear("ffn", "up", h))
        gate = site("gate", linear("ffn", "gate", h))
        act = site("act", up * activate(gate, config))
        down = linear("ffn", "down", act)
    return add_down(params, x, site("down", down), config), activations


def _check_kernels(low_rank: Mapping[str, Any] | None) -> None:
    """Raise `ConfigError` if factors are to be added to the kernels of experts."""
    for name in low_rank or ():
        if name.startswith("ffn."):
            raise ConfigError(
                f"low_rank names {name!r}, of which each expert of this model has its own: edit "
                "the parameters of neurons instead, or the attention's projections"
            )


def layer_params(params: Params, index: Any, config: ModelConfig) -> Params:
    """One layer's parameters, by its index, which may be traced.

    Kernels of experts stay where they are: see `experts.Stacked`.
    """

    def pick(path: Any, stack: Array) -> Any:
        if config.experts and [key.key for key in path] in _EXPERT_KERNELS:
            return experts.Stacked(stack, index)
        return jax.lax.dynamic_index_in_dim(stack, index, 0, keepdims=False)

    return jax.tree_util.tree_map_with_path(pick, params["layers"])


_EXPERT_KERNELS = [["ffn", name, "kernel"] for name in ("gate", "up", "down")]


def activate(gate: Array, config: ModelConfig) -> Array:
    """The activation function of the gate."""
    return jax.nn.silu(gate) if config.activation == "silu" else jax.nn.gelu(gate, approximate=True)


def read_by_down(
    activations: Mapping[str, Any], index: Int[Array, " neuron"], config: ModelConfig
) -> Float[Array, "batch seq neuron"]:
    """What some neurons of a layer put into the down projection, by the activations of `block`.

    Where there are experts: times the router's weight, and 0 where a token does not run theirs.
    """
    act = activations["act"]
    if not config.experts:
        return act[..., index]
    expert, index = neuron_place(index, config)
    return act.pick(expert, index) * activations["router"][..., expert]


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
