"""The files of a QRNCA run: what is written of located neurons, and how it is read again.

`queries.jsonl` (the queries, with their separators), `neurons.jsonl` (a line per query),
`common_neurons.json`, `run.json` (where everything came from and how exact it is), and in `parts/`
the scores of the prompts, batch by batch.
"""

import dataclasses
import itertools
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxneurons.checkpoints.loading import LM
from jaxneurons.checkpoints.provenance import versions
from jaxneurons.errors import DataError
from jaxneurons.neurons.sets import Neuron
from jaxneurons.prompts.answers import LOW_ODDS, LOW_OPTION_MASS
from jaxneurons.prompts.queries import Query
from jaxneurons.qrnca.encoding import prompt_count
from jaxneurons.qrnca.method import PromptScores, QRNCAConfig, QueryNeurons
from jaxneurons.storage.json_file import read_values
from jaxneurons.storage.store import Parts, write_json, write_json_lines
from jaxneurons.storage.tables import read_json
from jaxneurons.storage.typed_json import typed

FORMAT = 3
"""Of the parts; counts up when what is in them changes."""
QUERIES, NEURONS, COMMON, RUN = "queries.jsonl", "neurons.jsonl", "common_neurons.json", "run.json"

ByQuery = Mapping[str, QueryNeurons]
Common = Sequence[tuple[Neuron, int]]
"""Common neurons with the number of clusters each is in, most frequent first."""
Scores = Mapping[str, Sequence[PromptScores]]
"""By query id, the scores of each of its prompts."""


def pack(scores: Mapping[int, PromptScores], seconds: float) -> dict[str, np.ndarray]:
    """The arrays of a part: prompts' scores by their index in the plan."""
    values = list(scores.values())
    return {
        "index": np.array(list(scores)),
        "sizes": np.array([len(v.neurons) for v in values]),
        "neurons": np.concatenate([v.neurons for v in values]),
        "scores": np.concatenate([v.scores for v in values]),
        **{
            name: np.array([getattr(v, name) for v in values])
            for name in PromptScores._fields
            if name not in ("neurons", "scores")
        },
        "seconds": np.array(seconds),
    }


def unpack(part: Mapping[str, np.ndarray]) -> dict[int, PromptScores]:
    """Prompts' scores by their index in the plan, from the arrays of a part."""
    cuts = np.cumsum(part["sizes"])[:-1]
    neurons, scores = np.split(part["neurons"], cuts), np.split(part["scores"], cuts)
    return {
        int(index): PromptScores(
            neurons=neurons[i],
            scores=scores[i],
            total=float(part["total"][i]),
            probability=float(part["probability"][i]),
            option_mass=float(part["option_mass"][i]),
            correct=bool(part["correct"][i]),
            gap=part["gap"][i],
            error=part["error"][i],
            nodes=int(part["nodes"][i]),
            active=part["active"][i],
            activation=part["activation"][i],
            odds=float(part["odds"][i]),
            choice=int(part["choice"][i]),
        )
        for i, index in enumerate(part["index"])
    }


def read_parts(parts: Parts, count: int) -> list[PromptScores]:
    """The scores of so many prompts, in order, from the parts of a finished run.

    Raises:
      DataError: a part is missing or damaged; says which.
    """
    scores: dict[int, PromptScores] = {}
    number = 0
    while (part := parts.load(number)) is not None:
        try:
            scores.update(unpack(part))
        except (KeyError, IndexError, ValueError, TypeError):
            break
        number += 1
    if set(scores) != set(range(count)):
        raise DataError(f"parts/{number:05d}.npz is missing or damaged")
    return [scores[index] for index in range(count)]


def by_query(
    scores: Sequence[PromptScores], queries: Sequence[Query], settings: QRNCAConfig
) -> Scores:
    """The scores of each query's prompts that are used, from those of all in order."""
    order = iter(scores)
    return {
        query.id: list(itertools.islice(order, prompt_count(query, settings))) for query in queries
    }


# --- results --------------------------------------------------------------------------------------


def write_results(
    path: Path,
    queries: Sequence[Query],
    *,
    neurons: ByQuery,
    common: Common,
    scores: Scores,
    facts: Mapping[str, Any],
) -> None:
    """Write neurons, common neurons and, last, run.json: with it a run is finished."""
    lines = (_line(query, neurons[query.id], scores[query.id]) for query in queries)
    write_json_lines(path / NEURONS, lines)
    write_json(
        path / COMMON,
        {
            "clusters": len(queries),
            "neurons": [
                {"neuron": list(neuron), "clusters": count, "share": count / len(queries)}
                for neuron, count in common
            ],
        },
    )
    write_json(path / RUN, facts)


def _line(query: Query, neurons: QueryNeurons, scores: Sequence[PromptScores]) -> dict[str, Any]:
    mass = [prompt.option_mass for prompt in scores]
    return {
        "id": query.id,
        "group": query.group,
        "neurons": [list(neuron) for neuron in neurons.ranking],
        "naica": neurons.naica,
        "na": neurons.na,
        "ica": neurons.ica,
        "probability": float(np.mean([prompt.probability for prompt in scores])),
        "probabilities": [prompt.probability for prompt in scores],
        "correct": [prompt.correct for prompt in scores],
        "odds": [prompt.odds for prompt in scores],
        "option_mass": None if math.isnan(mass[0]) else mass,
        "gap_max": float(max(prompt.gap.max() for prompt in scores)),
    }


def read_queries_of(path: Path) -> list[Query]:
    """The queries of a run, with their separators.

    Raises:
      DataError: the file is missing or damaged.
    """
    path = path / QUERIES
    return [
        typed(Query, record, f"{path}: query {n}") for n, record in enumerate(_records(path), 1)
    ]


