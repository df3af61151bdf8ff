"""Quadrature rules against polynomials and the formulas they are named after."""

import numpy as np
import pytest

from jaxneurons import ConfigError, Quadrature
from jaxneurons.engine.quadrature import PANEL_NODES, kronrod, lobatto, nodes_and_weights


def exactness(x, w):
    """Highest degree up to which every monomial on [0, 1] is integrated exactly."""
    degree = 0
    while abs(w @ x**degree - 1 / (degree + 1)) < 1e-13:
        degree += 1
    return degree - 1


@pytest.mark.parametrize("steps", [1, 2, 3, 5, 8])
def test_gauss_is_exact_up_to_degree_2n_minus_1(steps):
    x, w = nodes_and_weights("gauss", steps)
    assert len(x) == len(w) == steps
    assert ((x > 0) & (x < 1)).all()
    assert exactness(x, w) == 2 * steps - 1


@pytest.mark.parametrize("steps", [2, 3, 4, PANEL_NODES, 8])
def test_lobatto_holds_both_ends_and_is_exact_up_to_degree_2n_minus_3(steps):
    x, w = lobatto(steps)
    assert x[0] == 0
    assert x[-1] == 1
    assert (np.diff(x) > 0).all()
    assert (w > 0).all()
    np.testing.assert_allclose(x, 1 - x[::-1], atol=1e-14)
    assert w[0] == pytest.approx(1 / (steps * (steps - 1)))
    assert exactness(x, w) == 2 * steps - 3


def test_lobatto_of_three_nodes_is_simpsons_rule():
    x, w = lobatto(3)
    np.testing.assert_allclose(x, [0, 1 / 2, 1], atol=1e-15)
    np.testing.assert_allclose(w, [1 / 6, 4 / 6, 1 / 6], atol=1e-15)


@pytest.mark.parametrize(("steps", "degree"), [(3, 7), (4, 9), (5, 13)])
def test_the_extension_keeps_the_nodes_and_is_exact_much_further(steps, degree):
    """Of four nodes Gander and Gautschi (2000) give the new ones and the degree."""
    old, (new, kept, added) = lobatto(steps)[0], kronrod(steps)
    assert len(new) == steps - 1
    assert ((old[:-1] < new) & (new < old[1:])).all()  # one between any two
    assert (kept > 0).all()
    assert (added > 0).all()
    x, w = np.concatenate([old, new]), np.concatenate([kept, added])
    off = [abs(w @ x**k - 1 / (k + 1)) for k in range(degree + 3)]
    assert max(off[: degree + 1]) < 1e-14
    assert off[degree + 1] > 1e-10
    if steps == 4:  # x = -sqrt(2/3), 0, sqrt(2/3) on [-1, 1]
        np.testing.assert_allclose(2 * new - 1, [-np.sqrt(2 / 3), 0, np.sqrt(2 / 3)], atol=1e-14)


def test_the_paper_and_its_code():
    x, w = nodes_and_weights("right", 4)
    np.testing.assert_allclose(x, [0.25, 0.5, 0.75, 1])
    np.testing.assert_allclose(w, [0.25] * 4)
    x, w = nodes_and_weights("reference", 5)
    np.testing.assert_allclose(x, [0, 0.25, 0.5, 0.75, 1])
    np.testing.assert_allclose(w, [0.2] * 5)


@pytest.mark.parametrize("rule", ["gauss", "right", "reference"])
def test_every_rule_weighs_one(rule):
    for steps in (2, 7, 16):
        assert nodes_and_weights(rule, steps)[1].sum() == pytest.approx(1, abs=1e-14)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rule": "adaptiv"}, "unknown quadrature rule 'adaptiv'; did you mean 'adaptive'"),
        ({"rule": "simpson"}, "known: 'adaptive', 'gauss', 'right', 'reference'"),
        ({"rule": "gauss", "steps": 0}, "'gauss' needs steps >= 1, got 0"),
        ({"rule": "reference", "steps": 1}, "'reference' needs steps >= 2, got 1"),
        ({"rule": "gauss", "steps": 10**8}, "steps must be at most 4096, got 100000000"),
        ({"tolerance": 0.0}, "tolerance must be a positive number, got 0.0"),
        ({"tolerance": float("nan")}, "tolerance must be a positive number, got nan"),
        ({"max_nodes": PANEL_NODES - 1}, f"max_nodes must be at least {PANEL_NODES}"),
    ],
)
@pytest.mark.usefixtures("as_users_call")
def test_bad_values(options, message):
    with pytest.raises(ConfigError, match=message):
        Quadrature(**options)


@pytest.mark.usefixtures("as_users_call")
def test_a_rule_that_is_not_fixed():
    with pytest.raises(ConfigError, match="'gaus' is not a fixed rule; did you mean 'gauss'"):
        nodes_and_weights("gaus", 4)
    with pytest.raises(ConfigError, match="'adaptive' is not a fixed rule"):
        nodes_and_weights("adaptive", 4)
