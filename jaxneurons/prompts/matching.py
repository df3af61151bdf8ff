"""When generated text counts as right: a rule on text, so that tokenisations need not agree.

arXiv 2502.17355, section 3: two greedy tokens must be a prefix of the object. But a one-token
object is followed by something that is no part of it, and case and spaces differ. The same rule
judges as many tokens as an object needs: `RelSpecConfig.steps`.
"""

import functools
import re
import unicodedata
from collections.abc import Sequence
from typing import NamedTuple

SHORTEST = 3
"""Letters that the beginning of a word needs to stand for the word."""

SPACELESS = ("THAI", "LAO", "KHMER", "MYANMAR", "TAI", "NEW TAI", "AHOM", "BALINESE", "JAVANESE")
"""First words of the names of letters that are written without spaces (UAX #14: class SA)."""

_POINTS = ".,:/^\u2044\u066b\u066c"
"""What goes on with a number between two digits: 3.14, 3,000, 10:30, 1/2, 10^5."""

_SHARPS = "+#\u266d\u266f"
"""What belongs to the letters before it: C++, C#, A+, B flat."""

_MINUS = "-\u2010\u2012\u2013\u2212"


class _Word(NamedTuple):
    """A word, with its place in the normalised text, and the kind of its letters."""

    text: str
    start: int
    end: int
    kind: str


def answers(generated: str, expected: str, *, ended: bool = False) -> bool:
    """Whether generated text gives the expected object.

    Both are normalised: Unicode compatibility form, case folded, without accents, vowel points and
    invisible characters; everything but letters, their marks, and digits is taken as spaces.
    Ideographs are words of their own, as are runs of katakana. Then the words must agree from the
    first on, until one of the two ends. What is generated may end early, as two tokens do: between
    two words, or within one if at least three of its letters are there; then nothing may follow
    that the object does not have there. So " Poland." and "poland and" give "Poland", " new yor"
    and " New" give "New York", "巴黎是" gives "巴黎"; "the Poland", "Polish", "Pol.", " New." and
    "New" followed by "Jersey" do not. The case counts for answers of one or two letters: " he was"
    does not give "He".

    Signs that change what a word says are part of it: a minus before a number, what stands between
    its digits, sharps and pluses after letters. "-1" and "1.5" do not give "1", nor "C#" "C++".
    Units (5 %, $5) must agree where both texts have some. Scripts without spaces (Thai, hiragana)
    do not show where a word ends: what is generated may go on there. An object without letters or
    digits ("+", an emoji) must be there as it is.

    Args:
      generated: what was said.
      expected: the object.
      ended: whether the model stopped after `generated`: then nothing was cut short, and "New"
        does not give "New York".
    """
    spoken, needed = _words(generated), _words(expected)
    if not needed:
        return _same_signs(generated, expected)
    if not spoken:
        return False
    length = min(len(spoken), len(needed))
    last, full = spoken[length - 1], needed[length - 1]
    if [w.text for w in spoken[: length - 1]] != [w.text for w in needed[: length - 1]]:
        return False
    if last.text == full.text or (length == len(needed) and _goes_on(last, full)):
        complete = len(spoken) >= len(needed)
        if not complete and not ended:
            tail = _normal(generated)[spoken[-1].end :].rstrip(" \ufffd")
            complete = _normal(expected)[full.end :].startswith(tail)
        return complete and _same_units(generated, expected) and _same_symbol(generated, expected)
    cut = (
        not ended and length == len(spoken) and not _normal(generated)[last.end :].rstrip("\ufffd")
    )
    return cut and _letters(last.text) >= SHORTEST and full.text.startswith(last.text)


def _letters(word: str) -> int:
    """Letters and digits of a word, marks not counted; of a number, after its last point."""
    kinds = [_kind(character) for character in word]
    last = max((i for i, kind in enumerate(kinds) if not kind), default=-1)
    return sum(kind != "mark" for kind in kinds[last + 1 :])


def _goes_on(word: _Word, expected: _Word) -> bool:
    """Whether a word of a script without spaces begins with the wanted one."""
    if expected.kind not in ("spaceless", "hiragana") or len(expected.text) < 2:
        return False  # one letter begins too many words
    return word.text.startswith(expected.text) and _kind(word.text[len(expected.text)]) != "mark"


def _same_symbol(generated: str, expected: str) -> bool:
    """Whether the case agrees, if the answer is one or two letters: "he" is not helium's symbol."""
    if not re.fullmatch("[A-Za-z]{1,2}", expected.strip()):
        return True
    segments = _segment(unicodedata.normalize("NFKC", generated))
    return bool(segments) and segments[0].text == expected.strip()


def _same_units(generated: str, expected: str) -> bool:
    """Whether currencies and percent signs agree, where both texts have some."""
    needed = _units(_normal(expected))
    if not needed:
        return True
    end = _words(generated)[min(len(_words(generated)), len(_words(expected))) - 1].end
    text = _normal(generated)
    tail = _normal(expected)[_words(expected)[-1].end :].strip(" ")  # "%", or several: "¢°"
    after = text[end:].lstrip(" ")[: max(1, len(tail))]
    units = _units(text[:end] + after)
    return not units or units == needed


def _units(text: str) -> set[str]:
    return {c for c in text if c in "%\u2030\u00b0" or unicodedata.category(c) == "Sc"}


