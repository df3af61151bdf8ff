"""All methods on many requests, each edit alone, beside controls: which method edits best?

Each request is edited by each method on the untouched model and measured (`measures.measure`).
Beside a method stands its control, changes of the same size in random directions, or the same
method on random neurons of the same layers; and the model as it is. What is finished is kept: a
stopped evaluation goes on, to the same numbers.
"""

import dataclasses
import functools
import json
import os
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jaxneurons.checkpoints.loading import LM
from jaxneurons.checkpoints.provenance import versions
from jaxneurons.edit.cases import MeasureSettings, answer_width, askable, labels_of
from jaxneurons.edit.measures import edits_at_once
from jaxneurons.edit.method import Settings
from jaxneurons.edit.requests import EditRequest, check_requests
from jaxneurons.edit.summaries import RANDOM, UNEDITED, difference_rows, summary_rows
from jaxneurons.edit.trials import Chunk, Work, described, part_of
from jaxneurons.engine.bootstrap import DRAWS
from jaxneurons.errors import ConfigError, DataError
from jaxneurons.model.axis_types import any_axes
from jaxneurons.plots.figures import check_places
from jaxneurons.processes.sharing import Unit, open_parts, share_units, spread, write_once
from jaxneurons.processes.team import current
from jaxneurons.storage.progress import Progress
from jaxneurons.storage.settings import check_argument, check_number
from jaxneurons.storage.store import (
    Parts,
    RunDirectory,
    check_writable,
    digest,
    null_for_nan,
    write_json,
)
from jaxneurons.storage.tables import Row, Tables, read_json, write_table

TABLES, FIGURES = "tables", "figures"
FORMAT = 2
Place = str | os.PathLike[str] | None


@any_axes
def evaluate(
    lm: LM,
    requests: Sequence[EditRequest],
    methods: Mapping[str, Settings],
    *,
    covariance: Mapping[int, Any] | None = None,
    measures: MeasureSettings | None = None,
    texts: Sequence[str] | None = None,
    seed: int = 0,
    out: Place = None,
    progress: Progress | None = None,
) -> Tables:
    """Edit each request with each method, on the untouched model, and measure what that did.

    Args:
      lm: the model.
      requests: with their paraphrases and neighbours.
      methods: settings by a name of yours. Neurons may be a tuple of sets, one for each request.
      covariance: of keys by layer, from `collect_covariance`, for the methods that need it.
      measures: what is measured.
      texts: neutral ones for perplexity; default: held-out texts that ship with the package.
      seed: of controls and resamples.
      out: a directory to write to and to go on in; default: none.
      progress: called with how many edits are done, of how many.

    Returns:
      `edits`, a row for each request, method and control (see `measures.measure`; and `norm` of
      the change, whether the optimisation `reached` its goal, in how many `steps`); `answers`, one
      for each of their questions, with the text that the model wrote; `summary`,
      means by method with 95 % intervals (bootstrap over requests); `differences`, paired, to the
      control and to the unedited model. A method of that name is the unedited model. `facts` says
      which requests were left out, and why.

    Raises:
      ConfigError: arguments of the wrong kind, a method without a name or named "unedited".
      DataError: no request that can be asked; a directory of another evaluation.
      WriteError: `out` cannot be written to.
    """
    measures = measures or MeasureSettings()
    check_methods(lm, requests, methods, seed, progress)
    require_covariance(lm, methods, covariance)
    if texts is None:
        texts = neutral_texts(lm) if measures.perplexity_tokens else ()
    path = checked_out(out)
    work = _prepare(lm, requests, covariance, measures, tuple(texts), seed, path)
    started = time.perf_counter()
    size = measures.batch or edits_at_once(lm.config)
    done, total = 0, len(work.cases) * len(methods)
    count = len(work.cases)
    chunks = [range(start, min(start + size, count)) for start in range(0, count, size)]
    _share(chunks, work, methods, progress)
    for index in chunks:
        chunk = Chunk(work, index)
        for name, settings in methods.items():
            chunk.run(name, settings)
            done += len(chunk.index)
            if progress is not None:
                progress(done, total)
        chunk.keep_unedited()
    rows, answers = _collected(work, methods)
    tables = {
        "edits": rows,
        "answers": answers,
        "summary": summary_rows(rows, seed=seed),
        "differences": difference_rows(rows, seed=seed),
    }
    of_all = {"all": {"all": round(time.perf_counter() - started, 3)}}
    seconds = summed([*current().gather("seconds", work.seconds), of_all])
    return _written(lm, work, methods, tables, seconds, path)


