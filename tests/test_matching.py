"""When generated text counts as right, and what kind of wrong it is."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxneurons.matching import ERRORS, answers, any_answers, error_class, words


@pytest.mark.parametrize(
    ("generated", "expected"),
    [
        (" Poland.", "Poland"),
        ("poland and", "Poland"),
        (" New York", "New York City"),
        (" new yor", "New York"),
        (" Côte d", "Côte d'Ivoire"),
        ("\n\nGermany", "Germany"),
        (" U.S", "U.S."),
        (" Ａpple", "Apple"),
        (" foot", "football"),
        ("巴黎是", "巴黎"),
        ("巴", "巴黎"),
        ("フランスです", "フランス"),
        ("フランスの", "フランス"),
        (" München,", "münchen"),
        (" Н", "Н"),
        ("pla\ufffd", "platinum"),
        (" New", "New York"),
        (" New ", "New York"),
        (" Frito-", "Frito-Lay"),
        (" U.", "U.S."),
        (" Bogota.", "Bogotá"),
        (" ガーナの", "ガーナ"),
        (" He,", "He"),
        ("W", "W"),
    ],
)
def test_right_answers(generated, expected):
    assert answers(generated, expected)


@pytest.mark.parametrize(
    ("generated", "expected"),
    [
        (" Polish", "Poland"),
        (" the Poland", "Poland"),
        (" New Jersey", "New York"),
        (" A.", "Apple"),
        (" Po", "Poland"),
        ("", "Poland"),
        (" ...", "Poland"),
        (" France", ""),
        (" Germany", "Ger"),
        (" footballer", "football"),
        (" York", "New York"),
        ('fast"', "faster"),
        (" Pol.", "Poland"),
        (" New.", "New York"),
        (" New\n", "New York"),
        (" San,", "San Marino"),
        ("南。", "南非"),
        (" カーナ", "ガーナ"),
        (" he was", "He"),
        (" as follows", "As"),
        (" IN", "In"),
        ("巴西", "巴黎"),
        ("フィンランド", "フランス"),
        ("フ", "フランス"),
        (" ", "x"),
    ],
)
def test_wrong_answers(generated, expected):
    assert not answers(generated, expected)


@given(st.text(max_size=12), st.text(max_size=12))
def test_a_text_gives_itself_and_survives_what_follows(text, more):
    if words(text):
        assert answers(text, text)
        assert answers(f" {text}. {more}", text)
        same = words(text.upper()) == words(text) and len(text.strip()) > 2
        assert answers(text.upper(), text) or not same
    else:
        assert not answers(text, text)
    assert any_answers(text, [more, text]) == (answers(text, more) or bool(words(text)))


@pytest.mark.parametrize(
    ("generated", "prompt", "kind"),
    [
        (" A.", "x", "says A."),
        ("A. ", "x", "says A."),
        (" The city", "x", "starts with The"),
        ("the", "The city", "starts with The"),
        ("", "x", "says nothing"),
        ("\n\n", "x", "says nothing"),
        (" capital of", "The capital of France is", "repeats the prompt"),
        (" Fran", "The capital of France is", "repeats the prompt"),
        (" France is", "The capital of France is", "repeats the prompt"),
        (" is France", "The capital of France is", "other"),
        (" France was", "The capital of France is", "other"),
        (" Lyon", "The capital of France is", "other"),
        (" A", "x", "other"),
        (" Apple.", "x", "other"),
        (" c.", "The capital of Albania is the city of", "other"),
        (" cap", "The capital of Albania is the city of", "repeats the prompt"),
    ],
)
def test_kinds_of_errors(generated, prompt, kind):
    assert error_class(generated, prompt) == kind
    assert kind in ERRORS
