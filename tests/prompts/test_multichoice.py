"""The multi-choice transformation: what it makes, what it refuses, and the way back."""

import collections
import csv
import dataclasses
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxneurons.errors import DataError
from jaxneurons.prompts.multichoice import (
    FREE_TEMPLATES,
    TEMPLATES,
    Parts,
    Question,
    free_form,
    free_questions,
    multi_choice,
    put_together,
    read_questions,
    take_apart,
)
from jaxneurons.prompts.queries import read_queries


def made(count=12, groups=2, **changes):
    return [
        Question(f"q{i}", f"What is {i}?", f"answer {i}", f"g{i % groups}", **changes)
        for i in range(count)
    ]


@pytest.mark.parametrize("language", sorted(FREE_TEMPLATES))
def test_free_form_in_every_language(tmp_path, language):
    """Read back by the reader of queries: the ids of the multi-choice form, the whole answer."""
    questions = made(language=language)
    path = tmp_path / "q.jsonl"
    path.write_text("\n".join(json.dumps(record) for record in free_form(questions)))
    queries = read_queries(path)
    assert [query.id for query in queries] == [one.id for one in questions]
    for query, one in zip(queries, questions, strict=True):
        assert (query.group, set(query.answers)) == (one.group, {one.answer})
        assert len(set(query.prompts)) == 3
        assert all(one.text in prompt and one.answer not in prompt for prompt in query.prompts)
        assert not any(query.options)
    assert set(FREE_TEMPLATES) == set(TEMPLATES)


def test_free_form_refuses():
    with pytest.raises(DataError, match="no wordings in language 'xx'"):
        free_form(made(language="xx"))
    with pytest.raises(DataError, match="wordings must be from 1 to 3"):
        free_form(made(), wordings=4)


def test_templates_of_ones_own():
    own = {"xx": ("Q {question}\n{options}\nA:",)}
    records, _ = multi_choice(made(language="xx"), templates=own, wordings=1)
    assert all(record["sentences"][0].startswith("Q What is") for record in records.values())


@pytest.mark.parametrize("language", sorted(TEMPLATES))
def test_the_published_format(tmp_path, language):
    """Read back by the reader of queries: three wordings, the right letter, four options."""
    questions = made(language=language)
    records, left_out = multi_choice(questions)
    assert not left_out
    path = tmp_path / "q.json"
    path.write_text(json.dumps(records, ensure_ascii=False))
    queries = {query.id: query for query in read_queries(path)}
    by_answer = {one.answer: one for one in questions}
    for one in questions:
        query, record = queries[one.id], records[one.id]
        assert query.group == one.group
        assert len(set(query.prompts)) == 3
        for prompt, label in zip(query.prompts, query.answers, strict=True):
            options = take_apart(prompt).options
            assert options["ABCD".index(label)] == one.answer == record["ori_label"]
            assert len(set(options)) == 4
            assert {by_answer[option].group for option in options} == {one.group}
            assert prompt.count(one.text) == 1
            assert "{" not in prompt
    assert free_questions(records) == questions


def test_letters_and_distractors_vary():
    records, _ = multi_choice(made(400, 1))
    letters = collections.Counter(label for r in records.values() for label in r["obj_label"])
    assert set(letters) == set("ABCD")
    assert max(letters.values()) < 360  # of 1,200: 300 each
    orders = {tuple(take_apart(s).options) for r in records.values() for s in r["sentences"]}
    assert len(orders) == 1200


def test_seeds_and_order():
    questions = made()
    first = multi_choice(questions)[0]
    assert multi_choice(questions)[0] == first
    assert multi_choice(questions, seed=1)[0] != first
    assert multi_choice(questions[::-1])[0] == {k: first[k] for k in list(first)[::-1]}
    fewer, _ = multi_choice(questions, options=2, wordings=1)
    assert len(take_apart(fewer["q0"]["sentences"][0]).options) == 2


def test_equal_answers_are_no_distractors():
    """Once case, width and punctuation are left out."""
    answers = ["Paris", "paris.", "ＰＡＲＩＳ", "Rome", "rome", "Bern", "Wien"]
    questions = [Question(str(i), f"{i}?", text) for i, text in enumerate(answers)]
    records, _ = multi_choice(questions)
    for one in questions:
        for sentence in records[one.id]["sentences"]:
            options = [option.casefold().strip(".") for option in take_apart(sentence).options]
            assert sum(option in ("paris", "ｐａｒｉｓ") for option in options) <= 1
            assert options.count("rome") <= 1


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("Paris", "the paris", False),
        ("“Paris”.", "paris", True),
        ("New  York", "new york", True),
        ("-1", "1", False),
        ("C++", "C#", False),
        ("x > 0", "x < 0", False),
        ("?", "!", False),
        ("1.5", "15", False),
    ],
)
def test_which_answers_are_equal(one, other, same):
    questions = [Question("0", "0?", one), Question("1", "1?", other)]
    records, left_out = multi_choice(questions, options=2)
    assert (not records, len(left_out) == 2) == (same, same)


