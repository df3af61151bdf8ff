"""Figures. Each function draws on data in hand and writes one PNG."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from jaxneurons.neurons import Neuron

# Okabe and Ito's palette: told apart with any colour vision.
PALETTE = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#D55E00", "#56B4E9", "#999999", "#000000")


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
    # Objects instead of pyplot: no global state, and no display is needed.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    path = Path(path)
    figure = Figure(figsize=(9.6, 5.4), layout="constrained")
    canvas = FigureCanvasAgg(figure)
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
    canvas.print_figure(path, dpi=160)
    return path
