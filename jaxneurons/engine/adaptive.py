"""The adaptive rule: panels of the path, split only where they are not resolved yet.

A panel is a Gauss-Lobatto rule on a part of a layer's path. Its ends are nodes, so its integral,
summed over neurons, is checked against the difference of its end values (the completeness gap, for
every panel, for free), and a panel that is cut at its nodes leaves parts whose ends are known: each
costs the inner nodes only. The end at alpha = 1 is the untouched model, one row for all layers.

Layers whose path is smooth cost one panel. Where scaling the site turns the residual stream over (a
small embedding and a large first layer), the path is a curve through directions that bends near
alpha = 0; it is parametrised by t, in which it does not, and starts with several panels. See
`Course`.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from jaxneurons.engine.quadrature import PANEL_NODES, Quadrature, lobatto
from jaxneurons.engine.rows import Prefill, evaluate, evaluate_with_untouched, grouped
from jaxneurons.model import transformer
from jaxneurons.model.config import ModelConfig
from jaxneurons.neurons.sets import site_width

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

EXTRA = 7
"""Panels of the first pass beyond one for each layer: they go to the long ones."""

LONG = 1.0
"""Length (see `Course`) from which a layer's path is parametrised by t."""

STRETCH = 0.35
"""Length of a long path that one panel of the first pass covers."""


class Course(NamedTuple):
    """alpha as a function of t in [0, 1], for each (batch, answer, layer).

    With the site scaled by alpha the layer adds alpha * b to a stream a. What the layers above see,
    its direction and its size against what they add themselves, changes with |a + alpha b| as the
    unit of length: dt ~ dalpha / |a + alpha b|, so alpha(t) = (d sinh(start + t length) - ab) / bb
    with d^2 = aa bb - ab^2. Short paths (length below `LONG`) keep alpha = t.
    """

    start: Array
    length: Array
    scale: Array  # d / bb
    shift: Array  # ab / bb

    def alpha(self, t: Array) -> tuple[Array, Array]:
        """alpha and dalpha/dt at t; the two broadcast against each other."""
        angle = self.start + t * self.length
        bent = self.length > LONG
        alpha = jnp.clip(self.scale * jnp.sinh(angle) - self.shift, 0, 1)
        alpha = jnp.where(bent & (t > 0), alpha, t)
        slope = jnp.where(bent, self.scale * jnp.cosh(angle) * self.length, 1.0)
        return alpha, slope

    def of(self, layer: Array) -> "Course":
        """The courses of these layers, with an axis for their nodes: [..., panel, 1]."""
        return Course(*(jnp.take_along_axis(a, layer, axis=-1)[..., None] for a in self))


def course(pre: Prefill, site: str) -> Course:
    """How the path of each layer is parametrised."""
    if site in ("up", "act", "down"):
        a, b = pre.residual + pre.added["o"], pre.added["down"]
    elif site == "o":
        a, b = pre.residual, pre.added["o"]
    else:  # not linear in alpha
        zero = jnp.zeros(pre.residual.shape[:-1], jnp.float32)
        a = b = zero[..., None]
    a, b = a.astype(jnp.float32), b.astype(jnp.float32)
    aa, bb, ab = (jnp.sum(x * y, axis=-1) for x, y in ((a, a), (b, b), (a, b)))
    tiny = jnp.finfo(jnp.float32).tiny
    bb = jnp.maximum(bb, tiny)
    d = jnp.sqrt(jnp.maximum(aa * bb - ab**2, 1e-6 * aa * bb + tiny))
    start = jnp.arcsinh(ab / d)
    length = jnp.arcsinh((bb + ab) / d) - start
    length = jnp.where(jnp.isfinite(length) & (bb > tiny), length, 0.0)
    return Course(*(jnp.moveaxis(x, 0, -1) for x in (start, length, d / bb, ab / bb)))


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


class _Search(NamedTuple):
    """What the adaptive rule has accepted and what waits, for one (batch, answer)."""

    total: Array  # [layers, width] integrals of accepted panels
    error: Array  # [layers] their estimated errors, added up
    nodes: Array  # [layers] nodes spent
    waiting: Panels  # a stack, [capacity] each
    size: Array  # panels on it


