"""The three steps of the adaptive rule, on paths whose integrals are known."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxneurons import Quadrature
from jaxneurons.engine import adaptive
from jaxneurons.engine.adaptive import CAPACITY, FAR_OFF, INNER, Panels, Search, X
from jaxneurons.engine.parametrisation import Parametrisation, first_panels

# Compiled, since every operation by itself takes longer to compile.
estimate = jax.jit(adaptive.estimate, static_argnames="tolerance")
decide = jax.jit(adaptive.decide, static_argnames="max_nodes")
refine = jax.jit(adaptive.refine, static_argnames="quadrature")
cut = jax.jit(adaptive.cut)

LAYERS, WIDTH = 3, 2
STRAIGHT = Parametrisation(*(jnp.zeros(LAYERS) for _ in range(4)))  # alpha = t


def panels_of(layer, functions, left=0.0, right=1.0):
    """One panel for each function t -> dP/dscale [WIDTH]; its P, all nodes and inner values."""
    count = len(layer)
    left, right = np.broadcast_to(left, count), np.broadcast_to(right, count)
    nodes = left[:, None] + (right - left)[:, None] * X
    gradient = np.stack([[f(t) for t in row] for f, row in zip(functions, nodes, strict=True)])
    # P is the integral of the sum over neurons, here of polynomials, by a much finer rule.
    fine = list(zip(*np.polynomial.legendre.leggauss(12), strict=True))

    def change(f, a, b):
        middle, half = (a + b) / 2, (b - a) / 2
        return half * sum(w * f(middle + half * x).sum() for x, w in fine)

    p = np.stack(
        [[0.1 + change(f, row[0], t) for t in row] for f, row in zip(functions, nodes, strict=True)]
    )
    panels = Panels(
        layer=jnp.asarray(layer),
        left=jnp.asarray(left, jnp.float32),
        right=jnp.asarray(right, jnp.float32),
        p_left=jnp.asarray(p[:, 0], jnp.float32),
        p_right=jnp.asarray(p[:, -1], jnp.float32),
        g_left=jnp.asarray(gradient[:, 0], jnp.float32),
        g_right=jnp.asarray(gradient[:, -1], jnp.float32),
        mass=jnp.zeros(count),
    )
    inner = (jnp.asarray(a[:, 1:-1], jnp.float32) for a in (p, gradient))
    return panels, *inner


def empty(nodes=0, size=0):
    none, wide = jnp.zeros(CAPACITY), jnp.zeros((CAPACITY, WIDTH))
    return Search(
        total=jnp.zeros((LAYERS, WIDTH)),
        error=jnp.zeros(LAYERS),
        nodes=jnp.full(LAYERS, nodes, jnp.int32),
        waiting=Panels(none.astype(jnp.int32), none, none, none, none, wide, wide, none),
        size=jnp.asarray(size, jnp.int32),
    )


def power(degree):
    return lambda t: 0.1 * np.array([t**degree, 1.0])


def test_estimates_of_polynomials_that_the_rule_integrates_exactly():
    panels, p, gradient = panels_of([0, 2, 1], [power(1), power(7), power(3)])
    valid = jnp.array([True, True, False])
    found = estimate(empty(), STRAIGHT, panels, valid, p, gradient, tolerance=1e-2)
    exact = [[0.1 / 2, 0.1], [0.1 / 8, 0.1], [0.1 / 4, 0.1]]
    np.testing.assert_allclose(found.integral, exact, rtol=1e-6)
    # Simpson's rule is exact to degree 3, and the gap is rounding.
    assert found.error[0] < 1e-7
    assert 1e-6 < found.error[1] < 1e-2
    assert (found.excess[:2] < 1).all()
    assert found.excess[2] == 0
    np.testing.assert_array_equal(found.one_hot, [[1, 0, 0], [0, 0, 1], [0, 0, 0]])


def test_a_gap_of_completeness_is_an_error_that_is_not_allowed():
    panels, p, gradient = panels_of([0], [power(1)])
    wrong = panels._replace(p_right=panels.p_right + 0.02)
    found = estimate(empty(), STRAIGHT, wrong, jnp.array([True]), p, gradient, tolerance=1e-3)
    assert found.error[0] == pytest.approx(0.02, rel=1e-3)
    assert found.excess[0] > 10


def estimates(excess):
    count = len(excess)
    panels, p, gradient = panels_of([n % LAYERS for n in range(count)], [power(1)] * count)
    valid = jnp.ones(count, bool)
    found = estimate(empty(), STRAIGHT, panels, valid, p, gradient, tolerance=1e-3)
    return found._replace(excess=jnp.asarray(excess, jnp.float32))


def test_the_worst_are_cut_first_and_the_far_off_at_all_their_nodes():
    given = estimates([0.5, 2.0, 2 * FAR_OFF, 0.0, 1.5])
    worst_first, parts = decide(empty(), given, max_nodes=1000)
    assert parts.tolist() == [4, 2, 2, 0, 0]
    assert worst_first.panels.layer.tolist() == [2, 1, 4 % LAYERS, 0, 3 % LAYERS]
    assert worst_first.excess.tolist() == sorted(given.excess.tolist(), reverse=True)


def test_what_does_not_fit_is_accepted():
    given = estimates([2.0, 3.0, 4.0])
    # Room for one panel in two parts, on the stack or among the nodes.
    assert decide(empty(size=CAPACITY - 3), given, max_nodes=1000)[1].tolist() == [2, 0, 0]
    limit = (30 + 2 * INNER) // LAYERS
    assert decide(empty(nodes=10), given, max_nodes=limit)[1].tolist() == [2, 0, 0]
    assert decide(empty(nodes=10), given, max_nodes=limit - 1)[1].tolist() == [0, 0, 0]
    assert decide(empty(size=CAPACITY), given, max_nodes=1000)[1].tolist() == [0, 0, 0]


def test_a_panel_is_accepted_or_its_parts_wait():
    functions = [power(1), power(2), power(3)]
    panels, p, gradient = panels_of([0, 1, 2], functions, left=[0, 0.5, 0.2], right=[1, 1, 0.6])
    valid = jnp.ones(3, bool)
    found = estimate(empty(), STRAIGHT, panels, valid, p, gradient, tolerance=1e-3)
    before = empty(size=1)
    after = cut(before, found, jnp.array([0, 2, 4]))
    np.testing.assert_allclose(after.total[0], found.integral[0])
    assert after.total[1:].tolist() == np.zeros((2, WIDTH)).tolist()
    assert after.error.tolist() == [found.error[0], 0, 0]
    assert after.nodes.tolist() == [0, 2 * INNER, 4 * INNER]
    assert after.size == 1 + 2 + 4

    waiting = [np.asarray(a) for a in after.waiting]
    layer, left, right, p_left, p_right, g_left, g_right, mass = (a[1:7] for a in waiting)
    assert layer.tolist() == [1, 1, 2, 2, 2, 2]
    np.testing.assert_allclose(left, [0.5, 0.75, *(0.2 + 0.4 * X[:-1])], rtol=1e-6)
    np.testing.assert_allclose(right, [0.75, 1, *(0.2 + 0.4 * X[1:])], rtol=1e-6)
    for n, f in enumerate(functions[i] for i in layer):
        np.testing.assert_allclose(g_left[n], f(left[n]), rtol=1e-5)
        np.testing.assert_allclose(g_right[n], f(right[n]), rtol=1e-5)
    # Parts share their ends, and a panel's mass is spread over its parts by their length.
    assert p_right[0] == p_left[1]
    np.testing.assert_array_equal(p_right[2:5], p_left[3:6])
    norms = np.linalg.norm(found.integral, axis=-1)
    np.testing.assert_allclose([mass[:2].sum(), mass[2:].sum()], norms[1:], rtol=1e-5)
    assert all((a[7:] == 0).all() for a in waiting)


def test_refining_a_path_until_nothing_waits_gives_its_integral():
    """A peak that five nodes do not see: the stack is worked off by hand, four panels at a time."""
    quadrature = Quadrature(tolerance=1e-4, max_nodes=400)
    peak = lambda t: np.array([0.05 / (0.05**2 + (t - 0.3) ** 2), 0.2]) / 10  # noqa: E731
    panels, p, gradient = panels_of([1], [peak])
    whole = 0.1 * (np.arctan(0.7 / 0.05) + np.arctan(0.3 / 0.05))

    def value(t):
        return 0.1 * (np.arctan((t - 0.3) / 0.05) + np.arctan(0.3 / 0.05)) + 0.02 * t

    def with_p(panels):
        nodes = panels.left[:, None] + (panels.right - panels.left)[:, None] * X
        at = jnp.asarray(value(np.asarray(nodes)), jnp.float32)
        return panels._replace(p_left=at[:, 0], p_right=at[:, -1]), at[:, 1:-1]

    panels, p = with_p(panels)
    search = refine(
        empty(), STRAIGHT, panels, jnp.array([True]), p, gradient, quadrature=quadrature
    )
    assert search.size == 4  # far off: cut at all nodes
    rounds = 0
    while search.size > 0 and rounds < 50:
        at = jnp.maximum(search.size - 1 - jnp.arange(4), 0)
        valid = search.size - 1 - jnp.arange(4) >= 0
        top = Panels(*(np.asarray(a[at]) for a in search.waiting))
        _, _, gradient = panels_of(top.layer, [peak] * 4, top.left, top.right)
        top, p = with_p(Panels(*map(jnp.asarray, top)))
        search = search._replace(size=jnp.maximum(search.size - 4, 0))
        search = refine(search, STRAIGHT, top, valid, p, gradient, quadrature=quadrature)
        rounds += 1
    assert search.size == 0
    np.testing.assert_allclose(search.total[1], [whole, 0.02], rtol=2e-4)
    assert (np.asarray(search.total)[[0, 2]] == 0).all()


def test_long_paths_get_the_panels_beyond_one_for_each_layer():
    lengths = jnp.array([[[1.2, 0.3, 0.9, 1.0]]])  # at most 0.35 of a long path a panel
    path = Parametrisation(*([jnp.zeros_like(lengths)] * 4))._replace(length=lengths)
    first = first_panels(path, extra=5)
    layer, valid = np.asarray(first.layer[0, 0]), np.asarray(first.valid[0, 0])
    assert valid.tolist() == [True] * 3 + [False] * 2 + [True] * 4
    assert layer[valid].tolist() == [0, 0, 0, 0, 1, 2, 3]
    left, right = np.asarray(first.left[0, 0]), np.asarray(first.right[0, 0])
    np.testing.assert_allclose(left[valid], [0.25, 0.5, 0.75, 0, 0, 0, 0])
    np.testing.assert_allclose(right[valid], [0.5, 0.75, 1, 0.25, 1, 1, 1])
    following, last = np.asarray(first.following[0, 0]), np.asarray(first.last[0, 0])
    for n in np.flatnonzero(valid & ~last):
        assert (layer[following[n]], left[following[n]]) == (layer[n], right[n])
    assert right[valid & last].tolist() == [1] * 4