def test_which_of_equal_answers_is_offered_does_not_depend_on_their_order():
    answers = ["Rome", "rome", "ROME.", "Bern"]
    questions = [Question(str(i), f"{i}?", text) for i, text in enumerate(answers)]
    for order in (questions, questions[::-1]):
        record = multi_choice(order, options=2)[0]["3"]
        assert {*take_apart(record["sentences"][0]).options} == {"Bern", "ROME."}


def test_distractors_are_of_the_same_relation():
    questions = [
        dataclasses.replace(one, relation=f"P{i % 3}") for i, one in enumerate(made(24, 1))
    ]
    relation = {one.answer: one.relation for one in questions}
    records, left_out = multi_choice(questions)
    assert not left_out
    for record in records.values():
        for sentence in record["sentences"]:
            assert {relation[option] for option in take_apart(sentence).options} == {
                record["relation"]
            }
    assert free_questions(records) == questions


def test_a_group_with_too_few_answers_is_left_out():
    questions = [*made(8, 1), Question("x", "Why?", "because", "lonely")]
    records, left_out = multi_choice(questions)
    assert set(records) == {f"q{i}" for i in range(8)}
    assert left_out == {"x": "group 'lonely' has 0 other answers, 3 needed"}


@pytest.mark.parametrize(
    ("questions", "options", "message"),
    [
        (made(language="xx"), {}, "'q0': no wordings in language 'xx'; known: 'en'"),
        (made(), {"options": 1}, "options must be from 2 to 26, got 1"),
        (made(), {"wordings": 4}, "wordings must be from 1 to 3"),
        ([Question("a", "a?", " "), *made()], {}, "question 'a': its answer is empty"),
    ],
)
def test_what_cannot_be_made(questions, options, message):
    with pytest.raises(DataError, match=message):
        multi_choice(questions, **options)


LINES = st.text(st.characters(exclude_categories=("Cc", "Cs", "Zl", "Zp")), max_size=8)


@given(LINES, st.lists(LINES, min_size=2, max_size=5), LINES)
def test_taken_apart_and_put_together(before, options, after):
    parts = Parts(f"{before}\n", tuple(options), f"\n\n{after}")
    assert take_apart(put_together(parts)) == parts


@pytest.mark.parametrize("text", ["", "no options", " A. one", " A. one\n C. two", " B. x\n C. y"])
def test_no_options(text):
    with pytest.raises(DataError, match="no options"):
        take_apart(text)


def test_published_files(query_file):
    """Taken apart and put together they are themselves; asked anew they give the same questions."""
    records = json.loads(query_file.path.read_text(encoding="utf-8"))
    for record in records.values():
        for sentence in record["sentences"]:
            assert put_together(take_apart(sentence)) == sentence
    questions = free_questions(records)
    assert len(questions) == len(records)
    assert all(one.text and "\n A. " not in one.text for one in questions)
    if query_file.path.stem == "language_qa_sample":
        assert {one.language for one in questions} == {one.group for one in questions}
        assert {one.language for one in questions} == set(TEMPLATES)
        assert all(one.relation == records[one.id]["relation"] for one in questions)
    again, left_out = multi_choice(questions)
    if "domain_sample" in query_file.path.stem:  # three of a subject: two distractors
        assert left_out.keys() == records.keys()
    else:
        assert not left_out
    assert free_questions(again) == [one for one in questions if one.id not in left_out]


RECORDS = [
    {"id": "a", "question": "Who?", "answer": "me", "group": "g", "language": "fr"},
    {"id": "b", "question": 'What, "this"?', "answer": "that, too"},
]


