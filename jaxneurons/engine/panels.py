"""The steps of the adaptive rule for one prompt: which panels are good enough, and what of others.

A panel that is not good enough gets the nodes of Kronrod's extension, which keeps those it has; one
that is not good enough with them is cut at its nodes, into parts whose ends are known.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from jaxneurons.engine.parametrisation import Parametrisation
from jaxneurons.engine.quadrature import PANEL_NODES, Quadrature, kronrod, lobatto

X, W = (a.astype(np.float32) for a in lobatto(PANEL_NODES))
EXTENSION_X, W_EXTENDED, EXTENSION_W = (a.astype(np.float32) for a in kronrod(PANEL_NODES))
INNER = PANEL_NODES - 2
EXTENSION = PANEL_NODES - 1
HALVES = (0, PANEL_NODES // 2, PANEL_NODES - 1)

EPSILON = float(np.finfo(np.float32).eps)

CAPACITY = 48
"""Panels that can wait for one prompt, at least; what does not fit is accepted as it is."""

FAR_OFF = 100.0
"""A panel whose error is this many times too large is cut at all its nodes, others in two."""


class Noise(NamedTuple):
    """What the rounding of a model's activations leaves of a row; refining beneath it is in vain.

    Attributes:
      odds: of the logarithm of the answer's odds: completeness gaps below odds * P * (1 - P) mean
        nothing.
      gradient: of dP/dscale, relative to its L2 norm.
    """

    odds: float
    gradient: float


FLOAT32 = Noise(odds=3e-5, gradient=0.0)


def noise_of(dtype: np.dtype) -> Noise:
    """The noise of a model whose parameters are of this dtype.

    Of SmolLM2-135M in bfloat16: 0.02 to 0.08 (standard deviation) and 1 to 6 %, by prompt and
    layer; in float32 that of the gradient is below any tolerance.
    """
    if dtype in (np.float32, np.float64):
        return FLOAT32
    epsilon = float(jnp.finfo(dtype).eps)
    return Noise(odds=12 * epsilon, gradient=6 * epsilon)


class Panels(NamedTuple):
    """Parts of the path of one layer each: [..., panel].

    Attributes:
      layer: whose path it is a part of.
      left: where it begins, in t.
      right: where it ends.
      known: whether values at its inner nodes are known, so that those of the extension are next;
        those at its ends always are.
      p: probability at its nodes, ends included.
      gradient: dP/dscale there.
    """

    layer: Array
    left: Array
    right: Array
    known: Array
    p: Array  # [..., panel, node]
    gradient: Array  # [..., panel, node, width]


class Search(NamedTuple):
    """What the adaptive rule has accepted and what waits, for one (batch, answer)."""

    total: Array  # [layers, width] integrals of accepted panels
    error: Array  # [layers] their estimated errors, added up
    nodes: Array  # [layers] nodes spent
    waiting: Panels  # [capacity] each
    size: Array  # panels that wait


class Extension(NamedTuple):
    """Values at the nodes that Kronrod's extension adds: [panel, node]."""

    p: Array
    gradient: Array  # [panel, node, width]


class Estimate(NamedTuple):
    """What the nodes of panels say of their integrals: [panel]."""

    one_hot: Array  # [panel, layers] 1 at the panel's layer; all 0 where there is no panel
    integral: Array  # [panel, width]
    error: Array  # estimated, of the integral
    excess: Array  # how many times larger than allowed; 0 where there is no panel


def empty(nodes: Array, width: int, capacity: int = CAPACITY) -> Search:
    """Nothing accepted and nothing waiting; `nodes` [batch, answer, layer] of the first pass."""
    *shape, count = nodes.shape
    none = jnp.zeros((*shape, capacity), jnp.float32)
    at_nodes = jnp.zeros((*shape, capacity, PANEL_NODES), jnp.float32)
    wide = jnp.zeros((*shape, capacity, PANEL_NODES, width), jnp.float32)
    return Search(
        total=jnp.zeros((*shape, count, width), jnp.float32),
        error=jnp.zeros((*shape, count), jnp.float32),
        nodes=nodes,
        waiting=Panels(none.astype(jnp.int32), none, none, none > 0, at_nodes, wide),
        size=jnp.zeros(shape, jnp.int32),
    )


