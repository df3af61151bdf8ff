"""When free generation gives an answer, and how varied a text is."""

import math

import pytest

from jaxneurons.edit import judging
from jaxneurons.edit.judging import first_sentence, gives, same_sentence


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        (" Paris. It is", "Paris"),
        (" Paris, which is 3.5 km", "Paris, which is 3.5 km"),
        ("\n\nParis\nThe capital", "Paris"),
        (' Paris!" he said', "Paris"),
        ("巴黎。首都", "巴黎"),
        (" in the U.S.A", "in the U.S.A"),
        ("... Paris", ""),
        ("", ""),
    ],
)
def test_first_sentence(text, sentence):
    assert first_sentence(text) == sentence


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (" Paris. It is", "Paris"),
        (" Paris, the capital", " Paris"),
        ("\nparis\n", "Paris"),
        (" New York City is", "New York"),
        (" St. Louis. It", "St. Louis"),
        (" U.S. Navy officer", "U.S. Navy"),
        ("巴黎。", "巴黎"),
    ],
)
def test_gives(text, answer):
    assert gives(text, answer)


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (" Parisian and", "Paris"),  # goes on beyond the answer's length
        (" the Paris", "Paris"),
        (" Par", "Paris"),
        (" New", "New York"),
        (" New. York", "New York"),
        (" New\nYork", "New York"),
        (" London. Paris", "Paris"),
        (". Paris", "Paris"),
        (" St. Paul. Louis", "St. Louis"),
        ("", "Paris"),
        (" Paris", ""),
    ],
)
def test_does_not_give(text, answer):
    assert not gives(text, answer)


def test_same_sentence():
    assert same_sentence(" Paris. It", " paris! And")
    assert same_sentence("", " ")
    assert not same_sentence(" Paris is", " Paris was")
    assert not same_sentence(" +", " -")


def test_entropy_by_hand():
    # ab, ba, ab: shares 2/3 and 1/3.
    expected = -(2 / 3 * math.log2(2 / 3) + 1 / 3 * math.log2(1 / 3))
    assert judging.entropy(["a", "b", "a", "b"], 2) == pytest.approx(expected)
    assert judging.entropy(["a"] * 9, 3) == judging.entropy(["a"], 2) == 0
    # 8 different words: 7 bigrams, 6 trigrams, each once.
    text = "one two three four five six seven eight"
    uniform = (2 / 3 * math.log2(7) + 4 / 3 * math.log2(6)) / 2
    assert judging.fluency(text) == pytest.approx(uniform)
    assert judging.fluency("the the the the the") == 0 < judging.fluency(text)
