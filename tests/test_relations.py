"""Relations: the data, the split, and the rule that says when an answer is right."""

import json
from pathlib import Path

import pytest

from jaxneurons.errors import DataError
from jaxneurons.relations import (
    Relation,
    Triple,
    answer_form,
    answers,
    any_answers,
    objects,
    prompt,
    read_relation,
    read_relations,
    split,
)

LRE = Path(__file__).resolve().parents[2] / "shared/data/lre"


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
    ],
)
def test_wrong_answers(generated, expected):
    assert not answers(generated, expected)


def test_a_subject_may_have_several_right_answers():
    triples = [Triple("a", "Paris"), Triple("a", "Lyon"), Triple("b", "Rome")]
    assert objects(triples, "a") == ["Paris", "Lyon"]
    assert any_answers(" Lyon,", objects(triples, "a"))
    assert not any_answers(" Rome", objects(triples, "a"))


def test_templates():
    assert answer_form("The CEO of {} is") == "The CEO of {} is? Answer:"
    assert answer_form("Who is it of {}?") == "Who is it of {}? Answer:"
    relation = Relation("r", (Triple("x", "y"),), {"plain": ("{} is in",)})
    assert prompt(relation.template("plain"), "Rome {}") == "Rome {} is in"
    with pytest.raises(DataError, match="no template set 'plan'; did you mean 'plain'"):
        relation.template("plan")
    with pytest.raises(DataError, match="template 1 of 'plain', there are 1"):
        relation.template("plain", 1)


def made(subjects: int, each: int = 1) -> Relation:
    triples = tuple(Triple(f"s{i}", f"o{i}.{j}") for i in range(subjects) for j in range(each))
    return Relation("r", triples, {"plain": ("{} is",)})


@pytest.mark.parametrize(("subjects", "each", "held"), [(200, 1, 50), (40, 1, 20), (60, 3, 50)])
def test_no_subject_is_on_both_sides(subjects, each, held):
    relation = made(subjects, each)
    parts = split(relation, evaluation=50, seed=1)
    sides = [{t.subject for t in side} for side in (parts.detection, parts.evaluation)]
    assert not sides[0] & sides[1]
    assert set(parts.detection) | set(parts.evaluation) == set(relation.triples)
    assert held - each < len(parts.evaluation) <= held
    assert split(relation, evaluation=50, seed=1) == parts
    assert split(relation, evaluation=50, seed=2) != parts


def test_one_subject_cannot_be_split():
    with pytest.raises(DataError, match="'r' has one subject"):
        split(made(1, 5))


def write(path, **changes):
    values = {
        "name": "in",
        "prompt_templates": ["{} is in"],
        "prompt_templates_zs": ["Where is {}? It is in"],
        "properties": {"domain_name": "landmark"},
        "samples": [{"subject": " a ", "object": "b"}, {"subject": "a", "object": "b"}],
    }
    path.write_text(json.dumps({**values, **changes}))
    return path


def test_reading(tmp_path):
    relation = read_relation(write(tmp_path / "where.json"))
    assert relation.name == "where"
    assert relation.triples == (Triple("a", "b"),)
    assert relation.subject_type == "landmark"
    assert relation.templates == {
        "plain": ("{} is in",),
        "zero-shot": ("Where is {}? It is in",),
        "answer": ("{} is in? Answer:",),
    }


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"samples": []}, "no samples"),
        ({"samples": {}}, "not a relation"),
        ({"samples": [{"subject": "a"}]}, "sample 1: subject and object"),
        ({"samples": [{"subject": "a", "object": "b"}, 3]}, "sample 2"),
        ({"samples": [{"subject": "a", "object": " "}]}, "sample 1"),
        ({"prompt_templates": "x"}, "prompt_templates must be a list"),
        ({"prompt_templates": ["no place"]}, "must have one {} for the subject"),
    ],
)
def test_malformed_files(tmp_path, changes, message):
    with pytest.raises(DataError, match=rf"r\.json: .*{message}"):
        read_relation(write(tmp_path / "r.json", **changes))


def test_directories(tmp_path):
    with pytest.raises(DataError, match="no such directory"):
        read_relations(tmp_path / "x")
    with pytest.raises(DataError, match="no relation files"):
        read_relations(tmp_path)
    (tmp_path / "a.json").write_text("{")
    with pytest.raises(DataError, match=r"a\.json: not valid JSON"):
        read_relations(tmp_path)


@pytest.mark.skipif(not LRE.is_dir(), reason="the LRE files are not here")
def test_the_published_relations():
    found = read_relations(LRE)
    assert len(found) == 12
    assert all({"plain", "zero-shot", "answer"} <= set(r.templates) for r in found)
    by_name = {relation.name: relation for relation in found}
    assert Triple("Sirius", "Canis Major") in by_name["star_constellation"].triples
    for relation in found:
        parts = split(relation)
        assert len(parts.evaluation) == 50
