"""Figures of right answers lost, drawn from tables of drops; what all figures of a study share."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from jaxneurons.plots.figures import PALETTE, heat_map, new_figure
from jaxneurons.plots.lettering import describe_axes, entitle, legend, name_x
from jaxneurons.storage.tables import Row

Rows = Sequence[Row]
OWN, OTHERS, RANDOM, MATCHED = PALETTE[0], PALETTE[1], PALETTE[6], "#444444"
BEFORE = "#CFE3F0"


def names_of(rows: Rows, key: str = "relation") -> list[str]:
    """What is in a column, each once, in its order."""
    return list(dict.fromkeys(row[key] for row in rows))


def label(name: str) -> str:
    """A relation's name, or another, as figures have it."""
    return name.replace("_", " ")


def places_of(names: Sequence[str]) -> dict[str, int]:
    """The row or column of each name."""
    return {name: place for place, name in enumerate(names)}


def controls_of(rows: Rows, off: str, value: str = "drop") -> dict[str, list[float]]:
    """By relation, what a control has in a column; [] for relations without it."""
    values: dict[str, list[float]] = {name: [] for name in names_of(rows)}
    for row in rows:
        if row["off"] == off and row[value] is not None:
            values[row["relation"]].append(row[value])
    return values


def inter_relation(rows: Rows, source: str, evaluation: str = "eva") -> Any:
    """Relation x relation: the share of right answers lost, with a column for random neurons."""
    rows = [row for row in rows if row["evaluation"] == evaluation and row["counted"]]
    offs = [name for name in names_of(rows, "off") if name not in ("random", "matched")]
    switched = set(offs)
    names = [name for name in names_of(rows) if name in switched]
    if not names:
        return None
    values = np.full((len(names), len(offs) + 1), np.nan)
    down, across = places_of(names), places_of(offs)
    for row in rows:
        if row["relation"] in down and row["off"] in across and row["drop"] is not None:
            values[down[row["relation"]], across[row["off"]]] = row["drop"]
    random = controls_of(rows, "random")
    for i, name in enumerate(names):
        values[i, -1] = np.mean(random[name]) if random[name] else np.nan
    right = {row["relation"]: f"{row['right_before']}/{row['prompts']}" for row in rows}
    kind = "held-out facts" if evaluation == "eva" else "validated detection facts"
    return heat_map(
        100 * values,
        rows=[f"{label(name)}  {right[name]}" for name in names],
        columns=[*map(label, offs), "random"],
        title=f"Right answers lost (%), {kind}, {source}",
        xlabel=f"relation whose {_k(rows)} neurons are off",
        ylabel="relation asked, with answers right before",
        limits=(-100.0, 100.0),
        colours="RdBu_r",
        boxed=[(i, across[name]) for i, name in enumerate(names)],
    )


def _k(rows: Rows) -> str:
    return f"{max(row['k'] for row in rows):,}"


def intra_relation(rows: Rows, source: str) -> Any:
    """Accuracy of each relation: untouched, own neurons off, random ones off."""
    rows = [row for row in rows if row["evaluation"] == "eva"]
    switched = {row["off"] for row in rows}
    names = [name for name in names_of(rows) if name in switched]
    if not names:
        return None
    figure, axes = new_figure(max(9.6, 2.0 + 0.27 * len(names)), 4.6)
    x = np.arange(len(names))
    diagonal = {row["relation"]: row for row in rows if row["off"] == row["relation"]}
    bars: list[tuple[str, list[Any], list[Any] | None, str]] = [
        ("untouched", [diagonal[n]["accuracy_before"] for n in names], None, BEFORE),
        ("own neurons off", [diagonal[n]["accuracy"] for n in names], None, OWN),
    ]
    for off, text, colour in (
        ("random", "random neurons off", RANDOM),
        ("matched", "random, same layers and sites", MATCHED),
    ):
        controls = controls_of(rows, off, "accuracy")
        by_name = [controls[name] for name in names]
        if all(by_name):
            spread = [np.std(values, ddof=1) if len(values) > 1 else 0 for values in by_name]
            bars.append((text, [np.mean(values) for values in by_name], spread, colour))
    width = 0.84 / len(bars)
    for i, (text, heights, spread, colour) in enumerate(bars):
        axes.bar(
            x + (i - (len(bars) - 1) / 2) * width,
            heights,
            width,
            yerr=spread,
            color=colour,
            label=text,
            error_kw={"lw": 1},
        )
    name_x(axes, [label(n) for n in names], rotation=40)
    axes.set_ylim(0, 1)
    describe_axes(axes, y="accuracy on held-out facts")
    entitle(axes, f"{_k(rows)} neurons off, {source} (whiskers: s.d. over seeds)")
    legend(axes, ncols=2)
    return figure


