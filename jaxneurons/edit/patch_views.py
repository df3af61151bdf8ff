"""What people see of a patch: a table of its changes, and what it says of itself."""

from typing import TYPE_CHECKING, Any

from rich import box
from rich.table import Table

from jaxneurons.terminal.console import NAME, console, gib, shown_name

if TYPE_CHECKING:
    from jaxneurons.edit.patch import Patch

CHANGES = 20
"""Changes that are shown, at most."""
_APART = {"optimisation", "targets", "base_name", "base_dtype", "method"}
"""Facts that are shown otherwise, or counted."""


def show_patch(patch: "Patch") -> None:
    """Base, method and facts, and a line for each change."""
    table = Table(box=None, show_header=False, title=patch.name, title_justify="left")
    table.add_column()
    table.add_column(overflow="fold")
    facts = patch.facts
    model = f"{facts.get('base_name', 'a model')} ({facts.get('base_dtype', 'float32')})"
    table.add_row("base", f"{model}, parameters {patch.base}")
    table.add_row("reverted by", "itself" if patch.revertible else "its base")
    table.add_row("arrays", gib(patch.nbytes))
    for name in sorted(facts.keys() - _APART):
        table.add_row(name, _short(facts[name]))
    if isinstance(targets := facts.get("targets"), list):
        table.add_row("targets", f"{len(targets)}")
    optimisation = facts.get("optimisation")
    if isinstance(optimisation, dict) and isinstance(optimisation.get("reached"), list):
        reached = optimisation["reached"]
        table.add_row("reached their goal", f"{sum(map(bool, reached))} of {len(reached)}")
    console.print(table)
    console.print(_changes(patch))
    if len(patch.changes) > CHANGES:
        console.print(f"... and {len(patch.changes) - CHANGES} changes more.")


def _changes(patch: "Patch") -> Table:
    table = Table(box=box.SIMPLE_HEAD)
    for name in ("change", "where", "layers"):
        table.add_column(name, max_width=NAME, overflow="ellipsis", no_wrap=True)
    for name in ("rank, rows, neurons", "norm"):
        table.add_column(name, justify="right")
    for row in patch.table()[:CHANGES]:
        layers = ", ".join(map(str, row["layers"]))
        cells = (row["kind"], shown_name(row["place"]), shown_name(layers))
        table.add_row(*cells, f"{row['size']}", f"{row['norm']:.4g}")
    return table


def _short(value: Any) -> str:
    """A fact on a line or two."""
    if isinstance(value, dict):
        return ", ".join(f"{key}: {_short(inner)}" for key, inner in value.items())
    text = "[...]" if isinstance(value, list) and len(value) > 8 else str(value)
    return text if len(text) <= 200 else f"{text[:197]}..."
