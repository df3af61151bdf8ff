"""What people see of query-relevant neurons: tables of the terminal, from a run or its tables."""

from pathlib import Path
from typing import TYPE_CHECKING

from rich import box
from rich.table import Table

from jaxneurons.qrnca.prompt_cache import Caches
from jaxneurons.storage.printable import counted
from jaxneurons.storage.tables import Row
from jaxneurons.terminal.console import console, formatted, shown_name

if TYPE_CHECKING:
    from jaxneurons.qrnca.demonstration import Demo
    from jaxneurons.qrnca.run import Run

GROUPS = 6
"""Groups beside each other in a table, at most; more of them are its rows."""


def show_located(run: "Run", out: Path) -> None:
    """A run's neurons in numbers, how exact they are, and where they were written."""
    facts = run.facts
    answers, exact, counts = facts["answers"], facts["completeness"], facts["neurons_per_query"]
    table = Table(
        title=f"{counted(facts['queries'], 'query', 'queries')}, "
        f"{counted(facts['prompts'], 'prompt')}",
        title_justify="left",
        box=box.SIMPLE_HEAD,
    )
    table.add_column("what")
    table.add_column("found", justify="right")
    rows = [
        (
            "neurons per query (mean, min, max)",
            f"{counts['mean']:.1f}  {counts['min']}  {counts['max']}",
        ),
        ("common neurons left out", f"{len(run.common)}"),
        ("answers right", f"{answers['accuracy']:.1%}"),
        ("answer probability, mean", f"{answers['probability_mean']:.4f}"),
    ]
    if answers["option_mass_mean"] is not None:
        rows.append(("probability of all options, mean", f"{answers['option_mass_mean']:.4f}"))
    rows += [
        (
            "completeness gap (median, largest)",
            f"{exact['gap_median']:.1e}  {exact['gap_max']:.1e} (layer {exact['gap_max_layer']})",
        ),
        ("quadrature nodes per prompt", f"{exact['nodes_mean']:.0f}"),
        (
            "seconds of attribution (per prompt)",
            f"{facts['seconds']['attribution']:.1f} ({facts['seconds']['per_prompt']:.2f})",
        ),
    ]
    for row in rows:
        table.add_row(*row)
    console.print(table)
    empty = sum(not located.ranking for located in run.values())
    if empty:
        have = "query has" if empty == 1 else "queries have"
        console.print(f"{empty:,} {have} no neurons of their own: all of theirs are common.")
    console.print(f"Written: {out}/neurons.jsonl, common_neurons.json, run.json")
    kept = Caches(out).size()
    if kept:
        console.print(
            f"Kept for evaluate and edit: {kept / 2**30:.2f} GiB; without it they run every "
            "prompt again:"
        )
        console.print(f"  {out}/caches", soft_wrap=True)


def show_demo(result: "Demo", out: Path) -> None:
    """What the demo found and where it is."""
    if result.unknown:
        console.print(f"Not known in every wording, left out: {', '.join(result.unknown)}.")
    table = Table(
        title="The answer's probability, with neurons turned off at the last prompt position",
        title_justify="left",
        caption="lost: share of prompts whose answer is no longer the model's first choice",
        caption_justify="left",
        box=box.SIMPLE_HEAD,
    )
    table.add_column("facts")
    for name in ("n", "neurons", "before", "own off", "lost", "random off", "lost"):
        table.add_column(name, justify="right", no_wrap=True)
    for effect in result.effects:
        if effect.group == "all":
            table.add_section()
        table.add_row(
            shown_name(effect.group),
            f"{effect.facts}",
            f"{effect.neurons:.1f}",
            f"{effect.before:.3f}",
            f"{effect.suppressed:.3f}",
            f"{effect.lost:.0%}",
            f"{effect.random:.3f} ± {effect.random_spread:.3f}",
            f"{effect.random_lost:.0%}",
        )
    console.print(table)
    exact, seconds = result.run.facts["completeness"], result.run.facts["seconds"]
    console.print(
        f"Attribution: {seconds['attribution']:.1f} s, {exact['nodes_mean']:.0f} nodes per prompt; "
        f"completeness gap {exact['gap_median']:.1e} median, {exact['gap_max']:.1e} largest."
    )
    console.print(f"Written: {out}/neurons.jsonl, effects.json, run.json and {result.figure}")


