"""A finished run of QRNCA: the neurons of every query, with all that later stages work on.

`locating.locate` makes one; `open_run` reads one from its directory, where it changes nothing.
"""

import dataclasses
import functools
import os
import shlex
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxneurons.checkpoints.loading import LM, load
from jaxneurons.errors import ConfigError, DataError
from jaxneurons.neurons.sets import Neuron, site_width
from jaxneurons.prompts import batches
from jaxneurons.prompts.answers import TokenPrompt, encode_query
from jaxneurons.prompts.queries import Query
from jaxneurons.qrnca.files import (
    FORMAT,
    QUERIES,
    RUN,
    by_query,
    read_common_of,
    read_facts,
    read_neurons_of,
    read_parts,
    read_queries_of,
)
from jaxneurons.qrnca.method import PromptScores, QRNCAConfig, QueryNeurons
from jaxneurons.storage.store import IDENTITY, PARTS, Memory, Overlay, Parts, RunDirectory, digest
from jaxneurons.storage.tables import Row, html_table, read_json
from jaxneurons.storage.typed_json import typed

SHOWN = 8
"""Queries that the `repr` of a run shows."""


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Run(Mapping[str, QueryNeurons]):
    """Query-relevant neurons by query id, with everything that later stages need.

    Attributes:
      lm: the model that the neurons were located in.
      queries: in order, with their separators.
      settings: of the method.
      batch_size: prompts per batch, as `batches.plan` takes it.
      neurons: by query id; what the run is a mapping of.
      common: common neurons with the number of clusters each is in, most frequent first.
      prompts: by query id, the scores of each of its prompts.
      facts: the contents of run.json.
      identity: what the parts depend on.
      store: finished parts of this run and of its later stages.
      path: the directory that it was written to; None: it is in memory alone.
    """

    lm: LM
    queries: list[Query]
    settings: QRNCAConfig
    batch_size: int
    neurons: Mapping[str, QueryNeurons]
    common: list[tuple[Neuron, int]]
    prompts: Mapping[str, Sequence[PromptScores]]
    facts: dict[str, Any]
    identity: dict[str, Any]
    store: Parts
    path: Path | None = None

    def __getitem__(self, query: str) -> QueryNeurons:
        return self.neurons[query]

    def __iter__(self) -> Iterator[str]:
        return iter(self.neurons)

    def __len__(self) -> int:
        return len(self.neurons)

    @functools.cached_property
    def encoded(self) -> list[TokenPrompt]:
        """The token prompts of all queries, in order.

        Raises:
          DataError: the tokenizer makes other tokens of them than when they were located.
        """
        prompts = encode_queries(self.lm, self.queries, self.settings)
        if digest(prompts) != self.identity["prompts"]:
            raise DataError(
                f"{self.path or 'this run'}: its queries become other tokens than those that were "
                "located, so the files or versions have changed; locate again into a new directory"
            )
        return prompts

    @property
    def name(self) -> str:
        """The model's name, short enough for a title."""
        return Path(self.lm.source).name

    @property
    def layers(self) -> int:
        """Layers of the model."""
        return self.lm.config.num_layers

    @property
    def width(self) -> int:
        """Neurons of the site in a layer."""
        return site_width(self.lm.config, self.settings.site)

    @property
    def groups(self) -> dict[str, list[str]]:
        """Ids of the queries of each group, in order."""
        members: dict[str, list[str]] = {}
        for query in self.queries:
            members.setdefault(query.group, []).append(query.id)
        return members

    def owners(self) -> list[str]:
        """The query of each prompt, in the order of `encoded`."""
        return [q.id for q in self.queries for _ in range(prompt_count(q, self.settings))]

    def rows(self) -> list[Row]:
        """A row for each query: how many neurons, how probable its answer, how exact its scores.

        `neurons` is their number, `best` the layer and index of the first; `probability` (of the
        answer) is a mean over its prompts, `gap` the largest completeness gap, in probability.
        """
        rows = []
        for query in self.queries:
            ranking, scores = self.neurons[query.id].ranking, self.prompts[query.id]
            rows.append(
                {
                    "query": query.id,
                    "group": query.group,
                    "neurons": len(ranking),
                    "best": "{}, {}".format(*ranking[0]) if ranking else None,
                    "probability": float(np.mean([prompt.probability for prompt in scores])),
                    "gap": float(max(prompt.gap.max() for prompt in scores)),
                }
            )
        return rows

    def __repr__(self) -> str:
        lines = [self._summary()]
        rows = self.rows()
        wide = max((len(row["query"]) for row in rows[:SHOWN]), default=0)
        lines += [
            f"  {row['query']:{wide}}  {row['neurons']:3} neurons, probability "
            f"{row['probability']:.3f}, gap {row['gap']:.0e}"
            for row in rows[:SHOWN]
        ]
        if len(rows) > SHOWN:
            lines.append(f"  ... and {len(rows) - SHOWN} more")
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        return html_table(self._summary(), self.rows())

    def _summary(self) -> str:
        counts, exact = self.facts["neurons_per_query"], self.facts["completeness"]
        return (
            f"Run on {self.name}, site {self.settings.site!r}: {len(self)} queries, "
            f"{counts['mean']:.1f} neurons each, {len(self.common)} common ones left out, "
            f"completeness gap {exact['gap_max']:.0e} at most"
        )


