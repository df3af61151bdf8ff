"""Figures of a QRNCA run, drawn from its tables alone."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxneurons.plots.figures import (
    DISTINCT,
    MOST,
    PALETTE,
    draw_tables,
    heat_map,
    new_figure,
    new_panels,
    percent_with_interval,
)
from jaxneurons.plots.lettering import describe_axes, entitle, head, legend, name_x, name_y, note

Row = dict[str, Any]
Rows = Sequence[Row]
OWN, OTHER = PALETTE[0], "#B0B0B0"
BINS = 64
"""Columns of a neuron heat map, at most: each is as many neurons of a layer as it takes."""
PANELS = 24
"""Groups in a neuron map, at most."""


def draw(tables: dict[str, list[Row]], directory: Path, *, source: str = "") -> list[Path]:
    """Every figure whose table is there, as PNG, by the names of `FIGURES`."""
    return draw_tables(FIGURES, tables, directory, source=source)


def _names(rows: Rows, key: str) -> list[str]:
    return list(dict.fromkeys(row[key] for row in rows if row[key] is not None))


def _subplots(count: int, width: float, height: float) -> tuple[Any, list[Any]]:
    """Panels side by side, or above each other where they are wide: each so wide and so high."""
    if count * width <= MOST:
        figure, (panels,) = new_panels(1, count, count * width, height)
    else:
        figure, below = new_panels(count, 1, width, count * height)
        panels = [axes for (axes,) in below]
    return figure, panels


def _by(rows: Rows, *keys: str) -> dict[Any, Row]:
    """The first row of each value of a column, or of several."""
    cells: dict[Any, Row] = {}
    for row in rows:
        cells.setdefault(tuple(row[key] for key in keys), row)
    return cells


def _related_bars(
    panels: Sequence[Any],
    rows: Rows,
    key: str,
    names: Sequence[str],
    changes: Sequence[str],
    *,
    rotation: int = 0,
) -> None:
    """A panel for each change: related beside unrelated, for each value of a column."""
    cells = _by(rows, key, "change")
    for axes, change in zip(panels, changes, strict=True):
        for i, (which, colour) in enumerate((("related", OWN), ("unrelated", OTHER))):
            heights, spread = percent_with_interval([cells[name, change] for name in names], which)
            axes.bar(
                np.arange(len(names)) + (i - 0.5) * 0.38,
                heights,
                0.38,
                color=colour,
                label=f"{which} queries",
                yerr=spread,
                error_kw={"lw": 1},
            )
        axes.axhline(0, color="black", lw=0.8)
        axes.grid(axis="y", alpha=0.25, lw=0.5)
        name_x(axes, names, rotation=rotation)
        entitle(axes, change)
    describe_axes(panels[0], y="relative change of P(answer), %")
    legend(panels[0], fontsize=8)


def pcr(rows: Rows, source: str) -> Any:
    """Probability change ratio of every method, with intervals, on a logarithmic axis."""
    rows = [row for row in rows if row["group"] == "all" and row["pcr"]]
    methods, changes = _names(rows, "method"), _names(rows, "change")
    if not methods:
        return None
    figure, panels = _subplots(len(changes), 4.6, 0.9 + 0.36 * len(methods))
    ends = [row[key] for row in rows for key in ("pcr", "pcr_low", "pcr_high")]
    ends = [end for end in ends if end and np.isfinite(end)]
    low, high = min([0.3, *ends]), max([3.0, *ends])
    low, high = max(low, 0.01) / 1.5, min(high, 3000) * 1.5
    for axes, change in zip(panels, changes, strict=True):
        for y, method in enumerate(methods):
            row = next((r for r in rows if (r["method"], r["change"]) == (method, change)), None)
            if row is None:
                continue
            interval = [np.clip(row[key], low, high) for key in ("pcr_low", "pcr_high")]
            colour = OWN if method == "QRNCA" else "#666666"
            axes.plot(interval, [y, y], color=colour, lw=2, solid_capstyle="round")
            axes.plot(np.clip(row["pcr"], low, high), y, "o", color=colour, ms=6)
            note(
                axes,
                f"{row['pcr']:.1f}",
                (np.clip(row["pcr"], low, high), y),
                xytext=(0, 6),
                textcoords="offset points",
                ha="center",
                fontsize=8,
                color=colour,
            )
        axes.axvline(1, color="black", lw=0.8, ls=":")
        axes.set_xscale("log")
        axes.set(xlim=(low, high), ylim=(len(methods) - 0.5, -0.7))
        name_y(axes, methods if axes is panels[0] else [""] * len(methods))
        axes.grid(axis="x", alpha=0.25, lw=0.5)
        describe_axes(axes, x="|related change| / |unrelated change|")
        entitle(axes, change)
    head(figure, f"Probability change ratio, {source}")
    return figure


def changes(rows: Rows, source: str) -> Any:
    """QRNCA's relative change of the answer's probability by group, related beside unrelated."""
    rows = [row for row in rows if row["method"] == "QRNCA"]
    groups, kinds = _names(rows, "group"), _names(rows, "change")
    if not groups:
        return None
    figure, panels = _subplots(len(kinds), 0.7 + 0.62 * len(groups), 3.9)
    _related_bars(panels, rows, "group", groups, kinds, rotation=40)
    head(figure, f"QRNCA neurons changed, {source} (whiskers: 95 %)")
    return figure


def editing(rows: Rows, source: str) -> Any:
    """Share of prompts whose answer turns, by method."""
    rows = [row for row in rows if row["group"] == "all" and row["prompts"]]
    methods, turns = _names(rows, "method"), _names(rows, "turns")
    if not methods:
        return None
    figure, panels = _subplots(len(turns), 4.4, 0.9 + 0.4 * len(methods))
    for axes, turn in zip(panels, turns, strict=True):
        by_method = {row["method"]: row for row in rows if row["turns"] == turn}
        for y, method in enumerate(methods):
            row = by_method[method]
            ends = np.array([[row["rate"] - row["rate_low"]], [row["rate_high"] - row["rate"]]])
            axes.barh(
                y - 0.18,
                100 * row["rate"],
                0.36,
                xerr=100 * np.maximum(ends, 0),
                color=OWN,
                label="the query's neurons" if not y else None,
                error_kw={"lw": 1},
            )
            axes.barh(
                y + 0.18,
                100 * (row["unrelated"] or 0),
                0.36,
                color=OTHER,
                label="an unrelated query's" if not y else None,
            )
        name_y(axes, methods if axes is panels[0] else [""] * len(methods))
        axes.set_ylim(len(methods) - 0.5, -0.5)
        describe_axes(axes, x="prompts turned, %")
        axes.grid(axis="x", alpha=0.25, lw=0.5)
        first = by_method[methods[0]]
        entitle(axes, f"{turn} ({first['change']}, {first['prompts']} prompts)")
    legend(panels[-1], fontsize=8, loc="lower right")
    head(figure, f"Answers turned, {source} (whiskers: 95 %)")
    return figure


def overlap(rows: Rows, source: str) -> Any:
    """Share of a group's neurons that another group has too."""
    groups = _names(rows, "group")
    if len(groups) < 2:
        return None
    values = np.full((len(groups), len(groups)), np.nan)
    count = {row["group"]: row["neurons"] for row in rows}
    place = {group: i for i, group in enumerate(groups)}
    for row in rows:
        values[place[row["group"]], place[row["other"]]] = 100 * row["overlap"]
    return heat_map(
        values,
        rows=[f"{group} ({count[group]})" for group in groups],
        columns=groups,
        title=f"Neurons shared (% of the row's), {source}",
        limits=(0.0, 100.0),
        colours="Blues",
        xlabel="found in this group's queries too",
        ylabel="group (different neurons)",
    )


