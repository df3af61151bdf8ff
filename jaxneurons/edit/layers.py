"""Which layers to edit, in a model that nobody has tuned: a few requests, each edited at each.

A method's published layers are those of one model. `choose_layers` edits every request alone at
each candidate (a layer, or the span that MEMIT and AlphaEdit spread over), measures what came of
it, and takes the candidate with the highest score: the harmonic mean of efficacy, generalisation
and locality, by free generation. The table behind it, with bootstrap intervals over requests,
says how far a few requests can tell candidates apart.
"""

import dataclasses
import functools
import os
import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jaxneurons.checkpoints.loading import LM
from jaxneurons.edit.cases import Case, MeasureSettings, encode_case
from jaxneurons.edit.covariance import Covariance, collect_covariance
from jaxneurons.edit.editing import edit_each, layers_of
from jaxneurons.edit.encoding import encode_request
from jaxneurons.edit.layer_scores import (
    NUMBERS,
    SCORE,
    Layers,
    name_of,
    request_rows,
    score_table,
)
from jaxneurons.edit.measures import run_cases
from jaxneurons.edit.method import (
    MEMIT,
    ROME,
    AlphaEdit,
    FineTune,
    default_layer,
    default_layers,
)
from jaxneurons.edit.outcomes import SHARES, Outcome, measured_row
from jaxneurons.edit.prefixes import generate_prefixes
from jaxneurons.edit.requests import EditRequest
from jaxneurons.errors import ConfigError, DataError
from jaxneurons.model.axis_types import any_axes
from jaxneurons.model.config import ModelConfig
from jaxneurons.processes.sharing import open_parts, share_parts, spread, write_once
from jaxneurons.storage.progress import Progress
from jaxneurons.storage.settings import as_path, check_argument
from jaxneurons.storage.store import digest, write_json
from jaxneurons.storage.tables import Row, Tables, html_table, write_table

MEASURED = MeasureSettings(fluency_tokens=0, perplexity_tokens=0)
"""Without fluency and perplexity, which take most of the time."""
FORMAT = 1
"""Changes when the parts of a run mean something else."""

LayerMethod = ROME | MEMIT | AlphaEdit | FineTune
"""Settings of methods that edit down kernels of layers which someone has to name."""


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class LayerChoice:
    """The layers that serve best, and what that rests on.

    Attributes:
      layers: of the candidate with the highest score.
      settings: of the method, with these layers.
      tables: `layers`, a row for each candidate, and `requests`, one for each of its requests.
    """

    layers: Layers
    settings: LayerMethod
    tables: Tables

    def __repr__(self) -> str:
        names = ("layers", "score", "low", "high", *SCORE, "as_good")
        lines = [[_short(row[name]) for name in names] for row in self.tables.rows("layers")]
        widths = [max(map(len, column)) for column in zip(names, *lines, strict=True)]
        table = [
            "  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True))
            for line in (names, *lines)
        ]
        method = type(self.settings).__name__
        return "\n".join([f"{method}: layers {name_of(self.layers)}", *table])

    def _repr_html_(self) -> str:
        title = f"{type(self.settings).__name__}: layers {name_of(self.layers)} serve best"
        rows = self.tables.rows("layers")
        return html_table(title, rows, most=len(rows))


def _short(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.3f}" if isinstance(value, float) else str(value)


def with_layers(settings: LayerMethod, layers: Layers) -> LayerMethod:
    """The settings, for these layers.

    Raises:
      ConfigError: several layers for a method that edits one.
    """
    if isinstance(settings, MEMIT | AlphaEdit):
        return dataclasses.replace(settings, layers=tuple(layers))
    if len(layers) != 1:
        raise ConfigError(
            f"{type(settings).__name__} edits one layer, a candidate is {tuple(layers)}"
        )
    return dataclasses.replace(settings, layer=layers[0])


def default_candidates(
    settings: LayerMethod, config: ModelConfig, *, count: int = 10
) -> list[Layers]:
    """About `count` candidates from the lowest to the highest layers, the default one among them.

    For MEMIT and AlphaEdit: spans as long as the settings' own, or the default one.
    """
    if isinstance(settings, MEMIT | AlphaEdit):
        default = settings.layers or default_layers(config)
    else:
        default = (default_layer(config) if settings.layer is None else settings.layer,)
    last = config.num_layers - len(default)
    starts = np.linspace(0, last, max(1, min(count, last + 1))).round().astype(int).tolist()
    spans = {tuple(range(start, start + len(default))) for start in starts}
    return sorted({*spans, default})