def _share(
    chunks: Sequence[Sequence[int]],
    work: Work,
    methods: Mapping[str, Settings],
    progress: Progress | None,
) -> None:
    """Leave to each of several processes some of the chunks."""

    def names(index: Sequence[int]) -> tuple[str, ...]:
        kinds = [(UNEDITED, None, "")]
        kinds += [(name, s, control) for name, s in methods.items() for control in ("", RANDOM)]
        return tuple(part_of(work, *kind, i) for kind in kinds for i in index)

    def run(index: Sequence[int]) -> None:
        chunk = Chunk(work, index)
        for name, settings in methods.items():
            chunk.run(name, settings)
        chunk.keep_unedited()

    share_units(
        work.store,
        [Unit(names(index), functools.partial(run, index)) for index in chunks],
        together=spread(work.lm.params),
        sizes=[len(index) * len(methods) for index in chunks],
        progress=progress,
    )


def neutral_texts(lm: LM) -> list[str]:
    """Texts for perplexity that no covariance has seen; for the lab model, of its own world."""
    from jaxneurons.edit.texts import default_text, held_out_text

    name, texts = default_text(lm, 1)
    return held_out_text() if name.startswith("neutral") else texts


def check_methods(lm: Any, requests: Any, methods: Any, seed: Any, progress: Any) -> None:
    """Raise `ConfigError` for arguments of the wrong kind, as `evaluate` says."""
    check_argument("lm", LM, lm)
    check_argument("requests", Sequence[EditRequest], requests)
    _check_no_names(methods)
    check_argument("methods", Mapping[str, Settings], methods)
    check_argument("progress", Callable | None, progress)
    check_number("seed", seed, least=0)
    for name, settings in methods.items():
        if not name.strip() or name == UNEDITED:
            raise ConfigError(f"a method cannot be named {name!r}; give it another name")
        sets = getattr(settings, "neurons", None)
        if isinstance(sets, tuple) and len(sets) != len(requests):
            raise ConfigError(
                f"{name}: {len(sets)} sets of neurons for {len(requests)} requests; give one for "
                "each, or a single one"
            )


def _check_no_names(methods: Any) -> None:
    """Raise `ConfigError` where settings are given by the names that the shell has for them."""
    given = methods.values() if isinstance(methods, Mapping) else methods
    given = [given] if isinstance(given, str) else given
    names = [name for name in given if isinstance(name, str)] if _holds(given) else []
    if names:
        raise ConfigError(
            f"methods holds {', '.join(map(repr, names))}, a name and no settings; "
            f"jaxneurons.edit.named_methods(lm, requests, {names}) gives the settings of names "
            "that the shell knows"
        )


def _holds(value: Any) -> bool:
    return isinstance(value, Collection) and not isinstance(value, str | bytes)


def opened(path: Path | None, identity: Mapping[str, Any]) -> Parts:
    """Finished parts in a directory, or in memory.

    Raises:
      DataError: the directory holds another run.
      WriteError: it cannot be written to.
    """
    if path is not None:
        RunDirectory.check(path, identity, whole=True)
        check_writable(path)
    return open_parts(path, identity)


def require_covariance(
    lm: LM, methods: Mapping[str, Settings], covariance: Mapping[int, Any] | None
) -> None:
    """Raise unless every covariance that a method needs is there.

    Raises:
      ConfigError: a layer that the model does not have.
      DataError: one is missing; says the method and the layers.
    """
    from jaxneurons.edit.editing import layers_of

    for name, settings in methods.items():
        missing = [x for x in layers_of(settings, lm.config) if x not in (covariance or {})]
        if missing:
            raise DataError(
                f"{name} needs the covariance of layers {', '.join(map(str, missing))}; collect it "
                f"with jaxneurons.edit.collect_covariance(lm, {missing})"
            )


def checked_out(out: Place) -> Path | None:
    """A directory that results can be written to; None stays None.

    Raises:
      ConfigError: no path.
      DataError: something else has the place of its tables or figures.
      WriteError: it cannot be written to.
    """
    check_argument("out", str | os.PathLike | None, out)
    if out is None:
        return None
    path = Path(out)
    check_places(path, TABLES, FIGURES)
    return path


def _prepare(
    lm: LM,
    requests: Sequence[EditRequest],
    covariance: Mapping[int, Any] | None,
    measures: MeasureSettings,
    texts: tuple[str, ...],
    seed: int,
    path: Path | None,
) -> Work:
    cases, numbers, left_out = askable(lm, requests, measures)
    covariances = covariance_identity(covariance)
    rest = {"texts": digest(texts), "covariance": covariances, "seed": seed, "format": FORMAT}
    identity = {**lm.identity(), **request_identity(requests, measures), **rest}
    return Work(
        lm=lm,
        cases=cases,
        numbers=numbers,
        labels=labels_of(requests),
        left_out=left_out,
        covariance=covariance,
        measures=measures,
        texts=texts,
        seed=seed,
        width=answer_width(cases),
        identity=identity,
        store=opened(path, identity),
        seconds={},
    )


