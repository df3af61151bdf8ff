"""What people see of edits: tables of the terminal."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich import box
from rich.table import Table

from jaxneurons.storage.printable import counted
from jaxneurons.terminal.console import NAME, console, shown_name, warn

if TYPE_CHECKING:
    from jaxneurons.edit.method import Edit
    from jaxneurons.edit.requests import EditRequest

REQUESTS = 20
"""Requests that are shown, at most."""


def show_edit(requests: Sequence["EditRequest"], edit: "Edit") -> None:
    """How the optimisation of each request went; says which did not reach their goal."""
    if edit.trace is None:
        return
    table = Table(
        title=f"{counted(len(requests), 'request')} by {type(edit.settings).__name__}",
        title_justify="left",
        box=box.SIMPLE_HEAD,
    )
    for name in ("prompt", "target"):
        table.add_column(name, max_width=NAME, overflow="ellipsis", no_wrap=True)
    for name in ("P(target), optimised", "steps", "reached"):
        table.add_column(name, justify="right")
    trace = edit.trace
    for n, request in enumerate(requests[:REQUESTS]):
        table.add_row(
            shown_name(request.prompt),
            shown_name(request.target),
            f"{trace.probability[n]:.3f}",
            f"{trace.steps[n]}",
            "yes" if trace.reached[n] else "NO",
        )
    console.print(table)
    if len(requests) > REQUESTS:
        console.print(f"... and {counted(len(requests) - REQUESTS, 'request')} more.")
    if missed := int((~trace.reached).sum()):
        warn(
            f"{missed} of {len(requests)} optimisations did not reach their goal (loss below "
            "--stop): those edits may well have failed; see `edit evaluate`"
        )
