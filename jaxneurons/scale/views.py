"""What people see of a plan: a table, in 80 columns."""

from collections.abc import Sequence

from rich import box
from rich.table import Table

from jaxneurons.scale.ahead_of_time import Compiled
from jaxneurons.scale.planning import Plan
from jaxneurons.terminal.console import console


def show_plan(plan: Plan, compiled: Sequence[Compiled] = ()) -> None:
    """How a job would run: the choice, bytes, times; what the compiler says beside it."""
    table = Table(box=None, show_header=False, title=_title(plan), title_justify="left")
    for row in _rows(plan):
        table.add_row(*row)
    console.print(table)
    console.print(_programs(plan))
    if compiled:
        console.print(_compiled(plan, compiled))
    for note in plan.notes:
        console.print(f"note: {note}")


def _title(plan: Plan) -> str:
    count = f"{plan.devices} device{'s' if plan.devices > 1 else ''}"
    return f"{plan.job}: {plan.model}, {plan.dtype}, on {plan.target} ({count})"


def _rows(plan: Plan) -> list[tuple[str, str]]:
    largest, seconds, work = plan.largest, plan.seconds, plan.work
    rest = max(0, largest.temporaries - plan.cache - largest.gathered)
    chunks = plan.chunks
    at_once = {
        "locate": f"{chunks.prompts} prompts, {chunks.rows} rows",
        "evaluate": f"{chunks.prompts} prompts, {chunks.trials} trials of each",
        "responses": f"{chunks.prompts} prompts",
        "edit": f"{chunks.prompts} requests",
    }.get(plan.job, f"{chunks.prompts} prompts, {chunks.sets} sets")
    kind = "requests" if plan.job == "edit" else "prompts"
    rule = f", rule {work.rule}" if plan.job == "locate" else ""
    rows = [
        ("job", f"{work.prompts:,} {kind} of {work.tokens} tokens{rule}"),
        ("mesh", f"{plan.placement.mesh} (data x model), sharding {plan.placement.preset}"),
        ("at once", at_once),
        ("per device", f"{size(plan.peak)} of {size(plan.memory)} ({plan.peak / plan.memory:.0%})"),
        ("  parameters", f"{size(largest.parameters)} of {plan.parameters:,} in all"),
        ("  keys and values", size(plan.cache)),
        ("  rows" if plan.job == "locate" else "  activations", size(rest)),
        ("  arguments, results", size(largest.arguments + largest.outputs)),
        ("programs compiled", f"{plan.compilations}, for prompts of one length"),
        ("disk", size(plan.disk)),
        ("time at stated peak", f"{duration(seconds.total)}, waits for {plan.bound}"),
        ("  operations", duration(seconds.compute)),
        ("  memory", duration(seconds.memory)),
        ("  network", duration(seconds.network)),
    ]
    if largest.gathered:
        rows.insert(5, ("  gathered", f"{size(largest.gathered)}, a layer at a time"))
    return rows


def _programs(plan: Plan) -> Table:
    table = Table(title="A call on one device", title_justify="left", box=box.SIMPLE_HEAD)
    columns = ("program", "calls", "memory", "TFLOP", "moved", "collectives")
    for name in columns:
        table.add_column(name, justify="left" if name == "program" else "right")
    for program in plan.programs:
        sums = [f"{kind} {size(count)}" for kind, count in program.collectives.items()]
        table.add_row(
            program.name,
            f"{program.calls:,}",
            size(program.peak),
            f"{program.operations / 1e12:.3g}",
            size(program.bytes_moved),
            "\n".join(sums) or "none",
        )
    return table


def _compiled(plan: Plan, compiled: Sequence[Compiled]) -> Table:
    table = Table(
        title="Predicted / the compiler's own analysis", title_justify="left", box=box.SIMPLE_HEAD
    )
    for name in ("program", "memory", "temporaries", "collectives", "took"):
        table.add_column(name, justify="left" if name == "program" else "right")
    predicted = {program.name: program for program in plan.programs}
    for each in compiled:
        program = predicted[each.name]
        counts = "\n".join(f"{count} {kind}" for kind, count in each.collectives.items())
        table.add_row(
            each.name,
            f"{size(program.peak)} / {size(each.peak)}",
            f"{size(program.temporaries)} / {size(each.temporaries)}",
            counts or "none",
            f"{each.seconds:.0f} s",
        )
    return table


def size(count: int | float) -> str:
    """Bytes for people, in decimal units as makers state them."""
    for unit, power in (("TB", 12), ("GB", 9), ("MB", 6)):
        if count >= 10**power:
            return f"{count / 10**power:.3g} {unit}"
    return f"{count / 1000:.3g} kB"


def duration(seconds: int | float) -> str:
    """A time for people."""
    if seconds < 1:
        return f"{1000 * seconds:.3g} ms"
    if seconds < 120:
        return f"{seconds:.3g} s"
    return f"{seconds / 60:.3g} min" if seconds < 7200 else f"{seconds / 3600:.3g} h"
