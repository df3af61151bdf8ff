"""Figures of a QRNCA run, drawn from its tables alone."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxneurons.plots import PALETTE, draw_tables, entitle, heat_map, new_figure

Row = dict[str, Any]
Rows = Sequence[Row]
OWN, OTHER = PALETTE[0], "#B0B0B0"
BINS = 64
"""Columns of a neuron heat map, at most: each is as many neurons of a layer as it takes."""


def draw(tables: dict[str, list[Row]], directory: Path, *, source: str = "") -> list[Path]:
    """Every figure whose table is there, as PNG, by the names of `FIGURES`."""
    return draw_tables(FIGURES, tables, directory, source=source)


def _names(rows: Rows, key: str) -> list[str]:
    return list(dict.fromkeys(row[key] for row in rows if row[key] is not None))


def _subplots(count: int, width: float, height: float) -> tuple[Any, list[Any]]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots(1, count, squeeze=False)[0].tolist()
    for each in axes:
        each.spines[["top", "right"]].set_visible(False)
        each.set_axisbelow(True)
    return figure, axes


def _percent(rows: Rows, name: str) -> tuple[np.ndarray, np.ndarray]:
    """A column and its interval's distances below and above, in percent."""
    value, low, high = (
        np.array([np.nan if row[key] is None else row[key] for row in rows], np.float64)
        for key in (name, f"{name}_low", f"{name}_high")
    )
    spread = np.nan_to_num(np.stack([value - low, high - value]))
    return 100 * value, 100 * np.maximum(spread, 0)


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
    for axes, change in zip(panels, changes, strict=True):
        for i, (which, colour) in enumerate((("related", OWN), ("unrelated", OTHER))):
            found = [next(r for r in rows if (r[key], r["change"]) == (n, change)) for n in names]
            heights, spread = _percent(found, which)
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
        axes.set_xticks(
            range(len(names)), names, rotation=rotation, ha="right" if rotation else "center"
        )
        entitle(axes, change)
    panels[0].set_ylabel("relative change of P(answer), %")
    panels[0].legend(frameon=False, fontsize=8)


