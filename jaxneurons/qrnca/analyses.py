"""Where the neurons of a run are, what they share, and what they say.

Section "analyses" of arXiv 2406.10868, as tidy rows.
"""

import dataclasses
import itertools
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxneurons.engine.readout import words
from jaxneurons.errors import ConfigError, DataError
from jaxneurons.neurons.sets import Neuron, Ranking, show_neuron
from jaxneurons.prompts.queries import Query
from jaxneurons.qrnca import method as qrnca
from jaxneurons.qrnca import pcr
from jaxneurons.qrnca.caveats import CaveatWarning
from jaxneurons.qrnca.effects import change_rows, evaluation_rows
from jaxneurons.qrnca.locating import locate
from jaxneurons.qrnca.run import Run
from jaxneurons.qrnca.trials import OWN, run_trials
from jaxneurons.storage.progress import Progress
from jaxneurons.storage.tables import Row

KINDS = ("up", "gate", "act")
"""Kinds of neurons that share their numbering."""
KINDS_LIMIT = 60
"""Queries that kinds are compared on, at most, unless told otherwise."""


def neuron_rows(run: Run) -> list[Row]:
    """A row for each neuron of each group: accumulated naica, and how many queries have it.

    `num_layers` and `width` (neurons of a layer) are the model's, the same in every row.
    """
    rows = []
    for group, members in run.groups.items():
        weight: dict[Neuron, float] = {}
        count: dict[Neuron, int] = {}
        for query in members:
            for neuron, naica in zip(run[query].ranking, run[query].naica, strict=True):
                weight[neuron] = weight.get(neuron, 0.0) + naica
                count[neuron] = count.get(neuron, 0) + 1
        for neuron in sorted(weight):
            rows.append(
                {
                    "group": group,
                    "layer": neuron.layer,
                    "index": neuron.index,
                    **_expert(run, neuron),
                    "queries": count[neuron],
                    "naica": weight[neuron],
                    "num_layers": run.layers,
                    "width": run.width,
                }
            )
    return rows


def _expert(run: Run, neuron: Neuron) -> Row:
    """A column of rows about neurons of experts: layer, expert and index for people."""
    if not run.lm.config.experts:
        return {}
    return {"neuron": show_neuron(neuron, run.settings.site, run.lm.config)}


def count_rows(run: Run) -> list[Row]:
    """Query-relevant neurons per query, by group: mean, spread, and how many different ones."""
    rows = []
    for group, members in {"all": [q.id for q in run.queries], **run.groups}.items():
        sets = [run[query].ranking for query in members]
        sizes = np.array([len(ranking) for ranking in sets])
        rows.append(
            {
                "group": group,
                "queries": len(members),
                "mean": float(sizes.mean()),
                "sd": float(sizes.std(ddof=1)) if len(sizes) > 1 else None,
                "min": int(sizes.min()),
                "max": int(sizes.max()),
                "different": len(set(itertools.chain(*sets))),
            }
        )
    return rows


def overlap_rows(neurons: Sequence[Row]) -> list[Row]:
    """Neurons that two groups share, of all queries together: a row for each pair of groups.

    `overlap` is their share of the first group's neurons, `jaccard` their share of either's.
    """
    sets: dict[str, set[tuple[int, int]]] = {}
    for row in neurons:
        sets.setdefault(row["group"], set()).add((row["layer"], row["index"]))
    return [
        {
            "group": a,
            "other": b,
            "neurons": len(sets[a]),
            "shared": len(sets[a] & sets[b]),
            "overlap": len(sets[a] & sets[b]) / len(sets[a]),
            "jaccard": len(sets[a] & sets[b]) / len(sets[a] | sets[b]),
        }
        for a in sets
        for b in sets
    ]


def layer_rows(run: Run, neurons: Sequence[Row]) -> list[Row]:
    """How many of a group's neurons (once per query), and how much naica, each layer has."""
    sums: dict[tuple[str, int], list[float]] = {}
    for group in run.groups:
        for layer in range(run.layers):
            sums[group, layer] = [0, 0.0]
    for row in neurons:
        here = sums[row["group"], row["layer"]]
        here[0] += row["queries"]
        here[1] += row["naica"]
    whole: dict[str, float] = {}
    for (group, _), (count, _) in sums.items():
        whole[group] = whole.get(group, 0) + count
    return [
        {
            "group": group,
            "layer": layer,
            "neurons": int(count),
            "share": count / whole[group] if whole[group] else 0.0,
            "naica": weight,
        }
        for (group, layer), (count, weight) in sums.items()
    ]


def word_rows(run: Run, neurons: Sequence[Row], *, count: int = 5) -> list[Row]:
    """What the common neurons say, and the `count` heaviest neurons of every group."""
    chosen = [("common", neuron, clusters) for neuron, clusters in run.common]
    for group in run.groups:
        members = sorted((r for r in neurons if r["group"] == group), key=lambda r: -r["naica"])
        chosen += [(group, Neuron(r["layer"], r["index"]), r["queries"]) for r in members[:count]]
    ranking = Ranking(tuple(neuron for _, neuron, _ in chosen), run.settings.site)
    tokens = words(run.lm, ranking)
    return [
        {
            "group": group,
            "layer": neuron.layer,
            "index": neuron.index,
            **_expert(run, neuron),
            "queries": queries,
            "promotes": " | ".join(promotes),
            "demotes": " | ".join(demotes),
        }
        for (group, neuron, queries), (promotes, demotes) in zip(chosen, tokens, strict=True)
    ]


