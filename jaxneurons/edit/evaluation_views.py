"""What people see of an evaluation of edits: tables of the terminal, from its tables alone."""

from collections.abc import Mapping, Sequence
from typing import Any

from rich import box
from rich.table import Table

from jaxneurons.edit.summaries import RANDOM, UNEDITED
from jaxneurons.storage.tables import Row
from jaxneurons.terminal.console import console, formatted, shown_name

SHOWN = 5
"""Requests that were left out whose reasons are shown, at most."""

ANSWERED = {
    "efficacy": "after the prompt",
    "generalisation": "after paraphrases",
    "portability": "where it follows from the edit",
}
"""Measures of the new answer, and after which prompts."""


def show_evaluation(summary: Sequence[Row], differences: Sequence[Row] = ()) -> None:
    """Every method beside its control: answers given, forced beside free, and what was kept."""
    count = max(row["requests"] for row in summary)
    for name, prompts in ANSWERED.items():
        if all(row[f"{name}_free"] is None for row in summary):
            continue
        table = _narrow(f"New answer given {prompts}, exact match, % ({count} edits)")
        for column in ("forced", "free", "95 %"):
            table.add_column(column, justify="right", no_wrap=True)
        for row in summary:
            table.add_row(_label(row), *_both(row, name))
        console.print(table)
    table = _narrow("Neighbours that are as they were, %, and the text that the model writes")
    for name in ("forced", "free", "95 %", "KL", "fluency", "perplexity", "failed"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in summary:
        table.add_row(
            _label(row),
            *_both(row, "locality"),
            formatted(row["locality_kl"], ".3f"),
            formatted(row["fluency"], ".2f"),
            "" if row["perplexity_ratio"] is None else f"x {row['perplexity_ratio']:.3g}",
            f"{row['failed'] or ''}",
        )
    console.print(table)
    _show_differences(differences)
    console.print(
        "Forced: every token of the answer is the first choice, given those before it. Free: the "
        "first sentence that the model writes begins with the answer; for neighbours, it is the "
        "sentence of the unedited model. Random: a change of the same size in a random direction, "
        "or random neurons of the same layers. KL: nats; fluency: bits; perplexity: of neutral "
        "text, times the unedited model's."
    )


def _show_differences(differences: Sequence[Row]) -> None:
    rows = [row for row in differences if row["against"] == RANDOM]
    rows = [row for row in rows if row["measure"] in ("efficacy_free", "locality_free")]
    if not rows:
        return
    table = _narrow("Paired difference to the random control, percentage points")
    for name in ("efficacy, free", "95 %", "locality, free", "95 %"):
        table.add_column(name, justify="right", no_wrap=True)
    for method in dict.fromkeys(row["method"] for row in rows):
        cells: list[str] = []
        for measure in ("efficacy_free", "locality_free"):
            row = next((r for r in rows if (r["method"], r["measure"]) == (method, measure)), None)
            keys = ("difference", "difference_low", "difference_high")
            value, low, high = (None if row is None else row[key] for key in keys)
            cells += [_points(value), _range(_points(low), _points(high))]
        table.add_row(shown_name(method), *cells)
    console.print(table)


def show_sequential(rows: Sequence[Row]) -> None:
    """Every method after more and more edits of one model."""
    rows = [row for row in rows if row["method"] != UNEDITED]
    for method in dict.fromkeys(row["method"] for row in rows):
        table = _narrow(f"{shown_name(method)}: after so many edits of one model, %", "edits")
        names = ("first: free", "last: free", "all: forced", "free", "95 %", "kept", "perplexity")
        for name in names:
            table.add_column(name, justify="right", no_wrap=True)
        for size in dict.fromkeys(row["edits"] for row in rows if row["method"] == method):
            group = {
                row["group"]: row for row in rows if (row["method"], row["edits"]) == (method, size)
            }
            whole = group["all"]
            table.add_row(
                f"{size:,}",
                _share(group["first"]["efficacy_free"]),
                _share(group["last"]["efficacy_free"]),
                *_both(whole, "efficacy"),
                _share(whole["locality_free"]),
                "" if whole["perplexity_ratio"] is None else f"x {whole['perplexity_ratio']:.3g}",
            )
        console.print(table)
    console.print(
        "First, last, all: of the edits so far, as many as were measured. Kept: neighbours whose "
        "first sentence is the unedited model's. Perplexity: of neutral text, times the unedited."
    )


def show_layers(rows: Sequence[Row], method: str, chosen: str) -> None:
    """Every candidate, the chosen one with a star."""
    table = _narrow(f"{method} at other layers: what edits there did, in free generation, %", "")
    for name in ("layers", "score", "95 %", "prompt", "paraphrases", "kept", "reached"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(
            "*" if row["layers"] == chosen else "",
            row["layers"],
            f"{row['score']:.2f}",
            f"{row['low']:.2f} to {row['high']:.2f}",
            _share(row["efficacy_free"]),
            _share(row["generalisation_free"]),
            _share(row["locality_free"]),
            _share(row["reached"]),
        )
    console.print(table)
    console.print(
        "Score: harmonic mean of the three measures; *: chosen. Kept: neighbours whose first "
        "sentence is the unedited model's. Reached: optimisations that reached their goal."
    )
    for row in rows:
        if row["failed"]:
            console.print(f"{row['layers']}: {row['failed']}", soft_wrap=True)


def show_left_out(facts: Mapping[str, Any]) -> None:
    """Requests that were left out, with the reason, and what is odd about the others."""
    left_out = facts["left_out"]
    if left_out:
        console.print(f"Left out ({len(left_out)}):", soft_wrap=True)
    for entry in left_out[:SHOWN]:
        where = f" ({entry['method']})" if entry["method"] else ""
        console.print(f"  {entry['request']}{where}: {entry['reason']}", soft_wrap=True)
    if len(left_out) > SHOWN:
        console.print(f"  ... and {len(left_out) - SHOWN} more; the JSON file has all of them")
    for remark in facts.get("remarks", [])[:SHOWN]:
        console.print(f"Note: {remark}", soft_wrap=True)


def _label(row: Row) -> str:
    return "  random" if row["control"] else shown_name(row["method"])


def _both(row: Row, name: str) -> tuple[str, str, str]:
    """By teacher forcing, in free generation, and the interval of that."""
    low, high = row[f"{name}_free_low"], row[f"{name}_free_high"]
    free = _share(row[f"{name}_free"])
    return _share(row[f"{name}_forced"]), free, _range(_share(low), _share(high))


def _share(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.0f}"


def _points(value: float | None) -> str:
    return "" if value is None else f"{100 * value:+.0f}"


def _range(low: str, high: str) -> str:
    return f"{low} to {high}" if low else ""


def _narrow(title: str, first: str = "method") -> Table:
    """A table that fits 80 columns."""
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column(first, no_wrap=True)
    return table
