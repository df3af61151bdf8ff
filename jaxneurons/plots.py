"""Figures. Each function draws on data in hand and writes one PNG."""

import io
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxneurons.neurons import Neuron
from jaxneurons.store import make_directory, write_bytes

# Okabe and Ito's palette: told apart with any colour vision.
PALETTE = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#D55E00", "#56B4E9", "#999999", "#000000")


def new_figure(width: float, height: float) -> tuple[Any, Any]:
    """A figure of one pair of axes, in inches."""
    # An object instead of pyplot: no global state, and no display is needed.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", alpha=0.25, linewidth=0.5)
    axes.set_axisbelow(True)
    return figure, axes


def entitle(axes: Any, text: str) -> None:
    """A title above the left end of the axes."""
    axes.set_title(text, loc="left", fontsize=11)


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
    from matplotlib.patches import Rectangle

    longest = max(map(len, rows))
    inches = 1.6 + 0.075 * longest + 0.44 * len(columns), 2.4 + 0.32 * len(rows)
    figure, axes = new_figure(max(inches[0], 1.2 + 0.085 * len(title)), inches[1])
    axes.grid(visible=False)
    shades = colormaps[colours].with_extremes(bad="#DDDDDD")
    image = axes.imshow(values, cmap=shades, vmin=limits[0], vmax=limits[1], aspect="auto")
    for (i, j), value in np.ndenumerate(values):
        middle = (value - limits[0]) / max(limits[1] - limits[0], 1e-30)
        dark = np.isfinite(value) and np.dot(shades(middle)[:3], (0.3, 0.6, 0.1)) < 0.5
        axes.annotate(
            f"{value:.0f}" if np.isfinite(value) else "\u2013",
            (j, i),
            ha="center",
            va="center",
            fontsize=7,
            color="white" if dark else "black",
        )
    for i, j in boxed:
        axes.add_patch(Rectangle((j - 0.5, i - 0.5), 1, 1, fill=False, ec="black", lw=1.2))
    axes.set_xticks(
        range(len(columns)), columns, rotation=rotation, ha="right" if rotation else "center"
    )
    axes.set_yticks(range(len(rows)), rows)
    axes.tick_params(labelsize=8, length=0)
    axes.set(xlabel=xlabel, ylabel=ylabel)
    entitle(axes, title)
    axes.spines[:].set_visible(False)
    figure.colorbar(image, shrink=0.8, pad=0.02).outline.set_visible(False)
    return figure


def neuron_map(
    found: Mapping[str, Mapping[Neuron, float]],
    path: str | os.PathLike[str],
    *,
    num_layers: int,
    width: int,
    title: str,
    common: Sequence[Neuron] = (),
) -> Path:
    """Layers x neurons: where the query-relevant neurons of each group are, and how heavy.

    Args:
      found: by group, accumulated naica of each neuron.
      path: the PNG to write.
      num_layers: layers of the model.
      width: neurons per layer of the site.
      title: says model and data.
      common: neurons that many queries share, drawn apart.
    """
    from matplotlib.figure import Figure

    path = Path(path)
    figure = Figure(figsize=(9.6, 5.4), layout="constrained")
    grid = figure.add_gridspec(1, 2, width_ratios=(5, 1))
    plane = figure.add_subplot(grid[0])
    side = figure.add_subplot(grid[1], sharey=plane)

    heaviest = max((max(group.values(), default=0.0) for group in found.values()), default=0.0)
    left = np.zeros(num_layers)
    layers = np.arange(num_layers)
    for i, (name, group) in enumerate(found.items()):
        colour = PALETTE[i % len(PALETTE)]
        sizes = [12 + 130 * value / max(heaviest, 1e-30) for value in group.values()]
        plane.scatter(
            [neuron.index for neuron in group],
            [neuron.layer for neuron in group],
            s=sizes,
            color=colour,
            alpha=0.7,
            linewidths=0,
            label=name,
        )
        counts = np.bincount([neuron.layer for neuron in group], minlength=num_layers)
        side.barh(layers, counts, left=left, color=colour, height=0.85)
        left += counts
    if common:
        plane.scatter(
            [neuron.index for neuron in common],
            [neuron.layer for neuron in common],
            marker="x",
            s=26,
            color="#444444",
            linewidths=1,
            label="common, left out",
        )
    plane.set(
        xlim=(-width * 0.01, width * 1.01),
        ylim=(-0.8, num_layers - 0.2),
        xlabel="neuron (index in the layer)",
        ylabel="layer",
    )
    plane.set_title(title, fontsize=11, loc="left")
    plane.grid(alpha=0.25, linewidth=0.5)
    side.set(xlabel="neurons")
    side.tick_params(labelleft=False)
    for axes in (plane, side):
        axes.spines[["top", "right"]].set_visible(False)
    handles, labels = plane.get_legend_handles_labels()
    legend = figure.legend(
        handles, labels, loc="outside lower center", ncols=min(len(labels), 7), frameon=False
    )
    for handle in legend.legend_handles:
        if handle is not None and hasattr(handle, "set_sizes"):
            handle.set_sizes([40])  # pyright: ignore[reportAttributeAccessIssue]
    return save_figure(figure, path)
