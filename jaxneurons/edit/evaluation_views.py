"""What people see of an evaluation of edits: tables of the terminal, from its tables alone."""

from collections.abc import Mapping, Sequence
from typing import Any

from rich import box
from rich.table import Table

from jaxneurons.edit.summaries import RANDOM, UNEDITED
from jaxneurons.storage.printable import counted
from jaxneurons.storage.tables import Row
from jaxneurons.terminal.console import console, formatted, shown_name

SHOWN = 5
"""Requests that were left out whose reasons are shown, at most."""

FEW = 10
"""Requests, or facts, of fewer than which intervals say little."""
PROBABILITIES = ("clean", "noised", "total_effect")

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
        table = _table(("method", "forced", "free", "free, 95 %"))
        for row in summary:
            table.add_row(_label(row), *_both(row, name))
        edits = counted(count, "edit")
        _show(f"New answer given {prompts}, exact match, % ({edits})", table)
    failed = any(row["failed"] for row in summary)
    names = ("method", "forced", "free", "free, 95 %", "KL", "fluency", "perplexity")
    table = _table((*names, "failed") if failed else names, narrow=failed)
    for row in summary:
        cells = (
            formatted(row["locality_kl"], ".3f"),
            formatted(row["fluency"], ".2f"),
            _times(row["perplexity_ratio"]),
        )
        last = (f"{row['failed'] or ''}",) if failed else ()
        table.add_row(_label(row), *_both(row, "locality"), *cells, *last)
    _show("Neighbours that are as they were, %, and the text that the model writes", table)
    _show_differences(differences)
    console.print(
        "Forced: every token of the answer is the first choice, given those before it. Free: the "
        "first sentence that the model writes begins with the answer; for neighbours, it is the "
        "sentence of the unedited model. Random: a change of the same size in a random direction, "
        "or random neurons of the same layers. KL: nats; fluency: bits; perplexity: of neutral "
        f"text, times the unedited model's.{_about_few(count)}"
    )


def _about_few(count: int, what: str = "request") -> str:
    """What is to be said of 95 % intervals over so many."""
    if count >= FEW:
        return ""
    return (
        f" The 95 % intervals are over {counted(count, what)}: those of fewer than {FEW} mean "
        "little."
    )


def _show_differences(differences: Sequence[Row]) -> None:
    rows = [row for row in differences if row["against"] == RANDOM]
    rows = [row for row in rows if row["measure"] in ("efficacy_free", "locality_free")]
    if not rows:
        return
    table = _table(("method", "efficacy", "95 %", "locality", "95 %"))
    for method in dict.fromkeys(row["method"] for row in rows):
        cells: list[str] = []
        for measure in ("efficacy_free", "locality_free"):
            row = next((r for r in rows if (r["method"], r["measure"]) == (method, measure)), None)
            keys = ("difference", "difference_low", "difference_high")
            value, low, high = (None if row is None else row[key] for key in keys)
            cells += [_points(value), _range(_points(low), _points(high))]
        table.add_row(shown_name(method), *cells)
    _show("Paired difference to the random control, free generation, percentage points", table)


def show_sequential(rows: Sequence[Row]) -> None:
    """Every method after more and more edits of one model."""
    rows = [row for row in rows if row["method"] != UNEDITED]
    for method in dict.fromkeys(row["method"] for row in rows):
        table = _table(
            ("edits", "first", "last", "forced", "free", "free, 95 %", "kept", "perplexity")
        )
        of_method = [row for row in rows if row["method"] == method]
        for size in dict.fromkeys(row["edits"] for row in of_method):
            for control in dict.fromkeys(row["control"] for row in of_method):
                key = (size, control)
                group = {
                    row["group"]: row for row in of_method if (row["edits"], row["control"]) == key
                }
                whole = group["all"]
                table.add_row(
                    control or f"{size:,}",
                    _share(group["first"]["efficacy_free"]),
                    _share(group["last"]["efficacy_free"]),
                    *_both(whole, "efficacy"),
                    _share(whole["locality_free"]),
                    _times(whole["perplexity_ratio"]),
                )
        _show(f"{shown_name(method)}: new answers after so many edits of one model, %", table)
    most = max((row["requests"] for row in rows if row["group"] == "all"), default=FEW)
    console.print(
        "First, last: of the first and the last edits so far, free. Forced, free: of all edits so "
        "far, as many as were measured. Kept: neighbours whose first sentence is the unedited "
        "model's. Perplexity: of neutral text, times the unedited. Random: all that was changed so "
        f"far, turned at random.{_about_few(most)}"
    )


