"""Requests on disk: the published formats that they come in, and your own.

`counterfact-edit` (case_id, prompt, target_new, subject, ground_truth, rephrase_prompt,
locality_prompt, locality_ground_truth), CounterFact (requested_rewrite, paraphrase_prompts,
neighborhood_prompts), zsRE (subject, src, alt, answers, rephrase, loc, loc_ans), and your own JSON
Lines or CSV (prompt, subject, target, optional paraphrases and neighbours)::

    {"prompt": "The capital of France is", "subject": "France", "target": "Rome",
     "paraphrases": ["France's capital city is"],
     "neighbours": [["The capital of Spain is", "Madrid"]]}
"""

import difflib
import functools
import os
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from jaxneurons.edit.requests import EditRequest, KnownFact
from jaxneurons.errors import DataError
from jaxneurons.storage.csv_file import read_csv, read_header
from jaxneurons.storage.json_file import parse_json
from jaxneurons.storage.settings import as_path, check_number
from jaxneurons.storage.text_file import read_text


def read_requests(path: str | os.PathLike[str], *, limit: int | None = None) -> list[EditRequest]:
    """Read requests in the order of their file; the format is seen from the content.

    What a file says of the old answer, of paraphrases and of neighbours is kept as it says it. In
    CounterFact the neighbours' answer is the edited fact's old one; in zsRE the new answer is `alt`
    (`answers` hold the old one) and prompts are questions. `check_requests` tells what the requests
    are among each other. Of your own requests a column or key that is near a known one is an error;
    others are passed over (`ignored_keys`), as are those of the published formats.

    Args:
      path: JSON, JSON Lines or CSV. In a CSV, several texts of a cell stand on lines of their own
        or between bars (`|`), and an answer after `=>`.
      limit: read so many, the first; None: all.

    Raises:
      DataError: the file cannot be read or a request is unusable; says file, record and key.
    """
    return _read(path, limit, _requests_of, "requests")


def read_known(path: str | os.PathLike[str], *, limit: int | None = None) -> list[KnownFact]:
    """Read facts that a model may know (known_id, subject, attribute, prompt), in file order.

    Args:
      path: JSON or JSON Lines.
      limit: read so many, the first; None: all.

    Raises:
      DataError: the file cannot be read or a fact is unusable; says file, record and key.
    """

    def facts(path: Path, text: str) -> list[tuple[str, Callable[[], KnownFact]]]:
        return [
            (where, functools.partial(_known, record, n))
            for n, (where, record) in enumerate(_records(path, text))
        ]

    return _read(path, limit, facts, "facts")


def holds_known(path: str | os.PathLike[str]) -> bool:
    """Whether a file holds facts for `read_known` (seen from its first record).

    Raises:
      DataError: the file cannot be read, or is broken JSON.
    """
    path = as_path("path", path)
    text = read_text(path)
    if text.lstrip()[:1] not in ("{", "["):
        return False
    first = next((record for _, record in _records(path, text)), None)
    return isinstance(first, Mapping) and bool(first.keys() & {"attribute", "known_id"})


def ignored_keys(path: str | os.PathLike[str]) -> list[str]:
    """Columns of a CSV, or keys of your own requests in JSON, that `read_requests` passes over.

    Raises:
      DataError: the file cannot be read; says why.
    """
    path = as_path("path", path)
    text = read_text(path)
    if text.lstrip()[:1] not in ("{", "["):
        _, names = read_header(path, _REQUIRED)
        return [name for name in names if name and name not in _FIELDS]
    records = [record for _, record in _records(path, text) if isinstance(record, Mapping)]
    ours = [r for r in records if _format_of(r) is _plain_request]
    return list(dict.fromkeys(key for record in ours for key in record if key not in _FIELDS))


def _read(
    path: str | os.PathLike[str],
    limit: int | None,
    parse: Callable[[Path, str], list[tuple[str, Callable[[], Any]]]],
    what: str,
) -> list[Any]:
    """The first entries of a file, each checked, with ids that are unique."""
    path = as_path("path", path)
    if limit is not None:
        check_number("limit", limit, least=1)
    entries: list[Any] = []
    places: dict[str, str] = {}
    for where, make in parse(path, read_text(path))[:limit]:
        try:
            entry = make()
        except DataError as error:
            raise DataError(f"{where}: {error}") from None
        if entry.id in places:
            raise DataError(f"{where}: the id {entry.id!r} is that of {places[entry.id]} too")
        places[entry.id] = where.removeprefix(f"{path}: ")
        entries.append(entry)
    if not entries:
        raise DataError(f"{path}: holds no {what}")
    return entries


# --- formats --------------------------------------------------------------------------------------