def next_nodes(panels: Panels) -> Array:
    """The nodes in t at which panels are evaluated next: [..., panel, EXTENSION].

    The last one says nothing new of a panel whose inner nodes are not known yet.
    """
    inner = X[[*range(1, PANEL_NODES - 1), PANEL_NODES - 2]]
    places = jnp.where(panels.known[..., None], EXTENSION_X, inner)
    return panels.left[..., None] + (panels.right - panels.left)[..., None] * places


def evaluated(panels: Panels, p: Array, gradient: Array) -> tuple[Panels, Extension]:
    """Panels with their inner values, and those of the extension, when `next_nodes` are known."""
    known = panels.known[..., None]
    at_inner = jnp.where(known, panels.p[..., 1:-1], p[..., :INNER])
    inner = jnp.where(known[..., None], panels.gradient[..., 1:-1, :], gradient[..., :INNER, :])
    filled = panels._replace(
        p=panels.p.at[..., 1:-1].set(at_inner), gradient=panels.gradient.at[..., 1:-1, :].set(inner)
    )
    return filled, Extension(p, gradient)


def refine(
    search: Search,
    path: Parametrisation,
    panels: Panels,
    valid: Array,
    extension: Extension | None,
    *,
    quadrature: Quadrature,
    noise: Noise = FLOAT32,
) -> Search:
    """Accept the panels that are good enough; the others, or their parts, wait.

    Args:
      search: the state of one (batch, answer).
      path: how alpha depends on t, [layer].
      panels: the panels just evaluated, [panel]: at the nodes of the extension where their inner
        nodes were `known` before, else at those.
      valid: which of them are real.
      extension: values at the nodes of the extension; None: of no panel.
      quadrature: tolerance and most nodes.
      noise: of the model's rows.
    """
    tolerance = quadrature.tolerance
    estimates = estimate(search, path, panels, valid, extension, tolerance=tolerance, noise=noise)
    parts = decide(search, panels, estimates, max_nodes=quadrature.max_nodes)
    return cut(search, panels, estimates, parts)


def estimate(
    search: Search,
    path: Parametrisation,
    panels: Panels,
    valid: Array,
    extension: Extension | None,
    *,
    tolerance: float,
    noise: Noise = FLOAT32,
) -> Estimate:
    """Integrals of panels and how far they may be off; arguments as of `refine`."""
    count = len(search.error)
    by_layer = path.of_layers(panels.layer)
    left, span = panels.left[:, None], (panels.right - panels.left)[:, None]

    def weights(places: np.ndarray, *rules: np.ndarray) -> list[Array]:
        """Weights of gradients with respect to t at places of each panel."""
        _, slope = by_layer.alpha(left + span * places)
        return [span * slope * rule for rule in rules]

    # Half the order, so the square of its relative error has the size of the better rule's error
    # in every direction: Simpson's rule on three nodes for Lobatto's, Lobatto's for Kronrod's.
    simpson = np.zeros(PANEL_NODES, np.float32)
    simpson[list(HALVES)] = np.array([1, 4, 1], np.float32) / 6
    plain, coarse, kept = weights(X, W, simpson, W_EXTENDED)
    integral = jnp.einsum("pnw,pn->pw", panels.gradient, plain)
    worse = jnp.einsum("pnw,pn->pw", panels.gradient, coarse)
    if extension is not None:
        (added,) = weights(EXTENSION_X, EXTENSION_W)
        extended = jnp.einsum("pnw,pn->pw", panels.gradient, kept)
        extended += jnp.einsum("pnw,pn->pw", extension.gradient, added)
        worse = jnp.where(panels.known[:, None], integral, worse)
        integral = jnp.where(panels.known[:, None], extended, integral)

    layer = jnp.where(valid, panels.layer, count)  # one_hot of `count` is all zeros
    one_hot = jax.nn.one_hot(layer, count)
    # A layer's norm as far as it is known.
    norm = jnp.linalg.norm(search.total + one_hot.T @ integral, axis=-1)[panels.layer]
    norm = jnp.maximum(norm, jnp.finfo(jnp.float32).tiny)
    # The gap sees the sum over neurons only.
    gap = jnp.abs(integral.sum(-1) - (panels.p[:, -1] - panels.p[:, 0]))
    rounding = jnp.max(noise.odds * panels.p * (1 - panels.p) + 4 * EPSILON * panels.p, axis=-1)
    vector = jnp.square(jnp.linalg.norm(integral - worse, axis=-1)) / norm
    tolerance = max(tolerance, noise.gradient)
    allowed = tolerance * norm
    # The gap is in probability: where attributions are larger than 1 they allow it no more.
    gap_allowed = jnp.minimum(allowed, tolerance) + rounding
    excess = jnp.maximum(gap / gap_allowed, vector / allowed)
    excess = jnp.where(valid, excess, 0.0)
    return Estimate(one_hot, integral, jnp.maximum(gap, vector), excess)


