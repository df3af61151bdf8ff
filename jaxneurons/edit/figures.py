"""Figures of what edits did, drawn from the tables of an evaluation alone."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxneurons.edit.summaries import UNEDITED
from jaxneurons.plots.figures import PALETTE, draw_tables, new_panels, percent_with_interval
from jaxneurons.plots.lettering import describe_axes, entitle, head, legend, name_y
from jaxneurons.storage.tables import Row

Rows = Sequence[Row]
FORCED, FREE, GREY = "#B0B0B0", PALETTE[0], "#666666"
TITLES = {
    "efficacy": "the edit's prompt",
    "generalisation": "paraphrases",
    "portability": "what follows from it",
}
MARKS = "osD^vPX*"
"""Of methods, beside their colour."""


def draw(tables: dict[str, list[Row]], directory: Path, *, source: str = "") -> list[Path]:
    """Every figure whose table is there, as PNG, by the names of `DRAWN`."""
    return draw_tables(DRAWN, tables, directory, source=source)


def success(rows: Rows, source: str) -> Any:
    """Exact match of every method: teacher forcing beside free generation, and its control."""
    kinds = ("efficacy", "generalisation", "portability")
    kinds = [kind for kind in kinds if any(row[f"{kind}_free"] is not None for row in rows)]
    if not kinds:
        return None
    methods = [row for row in rows if not row["control"]]
    controls = {row["method"]: row for row in rows if row["control"]}
    figure, (panels,) = new_panels(
        1, len(kinds), 1.6 + 3.4 * len(kinds), 1.7 + 0.5 * len(methods), share=False
    )
    entries: dict[str, Any] = {}
    for axes, kind in zip(panels, kinds, strict=True):
        for offset, how, colour, label in (
            (-0.19, "forced", FORCED, "teacher forcing"),
            (0.19, "free", FREE, "free generation"),
        ):
            places = np.arange(len(methods)) + offset
            values, spread = percent_with_interval(methods, f"{kind}_{how}")
            bars = axes.barh(places, np.nan_to_num(values), 0.38, color=colour)
            axes.errorbar(values, places, xerr=spread, fmt="none", ecolor="black", lw=1)
            entries.setdefault(label, bars)
            marked = [n for n, row in enumerate(methods) if row["method"] in controls]
            if marked:
                random = [controls[methods[n]["method"]] for n in marked]
                ticks = axes.plot(
                    percent_with_interval(random, f"{kind}_{how}")[0],
                    places[marked],
                    "D",
                    color=PALETTE[4],
                    ms=4,
                    ls="",
                    clip_on=False,
                )
                entries["a random change of the same size"] = ticks[0]
        axes.set(xlim=(0, 103), ylim=(len(methods) - 0.5, -0.5))
        axes.grid(axis="x", alpha=0.25, lw=0.5)
        first = axes is panels[0]
        name_y(axes, [row["method"] if first else "" for row in methods])
        describe_axes(axes, x="exact match, %")
        entitle(axes, TITLES[kind])
    shown = [(drawn, label) for label, drawn in entries.items()]
    legend(figure, shown, loc="outside lower center", ncols=3)
    head(figure, f"New answer given after an edit, {source} (whiskers: 95 %)")
    return figure


def trade(rows: Rows, source: str) -> Any:
    """Locality against efficacy of every method, forced and free, with intervals."""
    rows = [row for row in rows if row["locality_free"] is not None]
    if not rows:
        return None
    figure, (panels,) = new_panels(1, 2, 10.0, 4.8)
    methods = list(dict.fromkeys(row["method"] for row in rows if row["method"] != UNEDITED))
    entries: dict[str, Any] = {}
    for axes, how, title in zip(
        panels, ("forced", "free"), ("teacher forcing", "free generation"), strict=True
    ):
        for row in rows:
            x, across = percent_with_interval([row], f"efficacy_{how}")
            y, up = percent_with_interval([row], f"locality_{how}")
            colour, mark = _look(row["method"], methods)
            # Larger below, so that methods at the same place are all seen.
            known = row["method"] in methods
            size = 12 - 6 * methods.index(row["method"]) / len(methods) if known else 14
            axes.errorbar(x, y, xerr=across, yerr=up, fmt="none", lw=1, ecolor=colour, alpha=0.6)
            filled = (
                {"mfc": "white", "mew": 1.2} if row["control"] else {"mew": 0.5, "mec": "white"}
            )
            bars = axes.plot(x, y, mark, ms=size, color=colour, **filled)[0]
            entries.setdefault(_label(row), bars)
        axes.set(xlim=(-4, 104), ylim=(-4, 104))
        axes.grid(alpha=0.25, lw=0.5)
        describe_axes(axes, x="edits that give the new answer, %")
        entitle(axes, title)
    describe_axes(panels[0], y="neighbours that are as they were, %")
    legend(
        figure,
        [(bars, label) for label, bars in entries.items()],
        loc="outside right center",
        fontsize=9,
    )
    head(figure, f"Locality against efficacy, {source} (whiskers: 95 %)")
    return figure


CURVES = (
    ("efficacy_forced", "new answer by teacher forcing, %"),
    ("efficacy_free", "new answer in free generation, %"),
    ("generalisation_free", "paraphrases, free generation, %"),
    ("locality_free", "neighbours as they were, free, %"),
    ("fluency", "fluency, bits"),
    ("perplexity_ratio", "perplexity, times the unedited"),
)
MODEL_WIDE = ("fluency", "perplexity_ratio")
"""Measures that are of the model, and hardly differ by group."""
STYLES = {"first": ":", "last": "--", "all": "-"}


def sequential(rows: Rows, source: str) -> Any:
    """Every measure after more and more edits of one model; first, last and all edits."""
    unedited = {row["group"]: row for row in rows if row["method"] == UNEDITED}
    controls = [row for row in rows if row["control"] and row["group"] == "all"]
    rows = [row for row in rows if row["method"] != UNEDITED and not row["control"]]
    shown = [(name, label) for name, label in CURVES if any(r[name] is not None for r in rows)]
    if not shown:
        return None
    methods = list(dict.fromkeys(row["method"] for row in rows))
    across = min(3, len(shown))
    down = -(-len(shown) // across)
    figure, grid = new_panels(down, across, 3.9 * across, 0.9 + 2.9 * down)
    panels = [axes for line in grid for axes in line]
    for axes in panels[len(shown) :]:
        axes.set_axis_off()
    for axes, (name, label) in zip(panels, shown, strict=False):
        for method in methods:
            groups = ["all"] if name in MODEL_WIDE else list(STYLES)
            for group in groups:
                line = [r for r in rows if (r["method"], r["group"]) == (method, group)]
                _curve(axes, line, name, _look(method, methods), STYLES[group])
            random = [row for row in controls if row["method"] == method and row[name] is not None]
            if random:
                heights = [_scale(name) * row[name] for row in random]
                colour, mark = _look(method, methods)
                looks = {"ms": 5, "mfc": "white", "mew": 1}
                axes.plot([r["edits"] for r in random], heights, mark, color=colour, **looks)
        before = unedited.get("all", {}).get(name)
        if before is not None:
            axes.axhline(_scale(name) * before, color=GREY, lw=1, ls=(0, (1, 3)))
        axes.set_xscale("log")
        sizes = sorted({row["edits"] for row in rows})
        axes.set_xticks(sizes, [f"{size:,}" for size in sizes], minor=False)
        axes.xaxis.set_minor_formatter("")
        axes.grid(alpha=0.25, lw=0.5)
        if label.endswith("%"):
            axes.set_ylim(-4, 104)
        elif name == "perplexity_ratio":
            axes.set_yscale("log")
            axes.yaxis.set_major_formatter("{x:g}")
            low, high = axes.get_ylim()
            axes.yaxis.set_minor_formatter("{x:g}" if high < 8 * low else "")
            axes.tick_params(axis="y", which="minor", labelsize=8)
        describe_axes(axes, x="edits of one model")
        entitle(axes, label, size=10)
    legend(
        figure,
        _keys(methods, bool(controls), bool(unedited)),
        loc="outside lower center",
        ncols=4,
        fontsize=9,
    )
    head(figure, f"Edits one after the other, {source} (bands: 95 %, all edits)")
    return figure


def _scale(name: str) -> int:
    """Shares are shown in per cent."""
    return 1 if name in MODEL_WIDE else 100


def _curve(axes: Any, line: Rows, name: str, look: tuple[str, str], style: str) -> None:
    line = [row for row in line if row[name] is not None]
    colour, mark = look
    scale = _scale(name)
    sizes = [row["edits"] for row in line]
    whole = style == STYLES["all"]
    axes.plot(
        sizes,
        [scale * row[name] for row in line],
        style,
        color=colour,
        lw=1.8 if whole else 1.2,
        marker=mark if whole else "",
        ms=5,
    )
    if whole:
        low, high = ([scale * row[f"{name}_{end}"] for row in line] for end in ("low", "high"))
        axes.fill_between(sizes, low, high, color=colour, alpha=0.15, lw=0)


def _keys(methods: Sequence[str], controls: bool, unedited: bool) -> list[tuple[Any, str]]:
    """Entries of a legend: methods by colour, groups by style."""
    from matplotlib.lines import Line2D

    keys = []
    for method in methods:
        colour, mark = _look(method, methods)
        keys.append((Line2D([], [], color=colour, marker=mark, ms=5), method))
    for group, style in STYLES.items():
        keys.append((Line2D([], [], color=GREY, ls=style), f"{group} edits"))
    if controls:
        mark = Line2D([], [], color=GREY, marker=MARKS[0], ms=5, ls="", mfc="white", mew=1)
        keys.append((mark, "turned at random"))
    if unedited:
        keys.append((Line2D([], [], color=GREY, lw=1, ls=(0, (1, 3))), UNEDITED))
    return keys


def _look(method: str, methods: Sequence[str]) -> tuple[str, str]:
    """Colour and mark of a method."""
    if method == UNEDITED:
        return "#000000", "*"
    place = methods.index(method)
    return PALETTE[place % len(PALETTE)], MARKS[place % len(MARKS)]


def _label(row: Row) -> str:
    return f"{row['method']}, {row['control']}" if row["control"] else row["method"]


DRAWN = {
    "efficacy": ("summary", success),
    "locality": ("summary", trade),
    "sequential": ("sequential", sequential),
}
"""By file name: the table that a figure is drawn from, and how."""
