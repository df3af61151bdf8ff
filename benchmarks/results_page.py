"""Tables of results files, in Markdown."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
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
