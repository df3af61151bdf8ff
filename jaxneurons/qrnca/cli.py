"""The command line of query-relevant neurons: `qrnca locate`, and everything after it."""

import dataclasses
import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from jaxneurons.errors import ConfigError, DataError, near_matches
from jaxneurons.terminal.console import (
    console,
    counting,
    errors,
    load_and_say,
    show_editing,
    show_evaluation,
    show_located,
    show_prediction,
)
from jaxneurons.terminal.options import IgnoreKeys

if TYPE_CHECKING:
    from jaxneurons.neurons.sets import NeuronSet
    from jaxneurons.qrnca.run import Run
    from jaxneurons.qrnca.trials import Outcomes

app = typer.Typer(help="Query-relevant neurons (QRNCA, arXiv 2406.10868).", no_args_is_help=True)

MODES = ("paper", "reference")
FORMS = ("choice", "free")
Directory = Annotated[Path, typer.Option("--run", help="Run directory of `qrnca locate`.")]
Model = Annotated[
    str | None, typer.Option(help="Where the run's model is now; default: where it was.")
]
OwnNeurons = Annotated[
    Path | None,
    typer.Option(help="CSV of site, layer, index: neurons of your own, one more method."),
]
Seed = Annotated[int, typer.Option(min=0, help="Of unrelated queries, controls and resamples.")]


@app.command()
def locate(
    model: Annotated[str, typer.Option(help="Model source: name, path, .gguf file or hub id.")],
    queries: Annotated[
        str,
        typer.Option(
            help="Query file (published JSON or cloze JSON Lines), or one that ships with the "
            "package: lab, lab-all, lab-cloze, lab-languages, facts."
        ),
    ],
    out: Annotated[Path, typer.Option(help="Run directory; a stopped run is taken up again.")],
    limit: Annotated[int | None, typer.Option(min=1, help="Only the first so many queries.")] = (
        None
    ),
    steps: Annotated[int | None, typer.Option(min=1, help="Nodes of a fixed rule.")] = None,
    rule: Annotated[
        str | None,
        typer.Option(help="adaptive (converged), gauss, right (the paper's), reference."),
    ] = None,
    max_nodes: Annotated[
        int | None,
        typer.Option(min=5, help="Most nodes of the adaptive rule, mean over layers (16)."),
    ] = None,
    mode: Annotated[
        str, typer.Option(help="paper, or reference: what its public code computes.")
    ] = "paper",
    site: Annotated[str, typer.Option(help="Neurons: up, gate, act, down, q, k, v or o.")] = "up",
    caches: Annotated[
        float | None,
        typer.Option(
            min=0,
            help="GiB of the prompts' keys and values to keep in OUT/caches, so that evaluate and "
            "edit need not run them again (delete them at any time). Default: on a CPU 16, at most "
            "a fifth of the free disk; on an accelerator none.",
        ),
    ] = None,
    ignore_key: IgnoreKeys = None,
) -> None:
    """Find the neurons that the answer to each query depends on."""
    from jaxneurons.lab.bundled import bundled_queries
    from jaxneurons.qrnca import method as qrnca

    if mode not in MODES:
        raise ConfigError(f"unknown mode {mode!r}; {near_matches(mode, MODES)}")
    settings = qrnca.QRNCAConfig() if mode == "paper" else qrnca.QRNCAConfig.reference()
    changes: dict[str, Any] = {"rule": rule, "steps": steps, "max_nodes": max_nodes}
    changes = {key: value for key, value in changes.items() if value is not None}
    quadrature = dataclasses.replace(settings.quadrature, **changes)
    settings = dataclasses.replace(settings, quadrature=quadrature, site=site)
    asked = bundled_queries(queries)[:limit]
    qrnca.check_count(len(asked))

    lm = load_and_say(model, ignore_keys=ignore_key)
    from jaxneurons.qrnca.locating import locate as find

    with counting("Attributing") as tell:
        located = find(
            lm,
            asked,
            out,
            settings=settings,
            cache_bytes=None if caches is None else int(min(caches, 2.0**30) * 2**30),
            progress=tell,
        )
    show_located(located, out)


