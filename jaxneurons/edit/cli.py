"""The command line of editing facts: a method and a file of requests in, a patch out.

Each command reads its options, calls the function of Python of its name, and shows the result.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from jaxneurons.edit import evaluation_cli, patch_cli
from jaxneurons.edit.method import (
    MEMIT,
    ROME,
    AlphaEdit,
    FineTune,
    KnowledgeNeurons,
    LearnedNeurons,
    Settings,
)
from jaxneurons.errors import DataError
from jaxneurons.terminal.console import console, counting, errors, load_and_say
from jaxneurons.terminal.options import IgnoreKeys, Text, settings_options

if TYPE_CHECKING:
    from jaxneurons.checkpoints.loading import LM
    from jaxneurons.edit.covariance import Covariance
    from jaxneurons.edit.requests import EditRequest

app = typer.Typer(
    help="Edit facts and neurons by transformation of parameters; edits are patches.",
    no_args_is_help=True,
)

Model = Annotated[str, typer.Option(help="Model source: name, path, .gguf file or hub id.")]
Requests = Annotated[
    str,
    typer.Option(
        help="Requests: counterfact-edit, CounterFact, zsRE, JSON Lines or CSV; or 'lab', facts of "
        "the lab model's world."
    ),
]
Limit = Annotated[int | None, typer.Option(min=1, help="Only the first so many requests.")]
PatchFile = Annotated[Path, typer.Option(help="Patch to write: safetensors.")]
TextFile = Annotated[
    Path | None,
    typer.Option(
        help="Text for the covariance of keys, paragraphs with empty lines between; default: "
        "neutral text that ships with the package."
    ),
]
Vectors = Annotated[
    int | None,
    typer.Option(min=1, help="Keys for the covariance; default: 4 for each neuron of a layer."),
]
Statistics = Annotated[
    Path | None,
    typer.Option(help="Directory to keep covariances in; a stopped run is taken up again."),
]
NeuronsFile = Annotated[
    Path | None,
    typer.Option(
        help="CSV of site, layer, index: the neurons; default: for each request, those that its "
        "old answer depends on most."
    ),
]


def numbers(text: str) -> tuple[int, ...]:
    """Whole numbers with commas between them, or a range: 3,4,5 or 3-5."""
    try:
        parts = [part.strip().split("-") for part in text.split(",") if part.strip()]
        spans = [(int(part[0]), int(part[-1])) for part in parts]
    except ValueError:
        raise DataError(f"{text!r}: give whole numbers, as in 3,4,5 or 3-5") from None
    return tuple(number for first, last in spans for number in range(first, last + 1))


NUMBERS = Text(numbers, lambda numbers: ",".join(map(str, numbers)))


@app.command()
@settings_options(ROME, texts={"prefix_tokens": NUMBERS})
def rome(
    model: Model,
    requests: Requests,
    out: PatchFile,
    *,
    limit: Limit = None,
    text: TextFile = None,
    vectors: Vectors = None,
    statistics: Statistics = None,
    settings: Settings,
    ignore_key: IgnoreKeys = None,
) -> None:
    """Edit facts by rank-one terms in one layer, one after the other (ROME, arXiv 2202.05262)."""
    lm, chosen = _prepared(model, requests, limit, out, ignore_key)
    _edit(lm, chosen, settings, out, _covariance(lm, settings, text, vectors, statistics))


@app.command()
@settings_options(MEMIT, texts={"prefix_tokens": NUMBERS, "layers": NUMBERS})
def memit(
    model: Model,
    requests: Requests,
    out: PatchFile,
    *,
    limit: Limit = None,
    text: TextFile = None,
    vectors: Vectors = None,
    statistics: Statistics = None,
    settings: Settings,
    ignore_key: IgnoreKeys = None,
) -> None:
    """Edit many facts together, spread over layers (MEMIT, arXiv 2210.07229)."""
    lm, chosen = _prepared(model, requests, limit, out, ignore_key)
    _edit(lm, chosen, settings, out, _covariance(lm, settings, text, vectors, statistics))


@app.command()
@settings_options(AlphaEdit, texts={"prefix_tokens": NUMBERS, "layers": NUMBERS})
def alphaedit(
    model: Model,
    requests: Requests,
    out: PatchFile,
    *,
    limit: Limit = None,
    text: TextFile = None,
    vectors: Vectors = None,
    statistics: Statistics = None,
    settings: Settings,
    ignore_key: IgnoreKeys = None,
) -> None:
    """Edit many facts in the null space of the keys of text (AlphaEdit, arXiv 2410.02355)."""
    lm, chosen = _prepared(model, requests, limit, out, ignore_key)
    _edit(lm, chosen, settings, out, _covariance(lm, settings, text, vectors, statistics))


@app.command()
@settings_options(FineTune)
def finetune(
    model: Model,
    requests: Requests,
    out: PatchFile,
    *,
    limit: Limit = None,
    settings: Settings,
    ignore_key: IgnoreKeys = None,
) -> None:
    """Edit facts by fine-tuning one layer's down kernel; --norm bounds every entry's change."""
    lm, chosen = _prepared(model, requests, limit, out, ignore_key)
    _edit(lm, chosen, settings, out)


def _of_neurons(settings: type, *, name: str, help: str) -> None:
    """A command of a method that changes located neurons."""
    import dataclasses

    fields = [field.name for field in dataclasses.fields(settings) if field.name != "neurons"]
    texts = {"others": Text(_lines, "|".join)} if "others" in fields else {}

    @app.command(name, help=help)
    @settings_options(settings, only=fields, texts=texts, changes=True, parameter="changes")
    def command(
        model: Model,
        requests: Requests,
        out: PatchFile,
        *,
        neurons: NeuronsFile = None,
        limit: Limit = None,
        changes: dict[str, Any],
        ignore_key: IgnoreKeys = None,
    ) -> None:
        from jaxneurons.neurons.sets import read_neurons

        located: Any = None if neurons is None else read_neurons(neurons)
        if located is not None and not len(located):
            raise DataError(f"{neurons}: holds no neurons")
        lm, chosen = _prepared(model, requests, limit, out, ignore_key)
        if located is None:
            from jaxneurons.edit.located import locate_neurons

            with counting("Locating neurons", "requests") as progress:
                located = locate_neurons(lm, chosen, progress=progress)
        of_method = settings(neurons=located, **changes)
        _edit(lm, chosen, of_method, out)


def _lines(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split("|") if part.strip())


_of_neurons(
    LearnedNeurons,
    name="learn",
    help="Edit facts by learning multipliers or output rows of located neurons, and of no others.",
)
_of_neurons(
    KnowledgeNeurons,
    name="surgery",
    help="Edit facts by putting answers' embeddings into located neurons' output rows "
    "(arXiv 2104.08696).",
)


def read(requests: str, limit: int | None = None) -> list["EditRequest"]:
    """The requests of a file, or of the lab's world; oddities among them are shown."""
    from jaxneurons.edit.request_files import read_requests
    from jaxneurons.edit.requests import check_requests

    if requests == "lab":
        from jaxneurons.edit.lab_requests import lab_requests

        chosen = lab_requests(limit)
    else:
        chosen = read_requests(requests, limit=limit)
    for remark in check_requests(chosen):
        errors.print(f"warning: {remark}", style="yellow", soft_wrap=True)
    return chosen


