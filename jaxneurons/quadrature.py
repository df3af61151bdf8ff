"""Quadrature rules on [0, 1] for the attribution path.

A rule is chosen by a frozen `Quadrature`. Fixed rules have the same nodes in every layer:

- `gauss`: Gauss-Legendre, `steps` nodes.
- `right`: alpha = k / steps for k = 1..steps, each weighted 1 / steps. The formula of the QRNCA
  paper (arXiv 2406.10868, section 2 of the method).
- `reference`: alpha = linspace(0, 1, steps), both ends included, each weighted 1 / steps: what
  the paper's public code does. Its weights sum to 1 over an interval it covers steps / (steps - 1)
  times, so it does not converge to the integral faster than 1 / steps.

`adaptive` starts every layer with one panel and splits only the panels whose completeness gap is
too large: see `jaxneurons.attribution`.
"""

import dataclasses
import math
from typing import Literal, get_args

import numpy as np
from numpy.polynomial import legendre

from jaxneurons.errors import ConfigError, near_matches

Rule = Literal["adaptive", "gauss", "right", "reference"]
RULES: tuple[str, ...] = get_args(Rule)

PANEL_NODES = 5
"""Nodes of an adaptive panel: a left Gauss-Radau rule, exact for polynomials of degree 8."""


@dataclasses.dataclass(frozen=True)
class Quadrature:
    """How the integral over the path is computed.

    Attributes:
      rule: one of `RULES`.
      steps: nodes per layer of a fixed rule; `adaptive` ignores it.
      tolerance: `adaptive`: a panel is split while its completeness gap exceeds this share of the
        L2 norm of its layer's attribution (or the noise of float32 probabilities, if larger).
      max_nodes: `adaptive`: most nodes spent on a prompt, as a mean over its layers; what is
        still unresolved then is accepted and shows in the reported error.
    """

    rule: str = "adaptive"
    steps: int = 16
    tolerance: float = 5e-4
    max_nodes: int = 16

    def __post_init__(self) -> None:
        if self.rule not in RULES:
            raise ConfigError(
                f"unknown quadrature rule {self.rule!r}; {near_matches(self.rule, RULES)}"
            )
        least = 2 if self.rule == "reference" else 1
        if self.steps < least:
            raise ConfigError(f"rule {self.rule!r} needs steps >= {least}, got {self.steps}")
        if not (math.isfinite(self.tolerance) and self.tolerance > 0):
            raise ConfigError(f"tolerance must be a positive number, got {self.tolerance!r}")
        if self.max_nodes < PANEL_NODES:
            raise ConfigError(f"max_nodes must be at least {PANEL_NODES}, got {self.max_nodes}")


def nodes_and_weights(rule: str, steps: int) -> tuple[np.ndarray, np.ndarray]:
    """Nodes on [0, 1] and weights of a fixed rule, float64 [steps] each."""
    if rule == "gauss":
        x, w = legendre.leggauss(steps)
        return (x + 1) / 2, w / 2
    if rule == "right":
        return np.arange(1, steps + 1) / steps, np.full(steps, 1 / steps)
    if rule == "reference":
        return np.linspace(0, 1, steps), np.full(steps, 1 / steps)
    raise ConfigError(f"{rule!r} is not a fixed rule; {near_matches(rule, RULES[1:])}")


def left_radau(steps: int) -> tuple[np.ndarray, np.ndarray]:
    """Gauss-Radau nodes on [0, 1] that include 0, and weights; exact up to degree 2 steps - 2.

    The left end is a node, so a row of panels knows the path's value at every boundary between
    them, and each panel can check its own integral against the difference of its end values.
    """
    coefficients = np.zeros(steps + 1)
    coefficients[steps - 1 :] = 1  # P_{n-1} + P_n vanishes at -1 and at the inner nodes
    x = np.sort(legendre.legroots(coefficients).real)
    x[0] = -1.0
    top = legendre.legval(x, np.eye(steps)[steps - 1])
    w = (1 - x) / (steps * top) ** 2
    return (x + 1) / 2, w / 2
