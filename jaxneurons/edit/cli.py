"""The command line of editing facts: a method and a file of requests in, a patch out.

Each command reads its options, calls the function of Python of its name, and shows the result.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from jaxneurons.edit import evaluation_cli, patch_cli
from jaxneurons.edit.arguments import (
    NUMBERS,
    Limit,
    Model,
    Requests,
    collect,
    paragraphs,
    read,
)
from jaxneurons.edit.method import (
    MEMIT,
    ROME,
    AlphaEdit,
    Edit,
    FineTune,
    KnowledgeNeurons,
    LearnedNeurons,
    Settings,
)
from jaxneurons.errors import DataError
from jaxneurons.terminal.console import console, counting, load_and_say
from jaxneurons.terminal.options import IgnoreKeys, Text, on_mesh, settings_options

if TYPE_CHECKING:
    from jaxneurons.checkpoints.loading import LM
    from jaxneurons.edit.covariance import Covariance
    from jaxneurons.edit.requests import EditRequest

app = typer.Typer(
    help="Edit facts and neurons by transformation of parameters; edits are patches.",
    no_args_is_help=True,
)

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


def _of_keys(settings: type, *, name: str, help: str) -> None:
    """A command of a method that writes values for keys."""
    texts = {"prefix_tokens": NUMBERS, **({"layers": NUMBERS} if settings is not ROME else {})}

    @app.command(name, help=help)
    @on_mesh
    @settings_options(settings, texts=texts)
    def command(
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
        lm, chosen = _prepared(model, requests, limit, out, ignore_key)
        texts = None if text is None else paragraphs(text)
        covariance = collect(lm, [settings], text=texts, vectors=vectors, out=statistics)
        _edit(lm, chosen, settings, out, covariance)


_of_keys(
    ROME,
    name="rome",
    help="Edit facts by rank-one terms in one layer, one after the other (ROME, arXiv 2202.05262).",
)
_of_keys(
    MEMIT,
    name="memit",
    help="Edit many facts together, spread over layers (MEMIT, arXiv 2210.07229).",
)
_of_keys(
    AlphaEdit,
    name="alphaedit",
    help="Edit many facts in the null space of the keys of text (AlphaEdit, arXiv 2410.02355).",
)


@app.command()
@on_mesh
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
    @on_mesh
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
        inputs = () if neurons is None else (neurons,)
        lm, chosen = _prepared(model, requests, limit, out, ignore_key, *inputs)
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


def _prepared(
    model: str,
    requests: str,
    limit: int | None,
    out: Path,
    ignore_keys: list[str] | None,
    *inputs: Path,
) -> tuple["LM", list["EditRequest"]]:
    from jaxneurons.storage.store import check_new_file

    check_new_file(out, Path(requests), *inputs)
    chosen = read(requests, limit)
    return load_and_say(model, ignore_keys=ignore_keys), chosen


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
    write_patch(make_patch(lm, result), out)
    if isinstance(settings, KnowledgeNeurons):
        _show_surgery(lm, requests, result, settings)
    else:
        show_edit(requests, result)
    console.print(f"Written: {out} ({out.stat().st_size / 2**20:.2f} MiB)", soft_wrap=True)


def _show_surgery(
    lm: "LM", requests: list["EditRequest"], edit: Edit, settings: KnowledgeNeurons
) -> None:
    from jaxneurons.edit.answer_probabilities import answer_probabilities
    from jaxneurons.edit.output_rows import set_for_each
    from jaxneurons.edit.views import show_surgery

    before, after = (
        answer_probabilities(
            lm.params, requests, changes, config=lm.config, tokenizer=lm.tokenizer
        ).tolist()
        for changes in ((), edit.changes)
    )
    neurons = [len(of_request) for of_request in set_for_each(settings.neurons, len(requests))]
    show_surgery(requests, edit, neurons=neurons, before=before, after=after)


patch_cli.add_commands(app)
evaluation_cli.add_commands(app)