def _prepared(
    model: str, requests: str, limit: int | None, out: Path, ignore_keys: list[str] | None
) -> tuple["LM", list["EditRequest"]]:
    from jaxneurons.storage.store import check_not_input, check_writable

    check_not_input(out, Path(requests))
    check_writable(out.absolute().parent)
    chosen = read(requests, limit)
    return load_and_say(model, ignore_keys=ignore_keys), chosen


def _covariance(
    lm: "LM", settings: Settings, text: Path | None, vectors: int | None, out: Path | None
) -> dict[int, "Covariance"] | None:
    from jaxneurons.edit.editing import layers_of

    if not (layers := layers_of(settings, lm.config)):
        return None
    from jaxneurons.edit.covariance import collect_covariance

    with counting("Collecting keys", "keys") as progress:
        return collect_covariance(
            lm,
            layers,
            text=None if text is None else paragraphs(text),
            vectors=vectors,
            out=out,
            progress=progress,
        )


def paragraphs(path: Path) -> list[str]:
    """A text file's paragraphs: what stands between empty lines."""
    from jaxneurons.storage.text_file import read_text

    return [part for part in read_text(path).split("\n\n") if part.strip()]


def _edit(
    lm: "LM",
    requests: list["EditRequest"],
    settings: Settings,
    out: Path,
    covariance: dict[int, "Covariance"] | None = None,
) -> None:
    from jaxneurons.edit.editing import edit
    from jaxneurons.edit.patch import make_patch
    from jaxneurons.edit.patch_file import write_patch
    from jaxneurons.edit.views import show_edit

    with counting("Editing", "requests") as progress:
        result = edit(
            lm.params,
            requests,
            config=lm.config,
            tokenizer=lm.tokenizer,
            settings=settings,
            covariance=covariance,
            progress=progress,
        )
    targets = [[r.id, r.prompt, r.target] for r in requests]
    write_patch(make_patch(lm, result, facts={"targets": targets}), out)
    show_edit(requests, result)
    console.print(f"Written: {out} ({out.stat().st_size / 2**20:.2f} MiB)", soft_wrap=True)


patch_cli.add_commands(app)
evaluation_cli.add_commands(app)
