"""Where the neurons of a run are, what they share, and what they say.

Section "analyses" of arXiv 2406.10868, as tidy rows.
"""

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxneurons.checkpoints.loading import LM
from jaxneurons.errors import ConfigError, DataError
from jaxneurons.model import layers
from jaxneurons.neurons.sets import Neuron
from jaxneurons.prompts.queries import Query
from jaxneurons.qrnca import method as qrnca
from jaxneurons.qrnca import pcr
from jaxneurons.qrnca.effects import change_rows, evaluation_rows
from jaxneurons.qrnca.run import Progress, Run, make_run
from jaxneurons.qrnca.trials import OWN, run_trials

Row = dict[str, Any]
KINDS = ("up", "gate", "act")
"""Kinds of neurons that share their numbering."""


def neuron_rows(run: Run) -> list[Row]:
    """A row for each neuron of each group: accumulated naica, and how many queries have it.

    `num_layers` and `width` (neurons of a layer) are the model's, the same in every row.
    """
    rows = []
    for group, members in run.groups.items():
        weight: dict[Neuron, float] = {}
        count: dict[Neuron, int] = {}
        for query in members:
            found = run.located.neurons[query]
            for neuron, naica in zip(found.neurons, found.naica, strict=True):
                weight[neuron] = weight.get(neuron, 0.0) + naica
                count[neuron] = count.get(neuron, 0) + 1
        for neuron in sorted(weight):
            rows.append(
                {
                    "group": group,
                    "layer": neuron.layer,
                    "index": neuron.index,
                    "queries": count[neuron],
                    "naica": weight[neuron],
                    "num_layers": run.layers,
                    "width": run.width,
                }
            )
    return rows


def count_rows(run: Run) -> list[Row]:
    """Query-relevant neurons per query, by group: mean, spread, and how many different ones."""
    rows = []
    for group, members in {"all": [q.id for q in run.queries], **run.groups}.items():
        sets = [run.located.neurons[query].neurons for query in members]
        sizes = np.array([len(each) for each in sets])
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
    found: dict[tuple[str, int], list[float]] = {}
    for group in run.groups:
        for layer in range(run.layers):
            found[group, layer] = [0, 0.0]
    for row in neurons:
        here = found[row["group"], row["layer"]]
        here[0] += row["queries"]
        here[1] += row["naica"]
    whole: dict[str, float] = {}
    for (group, _), (count, _) in found.items():
        whole[group] = whole.get(group, 0) + count
    return [
        {
            "group": group,
            "layer": layer,
            "neurons": int(count),
            "share": count / whole[group] if whole[group] else 0.0,
            "naica": weight,
        }
        for (group, layer), (count, weight) in found.items()
    ]


def written_directions(lm: LM, neurons: Sequence[Neuron], site: str) -> jax.Array:
    """What each neuron adds to the residual stream per unit of activation, [neuron, hidden].

    Raises:
      ConfigError: a site that writes nothing by itself (q, k, v).
    """
    at = tuple(np.array(neurons, np.int32).reshape(-1, 2).T)
    if site in KINDS:
        return jnp.asarray(lm.params["layers"]["ffn"]["down"]["kernel"])[at]
    if site in ("down", "o"):
        return jax.nn.one_hot(at[1], lm.config.hidden_size)
    raise ConfigError(
        f"neurons of site {site!r} write nothing to the residual stream by themselves"
    )


def words(
    lm: LM, neurons: Sequence[Neuron], *, site: str = "up", count: int = 8
) -> list[tuple[list[str], list[str]]]:
    """Tokens that each neuron promotes and demotes most, through the unembedding.

    The neuron's row of the down projection, weighted by the final norm, times the unembedding: for
    a positive activation, and without what the layers above do to it.
    """
    if not neurons:
        return []
    direction = written_directions(lm, neurons, site) * lm.params["final_norm"]["scale"]
    logits = layers.project(lm.params, direction, lm.config)
    both = (jax.lax.top_k(logits, count)[1], jax.lax.top_k(-logits, count)[1])
    up, down = (np.asarray(ids).tolist() for ids in both)

    def text(ids: list[int]) -> list[str]:
        return [str(lm.tokenizer.decode([i], clean_up_tokenization_spaces=False)) for i in ids]

    return [(text(a), text(b)) for a, b in zip(up, down, strict=True)]


