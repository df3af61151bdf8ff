"""What is drawn in a picture."""

from pathlib import Path

import numpy as np


def pixels(path: Path) -> np.ndarray:
    """A PNG's red, green and blue, [height, width, 3], each from 0 to 1."""
    from matplotlib.image import imread

    return imread(path)[..., :3]


def ink(path: Path) -> float:
    """The share of a picture that is not the colour of its corner."""
    values = pixels(path)
    return float((np.abs(values - values[0, 0]) > 0.05).any(-1).mean())


def coloured(path: Path) -> int:
    """The pixels that are neither black nor white nor grey."""
    values = pixels(path)
    return int((np.ptp(values, axis=-1) > 0.2).sum())
