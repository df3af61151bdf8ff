"""Rows: one token for each (layer, alpha), run against a prompt's cached keys and values.

A causal model computes the same keys and values before the last position whatever is scaled there.
So `prefill` runs the prompt once and keeps keys, values and the residual as it enters each layer; a
row enters at its layer with that residual, its site scaled, and runs through the layers above.
Rows are sorted by layer and enter in a few groups, so that little work is done below a row's layer.
"""

import functools
import itertools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxneurons.model import experts, layers, rotary, transformer
from jaxneurons.model.axis_types import any_axes
from jaxneurons.model.config import ModelConfig
from jaxneurons.model.parameters import Params, params_dtype
from jaxneurons.neurons.sets import Site, site_width

Entries = tuple[tuple[int, int], ...]
"""(first layer, rows): from that layer on, so many of the first rows take part."""


class Prefill(NamedTuple):
    """A prompt, run once: all that its rows need.

    Attributes:
      cache: keys and values of every position.
      residual: the stream as it enters each layer, at the answer positions.
      added: what each layer adds to it there: by attention (`o`) and feed-forward (`down`), normed
        where the model norms it.
      squares: mean squares of activations there, for each site that a norm follows at once (`o` and
        `down` in models with post norms, `q` and `k` where they are normed; of their largest head).
      positions: the position before each answer token.
      targets: the answer tokens.
      probability: of each answer token, model untouched.
      logits: at the answer positions, float32.
      captured: activations of the captured sites, at the answer positions.
    """

    cache: transformer.Cache
    residual: Float[Array, "layer batch answer hidden"]
    added: dict[str, Float[Array, "layer batch answer hidden"]]
    squares: dict[str, Float[Array, "layer batch answer"]]
    positions: Int[Array, "batch answer"]
    targets: Int[Array, "batch answer"]
    probability: Float[Array, "batch answer"]
    logits: Float[Array, "batch answer vocab"]
    captured: dict[str, Float[Array, "layer batch answer width"]]


@any_axes
def prefill(
    params: Params,
    tokens: Int[Array, "batch seq"],
    targets: Int[Array, "batch answer"],
    *,
    config: ModelConfig,
    lengths: Int[Array, " batch"],
    capture: tuple[str, ...] = (),
) -> Prefill:
    """Run prompts (and all but the last token of their answers) once.

    `capture` names sites whose activations at the answer positions are wanted.
    """
    batch, seq = tokens.shape
    answers = targets.shape[1]
    positions = lengths[:, None] - 1 + jnp.arange(answers)
    if answers > 1:
        tokens = jnp.pad(tokens, ((0, 0), (0, answers - 1)))
        seq += answers - 1
        tokens = jax.vmap(
            lambda row, answer, start: jax.lax.dynamic_update_slice_in_dim(row, answer, start, 0)
        )(tokens, targets[:, :-1].astype(tokens.dtype), lengths)
        lengths = lengths + answers - 1
    dtype = params_dtype(params)
    out = transformer.forward(
        params,
        tokens,
        config=config,
        lengths=lengths,
        at=positions,
        cache=transformer.init_cache(config, batch, seq, dtype),
        capture=tuple(dict.fromkeys(("residual", "o", "down", *normed_sites(config), *capture))),
    )
    probability = layers.token_probability(params, out.final, targets, config)
    assert out.cache is not None
    seen = out.activations
    return Prefill(
        out.cache,
        seen["residual"],
        {name: _added(params, name, seen[name], config) for name in ("o", "down")},
        {name: _largest_square(seen[name], name, config) for name in normed_sites(config)},
        positions,
        targets,
        probability,
        out.logits,
        {name: seen[name] for name in capture},
    )


def normed_sites(config: ModelConfig) -> tuple[str, ...]:
    """The sites that a norm follows at once."""
    return ("o", "down") * config.post_norms + ("q", "k") * (config.qk_norm is not None)


