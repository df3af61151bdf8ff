"""The adaptive rule: panels of the path, split only where they are not resolved yet.

A panel's left end is a node and its right end the next panel's left end (or alpha = 1), so its
integral, summed over neurons, can be checked against the difference of its end values: the
completeness gap, for every panel, for free. Layers whose path is smooth cost one panel; a layer
with a step on its path gets its nodes where the step is.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from jaxneurons import transformer
from jaxneurons.config import ModelConfig
from jaxneurons.neurons import site_width
from jaxneurons.quadrature import PANEL_NODES, Quadrature, left_radau
from jaxneurons.rows import Prefill, evaluate, sweep

NOISE = 3e-5
"""Completeness gaps below NOISE * P * (1 - P) are float32 rounding of the logits."""

EPSILON = float(np.finfo(np.float32).eps)


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


def adaptive(
    params: transformer.Params,
    pre: Prefill,
    *,
    config: ModelConfig,
    site: str,
    quadrature: Quadrature,
    rows: int,
) -> tuple[Array, Array, Array, Array]:
    """Panels of left Gauss-Radau nodes, cut at their nodes where the gap is too large.

    Returns:
      Integrals [batch, answer, layer, width]; probability at alpha = 0, gaps of the accepted panels
      added up, and nodes spent, each [batch, answer, layer].
    """
    x, w = left_radau(PANEL_NODES)
    count, width = config.num_layers, site_width(config, site)
    shape = pre.targets.shape
    p, integral = sweep(params, pre, x, w, config=config, site=site, rows=rows)
    ablated = p[..., 0]

    everyone = (*shape, count)
    panels = _Panels(
        layer=jnp.broadcast_to(jnp.arange(count), everyone),
        left=jnp.zeros(everyone, jnp.float32),
        right=jnp.ones(everyone, jnp.float32),
        p_right=jnp.broadcast_to(pre.probability[..., None], everyone),
        mass=jnp.zeros(everyone, jnp.float32),
    )

    settle_all = jax.vmap(jax.vmap(functools.partial(settle, quadrature=quadrature, x=x)))
    none = jnp.zeros((*shape, CAPACITY), jnp.float32)
    search = _Search(
        total=jnp.zeros((*shape, count, width), jnp.float32),
        error=jnp.zeros(everyone, jnp.float32),
        nodes=jnp.zeros(everyone, jnp.int32),
        waiting=_Panels(none.astype(jnp.int32), none, none, none, none),
        size=jnp.zeros(shape, jnp.int32),
    )
    search = settle_all(search, panels, jnp.ones(everyone, bool), p, integral)

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
        p, gradient = evaluate(
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
        return settle_all(search, panels, valid, p, integral)

    search = jax.lax.while_loop(lambda search: jnp.any(search.size > 0), round_, search)
    return search.total, ablated, search.error, search.nodes


def settle(
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
