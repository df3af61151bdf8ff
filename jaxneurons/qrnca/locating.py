"""Locating query-relevant neurons for a file of queries, resumable, into a run directory.

Writes `queries.jsonl` (what was asked), `neurons.jsonl` (a line per query), `common_neurons.json`
and `run.json` (where everything came from and how exact it is); `parts/` holds what a killed run
had finished, `caches/` what later stages would compute again without it.
"""

import dataclasses
import json
import math
import os
import platform
import time
import warnings
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

from jaxneurons.checkpoints.loading import LM
from jaxneurons.errors import DataError
from jaxneurons.model.finite import NotFiniteError
from jaxneurons.neurons.sets import Neuron, site_width
from jaxneurons.prompts import batches
from jaxneurons.prompts.answers import LOW_ODDS, LOW_OPTION_MASS, TokenPrompt, encode_query
from jaxneurons.prompts.queries import Query
from jaxneurons.qrnca import method as qrnca
from jaxneurons.qrnca.caveats import caveats
from jaxneurons.qrnca.joining import join
from jaxneurons.qrnca.method import PromptScores, QRNCAConfig, QueryNeurons
from jaxneurons.qrnca.prompt_cache import Caches, prompts_of
from jaxneurons.storage.store import RunDirectory, digest, write_json, write_json_lines
from jaxneurons.storage.tables import read_json
from jaxneurons.storage.typed_json import typed

FORMAT = 3
"""Of the parts; counts up when what is in them changes."""
QUERIES, RUN = "queries.jsonl", "run.json"
NO_GROUP = "all"
"""The group of queries that name none, and of rows over every query."""

Progress = Callable[[int, int], None]
"""Called with (prompts done, prompts in all)."""


@dataclasses.dataclass(frozen=True)
class Located:
    """Query-relevant neurons of every query, as they were written to disk.

    Attributes:
      neurons: by query id.
      common: common neurons with the number of clusters each is in, most frequent first.
      prompts: by query id, what is known of each of its prompts.
      run: the contents of run.json.
      encoded: the token prompts of all queries, in order.
    """

    neurons: dict[str, QueryNeurons]
    common: list[tuple[Neuron, int]]
    prompts: dict[str, list[PromptScores]]
    run: dict[str, Any]
    encoded: list[TokenPrompt]


def encode_queries(lm: LM, queries: Sequence[Query], settings: QRNCAConfig) -> list[TokenPrompt]:
    """Token prompts of all queries, `settings.prompts` of each, in order.

    Raises:
      DataError: a prompt that is empty or longer than the context; says which query.
    """
    encoded = []
    for query in queries:
        for i in range(prompt_count(query, settings)):
            try:
                prompt = encode_query(
                    lm.tokenizer,
                    query.prompts[i],
                    query.answers[i],
                    options=query.options[i],
                    form=settings.form,  # type: ignore[arg-type]
                    separator=query.separator(i),
                    max_length=lm.config.max_position,
                    vocab_size=lm.config.vocab_size,
                )
                encoded.append(prompt)
            except DataError as error:
                raise DataError(f"query {query.id!r}, prompt {i + 1}: {error}") from None
    return encoded


def check_groups(queries: Sequence[Query]) -> None:
    """Raise `DataError` if some queries are in a group and some in none."""
    loose = [query.id for query in queries if query.group == NO_GROUP]
    if 0 < len(loose) < len(queries):
        raise DataError(
            f"query {loose[0]!r} is in no group (or in one called {NO_GROUP!r}), as are "
            f"{len(loose)} of {len(queries)}: give each a group, or none of them"
        )


def prompt_count(query: Query, settings: QRNCAConfig) -> int:
    """Prompts of a query that are used."""
    return min(len(query.prompts), settings.prompts)


