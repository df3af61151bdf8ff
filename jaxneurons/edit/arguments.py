"""What several commands of `edit` take, and how it is read: models, requests, layers, text."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from jaxneurons.edit.method import Settings
from jaxneurons.errors import DataError
from jaxneurons.terminal.console import counting, warn
from jaxneurons.terminal.options import Text

if TYPE_CHECKING:
    from jaxneurons.checkpoints.loading import LM
    from jaxneurons.edit.covariance import Covariance
    from jaxneurons.edit.requests import EditRequest, KnownFact

Model = Annotated[str, typer.Option(help="Model source: name, path, .gguf file or hub id.")]
Requests = Annotated[
    str,
    typer.Option(
        help="Requests: counterfact-edit, CounterFact, zsRE, JSON Lines or CSV; or 'lab', facts of "
        "the lab model's world."
    ),
]
Limit = Annotated[int | None, typer.Option(min=1, help="Only the first so many requests.")]


def numbers(text: str) -> tuple[int, ...]:
    """Whole numbers with commas between them, or a range: 3,4,5 or 3-5."""
    try:
        parts = [part.strip().split("-") for part in text.split(",") if part.strip()]
        spans = [(int(part[0]), int(part[-1])) for part in parts]
    except ValueError:
        raise DataError(f"{text!r}: give whole numbers, as in 3,4,5 or 3-5") from None
    return tuple(number for first, last in spans for number in range(first, last + 1))


NUMBERS = Text(numbers, lambda numbers: ",".join(map(str, numbers)))


def read(requests: str, limit: int | None = None) -> list["EditRequest"]:
    """The requests of a file, or of the lab's world; oddities among them are shown."""
    from jaxneurons.edit.requests import check_requests

    chosen = _read(requests, limit)
    for remark in check_requests(chosen):
        warn(remark)
    return chosen


def _read(requests: str, limit: int | None) -> list["EditRequest"]:
    """The requests; what of their file is passed over is shown."""
    from jaxneurons.edit.request_files import ignored_keys, read_requests

    if requests == "lab":
        from jaxneurons.edit.world_requests import lab_requests

        return lab_requests(limit)
    chosen = read_requests(requests, limit=limit)
    if names := ignored_keys(requests):
        warn(f"{requests}: not known, and passed over: {', '.join(map(repr, names))}")
    return chosen


def read_facts(facts: str, limit: int | None = None) -> list["KnownFact"]:
    """Facts of a file of facts or of requests, or of the lab's world; those of requests are old."""
    from jaxneurons.edit.request_files import holds_known, read_known
    from jaxneurons.edit.requests import KnownFact

    if facts != "lab" and holds_known(facts):
        return read_known(facts, limit=limit)
    return [
        KnownFact(request.prompt, request.subject, _old_answer(request), request.id)
        for request in _read(facts, limit)
    ]


def _old_answer(request: "EditRequest") -> str:
    if not request.ground_truth.strip():
        raise DataError(
            f"request {request.id!r} says no old answer (ground_truth), which could be traced; "
            "add it, or leave the request out"
        )
    return request.ground_truth


def collect(
    lm: "LM",
    methods: Iterable[Settings],
    *,
    text: Sequence[str] | None = None,
    vectors: int | None = None,
    out: Path | None = None,
) -> dict[int, "Covariance"] | None:
    """Covariances of every layer that one of the methods needs; None where none does."""
    from jaxneurons.edit.covariance import collect_covariance
    from jaxneurons.edit.editing import layers_of

    layers = sorted({layer for settings in methods for layer in layers_of(settings, lm.config)})
    if not layers:
        return None
    with counting("Collecting keys", "keys") as progress:
        return collect_covariance(
            lm, layers, text=text, vectors=vectors, out=out, progress=progress
        )


def paragraphs(path: Path) -> list[str]:
    """A text file's paragraphs: what stands between empty lines."""
    from jaxneurons.storage.text_file import read_text

    return [part for part in read_text(path).split("\n\n") if part.strip()]
