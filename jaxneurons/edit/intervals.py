"""How sure a mean, or a correlation, is: bootstrap over facts or requests."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from jaxneurons.errors import DataError

DRAWS = 2000
"""Bootstrap resamples."""


class Interval(NamedTuple):
    """An estimate with its 95 % percentile bootstrap interval; NaN where there is none."""

    value: float
    low: float
    high: float


def bootstrap(
    statistic: Callable[[np.ndarray], float], count: int, *, draws: int = DRAWS, seed: int = 0
) -> Interval:
    """A statistic of things that were drawn, with its interval.

    Args:
      statistic: of the things at these indices (each as often as it stands there).
      count: of things.
      draws: resamples.
      seed: of the resampling.

    Raises:
      DataError: nothing to draw from.
    """
    if not count:
        raise DataError("nothing to take a mean of")
    samples = np.random.default_rng(seed).integers(count, size=(draws, count))
    values = np.array([statistic(index) for index in samples])
    values = values[np.isfinite(values)]
    value = statistic(np.arange(count))
    if not len(values):
        return Interval(value, float("nan"), float("nan"))
    low, high = np.quantile(values, (0.025, 0.975))
    return Interval(value, float(low), float(high))


def mean_interval(
    values: Sequence[float] | Float[np.ndarray, " value"], *, draws: int = DRAWS, seed: int = 0
) -> Interval:
    """The mean of values with its interval.

    Raises:
      DataError: no values.
    """
    array = np.asarray(values, np.float64)
    if not len(array):
        raise DataError("nothing to take a mean of")
    samples = np.random.default_rng(seed).integers(len(array), size=(draws, len(array)))
    low, high = np.quantile(array[samples].mean(-1), (0.025, 0.975))
    return Interval(float(array.mean()), float(low), float(high))
