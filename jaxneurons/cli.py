"""The command line: `jaxneurons demo`, `qrnca locate`, `convert`, `verify`, `inspect`."""

import dataclasses
import os
import sys
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer
from rich import box
from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from rich.table import Table

from jaxneurons.errors import ConfigError, JaxneuronsError, near_matches

if TYPE_CHECKING:
    from jaxneurons.demo import Demo
    from jaxneurons.describe import Description
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
DTYPES = ("float32", "bfloat16", "float16")
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


@app.command("convert")
def convert_command(
    source: Annotated[str, typer.Argument(help="Anything that load() takes.")],
    destination: Annotated[Path, typer.Argument(help="Directory to write; must not exist.")],
    to: Annotated[str, typer.Option(help="native (Orbax) or hf (safetensors).")] = "native",
    dtype: Annotated[
        str | None, typer.Option(help="float32, bfloat16 or float16; default: as stored.")
    ] = None,
) -> None:
    """Convert a checkpoint; nothing appears under DESTINATION before it is whole."""
    from jaxneurons.save import FORMATS, check_free, save

    if to not in FORMATS:
        raise ConfigError(f"unknown format {to!r}; {near_matches(to, FORMATS)}")
    if dtype not in (None, *DTYPES):
        raise ConfigError(f"unknown dtype {dtype!r}; {near_matches(str(dtype), DTYPES)}")
    check_free(destination)
    from jaxneurons.load import load

    with _bytes_bar("Reading") as tell:
        lm = load(source, dtype=dtype, progress=tell)
    with _bytes_bar("Writing") as tell:
        save(lm, destination, to=to, progress=tell)  # type: ignore[arg-type]
    size = sum(path.stat().st_size for path in destination.rglob("*") if path.is_file())
    own = lm.params["embed"]["embedding"].dtype.name
    console.print(f"Written: {destination} ({to}, {own}, {_gib(size)}), from {lm.source}")


@app.command("verify")
def verify_command(
    directory: Annotated[Path, typer.Argument(help="A converted model.")],
    against: Annotated[str, typer.Option(help="The checkpoint it came from.")],
    dtype: Annotated[
        str | None, typer.Option(help="Load the converted model so; default: as stored.")
    ] = None,
) -> None:
    """Compare a converted model with PyTorch transformers; writes certificate.json beside it."""
    from jaxneurons.certificate import CERTIFICATE, verify
    from jaxneurons.load import load, locate_source
    from jaxneurons.store import write_json

    if dtype not in (None, *DTYPES):
        raise ConfigError(f"unknown dtype {dtype!r}; {near_matches(str(dtype), DTYPES)}")
    reference, _ = locate_source(against)
    with errors.status(f"Loading {directory} ..."):
        lm = load(directory, dtype=dtype)
    with _bar("Comparing", "comparisons") as tell:
        found = verify(lm, reference, progress=tell)
    where = directory / CERTIFICATE if directory.is_dir() else directory.with_suffix(".json")
    write_json(where, found)
    _show_certificate(found)
    console.print(f"Written: {where}")
    if not found["passed"]:
        _fail(
            f"{directory} is not what PyTorch makes of {against}: logits differ by "
            f"up to {found['logits_worst']['largest']:.1e} standard deviations, "
            f"{found['continuations_equal']} continuations are equal"
        )


@app.command("inspect")
def inspect_command(
    source: Annotated[str, typer.Argument(help="Anything that load() takes.")],
) -> None:
    """Family, shapes, neurons, memory and tokenizer of a checkpoint, without loading it."""
    from jaxneurons.describe import describe

    _show_description(describe(source))


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