# --- queries --------------------------------------------------------------------------------------


def prompt_count(query: Query, settings: QRNCAConfig) -> int:
    """Prompts of a query that are used."""
    return min(len(query.prompts), settings.prompts)


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
                    form=settings.form,
                    separator=query.separator(i),
                    max_length=lm.config.max_position,
                    vocab_size=lm.config.vocab_size,
                )
                encoded.append(prompt)
            except DataError as error:
                raise DataError(f"query {query.id!r}, prompt {i + 1}: {error}") from None
    return encoded


def check_queries(queries: Sequence[Query]) -> None:
    """Raise `DataError` unless every query has a right answer for each of its prompts.

    What `queries.read_queries` reads has; people make queries in Python too.
    """
    seen: set[str] = set()
    for query in queries:
        if query.id in seen:
            raise DataError(f"query {query.id!r} is there twice; ids must be unique")
        seen.add(query.id)
        columns = (query.prompts, query.answers, query.options, query.separators)
        if not all(isinstance(column, tuple | list) for column in columns):
            raise DataError(
                f"query {query.id!r}: prompts, answers, options and separators are tuples with an "
                "entry for each wording"
            )
        between = query.separators or (None,) * len(query.prompts)
        counts = {len(query.prompts), len(query.answers), len(query.options), len(between)}
        if len(counts) > 1 or not query.prompts:
            raise DataError(
                f"query {query.id!r}: as many prompts as answers are needed, one at least"
            )


# --- opening --------------------------------------------------------------------------------------


def source_of(path: str | os.PathLike[str]) -> str:
    """The model source that a run was made with.

    Raises:
      DataError: no finished run there.
    """
    path = _finished(path)
    try:
        return _model_of(path)["source"]
    except DataError as error:
        raise DataError(f"{error}; give the model with --model, or {locate_again(path)}") from None


def ignored_keys_of(path: str | os.PathLike[str]) -> tuple[str, ...]:
    """The keys of the model's configuration that a run was made without."""
    where = Path(path) / RUN
    model = read_json(where).get("model")
    keys = model.get("ignored_keys", []) if isinstance(model, dict) else []
    return typed(tuple[str, ...], keys, f"{where}: model: ignored_keys")


def open_run(path: str | os.PathLike[str], lm: LM | None = None) -> Run:
    """Open a finished run; its model is loaded from where it came from, unless it is given.

    Nothing is computed again, and nothing in the directory changes.

    Raises:
      DataError: no finished run, one that is damaged (the message has the command that mends it),
        or a model other than the run's.
      SourceError: the model cannot be loaded.
    """
    path = _finished(path)
    if lm is not None and not isinstance(lm, LM):
        raise ConfigError(f"lm must be a model as jaxneurons.load gives it, got {_kind(lm)}")
    identity, settings = _read_identity(path)
    lm = load(source_of(path), ignore_keys=ignored_keys_of(path)) if lm is None else lm
    _check_model(path, identity, lm)
    try:
        queries = read_queries_of(path)
        check_queries(queries)
        if digest([[query.id, query.group] for query in queries]) != identity["queries"]:
            raise DataError(f"{path / QUERIES}: other queries than were located")
        count = sum(prompt_count(query, settings) for query in queries)
        parts = RunDirectory(path, identity)
        scores = by_query(read_parts(parts, count), queries, settings.prompts)
        facts = read_facts(path / RUN, identity)
        neurons = read_neurons_of(path, settings)
        if list(neurons) != [query.id for query in queries]:
            raise DataError("neurons.jsonl: other queries than in queries.jsonl")
        common = read_common_of(path)
    except DataError as error:
        place = "" if f"{path}" in f"{error}" else f"{path}: "
        raise DataError(f"{place}{error}; {locate_again(path)}") from None
    for located in neurons.values():
        located.neurons.check(lm.config)
    return Run(
        lm=lm,
        queries=queries,
        settings=settings,
        batch_size=identity["batch size"],
        neurons=neurons,
        common=common,
        prompts=scores,
        facts=facts,
        identity=identity,
        store=Overlay(Memory(), parts),
        path=path,
    )


