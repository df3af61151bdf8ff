"""Tables of results files, in Markdown."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any


def markdown(title: str, head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """Lines of a table below its title."""
    lines = [head, ["---"] * len(head), *rows]
    return [f"{title}\n", *(f"| {' | '.join(line)} |" for line in lines), ""]


def spread(row: Mapping[str, Any], name: str, write: Callable[[float], str]) -> str:
    """A value with its interval; nothing where there is none."""
    value, low, high = (row.get(f"{name}{end}") for end in ("", "_low", "_high"))
    if value is None or math.isnan(value):
        return ""
    if low is None or high is None:
        return write(value)
    return f"{write(value)} ({write(low)} to {write(high)})"


def replace_table(page: Path, lines: Sequence[str]) -> None:
    """Put a table in the place of the one with the same first line, on a page.

    Raises:
      ValueError: the page has no such table.
    """
    text = page.read_text(encoding="utf-8").split("\n")
    if lines[0] not in text:
        raise ValueError(f"{page}: no table begins with {lines[0]!r}")
    start = end = text.index(lines[0])
    while end < len(text) and text[end].startswith("|"):
        end += 1
    page.write_text("\n".join([*text[:start], *lines, *text[end:]]), encoding="utf-8")
