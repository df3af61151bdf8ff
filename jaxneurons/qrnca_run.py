"""A finished run of `qrnca locate`, opened again with its model: what later stages work on."""

import dataclasses
import json
import os
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from jaxneurons import batches
from jaxneurons.errors import DataError
from jaxneurons.load import LM, load
from jaxneurons.locate import (
    QUERIES,
    RUN,
    Located,
    LowOptionMassWarning,
    UnlikelyAnswerWarning,
    locate,
    prompt_count,
)
from jaxneurons.neurons import site_width
from jaxneurons.qrnca import QRNCAConfig
from jaxneurons.quadrature import Quadrature
from jaxneurons.queries import Query
from jaxneurons.store import RunDirectory
from jaxneurons.tables import read_json

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
    if not (path / RUN).is_file():
        raise DataError(f"{path}: no finished run of `jaxneurons qrnca locate`; run that first")
    model = read_json(path / RUN).get("model")
    if not isinstance(model, dict) or not isinstance(model.get("source"), str):
        raise DataError(f"{path / RUN}: names no model; run `jaxneurons qrnca locate` again")
    return model["source"]


def ignored_keys_of(path: str | os.PathLike[str]) -> tuple[str, ...]:
    """The keys of the model's configuration that a run was made without."""
    keys = read_json(Path(path) / RUN)["model"].get("ignored_keys", [])
    if not isinstance(keys, list) or not all(isinstance(key, str) for key in keys):
        raise DataError(f"{Path(path) / RUN}: model.ignored_keys is not a list of names")
    return tuple(keys)


def open_run(path: str | os.PathLike[str], lm: LM | None = None) -> Run:
    """Open a finished run; its model is loaded from where it came from, unless it is given.

    Raises:
      DataError: no finished run, one that is damaged, or a model other than the run's.
      SourceError: the model cannot be loaded.
    """
    path = Path(path)
    source = source_of(path)
    facts = read_json(path / RUN)
    lm = load(source, ignore_keys=ignored_keys_of(path)) if lm is None else lm
    if facts["model"].get("sha256") != lm.hash:
        raise DataError(
            f"{path}: its neurons were located in {source} (weights {_short(facts)}), not in "
            f"{lm.source} (weights {lm.hash[:12]}); give the model of the run"
        )
    try:
        settings = dict(facts["settings"])
        settings["quadrature"] = Quadrature(**settings["quadrature"])
        made = QRNCAConfig(**settings)
        lines = (path / QUERIES).read_text(encoding="utf-8").split("\n")
        queries = [_query(json.loads(line)) for line in lines if line]
        identity = json.loads((path / "parts" / "identity.json").read_text(encoding="utf-8"))
        batch_size = int(identity["batch size"])
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise DataError(
            f"{path}: a damaged or older run ({type(error).__name__}: {error}); "
            "run `jaxneurons qrnca locate` into a new directory"
        ) from None
    return make_run(path, lm, queries, made, batch_size=batch_size)


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
        for category in (LowOptionMassWarning, UnlikelyAnswerWarning):
            warnings.simplefilter("ignore", category)  # said when it was located
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


def _short(facts: dict[str, Any]) -> str:
    return str(facts["model"].get("sha256"))[:12]


def _query(record: dict[str, Any]) -> Query:
    return Query(
        id=record["id"],
        group=record["group"],
        prompts=tuple(record["prompts"]),
        answers=tuple(record["answers"]),
        options=tuple(tuple(letters) for letters in record["options"]),
        separators=tuple(record["separators"]),
    )