def adaptive(
    params: transformer.Params,
    pre: Prefill,
    *,
    config: ModelConfig,
    site: str,
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
    path = course(pre, site)
    extra = min(EXTRA, (quadrature.max_nodes - (INNER + 1)) * count // (INNER + 1))
    panels, valid, p, gradient = _first_pass(
        params, pre, path, config=config, site=site, extra=extra, rows=rows
    )
    ablated = panels.p_left[..., extra:]

    settle_all = jax.vmap(jax.vmap(functools.partial(settle, quadrature=quadrature)))
    none = jnp.zeros((*shape, CAPACITY), jnp.float32)
    wide = jnp.zeros((*shape, CAPACITY, width), jnp.float32)
    search = _Search(
        total=jnp.zeros((*shape, count, width), jnp.float32),
        error=jnp.zeros((*shape, count), jnp.float32),
        nodes=_per_layer(panels.layer, valid, count).astype(jnp.int32),
        waiting=Panels(none.astype(jnp.int32), none, none, none, none, wide, wide, none),
        size=jnp.zeros(shape, jnp.int32),
    )
    search = settle_all(search, path, panels, valid, p, gradient)

    queries = shape[0] * shape[1]
    each = int(np.clip(ROUND_ROWS // (INNER * queries), 4, max(rows // INNER, 1)))

    def round_(search: _Search) -> _Search:
        at = search.size[..., None] - 1 - jnp.arange(each)
        valid = at >= 0
        take = jax.vmap(jax.vmap(lambda stack, at: stack[jnp.maximum(at, 0)]))
        panels = jax.tree.map(lambda stack: take(stack, at), search.waiting)
        # An empty place must name some layer.
        layer = jnp.where(valid, panels.layer, count - 1)
        alpha, _ = path.of(layer).alpha(_nodes(panels)[..., 1:-1])
        p, gradient = evaluate(
            params,
            pre,
            jnp.repeat(layer, INNER, axis=-1),
            alpha.reshape(*shape, each * INNER),
            config=config,
            site=site,
        )
        p = p.reshape(*shape, each, INNER)
        gradient = gradient.reshape(*shape, each, INNER, width)
        search = search._replace(size=jnp.maximum(search.size - each, 0))
        return settle_all(search, path, panels, valid, p, gradient)

    search = jax.lax.while_loop(lambda search: jnp.any(search.size > 0), round_, search)
    return search.total, ablated, search.error, search.nodes


def _per_layer(layer: Array, valid: Array, count: int) -> Array:
    """Nodes of first-pass panels [..., panel], added up by layer."""
    where = jax.nn.one_hot(layer, count)
    return (INNER + 1) * jnp.where(valid[..., None], where, 0).sum(-2)


def _nodes(panels: Panels) -> Array:
    """The panels' nodes in t: [..., panel, node]."""
    span = (panels.right - panels.left)[..., None]
    return panels.left[..., None] + span * X


def _first_pass(
    params: transformer.Params,
    pre: Prefill,
    path: Course,
    *,
    config: ModelConfig,
    site: str,
    extra: int,
    rows: int,
) -> tuple[Panels, Array, Array, Array]:
    """One panel for each layer and `extra` more for the long ones, lowest layers first.

    Returns:
      The panels [batch, answer, extra + layers] (a layer's first ones last, sorted), which of them
      are real, and P [..., node] and dP/dscale [..., node, width] at their inner nodes.
    """
    count, shape = config.num_layers, pre.targets.shape
    wanted = jnp.where(path.length > LONG, jnp.ceil(path.length / STRETCH), 1.0).astype(jnp.int32)
    wanted = wanted - 1
    before = jnp.cumsum(wanted, axis=-1) - wanted
    given = jnp.clip(extra - before, 0, wanted)
    ends = jnp.cumsum(given, axis=-1)
    place = jnp.arange(extra)
    layer = (ends[..., None, :] <= place[:, None]).sum(-1)
    valid = layer < count
    layer = jnp.minimum(layer, count - 1)
    first = jnp.take_along_axis(ends - given, layer, axis=-1)
    number = jnp.where(valid, place - first + 1, 0)

    layer = jnp.concatenate([layer, jnp.broadcast_to(jnp.arange(count), (*shape, count))], axis=-1)
    number = jnp.concatenate([number, jnp.zeros((*shape, count), number.dtype)], axis=-1)
    valid = jnp.concatenate([valid, jnp.ones((*shape, count), bool)], axis=-1)
    parts = 1 + jnp.take_along_axis(given, layer, axis=-1)
    left, right = number / parts, (number + 1) / parts
    t = left[..., None] + (right - left)[..., None] * X[:-1]
    alpha, _ = path.of(layer).alpha(t)

    total = extra + count
    # Nodes of every panel evaluated together; at least one.
    together = int(np.clip(rows // total, 1, INNER + 1))
    passes = -(-(INNER + 1) // together)
    alpha = jnp.pad(alpha, ((0, 0),) * 3 + ((0, passes * together - alpha.shape[-1]),))
    alpha = alpha.reshape(*shape, total, passes, together)

    def one(alpha: Array) -> tuple[Array, Array, Array]:
        p, gradient, untouched = evaluate_with_untouched(
            params,
            pre,
            jnp.repeat(layer, together, axis=-1),
            alpha.reshape(*shape, total * together),
            config=config,
            site=site,
            entries=grouped(count, together, extra * together),
        )
        p = p.reshape(*shape, total, together)
        return p, gradient.reshape(*shape, total, together, -1), untouched

    if passes == 1:
        p, gradient, untouched = one(alpha[..., 0, :])
    else:
        p, gradient, untouched = jax.lax.map(one, jnp.moveaxis(alpha, -2, 0))
        untouched = untouched[0]
        p = jnp.moveaxis(p, 0, -2).reshape(*shape, total, -1)[..., : INNER + 1]
        gradient = jnp.moveaxis(gradient, 0, -3).reshape(*shape, total, passes * together, -1)
        gradient = gradient[..., : INNER + 1, :]

    # A panel's right end is the left end of its layer's next panel, or the untouched model.
    after = jnp.concatenate([jnp.broadcast_to(place + 1, (*shape, extra)), ends - given], axis=-1)
    after = jnp.minimum(after, total - 1)
    last = number + 1 == parts
    own = jnp.take_along_axis(untouched, layer[..., None], axis=-2)
    following = jnp.take_along_axis(gradient[..., 0, :], after[..., None], axis=-2)
    panels = Panels(
        layer=layer,
        left=left,
        right=right,
        p_left=p[..., 0],
        p_right=jnp.where(
            last,
            pre.probability[..., None],
            jnp.take_along_axis(p[..., 0], after, axis=-1),
        ),
        g_left=gradient[..., 0, :],
        g_right=jnp.where(last[..., None], own, following),
        mass=jnp.zeros((*shape, total), jnp.float32),
    )
    return panels, valid, p[..., 1:], gradient[..., 1:, :]


def settle(
    search: _Search,
    path: Course,
    panels: Panels,
    valid: Array,
    p: Array,
    gradient: Array,
    *,
    quadrature: Quadrature,
) -> _Search:
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
    count = len(search.error)
    # At all nodes, ends included; gradients with respect to t.
    p = jnp.concatenate([panels.p_left[:, None], p, panels.p_right[:, None]], axis=1)
    ends = panels.g_left[:, None], panels.g_right[:, None]
    gradient = jnp.concatenate([ends[0], gradient, ends[1]], axis=1)
    span = (panels.right - panels.left)[:, None]
    _, slope = path.of(panels.layer).alpha(_nodes(panels))
    integral = jnp.einsum("pnw,pn->pw", gradient, span * slope * W)
    simpson = span * slope[:, HALVES] * np.array([1, 4, 1], np.float32) / 6
    coarse = jnp.einsum("pnw,pn->pw", gradient[:, HALVES], simpson)

    layer = jnp.where(valid, panels.layer, count)  # one_hot of `count` is all zeros
    where = jax.nn.one_hot(layer, count)
    # A layer's norm as far as it is known: accepted, just evaluated, and a guess for what waits.
    waits = jnp.where(jnp.arange(CAPACITY) < search.size, search.waiting.layer, count)
    guess = jax.nn.one_hot(waits, count).T @ jnp.square(search.waiting.mass)
    known = search.total + where.T @ integral
    norm = jnp.sqrt(jnp.square(known).sum(-1) + guess)[panels.layer]
    norm = jnp.maximum(norm, jnp.finfo(jnp.float32).tiny)
    # The gap sees the sum over neurons only. Simpson's rule on three of the nodes has half the
    # order, so the square of its relative error has the size of this rule's, in every direction.
    gap = jnp.abs(integral.sum(-1) - (panels.p_right - panels.p_left))
    noise = jnp.max(NOISE * p * (1 - p) + 4 * EPSILON * p, axis=-1)
    vector = jnp.square(jnp.linalg.norm(integral - coarse, axis=-1)) / norm
    allowed = quadrature.tolerance * norm
    # The gap is in probability: where attributions are larger than 1 they allow it no more.
    gap_allowed = jnp.minimum(allowed, quadrature.tolerance) + noise
    excess = jnp.maximum(gap / gap_allowed, vector / allowed)
    excess = jnp.where(valid, excess, 0.0)

    # Split the worst first, while stack and nodes last.
    order = jnp.argsort(-excess)
    panels = jax.tree.map(lambda a: a[order], panels)
    excess, p, gradient, where = excess[order], p[order], gradient[order], where[order]
    integral, valid, error = integral[order], valid[order], jnp.maximum(gap, vector)[order]
    steps = PANEL_NODES - 1
    pieces = jnp.where(excess > 1, jnp.where(excess > FAR_OFF, steps, 2), 0)
    waiting = search.size + jnp.cumsum(pieces)
    most = quadrature.max_nodes * count
    fits = (waiting <= CAPACITY) & (search.nodes.sum() + INNER * waiting <= most)
    split = (pieces > 0) & fits
    keep = jnp.where((valid & ~split)[:, None], where, 0)

    part = jnp.arange(steps)
    in_two = (pieces == 2)[:, None]
    low = jnp.where(in_two, jnp.where(part == 0, HALVES[0], HALVES[1]), part)
    high = jnp.where(in_two, jnp.where(part == 0, HALVES[1], HALVES[2]), part + 1)
    left, span = panels.left[:, None], (panels.right - panels.left)[:, None]
    x = jnp.asarray(X)
    parts = Panels(
        layer=jnp.broadcast_to(panels.layer[:, None], low.shape),
        left=left + span * x[low],
        right=left + span * x[high],
        p_left=jnp.take_along_axis(p, low, axis=1),
        p_right=jnp.take_along_axis(p, high, axis=1),
        g_left=jnp.take_along_axis(gradient, low[..., None], axis=1),
        g_right=jnp.take_along_axis(gradient, high[..., None], axis=1),
        mass=jnp.linalg.norm(integral, axis=-1)[:, None] * (x[high] - x[low]),
    )
    real = (split[:, None] & (part < pieces[:, None])).reshape(-1)
    place = jnp.where(real, search.size + jnp.cumsum(real) - 1, CAPACITY)
    inner = INNER * (jnp.where(split[:, None], where, 0) * pieces[:, None].astype(jnp.float32)).sum(
        0
    )
    return _Search(
        total=search.total + keep.T @ integral,
        error=search.error + keep.T @ error,
        nodes=search.nodes + inner.astype(jnp.int32),
        waiting=jax.tree.map(
            lambda stack, new: stack.at[place].set(new.reshape(-1, *stack.shape[1:]), mode="drop"),
            search.waiting,
            parts,
        ),
        size=search.size + real.sum(),
    )
