"""What people see of relation-specific neurons: tables of the terminal, from a run's tables."""

from collections.abc import Sequence
from pathlib import Path

from rich import box
from rich.table import Table

from jaxneurons.storage.tables import Row, read_tables
from jaxneurons.terminal.console import console, formatted, shown_name


def show_study(out: Path) -> None:
    """A study's results so far, from the tables of its directory."""
    tables = read_tables(out / "tables")
    known = [row for row in tables["relations"] if row["known"]]
    unknown = [row["relation"] for row in tables["relations"] if not row["known"]]
    diagonal = {r["relation"]: r for r in tables.get("ablation", []) if _is_diagonal(r)}
    table = Table(
        title="Answers right, and the share of those held out that is lost",
        title_justify="left",
        box=box.SIMPLE_HEAD,
    )
    table.add_column("relation", no_wrap=True)
    for name in ("detection", "held out", "own off", "others off", "random off"):
        table.add_column(name, justify="right")
    for row in known:
        name = row["relation"]
        cells = [f"{row['validated']}/{row['detection']}"]
        if name in diagonal:
            cells += [f"{diagonal[name]['right_before']}/{diagonal[name]['prompts']}"]
            cells += _drops(tables["ablation"], name)
        table.add_row(shown_name(name), *cells)
    summary = [
        row
        for row in tables.get("summary", [])
        if (row["analysis"], row["evaluation"]) == ("ablation", "eva")
    ]
    for row in summary:
        table.add_section()
        spread = f" ± {row['random_spread']:.0%}" if row["random_spread"] is not None else ""
        table.add_row(
            f"mean of {row['relations']}",
            "",
            f"{row['right_before']} right",
            f"{row['diagonal']:.0%}",
            "" if row["off_diagonal"] is None else f"{row['off_diagonal']:.0%}",
            f"{row['random']:.0%}{spread}",
        )
    console.print(table)
    if diagonal:
        console.print("Negative: more answers are right than before.")
    few = [name for name, row in diagonal.items() if not row["counted"]]
    if few:
        console.print(f"Too few right answers to be averaged: {', '.join(few)}.")
    if unknown:
        console.print(f"Unknown to the model, left out: {', '.join(unknown)}.")
    folders = [name for name in ("figures", "neurons", "tables") if (out / name).is_dir()]
    console.print(f"Written: {out}/{{{','.join(folders)}}}, {len(tables)} tables")


def show_comparison(rows: Sequence[Row]) -> None:
    """Neurons that relations share in two runs."""
    table = Table(
        title="Neurons of relations of one name in two runs",
        title_justify="left",
        box=box.SIMPLE_HEAD,
    )
    table.add_column("relation", no_wrap=True)
    for name in ("neurons", "shared", "with other relations", "wording"):
        table.add_column(name, justify="right")
    for row in sorted(rows, key=lambda row: (-row["same_wording"], -row["shared"])):
        table.add_row(
            shown_name(row["relation"]),
            f"{row['neurons']}, {row['other_neurons']}",
            str(row["shared"]),
            formatted(row["shared_others"], ".0f"),
            "the same" if row["same_wording"] else "other",
        )
    console.print(table)


def _is_diagonal(row: Row) -> bool:
    return row["off"] == row["relation"] and row["evaluation"] == "eva"


def _drops(rows: Sequence[Row], relation: str) -> list[str]:
    """Own, others' and random: mean drops of one relation's held-out answers."""
    here = [r for r in rows if r["relation"] == relation and r["evaluation"] == "eva"]
    groups = (
        [r["drop"] for r in here if r["off"] == relation],
        [r["drop"] for r in here if r["off"] not in ("random", "matched", relation)],
        [r["drop"] for r in here if r["off"] == "random"],
    )
    drops = [[value for value in group if value is not None] for group in groups]
    return [f"{sum(group) / len(group):.0%}" if group else "" for group in drops]
