"""How well edits at some layers serve: measures of each request, and a score of each candidate."""

import math
from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Float

from jaxneurons.edit.outcomes import SHARES
from jaxneurons.edit.requests import EditRequest
from jaxneurons.engine import bootstrap
from jaxneurons.storage.tables import Row

Layers = tuple[int, ...]
SCORE = ("efficacy_free", "generalisation_free", "locality_free")
"""What the score is the harmonic mean of: means over requests of these measures."""
NUMBERS = (*SHARES, "locality_kl", "probability_new", "probability_old")
"""Measures of a request that are kept."""


def name_of(layers: Layers) -> str:
    """Layers as tables name them: "5", or "4-8" for a span without gaps."""
    if len(layers) > 1 and layers == tuple(range(layers[0], layers[-1] + 1)):
        return f"{layers[0]}-{layers[-1]}"
    return ",".join(map(str, layers))


def request_rows(
    layers: Layers, requests: Sequence[EditRequest], part: Mapping[str, np.ndarray]
) -> list[Row]:
    """A row for each request at a candidate, of what was measured (NaN: None)."""
    rows = []
    for i, request in enumerate(requests):
        numbers = (None if math.isnan(x) else x for x in part["numbers"][i].tolist())
        rows.append(
            {
                "layers": name_of(layers),
                "number": i,
                "request": request.id or str(i),
                **dict(zip(NUMBERS, numbers, strict=True)),
                "reached": bool(part["reached"][i]),
                "failed": str(part["failed"]),
            }
        )
    return rows


def score_table(
    spans: Sequence[Layers],
    values: Mapping[Layers, Float[np.ndarray, "request measure"]],
    rows: Sequence[Row],
    score: Sequence[str],
    seed: int,
) -> tuple[list[Row], list[str]]:
    """A row for each candidate, and the measures that its score is of."""
    columns = [NUMBERS.index(name) for name in score]
    stacked = np.stack([values[span] for span in spans])  # [candidate, request, measure]
    some = np.asarray(~np.isnan(stacked[..., columns]).all((0, 1)))
    parts = [name for name, there in zip(score, some, strict=True) if there] or list(score)
    columns = [NUMBERS.index(name) for name in parts]
    # An edit that failed serves nobody, whatever the other candidates have there.
    failed = np.asarray(np.isnan(stacked).all((1, 2)))
    scored = stacked[..., columns]
    scored[failed] = 0.0
    index = bootstrap.resamples(scored.shape[1], seed=seed)
    scores = harmonic_mean(means(scored))
    draws = harmonic_mean(means(scored[:, index]))  # [candidate, draw]
    best = int(np.argmax(scores))
    table = []
    for c, span in enumerate(spans):
        interval = bootstrap.interval(float(scores[c]), draws[c])
        behind = bootstrap.interval(float(scores[best] - scores[c]), draws[best] - draws[c])
        average = {
            name: None if math.isnan(x) else x
            for name, x in zip(NUMBERS, means(stacked[c]).tolist(), strict=True)
        }
        of_span = [row for row in rows if row["layers"] == name_of(span)]
        table.append(
            {
                "layers": name_of(span),
                "score": interval.value,
                "low": interval.low,
                "high": interval.high,
                **average,
                **(dict.fromkeys(parts, 0.0) if failed[c] else {}),
                "reached": float(np.mean([row["reached"] for row in of_span])),
                "as_good": bool(behind.low <= 0),
                "failed": of_span[0]["failed"],
            }
        )
    return table, parts


def means(values: Float[np.ndarray, "*batch request measure"]) -> Float[np.ndarray, "..."]:
    """Means over requests of what is not NaN; NaN of nothing."""
    there = ~np.isnan(values)
    count = there.sum(-2)
    total = np.where(there, values, 0.0).sum(-2)
    return np.where(count > 0, total / np.maximum(count, 1), np.nan)


def harmonic_mean(values: Float[np.ndarray, "*batch part"]) -> Float[np.ndarray, "*batch"]:
    """Harmonic mean over the last axis of what is not negative; 0 if any is 0."""
    zero = (values == 0).any(-1)
    inverse = 1 / np.where(values == 0, 1.0, values)
    return np.where(zero, 0.0, values.shape[-1] / inverse.sum(-1))
