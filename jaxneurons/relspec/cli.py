"""The command line of relation-specific neurons: `relspec run` and each of its stages."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from jaxneurons.errors import ConfigError, DataError, near_matches
from jaxneurons.relspec.method import RelSpecConfig
from jaxneurons.relspec.views import show_comparison, show_study
from jaxneurons.terminal.console import console, load_and_say, stages
from jaxneurons.terminal.options import IgnoreKeys, Text, on_mesh, settings_options
from jaxneurons.terminal.services import services

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


def _parse_k(text: str) -> int | float:
    """A number of neurons, or a share such as 0.36%."""
    k = text.strip()
    value: int | float
    try:
        share = k.endswith("%")
        value = float(k[:-1]) / 100 if share else int(k) if k.isdigit() else float(k)
    except ValueError:
        value = -1
    if not 0 < value < float("inf") or (isinstance(value, float) and value >= 1):
        raise DataError(f"--k {text!r}: give a number of neurons, or a share such as 0.36%")
    return value


def _show_k(k: int | float) -> str:
    return f"{100 * k:g}%" if isinstance(k, float) else str(k)


with_settings = settings_options(RelSpecConfig, texts={"k": Text(_parse_k, _show_k)})


@app.command()
@on_mesh
@with_settings
def run(
    model: Model,
    relations: Relations,
    out: Out,
    *,
    analyses: Analyses = "default",
    counts: CountsFile = None,
    settings: RelSpecConfig,
    ignore_key: IgnoreKeys = None,
) -> None:
    """Every stage: ask, take responses, rank neurons, switch them off, measure, draw."""
    names, of_facts = _chosen(analyses, counts)
    with _begun(out, model, relations, settings, ignore_key) as study:
        study.collect()
        study.write_neurons()
        study.analyse(names, counts=of_facts)
    _draw(out)
    show_study(out)


@app.command()
@on_mesh
@with_settings
def collect(
    model: Model,
    relations: Relations,
    out: Out,
    *,
    settings: RelSpecConfig,
    ignore_key: IgnoreKeys = None,
) -> None:
    """Stage 1: which prompts does the model answer, and how do its neurons respond to them?"""
    with _begun(out, model, relations, settings, ignore_key) as study:
        study.collect()
    show_study(out)


@app.command()
@on_mesh
def neurons(
    out: Out,
    write: Annotated[
        Path | None,
        typer.Option(help="Write a patch too: a relation's neurons multiplied, for `edit apply`."),
    ] = None,
    relation: Annotated[
        list[str] | None,
        typer.Option(help="With --write: a relation's name, may be repeated; default: all."),
    ] = None,
    factor: Annotated[
        float, typer.Option(help="With --write: what the neurons are multiplied by.")
    ] = 0.0,
) -> None:
    """Stage 2: average precision of every neuron, and the best of each relation as CSV."""
    from jaxneurons.neurons.sets import NeuronSet
    from jaxneurons.storage.printable import counted
    from jaxneurons.storage.store import check_new_file

    if write is not None:
        check_new_file(write)
    elif relation:
        raise ConfigError("--relation chooses what --write writes; give --write PATCH too")
    with _resumed(out) as study:
        sets = study.neurons()
        for name in relation or ():
            if name not in sets:
                raise DataError(f"{out}: has no neurons of {name!r}; {near_matches(name, sets)}")
        written = study.write_neurons()
    console.print(f"Written: {out}/neurons/ ({counted(len(written), 'relation')})")
    if write is None:
        return
    members = NeuronSet()
    for name in relation or sets:
        members |= sets[name]
    facts = {"run": str(out), "relations": relation or "all"}
    services().write_neurons(study.lm, members, factor, write, facts=facts)


@app.command()
@on_mesh
def ablate(out: Out) -> None:
    """Stage 3: switch each relation's neurons off, ask all relations; random ones beside it."""
    _analyse(out, "ablation", None)


@app.command()
@on_mesh
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

    check_places(out, "figures")
    written = _draw(out)
    console.print(f"Written: {out}/figures/ ({', '.join(path.name for path in written)})")


@app.command("compare")
def compare_command(
    out: Annotated[Path, typer.Argument(help="A run directory.")],
    other: Annotated[Path, typer.Argument(help="Another one.")],
) -> None:
    """How many neurons do relations of one name share in two runs, in which wordings?"""
    from jaxneurons.relspec.stages import compare

    show_comparison(compare(out, other).to_pylist())


def _analyse(out: Path, analyses: str, counts: Path | None) -> None:
    names, of_facts = _chosen(analyses, counts)
    with _resumed(out) as study:
        study.analyse(names, counts=of_facts)
    _draw(out)
    show_study(out)


def _chosen(
    analyses: str, counts: Path | None
) -> tuple[tuple[str, ...], Mapping[tuple[str, Any], float] | None]:
    """Names of analyses and counts of facts, checked before anything is loaded."""
    from jaxneurons.prompts.relations import read_counts
    from jaxneurons.relspec.registry import choose

    names = choose(analyses, counts=counts is not None)
    return names, read_counts(counts) if counts else None


def _draw(out: Path) -> list[Path]:
    from jaxneurons.relspec.stages import plot

    return plot(out)


@contextmanager
def _resumed(out: Path) -> Iterator["Study"]:
    """A study that goes on as it was begun."""
    from jaxneurons.relspec.stages import ignored_keys_of, resume

    model, relations, settings = resume(out)
    with _begun(out, model, relations, settings, ignored_keys_of(out)) as study:
        yield study


@contextmanager
def _begun(
    out: Path,
    model: str,
    sources: list[str],
    settings: RelSpecConfig,
    ignore_keys: list[str] | None,
) -> Iterator["Study"]:
    """A study in a directory; relations are checked before the model is loaded."""
    from jaxneurons.plots.figures import check_places
    from jaxneurons.relspec.collection import check_relations
    from jaxneurons.relspec.stages import begin, gather
    from jaxneurons.relspec.study import Study

    relations = gather(sources)
    check_relations(relations, settings)
    check_places(out, "neurons", "tables", "figures")
    lm = load_and_say(model, ignore_keys=ignore_keys)
    with stages() as progress:
        study = Study(lm, relations, settings=settings, out=out, progress=progress)
        begin(out, model, sources, settings, ignore_keys or ())
        yield study
