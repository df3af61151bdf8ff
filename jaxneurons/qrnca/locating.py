"""Locating query-relevant neurons for queries, in memory or, resumable, into a run directory.

In a directory, `files` says what is written; `parts/` holds what a killed run had finished,
`caches/` what later stages would compute again without it.
"""

import dataclasses
import functools
import os
import time
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxneurons.checkpoints.loading import LM
from jaxneurons.engine.device_memory import LEAST_ROW_BYTES, ROW_BYTES, prompts_for, rows_here
from jaxneurons.engine.out_of_memory import ChunkSize
from jaxneurons.errors import ConfigError, DataError
from jaxneurons.model.axis_types import any_axes
from jaxneurons.model.finite import NotFiniteError
from jaxneurons.neurons.sets import site_width
from jaxneurons.processes.sharing import open_parts, share_parts, spread, write_once
from jaxneurons.prompts import batches
from jaxneurons.prompts.answers import TokenPrompt
from jaxneurons.prompts.queries import Query
from jaxneurons.qrnca import method as qrnca
from jaxneurons.qrnca.arguments import check_model, check_progress, check_whole, checked_directory
from jaxneurons.qrnca.caveats import caveats
from jaxneurons.qrnca.encoding import check_groups, check_queries, encode_queries, prompt_count
from jaxneurons.qrnca.files import (
    FORMAT,
    QUERIES,
    RUN,
    by_query,
    facts_of,
    pack,
    read_facts,
    unpack,
    write_results,
)
from jaxneurons.qrnca.joining import join
from jaxneurons.qrnca.method import PromptScores, QRNCAConfig
from jaxneurons.qrnca.prompt_cache import Caches, Prompts, joined, prompts_of
from jaxneurons.qrnca.run import Run
from jaxneurons.storage.progress import Progress
from jaxneurons.storage.store import Parts, RunDirectory, digest, write_json_lines


@any_axes
def locate(
    lm: LM,
    queries: Sequence[Query],
    *,
    settings: QRNCAConfig = QRNCAConfig(),
    out: str | os.PathLike[str] | None = None,
    batch_size: int | None = None,
    cache_bytes: int | None = None,
    progress: Progress | None = None,
) -> Run:
    """Find the query-relevant neurons of every query.

    Batches are planned before anything runs and, with `out`, saved as they finish; the same call
    after a stop does the rest and writes the same files. (Timings in run.json aside; where less
    memory is there, so that less is run at once, scores are rounded otherwise.)

    Args:
      lm: the model.
      queries: at least four with the default settings; see `queries.read_queries`.
      settings: hyper-parameters.
      out: the run directory to write; default: none, and nothing touches the disk.
      batch_size: prompts per batch, fewer where they are long: see `batches.plan`; default: what
        suits the platform.
      cache_bytes: keys and values that may be kept in `caches/` for later stages, which then need
        not run the prompts again; default: `caches.default_limit`.
      progress: called with how many prompts are done, of how many.

    Raises:
      ConfigError: arguments of the wrong kind.
      DataError: unusable queries or directory, before anything is computed; scores that are not
        finite, as float16's may be: says of which query and prompt, and from which layer on.
    """
    queries = _checked(lm, queries, settings, batch_size, cache_bytes)
    path = checked_directory(out)
    check_progress(progress)
    size = batch_size or batches.default_batch_size()
    if path is not None:
        RunDirectory.check(path, _identity(lm, queries, settings, size))
    encode_queries(lm, queries, settings)  # what cannot be used is an error before anything runs
    queries = _joined(lm, queries, settings, batch_size)
    prompts = encode_queries(lm, queries, settings)
    identity = _identity(lm, queries, settings, size, prompts)
    store = open_parts(path, identity)
    if path is not None:
        lines = list(map(dataclasses.asdict, queries))
        write_once("queries", lambda: write_json_lines(path / QUERIES, lines))
    work = _Work(lm, settings, store, Caches(path, cache_bytes))
    scores, seconds, computed = work.attribute(queries, prompts, size, progress)
    return _ranked(
        Run(
            lm=lm,
            queries=queries,
            settings=settings,
            batch_size=size,
            neurons={},
            common=[],
            prompts=by_query(scores, queries, settings),
            facts={},
            identity=identity,
            store=store,
            path=path,
        ),
        seconds,
        computed,
    )


def _checked(
    lm: object,
    queries: object,
    settings: object,
    batch_size: object,
    cache_bytes: object,
) -> list[Query]:
    """The queries, when every argument is of the kind that it has to be."""
    check_model(lm)
    if isinstance(queries, str | os.PathLike):
        raise ConfigError(
            f"queries are a list of Query, got {str(queries)!r}: read a file with "
            "jaxneurons.qrnca.read_queries, or take bundled_queries('lab')"
        )
    if isinstance(queries, Query | Mapping) or not isinstance(queries, Sequence):
        raise ConfigError(f"queries are a list of Query, got {queries!r:.80}")
    for number, query in enumerate(queries, 1):
        if not isinstance(query, Query):
            raise ConfigError(f"queries are a list of Query; number {number} is {query!r:.80}")
    chosen: list[Query] = list(queries)
    if not isinstance(settings, QRNCAConfig):
        raise ConfigError(f"settings are a QRNCAConfig, got {settings!r:.80}")
    for name, value, least in (("batch size", batch_size, 1), ("cache_bytes", cache_bytes, 0)):
        if value is not None:
            check_whole(name, value, least=least)
    check_queries(chosen)
    qrnca.check_count(len(chosen), settings.common)
    check_groups(chosen)
    return chosen


