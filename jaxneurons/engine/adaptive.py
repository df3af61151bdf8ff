"""The adaptive rule: panels of the path, split only where they are not resolved yet.

A panel is a Gauss-Lobatto rule on a part of a layer's path. Its ends are nodes, so its integral,
summed over neurons, is checked against the difference of its end values (the completeness gap, for
every panel, for free), and a panel that is cut at its nodes leaves parts whose ends are known: each
costs the inner nodes only. The end at alpha = 1 is the untouched model, one row for all layers.

Layers whose path is smooth cost one panel. Where scaling the site turns the residual stream over (a
small embedding and a large first layer), the path is a curve through directions that bends near
alpha = 0; it is parametrised by t, in which it does not, and starts with several panels: see
`parametrisation`.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from jaxneurons.engine.parametrisation import EXTRA, Parametrisation, first_panels, parametrise
from jaxneurons.engine.quadrature import PANEL_NODES, Quadrature, lobatto
from jaxneurons.engine.rows import Prefill, evaluate, evaluate_with_untouched, grouped
from jaxneurons.model.config import ModelConfig
from jaxneurons.model.parameters import Params
from jaxneurons.neurons.sets import Site, site_width

X, W = (a.astype(np.float32) for a in lobatto(PANEL_NODES))
INNER = PANEL_NODES - 2
HALVES = (0, PANEL_NODES // 2, PANEL_NODES - 1)

NOISE = 3e-5
"""Completeness gaps below NOISE * P * (1 - P) are float32 rounding of the logits."""

EPSILON = float(np.finfo(np.float32).eps)

CAPACITY = 64
"""Panels that can wait for one prompt; a split that does not fit is not made."""

ROUND_ROWS = 48
"""Rows of a refining round over all prompts, as far as four panels for each allow."""

FAR_OFF = 100.0
"""A panel whose error is this many times too large is cut at all its nodes, others in two."""


class Panels(NamedTuple):
    """Parts of the path of one layer each, both ends known: [..., panel]."""

    layer: Array
    left: Array  # in t
    right: Array
    p_left: Array
    p_right: Array
    g_left: Array  # dP/dscale [..., panel, width]
    g_right: Array
    mass: Array  # share of the L2 norm of the panel it was cut from


class Search(NamedTuple):
    """What the adaptive rule has accepted and what waits, for one (batch, answer)."""

    total: Array  # [layers, width] integrals of accepted panels
    error: Array  # [layers] their estimated errors, added up
    nodes: Array  # [layers] nodes spent
    waiting: Panels  # a stack, [capacity] each
    size: Array  # panels on it


class Estimate(NamedTuple):
    """What the nodes of panels say of their integrals: [panel]."""

    panels: Panels
    one_hot: Array  # [panel, layers] 1 at the panel's layer; all 0 where there is no panel
    probability: Array  # [panel, node], ends included
    gradient: Array  # dP/dscale [panel, node, width]
    integral: Array  # [panel, width]
    error: Array  # estimated, of the integral
    excess: Array  # how many times larger than allowed; 0 where there is no panel


def adaptive(
    params: Params,
    pre: Prefill,
    *,
    config: ModelConfig,
    site: Site,
    quadrature: Quadrature,
    rows: int,
) -> tuple[Array, Array, Array, Array]:
    """Panels of Gauss-Lobatto nodes, cut at their nodes where the estimated error is too large.

    Returns:
      Integrals [batch, answer, layer, width]; probability at alpha = 0, errors of the accepted
      panels added up, and nodes spent, each [batch, answer, layer].
    """
    count, width = config.num_layers, site_width(config, site)
    shape = pre.targets.shape
    path = parametrise(pre, site)
    extra = min(EXTRA, (quadrature.max_nodes - (INNER + 1)) * count // (INNER + 1))
    panels, valid, p, gradient = _first_pass(
        params, pre, path, config=config, site=site, extra=extra, rows=rows
    )
    ablated = panels.p_left[..., extra:]

    refine_all = jax.vmap(jax.vmap(functools.partial(refine, quadrature=quadrature)))
    nodes = _per_layer(panels.layer, valid, count).astype(jnp.int32)
    search = refine_all(_empty(nodes, width), path, panels, valid, p, gradient)

    queries = shape[0] * shape[1]
    together = int(np.clip(ROUND_ROWS // (INNER * queries), 4, max(rows // INNER, 1)))

    def one_round(search: Search) -> Search:
        """The panels on top of each stack are evaluated: accepted, or cut and put back."""
        at = search.size[..., None] - 1 - jnp.arange(together)
        valid = at >= 0
        take = jax.vmap(jax.vmap(lambda stack, at: stack[jnp.maximum(at, 0)]))
        panels = jax.tree.map(lambda stack: take(stack, at), search.waiting)
        # An empty place must name some layer.
        layer = jnp.where(valid, panels.layer, count - 1)
        alpha, _ = path.of_layers(layer).alpha(_nodes(panels)[..., 1:-1])
        p, gradient = evaluate(
            params,
            pre,
            jnp.repeat(layer, INNER, axis=-1),
            alpha.reshape(*shape, together * INNER),
            config=config,
            site=site,
        )
        p = p.reshape(*shape, together, INNER)
        gradient = gradient.reshape(*shape, together, INNER, width)
        search = search._replace(size=jnp.maximum(search.size - together, 0))
        return refine_all(search, path, panels, valid, p, gradient)

    search = jax.lax.while_loop(lambda search: jnp.any(search.size > 0), one_round, search)
    return search.total, ablated, search.error, search.nodes


def _empty(nodes: Array, width: int) -> Search:
    """Nothing accepted and nothing waiting; `nodes` [batch, answer, layer] of the first pass."""
    *shape, count = nodes.shape
    none = jnp.zeros((*shape, CAPACITY), jnp.float32)
    wide = jnp.zeros((*shape, CAPACITY, width), jnp.float32)
    return Search(
        total=jnp.zeros((*shape, count, width), jnp.float32),
        error=jnp.zeros((*shape, count), jnp.float32),
        nodes=nodes,
        waiting=Panels(none.astype(jnp.int32), none, none, none, none, wide, wide, none),
        size=jnp.zeros(shape, jnp.int32),
    )


def _per_layer(layer: Array, valid: Array, count: int) -> Array:
    """Nodes of first-pass panels [..., panel], added up by layer."""
    where = jax.nn.one_hot(layer, count)
    return (INNER + 1) * jnp.where(valid[..., None], where, 0).sum(-2)


def _nodes(panels: Panels) -> Array:
    """The panels' nodes in t: [..., panel, node]."""
    span = (panels.right - panels.left)[..., None]
    return panels.left[..., None] + span * X


