"""A finished run of `qrnca locate`, opened again with its model: what later stages work on."""

import dataclasses
import os
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from jaxneurons.checkpoints.loading import LM, load
from jaxneurons.errors import DataError
from jaxneurons.neurons.sets import site_width
from jaxneurons.prompts import batches
from jaxneurons.prompts.queries import Query
from jaxneurons.qrnca.caveats import CaveatWarning
from jaxneurons.qrnca.locating import (
    QUERIES,
    RUN,
    Located,
    locate,
    prompt_count,
)
from jaxneurons.qrnca.method import QRNCAConfig
from jaxneurons.storage.json_file import read_values
from jaxneurons.storage.store import RunDirectory
from jaxneurons.storage.tables import read_json
from jaxneurons.storage.typed_json import typed

Progress = Callable[[int, int], None]


@dataclasses.dataclass(frozen=True)
class Run:
    """A run directory with everything that its later stages need.

    Attributes:
      path: the directory.
      lm: the model that the neurons were located in.
      queries: what was asked, in order.
      settings: of the run.
      located: the neurons.
      store: keeps what later stages have finished.
      batch_size: of the run.
    """

    path: Path
    lm: LM
    queries: list[Query]
    settings: QRNCAConfig
    located: Located
    store: RunDirectory
    batch_size: int

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
        found: dict[str, list[str]] = {}
        for query in self.queries:
            found.setdefault(query.group, []).append(query.id)
        return found

    def owners(self) -> list[str]:
        """The query of each prompt, in the order of `located.encoded`."""
        return [q.id for q in self.queries for _ in range(prompt_count(q, self.settings))]


def source_of(path: str | os.PathLike[str]) -> str:
    """The model source that a run was made with.

    Raises:
      DataError: no finished run there.
    """
    path = Path(path)
    _check_finished(path)
    try:
        return typed({"model": {"source": str}}, read_json(path / RUN), str(path / RUN))["model"][
            "source"
        ]
    except DataError as error:
        raise DataError(f"{error}; give the model with --model, or {_ANEW}") from None


_ANEW = "run `jaxneurons qrnca locate` as before, which writes this file anew"


def _check_finished(path: Path) -> None:
    if not (path / RUN).is_file():
        raise DataError(f"{path}: no finished run of `jaxneurons qrnca locate`; run that first")


def ignored_keys_of(path: str | os.PathLike[str]) -> tuple[str, ...]:
    """The keys of the model's configuration that a run was made without."""
    where = Path(path) / RUN
    model = read_json(where).get("model")
    keys = model.get("ignored_keys", []) if isinstance(model, dict) else []
    return typed(tuple[str, ...], keys, f"{where}: model: ignored_keys")


def open_run(path: str | os.PathLike[str], lm: LM | None = None) -> Run:
    """Open a finished run; its model is loaded from where it came from, unless it is given.

    What run.json says beside its model's source is made anew from the parts where it is damaged.

    Raises:
      DataError: no finished run, one that is damaged, or a model other than the run's.
      SourceError: the model cannot be loaded.
    """
    path = Path(path)
    lm = load(source_of(path), ignore_keys=ignored_keys_of(path)) if lm is None else lm
    _check_finished(path)
    known = path / "parts" / "identity.json"
    try:
        written = read_json(known)
        kind = {"model": str, "settings": QRNCAConfig, "batch size": int}
        identity = typed(kind, written, str(known))
        if identity["batch size"] < 1:
            raise DataError(f"{known}: batch size: {identity['batch size']}")
        queries = _read_queries(path / QUERIES)
    except DataError as error:
        raise DataError(
            f"{path}: a damaged or older run ({error}); "
            "run `jaxneurons qrnca locate` into a new directory"
        ) from None
    if identity["model"] != lm.hash:
        raise DataError(
            f"{path}: its neurons were located in {_source(path)} (weights "
            f"{identity['model'][:12]}), not in {lm.source} (weights {lm.hash[:12]}); "
            "give the model of the run"
        )
    _check_settings(path / RUN, written["settings"])
    return make_run(path, lm, queries, identity["settings"], batch_size=identity["batch size"])


def _check_settings(path: Path, settings: dict[str, Any]) -> None:
    """Raise if run.json, which people edit, says other settings than the parts were made with."""
    try:
        said = read_json(path).get("settings")
    except DataError:
        return
    if isinstance(said, dict) and said != settings:
        raise DataError(f"{path}: says other settings than its parts were made with; {_ANEW}")


def make_run(
    path: Path,
    lm: LM,
    queries: Sequence[Query],
    settings: QRNCAConfig,
    *,
    batch_size: int | None = None,
    cache_bytes: int | None = None,
    progress: Progress | None = None,
) -> Run:
    """`locate` as a `Run`: what is not finished there is located first."""
    size = batch_size or batches.default_batch_size()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", CaveatWarning)  # said when it was located
        located = locate(
            lm,
            queries,
            path,
            settings=settings,
            batch_size=size,
            cache_bytes=cache_bytes,
            progress=progress,
        )
    identity = read_json(path / "parts" / "identity.json")
    return Run(path, lm, list(queries), settings, located, RunDirectory(path, identity), size)


def _source(path: Path) -> str:
    try:
        return source_of(path)
    except DataError:
        return "another model"


def _read_queries(path: Path) -> list[Query]:
    """The queries that `locate` wrote."""
    values = read_values(path)
    values = values if isinstance(values, list) else [values]
    found = [typed(Query, one, f"{path}: query {n}") for n, one in enumerate(values, 1)]
    for query in found:
        between = query.separators or (None,) * len(query.prompts)
        counts = {len(query.prompts), len(query.answers), len(query.options), len(between)}
        if len(counts) > 1 or not query.prompts:
            raise DataError(f"{path}: query {query.id!r}: as many prompts as answers are needed")
    return found
