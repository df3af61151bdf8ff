"""Sliding windows of GGUF files, as families state them."""

from typing import Any

from jaxneurons.convert.family import Shape
from jaxneurons.convert.keys import Keys
from jaxneurons.convert.windows import window_fields

_WINDOW, _PATTERN = "attention.sliding_window", "attention.sliding_window_pattern"


def no_gguf_window(
    keys: Keys, shape: Shape, *, why: str = "models of this architecture have no window"
) -> dict[str, Any]:
    """Models without a window; 0 says that too."""
    if window := keys.integer(_WINDOW):
        raise keys.error(_WINDOW, window, why)
    return {}


def gguf_periodic_window(
    keys: Keys, shape: Shape, *, default: int | None, period: int
) -> dict[str, Any]:
    """Models of which every so many layers one is without the window.

    Args:
      keys: of the file.
      shape: of the model.
      default: the window, where it is not stated; None: there is none.
      period: one layer of so many is full, the last of them, where it is not stated.
    """
    window = keys.integer(_WINDOW, default) or None
    stated = keys.left.pop(_PATTERN, period)
    if isinstance(stated, list):
        sliding = [bool(entry) for entry in stated]
        if len(sliding) != shape.layers or any(entry not in (0, 1) for entry in stated):
            raise keys.error(_PATTERN, stated, f"{shape.layers} entries are needed, one a layer")
    elif isinstance(stated, bool) or not isinstance(stated, int) or stated < 0:
        raise keys.error(_PATTERN, stated, "a number of layers is needed")
    else:  # 0: all of them slide
        sliding = [stated == 0 or (layer + 1) % stated != 0 for layer in range(shape.layers)]
    return window_fields(window, sliding)
