"""The command line of query-relevant neurons: `qrnca locate`, and everything after it.

Each command reads its options, calls the function of Python of its name, and shows the result.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from jaxneurons.errors import ConfigError, DataError, near_matches
from jaxneurons.qrnca.analyses import KINDS_LIMIT
from jaxneurons.qrnca.method import QRNCAConfig
from jaxneurons.terminal.console import console, counting, errors, load_and_say
from jaxneurons.terminal.options import IgnoreKeys, changed, names_of, on_mesh, settings_options
from jaxneurons.terminal.services import services

if TYPE_CHECKING:
    from jaxneurons.neurons.sets import NeuronSet
    from jaxneurons.qrnca.run import Run

app = typer.Typer(help="Query-relevant neurons (QRNCA, arXiv 2406.10868).", no_args_is_help=True)

MODES = ("paper", "reference")
FORMS = ("choice", "free")
Directory = Annotated[Path, typer.Option("--run", help="Run directory of `qrnca locate`.")]
Out = Annotated[
    Path | None, typer.Option(help="Directory to write results to; default: the run directory.")
]
Model = Annotated[
    str | None, typer.Option(help="Where the run's model is now; default: where it was.")
]
OwnNeurons = Annotated[
    Path | None,
    typer.Option(help="CSV of site, layer, index: neurons of your own, one more method."),
]
Seed = Annotated[int, typer.Option(min=0, help="Of unrelated queries, controls and resamples.")]


@app.command()
@on_mesh
@settings_options(QRNCAConfig, changes=True, parameter="changes")
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
    *,
    limit: Annotated[int | None, typer.Option(min=1, help="Only the first so many queries.")] = (
        None
    ),
    mode: Annotated[
        str, typer.Option(help="paper, or reference: what its public code computes.")
    ] = "paper",
    changes: dict[str, Any],
    batch_size: Annotated[
        int | None,
        typer.Option(min=1, help="Prompts per batch; default: what suits the platform."),
    ] = None,
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
    from jaxneurons.qrnca.method import check_count
    from jaxneurons.qrnca.views import show_located

    if mode not in MODES:
        raise ConfigError(f"unknown mode {mode!r}; {near_matches(mode, MODES)}")
    settings = QRNCAConfig() if mode == "paper" else QRNCAConfig.reference()
    settings = changed(settings, changes)
    chosen = bundled_queries(queries)[:limit]
    check_count(len(chosen), settings.common)

    lm = load_and_say(model, ignore_keys=ignore_key)
    from jaxneurons.qrnca.locating import locate as find

    with counting("Attributing") as progress:
        run = find(
            lm,
            chosen,
            settings=settings,
            out=out,
            batch_size=batch_size,
            cache_bytes=None if caches is None else int(min(caches, 2.0**30) * 2**30),
            progress=progress,
        )
    show_located(run, out)


@app.command("questions")
def make_questions(
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
    questions = read_questions(source)
    made: dict[str, Any] = {}
    left_out: dict[str, str] = {}
    records: list[dict[str, Any]] = []
    try:
        if form == "free":
            records = free_form(questions, wordings=wordings)
        else:
            made, left_out = multi_choice(questions, options=options, wordings=wordings, seed=seed)
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
@on_mesh
def evaluate(
    run: Directory,
    out: Out = None,
    model: Model = None,
    neurons: OwnNeurons = None,
    seed: Seed = 0,
    ignore_key: IgnoreKeys = None,
) -> None:
    """Boost and suppress each query's neurons, beside five baselines and matched random ones.

    Writes tables/evaluation, tables/changes and figures: the probability change ratio with
    intervals, how much of the attribution a set holds, and its effect beyond the control.
    """
    _check_own(neurons)
    place = out or run
    opened = _opened(run, place, model, ignore_key)
    from jaxneurons.qrnca import stages
    from jaxneurons.qrnca.views import show_evaluation

    with counting("Changing neurons") as progress:
        tables = stages.evaluate(opened, neurons=neurons, seed=seed, out=place, progress=progress)
    show_evaluation(tables.rows("evaluation"))
    console.print(
        f"Trials: {tables.facts['seconds']:.1f} s; attribution took "
        f"{tables.facts['seconds_of_attribution']:.1f} s where it was done."
    )
    _say_written(place)


@app.command()
@on_mesh
def edit(
    run: Directory,
    out: Out = None,
    model: Model = None,
    neurons: OwnNeurons = None,
    seed: Seed = 0,
    write: Annotated[
        Path | None,
        typer.Option(
            help="Write a patch instead: the neurons of some queries multiplied, for `edit apply`."
        ),
    ] = None,
    query: Annotated[
        list[str] | None,
        typer.Option(help="With --write: a query's id, may be repeated; default: all queries."),
    ] = None,
    factor: Annotated[
        float, typer.Option(help="With --write: what the neurons are multiplied by.")
    ] = 0.0,
    ignore_key: IgnoreKeys = None,
) -> None:
    """Which answers turn? Right ones when neurons are suppressed, wrong ones when boosted.

    Writes tables/editing and its figure; shares its passes with `evaluate`.
    """
    _check_own(neurons)
    if write is not None:
        from jaxneurons.storage.store import check_new_file

        check_new_file(write, *([] if neurons is None else [neurons]))
        opened = _opened(run, write.absolute().parent, model, ignore_key)
        members = _members(opened, neurons, query or [])
        facts = {
            "run": str(run),
            **({"neurons": str(neurons)} if neurons is not None else {}),
            **({"queries": query or "all"} if query or neurons is None else {}),
        }
        services().write_neurons(opened.lm, members, factor, write, facts=facts)
        return
    if query:
        raise ConfigError("--query chooses what --write writes; give --write PATCH too")
    place = out or run
    opened = _opened(run, place, model, ignore_key)
    from jaxneurons.qrnca import stages
    from jaxneurons.qrnca.views import show_editing

    with counting("Changing neurons") as progress:
        tables = stages.edit(opened, neurons=neurons, seed=seed, out=place, progress=progress)
    show_editing(tables.rows("editing"))
    _say_written(place)


def _check_own(neurons: Path | None) -> None:
    from jaxneurons.neurons.sets import read_neurons

    if neurons is not None and not len(read_neurons(neurons)):
        raise DataError(f"{neurons}: holds no neurons")


def _members(run: "Run", neurons: Path | None, queries: list[str]) -> "NeuronSet":
    """The neurons of some queries and of a file; of all queries where neither is given."""
    from jaxneurons.neurons.sets import NeuronSet, read_neurons

    for name in queries:
        if name not in run:
            raise DataError(f"{run.path}: has no query {name!r}; {near_matches(name, run)}")
    members = NeuronSet() if neurons is None else read_neurons(neurons)
    for name in queries or ([] if len(members) else list(run)):
        members |= run[name].neurons
    if not len(members):
        raise DataError(f"{run.path}: these queries have no neurons of their own")
    return members


@app.command()
@on_mesh
def predict(
    run: Directory,
    out: Out = None,
    model: Model = None,
    seed: Seed = 0,
    ignore_key: IgnoreKeys = None,
) -> None:
    """Answer each half of the queries from the neurons located in the other half alone.

    Writes tables/prediction and its figure. The protocol is that of `jaxneurons.qrnca.prediction`.
    """
    place = out or run
    opened = _opened(run, place, model, ignore_key)
    from jaxneurons.qrnca import stages
    from jaxneurons.qrnca.views import show_prediction

    with counting("Reading neurons") as progress:
        tables = stages.predict(opened, seed=seed, out=place, progress=progress)
    show_prediction(tables.rows("prediction"))
    _say_written(place)


@app.command()
@on_mesh
def analyse(
    run: Directory,
    out: Out = None,
    model: Model = None,
    kinds: Annotated[
        str, typer.Option(help="Kinds of neurons to compare, with commas: up,gate,act; or none.")
    ] = "none",
    kinds_limit: Annotated[int, typer.Option(min=4, help="Queries to compare kinds on.")] = (
        KINDS_LIMIT
    ),
    against: Annotated[
        Path | None,
        typer.Option(help="Another run: how far do the neurons of the same queries agree?"),
    ] = None,
    ignore_key: IgnoreKeys = None,
) -> None:
    """Counts, overlap, layers, map and words of the neurons; kinds of neurons and runs compared.

    Writes tables and figures; `kinds` locates again at each site, on some of the queries.
    """
    place = out or run
    opened = _opened(run, place, model, ignore_key)
    from jaxneurons.qrnca import stages

    names = () if kinds == "none" else names_of(kinds)
    with counting("Locating at each site") as progress:
        tables = stages.analyse(
            opened,
            kinds=names,
            kinds_limit=kinds_limit,
            against=against,
            out=place,
            progress=progress,
        )
    if "words" not in tables:
        errors.print("skipped: words (q, k and v write nothing to the residual stream)")
    _say_written(place)


def _opened(run: Path, out: Path, model: str | None, ignore_keys: list[str] | None) -> "Run":
    from jaxneurons.qrnca.opening import ignored_keys_of, open_run, source_of
    from jaxneurons.qrnca.stages import check_out

    source = source_of(run) if model is None else model
    check_out(out)
    keys = ignored_keys_of(run) if ignore_keys is None else ignore_keys
    return open_run(run, load_and_say(source, ignore_keys=keys))


def _say_written(out: Path) -> None:
    console.print(
        f"Written: {out / 'tables'} (CSV, Parquet) and {out / 'figures'} (PNG)", soft_wrap=True
    )