def _identity(
    lm: LM,
    queries: Sequence[Query],
    settings: QRNCAConfig,
    batch_size: int,
    prompts: Sequence[TokenPrompt] | None = None,
) -> dict[str, Any]:
    """What the parts of a run depend on; without `prompts`, as far as it is known."""
    return {
        **lm.identity(),
        "settings": dataclasses.asdict(settings),
        "queries": digest([[q.id, q.group] for q in queries]),
        **({} if prompts is None else {"prompts": digest(prompts)}),
        "batch size": batch_size,
        "format": FORMAT,
    }


def _joined(
    lm: LM, queries: list[Query], settings: QRNCAConfig, batch_size: int | None
) -> list[Query]:
    """The queries, with the separators that the model decides."""
    if settings.form != "context":
        return queries
    return join(
        lm.params,
        lm.tokenizer,
        queries,
        config=lm.config,
        site=settings.site,
        wordings=settings.prompts,
        batch_size=batch_size,
    )


def row_memory() -> ChunkSize:
    """Bytes that the rows of a batch may take."""
    return ChunkSize(ROW_BYTES, what="bytes of rows", least=LEAST_ROW_BYTES)


@dataclasses.dataclass(frozen=True)
class _Work:
    """Attributing batches of prompts, those aside that are finished.

    Attributes:
      lm: the model.
      settings: hyper-parameters.
      store: where finished batches are.
      caches: where keys and values of prompts are kept.
      rows: bytes that rows may take, fewer once memory has run out; prompts are halved with them.
    """

    lm: LM
    settings: QRNCAConfig
    store: Parts
    caches: Caches
    rows: ChunkSize = dataclasses.field(default_factory=row_memory)

    def attribute(
        self,
        queries: Sequence[Query],
        prompts: Sequence[TokenPrompt],
        batch_size: int,
        progress: Progress | None,
    ) -> tuple[list[PromptScores], float, int]:
        """Scores of the prompts, in order; seconds that they took; batches that were missing."""
        scores: dict[int, PromptScores] = {}
        seconds: list[float] = []
        computed: list[int] = []
        planned = batches.plan(prompts, batch_size)
        jobs = {
            number: functools.partial(self._batch, number, batch, computed)
            for number, batch in enumerate(planned)
        }
        try:
            shared = share_parts(
                self.store,
                jobs,
                together=spread(self.lm.params),
                sizes=batches.counts(planned),
                progress=progress,
            )
            for number, make in jobs.items():
                part = self.store.part(number, make)
                scores.update(unpack(part))
                seconds.append(float(part["seconds"]))
                if progress is not None:
                    progress(len(scores), len(prompts))
        except NotFiniteError as error:
            raise DataError(f"{_place(queries, self.settings, error)}: {error.where}") from None
        ordered = [scores[index] for index in range(len(prompts))]
        return ordered, sum(seconds), len(computed) if shared is None else shared

    def _batch(
        self, number: int, batch: batches.Batch, computed: list[int]
    ) -> dict[str, np.ndarray]:
        start = time.perf_counter()
        lm, settings = self.lm, self.settings
        count, tokens = batch.tokens.shape
        fit, parts = rows_here(
            lm.params, lm.config, prompts=count, tokens=tokens, answers=batch.targets.shape[1]
        )

        def in_parts(row_bytes: int) -> dict[int, PromptScores]:
            size = prompts_for(row_bytes, count, parts)
            scores: dict[int, PromptScores] = {}
            kept: list[Prompts] = []
            for first in range(0, count, size):
                part = batches.some(batch, first, first + size)
                pre = qrnca.run_prompts(lm.params, part, config=lm.config, site=settings.site)
                scores |= qrnca.attribute_batch(
                    *(lm.params, part, pre),
                    config=lm.config,
                    settings=settings,
                    memory_budget=row_bytes,
                )
                kept.append(prompts_of(pre, site=settings.site, seq=tokens))
            # In several processes each has but some of the heads.
            if self.caches.path is not None and not spread(lm.params):
                self.caches.keep(number, batch, joined(kept))
            return scores

        scores = self.rows.run(in_parts, most=fit)
        computed.append(number)
        return pack(scores, time.perf_counter() - start)


def _ranked(run: Run, seconds: float, computed: int) -> Run:
    """A run of attributed prompts with its neurons, written where it has a directory."""
    lm, settings = run.lm, run.settings
    clusters = {name: qrnca.merge(scores, settings) for name, scores in run.prompts.items()}
    width = site_width(lm.config, settings.site)
    neurons, common = qrnca.rank(clusters, width=width, settings=settings)
    facts = None if computed or run.path is None else _facts_there(run.path, run.identity)
    if facts is None:
        facts = facts_of(
            lm, run.queries, settings, scores=run.prompts, neurons=neurons, seconds=seconds
        )
    if run.path is not None:
        results = {"neurons": neurons, "common": common, "scores": run.prompts, "facts": facts}
        write = functools.partial(write_results, run.path, run.queries, **results)
        write_once("neurons", write)
    for category, text in caveats(
        run.queries, run.prompts, quadrature=settings.quadrature, decode=lm.tokenizer.decode
    ):
        warnings.warn(text, category, stacklevel=3)
    return dataclasses.replace(run, neurons=neurons, common=common, facts=facts)


def _facts_there(path: Path, identity: Mapping[str, Any]) -> dict[str, Any] | None:
    """run.json as it is, since what a run was made with stays; None: it cannot be used."""
    try:
        return read_facts(path / RUN, identity)
    except DataError:
        return None


def _place(queries: Sequence[Query], settings: QRNCAConfig, error: NotFiniteError) -> str:
    """Query and prompt that an error is about."""
    owners = [(q.id, i) for q in queries for i in range(prompt_count(q, settings))]
    query, prompt = owners[error.index]
    return f"query {query!r}, prompt {prompt + 1}"