@app.command()
def questions(
    source: Annotated[
        Path, typer.Argument(help="Questions and answers: JSON, JSON Lines, CSV, TSV.")
    ],
    destination: Annotated[Path, typer.Argument(help="Multi-choice file to write: JSON.")],
    options: Annotated[int, typer.Option(help="Options of a question.")] = 4,
    wordings: Annotated[int, typer.Option(help="Wordings of a question.")] = 3,
    seed: Annotated[int, typer.Option(min=0, help="Of distractors and their order.")] = 0,
    form: Annotated[
        str, typer.Option(help="choice: the answer is a letter; free: the whole answer is.")
    ] = "choice",
) -> None:
    """Make free-form questions multiple-choice, or wordings of them, as `qrnca locate` reads them.

    Fields: question, answer, and if you like group (distractors are answers of the same group),
    language (en, fr, ru, ar, ja, zh) and id.
    """
    from jaxneurons.prompts.multichoice import free_form, multi_choice, read_questions
    from jaxneurons.storage.store import check_not_input, write_json, write_json_lines

    if form not in FORMS:
        raise ConfigError(f"unknown form {form!r}; {near_matches(form, FORMS)}")
    check_not_input(destination, source)
    asked = read_questions(source)
    made: dict[str, Any] = {}
    left_out: dict[str, str] = {}
    records: list[dict[str, Any]] = []
    try:
        if form == "free":
            records = free_form(asked, wordings=wordings)
        else:
            made, left_out = multi_choice(asked, options=options, wordings=wordings, seed=seed)
    except DataError as error:
        raise DataError(f"{source}: {error}") from None
    if form == "free":
        write_json_lines(destination, records)
        console.print(
            f"Written: {destination} ({len(records)} questions, answers as they are)",
            soft_wrap=True,
        )
        return
    for name, why in left_out.items():
        errors.print(f"left out: question {name!r}: {why}", style="yellow", soft_wrap=True)
    if not made:
        raise DataError(f"{source}: no question is left; give groups with more answers")
    write_json(destination, made)
    console.print(
        f"Written: {destination} ({len(made)} questions, {wordings} wordings each)", soft_wrap=True
    )


@app.command()
def evaluate(
    run: Directory,
    model: Model = None,
    neurons: OwnNeurons = None,
    seed: Seed = 0,
    ignore_key: IgnoreKeys = None,
) -> None:
    """Boost and suppress each query's neurons, beside five baselines and matched random ones.

    Writes tables/evaluation, tables/changes and figures: the probability change ratio with
    intervals, how much of the attribution a set holds, and its effect beyond the matched control.
    """
    extra = _own(neurons)
    found = _opened(run, model, ignore_key)
    from jaxneurons.qrnca.effects import change_rows, evaluation_rows

    outcomes = _trials(found, extra, seed)
    rows = change_rows(found, outcomes)
    table = evaluation_rows(rows, seed=seed)
    _write(found, {"changes": rows, "evaluation": table})
    _write_facts(found, "evaluation", outcomes, neurons, seed)
    show_evaluation(table)
    attribution = found.located.run["seconds"]["attribution"]
    console.print(
        f"Trials: {outcomes.seconds:.1f} s; attribution took {attribution:.1f} s where it was done."
    )
    _say(run)


@app.command()
def edit(
    run: Directory,
    model: Model = None,
    neurons: OwnNeurons = None,
    seed: Seed = 0,
    ignore_key: IgnoreKeys = None,
) -> None:
    """Which answers turn? Right ones when neurons are suppressed, wrong ones when boosted.

    Writes tables/editing and its figure; shares its passes with `evaluate`.
    """
    extra = _own(neurons)
    found = _opened(run, model, ignore_key)
    from jaxneurons.qrnca.effects import editing_rows

    outcomes = _trials(found, extra, seed)
    rows = editing_rows(found, outcomes, seed=seed)
    _write(found, {"editing": rows})
    _write_facts(found, "editing", outcomes, neurons, seed)
    show_editing(rows)
    _say(run)


@app.command()
def predict(
    run: Directory, model: Model = None, seed: Seed = 0, ignore_key: IgnoreKeys = None
) -> None:
    """Answer each half of the queries from the neurons located in the other half alone.

    Writes tables/prediction and its figure. The protocol is that of `jaxneurons.qrnca.prediction`.
    """
    found = _opened(run, model, ignore_key)
    from jaxneurons.qrnca.prediction import predict as read_off

    with counting("Reading neurons") as tell:
        rows = read_off(found, seed=seed, progress=tell)
    _write(found, {"prediction": rows})
    show_prediction(rows)
    _say(run)