def _same_signs(generated: str, expected: str) -> bool:
    """Whether the text begins with an object that has no letter or digit: "+", an emoji."""
    spoken, sign = (
        "".join(c for c in unicodedata.normalize("NFKC", text) if not _invisible(c)).strip()
        for text in (generated, expected)
    )
    visible = any(unicodedata.category(c)[0] in "SP" and c != "\ufffd" for c in sign)
    if not visible or not spoken.startswith(sign):
        return False
    following = spoken[len(sign) :][:1]
    if not following or unicodedata.category(sign[-1]) == "So":
        return True
    # "+" is neither "++" nor "+="; "+." ends a sentence.
    more = unicodedata.category(following).startswith("S") and following != "\ufffd"
    return not more and following != sign[-1]


def any_answers(generated: str, expected: Sequence[str], *, ended: bool = False) -> bool:
    """Whether generated text gives one of the expected objects."""
    return any(answers(generated, answer, ended=ended) for answer in expected)


def words(text: str) -> list[str]:
    """The words of a text, normalised as `answers` says."""
    return [word.text for word in _words(text)]


@functools.lru_cache(2**15)
def _normal(text: str) -> str:
    """Compatibility form, case folded, without accents, vowel points and invisible characters."""
    if text.isascii():
        return text.casefold()
    parts = unicodedata.normalize("NFKD", text).casefold()
    return unicodedata.normalize("NFKC", "".join(c for c in parts if not _dropped(c)))


@functools.lru_cache(2**12)
def _invisible(character: str) -> bool:
    """Joiners, direction marks, soft hyphens, variation selectors."""
    name = unicodedata.name(character, "")
    return unicodedata.category(character) == "Cf" or "VARIATION SELECTOR" in name


@functools.lru_cache(2**12)
def _dropped(character: str) -> bool:
    """What texts are compared without: accents, points of Hebrew and Arabic, what is not seen.

    Marks that are written above or below (combining classes from 200) and those of Hebrew, Arabic
    and Syriac (10 to 36) are often left out. Vowel signs, viramas and tone marks of Indic scripts,
    of Thai and the like have other classes: they are letters.
    """
    if "\u0300" <= character <= "\u036f" or character == "\u0640" or _invisible(character):
        return True
    place = unicodedata.combining(character)
    return unicodedata.category(character) == "Me" or 10 <= place <= 36 or place >= 200


@functools.lru_cache(2**15)
def _words(text: str) -> tuple[_Word, ...]:
    """Words with their places in the normalised text."""
    return _segment(_normal(text))


@functools.lru_cache(2**12)
def _kind(character: str) -> str:
    """What a character is to a word; "" if it is none of one."""
    if unicodedata.category(character).startswith("M"):
        return "mark"
    if "\u30a1" <= character <= "\u30ff" and character != "\u30fb":
        return "katakana"  # so that a particle after a name is another word
    if "\u3041" <= character <= "\u309f":
        return "hiragana"
    if not character.isalnum():
        return ""
    name = unicodedata.name(character, "")
    if name.startswith(("CJK UNIFIED", "CJK COMPATIBILITY")):
        return "ideograph"  # writes no spaces: each is a word
    if name.startswith(SPACELESS) and not character.isdecimal():
        return "spaceless"
    return "letter"


def _segment(text: str) -> tuple[_Word, ...]:
    segments, place = [], 0
    while place < len(text):
        kind = _kind(text[place])
        if not kind:
            place += 1
            continue
        kind = "letter" if kind == "mark" else kind
        start, place = place, place + 1
        while place < len(text) and _belongs(text, place, kind):
            place += 1
        word = text[start:place]
        if kind == "letter":
            word = _signed(text, start) + word.replace(",", ".") + _sharps(text, place)
            place += len(_sharps(text, place))
        segments.append(_Word(word, start, place, kind))
    return tuple(segments)


def _belongs(text: str, place: int, kind: str) -> bool:
    """Whether a character goes on with a word of some kind."""
    here = _kind(text[place])
    if here == "mark" or (here == kind and kind != "ideograph"):
        return True
    return (
        text[place] in _POINTS
        and text[place - 1].isdecimal()
        and text[place + 1 : place + 2].isdecimal()
    )


def _signed(text: str, start: int) -> str:
    """The minus of a number, "-"; "" if there is none: a hyphen or a dash is no minus."""
    if not text[start].isdecimal() or not start or text[start - 1] not in _MINUS:
        return ""
    before = text[start - 2 : start - 1] if start > 1 else ""
    return "" if before and (_kind(before) or before in _MINUS) else "-"


def _sharps(text: str, end: int) -> str:
    """The "+", "++" or "#" directly after letters; "" if something goes on after it."""
    if text[end - 1].isdecimal():
        return ""
    sharps = text[end : end + 1 + (text[end : end + 2] == "++")]
    after = text[end + len(sharps) : end + len(sharps) + 1]
    if not sharps or sharps[0] not in _SHARPS or (sharps != "++" and after and _kind(after)):
        return ""
    return "" if after and after in _SHARPS else sharps


ERRORS = ("repeats the prompt", "starts with The", "says A.", "says nothing", "other")


def error_class(generated: str, prompt: str) -> str:
    """What kind of wrong answer this is: one of `ERRORS` (arXiv 2502.17355, error analysis)."""
    spoken = words(generated)
    if not spoken:
        return "says nothing"
    if re.match(r"\s*A\s*\.", generated):
        return "says A."
    if spoken[0] == "the":
        return "starts with The"
    prompted = words(prompt)
    complete = spoken[:-1]  # the last word may be cut short
    if not complete and len(spoken[0]) < SHORTEST:
        return "other"
    for start in range(len(prompted) - len(spoken) + 1):
        end = start + len(complete)
        if prompted[start:end] == complete and prompted[end].startswith(spoken[-1]):
            return "repeats the prompt"
    return "other"