@any_axes
def choose_layers(
    lm: LM,
    requests: Sequence[EditRequest],
    method: LayerMethod,
    *,
    candidates: Sequence[int | Layers] | None = None,
    covariance: Mapping[int, Covariance] | None = None,
    score: Sequence[str] = SCORE,
    measured: MeasureSettings = MEASURED,
    seed: int = 0,
    out: str | os.PathLike[str] | None = None,
    progress: Progress | None = None,
) -> LayerChoice:
    """Edit each request alone at each candidate, measure, and choose the layers that serve best.

    Args:
      lm: the model.
      requests: a few, about ten; with paraphrases and neighbours, or the score is without them.
      method: settings; their layers do not matter but for the default candidates.
      candidates: layers, or spans of them; default: `default_candidates`.
      covariance: of keys by layer; default: collected over the default text, where it is needed.
      score: the measures whose harmonic mean chooses; see `measure`. Those that no request has are
        left out.
      measured: what is measured of an edit.
      seed: of the bootstrap.
      out: a directory for `tables` and `figures`; a stopped run goes on there. Default: none.
      progress: called with how many candidates are done, of how many.

    Returns:
      The choice. Table `layers`: `score` with its 95 % interval (bootstrap over requests), means of
      all measures, `reached` (share of optimisations that reached their goal), `as_good` (the
      interval of its score's difference from the best one's holds 0) and `failed` (why nothing
      could be edited there: the score is then 0).

    Raises:
      ConfigError: settings of a method without layers, candidates that the model or method does
        not have, an unknown measure.
      DataError: no requests, one that cannot be encoded, or a directory with another run.
    """
    began = time.perf_counter()
    check_argument("requests", Sequence[EditRequest], requests)
    spans = _checked(lm, requests, method, candidates, score)
    cases = [encode_case(lm, request, settings=measured) for request in requests]
    for request in requests:
        encode_request(lm.tokenizer, request, config=lm.config)
    path = None if out is None else as_path("out", out)
    if covariance is None:
        covariance = _needed_covariance(lm, method, spans)
    identity = _identity(lm, requests, method, covariance, measured)
    store = open_parts(path, identity)
    attempt = _Attempts(lm, requests, method, covariance, cases, measured)
    values: dict[Layers, np.ndarray] = {}
    rows: list[Row] = []
    jobs = {
        f"layers-{'-'.join(map(str, span))}": functools.partial(attempt, span) for span in spans
    }
    share_parts(store, jobs, together=spread(lm.params), progress=progress)
    for number, (span, (name, make)) in enumerate(zip(spans, jobs.items(), strict=True)):
        part = store.part(name, make)
        values[span] = part["numbers"]
        rows += request_rows(span, requests, part)
        if progress is not None:
            progress(number + 1, len(spans))
    table, parts = score_table(spans, values, rows, score, seed)
    best = max(table, key=lambda row: (row["score"], np.mean([row[name] for name in parts])))
    layers = spans[table.index(best)]
    record = {
        "model": lm.facts(),
        "method": type(method).__name__,
        "settings": dataclasses.asdict(with_layers(method, layers)),
        "score": parts,
        "requests": len(requests),
        "seconds": time.perf_counter() - began,
    }
    tables = Tables({"layers": table, "requests": rows}, facts=record, path=path)
    return LayerChoice(layers, with_layers(method, layers), _written(tables))


def _written(tables: Tables) -> Tables:
    path = tables.path
    if path is None:
        return tables

    def write() -> None:
        from jaxneurons.edit.layer_figures import draw_layers

        for name in tables:
            write_table(path / "tables", name, tables.rows(name))
        write_json(path / "layers.json", tables.facts)
        draw_layers(tables, path / "figures")

    write_once("tables", write)
    return tables