def layers(rows: Rows, source: str) -> Any:
    """In which layers the neurons of each group are: lines, or a heat map of many groups."""
    groups = _names(rows, "group")
    title = f"Layers of query-relevant neurons, {source}"
    lines: dict[str, list[tuple[int, float]]] = {group: [] for group in groups}
    for row in rows:
        lines[row["group"]].append((row["layer"], 100 * row["share"]))
    if len(groups) > DISTINCT:
        return _layer_map(lines, title)
    figure, axes = new_figure(7.6, 4.0)
    entries = []
    for i, group in enumerate(groups):
        (line,) = axes.plot(
            *zip(*lines[group], strict=True),
            color=PALETTE[i % len(PALETTE)],
            marker="o",
            ms=3,
            lw=1.5,
            ls="-" if i < len(PALETTE) else "--",
        )
        entries.append((line, group))
    axes.set_ylim(0, None)
    describe_axes(axes, x="layer", y="query-relevant neurons, %")
    axes.xaxis.get_major_locator().set_params(integer=True)
    legend(axes, entries, fontsize=8, ncols=2)
    entitle(axes, title)
    return figure


def _layer_map(lines: dict[str, list[tuple[int, float]]], title: str) -> Any:
    """Group x layer."""
    last = max(layer for line in lines.values() for layer, _ in line)
    values = np.zeros((len(lines), last + 1))
    for i, line in enumerate(lines.values()):
        for layer, share in line:
            values[i, layer] = share
    return heat_map(
        values,
        rows=list(lines),
        columns=[str(layer) for layer in range(last + 1)],
        title=f"{title} (%)",
        limits=(0.0, float(values.max())),
        colours="Blues",
        xlabel="layer",
        ylabel="group",
        rotation=0,
    )


