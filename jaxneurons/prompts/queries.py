"""Queries on disk: the published multi-choice format of QRNCA, and plain cloze facts.

Multi-choice (one JSON object; arXiv 2406.10868, its published data)::

    {"some-id": {"sentences": ["... A. x\\n B. y\\n\\nResponse:", ...],
                 "obj_label": ["B", ...], "relation_name": "biology"}}

Cloze (JSON Lines, or one JSON list), for models too small for multi-choice::

    {"id": "capital-france", "group": "capital", "prompts": ["The capital of France is"],
     "answer": "Paris"}

`prompt` may stand for `prompts`, and `id` and `group` may be left out. In both formats
`"separator": ""` (or `" "`, or a list with one for each wording) says what stands between a prompt
and its answer; without it that is seen from the prompt, or decided by the model.
"""

import dataclasses
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from jaxneurons.errors import DataError
from jaxneurons.prompts.answers import option_letters, option_lines
from jaxneurons.storage.json_file import read_values
from jaxneurons.storage.settings import as_path, check_argument
from jaxneurons.storage.typed_json import typed


@dataclasses.dataclass(frozen=True)
class Query:
    """One question in one or more wordings.

    Attributes:
      id: unique in its file.
      group: domain, language or relation.
      prompts: the wordings.
      answers: the right answer of each wording: an option letter, or text.
      options: option letters of each wording; empty for a free answer.
      separators: what stands between each wording and its answer; None: see
        `answers.separators`. Empty: None for each.
    """

    id: str
    group: str
    prompts: tuple[str, ...]
    answers: tuple[str, ...]
    options: tuple[tuple[str, ...], ...]
    separators: tuple[str | None, ...] = ()

    def separator(self, wording: int) -> str | None:
        """What stands between a wording and its answer, if that is known."""
        return self.separators[wording] if self.separators else None


def read_queries(path: str | os.PathLike[str]) -> list[Query]:
    """Read a query file, in the order it is written.

    Raises:
      DataError: the file cannot be read, is not JSON, or a query is unusable; says file, query and
        what is wrong.
    """
    path = as_path("path", path)
    if not os.path.lexists(path):
        raise DataError(f"{path}: no such query file")
    return _checked(path, _records(path, read_values(path)))


def parse_queries(where: str, records: Mapping[str, Any]) -> list[Query]:
    """Queries from records by id, as a query file holds them; `where` is how errors call them.

    Raises:
      DataError: a query is unusable; says which and what is wrong.
    """
    check_argument("records", Mapping, records)
    return _checked(where, records.items())


def _checked(path: Path | str, records: Iterable[tuple[str, Any]]) -> list[Query]:
    queries = [_query(path, *item) for item in records]
    if not queries:
        raise DataError(f"{path}: holds no queries")
    ids: set[str] = set()
    for query in queries:
        try:
            "".join((query.id, query.group, *query.prompts, *query.answers)).encode()
        except UnicodeEncodeError:
            raise DataError(
                f"{path}: query {query.id!r}: holds half a surrogate pair (\\ud800 to \\udfff)"
            ) from None
        if query.id in ids:
            raise DataError(f"{path}: query {query.id!r} is there twice; ids must be unique")
        ids.add(query.id)
    return queries


def _records(path: Path, value: Any) -> Iterable[tuple[str, Any]]:
    """(id, record) of each query, from one JSON value or from the values of JSON Lines."""
    if isinstance(value, Mapping) and not {"prompt", "prompts"} & value.keys():
        return list(value.items())
    records = value if isinstance(value, list) else [value]
    return [
        (_name(f"{path}: query {n + 1}", "id", record, str(n)), record)
        for n, record in enumerate(records)
    ]


def _query(path: Path | str, name: str, record: Any) -> Query:
    where = f"{path}: query {name!r}"
    if not isinstance(record, Mapping):
        raise DataError(f"{where}: an object is needed, got {type(record).__name__}")
    if "sentences" in record:
        return _multi_choice(where, name, record)
    if "answers" in record:  # as a run keeps its queries
        return typed(Query, record, where)
    if not {"prompt", "prompts"} & record.keys():
        raise DataError(
            f"{where}: neither 'sentences' (multi-choice) nor 'prompts' (cloze) is there; "
            f"its keys are {', '.join(map(repr, record)) or 'none'}"
        )
    prompts = _texts(where, "prompts", record.get("prompts", record.get("prompt")))
    answer = _texts(where, "answer", record.get("answer"))
    if len(answer) != 1:
        raise DataError(f"{where}: 'answer' must be one text")
    group = _name(where, "group", record, "all")
    between = _separators(where, record, len(prompts))
    return Query(name, group, prompts, answer * len(prompts), ((),) * len(prompts), between)


def _multi_choice(where: str, name: str, record: Mapping[str, Any]) -> Query:
    prompts = _texts(where, "sentences", record["sentences"])
    labels = _texts(where, "obj_label", record.get("obj_label"))
    if len(labels) != len(prompts):
        raise DataError(f"{where}: {len(prompts)} sentences but {len(labels)} labels (obj_label)")
    options = tuple(option_letters(prompt) for prompt in prompts)
    for i, (label, letters) in enumerate(zip(labels, options, strict=True)):
        if label not in letters:
            offered = "the options " + ", ".join(letters) if letters else "no options"
            raise DataError(
                f"{where}: label {label!r} is no option: sentence {i + 1} has {offered}"
            )
        lines = option_lines(prompts[i])
        if len(letters) < 2 or lines[-len(letters) :] != letters:
            raise DataError(
                f"{where}: sentence {i + 1} has option lines {', '.join(lines)}: "
                "they must be A, B, ... in order, two at least"
            )
    group = _name(where, "relation_name", record, "all")
    between = _separators(where, record, len(prompts))
    return Query(name, group, prompts, labels, options, between)


def _separators(where: str, record: Mapping[str, Any], count: int) -> tuple[str | None, ...]:
    value = record.get("separator")
    if value is None:
        return ()
    values = [value] * count if isinstance(value, str) else value
    if not isinstance(values, list) or len(values) != count:
        raise DataError(f"{where}: 'separator' must be a text, or a list of {count}, as 'prompts'")
    for text in values:
        if text is not None and (not isinstance(text, str) or text.strip()):
            raise DataError(f"{where}: 'separator' must be white space or nothing, got {text!r}")
    return tuple(values)


def _name(where: str, key: str, record: Any, default: str) -> str:
    """An id or a group: a text or a whole number; null is as if it were not there."""
    value = record.get(key) if isinstance(record, Mapping) else None
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, str | int):
        raise DataError(f"{where}: {key!r} must be a text, got {type(value).__name__}")
    return str(value)


def _texts(where: str, key: str, value: Any) -> tuple[str, ...]:
    if isinstance(value, str):
        value = [value]
    if not isinstance(value, list) or not value:
        raise DataError(f"{where}: {key!r} must be a text or a list of texts")
    for text in value:
        if not isinstance(text, str) or not text.strip():
            raise DataError(f"{where}: {key!r} holds an empty or non-text entry")
    return tuple(value)