@pytest.mark.parametrize("kind", ["json", "jsonl", "csv"])
def test_reading(tmp_path, kind):
    path = tmp_path / f"q.{kind}"
    if kind == "json":
        path.write_text(json.dumps(RECORDS))
    elif kind == "jsonl":
        path.write_text("\n".join(map(json.dumps, RECORDS)) + "\n\n")
    else:
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, ["id", "question", "answer", "group", "language"])
            writer.writeheader()
            writer.writerows(RECORDS)
    assert read_questions(path) == [
        Question("a", "Who?", "me", "g", "fr"),
        Question("b", 'What, "this"?', "that, too", "all", "en"),
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[]", "holds no questions"),
        ('[{"question": "x"}]', "question 1: question and answer are needed"),
        ('[{"question": "x", "answer": " "}]', "question 1: question and answer"),
        ("[3]", "question 1"),
        ('{"question": "x", "answer": "y"}\n{', "line 2, column 2: not JSON"),
        (json.dumps([{**RECORDS[0]}] * 2), "question 2: the id 'a' is there twice"),
        ('{"a": 1}', "a list of questions is needed"),
        ('[\n{"question": "x", "answer": "y"},\n]', "line 3, column 1: not JSON"),
    ],
)
def test_bad_files(tmp_path, text, message):
    path = tmp_path / "q.json"
    path.write_text(text)
    with pytest.raises(DataError, match=message):
        read_questions(path)
    with pytest.raises(DataError, match="cannot be read"):
        read_questions(tmp_path / "none.json")
    path.write_bytes("[é]".encode("latin-1"))
    with pytest.raises(DataError, match="not in UTF-8"):
        read_questions(path)


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ("NaN", "NaN is no JSON value"),
        ("1e5", "question 1: 'answer' must be a text; put it between quotes"),
        ("2.50", "'answer' must be a text"),
        ("true", "'answer' must be a text"),
        ('["x"]', "'answer' must be a text"),
        ("{}", "'answer' must be a text"),
        ("null", "question and answer are needed; its fields are 'question', 'answer'"),
        ('"\\udfff"', "half a surrogate"),
        ('"x", "Answer": "y"', "two of the keys 'question', 'answer', 'Answer' are one"),
    ],
)
def test_answers_that_would_become_others(tmp_path, answer, message):
    path = tmp_path / "q.json"
    path.write_text(f'[{{"question": "x", "answer": {answer}}}]')
    with pytest.raises(DataError, match=message):
        read_questions(path)


def test_answers_stay_as_they_are_written(tmp_path):
    texts = ["NaN", "None", "null", "TRUE", "true", "1e5", "007", "2.50", "-0", "N/A", "inf"]
    path = tmp_path / "q.json"
    path.write_text(json.dumps([{"Question": "x", " ANSWER": text} for text in texts]))
    assert [one.answer for one in read_questions(path)] == texts
    path.write_text('[{"question": 7, "answer": 1945, "id": 3, "group": null}]')
    assert read_questions(path) == [Question("3", "7", "1945")]
    path = tmp_path / "q.csv"
    path.write_text("question,answer\n" + "".join(f"x,{text}\n" for text in texts))
    assert [one.answer for one in read_questions(path)] == texts
    records, _ = multi_choice(read_questions(path))
    options = {o for r in records.values() for s in r["sentences"] for o in take_apart(s).options}
    assert options <= set(texts)


def test_one_line_of_json_lines(tmp_path):
    path = tmp_path / "q.jsonl"
    path.write_text(json.dumps(RECORDS[0]) + "\n")
    assert [one.id for one in read_questions(path)] == ["a"]


def test_from_the_command_line(run, tmp_path):
    source, out = tmp_path / "q.json", tmp_path / "choice.json"
    records = [
        {"id": f"q{i}", "question": f"What is {i}?", "answer": f"a{i}", "group": f"g{i // 6}"}
        for i in range(8)
    ]
    source.write_text(json.dumps(records))
    code, said, err = run("qrnca", "questions", source, out)
    assert (code, "6 questions, 3 wordings each" in said) == (0, True)
    assert err.count("left out: question 'q7': group 'g1' has 1 other answers, 3 needed") == 1
    assert [query.id for query in read_queries(out)] == [f"q{i}" for i in range(6)]
    code, said, _ = run("qrnca", "questions", source, tmp_path / "free.jsonl", "--form", "free")
    assert (code, "8 questions" in said) == (0, True)
    assert [query.id for query in read_queries(tmp_path / "free.jsonl")] == [
        record["id"] for record in records
    ]
    code, _, err = run("qrnca", "questions", source, tmp_path / "x", "--form", "fre")
    assert (code, "did you mean 'free'" in err) == (1, True)
    source.write_text(json.dumps(records[6:]))
    code, _, err = run("qrnca", "questions", source, tmp_path / "none.json")
    assert (code, err.splitlines()[-1].startswith("error: ")) == (1, True)
    assert not (tmp_path / "none.json").exists()
    source.write_text(json.dumps([{**record, "language": "xx"} for record in records]))
    for form in ("choice", "free"):
        code, _, err = run("qrnca", "questions", source, tmp_path / "none.json", "--form", form)
        assert (code, f"{source}: question 'q0': no wordings in" in " ".join(err.split())) == (
            1,
            True,
        )
    before = source.read_bytes()
    (tmp_path / "link.json").symlink_to(source)
    for form in ("choice", "free"):
        for there in (source, tmp_path / "link.json"):
            code, _, err = run("qrnca", "questions", source, there, "--form", form)
            assert (code, "is what is read" in err) == (1, True)
    assert source.read_bytes() == before
