"""The figure of `choose_layers`: what edits at each candidate are worth."""

from pathlib import Path
from typing import Any

import numpy as np

from jaxneurons.plots.figures import PALETTE, new_figure, save_figure
from jaxneurons.plots.lettering import describe_axes, entitle, legend, name_x
from jaxneurons.storage.store import make_directory
from jaxneurons.storage.tables import Tables


def draw_layers(tables: Tables, directory: Path) -> Path:
    """Draw `layers.png`: score and its parts by candidate.

    Args:
      tables: as `choose_layers` makes them.
      directory: made if it is missing.
    """
    make_directory(directory)
    return save_figure(layer_lines(tables), directory / "layers.png")


def layer_lines(tables: Tables) -> Any:
    """Lines of the score, with its interval, and of each of its parts, over candidates."""
    rows, facts = tables.rows("layers"), tables.facts
    names = [row["layers"] for row in rows]
    figure, axes = new_figure(3.2 + 0.34 * len(names), 3.8)
    places = np.arange(len(names))
    low, high = (np.array([row[end] for row in rows], float) for end in ("low", "high"))
    axes.fill_between(places, low, high, color="black", alpha=0.12, linewidth=0)
    lines = [("score", "black", 2.2), *zip(facts["score"], PALETTE, [1.2] * 9, strict=False)]
    entries = []
    for column, colour, width in lines:
        values = [np.nan if row[column] is None else row[column] for row in rows]
        (line,) = axes.plot(places, values, color=colour, linewidth=width, marker="o", ms=3)
        entries.append((line, column.replace("_", " ")))
    name_x(axes, names, label="layers edited", rotation=40)
    axes.set_ylim(-0.03, 1.03)
    describe_axes(axes, y="share of requests")
    title = f"{facts['method']} on {facts['model']['source']}: {facts['requests']} requests"
    entitle(axes, title, beside=0.8)
    legend(figure, entries, loc="outside lower center", ncols=2)
    return figure
