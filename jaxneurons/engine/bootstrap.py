"""How sure an average is: percentile bootstrap over what it was taken of."""

from typing import NamedTuple

import numpy as np

DRAWS = 2000
"""Bootstrap resamples."""


class Interval(NamedTuple):
    """An estimate with its 95 % percentile bootstrap interval."""

    value: float
    low: float
    high: float


def resamples(count: int, *, draws: int = DRAWS, seed: int = 0) -> np.ndarray:
    """Indices of what each bootstrap sample holds, [draw, sample]."""
    return np.random.default_rng(seed).integers(count, size=(draws, count))


def interval(value: float, draws: np.ndarray) -> Interval:
    """The 95 % percentile interval of bootstrap values; NaNs among them are left out."""
    kept = np.sort(draws[~np.isnan(draws)])
    if not len(kept):
        return Interval(value, float("nan"), float("nan"))
    ends = (float(kept[round(share * (len(kept) - 1))]) for share in (0.025, 0.975))
    return Interval(value, *ends)


def mean(values: np.ndarray, *, draws: int = DRAWS, seed: int = 0) -> Interval:
    """The mean with its interval; every value counts as one draw."""
    index = resamples(len(values), draws=draws, seed=seed)
    return interval(float(values.mean()), values[index].mean(1))
