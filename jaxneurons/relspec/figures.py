"""Figures of a study of relation-specific neurons, drawn from its tables alone."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxneurons.plots.figures import DISTINCT, PALETTE, draw_tables, heat_map, new_figure
from jaxneurons.plots.lettering import describe_axes, entitle, legend, name_x, name_y, note
from jaxneurons.prompts.matching import ERRORS
from jaxneurons.relspec.drop_figures import (
    BEFORE,
    OTHERS,
    OWN,
    RANDOM,
    Rows,
    controls_of,
    inter_relation,
    intra_relation,
    label,
    multilingual_drops,
    names_of,
    places_of,
    robustness,
    sizes,
    types,
)
from jaxneurons.storage.tables import Row


def draw(tables: Mapping[str, Sequence[Row]], directory: Path, *, source: str = "") -> list[Path]:
    """Every figure whose table is there, as PNG, by the names of `FIGURES`."""
    return draw_tables(FIGURES, tables, directory, source=source)


def make_figures(tables: Mapping[str, Sequence[Row]], *, source: str = "") -> dict[str, Any]:
    """Every figure whose table is there, by the names of `FIGURES`."""
    drawn = {
        name: function(rows, source)
        for name, (table, function) in FIGURES.items()
        if (rows := tables.get(table))
    }
    return {name: figure for name, figure in drawn.items() if figure is not None}


def layers(rows: Rows, source: str, key: str = "relation") -> Any:
    """Relation x layer: where the neurons are."""
    names, last = names_of(rows, key), max(row["layer"] for row in rows)
    values, place = np.zeros((len(names), last + 1)), places_of(names)
    for row in rows:
        values[place[row[key]], row["layer"]] += row["neurons"]
    shares = 100 * values / values.sum(1, keepdims=True)
    return heat_map(
        shares,
        rows=[label(name) for name in names],
        columns=[str(layer) for layer in range(last + 1)],
        title=f"Share of the neurons of each {key} in each layer (%), {source}",
        xlabel="layer",
        ylabel="",
        limits=(0.0, float(shares.max())),
        colours="Blues",
        rotation=0,
    )


def type_layers(rows: Rows, source: str) -> Any:
    """Layer distribution of the neurons of each kind, over all relations."""
    kinds = names_of(rows, "type")
    if len(kinds) > DISTINCT:
        return layers(rows, source, "type")
    figure, axes = new_figure(7.2, 4.0)
    last = max(row["layer"] for row in rows)
    entries = []
    for number, kind in enumerate(kinds):
        counts = np.zeros(last + 1)
        for row in rows:
            if row["type"] == kind:
                counts[row["layer"]] += row["neurons"]
        colour = PALETTE[number % len(PALETTE)]
        style = "o-" if number < len(PALETTE) else "o--"
        (line,) = axes.plot(100 * counts / counts.sum(), style, ms=3, color=colour)
        entries.append((line, label(kind)))
    describe_axes(axes, x="layer", y="share of the neurons (%)")
    entitle(axes, f"Where neurons of each kind are, {source}")
    legend(axes, entries, ncols=3)
    return figure


def overlap(rows: Rows, source: str) -> Any:
    """Relation x relation: shared neurons."""
    names = names_of(rows)
    values, place = np.zeros((len(names), len(names))), places_of(names)
    for row in rows:
        values[place[row["relation"]], place[row["other"]]] = row["shared"]
    others = values[~np.eye(len(names), dtype=bool)]
    k, chance = rows[0]["k"], rows[0]["by_chance"]
    return heat_map(
        values,
        rows=[label(name) for name in names],
        columns=[label(name) for name in names],
        title=f"Shared neurons of {k:,} ({chance:.1f} by chance), {source}",
        limits=(0.0, float(others.max()) if len(others) else 1.0),
        colours="Blues",
    )


def cumulativity(rows: Rows, source: str) -> Any:
    """Answers broken by each step in size, and how many of them by the additions alone."""
    figure, axes = new_figure(7.2, 4.0)
    steps = list(dict.fromkeys((row["a"], row["b"]) for row in rows))
    x = np.arange(len(steps))
    sums = {
        name: [sum(r[name] for r in rows if (r["a"], r["b"]) == step) for step in steps]
        for name in ("total", "affected")
    }
    axes.bar(x, sums["total"], 0.7, color=BEFORE, label="broken by the larger set")
    axes.bar(x, sums["affected"], 0.7, color=OWN, label="of those, by the additions alone")
    for i, (total, affected) in enumerate(zip(*sums.values(), strict=True)):
        if total:
            note(axes, f"{1 - affected / total:.2f}", (i, total), ha="center", va="bottom")
    name_x(axes, [f"{a:,} to {b:,}" for a, b in steps], rotation=25)
    describe_axes(axes, y="held-out answers, all relations")
    entitle(axes, f"Cumulativity (above the bars), {source}")
    axes.set_ylim(0, 1.35 * max(1, *sums["total"]))
    legend(axes, loc="upper left", ncols=2)
    return figure


def multilingual(rows: Rows, source: str) -> Any:
    """Detection facts answered in each language; grey where that is too few to go on."""
    names, languages = names_of(rows), names_of(rows, "language")
    values = np.full((len(names), len(languages)), np.nan)
    down, across = places_of(names), places_of(languages)
    for row in rows:
        share = 100 * row["validated"] / max(row["detection"], 1)
        values[down[row["relation"]], across[row["language"]]] = share
    unknown = sum(not row["known"] for row in rows)
    return heat_map(
        values,
        rows=[label(name) for name in names],
        columns=languages,
        title=f"Answered in other languages (%), {unknown} of {len(rows)} unknown, {source}",
        limits=(0.0, 100.0),
        colours="Blues",
        rotation=0,
    )


def concepts(rows: Rows, source: str) -> Any:
    """Concept x relation: shared neurons."""
    kinds, names = names_of(rows, "concept"), names_of(rows)
    values = np.zeros((len(kinds), len(names)))
    down, across = places_of(kinds), places_of(names)
    boxed = []
    for row in rows:
        cell = down[row["concept"]], across[row["relation"]]
        values[cell] = row["shared"]
        boxed += [cell] if row["own_type"] else []
    return heat_map(
        values,
        rows=[label(kind) for kind in kinds],
        columns=[label(name) for name in names],
        title=f"Neurons shared with concepts ({rows[0]['by_chance']:.1f} by chance), {source}",
        xlabel="relation (boxed: its subjects are of the type)",
        ylabel="concept",
        limits=(0.0, float(max(values.max(), 1))),
        colours="Blues",
        boxed=boxed,
    )


def perplexity(rows: Rows, source: str) -> Any:
    """Perplexity of neutral sentences against the untouched model."""
    names = names_of(rows)
    figure, axes = new_figure(max(8.4, 1.6 + 0.24 * len(names)), 4.4)
    x = np.arange(len(names))
    ratios = {r["relation"]: r["ratio"] for r in rows if r["relation"] == r["off"]}
    diagonal = [ratios[name] for name in names]
    controls = controls_of(rows, "random", "ratio")
    random = [controls[name] for name in names]
    means = np.array([np.mean(values) for values in random])
    ends = np.array([[np.min(values), np.max(values)] for values in random]).T
    axes.axhline(1, color="black", lw=0.6)
    axes.errorbar(
        x + 0.12,
        means,
        yerr=np.abs(ends - means),
        fmt="s",
        color=RANDOM,
        label="random neurons off (mean, range over seeds)",
        elinewidth=1,
    )
    axes.plot(x - 0.12, diagonal, "o", color=OWN, label="own neurons off")
    name_x(axes, [label(n) for n in names], rotation=40)
    describe_axes(axes, y="perplexity, times the untouched model's")
    entitle(axes, f"Sentences that say nothing of the relation, {source}")
    legend(figure, loc="outside lower center", ncols=2)
    return figure


def errors(rows: Rows, source: str) -> Any:
    """What wrong answers look like, by condition."""
    conditions = {"none": "untouched", "own": "own neurons off", "random": "random neurons off"}
    figure, axes = new_figure(7.2, 3.2)
    left = np.zeros(len(conditions))
    counts = {off: dict.fromkeys(ERRORS, 0) for off in conditions}
    for row in rows:
        counts[row["off"]][row["error"]] += row["answers"]
    totals = [max(sum(counts[off].values()), 1) for off in conditions]
    for number, error in enumerate(ERRORS):
        shares = np.array([100 * counts[o][error] / t for o, t in zip(conditions, totals)])  # noqa: B905
        axes.barh(range(len(conditions)), shares, left=left, color=PALETTE[number], label=error)
        for i, share in enumerate(shares):
            if share >= 4:
                note(
                    axes,
                    f"{share:.0f}",
                    (left[i] + share / 2, i),
                    ha="center",
                    va="center",
                    color="white",
                    fontsize=8,
                )
        left += shares
    axes.set_xlim(0, 100)
    describe_axes(axes, x="share of the wrong answers (%)")
    name_y(axes, list(conditions.values()))
    axes.invert_yaxis()
    entitle(axes, f"Wrong answers, {source}")
    legend(figure, loc="outside lower center", ncols=5, fontsize=8)
    return figure


def frequency(rows: Rows, source: str) -> Any:
    """How often resilient and sensitive facts occur, by relation."""
    names = names_of(rows)
    figure, axes = new_figure(max(7.2, 1.6 + 0.24 * len(names)), 4.2)
    place = places_of(names)
    for shift, kind, colour in ((-0.12, "resilient", OWN), (0.12, "sensitive", OTHERS)):
        points = [(place[r["relation"]] + shift, 1 + r["count"]) for r in rows if r["kind"] == kind]
        if points:
            axes.scatter(*zip(*points, strict=True), s=14, color=colour, alpha=0.6, label=kind)
    name_x(axes, [label(n) for n in names], rotation=40)
    axes.set_yscale("log")
    describe_axes(axes, y="1 + count of the fact")
    entitle(axes, f"Fact frequency, {source}")
    legend(axes)
    return figure


FIGURES: dict[str, tuple[str, Callable[[Rows, str], Any]]] = {
    "inter_relation": ("ablation", inter_relation),
    "inter_relation_detection": ("ablation", lambda rows, s: inter_relation(rows, s, "det")),
    "intra_relation": ("ablation", intra_relation),
    "sizes": ("sizes", sizes),
    "layers": ("layers", layers),
    "overlap": ("overlap", overlap),
    "cumulativity": ("cumulativity", cumulativity),
    "languages": ("languages", multilingual),
    "multilingual": ("multilingual", multilingual_drops),
    "robustness": ("robustness", robustness),
    "concepts": ("concepts", concepts),
    "perplexity": ("perplexity", perplexity),
    "types": ("types", types),
    "type_layers": ("type_layers", type_layers),
    "errors": ("errors", errors),
    "frequency": ("frequency", frequency),
}
"""By name of the file: the table that it is drawn from, and the function."""