class _bytes_bar:
    """A progress bar over bytes, on standard error."""

    def __init__(self, what: str):
        self._progress = Progress(
            TextColumn(what),
            BarColumn(),
            DownloadColumn(binary_units=True),
            TransferSpeedColumn(),
            console=errors,
            disable=not errors.is_terminal,
        )

    def __enter__(self) -> Any:
        self._progress.start()
        task = self._progress.add_task("", total=None)
        return lambda count: self._progress.update(task, advance=count)

    def __exit__(self, *_: object) -> None:
        self._progress.stop()


def _gib(count: int) -> str:
    return f"{count / 2**30:.2f} GiB" if count >= 2**28 else f"{count / 2**20:.1f} MiB"


def _show_certificate(found: dict[str, Any]) -> None:
    table = Table(
        title="Largest difference from PyTorch, in standard deviations (FFN sites: worst layer)",
        title_justify="left",
        box=box.SIMPLE_HEAD,
    )
    for name in ("sequence", "logits", "gate", "up", "act", "down"):
        table.add_column(name, justify="left" if name == "sequence" else "right")
    for result in found["sequences"]:
        sites = (f"{result[site]['relative']:.1e}" for site in ("gate", "up", "act", "down"))
        table.add_row(result["sequence"], f"{result['logits']['relative']:.1e}", *sites)
    console.print(table)
    console.print(
        f"Greedy continuations equal: {found['continuations_equal']}. "
        f"{'Passed' if found['passed'] else 'FAILED'} ({found['dtype']} weights; logits may differ "
        f"by {found['tolerance']['largest']:g}, and by {found['tolerance']['mean']:g} on average)."
    )
    own = [r["own_arithmetic"]["mean"] for r in found["sequences"] if "own_arithmetic" in r]
    if own:
        console.print(
            f"Computed in {found['dtype']} itself, logits differ by {max(own):.1e} on average."
        )


def _show_description(found: "Description") -> None:
    config, rope = found.config, found.config.rope
    window = f"{config.sliding_window} positions" if config.sliding_window else "none"
    if config.sliding_layers:
        window += f", {sum(config.sliding_layers)} of {config.num_layers} layers"
    kind = rope.rope_type + (f" x {rope.factor:g}" if rope.factor != 1 else "")
    tokens = found.tokenizer
    table = Table(box=None, show_header=False, title=found.source, title_justify="left")
    rows = [
        ("family", f"{config.family}, {found.kind}"),
        ("layers", f"{config.num_layers}"),
        ("hidden size", f"{config.hidden_size}"),
        (
            "attention",
            f"{config.num_heads} heads of {config.head_dim}, {config.num_kv_heads} key/value heads",
        ),
        ("sliding window", window),
        ("rotary embedding", f"{kind}, theta {rope.theta:g}"),
        ("context", f"{config.max_position} tokens"),
        ("biases", ", ".join(config.biases) or "none"),
        ("unembedding", "tied to the embedding" if config.tied else "its own"),
        ("parameters", f"{found.parameters:,}"),
        (
            "neurons per layer",
            ", ".join(f"{site} {width:,}" for site, width in found.neurons.items()),
        ),
        ("FFN neurons", f"{config.num_layers * config.intermediate_size:,}"),
        (
            "on disk",
            ", ".join(f"{name} {_gib(size)}" for name, size in found.stored.items()) or "not here",
        ),
        ("in memory", ", ".join(f"{name} {_gib(size)}" for name, size in found.memory.items())),
        (
            "tokenizer",
            f"{tokens['tokens']:,} tokens, BOS {tokens['bos']!r} "
            f"({'put first' if tokens['bos put first'] else 'not put first'}), "
            f"EOS {tokens['eos']!r}, {'a' if tokens['chat template'] else 'no'} chat template",
        ),
    ]
    for row in rows:
        table.add_row(*row)
    console.print(table)


class _bar:
    """A progress bar over things that are counted, on standard error."""

    def __init__(self, what: str, unit: str = "prompts"):
        self._progress = Progress(
            TextColumn(what),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn(unit),
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
    # transformers would tell everyone that PyTorch is missing; nothing here needs it.
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
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
