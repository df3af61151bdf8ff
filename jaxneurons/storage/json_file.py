"""JSON that people wrote: one value, or JSON Lines, with errors that say where.

Stricter than `json`: what it would drop or turn into something else in silence is refused (a key
written twice, NaN, a number beyond all floats, half a surrogate pair).
"""

import collections
import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from jaxneurons.errors import DataError
from jaxneurons.storage.text_file import read_text


def read_values(path: Path) -> Any:
    """The value of a JSON file, or the list of a JSON Lines file's values.

    Raises:
      DataError: as `read_text` and `parse_json`.
    """
    return parse_json(path, read_text(path))


def read_value(path: Path) -> Any:
    """The value of a JSON file; JSON Lines are not one.

    Raises:
      DataError: as `read_text` and `parse_json`.
    """
    return _parse(f"{path}", read_text(path))


def parse_json(path: Path, text: str) -> Any:
    """One JSON value, or the list of a JSON Lines file's values; `path` is for messages.

    Raises:
      DataError: not JSON, or nothing that can be kept as it is written.
    """
    # JSON Lines: more follows a first line that is a value. No splitlines(), which would cut
    # strings at U+2028 and the like.
    lines = [(n, line) for n, line in enumerate(text.split("\n"), 1) if line.strip()]
    try:
        json.loads(lines[0][1] if len(lines) > 1 else "")
    except (ValueError, RecursionError):
        return _parse(f"{path}", text)
    return [_parse(f"{path}", line, number) for number, line in lines]


def _parse(where: str, text: str, line: int | None = None) -> Any:
    """One value, of a whole file or of one of its lines."""
    at = where if line is None else f"{where}: line {line}"
    try:
        value = json.loads(
            text,
            object_pairs_hook=_unique(at),
            parse_constant=lambda name: _refuse(at, f"{name} is no JSON value"),
            parse_float=_finite(at),
        )
    except json.JSONDecodeError as error:
        raise DataError(
            f"{where}: line {line or error.lineno}, column {error.colno}: not JSON ({error.msg})"
        ) from None
    except RecursionError:
        raise DataError(f"{at}: nested too deeply to be read") from None
    except ValueError as error:  # a number of thousands of digits
        raise DataError(f"{at}: not usable as JSON ({error})") from None
    if _HALF.search(text):
        _check_pairs(at, value)
    return value


_HALF = re.compile(r"\\u[dD][89a-fA-F]")


def _check_pairs(where: str, value: Any) -> None:
    """Raise unless every text in a value can be written down again."""
    todo = [value]
    while todo:
        part = todo.pop()
        if isinstance(part, dict):
            todo += [*part.keys(), *part.values()]
        elif isinstance(part, list):
            todo += part
        elif isinstance(part, str) and any("\ud800" <= letter <= "\udfff" for letter in part):
            text = ascii(part if len(part) < 50 else part[:50] + "...")
            _refuse(where, f"{text} holds half a surrogate pair (\\ud800 to \\udfff)")


def _unique(where: str) -> Callable[[list[tuple[str, Any]]], dict[str, Any]]:
    """A JSON object hook that refuses a key written twice."""

    def check(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        record = dict(pairs)
        if len(record) != len(pairs):
            counts = collections.Counter(key for key, _ in pairs)
            twice = next(key for key, count in counts.items() if count > 1)
            _refuse(where, f"the key {twice!r} is written twice in one object")
        return record

    return check


def _finite(where: str) -> Callable[[str], float]:
    def check(text: str) -> float:
        value = float(text)
        if not math.isfinite(value):
            _refuse(where, f"the number {text[:30]} is too large")
        return value

    return check


def _refuse(where: str, reason: str) -> NoReturn:
    raise DataError(f"{where}: {reason}")
