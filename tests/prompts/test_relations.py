"""Relations: reading, translations, the split, the files of the package."""

import json
import re

import pytest

from jaxneurons.errors import DataError
from jaxneurons.prompts.matching import words
from jaxneurons.prompts.relations import (
    NEUTRAL,
    Relation,
    Triple,
    answer_form,
    bundled_relations,
    objects,
    prompt,
    read_counts,
    read_relation,
    read_relations,
    split,
)


def test_a_subject_may_have_several_right_answers():
    triples = [Triple("a", "Paris"), Triple("a", "Lyon"), Triple("b", "Rome"), Triple("a", "Paris")]
    assert objects(triples) == {"a": ("Paris", "Lyon"), "b": ("Rome",)}


def test_templates():
    assert answer_form("The CEO of {} is") == "The CEO of {} is? Answer:"
    assert answer_form("Who is it of {}?") == "Who is it of {}? Answer:"
    relation = Relation("r", (Triple("x", "y"),), {"plain": ("{} is in",)})
    assert prompt(relation.wordings(["plain"])[0], "Rome {}") == "Rome {} is in"
    with pytest.raises(DataError, match="no template set 'plan'; did you mean 'plain'"):
        relation.wordings(["plan"])
    more = Relation("r", (), {"a": ("x {}", "y {}"), "b": ("y {}", "z {}")})
    assert more.wordings(["b", "none", "a"]) == ("y {}", "z {}", "x {}")
    for plain, form in (
        ('The reverse of "{}" is "', 'The reverse of "{}" is? Answer:'),
        ("Animal: {}. Type of animal:", "Animal: {}. Type of animal? Answer:"),
        ("The currency of {} is the", "The currency of {} is? Answer:"),
        ("{} is a", "{} is? Answer:"),
    ):
        assert answer_form(plain) == form


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
        ({"prompt_templates": ["{} and {}"]}, "must have one {} for the subject"),
        ({"prompt_templates": [], "prompt_templates_zs": []}, "no templates"),
        ({"neutral_template": "{} is nice"}, "neutral_template must be a text that ends"),
        ({"properties": "x"}, "properties must be an object"),
        ({"templates": {"own": "x"}}, "templates: own must be a list"),
        ({"translations": {"de": 3}}, "translations: de: must be an object"),
        ({"translations": {"de": {"prompt_templates": ["x"]}}}, "de: prompt_templates: 'x' must"),
        (
            {
                "samples": [
                    {"subject": "a", "object": "b", "translations": {"de": {"subject": "x"}}}
                ]
            },
            "sample 1: de: subject and object",
        ),
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
    with pytest.raises(DataError, match=r"a\.json: line 1, column 2: not JSON"):
        read_relations(tmp_path)


def test_the_published_format(relation_directory):
    relations = read_relations(relation_directory.path)
    files = {
        path.stem: json.loads(path.read_text())
        for path in relation_directory.path.iterdir()
        if path.suffix == ".json"
    }
    assert [relation.name for relation in relations] == sorted(files)
    by_name = {relation.name: relation for relation in relations}
    assert Triple("Sirius", "Canis Major") in by_name["star_constellation"].triples
    for name, relation in by_name.items():
        record = files[name]
        assert {(t.subject, t.object) for t in relation.triples} == {
            (sample["subject"], sample["object"]) for sample in record["samples"]
        }
        assert {"plain", "zero-shot", "answer"} <= set(relation.templates)
        assert relation.templates["plain"] == tuple(record["prompt_templates"])
        assert relation.templates["zero-shot"] == tuple(record["prompt_templates_zs"])
        assert relation.subject_type == record["properties"]["domain_name"]
        parts = split(relation)
        subjects = {triple.subject for triple in relation.triples}
        held = {triple.subject for triple in parts.evaluation}
        assert not held & {triple.subject for triple in parts.detection}
        if relation_directory.genuine:
            assert len(parts.evaluation) == 50
        else:
            assert len(held) == len(subjects) // 2
    assert len(relations) == (12 if relation_directory.genuine else 2)


def test_further_keys(tmp_path):
    relation = read_relation(
        write(
            tmp_path / "r.json",
            templates={"mine": ["Where, {}?"]},
            neutral_template="So much for {}",
            translations={"de": {"prompt_templates": ["{} liegt in"]}, "fr": {}},
            samples=[
                {
                    "subject": "Cologne",
                    "object": "Germany",
                    "translations": {"de": {"subject": "Köln", "object": "Deutschland"}},
                },
                {"subject": "Lyon", "object": "France"},
            ],
        )
    )
    assert relation.templates["mine"] == ("Where, {}?",)
    assert relation.neutral == "So much for {}"
    german = relation.translations["de"]
    assert german.templates == {"plain": ("{} liegt in",)}  # no English "Answer:"
    assert german.triples == {Triple("Cologne", "Germany"): Triple("Köln", "Deutschland")}
    assert not relation.translations["fr"].triples
    assert read_relation(write(tmp_path / "s.json")).neutral == NEUTRAL


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_encodings_that_say_what_they_are(tmp_path, encoding):
    path = write(tmp_path / "r.json", samples=[{"subject": "Köln", "object": "東京"}])
    path.write_bytes(json.dumps(json.loads(path.read_text()), ensure_ascii=False).encode(encoding))
    assert read_relation(path).triples == (Triple("Köln", "東京"),)


