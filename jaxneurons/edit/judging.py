"""What generated text says: its first sentence, whether that gives an answer, how varied it is."""

import re
from collections import Counter
from collections.abc import Sequence

import numpy as np

from jaxneurons.prompts import matching

_END = re.compile(r"[.!?\u2026]+(?=[\s\"'\u201d\u2019)\]]|$)|[\u3002\uff01\uff1f\u0964\u061f]|\n")
"""Where a sentence ends: a mark before white space, a quotation mark or the end; a line's end."""
_PIECES = re.compile(r"\w+|[^\w\s]")
WEIGHTS = {2: 2 / 3, 3: 4 / 3}
"""Of bigrams and trigrams in the entropy (ROME, 2202.05262, and its successors)."""


def first_sentence(text: str, *, inside: int = 0) -> str:
    """A text up to the end of its first sentence, without the mark; white space before it is left.

    Args:
      text: what was generated.
      inside: ends to pass over: an answer such as "St. Louis" has one of its own.
    """
    text = text.lstrip()
    ends = [match.start() for match in _END.finditer(text)]
    return text[: ends[inside]] if len(ends) > inside else text


def gives(text: str, answer: str) -> bool:
    """Whether free generation gives an answer: its first sentence begins with the whole answer.

    Strict: the words of the answer are the first words of the sentence, all of them and each whole
    (" Poland, a" gives "Poland"; " Polandia", " the Poland", " Pol" and " New. York" for "New York"
    do not). The text is cut where its first sentence ends, never at the answer's length, and
    nothing of the answer may be missing. Case, accents and punctuation are compared as
    `prompts.matching.answers` says.
    """
    answer = answer.strip()
    if not answer:
        return False
    inside = sum(match.end() < len(answer) for match in _END.finditer(answer))
    return matching.answers(first_sentence(text, inside=inside), answer, ended=True)


def same_sentence(text: str, other: str) -> bool:
    """Whether the first sentences of two texts are the same words."""
    sentences = first_sentence(text), first_sentence(other)
    if sentences[0].split() == sentences[1].split():
        return True
    first, second = map(matching.words, sentences)
    return bool(first) and first == second


def entropy(pieces: Sequence[str], n: int) -> float:
    """Entropy in bits of the n-grams of a text; 0 where there are none."""
    counts = np.array([*Counter(zip(*(pieces[i:] for i in range(n)), strict=False)).values()])
    if not len(counts):
        return 0.0
    shares = counts / counts.sum()
    return float(-(shares * np.log2(shares)).sum()) + 0.0


def fluency(text: str) -> float:
    """Mean of the entropies, in bits, of bigrams (times 2/3) and trigrams (times 4/3) of a text.

    Of words and marks. Low where a model repeats itself; the papers print 100 times this.
    """
    pieces = _PIECES.findall(text)
    return float(np.mean([weight * entropy(pieces, n) for n, weight in WEIGHTS.items()]))
