"""What is done with a finished run: evaluation, editing, prediction and analyses, as tables.

Each takes a `Run` and returns `Tables`. Without `out` nothing is written anywhere; with it the
tables, their figures and what they were made with are, and finished trials are kept there, so that
the same call after a stop goes on. Trials that the run's own directory has are used either way.
"""

import dataclasses
import hashlib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxneurons.checkpoints.provenance import versions
from jaxneurons.engine.bootstrap import DRAWS
from jaxneurons.errors import ConfigError, DataError, WriteError
from jaxneurons.model.axis_types import any_axes
from jaxneurons.neurons.sets import NeuronSet, read_neurons
from jaxneurons.plots.figures import check_places
from jaxneurons.processes.sharing import open_parts, write_once
from jaxneurons.qrnca import analyses, prediction
from jaxneurons.qrnca.arguments import check_progress, checked_directory
from jaxneurons.qrnca.effects import change_rows, editing_rows, evaluation_rows
from jaxneurons.qrnca.opening import open_run
from jaxneurons.qrnca.pcr import FACTORS
from jaxneurons.qrnca.run import Run
from jaxneurons.qrnca.trials import Outcomes, run_trials
from jaxneurons.storage.progress import Progress
from jaxneurons.storage.settings import check_argument
from jaxneurons.storage.store import Overlay, RunDirectory, check_writable, write_json
from jaxneurons.storage.tables import Row, Tables, write_table

TABLES, FIGURES = "tables", "figures"
YOURS = "yours"
"""The method whose neurons are the caller's."""

Place = str | os.PathLike[str] | None
Neurons = NeuronSet | str | os.PathLike[str] | None


@any_axes
def evaluate(
    run: Run,
    *,
    neurons: Neurons = None,
    seed: int = 0,
    out: Place = None,
    progress: Progress | None = None,
) -> Tables:
    """Boost and suppress each query's neurons, beside five baselines and matched random ones.

    Args:
      run: with its neurons.
      neurons: a set of your own, or the CSV file of one, to be changed in every query: one more
        method.
      seed: of unrelated queries, controls and resamples.
      out: a directory to write to; default: none.
      progress: called with how many prompts are done, of how many.

    Returns:
      `evaluation`, the probability change ratio of each method by group with intervals (see
      `evaluation_rows`), and `changes`, a row for each query (see `change_rows`).

    Raises:
      ConfigError: arguments of the wrong kind.
      DataError: queries of one group only, neurons that this run's model or site does not have.
    """
    run, yours = _prepared(run, neurons, seed, out, progress)
    outcomes = run_trials(run, extra=yours, seed=seed, progress=progress)
    changes = change_rows(run, outcomes)
    rows = {"changes": changes, "evaluation": evaluation_rows(changes, seed=seed)}
    return _written(run, "evaluation", rows, _facts(run, outcomes, neurons, seed), out)


@any_axes
def edit(
    run: Run,
    *,
    neurons: Neurons = None,
    seed: int = 0,
    out: Place = None,
    progress: Progress | None = None,
) -> Tables:
    """Which answers turn? Right ones when neurons are suppressed, wrong ones when boosted.

    Shares its passes with `evaluate`, whose arguments it takes.

    Returns:
      `editing`: see `editing_rows`.

    Raises:
      ConfigError: arguments of the wrong kind.
      DataError: as `evaluate`.
    """
    run, yours = _prepared(run, neurons, seed, out, progress)
    outcomes = run_trials(run, extra=yours, seed=seed, progress=progress)
    rows = {"editing": editing_rows(run, outcomes, seed=seed)}
    return _written(run, "editing", rows, _facts(run, outcomes, neurons, seed), out)


@any_axes
def predict(
    run: Run, *, seed: int = 0, out: Place = None, progress: Progress | None = None
) -> Tables:
    """Answer each half of the queries from the neurons located in the other half alone.

    The protocol is that of `jaxneurons.qrnca.prediction`.

    Args:
      run: of multi-choice queries, neurons of a feed-forward site.
      seed: of halves, random neurons and resamples.
      out: a directory to write to; default: none.
      progress: called with how many prompts are done, of how many.

    Returns:
      `prediction`: a row for each group, readout and pool of neurons.

    Raises:
      ConfigError: arguments of the wrong kind.
      DataError: queries without options, one group only, or a group of one query.
    """
    run, _ = _prepared(run, None, seed, out, progress)
    rows = {"prediction": prediction.predict(run, seed=seed, progress=progress)}
    return _written(run, None, rows, {}, out)