@app.command()
def analyse(
    run: Directory,
    model: Model = None,
    kinds: Annotated[
        str, typer.Option(help="Kinds of neurons to compare, with commas: up,gate,act; or none.")
    ] = "none",
    kinds_limit: Annotated[int, typer.Option(min=4, help="Queries to compare kinds on.")] = 60,
    against: Annotated[
        Path | None,
        typer.Option(help="Another run: how far do the neurons of the same queries agree?"),
    ] = None,
    ignore_key: IgnoreKeys = None,
) -> None:
    """Counts, overlap, layers, map and words of the neurons; kinds of neurons and runs compared.

    Writes tables and figures; `kinds` locates again at each site, on some of the queries.
    """
    found = _opened(run, model, ignore_key)
    from jaxneurons.qrnca import analyses

    neurons = analyses.neuron_rows(found)
    tables = {
        "neurons": neurons,
        "counts": analyses.count_rows(found),
        "overlap": analyses.overlap_rows(neurons),
        "layers": analyses.layer_rows(found, neurons),
    }
    if found.settings.site in ("q", "k", "v"):
        errors.print("skipped: words (q, k and v write nothing to the residual stream)")
    else:
        tables["words"] = analyses.word_rows(found, neurons)
    if kinds != "none":
        chosen = [name.strip() for name in kinds.split(",") if name.strip()]
        with counting("Locating at each site") as tell:
            pairs, effects = analyses.kind_rows(
                found, kinds=chosen, limit=kinds_limit, progress=tell
            )
        tables.update({"kind_overlap": pairs, "kinds": effects})
    if against is not None:
        tables["against"] = analyses.against_rows(found, against)
    _write(found, tables)
    _say(run)


def _own(path: Path | None) -> "NeuronSet | None":
    """A user's neurons, to be changed in every query; read before anything runs."""
    from jaxneurons.neurons.sets import read_neurons

    found = None if path is None else read_neurons(path)
    if found is not None and not len(found):
        raise DataError(f"{path}: holds no neurons")
    return found


def _trials(run: "Run", own: "NeuronSet | None", seed: int) -> "Outcomes":
    from jaxneurons.qrnca.trials import run_trials

    extra = {}
    if own is not None:
        site = run.settings.site
        if set(own.codes) != {site}:
            raise DataError(
                f"this run is of neurons at {site!r}, the file's are at {', '.join(own.codes)}"
            )
        own.check(run.lm.config)
        neurons = [neuron for _, neuron in own]
        extra["yours"] = {query.id: neurons for query in run.queries}
    with counting("Changing neurons") as tell:
        return run_trials(run, extra=extra, seed=seed, progress=tell)


def _write_facts(
    run: "Run", table: str, outcomes: "Outcomes", neurons: Path | None, seed: int
) -> None:
    """What a table was made with."""
    from jaxneurons.qrnca.locating import versions
    from jaxneurons.qrnca.pcr import DRAWS, FACTORS
    from jaxneurons.storage.store import write_json

    write_json(
        run.path / f"{table}.json",
        {
            "site": run.settings.site,
            "changed_at": "last prompt position, and the answer's own but the last",
            "probability_of": "the whole answer, by teacher forcing",
            "methods": list(outcomes.sets),
            "neurons_file": None
            if neurons is None
            else {
                "path": str(neurons),
                "sha256": hashlib.sha256(neurons.read_bytes()).hexdigest(),
            },
            "factors": FACTORS,
            "seeds": {"unrelated queries, random neurons, bootstrap": seed},
            "bootstrap_draws": DRAWS,
            "seconds": round(outcomes.seconds, 3),
            "seconds_of_attribution": run.located.run["seconds"]["attribution"],
            "unrelated": outcomes.other,
            "versions": versions(),
        },
    )


def _opened(path: Path, model: str | None, ignore_keys: list[str] | None = None) -> "Run":
    from jaxneurons.plots.figures import check_places
    from jaxneurons.qrnca.run import ignored_keys_of, open_run, source_of

    check_places(path, "tables", "figures")
    source = source_of(path) if model is None else model
    keys = ignored_keys_of(path) if ignore_keys is None else ignore_keys
    return open_run(path, load_and_say(source, ignore_keys=keys))


def _write(run: "Run", tables: Mapping[str, Sequence[dict[str, Any]]]) -> None:
    from jaxneurons.qrnca.figures import draw
    from jaxneurons.storage.tables import write_table

    for name, rows in tables.items():
        if rows:
            write_table(run.path / "tables", name, rows)
    draw(
        {name: list(rows) for name, rows in tables.items()},
        run.path / "figures",
        source=run.name,
    )


def _say(run: Path) -> None:
    console.print(
        f"Written: {run / 'tables'} (CSV, Parquet) and {run / 'figures'} (PNG)", soft_wrap=True
    )
