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

    Both are normalised: Unicode compatibility form, case folded, everything but letters and digits
    taken as spaces; ideographs are words of their own, as are runs of katakana. Then the words must
    agree from the first on, until one of the two ends; the last word compared may be cut short on
    the generated side (two tokens rarely end a word), if at least three of its letters are there
    and nothing follows them. So " Poland." and "poland and" give "Poland", " new yor" gives "New
    York", "巴黎是" "巴黎"; "the Poland", "Polish", "Pol." and "New" followed by "Jersey" do not.
    """
    said, wanted = words(generated), words(expected)
    if not said or not wanted:
        return False
    length = min(len(said), len(wanted))
    if said[: length - 1] != wanted[: length - 1]:
        return False
    last, full = said[length - 1], wanted[length - 1]
    if last == full:
        return True
    cut = length == len(said) and generated.rstrip("\ufffd")[-1:].isalnum()  # by the last token
    return cut and len(last) >= SHORTEST and full.startswith(last)


def any_answers(generated: str, expected: Sequence[str]) -> bool:
    """Whether generated text gives one of the expected objects."""
    return any(answers(generated, one) for one in expected)


def words(text: str) -> list[str]:
    """The words of a text, normalised as `answers` says."""
    return _WORD.findall(unicodedata.normalize("NFKC", text).casefold())


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
    for start in range(len(asked) - len(said) + 1):
        end = start + len(whole)
        if asked[start:end] == whole and asked[end].startswith(said[-1]):
            return "repeats the prompt"
    return "other"
