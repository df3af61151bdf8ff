"""Figures. Each function draws on data in hand and writes one PNG."""

import io
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxneurons.errors import DataError
from jaxneurons.neurons.sets import Neuron
from jaxneurons.plots.lettering import (
    NAME,
    describe_axes,
    entitle,
    head,
    legend,
    name_x,
    name_y,
    note,
)
from jaxneurons.storage.printable import columns as columns_of
from jaxneurons.storage.store import make_directory, write_bytes
from jaxneurons.storage.tables import Row

# Okabe and Ito's palette: told apart with any colour vision.
PALETTE = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#D55E00", "#56B4E9", "#999999", "#000000")


MOST = 24.0
"""Inches of a figure's side, at most: 3,840 pixels, however many names there are."""
NUMBERED = 60
"""Rows or columns of a heat map whose cells hold their numbers, at most."""
DISTINCT = 2 * len(PALETTE)
"""Lines in one panel that can be told apart, at most."""


def new_panels(
    down: int, across: int, width: float, height: float, *, share: bool = False
) -> tuple[Any, list[list[Any]]]:
    """A figure of down x across pairs of axes, in inches, no side longer than `MOST`."""
    # An object instead of pyplot: no global state, and no display is needed.
    from jaxneurons.plots.fonts import LetteredFigure

    size = min(width, MOST), min(height, MOST)
    figure = LetteredFigure(figsize=size, layout="constrained")
    panels = figure.subplots(down, across, squeeze=False, sharex=share, sharey=share)
    for axes in panels.flat:
        axes.spines[["top", "right"]].set_visible(False)
        axes.set_axisbelow(True)
    return figure, panels.tolist()


def new_figure(width: float, height: float) -> tuple[Any, Any]:
    """A figure of one pair of axes with a grid, in inches."""
    figure, ((axes,),) = new_panels(1, 1, width, height)
    axes.grid(axis="y", alpha=0.25, linewidth=0.5)
    return figure, axes


def check_places(run: Path, *names: str) -> None:
    """Raise, before anything is computed, if no results could be written into a run directory.

    Args:
      run: the run directory.
      names: directories in it, made later.

    Raises:
      DataError: one of them is a file, or a link that leads nowhere.
    """
    for path in (run / name for name in names):
        if os.path.lexists(path) and not path.is_dir():
            raise DataError(f"{path}: not a directory, but results are written there; move it")


def save_figure(figure: Any, path: Path) -> Path:
    """Write a figure as PNG, atomically."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    drawn = io.BytesIO()
    FigureCanvasAgg(figure).print_figure(drawn, dpi=160, format="png")
    write_bytes(path, drawn.getvalue())
    return path


def draw_tables(
    figures: Mapping[str, tuple[str, Callable[[Any, str], Any]]],
    tables: Mapping[str, Sequence[Any]],
    directory: Path,
    *,
    source: str,
) -> list[Path]:
    """Every figure whose table is there, as PNG.

    Args:
      figures: by file name, the table that a figure is drawn from, and how; that may give None.
      tables: rows by name.
      directory: made if it is missing.
      source: the model, for titles.
    """
    make_directory(directory)
    made = []
    for name, (table, function) in figures.items():
        rows = tables.get(table)
        figure = function(rows, source) if rows else None
        if figure is not None:
            made.append(save_figure(figure, directory / f"{name}.png"))
    return made


def percent_with_interval(rows: Sequence[Row], name: str) -> tuple[np.ndarray, np.ndarray]:
    """A column [row] and its interval's distances below and above [2, row], in percent.

    Args:
      rows: with `name`, `name_low` and `name_high`; None where there is none.
      name: of the column.
    """
    value, low, high = (
        np.array([np.nan if row[key] is None else row[key] for row in rows], np.float64)
        for key in (name, f"{name}_low", f"{name}_high")
    )
    spread = np.nan_to_num(np.stack([value - low, high - value]))
    return 100 * value, 100 * np.maximum(spread, 0)


def heat_map(
    values: np.ndarray,
    *,
    rows: Sequence[str],
    columns: Sequence[str],
    title: str,
    limits: tuple[float, float],
    colours: str,
    xlabel: str = "",
    ylabel: str = "",
    boxed: Sequence[tuple[int, int]] = (),
    rotation: int = 40,
) -> Any:
    """A table as colours with the numbers in the cells; NaN is grey, with a dash.

    A table of more than `NUMBERED` rows or columns has colours alone.

    Args:
      values: [row, column].
      rows: what each row is.
      columns: what each column is.
      title: says what the numbers are, and of which model.
      limits: values of the ends of the colour map.
      colours: the colour map's name.
      xlabel: what the columns are.
      ylabel: what the rows are.
      boxed: cells to draw a frame around.
      rotation: of the columns' names, in degrees.
    """
    from matplotlib import colormaps

    small = max(values.shape) <= NUMBERED
    longest = min(max(map(columns_of, rows)), NAME)
    highest = min(max(map(columns_of, columns)), NAME)
    inches = (
        1.6 + 0.075 * longest + (0.44 if small else 0.13) * len(columns),
        2.4 + (0.32 if small else 0.13) * len(rows) + (0.03 * highest if rotation else 0),
    )
    beside = 0.5 + 0.062 * longest
    least = min(beside + 0.6 + 0.085 * len(title), 12.0)
    figure, axes = new_figure(max(inches[0], least), inches[1])
    axes.grid(visible=False)
    shades = colormaps[colours].with_extremes(bad="#DDDDDD")
    image = axes.imshow(values, cmap=shades, vmin=limits[0], vmax=limits[1], aspect="auto")
    if small:
        _number_cells(axes, values, shades, limits)
    if boxed:
        _frame_cells(axes, boxed, weight=1.2 if small else 0.4)
    axes.tick_params(labelsize=8, length=0)
    name_x(axes, columns, label=xlabel, rotation=rotation)
    name_y(axes, rows, label=ylabel)
    entitle(axes, title, beside=beside)
    axes.spines[:].set_visible(False)
    figure.colorbar(image, shrink=0.8, pad=0.02).outline.set_visible(False)
    return figure


def _number_cells(axes: Any, values: np.ndarray, shades: Any, limits: tuple[float, float]) -> None:
    """Write each cell's number in black or white, whichever its colour lets be read."""
    for (i, j), value in np.ndenumerate(values):
        middle = (value - limits[0]) / max(limits[1] - limits[0], 1e-30)
        dark = np.isfinite(value) and np.dot(shades(middle)[:3], (0.3, 0.6, 0.1)) < 0.5
        note(
            axes,
            f"{value:.0f}" if np.isfinite(value) else "\u2013",
            (j, i),
            ha="center",
            va="center",
            fontsize=7,
            color="white" if dark else "black",
        )


