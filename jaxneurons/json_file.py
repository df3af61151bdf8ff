"""JSON that people wrote: one value, or JSON Lines, with errors that say where."""

import json
from pathlib import Path
from typing import Any

from jaxneurons.errors import DataError


def parse_json(path: Path, text: str) -> Any:
    """One JSON value, or the list of a JSON Lines file's values; `path` is for messages.

    Raises:
      DataError: not JSON, or a key written twice in one object, which `json` would drop in silence.
    """
    hook = _unique(path)
    try:
        return json.loads(text, object_pairs_hook=hook)
    except json.JSONDecodeError as error:
        # JSON Lines: something follows a first value of one line. No splitlines(), which would cut
        # strings at U+2028 and the like.
        lines = [(n, line) for n, line in enumerate(text.split("\n"), 1) if line.strip()]
        first = text[: error.pos].strip()
        if len(lines) < 2 or not error.msg.startswith("Extra data") or "\n" in first:
            raise DataError(
                f"{path}: line {error.lineno}, column {error.colno}: not JSON ({error.msg})"
            ) from None
        records = []
        for n, line in lines:
            try:
                records.append(json.loads(line, object_pairs_hook=hook))
            except json.JSONDecodeError as bad:
                raise DataError(
                    f"{path}: line {n}, column {bad.colno}: not JSON ({bad.msg})"
                ) from None
            except DataError as bad:
                raise DataError(f"{bad} (line {n})") from None
            except (RecursionError, ValueError) as bad:
                raise DataError(f"{path}: line {n}: {_odd(bad)}") from None
        return records
    except (RecursionError, ValueError) as error:
        raise DataError(f"{path}: {_odd(error)}") from None


def _unique(path: Path) -> Any:
    """A JSON object hook that refuses a key written twice."""

    def check(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        record = dict(pairs)
        if len(record) != len(pairs):
            twice = next(key for key, _ in pairs if sum(key == k for k, _ in pairs) > 1)
            raise DataError(f"{path}: the key {twice!r} is written twice in one object")
        return record

    return check


def _odd(error: Exception) -> str:
    if isinstance(error, RecursionError):
        return "nested too deeply to be a query file"
    return f"not usable as JSON ({error})"  # a number of thousands of digits
