"""Words on figures: the one place that writes titles, names, notes and legends.

Names are data. They are shown on one line, no longer than a label may be, literally (without
mathematics: `fonts` sees to that when a figure is drawn), and as many of them as can be read.
"""

import math
import textwrap
from collections.abc import Iterable, Sequence
from typing import Any

from jaxneurons.storage.printable import columns, printable, shortened

NAME = 36
"""Columns of a name at an axis or in a legend, at most."""
ENTRIES = 24
"""Names in a legend, at most."""
CHARACTER = 0.085
"""Inches of a character of a title."""
PITCH = 0.16
"""Inches that a name takes at an axis, across its reading direction."""
LINES = 3
"""Lines of a title, at most."""


def name(text: str) -> str:
    """A name as figures show it."""
    return shortened(text, NAME)


def _share(axes: Any, side: int) -> float:
    """Inches of the figure's width (0) or height (1) that one pair of axes has."""
    place = axes.get_subplotspec()
    grid = (1, 1) if place is None else place.get_gridspec().get_geometry()
    return axes.figure.get_size_inches()[side] / grid[1 - side]


def _wrapped(text: str, inches: float, size: int) -> str:
    width = max(int(inches / (CHARACTER * size / 11)), 12)
    text = printable(text)
    if columns(text) > 1.3 * len(text):
        width //= 2  # ideographs
    return "\n".join(textwrap.wrap(shortened(text, LINES * width - 8), width))


def entitle(axes: Any, text: str, *, size: int = 11, beside: float = 0.0) -> None:
    """A title above the left end of the axes, `beside` inches from the figure's, in lines."""
    axes.set_title(_wrapped(text, _share(axes, 0) - beside, size), loc="left", fontsize=size)


def head(figure: Any, text: str) -> None:
    """A title over all panels, from the left."""
    text = _wrapped(text, figure.get_figwidth(), 11)
    figure.suptitle(text, x=0.01, ha="left", fontsize=11)


def describe_axes(axes: Any, *, x: str = "", y: str = "", size: int | None = None) -> None:
    """What is along each axis."""
    if x:
        axes.set_xlabel(printable(x), fontsize=size)
    if y:
        axes.set_ylabel(printable(y), fontsize=size)


def name_x(axes: Any, names: Sequence[str], *, label: str = "", rotation: int = 0) -> None:
    """Names at 0, 1, ... along the horizontal axis; where there are many, one in so many.

    Args:
      axes: the panel, of a figure that has its size.
      names: one for each place.
      label: what they are.
      rotation: in degrees; those of many names stand upright.
    """
    inches = _share(axes, 0) - 1.2
    longest = max(map(columns, map(name, names)), default=0)
    step = _step(len(names), inches, PITCH if rotation else max(PITCH, CHARACTER * longest * 0.8))
    if rotation and len(names) * 2 * PITCH > inches:
        rotation = 90
    axes.set_xticks(
        range(0, len(names), step),
        [name(text) for text in names[::step]],
        rotation=rotation,
        ha="center" if rotation in (0, 90) else "right",
    )
    describe_axes(axes, x=_thinned(label, step))


def name_y(axes: Any, names: Sequence[str], *, label: str = "") -> None:
    """Names at 0, 1, ... along the vertical axis; see `name_x`."""
    step = _step(len(names), _share(axes, 1) - 1.2, PITCH)
    axes.set_yticks(range(0, len(names), step), [name(text) for text in names[::step]])
    describe_axes(axes, y=_thinned(label, step))


def _step(count: int, inches: float, pitch: float) -> int:
    return max(1, math.ceil(count * pitch / max(inches, 1.0)))


def _thinned(label: str, step: int) -> str:
    return label if step == 1 else f"{label} (1 in {step} named)".strip()


def note(axes: Any, text: str, place: tuple[Any, Any], **how: Any) -> None:
    """A few characters at a place; they take no part in the layout."""
    axes.annotate(printable(text), place, **how).set_in_layout(False)


def legend(
    where: Any, entries: Iterable[tuple[Any, str]] | None = None, **how: Any
) -> Sequence[Any]:
    """A legend without a frame; its handles.

    Args:
      where: axes, or a whole figure.
      entries: what was drawn and what it is called: needed for names that people gave, since
        matplotlib leaves those out that begin with "_". Default: by the labels of what was drawn.
      how: as for `legend` of matplotlib.
    """
    if entries is None:
        panels = [where] if hasattr(where, "get_legend_handles_labels") else where.axes
        drawn = [axes.get_legend_handles_labels() for axes in panels]
        entries = [pair for handles, labels in drawn for pair in zip(handles, labels, strict=True)]
        names = [text for _, text in entries]
    else:
        entries = list(entries)
        names = [name(text) for _, text in entries[:ENTRIES]]
    if len(entries) > ENTRIES:
        names[-1] = f"\u2026 and {len(entries) - ENTRIES + 1} more"
    handles = [handle for handle, _ in entries[:ENTRIES]]
    made = where.legend(handles, [f"{i}" for i in range(len(handles))], frameon=False, **how)
    for text, words in zip(made.get_texts(), names, strict=True):
        text.set_text(words)
    return [handle for handle in made.legend_handles if handle is not None]