def sizes(rows: Rows, source: str) -> Any:
    """Loss against the number of neurons: own, others', random."""
    steps = sorted({row["k"] for row in rows})
    used = [row for row in rows if row["counted"]]
    if not used:
        return None
    figure, axes = new_figure(7.2, 4.6)
    lines: dict[str, dict[int, float]] = {}
    for row in used:
        if row["off"] == row["relation"]:
            lines.setdefault(row["relation"], {})[row["k"]] = 100 * row["drop"]
    for line in lines.values():
        axes.plot(list(line), list(line.values()), color=OWN, alpha=0.18, lw=1)
    for text, colour, keep in (
        ("own neurons", OWN, lambda r: r["off"] == r["relation"]),
        ("other relations' neurons", OTHERS, lambda r: r["off"] not in ("random", r["relation"])),
        ("random neurons", RANDOM, lambda r: r["off"] == "random"),
    ):
        means, spreads = [], []
        for k in steps:
            groups: dict[Any, list[float]] = {}
            for row in used:
                if row["k"] == k and keep(row):
                    key = row["seed"] if row["off"] == "random" else row["relation"]
                    groups.setdefault(key, []).append(100 * row["drop"])
            drops = [np.mean(values) for values in groups.values()]
            means.append(np.mean(drops))
            over = np.std(drops, ddof=1) if len(drops) > 1 else 0.0
            spreads.append(over if text.startswith("random") else over / np.sqrt(len(drops)))
        low, high = np.subtract(means, spreads), np.add(means, spreads)
        axes.fill_between(steps, low, high, color=colour, alpha=0.15, lw=0)
        axes.plot(steps, means, "o-", color=colour, ms=4, label=text)
    axes.axhline(0, color="black", lw=0.6)
    axes.set_xscale("log")
    describe_axes(axes, x="neurons off", y="right answers lost (%)")
    lowest = min(-10.0, min(100 * r["drop"] for r in used if r["off"] == r["relation"]))
    axes.set_ylim(max(lowest, -60) - 5, 105)
    entitle(axes, f"Number of neurons, {source} (bands: s.e. over relations; random: s.d.)")
    legend(axes, loc="upper left")
    return figure


def types(rows: Rows, source: str) -> Any:
    """Mean losses for each kind of neuron: own, others', random."""
    kinds = names_of(rows, "type")
    figure, axes = new_figure(max(7.2, 1.6 + 0.4 * len(kinds)), 4.2)
    x = np.arange(len(kinds))
    tests: list[tuple[str, str, Callable[[Row], bool]]] = [
        ("own neurons", OWN, lambda r: r["off"] == r["relation"]),
        ("other relations' neurons", OTHERS, lambda r: r["off"] not in ("random", r["relation"])),
        ("random neurons", RANDOM, lambda r: r["off"] == "random"),
    ]
    for number, (text, colour, keep) in enumerate(tests):
        heights = []
        for kind in kinds:
            drops = [r["drop"] for r in rows if r["type"] == kind and keep(r) and r["counted"]]
            heights.append(100 * np.mean(drops or [np.nan]))
        axes.bar(x + 0.27 * (number - 1), heights, 0.27, color=colour, label=text)
    sizes = {row["type"]: row["k"] for row in rows}
    axes.axhline(0, color="black", lw=0.6)
    name_x(
        axes,
        [f"{label(kind)}: {sizes[kind]:,}" for kind in kinds],
        label="kind of neuron, and how many are off",
        rotation=0 if len(kinds) <= 4 else 40,
    )
    describe_axes(axes, y="right answers lost (%), mean")
    entitle(axes, f"Kinds of neurons, {source}")
    legend(axes)
    return figure


def multilingual_drops(rows: Rows, source: str) -> Any:
    """Right answers lost in other languages: own neurons off, random ones off."""
    random: dict[tuple[str, str], list[float]] = {}
    for row in rows:
        if row["off"] == "random" and row["drop"] is not None:
            random.setdefault((row["relation"], row["language"]), []).append(row["drop"])
    pairs = [
        (
            f"{label(row['relation'])}, {row['language']}",
            row["drop"],
            random.get((row["relation"], row["language"]), []),
        )
        for row in rows
        if row["off"] == row["relation"] and row["counted"]
    ]
    return _paired_bars(pairs, f"Other languages, {source}") if pairs else None


def robustness(rows: Rows, source: str) -> Any:
    """Right answers lost in other wordings: own neurons off, random ones off."""
    diagonal = {
        r["relation"]: r["drop"] for r in rows if r["off"] == r["relation"] and r["counted"]
    }
    random = controls_of(rows, "random")
    pairs = [(label(name), value, random[name]) for name, value in diagonal.items()]
    if not pairs:
        return None
    return _paired_bars(pairs, f"The held-out facts in another wording, {source}")


def _paired_bars(pairs: Sequence[tuple[str, float, Sequence[float]]], title: str) -> Any:
    figure, axes = new_figure(max(5.0, 2.0 + 0.55 * len(pairs)), 4.4)
    x = np.arange(len(pairs))
    axes.bar(x - 0.2, [100 * drop for _, drop, _ in pairs], 0.4, color=OWN, label="own neurons off")
    axes.bar(
        x + 0.2,
        [100 * np.mean(drops) if drops else 0 for *_, drops in pairs],
        0.4,
        yerr=[100 * np.std(drops, ddof=1) if len(drops) > 1 else 0 for *_, drops in pairs],
        color=RANDOM,
        label="random neurons off",
        error_kw={"lw": 1},
    )
    axes.axhline(0, color="black", lw=0.6)
    name_x(axes, [name for name, *_ in pairs], rotation=40)
    describe_axes(axes, y="right answers lost (%)")
    entitle(axes, title)
    legend(figure, loc="outside lower center", ncols=2)
    return figure
