"""Opening a run of QRNCA from its directory: nothing is computed again, and nothing changes."""

import dataclasses
import os
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jaxneurons.checkpoints.loading import LM, load
from jaxneurons.errors import ConfigError, DataError
from jaxneurons.prompts import batches
from jaxneurons.qrnca.arguments import check_model
from jaxneurons.qrnca.encoding import check_queries, prompt_count
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
from jaxneurons.qrnca.method import QRNCAConfig
from jaxneurons.qrnca.run import Run
from jaxneurons.storage.store import IDENTITY, PARTS, Memory, Overlay, RunDirectory, digest
from jaxneurons.storage.tables import read_json
from jaxneurons.storage.typed_json import typed


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
    if lm is not None:
        check_model(lm)
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
        scores = by_query(read_parts(parts, count), queries, settings)
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
        name = type(path).__name__
        article = "an" if name[:1] in "AEIOUaeiou" else "a"
        raise ConfigError(f"a run is opened by the path of its directory, got {article} {name}")
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
            article = "other" if key.endswith("s") else "another"
            raise DataError(
                f"{path}: holds a run with {article} {key}: {_short(identity.get(key))}, not "
                f"{_short(given.get(key))}; load the model as it was loaded then"
            )


def _short(value: Any) -> str:
    return f"{value:.12}" if isinstance(value, str) else str(value or "none")


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
