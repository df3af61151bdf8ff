"""When generated text counts as right, and what kind of wrong it is."""

import re
import unicodedata

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from jaxneurons.prompts.matching import ERRORS, answers, any_answers, error_class, words
from jaxneurons.prompts.relations import bundled_relations


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
        (" C++ is", "C++"),
        ("C++11", "C++"),
        (" c#.", "C#"),
        (" −1.", "-1"),
        (" 3,14", "3.14"),
        (" 1914-1918", "1914"),
        (" - 5", "5"),
        (" COVID-19", "COVID-19"),
        ("x+y", "x"),
        ("Poland###", "Poland"),
        (" 5 dollars", "$5"),
        (" 50%", "50"),
        ("दिल्ली है", "दिल्ली"),
        ("กรุงเทพและ", "กรุงเทพ"),
        ("กรุง", "กรุงเทพ"),
        ("さくらです", "さくら"),
        ("מֹשֶׁה", "משה"),
        (" محمد", "مُحَمَّد"),
        ("می\u200cخواهم", "میخواهم"),
        ("Po\u00adland", "Poland"),
        ("🍎 and", "🍎"),
        ("❤", "❤\ufe0f"),
        ("🍎🍎", "🍎"),
        (" +.", "+"),
        ("1\ufe0f\u20e3", "1"),
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
        ("C#", "C++"),
        ("C#", "C"),
        ("C", "C#"),
        ("C++", "C"),
        (" A+", "A"),
        (" O-", "O+"),
        ("-1", "1"),
        ("−1", "1"),
        ("1", "-1"),
        ("1.5", "1"),
        ("3", "3.14"),
        ("3.1", "3.14"),
        ("3:14", "3.14"),
        ("1/2", "1"),
        ("10:30", "10"),
        ("€5", "$5"),
        ("5 €", "$5"),
        ("50 %", "50 °"),
        ("द", "दिल्ली"),
        ("दि", "दिल्ली"),
        ("दिल", "दल"),
        ("ভ", "ভারত"),
        ("ก", "กรุงเทพ"),
        ("กา", "ก"),
        ("🍏", "🍎"),
        ("++", "+"),
        ("+=", "+"),
        ("...", "."),
        ("\ufffd", "\ufffd"),
    ],
)
def test_wrong_answers(generated, expected):
    assert not answers(generated, expected)


def test_what_the_model_ended_is_not_cut_short():
    for said, expected in ((" New", "New York"), (" Pol", "Poland"), (" U.", "U.S.")):
        assert answers(said, expected)
        assert not answers(said, expected, ended=True)
        assert not any_answers(said, ["x", expected], ended=True)
        assert answers(expected, expected, ended=True)


def plain_words(text):
    """Runs of letters and digits: the rule for names in scripts with spaces, and no more."""
    return re.findall(r"\w+", unicodedata.normalize("NFKC", text).casefold())


def test_names_are_judged_by_their_words_as_ever():
    """A third of what is bundled, each against each, against a plain rule: no surprise."""
    pairs = 0
    for relation in bundled_relations():
        triples = {"": relation.triples}
        for language, found in relation.translations.items():
            if language in ("de", "es", "fr"):
                triples[language] = tuple(found.triples.values())
        for some in triples.values():
            names = sorted({n for t in some for n in (t.subject, t.object) if n.isascii()})
            split = {name: plain_words(name) for name in names[::3] if len(name) > 2}
            for said in split:
                for wanted in split:
                    a, b = split[said], split[wanted]
                    length = min(len(a), len(b))
                    if len(a) < len(b):  # cut between two words, or within one
                        same = a[:-1] == b[: length - 1] and b[length - 1].startswith(a[-1])
                        same &= a == b[:length] or len(a[-1]) > 2
                    else:
                        same = a[: length - 1] == b[:-1] and (
                            a[length - 1] == b[-1]
                            or (len(a) == length and len(a[-1]) > 2 and b[-1].startswith(a[-1]))
                        )
                    assert answers(said, wanted) == same, (said, wanted)
                    pairs += 1
                    if said == wanted:
                        assert answers(f" {said}.\n", wanted)
    assert pairs > 20_000


@pytest.mark.parametrize("category", ["Mn", "Mc", "Me", "Cf"])
def test_no_mark_cuts_a_word(category):
    """Whatever Unicode has: a letter before a mark is not the word, or the mark says nothing."""
    marks = [c for c in map(chr, range(0x110000)) if unicodedata.category(c) == category]
    assert len(marks) > 10
    for mark in marks:
        word = f"ab{mark}cd"
        assert len(words(word)) == 1, hex(ord(mark))
        assert not answers("ab", word)
        assert answers(f" {word}, x", word)


@given(st.text(max_size=12), st.text(max_size=12))
@example("0¢°", "")
@example("5 %", "$")
def test_a_text_gives_itself_and_survives_what_follows(text, more):
    if words(text):
        assert answers(text, text)
        assert answers(f" {text}. {more}", text)
        same = words(text.upper()) == words(text) and len(text.strip()) > 2
        assert answers(text.upper(), text) or not same
    else:
        assert not answers(text, text) or unicodedata.normalize("NFKC", text).strip()
    assert any_answers(text, [more, text]) == (answers(text, more) or answers(text, text))


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