def neuron_map(rows: Rows, source: str) -> Any:
    """Layers x neurons, accumulated naica: a panel for each group, neurons in bins.

    Of more than `PANELS` groups, those whose neurons weigh most.
    """
    from matplotlib.colors import PowerNorm

    groups = _names(rows, "group")
    if not groups:
        return None
    depth, width = rows[0]["num_layers"], rows[0]["width"]
    size = -(-width // BINS)
    columns = -(-width // size)
    every = len(groups)
    if every > PANELS:
        weight = dict.fromkeys(groups, 0.0)
        for row in rows:
            weight[row["group"]] += row["naica"]
        heaviest = set(sorted(groups, key=lambda group: -weight[group])[:PANELS])
        groups = [group for group in groups if group in heaviest]
    grids = {group: np.zeros((depth, columns)) for group in groups}
    for row in rows:
        if row["group"] in grids:
            grids[row["group"]][row["layer"], row["index"] // size] += row["naica"]
    top = max(grid.max() for grid in grids.values())
    across = min(3, len(groups))
    down = -(-len(groups) // across)
    height = (0.9 + 0.075 * max(depth, 12)) * down + 0.5
    figure, panels = new_panels(down, across, 3.9 * across + 0.8, height, share=True)
    image: Any = None
    flat = [axes for row in panels for axes in row]
    for axes, group in zip(flat, groups, strict=False):
        image = axes.imshow(
            grids[group],
            aspect="auto",
            origin="lower",
            cmap="magma_r",
            norm=PowerNorm(0.4, 0, max(top, 1e-30)),
            extent=(0, columns * size, -0.5, depth - 0.5),
            interpolation="nearest",
        )
        axes.spines[:].set_visible(True)
        entitle(axes, group, size=9)
        axes.tick_params(labelsize=7)
    for axes in flat[len(groups) :]:
        axes.set_visible(False)
    for axes, *_ in panels:
        describe_axes(axes, y="layer", size=8)
    for axes in panels[-1]:
        describe_axes(axes, x=f"neuron (bins of {size})" if size > 1 else "neuron", size=8)
    bar = figure.colorbar(image, ax=flat, shrink=0.8, pad=0.02)
    describe_axes(bar.ax, y="accumulated naica")
    some = f", the {PANELS} heaviest of {every} groups" if every > PANELS else ""
    head(figure, f"Where the neurons are{some}, {source}")
    return figure


def prediction(rows: Rows, source: str) -> Any:
    """Accuracy of reading the answer off a group's neurons, beside the model and chance."""
    groups = _names(rows, "group")
    readouts = [name for name in _names(rows, "readout") if name not in ("prompting", "chance")]
    if not groups or not readouts:
        return None
    bars = [("prompting", None, "prompting", "#CFE3F0")]
    bars += [(r, "own", f"{r}, own pool", PALETTE[i]) for i, r in enumerate(readouts)]
    bars += [(readouts[-1], "random", f"{readouts[-1]}, random pool", OTHER)]
    figure, axes = new_figure(2.4 + 1.25 * len(groups), 4.2)
    width = 0.84 / len(bars)
    cells = _by(rows, "group", "readout", "pool")
    for i, (readout, pool, label, colour) in enumerate(bars):
        pools = [cells[group, readout, pool] for group in groups]
        heights, spread = percent_with_interval(pools, "accuracy")
        axes.bar(
            np.arange(len(groups)) + (i - (len(bars) - 1) / 2) * width,
            heights,
            width,
            yerr=spread,
            color=colour,
            label=label,
            error_kw={"lw": 0.8},
        )
    chance = np.mean([row["accuracy"] for row in rows if row["readout"] == "chance"])
    axes.axhline(100 * chance, color="black", lw=0.8, ls=":", label="chance")
    axes.set_ylim(0, 100)
    name_x(axes, groups, rotation=40 if len(groups) > 4 else 0)
    describe_axes(axes, y="accuracy, %")
    entitle(axes, f"Answers from a group's neurons alone, {source} (whiskers: 95 %)")
    legend(figure, fontsize=8, ncols=3, loc="outside lower center")
    return figure


def kinds(rows: Rows, source: str) -> Any:
    """What suppressing and boosting the neurons of each kind does."""
    rows = [row for row in rows if row["method"] == "QRNCA"]
    sites, steps = _names(rows, "site"), _names(rows, "change")
    if not sites:
        return None
    figure, panels = _subplots(len(steps), 3.4, 3.4)
    _related_bars(panels, rows, "site", sites, steps)
    head(figure, f"Kinds of neurons, {source} (whiskers: 95 %)")
    return figure


FIGURES: dict[str, tuple[str, Callable[[Rows, str], Any]]] = {
    "pcr": ("evaluation", pcr),
    "changes": ("evaluation", changes),
    "editing": ("editing", editing),
    "overlap": ("overlap", overlap),
    "layers": ("layers", layers),
    "neurons": ("neurons", neuron_map),
    "prediction": ("prediction", prediction),
    "kinds": ("kinds", kinds),
}
"""By file name: the table that a figure is drawn from, and how."""
