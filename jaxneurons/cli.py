"""The command line: `jaxneurons demo`, `jaxneurons qrnca locate`."""

import dataclasses
import sys
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer
from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from jaxneurons.errors import ConfigError, JaxneuronsError, near_matches

if TYPE_CHECKING:
    from jaxneurons.demo import Demo
    from jaxneurons.load import LM
    from jaxneurons.locate import Located

app = typer.Typer(
    help="Which neurons of this LLM know that, and what happens if I change them?",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
qrnca_app = typer.Typer(
    help="Query-relevant neurons (QRNCA, arXiv 2406.10868).", no_args_is_help=True
)
app.add_typer(qrnca_app, name="qrnca")

console = Console(markup=False)
errors = Console(stderr=True, markup=False)

MODES = ("paper", "reference")
INTERRUPTED = 130  # exit code after Ctrl-C, which typer has turned into SystemExit


@app.callback(invoke_without_command=True)
def _top(
    version: Annotated[bool, typer.Option("--version", help="Print the version and stop.")] = False,
) -> None:
    if version:
        from importlib.metadata import version as of

        console.print(of("jaxneurons"))
        raise typer.Exit


@app.command()
def demo(
    model: Annotated[str, typer.Option(help="Model source: name, path or hub id.")] = (
        "smollm2-135m"
    ),
    out: Annotated[Path, typer.Option(help="Run directory to write.")] = Path("runs/demo"),
) -> None:
    """Locate the neurons of a few dozen facts, turn them off, and see what is lost."""
    lm = _load(model)
    from jaxneurons.demo import bundled_facts, run_demo

    facts = bundled_facts(per_group=6)
    console.print(f"Asking it {len(facts)} facts in 3 wordings each.")
    with _bar("Attributing") as tell:
        result = run_demo(lm, out, facts=facts, progress=tell)
    _show_demo(result, out)


@qrnca_app.command("locate")
def qrnca_locate(
    model: Annotated[str, typer.Option(help="Model source: name, path, .gguf file or hub id.")],
    queries: Annotated[Path, typer.Option(help="Query file: published JSON or cloze JSON Lines.")],
    out: Annotated[Path, typer.Option(help="Run directory; a stopped run is taken up again.")],
    limit: Annotated[int | None, typer.Option(min=1, help="Only the first so many queries.")] = (
        None
    ),
    steps: Annotated[int | None, typer.Option(min=1, help="Nodes of a fixed rule.")] = None,
    rule: Annotated[
        str | None,
        typer.Option(help="adaptive (converged), gauss, right (the paper's), reference."),
    ] = None,
    mode: Annotated[
        str, typer.Option(help="paper, or reference: what its public code computes.")
    ] = "paper",
    site: Annotated[str, typer.Option(help="Neurons: up, gate, act, down, q, k, v or o.")] = "up",
) -> None:
    """Find the neurons that the answer to each query depends on."""
    from jaxneurons import qrnca
    from jaxneurons.queries import read_queries

    if mode not in MODES:
        raise ConfigError(f"unknown mode {mode!r}; {near_matches(mode, MODES)}")
    settings = qrnca.QRNCAConfig() if mode == "paper" else qrnca.QRNCAConfig.reference()
    changes: dict[str, Any] = {"rule": rule, "steps": steps}
    changes = {key: value for key, value in changes.items() if value is not None}
    quadrature = dataclasses.replace(settings.quadrature, **changes)
    settings = dataclasses.replace(settings, quadrature=quadrature, site=site)
    asked = read_queries(queries)[:limit]
    qrnca.check_count(len(asked))

    lm = _load(model)
    from jaxneurons.locate import locate

    with _bar("Attributing") as tell:
        located = locate(lm, asked, out, settings=settings, progress=tell)
    _show_located(located, out)


def _load(source: str) -> "LM":
    from jaxneurons.load import load

    with errors.status(f"Loading {source} (fetched once, then cached) ..."):
        lm = load(source)
    config = lm.config
    console.print(
        f"{lm.source}: {config.num_layers} layers, {config.intermediate_size} neurons each, "
        f"{config.vocab_size} tokens."
    )
    return lm


class _bar:
    """A progress bar over prompts, on standard error."""

    def __init__(self, what: str):
        self._progress = Progress(
            TextColumn(what),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("prompts"),
            TimeRemainingColumn(),
            console=errors,
            disable=not errors.is_terminal,  # a log file needs no bar
        )

    def __enter__(self) -> Any:
        self._progress.start()
        task = self._progress.add_task("", total=None)

        def tell(done: int, total: int) -> None:
            self._progress.update(task, completed=done, total=total)

        return tell

    def __exit__(self, *_: object) -> None:
        self._progress.stop()


def _show_located(located: "Located", out: Path) -> None:
    run = located.run
    answers, exact, counts = run["answers"], run["completeness"], run["neurons_per_query"]
    table = Table(
        title=f"{run['queries']} queries, {run['prompts']} prompts",
        title_justify="left",
        box=box.SIMPLE_HEAD,
    )
    table.add_column("what")
    table.add_column("found", justify="right")
    rows = [
        (
            "neurons per query (mean, min, max)",
            f"{counts['mean']:.1f}  {counts['min']}  {counts['max']}",
        ),
        ("common neurons left out", f"{len(located.common)}"),
        ("answers right", f"{answers['accuracy']:.1%}"),
        ("answer probability, mean", f"{answers['probability_mean']:.4f}"),
    ]
    if answers["option_mass_mean"] is not None:
        rows.append(("probability of all options, mean", f"{answers['option_mass_mean']:.4f}"))
    rows += [
        (
            "completeness gap (median, largest)",
            f"{exact['gap_median']:.1e}  {exact['gap_max']:.1e} (layer {exact['gap_max_layer']})",
        ),
        ("quadrature nodes per prompt", f"{exact['nodes_mean']:.0f}"),
        (
            "seconds of attribution (per prompt)",
            f"{run['seconds']['attribution']:.1f} ({run['seconds']['per_prompt']:.2f})",
        ),
    ]
    for row in rows:
        table.add_row(*row)
    console.print(table)
    empty = sum(not found.neurons for found in located.neurons.values())
    if empty:
        console.print(f"{empty} queries have no neurons of their own: all of theirs are common.")
    console.print(f"Written: {out}/neurons.jsonl, common_neurons.json, run.json")


def _show_demo(result: "Demo", out: Path) -> None:
    if result.unknown:
        console.print(f"Not known in every wording, left out: {', '.join(result.unknown)}.")
    table = Table(
        title="The answer's probability, with neurons turned off at the last prompt position",
        title_justify="left",
        caption="lost: share of prompts whose answer is no longer the model's first choice",
        caption_justify="left",
        box=box.SIMPLE_HEAD,
    )
    table.add_column("facts")
    for name in ("n", "neurons", "before", "own off", "lost", "random off", "lost"):
        table.add_column(name, justify="right", no_wrap=True)
    for effect in result.effects:
        if effect.group == "all":
            table.add_section()
        table.add_row(
            effect.group,
            f"{effect.facts}",
            f"{effect.neurons:.1f}",
            f"{effect.before:.3f}",
            f"{effect.suppressed:.3f}",
            f"{effect.lost:.0%}",
            f"{effect.random:.3f} ± {effect.random_spread:.3f}",
            f"{effect.random_lost:.0%}",
        )
    console.print(table)
    exact, seconds = result.located.run["completeness"], result.located.run["seconds"]
    console.print(
        f"Attribution: {seconds['attribution']:.1f} s, {exact['nodes_mean']:.0f} nodes per prompt; "
        f"completeness gap {exact['gap_median']:.1e} median, {exact['gap_max']:.1e} largest."
    )
    console.print(f"Written: {out}/neurons.jsonl, effects.json, run.json and {result.figure}")


def _one_line(message: Warning | str, *_: Any, **__: Any) -> None:
    errors.print(f"warning: {message}", style="yellow", soft_wrap=True)


def main() -> None:
    """Run the command line: an error of the input is one line on standard error and exit code 1."""
    warnings.showwarning = _one_line
    try:
        app()
    except JaxneuronsError as error:
        _fail(str(error))
    except OSError as error:
        _fail(f"{error.filename or 'a file'}: {error.strerror or error}")
    except SystemExit as stop:
        if stop.code == INTERRUPTED:
            errors.print("stopped; what was finished is kept, the same command goes on from there")
        raise


def _fail(message: str) -> NoReturn:
    errors.print(f"error: {' '.join(message.split())}", soft_wrap=True, highlight=False)
    sys.exit(1)


if __name__ == "__main__":
    main()
