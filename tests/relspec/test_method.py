"""The method's parts, each against what it is defined to be."""

import collections
import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxneurons.errors import ConfigError, DataError
from jaxneurons.prompts.relations import Relation, Translation, Triple
from jaxneurons.relspec.method import (
    RelSpecConfig,
    best_template,
    concept_prompts,
    cumulativity,
    drop,
    examples,
    frequency_test,
    relation_prompts,
    sweep_sizes,
    too_few,
)

OWNER = ["a"] * 5 + ["b"] * 30 + ["a"] * 5 + ["c"] * 30


def test_positives_and_negatives():
    found = examples(OWNER, "a", settings=RelSpecConfig())
    assert {OWNER[i] for i in found.positives} == {"a"}
    assert len(found.positives) == 10
    assert len(set(found.negatives)) == 40
    assert {OWNER[i] for i in found.negatives} == {"b", "c"}
    again = examples(OWNER, "a", settings=RelSpecConfig())
    np.testing.assert_array_equal(found.negatives, again.negatives)
    other = examples(OWNER, "a", settings=RelSpecConfig(seed=1))
    assert found.negatives.tolist() != other.negatives.tolist()
    # Fewer than four times as many: all of them.
    assert len(examples(OWNER, "b", settings=RelSpecConfig()).negatives) == 40


def test_one_relation_has_no_negatives():
    with pytest.raises(DataError, match="'a' has no negatives: no other relation"):
        examples(["a"] * 9, "a", settings=RelSpecConfig())


def test_prompts():
    """One for each subject, with all of its objects; in another language those translated."""
    triples = (Triple("Köln", "x"), Triple("Köln", "y"), Triple("Rom", "z"))
    german = Translation({"plain": ("{} ist",)}, {triples[2]: Triple("Roma", "zett")})
    relation = Relation("r", triples, {"plain": ("{} is",)}, translations={"de": german})
    found = relation_prompts(relation, triples[1:], "{} is", evaluation="eva")
    assert [(one.text, one.objects) for one in found] == [
        ("Köln is", ("x", "y")),
        ("Rom is", ("z",)),
    ]
    found = relation_prompts(relation, triples, "{} ist", evaluation="eva", language="de")
    assert [(one.text, one.objects, one.language) for one in found] == [
        ("Roma ist", ("zett",), "de")
    ]


def test_the_template_answered_most_often():
    assert best_template([np.array([True, False]), np.array([True, True])]) == 1
    assert best_template([np.array([True]), np.array([True, True])]) == 0
    assert best_template([np.array([], bool), np.array([False, True])]) == 1


@pytest.mark.parametrize(
    ("validated", "of", "known"),
    [(9, 30, False), (10, 30, True), (19, 200, False), (20, 200, True)],
)
def test_unknown_relations(validated, of, known):
    found = too_few(validated, of, RelSpecConfig())
    assert (found == "") == known
    assert known or found.startswith(f"{validated} of {of} detection prompts answered")


def test_drops():
    assert drop(0.5, 0.25) == 0.5
    assert drop(0.5, 0.75) == -0.5
    assert math.isnan(drop(0.0, 0.5))


@given(st.lists(st.tuples(*[st.booleans()] * 3), max_size=30))
def test_cumulativity_is_counted(rows):
    table = np.array(rows, bool).reshape(-1, 3)
    found = cumulativity(*table.T)
    broken = [additions for smaller, larger, additions in rows if smaller and not larger]
    assert found.total == len(broken)
    assert found.affected == sum(not right for right in broken)
    if broken:
        assert found.cumulativity == pytest.approx(sum(broken) / len(broken))
    else:
        assert math.isnan(found.cumulativity)


def test_frequency():
    """The p-value of six pairs that all point one way, by counting the 2**6 signs."""
    pairs = [(1 + 0.1 * i, 0.5) for i in range(6)]
    found = frequency_test(pairs)
    differences = [a - b for a, b in pairs]
    ranks = np.argsort(np.argsort(np.abs(differences))) + 1
    sums = [
        sum(r for r, sign in zip(ranks, signs, strict=True) if sign)
        for signs in itertools.product((0, 1), repeat=6)
    ]
    extreme = sum(1 for s in sums if min(s, 21 - s) <= 0) / len(sums)
    assert (found.pairs, found.statistic) == (6, 0)
    assert found.p_value == pytest.approx(extreme)
    assert found.resilient == pytest.approx(1.25)
    assert frequency_test([]).pairs == 0
    same = frequency_test([(1.0, 1.0), (2.0, 2.0)])
    assert math.isnan(same.p_value)
    assert same.resilient == 1.5


def test_sizes():
    assert sweep_sizes(109_440) == (10, 50, 200, 500, 1000, 3000, 10944)
    assert sweep_sizes(835_584)[-2:] == (50_000, 83_558)
    assert sweep_sizes(5) == (1,)


def test_concept_prompts_are_balanced():
    subjects = {"city": [f"c{i}" for i in range(3)], "star": [f"s{i}" for i in range(40)]}
    found = concept_prompts(subjects, words=("can", "has a"), count=13, seed=0)
    for kind, count in (("city", 3), ("star", 6)):
        endings = collections.Counter(text[len(subject) + 1 :] for subject, text in found[kind])
        assert endings == {"can": count, "has a": count}
        assert len({subject for subject, _ in found[kind]}) == count
        assert {subject for subject, _ in found[kind]} <= set(subjects[kind])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sites": ()}, "sites must be some sites"),
        ({"sites": ("up", "up")}, "each once"),
        ({"sites": ("ups",)}, "unknown site 'ups'"),
        ({"seeds": 0}, "seeds must be at least 1"),
        ({"steps": 0}, "steps must be at least 1, or None, got 0"),
        ({"templates": ()}, "templates must name"),
        ({"minimum_right": 0}, "minimum_right must be at least 1"),
        ({"seed": -1}, "seed must be at least 0"),
        ({"detection": 0}, "detection must be at least 1"),
        ({"minimum_share": 2.0}, "minimum_share must be from 0 to 1"),
        ({"dtype": "float99"}, "unknown response dtype 'float99'; did you mean 'float32'"),
        ({"k": 0}, "k must be a number of neurons, or below 1 a share of all, got 0"),
        ({"k": 1.5}, "k must be a number of neurons"),
        ({"k": math.nan}, "k must be a number of neurons"),
    ],
)
def test_settings(changes, message):
    with pytest.raises(ConfigError, match=message):
        RelSpecConfig(**changes)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("seeds", 2.5, "seeds must be an integer; got 2.5"),
        ("seeds", True, "seeds must be an integer; got True"),
        ("templates", "plain", "templates must be a tuple of strings; got 'plain'"),
        ("sites", ["up"], "sites must be a tuple"),
        ("steps", "two", "steps must be an integer or None"),
        ("dtype", None, "dtype must be a string; got None"),
    ],
)
def test_settings_of_another_type(name, value, message):
    settings = RelSpecConfig()
    object.__setattr__(settings, name, value)  # the tests' own type checks would come first
    with pytest.raises(ConfigError, match=message):
        settings.__post_init__()