def balanced(queries: Sequence[Query], limit: int) -> list[Query]:
    """At most `limit` queries, as many of each group as can be, in their order."""
    groups: dict[str, list[Query]] = {}
    for query in queries:
        groups.setdefault(query.group, []).append(query)
    rounds = itertools.zip_longest(*groups.values())
    chosen = [query for members in rounds for query in members if query is not None][:limit]
    kept = {query.id for query in chosen}
    return [query for query in queries if query.id in kept]


def average_overlap(a: Sequence[Any], b: Sequence[Any]) -> float:
    """Mean over depths of the share that two rankings have in common down to that depth.

    Depths go to the longer one's end; 1 for equal rankings, 0 for disjoint ones.
    """
    depth = max(len(a), len(b))
    if not depth:
        return float("nan")
    return float(np.mean([len(set(a[:d]) & set(b[:d])) / d for d in range(1, depth + 1)]))


def kind_rows(
    run: Run,
    *,
    kinds: Sequence[str] = KINDS,
    limit: int = KINDS_LIMIT,
    out: Path | None = None,
    progress: Progress | None = None,
) -> tuple[list[Row], list[Row]]:
    """The same queries located at other sites: do they name the same neurons, and which matter?

    Args:
      run: whose queries, with its settings but the site.
      kinds: sites, of `KINDS`.
      limit: of queries.
      out: where each site is a run of its own, in `sites/`; None: they stay in memory.
      progress: called with how many prompts of a site are done, of how many.

    Returns:
      A row for each pair of sites: mean shared share and average overlap of the queries' rankings;
      and `evaluation_rows` of each site, with a column `site`.

    Raises:
      ConfigError: sites that do not share their numbering, or fewer than two.
    """
    check_kinds(kinds)
    queries = balanced(run.queries, limit)
    pcr.unrelated_queries(queries)  # before hours of locating: there must be two groups
    qrnca.check_count(len(queries), run.settings.common)
    runs = {}
    for kind in kinds:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", CaveatWarning)  # given when the run was located
            runs[kind] = locate(
                run.lm,
                queries,
                settings=dataclasses.replace(run.settings, site=kind),
                out=None if out is None else out / "sites" / f"{kind}-{len(queries)}",
                batch_size=run.batch_size,
                cache_bytes=0,  # each is evaluated once, with one method
                progress=progress,
            )
    effects = []
    for kind, at_site in runs.items():
        outcomes = run_trials(at_site, methods=(OWN,))
        rows = evaluation_rows(change_rows(at_site, outcomes))
        effects += [{"site": kind, **row} for row in rows if row["group"] == "all"]
    rankings = {kind: _rankings(at_site) for kind, at_site in runs.items()}
    pairs = [
        {"site": a, "other": b, **_agreement(rankings[a], rankings[b])}
        for a, b in itertools.combinations(kinds, 2)
    ]
    return pairs, effects


def check_kinds(kinds: Sequence[str]) -> None:
    """Raise `ConfigError` unless these are two sites or more that share their numbering."""
    for kind in kinds:
        if kind not in KINDS:
            raise ConfigError(f"sites to compare are of {', '.join(KINDS)}; got {kind!r}")
    if len(set(kinds)) < 2:
        raise ConfigError(f"at least two of {', '.join(KINDS)} are needed to compare")


def _rankings(run: Run) -> dict[str, list[Neuron]]:
    return {query: located.ranking for query, located in run.items()}


def _agreement(
    a: Mapping[str, Sequence[Neuron]], b: Mapping[str, Sequence[Neuron]]
) -> dict[str, float | int | None]:
    """How much two rankings of each query agree, beside rankings of different queries."""
    ids = [query for query in a if query in b]
    shifted = ids[1:] + ids[:1]

    def jaccard(x: Sequence[Neuron], y: Sequence[Neuron]) -> float:
        union = set(x) | set(y)
        return len(set(x) & set(y)) / len(union) if union else float("nan")

    def mean(values: list[float]) -> float | None:
        kept = [value for value in values if not np.isnan(value)]
        return float(np.mean(kept)) if kept else None

    return {
        "queries": len(ids),
        "jaccard": mean([jaccard(a[i], b[i]) for i in ids]),
        "average_overlap": mean([average_overlap(a[i], b[i]) for i in ids]),
        "jaccard_other_query": mean(
            [jaccard(a[i], b[j]) for i, j in zip(ids, shifted, strict=True)]
        )
        if len(ids) > 1
        else None,
    }


def against_rows(run: Run, other: Run, name: str) -> list[Row]:
    """The same queries in another run: multi-choice beside cloze, or another rule or prompt set.

    A row for each group and for all: how far the neurons of queries of one id agree.

    Args:
      run: whose queries and groups the rows are of.
      other: the run that it is compared with.
      name: of the other run.

    Raises:
      DataError: no query in both, or neurons of sites that do not share their numbering.
    """
    sites = {run.settings.site, other.settings.site}
    if len(sites) > 1 and not sites <= set(KINDS):
        raise DataError(f"{name}: neurons of site {other.settings.site!r} are other neurons")
    rankings, others = _rankings(run), _rankings(other)
    rows = []
    for group, members in {"all": list(rankings), **run.groups}.items():
        both = [query for query in members if query in others]
        if not both:
            continue
        agreement = _agreement({query: rankings[query] for query in both}, others)
        rows.append({"group": group, "other": name, **agreement})
    if not rows:
        raise DataError(f"{name}: no query of it has the id of one here")
    return rows
