"""The probability change ratio, and how sure it is: bootstrap over queries.

Section "evaluation" of arXiv 2406.10868: PCR = |mean related change| / |mean unrelated change| of
the right answer's probability, relative to what it was, when neurons are boosted or suppressed.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from jaxneurons.engine.bootstrap import DRAWS, Interval, interval, resamples
from jaxneurons.errors import DataError
from jaxneurons.prompts.queries import Query

FACTORS = {"boost": 2.0, "suppress": 0.0}


class Ratio(NamedTuple):
    """A probability change ratio and what it is made of.

    Attributes:
      related: mean relative change of the answer's probability, a query's own neurons changed.
      unrelated: the same with the neurons of a query of another group.
      pcr: |related| / |unrelated|; infinite where nothing unrelated changes, NaN if nothing does.
      absolute: mean |related change| / mean |unrelated change|: unrelated changes of both signs do
        not cancel here, so that neurons which disturb other queries cannot look specific.
    """

    related: Interval
    unrelated: Interval
    pcr: Interval
    absolute: Interval


def ratio(
    related: np.ndarray, unrelated: np.ndarray, *, draws: int = DRAWS, seed: int = 0
) -> Ratio:
    """PCR of changes per query, both [query]; the same resample of queries in both means."""
    if len(related) != len(unrelated) or not len(related):
        raise DataError(f"{len(related)} related and {len(unrelated)} unrelated changes")
    index = resamples(len(related), draws=draws, seed=seed)
    means, unrelated_means = related[index].mean(1), unrelated[index].mean(1)
    sizes, others = np.abs(related), np.abs(unrelated)
    with np.errstate(divide="ignore", invalid="ignore"):
        value = float(np.abs(np.divide(related.mean(), unrelated.mean())))
        values = np.abs(means / unrelated_means)
        absolute = float(np.divide(sizes.mean(), others.mean()))
        absolutes = sizes[index].mean(1) / others[index].mean(1)
    return Ratio(
        interval(float(related.mean()), means),
        interval(float(unrelated.mean()), unrelated_means),
        interval(value, values),
        interval(absolute, absolutes),
    )


def unrelated_queries(queries: Sequence[Query], seed: int = 0) -> dict[str, str]:
    """For each query one of another group, at random, each used once if that is possible.

    It is not where one group holds more than half of the queries: the others are then used again,
    as evenly as can be.

    Raises:
      DataError: one group only.
    """
    groups: dict[str, list[str]] = {}
    for query in queries:
        groups.setdefault(query.group, []).append(query.id)
    if len(groups) < 2:
        raise DataError(
            f"one group only ({', '.join(map(repr, groups)) or 'no query'}): unrelated queries "
            "come from other groups; give queries of at least two"
        )
    rng = np.random.default_rng(seed)
    shuffled = [[ids[i] for i in rng.permutation(len(ids))] for ids in groups.values()]
    shuffled.sort(key=len, reverse=True)
    order = [name for ids in shuffled for name in ids]
    group_of = {query.id: query.group for query in queries}
    most, count = len(shuffled[0]), len(order)
    if 2 * most > count:
        rest = order[most:]
        unrelated = {name: rest[i % len(rest)] for i, name in enumerate(order[:most])}
        unrelated.update(zip(rest, order[:most], strict=False))
        return {query.id: unrelated[query.id] for query in queries}
    # At random, and where that meets the same group, swapped with one that mends it.
    target = [order[i] for i in rng.permutation(count)]
    group = [group_of[name] for name in order]
    for a in range(count):
        for b in rng.permutation(count).tolist() if group_of[target[a]] == group[a] else ():
            if group_of[target[b]] != group[a] and group_of[target[a]] != group[b]:
                target[a], target[b] = target[b], target[a]
                break
    if any(group_of[a] == b for a, b in zip(target, group, strict=True)):
        # A shift by the largest group meets no group twice.
        target = [order[(i + most) % count] for i in range(count)]
    unrelated = dict(zip(order, target, strict=True))
    return {query.id: unrelated[query.id] for query in queries}