def _first_pass(
    params: Params,
    pre: Prefill,
    path: Parametrisation,
    *,
    config: ModelConfig,
    site: Site,
    extra: int,
    rows: int,
) -> tuple[Panels, Array, Array, Array]:
    """The panels of the first pass, evaluated.

    Returns:
      The panels [batch, answer, extra + layers], which of them are real, and P [..., node] and
      dP/dscale [..., node, width] at their inner nodes.
    """
    layer, valid, left, right, following, last = first_panels(path, extra=extra)
    t = left[..., None] + (right - left)[..., None] * X[:-1]
    alpha, _ = path.of_layers(layer).alpha(t)
    p, gradient, untouched = _at_left_and_inner_nodes(
        params, pre, layer, alpha, config=config, site=site, rows=rows
    )
    # A panel's right end is the left end of its layer's next panel, or the untouched model.
    of_layer = jnp.take_along_axis(untouched, layer[..., None], axis=-2)
    of_next = jnp.take_along_axis(gradient[..., 0, :], following[..., None], axis=-2)
    panels = Panels(
        layer=layer,
        left=left,
        right=right,
        p_left=p[..., 0],
        p_right=jnp.where(
            last,
            pre.probability[..., None],
            jnp.take_along_axis(p[..., 0], following, axis=-1),
        ),
        g_left=gradient[..., 0, :],
        g_right=jnp.where(last[..., None], of_layer, of_next),
        mass=jnp.zeros(layer.shape, jnp.float32),
    )
    return panels, valid, p[..., 1:], gradient[..., 1:, :]


