"""What figures have in common: panels, heat maps, fonts for every script."""

from jaxneurons.plots.figures import heat_map, neuron_map, new_figure, new_panels, save_figure

__all__ = ["heat_map", "neuron_map", "new_figure", "new_panels", "save_figure"]
