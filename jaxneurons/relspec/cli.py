"""The command line of relation-specific neurons: `relspec run` and each of its stages."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from jaxneurons.errors import DataError
from jaxneurons.terminal.console import console, load_and_say, show_comparison, show_study, stages
from jaxneurons.terminal.options import IgnoreKeys

if TYPE_CHECKING:
    from jaxneurons.relspec.study import Study

app = typer.Typer(help="Relation-specific neurons (arXiv 2502.17355).", no_args_is_help=True)

Out = Annotated[Path, typer.Option(help="Run directory; a stopped run is taken up again.")]
Model = Annotated[str, typer.Option(help="Model source: name, path, .gguf file or hub id.")]
Relations = Annotated[
    list[str],
    typer.Option(help="A directory of relation files, or 'bundled'; may be given several times."),
]
Analyses = Annotated[
    str, typer.Option(help="default, all, or a list with commas: see `relspec analyse --help`.")
]
CountsFile = Annotated[
    Path | None,
    typer.Option(help="CSV of relation, subject, object, count: for the analysis 'frequency'."),
]
K = Annotated[
    str, typer.Option("--k", help="Neurons of a relation: a number, or a share such as 0.36%.")
]
Templates = Annotated[
    str, typer.Option(help="Template sets, with commas: plain, zero-shot, answer, your own.")
]
Sites = Annotated[str, typer.Option(help="Neurons, with commas: up, gate, down, act, q, k, v, o.")]
Seeds = Annotated[int, typer.Option(min=1, help="Random sets of neurons to compare with.")]
Evaluation = Annotated[int, typer.Option(min=1, help="Facts held out of each relation.")]
Minimum = Annotated[int, typer.Option(min=1, help="Answered prompts that make a relation known.")]
Share = Annotated[
    float, typer.Option(min=0.0, max=1.0, help="The same as a share of the detection prompts.")
]
Detection = Annotated[
    int | None, typer.Option(min=1, help="Facts to detect with, at most; default: all others.")
]
Steps = Annotated[
    int | None,
    typer.Option(
        min=1,
        help="Tokens generated after a prompt; default: as many as its objects need. The paper: 2.",
    ),
]
Dtype = Annotated[str, typer.Option(help="Responses on disk: float32 or bfloat16.")]
Seed = Annotated[int, typer.Option(min=0, help="Of splits, negatives and random sets.")]


@app.command()
def run(
    model: Model,
    relations: Relations,
    out: Out,
    analyses: Analyses = "default",
    counts: CountsFile = None,
    k: K = "0.36%",
    templates: Templates = "plain",
    sites: Sites = "up,gate,down",
    seeds: Seeds = 10,
    evaluation: Evaluation = 50,
    minimum: Minimum = 10,
    minimum_share: Share = 0.1,
    detection: Detection = None,
    steps: Steps = None,
    dtype: Dtype = "float32",
    seed: Seed = 0,
    ignore_key: IgnoreKeys = None,
) -> None:
    """Every stage: ask, take responses, rank neurons, switch them off, measure, draw."""
    from jaxneurons.prompts.relations import read_counts
    from jaxneurons.relspec.stages import choose

    names = choose(analyses, counts=counts is not None)
    table = read_counts(counts) if counts else None
    settings = _settings(
        k,
        templates,
        sites,
        seeds=seeds,
        evaluation=evaluation,
        minimum=minimum,
        minimum_share=minimum_share,
        detection=detection,
        steps=steps,
        dtype=dtype,
        seed=seed,
    )
    with _study(out, model, relations, settings, ignore_key) as study:
        from jaxneurons.relspec.stages import analyse, collect, neurons, plot

        collect(study)
        neurons(study)
        analyse(study, names, counts=table)
    plot(out)
    show_study(out)


@app.command()
def collect(
    model: Model,
    relations: Relations,
    out: Out,
    k: K = "0.36%",
    templates: Templates = "plain",
    sites: Sites = "up,gate,down",
    seeds: Seeds = 10,
    evaluation: Evaluation = 50,
    minimum: Minimum = 10,
    minimum_share: Share = 0.1,
    detection: Detection = None,
    steps: Steps = None,
    dtype: Dtype = "float32",
    seed: Seed = 0,
    ignore_key: IgnoreKeys = None,
) -> None:
    """Stage 1: which prompts does the model answer, and how do its neurons respond to them?"""
    settings = _settings(
        k,
        templates,
        sites,
        seeds=seeds,
        evaluation=evaluation,
        minimum=minimum,
        minimum_share=minimum_share,
        detection=detection,
        steps=steps,
        dtype=dtype,
        seed=seed,
    )
    with _study(out, model, relations, settings, ignore_key) as study:
        from jaxneurons.relspec.stages import collect

        collect(study)
    show_study(out)


@app.command()
def neurons(out: Out) -> None:
    """Stage 2: average precision of every neuron, and the best of each relation as CSV."""
    with _study(out) as study:
        from jaxneurons.relspec.stages import neurons

        neurons(study)
        names = study.known
    console.print(f"Written: {out}/neurons/ ({len(names)} relations)")


@app.command()
def ablate(out: Out) -> None:
    """Stage 3: switch each relation's neurons off, ask all relations; random ones beside it."""
    _analyse(out, "ablation", None)