def _frame_cells(axes: Any, cells: Sequence[tuple[int, int]], *, weight: float) -> None:
    from matplotlib.collections import PolyCollection

    corners = np.array([(-0.5, -0.5), (0.5, -0.5), (0.5, 0.5), (-0.5, 0.5)])
    middles = np.array([(j, i) for i, j in cells])
    frames = PolyCollection(list(middles[:, None] + corners), fc="none", ec="black", lw=weight)
    axes.add_collection(frames, autolim=False)


def neuron_map(
    groups: Mapping[str, Mapping[Neuron, float]],
    path: str | os.PathLike[str],
    *,
    num_layers: int,
    width: int,
    title: str,
    common: Sequence[Neuron] = (),
) -> Path:
    """Layers x neurons: where the query-relevant neurons of each group are, and how heavy.

    Args:
      groups: by name, accumulated naica of each neuron.
      path: the PNG to write.
      num_layers: layers of the model.
      width: neurons per layer of the site.
      title: says model and data.
      common: neurons that many queries share, drawn apart.
    """
    from jaxneurons.plots.fonts import LetteredFigure

    path = Path(path)
    figure = LetteredFigure(figsize=(9.6, 5.4), layout="constrained")
    grid = figure.add_gridspec(1, 2, width_ratios=(5, 1))
    plane = figure.add_subplot(grid[0])
    side = figure.add_subplot(grid[1], sharey=plane)

    entries = _scatter_groups(plane, side, groups, num_layers)
    if common:
        crosses = plane.scatter(
            [neuron.index for neuron in common],
            [neuron.layer for neuron in common],
            marker="x",
            s=26,
            color="#444444",
            linewidths=1,
        )
        entries.insert(0, (crosses, "common, left out"))
    plane.set(xlim=(-width * 0.01, width * 1.01), ylim=(-0.8, num_layers - 0.2))
    describe_axes(plane, x="neuron (index in the layer)", y="layer")
    describe_axes(side, x="neurons")
    head(figure, title)
    plane.grid(alpha=0.25, linewidth=0.5)
    side.tick_params(labelleft=False)
    for axes in (plane, side):
        axes.spines[["top", "right"]].set_visible(False)
    across = 7 if max(len(name) for name in groups) <= 14 else 3
    handles = legend(figure, entries, loc="outside lower center", ncols=min(len(entries), across))
    for handle in handles:
        if hasattr(handle, "set_sizes"):
            handle.set_sizes([40])
    return save_figure(figure, path)


def _scatter_groups(
    plane: Any, side: Any, groups: Mapping[str, Mapping[Neuron, float]], num_layers: int
) -> list[tuple[Any, str]]:
    """A dot for each neuron in the plane, and how many a layer has beside it; for the legend."""
    heaviest = max((max(group.values(), default=0.0) for group in groups.values()), default=0.0)
    left = np.zeros(num_layers)
    layers = np.arange(num_layers)
    entries = []
    for i, (name, group) in enumerate(groups.items()):
        colour = PALETTE[i % len(PALETTE)]
        sizes = [12 + 130 * value / max(heaviest, 1e-30) for value in group.values()]
        dots = plane.scatter(
            [neuron.index for neuron in group],
            [neuron.layer for neuron in group],
            s=sizes,
            color=colour,
            alpha=0.7,
            linewidths=0,
        )
        entries.append((dots, name))
        counts = np.bincount([neuron.layer for neuron in group], minlength=num_layers)
        side.barh(layers, counts, left=left, color=colour, height=0.85)
        left += counts
    return entries
