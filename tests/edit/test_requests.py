"""Requests in every format, and everything that can be wrong with them."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxneurons.edit import EditRequest, KnownFact, check_requests, read_known, read_requests
from jaxneurons.edit.request_files import ignored_keys
from jaxneurons.errors import ConfigError, DataError


@pytest.fixture
def folder(samples):
    return samples / "edit"


def write(path, value):
    path.write_text(value if isinstance(value, str) else json.dumps(value), encoding="utf-8")
    return path


# --- formats --------------------------------------------------------------------------------------


def test_counterfact_edit(folder):
    first, second = read_requests(folder / "counterfact_edit.json")
    assert first == EditRequest(
        prompt="The capital of Norway is",
        subject="Norway",
        target="Lisbon",
        ground_truth="Oslo",
        paraphrases=("A parcel was lost in the post. Norway is governed from",),
        neighbours=(("The capital of Sweden is", "Stockholm"),),
        id="11",
    )
    assert second.id == "12"


def test_counterfact(folder):
    (request,) = read_requests(folder / "counterfact.json")
    assert request == EditRequest(
        prompt="Mont Blanc is located in the continent of",
        subject="Mont Blanc",
        target="Africa",
        ground_truth="Europe",
        paraphrases=("It rained. Mont Blanc is part of", "Mont Blanc belongs to the continent of"),
        neighbours=(
            ("The Matterhorn is located in the continent of", "Europe"),
            ("Mount Etna is in", "Europe"),
        ),
        id="3",
    )


def test_zsre(folder):
    first, second = read_requests(folder / "zsre.json")
    assert first == EditRequest(
        prompt="In which city was Marie Curie born?",
        subject="Marie Curie",
        target="Vienna",
        ground_truth="Warsaw",
        paraphrases=("What is Marie Curie's place of birth?",),
        neighbours=(("nq question: how many legs does a spider have", "eight"),),
        id="0",
    )
    assert (second.ground_truth, second.id) == ("", "1")
    assert second.neighbours == (("nq question: what is ice made of", "water"),)


def test_your_own(folder):
    first, second = read_requests(folder / "own.jsonl")
    assert first == EditRequest(
        prompt="The capital of France is",
        subject="France",
        target="Rome",
        ground_truth="Paris",
        paraphrases=("France's capital city is",),
        neighbours=(
            ("The capital of Spain is", "Madrid"),
            ("The capital of Italy is", ""),
            ("The capital of Greece is", "Athens"),
        ),
        portability=(("The Seine flows through", "Rome"),),
        id="fr",
    )
    expected = EditRequest("Grass is", "Grass", "blue", id="1")
    assert second == EditRequest(
        "Grass is", "Grass", "blue", paraphrases=("The colour of Grass is",), id="1"
    )
    table = read_requests(folder / "own.csv")
    assert table[0] == EditRequest(
        prompt="The capital of France is",
        subject="France",
        target="Rome",
        paraphrases=("France's capital city is", "In France they rule from"),
        neighbours=(("The capital of Spain is", "Madrid"), ("The capital of Italy is", "")),
        portability=(("The Seine flows through", "Rome"),),
        id="0",
    )
    assert table[1] == expected


def test_known_facts(folder):
    facts = read_known(folder / "known.json")
    assert facts == [
        KnownFact("Mount Fuji is in the country of", "Mount Fuji", "Japan", "5"),
        KnownFact("Windows is a product of", "Windows", "Microsoft", "6"),
    ]
    assert read_known(folder / "known.json", limit=1) == facts[:1]


def test_the_first_requests_only(folder, tmp_path):
    whole = read_requests(folder / "counterfact_edit.json")
    assert read_requests(folder / "counterfact_edit.json", limit=1) == whole[:1]
    assert read_requests(folder / "counterfact_edit.json", limit=9) == whole
    with pytest.raises(ConfigError, match="limit must be at least 1"):
        read_requests(folder / "counterfact_edit.json", limit=0)
    good = {"prompt": "Grass is", "subject": "Grass", "target": "blue"}
    broken = write(tmp_path / "r.json", [good, {**good, "target": ""}])
    assert len(read_requests(broken, limit=1)) == 1  # what is not wanted is not judged


TEXTS = st.text(st.characters(exclude_categories=("Cs", "Cc")), min_size=1, max_size=12).filter(
    str.strip
)


@given(
    before=TEXTS, subject=TEXTS, target=TEXTS, paraphrases=st.lists(TEXTS), answers=st.lists(TEXTS)
)
@settings(max_examples=50, deadline=None)
def test_what_is_written_is_read(tmp_path_factory, before, subject, target, paraphrases, answers):
    subject, target = subject.strip(), target.strip()
    neighbours = [[f"It is {answer}", answer.strip()] for answer in answers]
    record = {
        "prompt": before + subject,
        "subject": subject,
        "target": target,
        "paraphrases": paraphrases,
        "neighbours": neighbours,
    }
    path = tmp_path_factory.mktemp("requests") / "r.jsonl"
    (request,) = read_requests(write(path, json.dumps(record) + "\n"))
    assert (request.prompt, request.subject, request.target) == (before + subject, subject, target)
    assert request.paraphrases == tuple(paraphrases)
    assert [list(pair) for pair in request.neighbours] == neighbours


# --- what is wrong --------------------------------------------------------------------------------

GOOD = {"prompt": "Grass is", "subject": "Grass", "target": "blue"}
REWRITE = {
    "prompt": "{} is",
    "subject": "Grass",
    "target_new": {"str": "blue"},
    "target_true": {"str": "green"},
}


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({**GOOD, "target": " "}, "target is empty; say what the model is to answer"),
        ({**GOOD, "subject": ""}, "subject is empty"),
        ({**GOOD, "subject": "Moss"}, "the subject 'Moss' is not in the prompt 'Grass is'"),
        ({**GOOD, "subject": "grass"}, "it stands there as 'Grass': write it so"),
        ({**GOOD, "target": 3}, "target must be a text, got int"),
        ({**GOOD, "target": None}, "target is null"),
        ({**GOOD, "paraphrase": "x"}, "unknown key 'paraphrase'; did you mean 'paraphrases'"),
        ({**GOOD, "paraphrases": [""]}, "paraphrases holds an empty text"),
        ({**GOOD, "paraphrases": 3}, "paraphrases must be a text or a list of texts"),
        ({**GOOD, "neighbours": [["a", "b", "c"]]}, "neighbours must be a list of prompts"),
        ({**GOOD, "neighbours": [["", "b"]]}, "neighbours holds an empty prompt"),
        ({**GOOD, "portability": ["It is"]}, "portability holds a prompt without the answer"),
        ({**GOOD, "id": 1.5}, "id must be a text or a whole number, got float"),
        ({"prompt": "a", "subject": "a"}, "of no known format: 'prompt', 'subject'; your own"),
        ({}, "of no known format: there are none"),
        ("Grass", "an object is needed, got str"),
        ({"requested_rewrite": "x"}, "requested_rewrite: an object is needed, got str"),
        ({"requested_rewrite": {**REWRITE, "prompt": "It is"}}, "needs '{}' for the subject once"),
        (
            {"requested_rewrite": {**REWRITE, "target_new": "blue"}},
            "requested_rewrite: target_new: an object with 'str' is needed",
        ),
        (
            {"requested_rewrite": {**REWRITE, "target_new": {}}},
            "no 'requested_rewrite: target_new: str'",
        ),
        ({"src": "Is it?", "alt": "no", "answers": []}, "no 'subject'"),
        ({"prompt": "Grass is", "target_new": "blue"}, "no 'subject'"),
    ],
)
def test_wrong_records_are_named(tmp_path, record, message):
    path = write(tmp_path / "requests.json", [GOOD, record])
    with pytest.raises(DataError) as error:
        read_requests(path)
    assert str(error.value).startswith(f"{path}: record 2: ")
    assert message in str(error.value)


def test_names_that_are_near_a_known_one_are_slips(tmp_path):
    for name in ("paraphrase", "Neighbors", "neighbour", "ground truth", "portabilty"):
        path = write(tmp_path / "r.csv", f"sep=;\nprompt;subject;target;{name}\nA is;A;b;c\n")
        with pytest.raises(
            DataError, match=rf"r\.csv: line 2: unknown column '{name.lower()}'; did"
        ):
            read_requests(path)
        path = write(tmp_path / "r.jsonl", json.dumps({**GOOD, name: "c"}) + "\n")
        with pytest.raises(DataError, match=rf"record 1: unknown key '{name}'; did you mean '"):
            read_requests(path)


def test_other_names_are_passed_over_and_named(folder, tmp_path):
    plain = [EditRequest("Grass is", "Grass", "blue", id="0")]
    names = ["source", "subject_id", "notes", "date"]
    path = write(
        tmp_path / "r.csv", f"prompt,subject,target,{','.join(names)}\nGrass is,Grass,blue"
    )
    assert read_requests(path) == plain
    assert ignored_keys(path) == names
    path = write(tmp_path / "r.json", [{**GOOD, **dict.fromkeys(names, 3)}])
    assert read_requests(path) == plain
    assert ignored_keys(path) == names
    for name in ("counterfact_edit.json", "counterfact.json", "zsre.json", "own.jsonl"):
        assert ignored_keys(folder / name) == []
    assert ignored_keys(folder / "own.csv") == ["note"]


def test_wrong_files(tmp_path):
    with pytest.raises(DataError, match=r"none\.json: cannot be read"):
        read_requests(tmp_path / "none.json")
    with pytest.raises(DataError, match="holds no requests"):
        read_requests(write(tmp_path / "empty.json", "[]"))
    with pytest.raises(DataError, match="needs the columns prompt, subject, target"):
        read_requests(write(tmp_path / "bare.csv", "prompt,target\na,b\n"))
    with pytest.raises(DataError, match=r"bad\.json: line 1, column \d+: not JSON"):
        read_requests(write(tmp_path / "bad.json", '{"prompt": '))
    rows = "prompt,subject,target\nGrass is,Grass,blue\nGrass is,Moss,blue\n"
    with pytest.raises(DataError, match=r"rows\.csv: line 3: the subject 'Moss' is not in"):
        read_requests(write(tmp_path / "rows.csv", rows))
    twice = [{**GOOD, "id": "a"}, {**GOOD, "id": "b"}, {**GOOD, "id": "a"}]
    with pytest.raises(DataError, match=r"record 3: the id 'a' is that of record 1 too"):
        read_requests(write(tmp_path / "twice.json", twice))
    with pytest.raises(DataError, match="record 1: no 'attribute'"):
        read_known(write(tmp_path / "known.json", [{"prompt": "a", "subject": "a"}]))


def test_duplicates_and_contradictions_are_said():
    requests = [
        EditRequest("Grass is", "Grass", "blue", id="a"),
        EditRequest("Moss is", "Moss", "blue", id="b"),
        EditRequest("Grass  is", "Grass", "blue", id="c"),
        EditRequest("Grass is", "Grass", "red", ground_truth="green"),
        EditRequest("Moss is soft and", "Moss", "green", ground_truth="green ", id="b"),
    ]
    assert check_requests(requests[:2]) == []
    remarks = check_requests(requests)
    assert remarks == [
        "request 'c' is request 'a' once more: 'blue' after 'Grass  is'",
        "request 4 contradicts request 'a': 'red' and 'blue' after 'Grass is'",
        "requests 2 and 5 have the id 'b'",
        "request 'b' asks for the old answer: 'green' after 'Moss is soft and'",
    ]


@pytest.mark.parametrize("field", ["prompt", "target", "paraphrases", "neighbours"])
def test_fields_of_another_type(as_users_call, field):
    with pytest.raises(ConfigError, match=rf"EditRequest\.{field}"):
        EditRequest(**{**GOOD, field: [3]})