def _added(
    params: Params,
    site: str,
    values: Float[Array, "layer batch answer hidden"],
    config: ModelConfig,
) -> Float[Array, "layer batch answer hidden"]:
    """What activations of `o` or `down` add to the stream."""
    if not config.post_norms:
        return values
    weights = params["layers"]["attn_post_norm" if site == "o" else "ffn_post_norm"]
    return jax.vmap(lambda values, weight: layers.norm(values, weight, config))(values, weights)


def _largest_square(
    values: Float[Array, "layer batch answer width"], site: str, config: ModelConfig
) -> Float[Array, "layer batch answer"]:
    """Mean square of what a norm divides: of the largest head, where each has its own."""
    heads = site in ("q", "k") and config.qk_norm == "head"
    parts = (
        values.reshape(*values.shape[:-1], -1, config.head_dim) if heads else values[..., None, :]
    )
    return jnp.square(parts.astype(jnp.float32)).mean(-1).max(-1)


def row_probabilities(
    params: Params,
    pre: Prefill,
    layer: Int[Array, "batch answer row"],
    scales: Float[Array, "batch answer row width"],
    *,
    config: ModelConfig,
    site: Site,
    entries: Entries | None = None,
    everywhere: Float[Array, "layer batch answer width"] | None = None,
    owner: Int[Array, " batch"] | None = None,
) -> Float[Array, "batch answer all_rows"]:
    """The answer's probability in each row: its layer's site scaled, all else untouched.

    Differentiate with respect to `scales`: that is the attribution.

    Args:
      params: the model's parameters.
      pre: the prompts, run once.
      layer: where each row enters.
      scales: multipliers of the row's site, at its own layer.
      config: the model's shape.
      site: which activation is scaled.
      entries: (first layer, rows): from that layer on, so many of the first rows take part. Rows
        sorted by layer do no work below their group's first layer; default: all from layer 0.
      everywhere: one more row, which comes first: its site is scaled at every layer. All ones: the
        untouched model, and the gradient is every layer's at scale 1, for the price of one row.
      owner: which prompt of the cache each entry of the batch reads, where the rest of `pre` was
        picked from those of its prompts; default: its own.

    Returns:
      Probability in each row; with `everywhere`, of that row first.
    """
    batch, answers, rows = layer.shape
    entries = ((0, rows),) if entries is None else entries
    if everywhere is not None:
        layer = jnp.pad(layer, ((0, 0), (0, 0), (1, 0)))
        scales = jnp.pad(scales, ((0, 0), (0, 0), (1, 0), (0, 0)), constant_values=1)
        rows, entries = rows + 1, tuple((first, active + 1) for first, active in entries)
    # Rows outermost, so that a group of rows is a prefix.
    layer = layer.swapaxes(1, 2).reshape(batch, rows * answers)
    scales = scales.swapaxes(1, 2).reshape(batch, rows * answers, -1)
    step = _layer_step(params, pre, layer, config=config, site=site, owner=owner)

    x = jnp.zeros((batch, 0, config.hidden_size), pre.residual.dtype)
    ends = [first for first, _ in entries[1:]] + [config.num_layers]
    for (first, active), end in zip(entries, ends, strict=True):
        x = jnp.pad(x, ((0, 0), (0, active * answers - x.shape[1]), (0, 0)))
        inside = scales[:, : active * answers]
        x, _ = jax.lax.scan(
            lambda x, per_layer, inside=inside: (step(x, inside, *per_layer), None),
            x,
            (jnp.arange(first, end), None if everywhere is None else everywhere[first:end]),
        )
    targets = jnp.tile(pre.targets, (1, rows))
    p = layers.token_probability(params, x, targets, config)
    return p.reshape(batch, rows, answers).swapaxes(1, 2)


