"""The figure of causal tracing: layer by class of position, for each kind of restored state."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxneurons.edit.restoring import KINDS
from jaxneurons.edit.traced_facts import POSITIONS
from jaxneurons.plots.figures import new_panels, save_figure
from jaxneurons.plots.lettering import describe_axes, entitle, name_y
from jaxneurons.storage.store import make_directory
from jaxneurons.storage.tables import Row, Tables

TITLES = {
    "residual": "the stream leaving the layer",
    "down": "feed-forward, {window} layers around",
    "o": "attention, {window} layers around",
}
COLOURS = {"residual": "Purples", "down": "Greens", "o": "Reds"}


def draw_tracing(tables: Tables, directory: Path) -> Path:
    """Draw `tracing.png`: average indirect effects, a panel for each kind.

    Args:
      tables: as `trace` gives them.
      directory: made if it is missing.
    """
    figure = tracing_map(
        tables.rows("summary"),
        source=str(tables.facts["model"]["source"]),
        window=int(tables.facts["settings"]["window"]),
    )
    make_directory(directory)
    return save_figure(figure, directory / "tracing.png")


def tracing_map(rows: Sequence[Row], *, source: str, window: int) -> Any:
    """Panels of position x layer, one for each kind; colours from 0, each with its own scale.

    Args:
      rows: of table `summary`.
      source: the model, for the titles.
      window: layers restored together.
    """
    kinds = [kind for kind in KINDS if any(row["kind"] == kind for row in rows)]
    names = [name for name in POSITIONS if any(row["position"] == name for row in rows)]
    count = 1 + max(row["layer"] for row in rows)
    facts = max(row["facts"] for row in rows)
    figure, panels = new_panels(len(kinds), 1, 3.4 + 0.16 * count, 2.2 * len(kinds) + 0.4)
    for (axes,), kind in zip(panels, kinds, strict=True):
        values = np.full((len(names), count), np.nan)
        for row in rows:
            if row["kind"] == kind:
                values[names.index(row["position"]), row["layer"]] = row["effect"]
        highest = max(float(np.nanmax(values)), 1e-6)
        image = axes.imshow(values, cmap=COLOURS[kind], vmin=0, vmax=highest, aspect="auto")
        name_y(axes, names, label="token")
        describe_axes(axes, x="layer", y="")
        entitle(axes, f"{source}, {facts} facts: {TITLES[kind].format(window=window)}", beside=1.4)
        axes.spines[:].set_visible(False)
        figure.colorbar(image, pad=0.02).outline.set_visible(False)
    return figure
