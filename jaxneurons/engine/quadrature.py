"""Quadrature rules on [0, 1] for the attribution path.

A rule is chosen by a frozen `Quadrature`. Fixed rules have the same nodes in every layer:

- `gauss`: Gauss-Legendre, `steps` nodes.
- `right`: alpha = k / steps for k = 1..steps, each weighted 1 / steps. The formula of the QRNCA
  paper (arXiv 2406.10868, section 2 of the method).
- `reference`: alpha = linspace(0, 1, steps), both ends included, each weighted 1 / steps: what
  the paper's public code does. Its weights sum to 1 over an interval it covers steps / (steps - 1)
  times, so it does not converge to the integral faster than 1 / steps.

`adaptive` starts with few panels and refines only those that are not resolved yet: see
`jaxneurons.engine.adaptive`.
"""

import dataclasses
import math
from typing import Literal, get_args

import numpy as np
from numpy.polynomial import legendre

from jaxneurons.errors import ConfigError, near_matches
from jaxneurons.storage.settings import check_fields

Rule = Literal["adaptive", "gauss", "right", "reference"]
RULES: tuple[Rule, ...] = get_args(Rule)

PANEL_NODES = 5
"""Nodes of an adaptive panel: a Gauss-Lobatto rule, exact for polynomials of degree 7."""

MOST_STEPS = 4096
"""Nodes of a fixed rule: finding Gauss's takes the square of their number in memory."""


@dataclasses.dataclass(frozen=True)
class Quadrature:
    """How the integral over the path is computed.

    Attributes:
      rule: adaptive (converges), gauss, right (the QRNCA paper's) or reference (its public code's).
      steps: nodes per layer of a fixed rule; `adaptive` ignores it.
      tolerance: `adaptive`: a panel is refined while its estimated error exceeds this share of the
        L2 norm of its layer's attribution (or the noise of the model's dtype, if larger).
      max_nodes: `adaptive`: most nodes spent on a prompt, as a mean over its layers, and three times
        as many where a norm follows the site; what is still unresolved then is accepted and shows
        in the reported error.
    """

    rule: Rule = "adaptive"
    steps: int = 16
    tolerance: float = 5e-4
    max_nodes: int = 16

    def __post_init__(self) -> None:
        if isinstance(self.rule, str) and self.rule not in RULES:
            raise ConfigError(
                f"unknown quadrature rule {self.rule!r}; {near_matches(self.rule, RULES)}"
            )
        check_fields(self)
        least = 2 if self.rule == "reference" else 1
        if self.steps < least:
            raise ConfigError(f"rule {self.rule!r} needs steps >= {least}, got {self.steps}")
        if self.steps > MOST_STEPS:
            raise ConfigError(
                f"steps must be at most {MOST_STEPS}, got {self.steps}: `gauss` has converged long "
                "before, and `adaptive` chooses its nodes itself"
            )
        if not (math.isfinite(self.tolerance) and self.tolerance > 0):
            raise ConfigError(f"tolerance must be a positive number, got {self.tolerance!r}")
        if self.max_nodes < PANEL_NODES:
            raise ConfigError(f"max_nodes must be at least {PANEL_NODES}, got {self.max_nodes}")


def nodes_and_weights(rule: Rule, steps: int) -> tuple[np.ndarray, np.ndarray]:
    """Nodes on [0, 1] and weights of a fixed rule, float64 [steps] each."""
    if rule == "gauss":
        x, w = legendre.leggauss(steps)
        return (x + 1) / 2, w / 2
    if rule == "right":
        return np.arange(1, steps + 1) / steps, np.full(steps, 1 / steps)
    if rule == "reference":
        return np.linspace(0, 1, steps), np.full(steps, 1 / steps)
    raise ConfigError(f"{rule!r} is not a fixed rule; {near_matches(rule, RULES[1:])}")


def lobatto(steps: int) -> tuple[np.ndarray, np.ndarray]:
    """Gauss-Lobatto nodes on [0, 1], both ends included, and weights; exact to degree 2 steps - 3.

    With its ends as nodes a panel can check its integral against the difference of its end values,
    and a panel that is cut at its nodes leaves each part with both ends known.
    """
    last = np.zeros(steps)
    last[-1] = 1  # the Legendre polynomial of degree steps - 1, whose extrema are the inner nodes
    inner = np.sort(legendre.legroots(legendre.legder(last)).real) if steps > 2 else []
    x = np.concatenate([[-1.0], inner, [1.0]])
    w = 1 / (steps * (steps - 1) * legendre.legval(x, last) ** 2)
    return (x + 1) / 2, w


def kronrod(steps: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Kronrod's extension of Gauss-Lobatto: nodes between its nodes, with them exact much further.

    The new nodes are the zeros of the polynomial of degree steps - 1 that is orthogonal to all of
    lower degree with the weight (1 - x^2) q(x), q having the inner nodes for zeros (Kronrod 1964
    for Gauss; for Lobatto: Gander and Gautschi, BIT 40, 2000). Five nodes become nine, exact to
    degree 13.

    Returns:
      New nodes on [0, 1], [steps - 1]; weights of the old nodes [steps], and of the new ones.
    """
    last = np.zeros(steps)
    last[-1] = 1
    weight = legendre.legmul(legendre.legder(last), legendre.poly2leg([1, 0, -1]))
    x, w = legendre.leggauss(2 * steps)
    basis = legendre.legvander(x, steps - 1)
    products = basis[:, :-1].T @ (basis * (w * legendre.legval(x, weight))[:, None])
    lower = np.linalg.lstsq(products[:, :-1], -products[:, -1], rcond=None)[0]
    new = np.sort(legendre.legroots([*lower, 1.0]).real)
    old = 2 * lobatto(steps)[0] - 1
    nodes = np.concatenate([old, new])
    moments = np.zeros(len(nodes))
    moments[0] = 2
    weights = np.linalg.solve(legendre.legvander(nodes, len(nodes) - 1).T, moments)
    return (new + 1) / 2, weights[:steps] / 2, weights[steps:] / 2
