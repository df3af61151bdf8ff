"""The three steps of the adaptive rule, on paths whose integrals are known."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxneurons import Quadrature
from jaxneurons.engine import panels
from jaxneurons.engine.panels import (
    CAPACITY,
    EXTENSION,
    EXTENSION_X,
    FAR_OFF,
    INNER,
    Extension,
    Panels,
    X,
)
from jaxneurons.engine.parametrisation import Parametrisation, first_panels

# Compiled, since every operation by itself takes longer to compile.
estimate = jax.jit(panels.estimate, static_argnames="tolerance")
decide = jax.jit(panels.decide, static_argnames="max_nodes")
refine = jax.jit(panels.refine, static_argnames="quadrature")
cut = jax.jit(panels.cut)

LAYERS, WIDTH = 3, 2
STRAIGHT = Parametrisation(*(jnp.zeros(LAYERS) for _ in range(4)))  # alpha = t


def panels_of(
    layer,
    functions,
    left: Any = 0.0,
    right: Any = 1.0,
    *,
    known=False,
):
    """One panel for each function t -> dP/dscale [WIDTH], and the values of its extension."""
    count = len(layer)
    left, right = np.broadcast_to(left, count), np.broadcast_to(right, count)

    def values(places):
        nodes = left[:, None] + (right - left)[:, None] * places
        gradient = [[f(t) for t in row] for f, row in zip(functions, nodes, strict=True)]
        p = [
            [0.1 + change(f, start, t) for t in row]
            for f, start, row in zip(functions, left, nodes, strict=True)
        ]
        return jnp.asarray(p, jnp.float32), jnp.asarray(np.array(gradient), jnp.float32)

    # P is the integral of the sum over neurons, here of polynomials, by a much finer rule.
    fine = list(zip(*np.polynomial.legendre.leggauss(12), strict=True))

    def change(f, a, b):
        middle, half = (a + b) / 2, (b - a) / 2
        return half * sum(w * f(middle + half * x).sum() for x, w in fine)

    given = Panels(
        jnp.asarray(layer),
        jnp.asarray(left, jnp.float32),
        jnp.asarray(right, jnp.float32),
        jnp.full(count, known),
        *values(X),
    )
    return given, Extension(*values(EXTENSION_X))


def empty(nodes=0, size=0):
    search = panels.empty(jnp.full(LAYERS, nodes, jnp.int32), WIDTH)
    return search._replace(size=jnp.asarray(size, jnp.int32))


def power(degree):
    return lambda t: 0.1 * np.array([t**degree, 1.0])


REAL = jnp.array([True, True, True])


def test_estimates_of_polynomials_that_the_rule_integrates_exactly():
    given, _ = panels_of([0, 2, 1], [power(1), power(7), power(3)])
    valid = jnp.array([True, True, False])
    found = estimate(empty(), STRAIGHT, given, valid, None, tolerance=1e-2)
    exact = [[0.1 / 2, 0.1], [0.1 / 8, 0.1], [0.1 / 4, 0.1]]
    np.testing.assert_allclose(found.integral, exact, rtol=1e-6)
    # Simpson's rule is exact to degree 3, and the gap is rounding.
    assert found.error[0] < 1e-7
    assert 1e-6 < found.error[1] < 1e-2
    assert (found.excess[:2] < 1).all()
    assert found.excess[2] == 0
    np.testing.assert_array_equal(found.one_hot, [[1, 0, 0], [0, 0, 1], [0, 0, 0]])


def test_the_extension_integrates_what_five_nodes_do_not():
    functions = [power(13), power(7), power(13)]
    known, extension = panels_of([0, 1, 2], functions, known=True)
    found = estimate(empty(), STRAIGHT, known, REAL, extension, tolerance=1e-2)
    np.testing.assert_allclose(found.integral[:, 0], 0.1 / np.array([14, 8, 14]), rtol=1e-6)
    # Where the nodes of the extension were not asked for, their values say nothing.
    plain = estimate(empty(), STRAIGHT, known._replace(known=~REAL), REAL, extension, tolerance=1.0)
    without = estimate(empty(), STRAIGHT, known._replace(known=~REAL), REAL, None, tolerance=1.0)
    np.testing.assert_array_equal(plain.integral, without.integral)
    assert abs(plain.integral[0, 0] - 0.1 / 14) > 1e-5
    # The error of five nodes, squared.
    off = np.linalg.norm(plain.integral[0] - found.integral[0])
    assert found.error[0] == pytest.approx(off**2 / np.linalg.norm(found.integral[0]), rel=0.1)


def test_a_gap_of_completeness_is_an_error_that_is_not_allowed():
    given, _ = panels_of([0], [power(1)])
    wrong = given._replace(p=given.p.at[:, -1].add(0.02))
    found = estimate(empty(), STRAIGHT, wrong, jnp.array([True]), None, tolerance=1e-3)
    assert found.error[0] == pytest.approx(0.02, rel=1e-3)
    assert found.excess[0] > 10


def estimates(excess, *, known=True):
    count = len(excess)
    given, _ = panels_of([n % LAYERS for n in range(count)], [power(1)] * count, known=known)
    found = estimate(empty(), STRAIGHT, given, jnp.ones(count, bool), None, tolerance=1e-3)
    return given, found._replace(excess=jnp.asarray(excess, jnp.float32))


def test_panels_are_extended_first_then_cut_and_the_far_off_at_all_their_nodes():
    excess = [0.5, 2.0, 2 * FAR_OFF, 0.0, 1.5]
    assert decide(empty(), *estimates(excess), max_nodes=1000).tolist() == [0, 2, 4, 0, 2]
    new = estimates(excess, known=False)
    assert decide(empty(), *new, max_nodes=1000).tolist() == [0, 1, 1, 0, 1]


def test_what_does_not_fit_is_accepted():
    given = estimates([2.0, 4.0, 3.0])
    # Room for one panel in two parts, among those that wait or among the nodes: the worst.
    assert decide(empty(size=CAPACITY - 3), *given, max_nodes=1000).tolist() == [0, 2, 0]
    limit = (30 + 2 * INNER) // LAYERS
    assert decide(empty(nodes=10), *given, max_nodes=limit).tolist() == [0, 2, 0]
    assert decide(empty(nodes=10), *given, max_nodes=limit - 1).tolist() == [0, 0, 0]
    assert decide(empty(size=CAPACITY), *given, max_nodes=1000).tolist() == [0, 0, 0]


def test_a_panel_is_accepted_or_extended_or_its_parts_wait():
    functions = [power(1), power(2), power(3), power(4)]
    layers = [0, 1, 2, 1]
    given, _ = panels_of(layers, functions, left=[0, 0.5, 0.2, 0.1], right=[1, 1, 0.6, 0.5])
    found = estimate(empty(), STRAIGHT, given, jnp.ones(4, bool), None, tolerance=1e-3)
    before = empty(size=1)
    after = cut(before, given, found, jnp.array([0, 2, 4, 1]))
    np.testing.assert_allclose(after.total[0], found.integral[0])
    assert after.total[1:].tolist() == np.zeros((2, WIDTH)).tolist()
    assert after.error.tolist() == [found.error[0], 0, 0]
    assert after.nodes.tolist() == [0, 2 * INNER + EXTENSION, 4 * INNER]
    assert after.size == 1 + 2 + 4 + 1

    layer, left, right, known, p, gradient = (np.asarray(a)[1:8] for a in after.waiting)
    assert layer.tolist() == [1, 1, 2, 2, 2, 2, 1]
    np.testing.assert_allclose(left, [0.5, 0.75, *(0.2 + 0.4 * X[:-1]), 0.1], rtol=1e-6)
    np.testing.assert_allclose(right, [0.75, 1, *(0.2 + 0.4 * X[1:]), 0.5], rtol=1e-6)
    assert known.tolist() == [False] * 6 + [True]
    for n, f in enumerate(functions[i] for i in (1, 1, 2, 2, 2, 2, 3)):
        np.testing.assert_allclose(gradient[n, 0], f(left[n]), rtol=1e-5)
        np.testing.assert_allclose(gradient[n, -1], f(right[n]), rtol=1e-5)
    # Parts share their ends; what is extended keeps its values.
    assert p[0, -1] == p[1, 0]
    np.testing.assert_array_equal(p[2:5, -1], p[3:6, 0])
    np.testing.assert_array_equal(p[6], given.p[3])
    np.testing.assert_array_equal(gradient[6], given.gradient[3])
    assert all((np.asarray(a)[8:] == 0).all() for a in after.waiting)


def test_refining_a_path_until_nothing_waits_gives_its_integral():
    """A peak that five nodes do not see, worked off by hand."""
    quadrature = Quadrature(tolerance=1e-4, max_nodes=400)

    def gradient(t):
        return np.stack([0.05 / (0.05**2 + (t - 0.3) ** 2), np.full_like(t, 0.2)], axis=-1) / 10

    def value(t):
        return 0.1 * (np.arctan((t - 0.3) / 0.05) + np.arctan(0.3 / 0.05)) + 0.02 * t

    search, first = empty(), panels_of([1], [gradient])[0]
    first = first._replace(p=jnp.asarray(value(X)[None], jnp.float32))
    search = refine(search, STRAIGHT, first, jnp.array([True]), None, quadrature=quadrature)
    assert search.size == 1
    assert search.waiting.known[0]
    rounds = 0
    while search.size > 0 and rounds < 50:
        waiting, valid = search.waiting, jnp.arange(CAPACITY) < search.size
        t = np.asarray(panels.next_nodes(waiting), float)
        new = jnp.asarray(value(t), jnp.float32), jnp.asarray(gradient(t), jnp.float32)
        filled, extension = panels.evaluated(waiting, *new)
        emptied = search._replace(size=jnp.zeros_like(search.size))
        search = refine(emptied, STRAIGHT, filled, valid, extension, quadrature=quadrature)
        rounds += 1
    assert search.size == 0
    assert 1 < rounds < 10
    whole = 0.1 * (np.arctan(0.7 / 0.05) + np.arctan(0.3 / 0.05))
    np.testing.assert_allclose(search.total[1], [whole, 0.02], rtol=2e-4)
    assert (np.asarray(search.total)[[0, 2]] == 0).all()


def test_nothing_is_refined_beneath_the_noise_of_the_dtype():
    """A gap of 0.03 in log-odds: an error in float32, rounding in bfloat16."""
    given, _ = panels_of([0, 1], [power(1), power(7)])
    p = given.p
    rounded = given._replace(p=p.at[0, -1].add(0.03 * p[0, -1] * (1 - p[0, -1])))
    excess = {}
    for dtype in (jnp.float32, jnp.bfloat16, jnp.float16):
        noise = panels.noise_of(np.dtype(dtype))
        found = panels.estimate(
            empty(), STRAIGHT, rounded, REAL[:2], None, tolerance=1e-5, noise=noise
        )
        excess[np.dtype(dtype).name] = found.excess
    assert (excess["float32"] > 10).all()
    assert (excess["bfloat16"] < 1).all()
    # Of fewer bits' noise there is less.
    assert excess["bfloat16"][0] < excess["float16"][0] < excess["float32"][0]
    # What is larger than the noise is refined in any dtype.
    wrong = given._replace(p=p.at[0, -1].add(0.2))
    noise = panels.noise_of(np.dtype(jnp.bfloat16))
    found = panels.estimate(empty(), STRAIGHT, wrong, REAL[:2], None, tolerance=1e-5, noise=noise)
    assert found.excess[0] > 1


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