@app.command()
def analyse(out: Out, analyses: Analyses = "default", counts: CountsFile = None) -> None:
    """Stage 4: the analyses.

    ablation, layers, overlap, errors (the default); templates, perplexity, multilingual, concepts,
    sizes, cumulativity, types; frequency (with --counts).
    """
    _analyse(out, analyses, counts)


@app.command("plot")
def plot_command(out: Out) -> None:
    """Stage 5: the figures, from the tables alone."""
    from jaxneurons.plots.figures import check_places
    from jaxneurons.relspec.stages import plot

    check_places(out, "figures")
    made = plot(out)
    console.print(f"Written: {out}/figures/ ({', '.join(path.name for path in made)})")


@app.command("compare")
def compare_command(
    out: Annotated[Path, typer.Argument(help="A run directory.")],
    other: Annotated[Path, typer.Argument(help="Another one.")],
) -> None:
    """How many neurons do relations of one name share in two runs, in which wordings?"""
    from jaxneurons.relspec.stages import compare

    show_comparison(compare(out, other))


def _analyse(out: Path, analyses: str, counts: Path | None) -> None:
    from jaxneurons.prompts.relations import read_counts
    from jaxneurons.relspec.stages import choose, plot

    names = choose(analyses, counts=counts is not None)
    table = read_counts(counts) if counts else None
    with _study(out) as study:
        from jaxneurons.relspec.stages import analyse

        analyse(study, names, counts=table)
    plot(out)
    show_study(out)


@contextmanager
def _study(
    out: Path,
    model: str | None = None,
    relations: list[str] | None = None,
    settings: Any = None,
    ignore_keys: list[str] | None = None,
) -> Iterator["Study"]:
    """A study begun or gone on with; relations are checked before the model is loaded."""
    from jaxneurons.plots.figures import check_places
    from jaxneurons.relspec.stages import begin, gather, ignored_keys_of, resume
    from jaxneurons.relspec.study import Study, check_relations

    if model is None or relations is None:
        model, relations, settings = resume(out)
        ignore_keys = ignored_keys_of(out)
    found = gather(relations)
    check_relations(found, settings)
    check_places(out, "neurons", "tables", "figures")
    lm = load_and_say(model, ignore_keys=ignore_keys)
    with stages() as tell:
        study = Study(lm, found, out, settings=settings, tell=tell)
        begin(out, model, relations, settings, ignore_keys or ())
        yield study


def _settings(k: str, templates: str, sites: str, *, dtype: str, **others: Any) -> Any:
    from jaxneurons.engine.responses import DTYPES
    from jaxneurons.relspec.method import RelSpecConfig

    if dtype not in DTYPES:
        raise DataError(f"unknown response dtype {dtype!r}; known: {', '.join(DTYPES)}")
    return RelSpecConfig(
        k=_number(k), templates=_names(templates), sites=_names(sites), dtype=dtype, **others
    )


def _names(text: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.split(",") if name.strip())


def _number(k: str) -> int | float:
    text = k.strip()
    try:
        found: int | float
        if text.endswith("%"):
            found = float(text[:-1]) / 100
        else:
            found = int(text) if text.isdigit() else float(text)
    except ValueError:
        found = -1
    if not 0 < found < float("inf") or (isinstance(found, float) and found >= 1):
        raise DataError(f"--k {k!r}: give a number of neurons, or a share such as 0.36%")
    return found
