"""Figures whose texts are taken literally, in any script that the system has a font for."""

import functools
import io
import unicodedata
import warnings
from collections.abc import Iterable
from typing import Any

from matplotlib import font_manager
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Text
from matplotlib.ticker import LogFormatter, ScalarFormatter

PREFERRED = (
    "Noto Sans CJK SC",
    "Noto Sans CJK JP",
    "Noto Sans CJK KR",
    "Noto Sans SC",
    "Noto Sans JP",
    "Noto Sans KR",
    "Source Han Sans SC",
    "PingFang SC",
    "Hiragino Sans",
    "Apple SD Gothic Neo",
    "Microsoft YaHei",
    "Yu Gothic",
    "Malgun Gothic",
    "SimHei",
    "WenQuanYi Zen Hei",
    "WenQuanYi Micro Hei",
    "Droid Sans Fallback",
    "Noto Sans Arabic",
    "Noto Sans Devanagari",
    "Noto Sans Thai",
    "Noto Emoji",
    "Segoe UI Emoji",
    "Symbola",
    "Arial Unicode MS",
)
"""Families that are tried before all others: made for text, and even in weight."""

NOT_LETTERS = ("last resort", ".lastresort", "adobe blank", "adobe notdef")
"""Families that have every character, none of them legible."""

EAST_ASIAN = ("CJK", "HIRAGANA", "KATAKANA", "HANGUL", "BOPOMOFO", "IDEOGRAPHIC", "FULLWIDTH")
_warned: set[str] = set()


class MissingFontWarning(UserWarning):
    """Labels of a figure hold characters that no font of this system has."""


def families_for(text: str, base: str) -> tuple[list[str], str]:
    """Families that have the characters of `text` that the font file `base` lacks.

    Args:
      text: what is to be drawn.
      base: path of the font that it is drawn in.

    Returns:
      Families to fall back on, in order; and the characters that none has.
    """
    missing = frozenset(ord(c) for c in text if not _unseen(c)) - _characters(base)
    if not missing:
        return [], ""
    families, left = _search(missing)
    return list(families), "".join(map(chr, sorted(left)))


def _unseen(character: str) -> bool:
    """Whether nothing is drawn for it: white space, joiners, selectors of a variant."""
    hidden = unicodedata.category(character) == "Cf" or 0xFE00 <= ord(character) <= 0xFE0F
    return hidden or character.isspace()


@functools.lru_cache(256)
def _search(missing: frozenset[int]) -> tuple[tuple[str, ...], frozenset[int]]:
    families = []
    for family, path in _installed():
        has = missing & _characters(path)
        if has:
            families.append(family)
            missing -= has
        if not missing:
            break
    return tuple(families), missing


@functools.cache
def _installed() -> list[tuple[str, str]]:
    """Family and file of every font that can be drawn with, preferred ones first."""
    manager = font_manager.fontManager
    known = {font.fname for font in manager.ttflist}
    for path in font_manager.findSystemFonts():  # some may be newer than matplotlib's list
        if path not in known:
            try:
                manager.addfont(path)
            except (OSError, RuntimeError, ValueError, NotImplementedError):
                continue  # a font of pictures, or a damaged one
    files: dict[str, tuple[tuple[bool, int], str]] = {}
    for font in manager.ttflist:
        upright = font.style != "normal", abs(_weight(font.weight) - 400)
        if font.name not in files or upright < files[font.name][0]:
            files[font.name] = upright, font.fname
    order = {name: place for place, name in enumerate(PREFERRED)}
    names = sorted(name for name in files if not name.lower().startswith(NOT_LETTERS))
    names.sort(key=lambda name: order.get(name, len(order)))
    return [(name, files[name][1]) for name in names]


def _weight(weight: int | str) -> int:
    return weight if isinstance(weight, int) else font_manager.weight_dict.get(weight, 400)


@functools.lru_cache(1024)
def _characters(path: str) -> frozenset[int]:
    try:
        return frozenset(font_manager.get_font(path).get_charmap())
    except (OSError, RuntimeError, ValueError):
        return frozenset()  # gone, or damaged


def warn_of(characters: Iterable[str]) -> None:
    """Say once for each script that its characters are drawn as boxes, and what to install."""
    examples: dict[str, str] = {}
    for character in sorted(set(characters)):
        script = script_of(character)
        examples[script] = examples.get(script, "") + character
    new = {script: shown for script, shown in examples.items() if script not in _warned}
    if not new:
        return
    _warned.update(new)
    listed = ", ".join(f"{script} ({shown[:5]})" for script, shown in new.items())
    packages = dict.fromkeys(map(_package, new))
    warnings.warn(
        f"no font of this system has these characters, figures show boxes for them: {listed}; "
        f"install {', '.join(packages)} and make the figures again",
        MissingFontWarning,
        stacklevel=2,
    )


def script_of(character: str) -> str:
    """What people call the characters that this one is of."""
    name = unicodedata.name(character, "")
    first = name.split()[0] if name else "unnamed"
    if first == "CJK":
        return "Chinese characters"
    if unicodedata.category(character) in ("So", "Sk", "Cn", "Co") and first not in EAST_ASIAN:
        return "emoji and symbols"
    return first.capitalize()


def _package(script: str) -> str:
    if script == "Chinese characters" or script.upper() in EAST_ASIAN:
        return "Noto Sans CJK (Debian: fonts-noto-cjk)"
    if script == "emoji and symbols":
        return "Noto Emoji (the one without colours)"
    return "Noto Sans of the script (Debian: fonts-noto-core)"


def base_font(text: Any) -> str:
    """The file of the font that a matplotlib text is drawn in."""
    return str(font_manager.findfont(text.get_fontproperties()))


class LetteredFigure(Figure):
    """A figure whose texts are drawn as they are, in fonts that have their characters.

    Names are data: a dollar sign in one begins no mathematics, and a backslash calls no TeX.
    """

    def draw(self, renderer: Any) -> None:
        """Choose the fonts of every text, then draw."""
        warn_of(self.choose_fonts())
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Glyph .* missing from")  # said by warn_of
            super().draw(renderer)

    def _repr_png_(self) -> bytes:
        """What a notebook shows of it."""
        image = io.BytesIO()
        FigureCanvasAgg(self).print_figure(image, dpi=100, format="png")
        return image.getvalue()

    def choose_fonts(self) -> str:
        """Take texts literally and choose their fonts; the characters that no font has."""
        lacking = ""
        for text in self._texts():
            text.set_parse_math(False)
            text.set_usetex(False)
            if text.get_text():
                families, left = families_for(text.get_text(), base_font(text))
                text.set_fontfamily(list(dict.fromkeys([*text.get_fontfamily(), *families])))
                lacking += left
        return lacking

    def _texts(self) -> list[Text]:
        """Every text but the numbers at an axis, which its formatter may write as mathematics."""
        numbers: set[int] = set()
        for axes in self.axes:
            for axis in (axes.xaxis, axes.yaxis):
                labels = [*axis.get_majorticklabels(), *axis.get_minorticklabels()]
                if isinstance(axis.get_major_formatter(), (ScalarFormatter, LogFormatter)):
                    numbers |= set(map(id, labels))
        return [text for text in self.findobj(Text) if id(text) not in numbers]
