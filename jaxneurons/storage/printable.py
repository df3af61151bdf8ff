"""Text that people or files gave, made fit to be shown: on one line, and driving nothing.

A name may hold a newline, an escape sequence of terminals, marks that turn the reading direction
of what follows, or half a character. None of them reaches a terminal or a figure.
"""

import unicodedata

JOINERS = "\u200c\u200d"
"""Invisible, and part of how Persian, the scripts of India and emoji are spelt."""

PLAIN = {
    "\u00b1": "+/-",
    "\u00d7": "x",
    "\u2013": "-",
    "\u2014": "-",
    "\u2018": "'",
    "\u2019": "'",
    "\u201c": '"',
    "\u201d": '"',
    "\u2026": "...",
    "\u2022": "*",
    "\u2192": "->",
}
"""What is written where a character cannot be."""


def printable(text: str) -> str:
    r"""`text` on one line: white space is a space, what cannot be seen is written as an escape.

    Controls (terminals obey them), marks of the reading direction, line separators and lone
    surrogates become `\x1b`, `\u202e` and the like; joiners and combining marks stay.
    """
    if text.isascii() and text.isprintable():
        return text
    return "".join(map(_shown, text))


def _shown(character: str) -> str:
    if character.isspace() and (character.isprintable() or character in "\t\n\v\f\r\x85"):
        return " "
    if character in JOINERS:
        return character
    kind = unicodedata.category(character)
    if kind in ("Cc", "Cf", "Cs", "Zl", "Zp"):
        return character.encode("unicode_escape").decode("ascii")
    return " " if kind == "Zs" else character


def counted(count: int, noun: str, plural: str = "") -> str:
    """A number with what it counts: "1 request", "1,000 requests"."""
    return f"{count:,} {noun if count == 1 else plural or noun + 's'}"


def encodable(text: str, encoding: str) -> str:
    """`text` in characters that `encoding` has: others by `PLAIN`, or as escapes."""
    try:
        text.encode(encoding)
    except UnicodeError:
        return "".join(_encodable(character, encoding) for character in text)
    return text


def _encodable(character: str, encoding: str) -> str:
    try:
        character.encode(encoding)
    except UnicodeError:
        plain = PLAIN.get(character)
        return character.encode("unicode_escape").decode("ascii") if plain is None else plain
    return character


def columns(text: str) -> int:
    """How wide `text` is, in columns of a terminal: ideographs and emoji take two."""
    return sum(_wide(character) for character in text)


def _wide(character: str) -> int:
    if character in JOINERS or unicodedata.combining(character):
        return 0
    return 2 if unicodedata.east_asian_width(character) in "WF" else 1


def shortened(text: str, width: int) -> str:
    """`printable(text)` in at most `width` columns; what is too long keeps its two ends."""
    text = printable(text)
    if columns(text) <= width:
        return text
    tail = _ending(text[::-1], (width - 1) // 2)[::-1]
    return _ending(text, width - 1 - columns(tail)) + "\u2026" + tail


def _ending(text: str, width: int) -> str:
    """As much of the beginning of `text` as `width` columns hold."""
    used = 0
    for position, character in enumerate(text):
        used += _wide(character)
        if used > width:
            return text[:position]
    return text