def _finished(path: object) -> Path:
    """The directory of a run, which must be finished."""
    if not isinstance(path, str | os.PathLike):
        raise ConfigError(f"a run is opened by the path of its directory, got {_kind(path)}")
    path = Path(path)
    if not (path / RUN).is_file():
        raise DataError(f"{path}: no finished run of `jaxneurons qrnca locate`; run that first")
    return path


def _read_identity(path: Path) -> tuple[dict[str, Any], QRNCAConfig]:
    known = path / PARTS / IDENTITY
    texts = dict.fromkeys(("model", "tokenizer", "dtype", "queries", "prompts"), str)
    try:
        identity = read_json(known)
        kind = {**texts, "settings": QRNCAConfig, "batch size": int, "format": int}
        checked = typed(kind, identity, str(known))
        if checked["batch size"] < 1:
            raise DataError(f"{known}: batch size: {checked['batch size']}")
        if checked["format"] != FORMAT:
            raise DataError(f"{known}: format {checked['format']}, where {FORMAT} is read")
        if unknown := identity.keys() - kind.keys() - {"ignored keys"}:
            raise DataError(f"{known}: unknown key {min(unknown)!r}")
    except DataError as error:
        raise DataError(
            f"{path}: a damaged or older run ({error}); "
            "run `jaxneurons qrnca locate` into a new directory"
        ) from None
    return identity, checked["settings"]


def _check_model(path: Path, identity: Mapping[str, Any], lm: LM) -> None:
    """Raise unless a run was made with this model, read in the same way."""
    given = lm.identity()
    if identity["model"] != given["model"]:
        try:
            source = source_of(path)
        except DataError:
            source = "another model"
        raise DataError(
            f"{path}: its neurons were located in {source} (weights "
            f"{identity['model'][:12]}), not in {lm.source} (weights {lm.hash[:12]}); "
            "give the model of the run"
        )
    for key in ("tokenizer", "dtype", "ignored keys"):
        if identity.get(key) != given.get(key):
            raise DataError(
                f"{path}: holds a run with another {key}: {_short(identity.get(key))}, not "
                f"{_short(given.get(key))}; load the model as it was loaded then"
            )


def _short(value: Any) -> str:
    return f"{value:.12}" if isinstance(value, str) else str(value or "none")


def _kind(value: Any) -> str:
    name = type(value).__name__
    return f"{'an' if name[:1] in 'AEIOUaeiou' else 'a'} {name}"


def _model_of(path: Path) -> dict[str, Any]:
    return typed({"model": {"source": str}}, read_json(path / RUN), str(path / RUN))["model"]


def locate_again(path: Path) -> str:
    """The command that mends a run: finished parts are kept, what is missing is made again."""
    words = ["jaxneurons", "qrnca", "locate", "--model"]
    try:
        words.append(_model_of(path)["source"])
        words += [word for key in ignored_keys_of(path) for word in ("--ignore-key", key)]
    except DataError:
        words.append("MODEL")
    try:
        check_queries(read_queries_of(path))
        words += ["--queries", str(path / QUERIES)]
    except DataError:
        words += ["--queries", "QUERIES"]
    words += ["--out", str(path)]
    try:
        identity, settings = _read_identity(path)
        words += _options(settings, identity["batch size"])
    except DataError:
        pass
    return f"`{shlex.join(words)}` makes it again"


def _options(settings: QRNCAConfig, batch_size: int) -> list[str]:
    """Options of `qrnca locate` for settings other than its own."""
    words: list[str] = []
    for here, usual in (
        (settings.quadrature, QRNCAConfig().quadrature),
        (settings, QRNCAConfig()),
    ):
        for field in dataclasses.fields(here):
            value = getattr(here, field.name)
            if field.name != "quadrature" and value != getattr(usual, field.name):
                words += [f"--{field.name.replace('_', '-')}", str(value)]
    if batch_size != batches.default_batch_size():
        words += ["--batch-size", str(batch_size)]
    return words
