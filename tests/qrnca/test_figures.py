"""Figures of query-relevant neurons at the size of a real model."""

import numpy as np
import pytest

from jaxneurons.qrnca.figures import BINS, neuron_map


def test_the_map_of_a_7b_model_is_readable_and_loses_nothing():
    """32 layers of 11,008 neurons: few columns, each the sum of its neurons."""
    rng = np.random.default_rng(0)
    rows = [
        {
            "group": group,
            "layer": int(rng.integers(32)),
            "index": int(index),
            "naica": float(rng.gamma(1)),
            "num_layers": 32,
            "width": 11_008,
        }
        for group in ("biology", "physics")
        for index in (0, 11_007, *rng.integers(11_008, size=300))
    ]
    figure = neuron_map(rows, "a model")
    panels = [axes for axes in figure.axes if axes.images]
    assert [axes.get_title(loc="left") for axes in panels] == ["biology", "physics"]
    for axes in panels:
        own = [row for row in rows if row["group"] == axes.get_title(loc="left")]
        grid = np.asarray(axes.images[0].get_array())
        assert grid.shape == (32, BINS)
        assert grid.sum() == pytest.approx(sum(row["naica"] for row in own))
        by_layer = np.bincount(
            [row["layer"] for row in own], [row["naica"] for row in own], minlength=32
        )
        np.testing.assert_allclose(grid.sum(1), by_layer)
        low, high = axes.get_xlim()
        assert low == 0
        assert 11_008 <= high < 11_008 + BINS * 4
    assert max(figure.get_size_inches()) < 20