def show_layers(rows: Sequence[Row], method: str, chosen: str, *, requests: int = 10) -> None:
    """Every candidate, the chosen one with a star."""
    names = ("", "layers", "score", "95 %", "prompt", "paraphrases", "kept", "reached")
    table = _table(names)
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
    _show(f"{method} at other layers: what edits there did, in free generation, %", table)
    console.print(
        "Score: harmonic mean of the three measures; *: chosen. Kept: neighbours whose first "
        "sentence is the unedited model's. Reached: optimisations that reached their goal."
        + _about_few(requests)
    )
    for row in rows:
        if row["failed"]:
            console.print(f"{row['layers']}: {row['failed']}", soft_wrap=True)


TRACED = {"residual": "residual stream", "down": "feed-forward", "o": "attention"}
"""Kinds of restored states."""


def show_trace(summary: Sequence[Row], facts: Sequence[Row]) -> None:
    """Causal tracing: the mean total effect, and where most of it comes back.

    Args:
      summary: rows of the table `summary` of `trace`.
      facts: rows of its table `facts`.
    """
    traced = [row for row in facts if not row["left_out"]]
    table = _table(("traced", "clean", "noised", "total effect"), first="facts")
    means = [sum(row[name] for row in traced) / len(traced) for name in PROBABILITIES]
    table.add_row(f"{len(facts):,}", f"{len(traced):,}", *(f"{mean:.3f}" for mean in means))
    _show("The answer's probability, means over facts", table)
    table = _table(("token", "layer", "effect", "95 %"), first="state restored")
    for kind, position in ((kind, place) for kind in TRACED for place in ("last subject", "last")):
        here = [row for row in summary if (row["kind"], row["position"]) == (kind, position)]
        if not here:
            continue
        best = max(here, key=lambda row: row["effect"])
        token = "subject's last" if position == "last subject" else "last"
        ends = f"{best['low']:.3f} to {best['high']:.3f}"
        table.add_row(TRACED[kind], token, f"{best['layer']}", f"{best['effect']:.3f}", ends)
    _show("Indirect effect at the layer where it is largest", table)
    console.print(
        "Total effect: clean less noised. Indirect effect: what of the probability comes back with "
        "this state alone restored (feed-forward and attention: a few layers around it)."
        + _about_few(len(traced), "fact")
    )


def show_left_out(facts: Mapping[str, Any]) -> None:
    """Sizes and requests that were left out, with the reason, and what is odd about the others."""
    if sizes := facts.get("sizes_left_out"):
        console.print(said_left_out(sizes))
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


def said_left_out(sizes: Sequence[int]) -> str:
    """That some sizes are more than there are requests."""
    return (
        f"Not measured after {', '.join(f'{size:,}' for size in sizes)} edits: there are fewer "
        "requests."
    )


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


def _times(ratio: float | None) -> str:
    return "" if ratio is None else f"x {ratio:.3g}"


def _table(names: Sequence[str], *, first: str = "", narrow: bool = False) -> Table:
    """A table that fits 80 columns; the first column is to the left, where it holds names.

    Args:
      names: of the columns.
      first: of one more before them.
      narrow: without room between columns.
    """
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 0 if narrow else 1, 0, 0))
    for place, name in enumerate((first, *names) if first else names):
        if place:
            table.add_column(name, justify="right", no_wrap=True)
        else:
            table.add_column(name)  # where numbers need room, a name takes two lines
    return table


def _show(title: str, table: Table) -> None:
    """A table under its title, which is not made as narrow as the table."""
    console.print(title, style="italic")
    console.print(table)