def decide(search: Search, panels: Panels, estimates: Estimate, *, max_nodes: int) -> Array:
    """What becomes of panels: the worst first, while room and nodes last.

    Returns:
      For each panel the places that it takes among those that wait: 0 where it is accepted, 1 where
      it is extended, else the number of parts that it is cut into.
    """
    excess, layers = estimates.excess, len(search.error)
    parts = jnp.where(excess > FAR_OFF, PANEL_NODES - 1, 2)
    parts = jnp.where(excess > 1, jnp.where(panels.known, parts, 1), 0)
    order = jnp.argsort(-excess)
    waiting = search.size + jnp.cumsum(parts[order])
    spent = search.nodes.sum() + jnp.cumsum(nodes_of(parts)[order])
    fits = (waiting <= len(search.waiting.layer)) & (spent <= max_nodes * layers)
    return jnp.where(fits[jnp.argsort(order)], parts, 0)


def nodes_of(parts: Array) -> Array:
    """Nodes at which panels are evaluated next, by what `decide` says of them."""
    return jnp.where(parts == 1, EXTENSION, INNER * parts)


def cut(search: Search, panels: Panels, estimates: Estimate, parts: Array) -> Search:
    """Add up the accepted panels; the others, or their parts, wait.

    Args:
      search: the state of one (batch, answer).
      panels: the panels just evaluated.
      estimates: of them.
      parts: what becomes of each, as `decide` says.
    """
    accepted = jnp.where((parts == 0)[:, None], estimates.one_hot, 0)
    # Which piece of which panel comes to each place.
    ends = search.size + jnp.cumsum(parts)
    place = jnp.arange(len(search.waiting.layer))
    panel = jnp.minimum((ends <= place[:, None]).sum(-1), len(parts) - 1)
    kind = parts[panel]
    number = place - (ends[panel] - kind)
    step = jnp.where(kind == 1, PANEL_NODES - 1, jnp.where(kind == 2, PANEL_NODES // 2, 1))
    low = jnp.clip(number * step, 0, PANEL_NODES - 1)
    high = jnp.minimum(low + step, PANEL_NODES - 1)

    def at_nodes(values: Array) -> Array:
        """A piece's ends are nodes of its panel; its inner nodes only where it is the whole."""
        ends = values[panel, low][:, None], values[panel, high][:, None]
        return jnp.concatenate([ends[0], values[panel, 1:-1], ends[1]], axis=1)

    left, span, x = panels.left[panel], (panels.right - panels.left)[panel], jnp.asarray(X)
    pieces = Panels(
        layer=panels.layer[panel],
        left=left + span * x[low],
        right=left + span * x[high],
        known=kind == 1,
        p=at_nodes(panels.p),
        gradient=at_nodes(panels.gradient),
    )
    new = (place >= search.size) & (place < ends[-1])
    nodes = nodes_of(parts).astype(jnp.float32) @ estimates.one_hot
    return Search(
        total=search.total + accepted.T @ estimates.integral,
        error=search.error + accepted.T @ estimates.error,
        nodes=search.nodes + nodes.astype(jnp.int32),
        waiting=jax.tree.map(
            lambda old, piece: jnp.where(new.reshape(-1, *(1,) * (old.ndim - 1)), piece, old),
            search.waiting,
            pieces,
        ),
        size=ends[-1],
    )
