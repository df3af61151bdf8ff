"""Integrated gradients of every neuron of a site, exactly, for the price of a few tokens.

The activation of one layer's site at the *last* position is scaled by alpha from 0 to 1 while
everything else is left alone, and each neuron is credited with its share of the change of the
answer's probability (QRNCA, arXiv 2406.10868, section 2 of the method). A causal model computes
the same keys and values before that position whatever alpha is, so:

1. `prefill` runs the prompt once and keeps keys, values and the residual as it enters each layer.
2. A *row* is one token, for one (layer, alpha): it enters at its layer with the stored residual,
   its site scaled by alpha, and runs through the layers above against the cached keys and values.
3. `jax.grad` of the rows' answer probabilities with respect to their scales gives f * dP/df for
   every neuron; the weighted sum over alpha is the attribution.

Rows are sorted by layer and enter in a few groups, so that little work is done below a row's layer.

`integrated_gradients` is pure and composes with the caller's `jit`, `vmap` and sharding.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxneurons import layers, transformer
from jaxneurons.config import ModelConfig
from jaxneurons.errors import ConfigError
from jaxneurons.neurons import check_site, site_width
from jaxneurons.quadrature import PANEL_NODES, Quadrature, left_radau, nodes_and_weights

NOISE = 3e-5
"""Completeness gaps below NOISE * P * (1 - P) are float32 rounding of the logits."""

EPSILON = float(np.finfo(np.float32).eps)


class Attribution(NamedTuple):
    """Scores of every neuron of a site, with what is known about their error.

    For an answer of several tokens everything is the mean over its steps (`nodes`: the sum).

    Attributes:
      scores: share of the answer's probability, [batch, layers, width] float32.
      probability: of the answer token, model untouched, [batch].
      ablated: the same with the layer's site scaled to 0 at the last position, [batch, layers].
      gap: |sum of the layer's scores - (probability - ablated)|, [batch, layers], in probability.
      error: estimate of the scores' L2 error relative to their L2 norm, [batch, layers]; `adaptive`
        sums the gaps of the panels it accepted, a fixed rule knows only the gap.
      nodes: quadrature nodes spent, [batch, layers] int32.
    """

    scores: Float[Array, "batch layer width"]
    probability: Float[Array, " batch"]
    ablated: Float[Array, "batch layer"]
    gap: Float[Array, "batch layer"]
    error: Float[Array, "batch layer"]
    nodes: Int[Array, "batch layer"]


class Prefill(NamedTuple):
    """A prompt, run once: all that its rows need.

    Attributes:
      cache: keys and values of every position.
      residual: the stream as it enters each layer, at the answer positions.
      positions: the position before each answer token.
      targets: the answer tokens.
      probability: of each answer token, model untouched.
      logits: at the answer positions, float32.
    """

    cache: transformer.Cache
    residual: Float[Array, "layer batch answer hidden"]
    positions: Int[Array, "batch answer"]
    targets: Int[Array, "batch answer"]
    probability: Float[Array, "batch answer"]
    logits: Float[Array, "batch answer vocab"]


def integrated_gradients(
    params: transformer.Params,
    tokens: Int[Array, "batch seq"],
    targets: Int[Array, "batch *answer"],
    *,
    config: ModelConfig,
    lengths: Int[Array, " batch"] | None = None,
    answer_lengths: Int[Array, " batch"] | None = None,
    site: str = "up",
    quadrature: Quadrature = Quadrature(),
    chunk_rows: int | None = None,
    memory_budget: int = 1 << 30,
) -> Attribution:
    """Integrated gradients of the answer's probability, per layer, at the last prompt position.

    Args:
      params: the model's parameters.
      tokens: prompts, right-padded.
      targets: the answer: one token [batch], or several [batch, answer], right-padded, attributed
        by teacher forcing: one attribution at each answer step, averaged.
      config: the model's shape.
      lengths: real tokens of each prompt; default: all.
      answer_lengths: real tokens of each answer; default: all.
      site: which activation is scaled; one of `neurons.SITES`.
      quadrature: rule and tolerance.
      chunk_rows: rows evaluated together; default: what the memory budget allows, up to what
        keeps the platform busy.
      memory_budget: bytes that a chunk's activations may take.

    Returns:
      Scores and their error: see `Attribution`.

    Raises:
      ConfigError: unknown site or rule, or shapes that do not fit.
    """
    check_site(site)
    if tokens.ndim != 2 or targets.ndim not in (1, 2) or len(targets) != len(tokens):
        raise ConfigError(
            f"tokens [batch, seq] and targets [batch] or [batch, answer] are needed, "
            f"got {tokens.shape} and {targets.shape}"
        )
    targets = targets if targets.ndim == 2 else targets[:, None]
    if lengths is None:
        lengths = jnp.full(tokens.shape[:1], tokens.shape[1], jnp.int32)
    pre = prefill(params, tokens, targets, config=config, lengths=lengths)
    return attribute(
        params,
        pre,
        config=config,
        answer_lengths=answer_lengths,
        site=site,
        quadrature=quadrature,
        chunk_rows=chunk_rows,
        memory_budget=memory_budget,
    )


def attribute(
    params: transformer.Params,
    pre: Prefill,
    *,
    config: ModelConfig,
    answer_lengths: Int[Array, " batch"] | None = None,
    site: str = "up",
    quadrature: Quadrature = Quadrature(),
    chunk_rows: int | None = None,
    memory_budget: int = 1 << 30,
) -> Attribution:
    """`integrated_gradients` of prompts that `prefill` has run, with the same arguments."""
    check_site(site)
    batch, answers = pre.targets.shape
    if answer_lengths is None:
        answer_lengths = jnp.full((batch,), answers, jnp.int32)
    rows = chunk_rows or rows_in_budget(config, pre.cache.k.shape[2], memory_budget)
    rows = max(1, rows // (batch * answers))

    if quadrature.rule == "adaptive":
        parts = _adaptive(params, pre, config=config, site=site, quadrature=quadrature, rows=rows)
    else:
        x, w = nodes_and_weights(quadrature.rule, quadrature.steps)
        parts = _fixed(params, pre, x, w, config=config, site=site, rows=rows)
    scores, ablated, error, nodes = parts
    gap = jnp.abs(scores.sum(-1) - (pre.probability[..., None] - ablated))
    error = gap if error is None else error
    error = error / jnp.maximum(jnp.linalg.norm(scores, axis=-1), jnp.finfo(jnp.float32).tiny)

    real = (jnp.arange(answers) < answer_lengths[:, None]).astype(jnp.float32)
    share = real / jnp.maximum(real.sum(-1, keepdims=True), 1)

    def mean(x: Array) -> Array:
        return jnp.einsum("ba...,ba->b...", x, share)

    return Attribution(
        scores=mean(scores),
        probability=mean(pre.probability),
        ablated=mean(ablated),
        gap=mean(gap),
        error=mean(error),
        nodes=jnp.einsum("bal,ba->bl", nodes, real).astype(jnp.int32),
    )


def prefill(
    params: transformer.Params,
    tokens: Int[Array, "batch seq"],
    targets: Int[Array, "batch answer"],
    *,
    config: ModelConfig,
    lengths: Int[Array, " batch"],
) -> Prefill:
    """Run prompts (and all but the last token of their answers) once."""
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
    dtype = params["embed"]["embedding"].dtype
    out = transformer.forward(
        params,
        tokens,
        config=config,
        lengths=lengths,
        at=positions,
        cache=transformer.init_cache(config, batch, seq, dtype),
        capture=("residual",),
    )
    probability = layers.token_probability(params, out.final, targets, config)
    assert out.cache is not None
    residual = out.activations["residual"]
    return Prefill(out.cache, residual, positions, targets, probability, out.logits)


def row_probabilities(
    params: transformer.Params,
    pre: Prefill,
    layer: Int[Array, "batch answer row"],
    scales: Float[Array, "batch answer row width"],
    *,
    config: ModelConfig,
    site: str,
    entries: tuple[tuple[int, int], ...] | None = None,
) -> Float[Array, "batch answer row"]:
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
    """
    batch, answers, rows = layer.shape
    entries = ((0, rows),) if entries is None else entries
    # Rows outermost, so that a group of rows is a prefix.
    layer = layer.swapaxes(1, 2).reshape(batch, rows * answers)
    scales = scales.swapaxes(1, 2).reshape(batch, rows * answers, -1)
    positions = jnp.tile(pre.positions, (1, rows))
    cos, sin = layers.rope_angles(positions, config)
    keys = jnp.broadcast_to(jnp.arange(pre.cache.k.shape[2]), (batch, pre.cache.k.shape[2]))
    # The row itself is not in the cache: it sees strictly earlier keys, and itself.
    mask = layers.visible(positions, keys, config.sliding_window)
    mask &= keys[:, None, :] < positions[..., None]

    # Keep only matmul results for the backward pass: without this policy every layer's weights
    # would be copied into the list of saved values.
    keep = jax.checkpoint_policies.dots_saveable

    @functools.partial(jax.checkpoint, policy=keep, prevent_cse=False)
    def step(x: Array, scales: Array, index: Array) -> Array:
        def pick(stack: Array) -> Array:
            return jax.lax.dynamic_index_in_dim(stack, index, 0, keepdims=False)

        active = x.shape[1]
        k, v, stored = pick(pre.cache.k), pick(pre.cache.v), pick(pre.residual)
        here = (layer[:, :active] == index)[..., None]
        y, _ = layers.block(
            jax.tree.map(pick, params["layers"]),
            jnp.where(here, jnp.tile(stored, (1, active // answers, 1)), x),
            config=config,
            rotate=lambda heads: layers.rotate(heads, cos[:, :active], sin[:, :active]),
            attend=lambda q, own_k, own_v: layers.row_attention(
                q, own_k, own_v, k, v, mask[:, :active]
            ),
            scales={site: jnp.where(here, scales, 1)},
        )
        return y

    x = jnp.zeros((batch, 0, config.hidden_size), pre.residual.dtype)
    ends = [first for first, _ in entries[1:]] + [config.num_layers]
    for (first, active), end in zip(entries, ends, strict=True):
        x = jnp.pad(x, ((0, 0), (0, active * answers - x.shape[1]), (0, 0)))
        inside = scales[:, : active * answers]
        x, _ = jax.lax.scan(
            lambda x, index, inside=inside: (step(x, inside, index), None),
            x,
            jnp.arange(first, end),
        )
    targets = jnp.tile(pre.targets, (1, rows))
    p = layers.token_probability(params, x, targets, config)
    return p.reshape(batch, rows, answers).swapaxes(1, 2)


def _evaluate(
    params: transformer.Params, pre: Prefill, layer: Array, alpha: Array, **model: Any
) -> tuple[Array, Array]:
    """P [batch, answer, row] and dP/dscale [batch, answer, row, width] at each (layer, alpha)."""
    width = site_width(model["config"], model["site"])
    scales = jnp.broadcast_to(alpha[..., None].astype(jnp.float32), (*alpha.shape, width))

    def total(scales: Array) -> tuple[Array, Array]:
        p = row_probabilities(params, pre, layer, scales, **model)
        return p.sum(), p

    (_, p), gradient = jax.value_and_grad(total, has_aux=True)(scales)
    return p, gradient


def _fixed(
    params: transformer.Params,
    pre: Prefill,
    x: np.ndarray,
    w: np.ndarray,
    *,
    config: ModelConfig,
    site: str,
    rows: int,
) -> tuple[Array, Array, None, Array]:
    """The same nodes in every layer: scores, P(0), no error estimate, nodes."""
    # Completeness needs P(0): a node of weight 0, where the rule has none there.
    extra = np.zeros(0 if 0.0 in x else 1)
    x, w = np.concatenate([extra, x]), np.concatenate([extra, w])
    zero = int(np.flatnonzero(x == 0.0)[0])
    p, integral = _sweep(params, pre, x, w, config=config, site=site, rows=rows)
    nodes = jnp.full((*pre.targets.shape, config.num_layers), len(w) - len(extra), jnp.int32)
    return integral, p[..., zero], None, nodes


GROUPS = 6
"""Groups of layers that rows enter by: more groups skip more work and compile longer."""


def _sweep(
    params: transformer.Params,
    pre: Prefill,
    x: np.ndarray,
    w: np.ndarray,
    *,
    config: ModelConfig,
    site: str,
    rows: int,
) -> tuple[Array, Array]:
    """Every layer at nodes `x`: P [batch, answer, layer, node] and the integral [..., width]."""
    count, steps, shape = config.num_layers, len(x), pre.targets.shape
    passes = -(-steps // max(1, rows // count))
    each = -(-steps // passes)  # nodes of every layer in one pass
    pad = passes * each - steps
    alpha = np.concatenate([x, np.zeros(pad)]).reshape(passes, each)
    weight = np.concatenate([w, np.zeros(pad)]).reshape(passes, each)
    bounds = np.linspace(0, count, min(GROUPS, count) + 1).astype(int).tolist()
    entries = tuple((a, b * each) for a, b in zip(bounds[:-1], bounds[1:], strict=True))
    everyone = (*shape, count * each)
    layer = jnp.broadcast_to(jnp.repeat(jnp.arange(count), each), everyone)

    def one(integral: Array, nodes: tuple[Array, Array]) -> tuple[Array, Array]:
        alpha, weight = nodes
        p, gradient = _evaluate(
            params,
            pre,
            layer,
            jnp.broadcast_to(jnp.tile(alpha, count), everyone),
            config=config,
            site=site,
            entries=entries,
        )
        gradient = gradient.reshape(*shape, count, each, -1)
        p = p.reshape(*shape, count, each)
        return integral + jnp.einsum("balmw,m->balw", gradient, weight), p

    integral = jnp.zeros((*shape, count, site_width(config, site)), jnp.float32)
    nodes = (jnp.asarray(alpha, jnp.float32), jnp.asarray(weight, jnp.float32))
    integral, p = jax.lax.scan(one, integral, nodes)
    p = jnp.moveaxis(p, 0, -2).reshape(*shape, count, passes * each)
    return p[..., :steps], integral


class _Panels(NamedTuple):
    """Intervals of the path of one layer each, per (batch, answer): [panel]."""

    layer: Array
    left: Array
    right: Array
    p_right: Array  # the answer's probability at the right end; at the left end a node knows it
    mass: Array  # share of the L2 norm of the panel it was cut from


class _Search(NamedTuple):
    """What the adaptive rule has accepted and what waits, for one (batch, answer)."""

    total: Array  # [layers, width] integrals of accepted panels
    error: Array  # [layers] their gaps, added up
    nodes: Array  # [layers] nodes spent
    waiting: _Panels  # a stack, [capacity] each
    size: Array  # panels on it


CAPACITY = 64
"""Panels that can wait for one prompt; a split that does not fit is not made."""

ROUND_ROWS = 50
"""Rows of a refining round over all prompts, as far as three panels for each allow."""

FAR_OFF = 100.0
"""A panel whose gap is this many times too large is cut at all its nodes, others in two."""


def _adaptive(
    params: transformer.Params,
    pre: Prefill,
    *,
    config: ModelConfig,
    site: str,
    quadrature: Quadrature,
    rows: int,
) -> tuple[Array, Array, Array, Array]:
    """Panels of left Gauss-Radau nodes, split where their completeness gap is too large.

    A panel's left end is a node and its right end the next panel's left end (or alpha = 1), so its
    integral, summed over neurons, can be checked against the difference of its end values. Panels
    are cut at their nodes, where the probability is already known.
    """
    x, w = left_radau(PANEL_NODES)
    count, width = config.num_layers, site_width(config, site)
    shape = pre.targets.shape
    p, integral = _sweep(params, pre, x, w, config=config, site=site, rows=rows)
    ablated = p[..., 0]

    everyone = (*shape, count)
    panels = _Panels(
        layer=jnp.broadcast_to(jnp.arange(count), everyone),
        left=jnp.zeros(everyone, jnp.float32),
        right=jnp.ones(everyone, jnp.float32),
        p_right=jnp.broadcast_to(pre.probability[..., None], everyone),
        mass=jnp.zeros(everyone, jnp.float32),
    )

    settle = jax.vmap(jax.vmap(functools.partial(_settle, quadrature=quadrature, x=x)))
    none = jnp.zeros((*shape, CAPACITY), jnp.float32)
    search = _Search(
        total=jnp.zeros((*shape, count, width), jnp.float32),
        error=jnp.zeros(everyone, jnp.float32),
        nodes=jnp.zeros(everyone, jnp.int32),
        waiting=_Panels(none.astype(jnp.int32), none, none, none, none),
        size=jnp.zeros(shape, jnp.int32),
    )
    search = settle(search, panels, jnp.ones(everyone, bool), p, integral)

    queries = shape[0] * shape[1]
    each = int(np.clip(ROUND_ROWS // (PANEL_NODES * queries), 3, max(rows // PANEL_NODES, 1)))

    def round_(search: _Search) -> _Search:
        at = search.size[..., None] - 1 - jnp.arange(each)
        valid = at >= 0
        panels = jax.tree.map(
            lambda waiting: jnp.take_along_axis(waiting, jnp.maximum(at, 0), axis=-1),
            search.waiting,
        )
        # An empty place costs least where the fewest layers are above it.
        layer = jnp.where(valid, panels.layer, count - 1)
        span = (panels.right - panels.left)[..., None]
        alpha = panels.left[..., None] + span * x.astype(np.float32)
        p, gradient = _evaluate(
            params,
            pre,
            jnp.repeat(layer, PANEL_NODES, axis=-1),
            alpha.reshape(*shape, each * PANEL_NODES),
            config=config,
            site=site,
        )
        p = p.reshape(*shape, each, PANEL_NODES)
        gradient = gradient.reshape(*shape, each, PANEL_NODES, width)
        integral = span * jnp.einsum("bapnw,n->bapw", gradient, w.astype(np.float32))
        search = search._replace(size=jnp.maximum(search.size - each, 0))
        return settle(search, panels, valid, p, integral)

    search = jax.lax.while_loop(lambda search: jnp.any(search.size > 0), round_, search)
    return search.total, ablated, search.error, search.nodes


def _settle(
    search: _Search,
    panels: _Panels,
    valid: Array,
    p: Array,
    integral: Array,
    *,
    quadrature: Quadrature,
    x: np.ndarray,
) -> _Search:
    """Accept the panels that are good enough and put the parts of the others on the stack.

    Args:
      search: the state of one (batch, answer).
      panels: the panels just evaluated, [panel].
      valid: which of them are real.
      p: probability at their nodes, [panel, node].
      integral: their integrals, [panel, width].
      quadrature: tolerance and most nodes.
      x: the nodes on [0, 1].
    """
    count, steps = len(search.error), len(x)
    layer = jnp.where(valid, panels.layer, count)  # one_hot of `count` is all zeros
    where = jax.nn.one_hot(layer, count)
    # A layer's norm as far as it is known: accepted, just evaluated, and a guess for what waits.
    waits = jnp.where(jnp.arange(CAPACITY) < search.size, search.waiting.layer, count)
    guess = jax.nn.one_hot(waits, count).T @ jnp.square(search.waiting.mass)
    known = search.total + where.T @ integral
    norm = jnp.sqrt(jnp.square(known).sum(-1) + guess)
    gap = jnp.abs(integral.sum(-1) - (panels.p_right - p[:, 0]))
    ends = jnp.concatenate([p, panels.p_right[:, None]], axis=-1)
    noise = jnp.max(NOISE * ends * (1 - ends) + 4 * EPSILON * ends, axis=-1)
    allowed = quadrature.tolerance * norm[panels.layer] + noise
    excess = jnp.where(valid, gap / jnp.maximum(allowed, jnp.finfo(jnp.float32).tiny), 0.0)

    # Split the worst first, while stack and nodes last.
    order = jnp.argsort(-excess)
    panels = jax.tree.map(lambda a: a[order], panels)
    excess, gap, ends, where = excess[order], gap[order], ends[order], where[order]
    integral, valid = integral[order], valid[order]
    pieces = jnp.where(excess > 1, jnp.where(excess > FAR_OFF, steps, 2), 0)
    nodes = search.nodes + (steps * where.sum(0)).astype(jnp.int32)
    waiting = search.size + jnp.cumsum(pieces)
    fits = (waiting <= CAPACITY) & (nodes.sum() + steps * waiting <= quadrature.max_nodes * count)
    split = (pieces > 0) & fits
    keep = where * (valid & ~split)[:, None]

    edges = jnp.asarray(np.append(x, 1.0), jnp.float32)
    middle = int(np.argmin(np.abs(x - 0.5)))
    part = jnp.arange(steps)
    in_two = (pieces == 2)[:, None]
    low = jnp.where(in_two, jnp.where(part == 0, 0, middle), part)
    high = jnp.where(in_two, jnp.where(part == 0, middle, steps), part + 1)
    span = (panels.right - panels.left)[:, None]
    parts = _Panels(
        layer=jnp.broadcast_to(panels.layer[:, None], low.shape),
        left=panels.left[:, None] + span * edges[low],
        right=panels.left[:, None] + span * edges[high],
        p_right=jnp.take_along_axis(ends, high, axis=-1),
        mass=jnp.linalg.norm(integral, axis=-1)[:, None] * (edges[high] - edges[low]),
    )
    real = (split[:, None] & (part < pieces[:, None])).reshape(-1)
    place = jnp.where(real, search.size + jnp.cumsum(real) - 1, CAPACITY)
    return _Search(
        total=search.total + keep.T @ integral,
        error=search.error + keep.T @ gap,
        nodes=nodes,
        waiting=jax.tree.map(
            lambda stack, new: stack.at[place].set(new.reshape(-1), mode="drop"),
            search.waiting,
            parts,
        ),
        size=search.size + real.sum(),
    )


def rows_in_budget(config: ModelConfig, keys: int, memory_budget: int) -> int:
    """Rows that can be evaluated together within `memory_budget` bytes of activations.

    Counts what the backward pass keeps for each row (the matmul results of every layer and the
    vocabulary's logits and probabilities), in float32. More rows than keep the platform busy bring
    nothing, and small chunks skip more layers.
    """
    per_layer = (
        2 * config.intermediate_size
        + 2 * config.hidden_size
        + 2 * config.query_width
        + 2 * config.kv_width
        + config.num_heads * (keys + 1)
    )
    per_row = 4 * (config.num_layers * per_layer + 3 * config.vocab_size)
    busy = 512 if jax.default_backend() == "cpu" else 1024
    return max(1, min(memory_budget // per_row, busy))