def _layer_step(
    params: Params,
    pre: Prefill,
    layer: Int[Array, "batch all_rows"],
    *,
    config: ModelConfig,
    site: Site,
    owner: Array | None = None,
) -> Callable[[Array, Array, Array, Array | None], Array]:
    """One layer of all rows: rows that enter there take its residual, others go on.

    `owner` as of `row_probabilities`.

    Returns:
      A function of the residual of the first rows [batch, row, hidden], their multipliers, the
      layer's index, and those of a row that is scaled at every layer, which returns the residual
      after the layer.
    """
    batch, answers = pre.targets.shape
    positions = jnp.tile(pre.positions, (1, layer.shape[1] // answers))
    length = pre.cache.length if owner is None else pre.cache.length[owner]
    angles = rotary.rope_angles(positions, config, length)
    keys = jnp.broadcast_to(jnp.arange(pre.cache.k.shape[2]), (batch, pre.cache.k.shape[2]))
    # The row itself is not in the cache: it sees strictly earlier keys, and itself.
    differ = config.layer_windows is not None
    mask = layers.visible(positions, keys, None if differ else config.sliding_window)
    mask &= keys[:, None, :] < positions[..., None]

    # Keep only matmul results for the backward pass: without this policy every layer's weights
    # would be copied into the list of saved values. The scores of many keys would be most of it, in
    # every layer: those, the matmuls with batch dimensions, are computed again.
    keep = jax.checkpoint_policies.dots_saveable
    if keys.shape[1] > MANY_KEYS:
        keep = jax.checkpoint_policies.dots_with_no_batch_dims_saveable
    if config.experts:
        products = jax.checkpoint_policies.save_only_these_names(experts.PRODUCTS)
        keep = jax.checkpoint_policies.save_from_both_policies(keep, products)

    @functools.partial(jax.checkpoint, policy=keep, prevent_cse=False)
    def step(x: Array, scales: Array, index: Array, everywhere: Array | None) -> Array:
        def pick(stack: Array) -> Array:
            return jax.lax.dynamic_index_in_dim(stack, index, 0, keepdims=False)

        active = x.shape[1]
        k, v, residual = pick(pre.cache.k), pick(pre.cache.v), pick(pre.residual)
        if owner is not None:
            k, v = k[owner], v[owner]
        enters = (layer[:, :active] == index)[..., None]
        scales = jnp.where(enters, scales, 1)
        if everywhere is not None:
            scales = jnp.concatenate([everywhere, scales[:, answers:]], axis=1)
        seen, kind = mask[:, :active], layers.layer_kind(config, index)
        if differ:
            seen = seen & layers.visible(positions[:, :active], keys, kind.window)
        here = rotary.Angles(angles.cos[:, :, :active], angles.sin[:, :, :active])
        y, _ = layers.block(
            layers.layer_params(params, index, config),
            jnp.where(enters, jnp.tile(residual, (1, active // answers, 1)), x),
            config=config,
            rotate=lambda heads: rotary.rotate(heads, here, kind.rope),
            attend=lambda q, row_k, row_v: layers.row_attention(
                q, row_k, row_v, k, v, seen, config
            ),
            scales={site: scales},
        )
        return y

    return step


def evaluate(
    params: Params,
    pre: Prefill,
    layer: Int[Array, "batch answer row"],
    alpha: Float[Array, "batch answer row"],
    *,
    config: ModelConfig,
    site: Site,
    entries: Entries | None = None,
    owner: Int[Array, " batch"] | None = None,
) -> tuple[Array, Array]:
    """P [batch, answer, row] and dP/dscale [batch, answer, row, width] at each (layer, alpha).

    `entries` and `owner` as of `row_probabilities`.
    """
    scales = _same_for_all_neurons(alpha, config, site)

    def total(scales: Array) -> tuple[Array, Array]:
        p = row_probabilities(
            params,
            pre,
            layer,
            scales,
            config=config,
            site=site,
            entries=entries,
            owner=owner,
        )
        return p.sum(), p

    (_, p), gradient = jax.value_and_grad(total, has_aux=True)(scales)
    return p, gradient


def evaluate_with_untouched(
    params: Params,
    pre: Prefill,
    layer: Int[Array, "batch answer row"],
    alpha: Float[Array, "batch answer row"],
    *,
    config: ModelConfig,
    site: Site,
    entries: Entries | None = None,
) -> tuple[Array, Array, Array]:
    """`evaluate`, and dP/dscale of every layer at alpha = 1 [batch, answer, layer, width]."""
    scales = _same_for_all_neurons(alpha, config, site)
    ones = jnp.ones((config.num_layers, *pre.targets.shape, scales.shape[-1]), jnp.float32)

    def total(scales: Array, everywhere: Array) -> tuple[Array, Array]:
        p = row_probabilities(
            params,
            pre,
            layer,
            scales,
            config=config,
            site=site,
            entries=entries,
            everywhere=everywhere,
        )
        return p.sum(), p[..., 1:]

    both = jax.value_and_grad(total, argnums=(0, 1), has_aux=True)
    (_, p), (gradient, untouched) = both(scales, ones)
    return p, gradient, jnp.moveaxis(untouched, 0, 2)


def _same_for_all_neurons(alpha: Array, config: ModelConfig, site: Site) -> Array:
    """Multipliers [..., width] of a site whose neurons are all scaled by alpha [...]."""
    width = site_width(config, site)
    return jnp.broadcast_to(alpha[..., None].astype(jnp.float32), (*alpha.shape, width))


MANY_KEYS = 1024
"""Cached keys from which on the backward pass computes scores again rather than keep them."""

GROUPS = 6
"""Groups of layers that rows enter by: more groups skip more work and compile longer."""


def grouped(layers: int, per_layer: int, first: int = 0) -> Entries:
    """`entries` for `per_layer` rows of every layer, sorted, after `first` rows of any layer."""
    bounds = np.linspace(0, layers, min(GROUPS, layers) + 1).astype(int).tolist()
    return tuple((a, first + b * per_layer) for a, b in itertools.pairwise(bounds))


def sweep(
    params: Params,
    pre: Prefill,
    x: np.ndarray,
    w: np.ndarray,
    *,
    config: ModelConfig,
    site: Site,
    rows: int,
) -> tuple[Array, Array]:
    """Every layer at nodes `x`: P [batch, answer, layer, node] and the integral [..., width]."""
    count, steps, shape = config.num_layers, len(x), pre.targets.shape
    passes = -(-steps // max(1, rows // count))
    together = -(-steps // passes)  # nodes of every layer in one pass
    pad = passes * together - steps
    alpha = np.concatenate([x, np.zeros(pad)]).reshape(passes, together)
    weight = np.concatenate([w, np.zeros(pad)]).reshape(passes, together)
    entries = grouped(count, together)
    row_shape = (*shape, count * together)
    layer = jnp.broadcast_to(jnp.repeat(jnp.arange(count), together), row_shape)

    def one_pass(integral: Array, nodes: tuple[Array, Array]) -> tuple[Array, Array]:
        alpha, weight = nodes
        p, gradient = evaluate(
            params,
            pre,
            layer,
            jnp.broadcast_to(jnp.tile(alpha, count), row_shape),
            config=config,
            site=site,
            entries=entries,
        )
        gradient = gradient.reshape(*shape, count, together, -1)
        p = p.reshape(*shape, count, together)
        return integral + jnp.einsum("balmw,m->balw", gradient, weight), p

    integral = jnp.zeros((*shape, count, site_width(config, site)), jnp.float32)
    nodes = (jnp.asarray(alpha, jnp.float32), jnp.asarray(weight, jnp.float32))
    integral, p = jax.lax.scan(one_pass, integral, nodes)
    p = jnp.moveaxis(p, 0, -2).reshape(*shape, count, passes * together)
    return p[..., :steps], integral