@any_axes
def analyse(
    run: Run,
    *,
    kinds: Sequence[str] = (),
    kinds_limit: int = analyses.KINDS_LIMIT,
    against: Run | str | os.PathLike[str] | None = None,
    out: Place = None,
    progress: Progress | None = None,
) -> Tables:
    """Counts, overlap, layers, map and words of the neurons; kinds of neurons and runs compared.

    Args:
      run: with its neurons.
      kinds: sites, such as ("up", "gate", "act"), at each of which some of the queries are located
        again to be compared; default: none.
      kinds_limit: queries that kinds are compared on, at most.
      against: another run, or its directory: how far do the neurons of the same queries agree?
      out: a directory to write to; default: none.
      progress: called with how many prompts of a kind are done, of how many.

    Returns:
      `neurons`, `counts`, `overlap` and `layers`; `words`, but of q, k and v, which write nothing
      to the residual stream; `kind_overlap` and `kinds` with `kinds`, `against` with `against`.

    Raises:
      ConfigError: arguments of the wrong kind, sites that do not share their numbering.
      DataError: another run that cannot be opened, or without a query of this one.
    """
    run, _ = _prepared(run, None, 0, out, progress)
    if isinstance(kinds, str) or not isinstance(kinds, Sequence):
        raise ConfigError(f"kinds are a list of sites, such as ['up', 'gate'], got {kinds!r:.80}")
    if kinds:
        analyses.check_kinds(kinds)
        check_argument("kinds_limit", int, kinds_limit)
    other = None
    if isinstance(against, str | os.PathLike):
        other = open_run(against, run.lm)
    elif against is not None:
        other = _checked_run(against)
    neurons = analyses.neuron_rows(run)
    rows = {
        "neurons": neurons,
        "counts": analyses.count_rows(run),
        "overlap": analyses.overlap_rows(neurons),
        "layers": analyses.layer_rows(run, neurons),
    }
    if run.settings.site not in ("q", "k", "v"):
        rows["words"] = analyses.word_rows(run, neurons)
    if kinds:
        directory = None if out is None else Path(out)
        rows["kind_overlap"], rows["kinds"] = analyses.kind_rows(
            run, kinds=kinds, limit=kinds_limit, out=directory, progress=progress
        )
    if other is not None:
        rows["against"] = analyses.against_rows(run, other, str(other.path or other.name))
    return _written(run, None, rows, {}, out)


def _checked_run(run: object) -> Run:
    if isinstance(run, Run):
        return run
    if isinstance(run, str | os.PathLike):
        raise ConfigError(f"run is {str(run)!r}: open it first with jaxneurons.qrnca.open_run")
    raise ConfigError(f"run is what jaxneurons.qrnca.locate gives, got {run!r:.80}")


def _prepared(
    run: object, neurons: object, seed: object, out: object, progress: object
) -> tuple[Run, dict[str, dict[str, NeuronSet]]]:
    """The run, keeping parts in `out`, and the caller's neurons by method and query.

    Raises:
      ConfigError: arguments of the wrong kind.
      DataError: neurons that this run does not have; a directory of another run.
      WriteError: `out` cannot be written to.
    """
    run = _checked_run(run)
    if isinstance(seed, bool) or not isinstance(seed, int) or seed < 0:
        raise ConfigError(f"seed must be an integer of at least 0, got {seed!r:.80}")
    check_progress(progress)
    out = checked_directory(out)
    yours = _yours(run, neurons)
    if out is None:
        return run, yours
    check_out(out)
    RunDirectory.check(out, run.identity, whole=True)
    try:
        check_writable(out)
        store = open_parts(out, run.identity)
    except WriteError as error:
        raise DataError(f"{error}; give another directory: out=, --out") from None
    return dataclasses.replace(run, store=Overlay(store, run.store)), yours


def check_out(out: str | os.PathLike[str]) -> None:
    """Raise `DataError` if results have no place in a directory: files have their names."""
    check_places(Path(out), TABLES, FIGURES)


def _yours(run: Run, neurons: object) -> dict[str, dict[str, NeuronSet]]:
    """The caller's neurons, to be changed in every query."""
    if neurons is None:
        return {}
    if not isinstance(neurons, NeuronSet | str | os.PathLike):
        raise ConfigError(f"neurons are a NeuronSet or the CSV file of one, got {neurons!r:.80}")
    chosen = neurons if isinstance(neurons, NeuronSet) else read_neurons(neurons)
    what = "neurons" if isinstance(neurons, NeuronSet) else os.fspath(neurons)
    if not len(chosen):
        raise DataError(f"{what}: holds no neurons")
    site, sites = run.settings.site, ", ".join(chosen.codes)
    if sites != site:
        raise DataError(f"{what}: at {sites}, but this run is of neurons at {site!r}")
    chosen.check(run.lm.config)
    return {YOURS: {query.id: chosen for query in run.queries}}


def _facts(run: Run, outcomes: Outcomes, neurons: Neurons, seed: int) -> dict[str, Any]:
    """What a table of trials was made with."""
    source = None
    if isinstance(neurons, NeuronSet):
        source = {"path": None, "sha256": neurons.digest}
    elif neurons is not None:
        content = Path(neurons).read_bytes()
        source = {"path": str(neurons), "sha256": hashlib.sha256(content).hexdigest()}
    return {
        "site": run.settings.site,
        "changed_at": "last prompt position, and the answer's own but the last",
        "probability_of": "the whole answer, by teacher forcing",
        "methods": list(outcomes.sets),
        "neurons_file": source,
        "factors": FACTORS,
        "seeds": {"unrelated queries, random neurons, bootstrap": seed},
        "bootstrap_draws": DRAWS,
        "seconds": round(outcomes.seconds, 3),
        "seconds_of_attribution": run.facts["seconds"]["attribution"],
        "unrelated": outcomes.other,
        "versions": versions(),
    }


def _written(
    run: Run, name: str | None, rows: Mapping[str, list[Row]], facts: dict[str, Any], out: Place
) -> Tables:
    """The tables, in `out` too: as CSV and Parquet, drawn, with `name`.json about them."""
    rows = {table: lines for table, lines in rows.items() if lines}
    if out is None:
        return Tables(rows, facts=facts)
    path = Path(out)

    def write() -> None:
        from jaxneurons.qrnca.figures import draw

        for table, lines in rows.items():
            write_table(path / TABLES, table, lines)
        draw(dict(rows), path / FIGURES, source=run.name)
        if name is not None:
            write_json(path / f"{name}.json", facts)

    write_once("tables", write)
    return Tables(rows, facts=facts, path=path)