def _requests_of(path: Path, text: str) -> list[tuple[str, Callable[[], EditRequest]]]:
    if text.lstrip()[:1] in ("{", "["):
        return [
            (where, functools.partial(_request, record, n))
            for n, (where, record) in enumerate(_records(path, text))
        ]
    line, names = read_header(path, _REQUIRED)
    try:
        _check_spelling("column", names)
    except DataError as error:
        raise DataError(f"{path}: line {line}: {error}") from None
    rows = read_csv(path, _REQUIRED, _OPTIONAL)
    return [
        (f"{path}: line {line}", functools.partial(_csv_request, row, n))
        for n, (line, row) in enumerate(rows)
    ]


def _records(path: Path, text: str) -> list[tuple[str, Any]]:
    """Where each record is, and what is there."""
    value = parse_json(path, text)
    records = value if isinstance(value, list) else [value]
    return [(f"{path}: record {n + 1}", record) for n, record in enumerate(records)]


def _request(record: Any, number: int) -> EditRequest:
    if not isinstance(record, Mapping):
        raise DataError(f"an object is needed, got {type(record).__name__}")
    if (read := _format_of(record)) is not None:
        return read(record, number)
    raise DataError(
        "its keys are of no known format: "
        f"{', '.join(map(repr, record)) or 'there are none'}; your own requests need 'prompt', "
        "'subject' and 'target'"
    )


def _format_of(record: Mapping[str, Any]) -> "_Reader | None":
    return next((read for keys, read in _FORMATS if keys <= record.keys()), None)


def _counterfact_edit(record: Mapping[str, Any], number: int) -> EditRequest:
    paraphrase = _text(record, "rephrase_prompt", required=False)
    neighbour = _text(record, "locality_prompt", required=False)
    answer = _text(record, "locality_ground_truth", required=False)
    return EditRequest(
        prompt=_text(record, "prompt"),
        subject=_text(record, "subject").strip(),
        target=_text(record, "target_new").strip(),
        ground_truth=_text(record, "ground_truth", required=False).strip(),
        paraphrases=(paraphrase,) if paraphrase else (),
        neighbours=((neighbour, answer.strip()),) if neighbour else (),
        id=_id(record, "case_id", number),
    )


def _counterfact(record: Mapping[str, Any], number: int) -> EditRequest:
    inner = record["requested_rewrite"]
    if not isinstance(inner, Mapping):
        raise DataError(f"requested_rewrite: an object is needed, got {type(inner).__name__}")
    template = _text(inner, "prompt", "requested_rewrite")
    subject = _text(inner, "subject", "requested_rewrite").strip()
    if template.count("{}") != 1:
        raise DataError(
            f"requested_rewrite: prompt: {template!r} needs '{{}}' for the subject once"
        )
    answers = {}
    for key in ("target_new", "target_true"):
        value = inner.get(key, {} if key == "target_true" else None)
        if not isinstance(value, Mapping):
            raise DataError(f"requested_rewrite: {key}: an object with 'str' is needed")
        inside = f"requested_rewrite: {key}"
        answers[key] = _text(value, "str", inside, required=key == "target_new").strip()
    truth = answers["target_true"]
    return EditRequest(
        prompt=template.replace("{}", subject),
        subject=subject,
        target=answers["target_new"],
        ground_truth=truth,
        paraphrases=_texts(record, "paraphrase_prompts"),
        neighbours=tuple((text, truth) for text in _texts(record, "neighborhood_prompts")),
        id=_id(record, "case_id", number),
    )


def _zsre(record: Mapping[str, Any], number: int) -> EditRequest:
    answers, neighbour = _texts(record, "answers"), _text(record, "loc", required=False)
    kept = (*_texts(record, "loc_ans"), "")[0]
    return EditRequest(
        prompt=_text(record, "src"),
        subject=_text(record, "subject").strip(),
        target=_text(record, "alt").strip(),
        ground_truth=answers[0].strip() if answers else "",
        paraphrases=_texts(record, "rephrase"),
        neighbours=((neighbour, kept.strip()),) if neighbour else (),
        id=_id(record, "case_id", number),
    )


_REQUIRED = ("prompt", "subject", "target")
_OPTIONAL = ("id", "ground_truth", "paraphrases", "neighbours", "portability")
_FIELDS = (*_REQUIRED, *_OPTIONAL)
_NEAR = 0.75
"""How like a known name an unknown one is that is taken for a slip (`difflib`'s ratio)."""


