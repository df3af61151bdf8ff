"""Averages over requests with bootstrap intervals, and paired differences between methods."""

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from jaxneurons.edit.outcomes import MEASURES
from jaxneurons.engine import bootstrap
from jaxneurons.storage.tables import Row

UNEDITED, RANDOM = "unedited", "random"
"""The method that changes nothing; the control of a method (of no control, "")."""

KEYS = ("method", "control")
"""Columns whose values stand together, where edits are made one by one."""


def spread(values: Iterable[float | None], name: str, *, seed: int) -> Row:
    """A mean with the ends of its interval, as `name`, `name_low`, `name_high`; None if empty."""
    kept = np.array([value for value in values if value is not None], np.float64)
    if not len(kept):
        return {name: None, f"{name}_low": None, f"{name}_high": None}
    estimate = bootstrap.mean(kept, seed=seed)
    return {name: estimate.value, f"{name}_low": estimate.low, f"{name}_high": estimate.high}


def averages(rows: Sequence[Row], *, seed: int = 0) -> Row:
    """How many requests, how many of them failed, and the mean of every measure."""
    line: Row = {"requests": len(rows), "failed": sum(bool(row["failed"]) for row in rows)}
    for measure in MEASURES:
        line |= spread([row[measure] for row in rows], measure, seed=seed)
    return line


def summary_rows(rows: Sequence[Row], keys: Sequence[str] = KEYS, *, seed: int = 0) -> list[Row]:
    """A row for each method and control: means over requests, with 95 % intervals.

    Args:
      rows: of requests, with `method` and `control`.
      keys: columns whose values stand together.
      seed: of the resampling.
    """
    return [
        {**dict(zip(keys, values, strict=True)), **averages(members, seed=seed)}
        for values, members in _grouped(rows, keys).items()
    ]


def difference_rows(rows: Sequence[Row], *, seed: int = 0) -> list[Row]:
    """A row for each method, measure and what it is held against: mean of paired differences.

    Against "random", the method's own control, and "unedited", the model as it was; over the
    requests that have both numbers.
    """
    table = _grouped(rows, KEYS)
    unedited = {row["request"]: row for row in table.get((UNEDITED, ""), [])}
    differences = []
    for (method, control), members in table.items():
        if control or method == UNEDITED:
            continue
        random = {row["request"]: row for row in table.get((method, RANDOM), [])}
        for against, others in ((RANDOM, random), (UNEDITED, unedited)):
            pairs = [(row, others[row["request"]]) for row in members if row["request"] in others]
            for measure in MEASURES:
                gaps = [
                    row[measure] - other[measure]
                    for row, other in pairs
                    if row[measure] is not None and other[measure] is not None
                ]
                if gaps:
                    line = {"method": method, "against": against, "measure": measure}
                    line |= {"requests": len(gaps), **spread(gaps, "difference", seed=seed)}
                    differences.append(line)
    return differences


def _grouped(rows: Sequence[Row], keys: Sequence[str]) -> dict[tuple[Any, ...], list[Row]]:
    """Rows by their values in some columns, in the order in which these come."""
    table: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        table.setdefault(tuple(row[key] for key in keys), []).append(row)
    return table