def request_identity(requests: Sequence[EditRequest], measures: MeasureSettings) -> dict[str, Any]:
    """What is known of a run without its model: which requests, and how they are measured."""
    return {
        "requests": digest([dataclasses.asdict(request) for request in requests]),
        "measures": dataclasses.asdict(measures),
    }


def covariance_identity(covariance: Mapping[int, Any] | None) -> dict[str, Any]:
    """What covariances depend on, by layer."""
    return {
        str(layer): {"count": entry.count, **dict(entry.identity)}
        for layer, entry in sorted((covariance or {}).items())
    }


class _Key(NamedTuple):
    """Of which rows stand together."""

    method: str
    control: str
    settings: Settings | None


def _collected(work: Work, methods: Mapping[str, Settings]) -> tuple[list[Row], list[Row]]:
    """Rows of edits and of their answers, in order; what a method refused goes to `left_out`."""
    keys = [_Key(UNEDITED, "", None)]
    keys += [_Key(name, control, s) for name, s in methods.items() for control in ("", RANDOM)]
    rows: list[Row] = []
    answers: list[Row] = []
    for key in keys:
        for i in range(len(work.cases)):
            part = work.store.load(part_of(work, key.method, key.settings, key.control, i)) or {}
            row, label = json.loads(str(part["row"])), work.labels[work.numbers[i]]
            method = f"{key.method} ({RANDOM})" if key.control else key.method
            if "refused" in row:
                reason = row["refused"]
                work.left_out.append({"request": label, "method": method, "reason": reason})
                continue
            head = {"request": label, "method": key.method, "control": key.control}
            answers += [{**head, **answer} for answer in json.loads(str(part["answers"]))]
            head |= {"norm": 0.0, "reached": None, "steps": None} if not key.settings else {}
            rows.append({**head, **row})
    return rows, answers


def _written(
    lm: LM,
    work: Work,
    methods: Mapping[str, Settings],
    tables: dict[str, list[Row]],
    seconds: dict[str, Any],
    path: Path | None,
) -> Tables:
    """The tables, in a directory too: as files, as figures, and as one JSON without times."""
    tables = {name: rows for name, rows in tables.items() if rows}
    results = {
        "identity": work.identity,
        "methods": {name: described(settings) for name, settings in methods.items()},
        "remarks": check_requests([case.request for case in work.cases]),
        "left_out": work.left_out,
        "bootstrap_draws": DRAWS,
    }
    return write_results(lm, tables, results, seconds, path, name="evaluation")


def write_results(
    lm: LM,
    tables: dict[str, list[Row]],
    results: dict[str, Any],
    seconds: dict[str, dict[str, float]],
    path: Path | None,
    *,
    name: str,
) -> Tables:
    """Tables with what they rest on; in a directory as files, figures and `name`.json too.

    That one holds no times and is the same twice; run.json adds up those of stopped runs.
    """
    seconds = seconds if path is None else with_earlier(seconds, path / "run.json", results)
    facts = {"model": lm.facts(), **results, "seconds": seconds, "versions": versions()}
    if path is None:
        return Tables(tables, facts=facts)

    def write() -> None:
        from jaxneurons.edit.figures import draw

        for table, rows in tables.items():
            write_table(path / TABLES, table, rows)
        write_json(path / f"{name}.json", null_for_nan({**results, **tables}))
        write_json(path / "run.json", null_for_nan(facts))
        draw(tables, path / FIGURES, source=lm.source)

    write_once("results", write)
    return Tables(tables, facts=facts, path=path)


def with_earlier(
    seconds: Mapping[str, Mapping[str, float]], path: Path, results: Mapping[str, Any]
) -> dict[str, dict[str, float]]:
    """Seconds together with those that run.json has of the runs before, of the same identity."""
    try:
        known = read_json(path)
    except DataError:
        known = {}
    earlier = known.get("seconds") if known.get("identity") == results["identity"] else None
    before = {
        name: {what: float(value) for what, value in parts.items()}
        for name, parts in (earlier.items() if isinstance(earlier, dict) else ())
        if isinstance(parts, dict)
    }
    return summed([seconds, before])


def summed(seconds: Sequence[Mapping[str, Mapping[str, float]]]) -> dict[str, dict[str, float]]:
    """Seconds of several processes or runs together, by method and by what was done."""
    total: dict[str, dict[str, float]] = {}
    for each in seconds:
        for name, parts in each.items():
            here = total.setdefault(name, {})
            for what, value in parts.items():
                here[what] = round(here.get(what, 0.0) + value, 3)
    return total