def _checked(
    lm: LM,
    requests: Sequence[EditRequest],
    method: LayerMethod,
    candidates: Sequence[int | Layers] | None,
    score: Sequence[str],
) -> list[Layers]:
    """The candidates as spans, when every argument can be used."""
    if not isinstance(method, ROME | MEMIT | AlphaEdit | FineTune):
        raise ConfigError(
            f"method is the settings of ROME, MEMIT, AlphaEdit or FineTune, got {method!r:.80}: "
            "others edit the neurons they are given"
        )
    unknown = [name for name in score if name not in SHARES]
    if unknown or not score:
        raise ConfigError(f"score: no measure {', '.join(unknown)}; known: {', '.join(SHARES)}")
    if not requests:
        raise DataError("no requests: give a few facts to try layers with")
    if candidates is None:
        return default_candidates(method, lm.config)
    spans = [(int(c),) if isinstance(c, int | np.integer) else tuple(c) for c in candidates]
    for span in spans:
        if not span or list(span) != sorted({*span}):
            raise ConfigError(f"a candidate is a layer or ascending layers, got {span}")
        if not 0 <= span[0] <= span[-1] < lm.config.num_layers:
            raise ConfigError(
                f"candidate {name_of(span)}: the model has layers 0 to {lm.config.num_layers - 1}"
            )
        with_layers(method, span)
    if not spans:
        raise ConfigError("no candidates: name one layer at least, or leave them to the default")
    return list(dict.fromkeys(spans))


def _needed_covariance(
    lm: LM, method: LayerMethod, spans: Sequence[Layers]
) -> dict[int, Covariance]:
    wanted = {layer for span in spans for layer in layers_of(with_layers(method, span), lm.config)}
    return collect_covariance(lm, sorted(wanted)) if wanted else {}


def _identity(
    lm: LM,
    requests: Sequence[EditRequest],
    method: LayerMethod,
    covariance: Mapping[int, Covariance],
    measured: MeasureSettings,
) -> dict[str, Any]:
    statistics = {str(layer): dict(of.identity) for layer, of in sorted(covariance.items())}
    return {
        **lm.identity(),
        **known_identity(requests, method, measured),
        "covariance": digest(statistics),
    }


def known_identity(
    requests: Sequence[EditRequest], method: LayerMethod, measured: MeasureSettings = MEASURED
) -> dict[str, Any]:
    """What is known of a run without its model and statistics."""
    settings = {k: v for k, v in dataclasses.asdict(method).items() if k not in ("layer", "layers")}
    return {
        "format": FORMAT,
        "method": type(method).__name__,
        "settings": settings,
        "requests": digest([dataclasses.astuple(request) for request in requests]),
        "measures": dataclasses.asdict(measured),
    }


class _Attempts:
    """Edits of all requests at a candidate; what all candidates share is made once."""

    def __init__(
        self,
        lm: LM,
        requests: Sequence[EditRequest],
        method: LayerMethod,
        covariance: Mapping[int, Covariance],
        cases: Sequence[Case],
        measured: MeasureSettings,
    ):
        self.lm, self.requests, self.method = lm, requests, method
        self.covariance, self.cases, self.measured = covariance, cases, measured
        self.prefixes: list[str] | None = None
        self.before: list[Outcome] | None = None

    def __call__(self, layers: Layers) -> dict[str, np.ndarray]:
        """Measures of every request, NaN where there is none; why there are none at all."""
        lm = self.lm
        shape = len(self.requests), len(NUMBERS)
        if self.before is None:
            self.before = run_cases(lm, self.cases, settings=self.measured)
            self.prefixes = self._prefixes()
        try:
            edits = edit_each(
                lm.params,
                self.requests,
                config=lm.config,
                tokenizer=lm.tokenizer,
                settings=with_layers(self.method, layers),
                covariance=self.covariance,
                prefixes=self.prefixes,
            )
        except DataError as error:
            return {
                "numbers": np.full(shape, np.nan),
                "reached": np.zeros(shape[0], bool),
                "failed": np.array(str(error)),
            }
        changes = [edit.changes for edit in edits]
        after = run_cases(lm, self.cases, changes, settings=self.measured)
        numbers = np.full(shape, np.nan)
        for i, (case, *outcomes) in enumerate(zip(self.cases, after, self.before, strict=True)):
            row = measured_row(case, *outcomes)
            numbers[i] = [np.nan if row[name] is None else row[name] for name in NUMBERS]
        reached = [edit.trace is None or bool(edit.trace.reached.all()) for edit in edits]
        return {"numbers": numbers, "reached": np.array(reached), "failed": np.array("")}

    def _prefixes(self) -> list[str] | None:
        if isinstance(self.method, FineTune):
            return None
        how = self.method.optimisation
        if not how.prefixes:
            return None
        return generate_prefixes(
            self.lm.params,
            self.lm.tokenizer,
            config=self.lm.config,
            count=how.prefixes,
            lengths=how.prefix_tokens,
            seed=how.seed,
        )