def show_evaluation(rows: list[Row]) -> None:
    """The probability change ratio of every method, all groups together."""
    for change in dict.fromkeys(row["change"] for row in rows):
        table = _narrow(f"{change.capitalize()}: relative change of the answer's probability, in %")
        for name in ("related", "unrelated", "PCR", "95 %", "abs.", "share", "beyond"):
            table.add_column(name, justify="right", no_wrap=True)
        for row in rows:
            if row["group"] == "all" and row["change"] == change:
                table.add_row(
                    row["method"],
                    _percent(row["related"]),
                    _percent(row["unrelated"]),
                    _ratio(row["pcr"]),
                    f"{_ratio(row['pcr_low'])} to {_ratio(row['pcr_high'])}",
                    _ratio(row["absolute_pcr"]),
                    formatted(row["share"], ".0%"),
                    _percent(row["beyond"]),
                )
        console.print(table)
    console.print(
        "Probability: of the whole answer. PCR: |related| / |unrelated|; abs.: of "
        "absolute changes, which cannot cancel. Share: what the "
        "neurons hold of the sum of all attributions (negative ones count, so it can exceed 100 %; "
        "scores below the run's threshold count 0). Beyond: related change less that of random "
        "neurons matched in layer and activation."
    )


def show_editing(rows: list[Row]) -> None:
    """Answers turned by every method, all groups together."""
    for turns in dict.fromkeys(row["turns"] for row in rows):
        here = [row for row in rows if row["turns"] == turns and row["group"] == "all"]
        if not here[0]["prompts"]:
            console.print(f"Answers turned {turns}: none could be.")
            continue
        title = f"Answers turned {turns} ({here[0]['change']}, of {here[0]['prompts']} prompts)"
        table = _narrow(title)
        for name in ("turned", "95 %", "by an unrelated query's"):
            table.add_column(name, justify="right", no_wrap=True)
        for row in here:
            table.add_row(
                row["method"],
                formatted(row["rate"], ".1%"),
                f"{formatted(row['rate_low'], '.1%')} to {formatted(row['rate_high'], '.1%')}",
                formatted(row["unrelated"], ".1%"),
            )
        console.print(table)


def _percent(value: float | None) -> str:
    return "" if value is None else f"{100 * value:+,.{2 if abs(value) < 0.01 else 1}f}"


def _ratio(value: float | None) -> str:
    return "" if value is None else f"{value:,.0f}" if value >= 10 else f"{value:.1f}"


def _narrow(title: str) -> Table:
    """A table of methods that fits 80 columns: where numbers need room, names take two lines."""
    console.print(title, style="italic")
    table = Table(box=box.SIMPLE_HEAD, padding=0)
    table.add_column("method")
    return table


def show_prediction(rows: list[Row]) -> None:
    """Accuracy of reading answers off neurons, by group."""
    groups = list(dict.fromkeys(row["group"] for row in rows))
    kinds = list(dict.fromkeys((row["readout"], row["pool"]) for row in rows))
    across = [f"{readout}, {pool}" if pool else readout for readout, pool in kinds]
    cells = [
        [f"{r['accuracy']:.0%}" for r in rows if (r["readout"], r["pool"]) == kind]
        for kind in kinds
    ]
    down, corner = [shown_name(group) for group in groups], "group"
    if len(groups) <= GROUPS:
        across, down, corner = down, across, "readout, neurons"
    else:
        cells = list(zip(*cells, strict=True))
    table = Table(
        title="Right answers read off a group's neurons", title_justify="left", box=box.SIMPLE_HEAD
    )
    table.add_column(corner, no_wrap=True)
    for name in across:
        table.add_column(name, justify="right")
    for name, values in zip(down, cells, strict=True):
        table.add_row(name, *values)
    console.print(table)