def test_another_encoding(tmp_path):
    path = write(tmp_path / "r.json", samples=[{"subject": "Köln", "object": "b"}])
    text = json.dumps(json.loads(path.read_text()), ensure_ascii=False)
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(DataError, match=r"r\.json: not in UTF-8 \(byte \d+, line 1\)"):
        read_relation(path)


def test_what_json_would_drop_is_refused(tmp_path):
    path = write(tmp_path / "r.json")
    text = path.read_text()
    for old, new, message in (
        ('"samples":', '"samples": [], "samples":', "the key 'samples' is written twice"),
        ('"object": "b"', '"object": "b", "object": "c"', "the key 'object' is written twice"),
        ('"name": "in"', '"name": NaN', "NaN is no JSON value"),
        ('"b"', '"\\ud800"', "holds half a surrogate pair"),
        ('"b"', "1945", "sample 1: subject and object are needed, as texts"),
    ):
        assert old in text
        path.write_text(text.replace(old, new, 1))
        with pytest.raises(DataError, match=rf"r\.json: .*{message}"):
            read_relation(path)
    path.write_text(text.replace("\n", "") + "\n" + text.replace("\n", ""))
    with pytest.raises(DataError, match=r"r\.json: line 2, column 1: not JSON"):  # no JSON Lines
        read_relation(path)


def test_a_fact_counted_twice(tmp_path):
    path = tmp_path / "c.csv"
    path.write_text("Relation;Subject;Object;Count\nr;a;b;3\nr;a;b;3.0\n")
    assert read_counts(path) == {("r", Triple("a", "b")): 3}
    path.write_text("relation,subject,object,count\nr,a,b,3\n\nr,a,b,4\n")
    with pytest.raises(DataError, match=r"line 4: the fact r, a, b is there twice, .* 3 and 4"):
        read_counts(path)


def test_counts(tmp_path):
    path = tmp_path / "c.csv"
    path.write_text("relation,subject,object,count\nr,a,b,3\nr, a ,c,1e3\n")
    assert read_counts(path) == {("r", Triple("a", "b")): 3, ("r", Triple("a", "c")): 1000}
    for bad in ("r,a,b,nan", "r,a,b,x", "r,a,b,-1", "r,,b,1", "r,a,b", "r,a,b,inf"):
        path.write_text(f"relation,subject,object,count\n{bad}\n")
        with pytest.raises(DataError, match="line 2: needs relation, subject, object"):
            read_counts(path)


# --- the files of the package ---------------------------------------------------------------------

BUNDLED = bundled_relations()


def test_what_is_bundled():
    assert len(BUNDLED) >= 15
    languages = {"de", "es", "fr", "zh", "ja"}
    assert sum(languages <= set(relation.translations) for relation in BUNDLED) >= 5
    for relation in BUNDLED:
        assert len(objects(relation.triples)) >= 60
        assert {"plain", "zero-shot", "answer"} <= set(relation.templates)
        assert relation.subject_type
        assert relation.neutral != NEUTRAL
        assert len(split(relation).evaluation) >= 30


@pytest.mark.parametrize("relation", BUNDLED, ids=lambda relation: relation.name)
def test_no_bundled_prompt_holds_its_object(relation):
    """Whole words; symbols of elements as they are written, since "as" and "in" are words."""
    symbols = relation.name == "element_symbol"

    def holds(text, answer):
        if symbols:
            return answer in text.replace(".", " ").split()
        asked, wanted = words(text), words(answer)
        return any(asked[i : i + len(wanted)] == wanted for i in range(len(asked)))

    pairs = [(relation.templates, relation.triples)]
    for found in relation.translations.values():
        assert set(found.triples) == set(relation.triples)
        pairs.append((found.templates, found.triples.values()))
    for templates, triples in pairs:
        for template in (one for name in ("plain", "zero-shot") for one in templates[name]):
            assert template == template.strip()
            found = [t for t in triples if holds(prompt(template, t.subject), t.object)]
            assert not found, template


def test_a_relation_shows_itself_in_a_line():
    """Not with its facts: a notebook shows lists of relations."""
    shown = repr(Relation("shape", (Triple("dice", "cube"),), {"plain": ("{} is a",)}))
    assert shown == "<Relation 'shape', facts: 1>"
    assert all(re.search(r", facts: \d\d(, languages: 6)?>$", repr(r)) for r in bundled_relations())