def locate(
    lm: LM,
    queries: Sequence[Query],
    out: str | os.PathLike[str],
    *,
    settings: QRNCAConfig = QRNCAConfig(),
    batch_size: int | None = None,
    cache_bytes: int | None = None,
    progress: Progress | None = None,
) -> Located:
    """Find the query-relevant neurons of every query and write them to `out`.

    Batches are planned before anything runs and saved as they finish; the same call after a stop
    does the rest and writes the same files. (Timings in run.json aside.)

    Args:
      lm: the model.
      queries: at least four with the default settings; see `queries.read_queries`.
      out: the run directory.
      settings: hyper-parameters.
      batch_size: prompts per batch, fewer where they are long: see `batches.plan`; default: what
        suits the platform.
      cache_bytes: keys and values that may be kept in `caches/` for later stages, which then need
        not run the prompts again; default: `caches.default_limit`.
      progress: told how many prompts are done.

    Raises:
      DataError: unusable queries or directory, before anything is computed; scores that are not
        finite, as float16's may be: says of which query and prompt, and from which layer on.
    """
    qrnca.check_count(len(queries), settings.common)
    check_groups(queries)
    encode_queries(lm, queries, settings)  # what cannot be used is said before anything runs
    if settings.form == "context":
        queries = join(
            lm.params,
            lm.tokenizer,
            queries,
            config=lm.config,
            site=settings.site,
            wordings=settings.prompts,
            batch_size=batch_size,
        )
    prompts = encode_queries(lm, queries, settings)
    plan = batches.plan(prompts, batch_size)
    identity = {
        **lm.identity(),
        "settings": dataclasses.asdict(settings),
        "queries": digest([[q.id, q.group] for q in queries]),
        "prompts": digest(prompts),
        "batch size": batch_size or batches.default_batch_size(),
        "format": FORMAT,
    }
    run = RunDirectory(out, identity)
    write_json_lines(run.path / QUERIES, map(dataclasses.asdict, queries))
    caches = Caches(run.path, cache_bytes)

    done = computed = 0
    results: dict[int, PromptScores] = {}
    seconds: list[float] = []
    for number, batch in enumerate(plan):
        part = run.load(number)
        if part is None:
            start = time.perf_counter()
            pre = qrnca.run_prompts(lm.params, batch, config=lm.config, site=settings.site)
            try:
                found = qrnca.attribute_batch(
                    lm.params, batch, pre, config=lm.config, settings=settings
                )
            except NotFiniteError as error:
                raise DataError(f"{_named(queries, settings, error)}: {error.where}") from None
            caches.keep(
                number, batch, prompts_of(pre, site=settings.site, seq=batch.tokens.shape[1])
            )
            run.save(number, _pack(found, time.perf_counter() - start))
            del pre  # the next prompts are run without these in memory
            part = run.load(number)
            assert part is not None
            computed += 1
        results.update(_unpack(part))
        seconds.append(float(part["seconds"]))
        done += int((batch.index >= 0).sum())
        if progress is not None:
            progress(done, len(prompts))

    order = iter(range(len(prompts)))
    by_query = {
        query.id: [results[next(order)] for _ in range(prompt_count(query, settings))]
        for query in queries
    }
    clusters = {name: qrnca.merge(found, settings) for name, found in by_query.items()}
    neurons, common = qrnca.rank(
        clusters, width=site_width(lm.config, settings.site), settings=settings
    )
    # What it was made with stays as it is.
    facts = None if computed else facts_there(run.path / RUN, identity)
    if facts is None:
        facts = _facts(lm, queries, settings, by_query, neurons, seconds)
    _write(run, queries, neurons, common, by_query, facts, len(clusters))
    for category, text in caveats(
        queries, by_query, quadrature=settings.quadrature, decode=lm.tokenizer.decode
    ):
        warnings.warn(text, category, stacklevel=2)
    return Located(neurons, common, by_query, facts, prompts)


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
"""What is read of run.json, by this and later stages; there is more in it."""


def facts_there(path: Path, identity: dict[str, Any]) -> dict[str, Any] | None:
    """The contents of run.json, or None where it is missing, damaged or of another run."""
    try:
        facts = read_json(path)
        same = typed(_NEEDED, facts, str(path))["model"]["sha256"] == identity["model"]
    except DataError:
        return None
    settings = json.loads(json.dumps(identity["settings"]))
    return facts if same and facts.get("settings") == settings else None


def _named(queries: Sequence[Query], settings: QRNCAConfig, error: NotFiniteError) -> str:
    """Query and prompt that an error is about."""
    owners = [(q.id, i) for q in queries for i in range(prompt_count(q, settings))]
    query, prompt = owners[error.index]
    return f"query {query!r}, prompt {prompt + 1}"


def _pack(found: dict[int, PromptScores], seconds: float) -> dict[str, np.ndarray]:
    values = list(found.values())
    return {
        "index": np.array(list(found)),
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


def _unpack(part: dict[str, np.ndarray]) -> dict[int, PromptScores]:
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


def _facts(
    lm: LM,
    queries: Sequence[Query],
    settings: QRNCAConfig,
    by_query: dict[str, list[PromptScores]],
    neurons: dict[str, QueryNeurons],
    seconds: list[float],
) -> dict[str, Any]:
    """The contents of run.json."""
    prompts = [prompt for found in by_query.values() for prompt in found]
    gaps = np.array([prompt.gap for prompt in prompts])
    errors = np.array([prompt.error for prompt in prompts])
    mass = np.array([p.option_mass for p in prompts if not math.isnan(p.option_mass)])
    counts = np.array([len(found.neurons) for found in neurons.values()])
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
            "attribution": round(sum(seconds), 3),
            "per_prompt": round(sum(seconds) / len(prompts), 4),
        },
        "versions": versions(),
    }


def versions() -> dict[str, str]:
    """Of the packages that numbers may depend on, and of the machine."""
    packages = ("jaxneurons", "jax", "jaxlib", "flax", "transformers", "tokenizers", "numpy")
    return {
        **{name: metadata.version(name) for name in packages},
        "python": platform.python_version(),
        "platform": platform.platform(),
    }


def _write(
    run: RunDirectory,
    queries: Sequence[Query],
    neurons: dict[str, QueryNeurons],
    common: list[tuple[Neuron, int]],
    by_query: dict[str, list[PromptScores]],
    facts: dict[str, Any],
    clusters: int,
) -> None:
    def line(query: Query) -> dict[str, Any]:
        found, prompts = neurons[query.id], by_query[query.id]
        mass = [prompt.option_mass for prompt in prompts]
        return {
            "id": query.id,
            "group": query.group,
            "neurons": [list(neuron) for neuron in found.neurons],
            "naica": found.naica,
            "na": found.na,
            "ica": found.ica,
            "probability": float(np.mean([prompt.probability for prompt in prompts])),
            "probabilities": [prompt.probability for prompt in prompts],
            "correct": [prompt.correct for prompt in prompts],
            "odds": [prompt.odds for prompt in prompts],
            "option_mass": None if math.isnan(mass[0]) else mass,
            "gap_max": float(max(prompt.gap.max() for prompt in prompts)),
        }

    write_json_lines(run.path / "neurons.jsonl", (line(query) for query in queries))
    write_json(
        run.path / "common_neurons.json",
        {
            "clusters": clusters,
            "neurons": [
                {"neuron": list(neuron), "clusters": count, "share": count / clusters}
                for neuron, count in common
            ],
        },
    )
    write_json(run.path / RUN, facts)