def read_neurons_of(path: Path, settings: QRNCAConfig) -> dict[str, QueryNeurons]:
    """The neurons of each query of a run.

    Raises:
      DataError: the file is missing or damaged.
    """
    path = path / NEURONS
    kind = {
        "id": str,
        "neurons": tuple[tuple[int, ...], ...],
        **dict.fromkeys(("naica", "na", "ica"), tuple[float, ...]),
    }
    neurons = {}
    for number, record in enumerate(_records(path), 1):
        where = f"{path}: line {number}"
        line = typed(kind, record, where)
        ranking, naica, na, ica = (line[name] for name in ("neurons", "naica", "na", "ica"))
        exact = [share * rarity for share, rarity in zip(na, ica, strict=False)] == list(naica)
        if len({len(ranking), len(naica), len(na), len(ica)}) > 1 or not exact:
            raise DataError(f"{where}: neurons and scores do not go together")
        neurons[line["id"]] = QueryNeurons(
            ranking=[_neuron(pair, where) for pair in ranking],
            naica=list(naica),
            na=list(na),
            ica=list(ica),
            site=settings.site,
        )
    return neurons


def read_common_of(path: Path) -> list[tuple[Neuron, int]]:
    """The common neurons of a run with the number of clusters each is in.

    Raises:
      DataError: the file is missing or damaged.
    """
    path = path / COMMON
    records = read_json(path).get("neurons")
    if not isinstance(records, list):
        raise DataError(f"{path}: no list of neurons")
    kind = {"neuron": tuple[int, ...], "clusters": int}
    common = []
    for number, record in enumerate(records, 1):
        where = f"{path}: neuron {number}"
        entry = typed(kind, record, where)
        common.append((_neuron(entry["neuron"], where), entry["clusters"]))
    return common


def _records(path: Path) -> list[Any]:
    values = read_values(path)
    return values if isinstance(values, list) else [values]


def _neuron(pair: tuple[int, ...], where: str) -> Neuron:
    if len(pair) != 2 or min(pair) < 0:
        raise DataError(f"{where}: {list(pair)} is no layer and index of a neuron")
    return Neuron(*pair)


# --- run.json -------------------------------------------------------------------------------------

_NEEDED = {
    "model": {"source": str, "sha256": str},
    "queries": int,
    "prompts": int,
    "neurons_per_query": {"mean": float, "min": int, "max": int},
    "answers": {"accuracy": float, "probability_mean": float, "option_mass_mean": float | None},
    "completeness": {
        "gap_median": float,
        "gap_max": float,
        "gap_max_layer": int,
        "nodes_mean": float,
    },
    "seconds": {"attribution": float, "per_prompt": float},
}
"""What is read of run.json; there is more in it."""


def read_facts(path: Path, identity: Mapping[str, Any]) -> dict[str, Any]:
    """The contents of a run.json.

    Raises:
      DataError: it is missing, damaged, or says another model or other settings than its parts
        were made with.
    """
    facts = read_json(path)
    model = typed(_NEEDED, facts, str(path))["model"]
    settings = json.loads(json.dumps(identity["settings"]))
    for name, same in (
        ("another model", model["sha256"] == identity["model"]),
        ("other settings", facts.get("settings") == settings),
    ):
        if not same:
            raise DataError(f"{path}: says {name} than its parts were made with")
    return facts


def facts_of(
    lm: LM,
    queries: Sequence[Query],
    settings: QRNCAConfig,
    *,
    scores: Scores,
    neurons: ByQuery,
    seconds: float,
) -> dict[str, Any]:
    """The contents of run.json: what was located where, how exactly, and in what time."""
    prompts = [prompt for members in scores.values() for prompt in members]
    gaps = np.array([prompt.gap for prompt in prompts])
    errors = np.array([prompt.error for prompt in prompts])
    mass = np.array([p.option_mass for p in prompts if not math.isnan(p.option_mass)])
    counts = np.array([len(located.ranking) for located in neurons.values()])
    return {
        "method": "QRNCA (arXiv 2406.10868)",
        "model": lm.facts(),
        "settings": dataclasses.asdict(settings),
        "queries": len(queries),
        "groups": {
            group: sum(query.group == group for query in queries)
            for group in dict.fromkeys(query.group for query in queries)
        },
        "prompts": len(prompts),
        "neurons_per_query": {
            "mean": float(counts.mean()),
            "min": int(counts.min()),
            "max": int(counts.max()),
        },
        "answers": {
            "accuracy": float(np.mean([prompt.correct for prompt in prompts])),
            "probability_mean": float(np.mean([prompt.probability for prompt in prompts])),
            "option_mass_mean": float(mass.mean()) if len(mass) else None,
            "option_mass_min": float(mass.min()) if len(mass) else None,
            "option_mass_low_prompts": int((mass < LOW_OPTION_MASS).sum()),
            "unlikely_prompts": sum(
                math.isnan(p.option_mass) and p.odds < LOW_ODDS for p in prompts
            ),
        },
        "completeness": {
            "gap_median": float(np.median(gaps)),
            "gap_max": float(gaps.max()),
            "gap_max_layer": int(gaps.max(0).argmax()),
            "error_median": float(np.median(errors)),
            "error_max": float(errors.max()),
            "nodes_mean": float(np.mean([prompt.nodes for prompt in prompts])),
        },
        "seeds": {},
        "seconds": {
            "attribution": round(seconds, 3),
            "per_prompt": round(seconds / len(prompts), 4),
        },
        "versions": versions(),
    }
