"""What people see of edits: tables of the terminal."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from rich import box
from rich.table import Table

from jaxneurons.storage.printable import counted
from jaxneurons.terminal.console import console, shown_name, warn

if TYPE_CHECKING:
    from jaxneurons.edit.method import Edit, Trace
    from jaxneurons.edit.requests import EditRequest

REQUESTS = 20
"""Requests that are shown, at most."""
PROMPT, ANSWER = 25, 10
"""Columns of a prompt and of an answer, at most: the numbers beside them have room then."""
LIKELY = 0.5
"""A new answer that is less probable than this may well not be what the model says."""


def show_edit(requests: Sequence["EditRequest"], edit: "Edit") -> None:
    """How the optimisation of each request went, and which edits may have failed."""
    trace = edit.trace
    if trace is None:
        return
    settings: Any = getattr(edit.settings, "optimisation", edit.settings)
    stop = settings.stop
    losses = trace.loss[np.arange(len(trace.steps)), trace.steps]
    columns = {
        "P(new)": [f"{probability:.3f}" for probability in trace.probability],
        "loss": [f"{loss:.3f}" for loss in losses],
        "steps": [f"{steps}" for steps in trace.steps],
        "below stop": ["yes" if reached else "no" for reached in trace.reached],
    }
    _show(requests, edit, columns, f" (stop loss {stop:g})")
    _say_how_it_went(trace, stop)


def show_surgery(
    requests: Sequence["EditRequest"],
    edit: "Edit",
    *,
    neurons: Sequence[int],
    before: Sequence[float],
    after: Sequence[float],
) -> None:
    """How many neurons an edit without an optimisation changed for each request, and its effect."""
    columns = {
        "neurons": [f"{count}" for count in neurons],
        "P(new) before": [f"{probability:.3f}" for probability in before],
        "after": [f"{probability:.3f}" for probability in after],
    }
    _show(requests, edit, columns)
    _warn_of_failed(after)


def _show(
    requests: Sequence["EditRequest"],
    edit: "Edit",
    columns: Mapping[str, Sequence[str]],
    more: str = "",
) -> None:
    table = Table(
        title=f"{counted(len(requests), 'request')} by {type(edit.settings).__name__}{more}",
        title_justify="left",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
    )
    for name, width in (("prompt", PROMPT), ("new answer", ANSWER)):
        table.add_column(name, max_width=width, overflow="ellipsis", no_wrap=True)
    for name in columns:
        table.add_column(name, justify="right", no_wrap=True)
    for n, request in enumerate(requests[:REQUESTS]):
        cells = (values[n] for values in columns.values())
        table.add_row(shown_name(request.prompt), shown_name(request.target), *cells)
    console.print(table)
    if len(requests) > REQUESTS:
        console.print(f"... and {counted(len(requests) - REQUESTS, 'request')} more.")


def _say_how_it_went(trace: "Trace", stop: float) -> None:
    count = len(trace.steps)
    if known := int((trace.reached & (trace.steps == 0)).sum()):
        console.print(
            f"{known} of {count} new answers are what the model says already: nothing was "
            "optimised for them.",
            soft_wrap=True,
        )
    if above := int((~trace.reached).sum()):
        console.print(
            f"{above} of {count} optimisations ended above the stop loss of {stop:g} (--stop): it "
            "bounds -log P with the other terms that the method minimises, over all its prompts.",
            soft_wrap=True,
        )
    _warn_of_failed(trace.probability)


def _warn_of_failed(probabilities: Sequence[float] | np.ndarray) -> None:
    if failed := int((np.asarray(probabilities) < LIKELY).sum()):
        warn(
            f"{failed} of {len(probabilities)} new answers have a probability below "
            f"{LIKELY:g}: those edits may well have failed; see `edit evaluate`",
        )
