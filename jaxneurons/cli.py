"""The command line: `demo`, `qrnca`, `relspec`, `edit`, `convert`, `verify`, `inspect`."""

import os
import sys
import warnings
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

from jaxneurons.edit import cli as edit_cli
from jaxneurons.edit.patch_cli import write_neurons
from jaxneurons.errors import ConfigError, JaxneuronsError, near_matches
from jaxneurons.qrnca import cli as qrnca_cli
from jaxneurons.relspec import cli as relspec_cli
from jaxneurons.terminal.checkpoint_views import show_certificate, show_description
from jaxneurons.terminal.console import (
    console,
    counting,
    counting_bytes,
    errors,
    gib,
    load_and_say,
)
from jaxneurons.terminal.options import IgnoreKeys, on_mesh, placement
from jaxneurons.terminal.services import Services, provide
from jaxneurons.terminal.stopping import is_broken_pipe, lenient_streams, too_much, until_stopped

app = typer.Typer(
    help="Which neurons of this LLM know that, and what happens if I change them?",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
app.add_typer(qrnca_cli.app, name="qrnca")
app.add_typer(relspec_cli.app, name="relspec")
app.add_typer(edit_cli.app, name="edit")

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
    provide(Services(write_neurons=write_neurons))


@app.command()
@on_mesh
def demo(
    model: Annotated[
        str,
        typer.Option(
            help="Model source: lab (ships with the package), smollm2-135m (98 MB, fetched once), "
            "path or hub id."
        ),
    ] = "lab",
    out: Annotated[Path, typer.Option(help="Run directory to write.")] = Path("runs/demo"),
    ignore_key: IgnoreKeys = None,
) -> None:
    """Locate the neurons of a few dozen facts, turn them off, and see what is lost."""
    lm = load_and_say(model, ignore_keys=ignore_key)
    from jaxneurons.qrnca.demonstration import demo as locate_and_suppress
    from jaxneurons.qrnca.demonstration import demo_facts
    from jaxneurons.qrnca.views import show_demo

    facts = demo_facts(lm.source)
    console.print(f"Asking it {len(facts)} facts in 3 wordings each.")
    with counting("Attributing") as progress:
        result = locate_and_suppress(lm, out=out, facts=facts, progress=progress)
    show_demo(result, out)


@app.command("convert")
@on_mesh
def convert_command(
    source: Annotated[str, typer.Argument(help="Anything that load() takes.")],
    destination: Annotated[Path, typer.Argument(help="Directory to write; must not exist.")],
    to: Annotated[str, typer.Option(help="native (Orbax) or hf (safetensors).")] = "native",
    dtype: Annotated[
        str | None, typer.Option(help="float32, bfloat16 or float16; default: as stored.")
    ] = None,
    ignore_key: IgnoreKeys = None,
) -> None:
    """Convert a checkpoint; nothing appears under DESTINATION before it is whole."""
    from jaxneurons.checkpoints.saving import check_format, check_free, save

    format_ = check_format(to)
    _check_dtype(dtype)
    check_free(destination)
    from jaxneurons.checkpoints.loading import load

    with counting_bytes("Reading") as progress:
        lm = load(
            source, dtype=dtype, progress=progress, ignore_keys=ignore_key or (), **placement()
        )
    with counting_bytes("Writing") as progress:
        save(lm, destination, to=format_, progress=progress)
    size = sum(path.stat().st_size for path in destination.rglob("*") if path.is_file())
    console.print(f"Written: {destination} ({to}, {lm.dtype}, {gib(size)}), from {lm.source}")


@app.command("verify")
@on_mesh
def verify_command(
    directory: Annotated[Path, typer.Argument(help="A converted model.")],
    against: Annotated[str, typer.Option(help="The checkpoint it came from.")],
    dtype: Annotated[
        str | None, typer.Option(help="Load the converted model so; default: as stored.")
    ] = None,
    long: Annotated[
        int | None,
        typer.Option(
            min=1, help="Tokens of the long sequence; default: past the original context."
        ),
    ] = None,
    ignore_key: IgnoreKeys = None,
) -> None:
    """Compare a converted model with PyTorch transformers; writes certificate.json beside it."""
    from jaxneurons.checkpoints.certificate import CERTIFICATE, verify
    from jaxneurons.checkpoints.fetch import locate_source
    from jaxneurons.checkpoints.loading import load
    from jaxneurons.storage.store import null_for_nan, write_json

    _check_dtype(dtype)
    reference, _ = locate_source(against)
    with errors.busy(f"Loading {directory} ..."):
        lm = load(directory, dtype=dtype, ignore_keys=ignore_key or (), **placement())
    with counting("Comparing", "comparisons") as progress:
        certificate = verify(lm, reference, long=long, progress=progress)
    where = directory / CERTIFICATE if directory.is_dir() else directory.with_suffix(".json")
    write_json(where, null_for_nan(certificate))
    show_certificate(certificate)
    console.print(f"Written: {where}")
    if not certificate["passed"]:
        differ = len(certificate["weights"]["differ"])
        _fail(
            f"{directory} is not what PyTorch makes of {against}: logits differ by "
            f"up to {certificate['logits_worst']['largest']:.1e} standard deviations, "
            f"{certificate['continuations_equal']} continuations are equal, "
            f"{differ} of {certificate['weights']['tensors']} tensors differ"
        )


@app.command("inspect")
def inspect_command(
    source: Annotated[str, typer.Argument(help="Anything that load() takes.")],
    ignore_key: IgnoreKeys = None,
) -> None:
    """Family, shapes, neurons, memory and tokenizer of a checkpoint, without loading it."""
    from jaxneurons.checkpoints.description import describe

    show_description(describe(source, ignore_keys=ignore_key or ()))


def _check_dtype(dtype: str | None) -> None:
    if dtype not in (None, *DTYPES):
        raise ConfigError(f"unknown dtype {dtype!r}; {near_matches(str(dtype), DTYPES)}")


def _one_line(message: Warning | str, *_: Any, **__: Any) -> None:
    errors.print(f"warning: {message}", style="yellow", soft_wrap=True)


def main() -> None:
    """Run the command line: an error of the input is one line on standard error and exit code 1."""
    warnings.showwarning = _one_line
    # transformers would tell everyone that PyTorch is missing; nothing here needs it.
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    lenient_streams()
    until_stopped(_command, errors.print)


def _command() -> None:
    try:
        os.getcwd()
    except OSError:
        _fail("the current directory is no longer there; change to another one")
    try:
        app()
        sys.stdout.flush()
    except JaxneuronsError as error:
        _fail(str(error))
    except OSError as error:
        if is_broken_pipe(error):
            raise
        _fail(f"{error.filename or 'the output'}: {error.strerror or error}")
    except (MemoryError, OverflowError, RuntimeError) as error:
        reason = too_much(error)
        if reason is None:
            raise
        _fail(reason)
    except SystemExit as stop:
        if stop.code == INTERRUPTED:
            raise KeyboardInterrupt from None
        raise


def _fail(message: str) -> NoReturn:
    errors.print(f"error: {' '.join(message.split())}", soft_wrap=True, highlight=False)
    sys.exit(1)


if __name__ == "__main__":
    main()