def _check_spelling(what: str, names: Iterable[str]) -> None:
    """Raise where a name is not known and near one that could be there and is not."""
    names = list(names)
    missing = [name for name in _OPTIONAL if name not in names]
    for name in names:
        plain = "_".join(name.casefold().split())
        if name in _FIELDS or len(plain) < 3:
            continue
        near = [n for n in missing if n == plain or _likeness(plain, n) >= _NEAR]
        if near:
            raise DataError(f"unknown {what} {name!r}; did you mean {near[0]!r}?")


def _likeness(name: str, other: str) -> float:
    return difflib.SequenceMatcher(None, name, other).ratio() if len(other) > 2 else 0.0


def _plain_request(record: Mapping[str, Any], number: int) -> EditRequest:
    _check_spelling("key", record)
    return EditRequest(
        prompt=_text(record, "prompt"),
        subject=_text(record, "subject").strip(),
        target=_text(record, "target").strip(),
        ground_truth=_text(record, "ground_truth", required=False).strip(),
        paraphrases=_texts(record, "paraphrases"),
        neighbours=_pairs(record, "neighbours"),
        portability=_pairs(record, "portability"),
        id=_id(record, "id", number),
    )


def _csv_request(row: Mapping[str, str], number: int) -> EditRequest:
    record: dict[str, Any] = {key: row[key] for key in ("prompt", "subject", "target")}
    record["ground_truth"] = row["ground_truth"]
    record["id"] = row["id"].strip() or None
    record["paraphrases"] = _cell(row["paraphrases"])
    for key in ("neighbours", "portability"):
        pairs = [text.rpartition("=>") for text in _cell(row[key])]
        record[key] = [[a.strip(), b.strip()] if by else [b, ""] for a, by, b in pairs]
    return _plain_request(record, number)


def _cell(text: str) -> list[str]:
    return [part for part in re.split(r"\s*[|\n]\s*", text.strip()) if part]


_Reader = Callable[[Mapping[str, Any], int], EditRequest]
_FORMATS: tuple[tuple[set[str], _Reader], ...] = (
    ({"requested_rewrite"}, _counterfact),
    ({"src", "alt"}, _zsre),
    ({"prompt", "target_new"}, _counterfact_edit),
    ({"prompt", "target"}, _plain_request),
)
"""Keys that say which format a record is of."""


def _known(record: Any, number: int) -> KnownFact:
    if not isinstance(record, Mapping):
        raise DataError(f"an object is needed, got {type(record).__name__}")
    return KnownFact(
        prompt=_text(record, "prompt"),
        subject=_text(record, "subject").strip(),
        attribute=_text(record, "attribute").strip(),
        id=_id(record, "known_id", number),
    )


def _text(record: Mapping[str, Any], key: str, where: str = "", *, required: bool = True) -> str:
    """A text of a record; "" where one that is not required is missing or null."""
    value, at = record.get(key), f"{where}: {key}" if where else key
    if value is None:
        if required:
            raise DataError(f"no {at!r}" if key not in record else f"{at} is null")
        return ""
    if not isinstance(value, str):
        raise DataError(f"{at} must be a text, got {type(value).__name__}")
    return value


def _texts(record: Mapping[str, Any], key: str) -> tuple[str, ...]:
    """A text or a list of texts; () where there is none."""
    value = record.get(key)
    if value is None or value == "":
        return ()
    values = [value] if isinstance(value, str) else value
    if not isinstance(values, list) or not all(isinstance(text, str) for text in values):
        raise DataError(f"{key} must be a text or a list of texts")
    return tuple(values)


def _pairs(record: Mapping[str, Any], key: str) -> tuple[tuple[str, str], ...]:
    """Prompts, each with its answer if it has one: texts, pairs, or objects."""
    value = record.get(key)
    values = [] if value is None or value == "" else value
    values = [values] if isinstance(values, str) else values
    pairs = []
    for entry in values if isinstance(values, list) else [values]:
        if isinstance(entry, str):
            entry = [entry, ""]
        if isinstance(entry, Mapping) and entry.keys() == {"prompt", "answer"}:
            entry = [entry["prompt"], entry["answer"]]
        if not (
            isinstance(entry, list) and len(entry) == 2 and all(isinstance(e, str) for e in entry)
        ):
            raise DataError(
                f"{key} must be a list of prompts, each a text, or [prompt, answer], or "
                '{"prompt": ..., "answer": ...}'
            )
        pairs.append((entry[0], entry[1].strip()))
    return tuple(pairs)


def _id(record: Mapping[str, Any], key: str, number: int) -> str:
    """An id as a text; where there is none, the number of the record, from 0."""
    value = record.get(key)
    if value is None:
        return str(number)
    if isinstance(value, bool) or not isinstance(value, str | int):
        raise DataError(f"{key} must be a text or a whole number, got {type(value).__name__}")
    return str(value)