def _at_left_and_inner_nodes(
    params: Params,
    pre: Prefill,
    layer: Array,
    alpha: Array,
    *,
    config: ModelConfig,
    site: Site,
    rows: int,
) -> tuple[Array, Array, Array]:
    """The panels of the first pass at alpha [batch, answer, panel, node], `rows` rows at a time.

    Returns:
      P [..., panel, node], dP/dscale [..., panel, node, width], and dP/dscale of the untouched
      model [batch, answer, layer, width].
    """
    shape, total = pre.targets.shape, layer.shape[-1]
    extra = total - config.num_layers
    # Nodes of every panel evaluated together; at least one.
    together = int(np.clip(rows // total, 1, INNER + 1))
    passes = -(-(INNER + 1) // together)
    alpha = jnp.pad(alpha, ((0, 0),) * 3 + ((0, passes * together - alpha.shape[-1]),))
    alpha = alpha.reshape(*shape, total, passes, together)

    def one_pass(alpha: Array) -> tuple[Array, Array, Array]:
        p, gradient, untouched = evaluate_with_untouched(
            params,
            pre,
            jnp.repeat(layer, together, axis=-1),
            alpha.reshape(*shape, total * together),
            config=config,
            site=site,
            entries=grouped(config.num_layers, together, extra * together),
        )
        p = p.reshape(*shape, total, together)
        return p, gradient.reshape(*shape, total, together, -1), untouched

    if passes == 1:
        return one_pass(alpha[..., 0, :])
    p, gradient, untouched = jax.lax.map(one_pass, jnp.moveaxis(alpha, -2, 0))
    p = jnp.moveaxis(p, 0, -2).reshape(*shape, total, -1)
    gradient = jnp.moveaxis(gradient, 0, -3).reshape(*shape, total, passes * together, -1)
    return p[..., : INNER + 1], gradient[..., : INNER + 1, :], untouched[0]


def refine(
    search: Search,
    path: Parametrisation,
    panels: Panels,
    valid: Array,
    p: Array,
    gradient: Array,
    *,
    quadrature: Quadrature,
) -> Search:
    """Accept the panels that are good enough and put the parts of the others on the stack.

    Args:
      search: the state of one (batch, answer).
      path: how alpha depends on t, [layer].
      panels: the panels just evaluated, [panel].
      valid: which of them are real.
      p: probability at their inner nodes, [panel, INNER].
      gradient: dP/dscale there, [panel, INNER, width].
      quadrature: tolerance and most nodes.
    """
    estimates = estimate(search, path, panels, valid, p, gradient, tolerance=quadrature.tolerance)
    estimates, parts = decide(search, estimates, max_nodes=quadrature.max_nodes)
    return cut(search, estimates, parts)


def estimate(
    search: Search,
    path: Parametrisation,
    panels: Panels,
    valid: Array,
    p: Array,
    gradient: Array,
    *,
    tolerance: float,
) -> Estimate:
    """Integrals of panels and how far they may be off; arguments as of `refine`."""
    count = len(search.error)
    # At all nodes, ends included; gradients with respect to t.
    p = jnp.concatenate([panels.p_left[:, None], p, panels.p_right[:, None]], axis=1)
    ends = panels.g_left[:, None], panels.g_right[:, None]
    gradient = jnp.concatenate([ends[0], gradient, ends[1]], axis=1)
    span = (panels.right - panels.left)[:, None]
    _, slope = path.of_layers(panels.layer).alpha(_nodes(panels))
    integral = jnp.einsum("pnw,pn->pw", gradient, span * slope * W)
    simpson = span * slope[:, HALVES] * np.array([1, 4, 1], np.float32) / 6
    coarse = jnp.einsum("pnw,pn->pw", gradient[:, HALVES], simpson)

    layer = jnp.where(valid, panels.layer, count)  # one_hot of `count` is all zeros
    one_hot = jax.nn.one_hot(layer, count)
    # A layer's norm as far as it is known: accepted, just evaluated, and a guess for what waits.
    waits = jnp.where(jnp.arange(CAPACITY) < search.size, search.waiting.layer, count)
    guess = jax.nn.one_hot(waits, count).T @ jnp.square(search.waiting.mass)
    known = search.total + one_hot.T @ integral
    norm = jnp.sqrt(jnp.square(known).sum(-1) + guess)[panels.layer]
    norm = jnp.maximum(norm, jnp.finfo(jnp.float32).tiny)
    # The gap sees the sum over neurons only. Simpson's rule on three of the nodes has half the
    # order, so the square of its relative error has the size of this rule's, in every direction.
    gap = jnp.abs(integral.sum(-1) - (panels.p_right - panels.p_left))
    noise = jnp.max(NOISE * p * (1 - p) + 4 * EPSILON * p, axis=-1)
    vector = jnp.square(jnp.linalg.norm(integral - coarse, axis=-1)) / norm
    allowed = tolerance * norm
    # The gap is in probability: where attributions are larger than 1 they allow it no more.
    gap_allowed = jnp.minimum(allowed, tolerance) + noise
    excess = jnp.maximum(gap / gap_allowed, vector / allowed)
    excess = jnp.where(valid, excess, 0.0)
    return Estimate(panels, one_hot, p, gradient, integral, jnp.maximum(gap, vector), excess)


def decide(search: Search, estimates: Estimate, *, max_nodes: int) -> tuple[Estimate, Array]:
    """Which panels are cut: the worst first, while stack and nodes last.

    Returns:
      The estimates, worst first, and the number of parts that each panel is cut into: 0 where it is
      accepted.
    """
    order = jnp.argsort(-estimates.excess)
    estimates = jax.tree.map(lambda a: a[order], estimates)
    excess = estimates.excess
    parts = jnp.where(excess > 1, jnp.where(excess > FAR_OFF, PANEL_NODES - 1, 2), 0)
    waiting = search.size + jnp.cumsum(parts)
    most = max_nodes * len(search.error)
    fits = (waiting <= CAPACITY) & (search.nodes.sum() + INNER * waiting <= most)
    return estimates, jnp.where(fits, parts, 0)


def cut(search: Search, estimates: Estimate, parts: Array) -> Search:
    """Add up the accepted panels and put the parts of the others on the stack.

    Args:
      search: the state of one (batch, answer).
      estimates: of the panels just evaluated.
      parts: that each is cut into, [panel]; 0: it is accepted.
    """
    panels, p, gradient = estimates.panels, estimates.probability, estimates.gradient
    accepted = jnp.where((parts == 0)[:, None], estimates.one_hot, 0)

    number = jnp.arange(PANEL_NODES - 1)
    in_two = (parts == 2)[:, None]
    low = jnp.where(in_two, jnp.where(number == 0, HALVES[0], HALVES[1]), number)
    high = jnp.where(in_two, jnp.where(number == 0, HALVES[1], HALVES[2]), number + 1)
    left, span = panels.left[:, None], (panels.right - panels.left)[:, None]
    x = jnp.asarray(X)
    pieces = Panels(
        layer=jnp.broadcast_to(panels.layer[:, None], low.shape),
        left=left + span * x[low],
        right=left + span * x[high],
        p_left=jnp.take_along_axis(p, low, axis=1),
        p_right=jnp.take_along_axis(p, high, axis=1),
        g_left=jnp.take_along_axis(gradient, low[..., None], axis=1),
        g_right=jnp.take_along_axis(gradient, high[..., None], axis=1),
        mass=jnp.linalg.norm(estimates.integral, axis=-1)[:, None] * (x[high] - x[low]),
    )
    real = (number < parts[:, None]).reshape(-1)
    place = jnp.where(real, search.size + jnp.cumsum(real) - 1, CAPACITY)
    inner = INNER * (estimates.one_hot * parts[:, None].astype(jnp.float32)).sum(0)
    return Search(
        total=search.total + accepted.T @ estimates.integral,
        error=search.error + accepted.T @ estimates.error,
        nodes=search.nodes + inner.astype(jnp.int32),
        waiting=jax.tree.map(
            lambda stack, new: stack.at[place].set(new.reshape(-1, *stack.shape[1:]), mode="drop"),
            search.waiting,
            pieces,
        ),
        size=search.size + real.sum(),
    )