def pcr(rows: Rows, source: str) -> Any:
    """Probability change ratio of every method, with intervals, on a logarithmic axis."""
    rows = [row for row in rows if row["group"] == "all" and row["pcr"]]
    methods, changes = _names(rows, "method"), _names(rows, "change")
    if not methods:
        return None
    figure, panels = _subplots(len(changes), 4.6 * len(changes), 0.9 + 0.36 * len(methods))
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
            axes.annotate(
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
        axes.set_yticks(range(len(methods)), methods if axes is panels[0] else [""] * len(methods))
        axes.grid(axis="x", alpha=0.25, lw=0.5)
        axes.set_xlabel("|related change| / |unrelated change|")
        entitle(axes, change)
    _head(figure, f"Probability change ratio, {source}")
    return figure


def changes(rows: Rows, source: str) -> Any:
    """QRNCA's relative change of the answer's probability by group, related beside unrelated."""
    rows = [row for row in rows if row["method"] == "QRNCA"]
    groups, kinds = _names(rows, "group"), _names(rows, "change")
    if not groups:
        return None
    figure, panels = _subplots(len(kinds), 1.4 + 0.62 * len(groups) * len(kinds), 3.9)
    _related_bars(panels, rows, "group", groups, kinds, rotation=40)
    _head(figure, f"QRNCA neurons changed, {source} (whiskers: 95 %)")
    return figure


def editing(rows: Rows, source: str) -> Any:
    """Share of prompts whose answer turns, by method."""
    rows = [row for row in rows if row["group"] == "all" and row["prompts"]]
    methods, turns = _names(rows, "method"), _names(rows, "turns")
    if not methods:
        return None
    figure, panels = _subplots(len(turns), 4.4 * len(turns), 0.9 + 0.4 * len(methods))
    for axes, turn in zip(panels, turns, strict=True):
        found = {row["method"]: row for row in rows if row["turns"] == turn}
        for y, method in enumerate(methods):
            row = found[method]
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
        axes.set_yticks(range(len(methods)), methods if axes is panels[0] else [""] * len(methods))
        axes.set(ylim=(len(methods) - 0.5, -0.5), xlabel="prompts turned, %")
        axes.grid(axis="x", alpha=0.25, lw=0.5)
        entitle(
            axes, f"{turn} ({found[methods[0]]['change']}, {found[methods[0]]['prompts']} prompts)"
        )
    panels[-1].legend(frameon=False, fontsize=8, loc="lower right")
    _head(figure, f"Answers turned, {source} (whiskers: 95 %)")
    return figure


def overlap(rows: Rows, source: str) -> Any:
    """Share of a group's neurons that another group has too."""
    groups = _names(rows, "group")
    if len(groups) < 2:
        return None
    values = np.full((len(groups), len(groups)), np.nan)
    count = {row["group"]: row["neurons"] for row in rows}
    for row in rows:
        values[groups.index(row["group"]), groups.index(row["other"])] = 100 * row["overlap"]
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
    """In which layers the neurons of each group are."""
    groups = _names(rows, "group")
    figure, axes = new_figure(7.6, 4.0)
    for i, group in enumerate(groups):
        own = [row for row in rows if row["group"] == group]
        axes.plot(
            [row["layer"] for row in own],
            [100 * row["share"] for row in own],
            color=PALETTE[i % len(PALETTE)],
            marker="o",
            ms=3,
            lw=1.5,
            ls="-" if i < len(PALETTE) else "--",
            label=group,
        )
    axes.set(xlabel="layer", ylabel="query-relevant neurons, %", ylim=(0, None))
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.legend(frameon=False, fontsize=8, ncols=2)
    entitle(axes, f"Layers of query-relevant neurons, {source}")
    return figure


def neuron_map(rows: Rows, source: str) -> Any:
    """Layers x neurons, accumulated naica: a panel for each group, neurons in bins."""
    from matplotlib.colors import PowerNorm
    from matplotlib.figure import Figure

    groups = _names(rows, "group")
    if not groups:
        return None
    depth, width = rows[0]["num_layers"], rows[0]["width"]
    size = -(-width // BINS)
    columns = -(-width // size)
    grids = {group: np.zeros((depth, columns)) for group in groups}
    for row in rows:
        grids[row["group"]][row["layer"], row["index"] // size] += row["naica"]
    top = max(grid.max() for grid in grids.values())
    across = min(3, len(groups))
    down = -(-len(groups) // across)
    figure = Figure(figsize=(3.9 * across + 0.8, (0.9 + 0.075 * max(depth, 12)) * down + 0.5))
    figure.set_layout_engine("constrained")
    panels = figure.subplots(down, across, squeeze=False, sharex=True, sharey=True)
    image: Any = None
    for axes, group in zip(panels.flat, groups, strict=False):
        image = axes.imshow(
            grids[group],
            aspect="auto",
            origin="lower",
            cmap="magma_r",
            norm=PowerNorm(0.4, 0, max(top, 1e-30)),
            extent=(0, columns * size, -0.5, depth - 0.5),
            interpolation="nearest",
        )
        axes.set_title(group, loc="left", fontsize=9)
        axes.tick_params(labelsize=7)
    for axes in list(panels.flat)[len(groups) :]:
        axes.set_visible(False)
    for axes in panels[:, 0]:
        axes.set_ylabel("layer", fontsize=8)
    for axes in panels[-1]:
        axes.set_xlabel(f"neuron (bins of {size})" if size > 1 else "neuron", fontsize=8)
    figure.colorbar(image, ax=panels, shrink=0.8, pad=0.02, label="accumulated naica")
    _head(figure, f"Where the neurons are, {source}")
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
    for i, (readout, pool, label, colour) in enumerate(bars):
        found = [
            next(r for r in rows if (r["group"], r["readout"], r["pool"]) == (g, readout, pool))
            for g in groups
        ]
        heights, spread = _percent(found, "accuracy")
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
    axes.set_xticks(
        range(len(groups)),
        groups,
        rotation=40 if len(groups) > 4 else 0,
        ha="right" if len(groups) > 4 else "center",
    )
    axes.set(ylabel="accuracy, %", ylim=(0, 100))
    entitle(axes, f"Answers from a group's neurons alone, {source} (whiskers: 95 %)")
    axes.legend(frameon=False, fontsize=8, ncols=3, loc="upper center", bbox_to_anchor=(0.5, -0.2))
    return figure


def kinds(rows: Rows, source: str) -> Any:
    """What suppressing and boosting the neurons of each kind does."""
    rows = [row for row in rows if row["method"] == "QRNCA"]
    sites, steps = _names(rows, "site"), _names(rows, "change")
    if not sites:
        return None
    figure, panels = _subplots(len(steps), 3.4 * len(steps), 3.4)
    _related_bars(panels, rows, "site", sites, steps)
    _head(figure, f"Kinds of neurons, {source} (whiskers: 95 %)")
    return figure


def _head(figure: Any, text: str) -> None:
    """A title over all panels, from the left."""
    figure.suptitle(text, x=0.01, ha="left", fontsize=11)


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
