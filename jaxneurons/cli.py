"""The command line: `demo`, `qrnca`, `relspec`, `edit`, `plan`, `convert`, `verify`, `inspect`."""

import contextlib
import os
import sys
import warnings
from collections.abc import Sequence
from contextvars import ContextVar
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

from jaxneurons.edit import cli as edit_cli
from jaxneurons.edit.patch_cli import write_neurons
from jaxneurons.errors import ConfigError, JaxneuronsError, near_matches
from jaxneurons.processes.joining import TIMEOUT, join
from jaxneurons.processes.sharing import ToMerge
from jaxneurons.processes.team import current
from jaxneurons.qrnca import cli as qrnca_cli
from jaxneurons.relspec import cli as relspec_cli
from jaxneurons.scale import cli as scale_cli
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
app.command()(scale_cli.plan)

DTYPES = ("float32", "bfloat16", "float16")
_JOB: ContextVar[contextlib.ExitStack] = ContextVar("job")
"""What lasts as long as a command: the processes that it works with, if there are others."""
INTERRUPTED = 130  # exit code after Ctrl-C, which typer has turned into SystemExit


@app.callback(invoke_without_command=True)
def _top(
    version: Annotated[bool, typer.Option("--version", help="Print the version and stop.")] = False,
    distributed: Annotated[
        bool,
        typer.Option(
            "--distributed",
            help="Share the work with the other processes of a job: start the same command in "
            "each. SLURM, TPU pods and Open MPI are known; else give the next three.",
        ),
    ] = False,
    coordinator: Annotated[
        str | None, typer.Option(metavar="HOST:PORT", help="Where process 0 can be reached.")
    ] = None,
    processes: Annotated[int | None, typer.Option(help="How many there are.")] = None,
    process: Annotated[int | None, typer.Option(help="Number of this one, from 0.")] = None,
    timeout: Annotated[float, typer.Option(help="Seconds in which all must have joined.")] = (
        TIMEOUT
    ),
    local_disks: Annotated[
        bool,
        typer.Option(
            "--local-disks",
            help="Each process writes to a disk of its own; `merge` joins what they wrote.",
        ),
    ] = False,
) -> None:
    if version:
        from importlib.metadata import version as of

        console.print(of("jaxneurons"))
        raise typer.Exit
    provide(Services(write_neurons=write_neurons))
    if distributed:
        team = _JOB.get().enter_context(
            join(
                coordinator,
                processes=processes,
                process=process,
                timeout=timeout,
                local_disks=local_disks,
                settings=_options_of(sys.argv[1:]),
            )
        )
        console.quiet = not team.first
    elif local_disks or (coordinator, processes, process) != (None, None, None):
        raise ConfigError("several processes: give --distributed too")


def _options_of(words: Sequence[str]) -> dict[str, list[str]]:
    """The options of a command line by name, as far as they must be the same in all processes.

    What may be a path is left out: a host may have a copy of its own. Results depend on contents.
    """
    given: dict[str, list[str]] = {}
    name = "the command"
    for word in words:
        if word.startswith("--"):
            name, _, word = word.partition("=")
            given.setdefault(name, [])
        if word and os.sep not in word:
            given.setdefault(name, []).append(word)
    return {
        name: values
        for name, values in given.items()
        if name not in ("--coordinator", "--process", "--timeout")
    }


@app.command()
@on_mesh
def demo(
    model: Annotated[
        str,
        typer.Option(
            help="Model source: lab (ships with the package), smollm2-135m (98 MB, fetched once), "
            "gemma3-270m (253 MB, fetched once), path or hub id."
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


@app.command("merge")
def merge_command(
    directories: Annotated[
        list[Path], typer.Argument(help="Run directories that processes wrote to disks of theirs.")
    ],
    out: Annotated[Path, typer.Option(help="Run directory to write; it may have parts already.")],
) -> None:
    """Join parts of one run from several directories; then its command goes on with all of them."""
    from jaxneurons.processes.merging import merge_runs
    from jaxneurons.storage.printable import counted

    added = merge_runs(directories, out)
    console.print(f"Written: {out} ({counted(added, 'part')} added)", soft_wrap=True)


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
    if current().first:
        errors.print(f"warning: {message}", style="yellow", soft_wrap=True)


def main() -> None:
    """Run the command line: an error of the input is one line on standard error and exit code 1."""
    warnings.showwarning = _one_line
    # transformers would tell everyone that PyTorch is missing; nothing here needs it.
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    lenient_streams()
    until_stopped(_command, errors.print)


def _command() -> None:
    with contextlib.ExitStack() as job:
        _JOB.set(job)
        _run()


def _run() -> None:
    try:
        os.getcwd()
    except OSError:
        _fail("the current directory is no longer there; change to another one")
    try:
        app()
        sys.stdout.flush()
    except ToMerge as note:
        errors.print(str(note), soft_wrap=True, highlight=False)
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
    text = " ".join(message.split())
    errors.print(f"error: {text}", soft_wrap=True, highlight=False)
    current().fail(text)
    sys.exit(1)


if __name__ == "__main__":
    main()
