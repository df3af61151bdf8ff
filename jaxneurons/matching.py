"""When generated text counts as right: a rule on text, so that tokenisations need not agree.

arXiv 2502.17355, section 3: two greedy tokens must be a prefix of the object. But a one-token
object is followed by something that is no part of it, and case and spaces differ.
"""

import re
import unicodedata
from collections.abc import Sequence

_WORD = re.compile(
    "[\u3400-\u9fff\uf900-\ufaff]"  # ideographs write no spaces: each is a word
    "|[\u30a1-\u30fa\u30fc-\u30ff]+"  # katakana, so that a particle after a name is another word
    "|[\u3041-\u309f]+"  # hiragana
    r"|[^\W_\u3041-\u30ff\u3400-\u9fff\uf900-\ufaff]+"
)

SHORTEST = 3
"""Letters that the beginning of a word needs to stand for the word."""


def answers(generated: str, expected: str) -> bool:
    """Whether generated text gives the expected object.

    Both are normalised: Unicode compatibility form, case folded, without accents, everything but
    letters and digits taken as spaces; ideographs are words of their own, as are runs of katakana.
    Then the words must agree from the first on, until one of the two ends. What is generated may
    end early, as two tokens do: between two words, or within one if at least three of its letters
    are there; then nothing may follow that the object does not have there. So " Poland." and
    "poland and" give "Poland", " new yor" and " New" give "New York", "巴黎是" gives "巴黎"; "the
    Poland", "Polish", "Pol.", " New." and "New" followed by "Jersey" do not. The case counts for
    answers of one or two letters: " he was" does not give "He".
    """
    said, wanted = _spans(generated), _spans(expected)
    if not said or not wanted:
        return False
    length = min(len(said), len(wanted))
    if [w for w, *_ in said[:length]] == [w for w, *_ in wanted[:length]]:
        tail = _normal(generated)[said[-1][2] :].rstrip(" \ufffd")
        rest = _normal(expected)[wanted[length - 1][2] :]
        whole = len(said) >= len(wanted) or rest.startswith(tail)
        return whole and _same_symbol(generated, expected)
    if [w for w, *_ in said[: length - 1]] != [w for w, *_ in wanted[: length - 1]]:
        return False
    last, full = said[length - 1], wanted[length - 1]
    cut = length == len(said) and not _normal(generated)[last[2] :].rstrip("\ufffd")
    return cut and len(last[0]) >= SHORTEST and full[0].startswith(last[0])


def _same_symbol(generated: str, expected: str) -> bool:
    """Whether the case agrees, if the answer is one or two letters: "he" is not helium's symbol."""
    if not re.fullmatch("[A-Za-z]{1,2}", expected.strip()):
        return True
    found = _WORD.search(unicodedata.normalize("NFKC", generated))
    return found is not None and found.group() == expected.strip()


def any_answers(generated: str, expected: Sequence[str]) -> bool:
    """Whether generated text gives one of the expected objects."""
    return any(answers(generated, one) for one in expected)


def words(text: str) -> list[str]:
    """The words of a text, normalised as `answers` says."""
    return [word for word, *_ in _spans(text)]


def _normal(text: str) -> str:
    """Compatibility form, case folded, without accents."""
    parts = unicodedata.normalize("NFKD", text).casefold()
    return unicodedata.normalize("NFKC", re.sub("[\u0300-\u036f]", "", parts))


def _spans(text: str) -> list[tuple[str, int, int]]:
    """Words with their places in the normalised text."""
    return [(m.group(), *m.span()) for m in _WORD.finditer(_normal(text))]


ERRORS = ("repeats the prompt", "starts with The", "says A.", "says nothing", "other")


def error_class(generated: str, prompt: str) -> str:
    """What kind of wrong answer this is: one of `ERRORS` (arXiv 2502.17355, error analysis)."""
    said = words(generated)
    if not said:
        return "says nothing"
    if re.match(r"\s*A\s*\.", generated):
        return "says A."
    if said[0] == "the":
        return "starts with The"
    asked = words(prompt)
    whole = said[:-1]  # the last word may be cut short
    if not whole and len(said[0]) < SHORTEST:
        return "other"
    for start in range(len(asked) - len(said) + 1):
        end = start + len(whole)
        if asked[start:end] == whole and asked[end].startswith(said[-1]):
            return "repeats the prompt"
    return "other"