def word_rows(run: Run, neurons: Sequence[Row], *, each: int = 5) -> list[Row]:
    """What the common neurons say, and the `each` heaviest neurons of every group."""
    chosen = [("common", neuron, count) for neuron, count in run.located.common]
    for group in run.groups:
        own = sorted((r for r in neurons if r["group"] == group), key=lambda r: -r["naica"])
        chosen += [(group, Neuron(r["layer"], r["index"]), r["queries"]) for r in own[:each]]
    said = words(run.lm, [neuron for _, neuron, _ in chosen], site=run.settings.site)
    return [
        {
            "group": group,
            "layer": neuron.layer,
            "index": neuron.index,
            "queries": queries,
            "promotes": " | ".join(promotes),
            "demotes": " | ".join(demotes),
        }
        for (group, neuron, queries), (promotes, demotes) in zip(chosen, said, strict=True)
    ]


def balanced(queries: Sequence[Query], limit: int) -> list[Query]:
    """At most `limit` queries, as many of each group as can be, in their order."""
    groups: dict[str, list[Query]] = {}
    for query in queries:
        groups.setdefault(query.group, []).append(query)
    rounds = itertools.zip_longest(*groups.values())
    chosen = [query for each in rounds for query in each if query is not None][:limit]
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
    run: Run, *, kinds: Sequence[str] = KINDS, limit: int = 60, progress: Progress | None = None
) -> tuple[list[Row], list[Row]]:
    """The same queries located at other sites: do they name the same neurons, and which matter?

    Each site is a run of its own, in `sites/` of the run directory.

    Returns:
      A row for each pair of sites: mean shared share and average overlap of the queries' rankings;
      and `evaluation_rows` of each site, with a column `site`.

    Raises:
      ConfigError: sites that do not share their numbering, or fewer than two.
    """
    for kind in kinds:
        if kind not in KINDS:
            raise ConfigError(f"sites to compare are of {', '.join(KINDS)}; got {kind!r}")
    if len(set(kinds)) < 2:
        raise ConfigError(f"at least two of {', '.join(KINDS)} are needed to compare")
    queries = balanced(run.queries, limit)
    pcr.unrelated_queries(queries)  # before hours of locating: there must be two groups
    qrnca.check_count(len(queries), run.settings.common)
    runs = {
        kind: make_run(
            run.path / "sites" / f"{kind}-{len(queries)}",
            run.lm,
            queries,
            dataclasses.replace(run.settings, site=kind),
            batch_size=run.batch_size,
            cache_bytes=0,  # each is evaluated once, with one method
            progress=progress,
        )
        for kind in kinds
    }
    effects = []
    for kind, own in runs.items():
        outcomes = run_trials(own, methods=(OWN,))
        rows = evaluation_rows(change_rows(own, outcomes))
        effects += [{"site": kind, **row} for row in rows if row["group"] == "all"]
    rankings = {
        kind: {query: found.neurons for query, found in own.located.neurons.items()}
        for kind, own in runs.items()
    }
    pairs = [
        {"site": a, "other": b, **_agreement(rankings[a], rankings[b])}
        for a, b in itertools.combinations(kinds, 2)
    ]
    return pairs, effects


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


def against_rows(run: Run, other: Path) -> list[Row]:
    """The same queries in another run: multi-choice beside cloze, or another rule or prompt set.

    A row for each group and for all: how far the neurons of queries of one id agree.

    Raises:
      DataError: no query in both, or another model's neurons.
    """
    from jaxneurons.qrnca.run import open_run

    second = open_run(other, run.lm)
    if second.settings.site not in KINDS or run.settings.site not in KINDS:
        same = second.settings.site == run.settings.site
        if not same:
            raise DataError(f"{other}: neurons of site {second.settings.site!r} are other neurons")
    mine = {query: found.neurons for query, found in run.located.neurons.items()}
    theirs = {query: found.neurons for query, found in second.located.neurons.items()}
    rows = []
    for group, members in {"all": list(mine), **run.groups}.items():
        both = [query for query in members if query in theirs]
        if not both:
            continue
        found = _agreement({q: mine[q] for q in both}, theirs)
        rows.append({"group": group, "other": str(other), **found})
    if not rows:
        raise DataError(f"{other}: no query of it has the id of one here")
    return rows
