"""Query files: what is read, and what is said of the ones that cannot be."""

import json
import os
import subprocess
import threading

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from support.fixtures import cloze, multi_choice, write_queries

from jaxneurons.errors import ConfigError, DataError
from jaxneurons.prompts.queries import Query, read_queries


@pytest.fixture
def read(tmp_path):
    """Read what is written: text, bytes, or a JSON value."""

    def read(content):
        path = tmp_path / "queries.json"
        if isinstance(content, bytes):
            path.write_bytes(content)
        else:
            text = content if isinstance(content, str) else json.dumps(content)
            path.write_text(text, encoding="utf-8")
        return read_queries(path)

    return read


def lines(records):
    return "\n".join(json.dumps(record, ensure_ascii=False) for record in records)


# --- what is read ---------------------------------------------------------------------------------


def test_published_format(read):
    records = multi_choice(3)
    queries = read(records)
    assert [query.id for query in queries] == list(records)
    assert [query.group for query in queries] == ["physics", "biology", "physics"]
    for query, record in zip(queries, records.values(), strict=True):
        assert query.prompts == tuple(record["sentences"])
        assert query.answers == tuple(record["obj_label"])
        assert query.options == (("A", "B", "C", "D"),) * 3


def test_published_files(query_file):
    records = json.loads(query_file.path.read_text(encoding="utf-8"))
    queries = read_queries(query_file.path)
    assert [query.id for query in queries] == list(records)
    for query, record in zip(queries, records.values(), strict=True):
        assert query.group == record["relation_name"]
        assert query.prompts == tuple(record["sentences"])
        assert query.answers == tuple(record["obj_label"])
        assert query.options == (("A", "B", "C", "D"),) * 3
    if query_file.genuine:
        counts = {
            "subject_qa": 552,
            "domain_sample_multi_choice_qa": 18,
            "language_qa_sample": 60,
        }
        assert len(queries) == counts[query_file.path.stem]


def test_cloze_as_lines_and_as_a_list(read):
    records = cloze(3)
    queries = read(lines(records))
    assert queries == read(records)
    assert queries == read("\n" + lines(records).replace("\n", "\r\n\r\n") + "\n")
    assert queries[0] == Query(
        "fact-0",
        "language",
        ("The capital of 0 is", "People who live in 0 speak"),
        ("Paris", "Paris"),
        ((), ()),
    )


def test_single_prompt_and_defaults(read):
    record = {"prompt": "The capital of France is", "answer": "Paris"}
    want = Query("0", "all", ("The capital of France is",), ("Paris",), ((),))
    for content in (record, [record], {**record, "prompts": ["The capital of France is"]}):
        assert read(content) == [want]
    assert [query.id for query in read(lines([record, record]))] == ["0", "1"]
    assert read([{**record, "id": 7, "answer": ["Paris"]}])[0].id == "7"


def test_text_is_kept_as_it_is(read):
    """Also separators that Python, but not JSON, takes for the end of a line."""
    odd = "a\u2028b\x85c\u0085 首都は"
    records = [{"prompt": odd, "answer": "東京"}, {"prompt": "b", "answer": "c"}]
    assert read(lines(records))[0].prompts == (odd,)
    assert read(lines(records))[0].answers == ("東京",)


def test_multi_choice_records_in_a_list(read):
    records = [{"id": key, **record} for key, record in multi_choice(2).items()]
    assert read(records) == read(multi_choice(2))


# --- what is refused ------------------------------------------------------------------------------


def changed(**changes):
    record = {**multi_choice(1)["q0"], **changes}
    return {"q0": {key: value for key, value in record.items() if value is not None}}


GOOD = '{"prompt": "x", "answer": "y"}'


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", r"line 1, column 1: not JSON"),
        ("{", r"line 1, column 2: not JSON"),
        ('{\n "q0": {\n  "sentences": [,]\n }\n}', r"line 3, column 17: not JSON"),
        ('[\n {"prompt": "x"\n', r"line \d, column \d+: not JSON"),
        (GOOD + "\n}", r"line 2, column 1: not JSON"),
        (f"{GOOD}\n\n{GOOD[:-1]}\n", r"line 3, column \d+: not JSON"),
        (json.dumps(multi_choice(1), indent=1) + "\n}", r"line \d\d, column 1: not JSON"),
        (
            GOOD + "\n" + '{"prompt": "x", "prompt": "z"}',
            r"line 2: the key 'prompt' is written twice",
        ),
        ('{"q": {"sentences": 1}, "q": {}}', r"the key 'q' is written twice"),
        ("[" * 100_000, r"nested too deeply"),
        (GOOD + "\n" + "[" * 100_000, r"line 2: nested too deeply"),
        ("[" + "1" * 5000 + "]", r"not usable as JSON"),
        (GOOD + "\n" + "1" * 5000, r"line 2: not usable as JSON"),
        ([], "holds no queries"),
        ({}, "holds no queries"),
        ([1], r"query '0': an object is needed, got int"),
        ("null", r"query '0': an object is needed, got NoneType"),
        ({"q7": "x"}, r"query 'q7': an object is needed, got str"),
        ([{}], r"query '0': neither 'sentences'.*its keys are none"),
        ([{"id": "a", "text": "x"}], r"query 'a': neither .*its keys are 'id', 'text'"),
        ([{"id": "a", "prompt": "x"}], r"query 'a': 'answer' must be a text"),
        ([{"id": "a", "prompt": " ", "answer": "y"}], r"query 'a': 'prompts' holds an empty"),
        (
            [{"id": "a", "prompts": [], "answer": "y"}],
            r"query 'a': 'prompts' must be a text or a l",
        ),
        ([{"id": "a", "prompts": ["x", 1], "answer": "y"}], r"query 'a': 'prompts' holds an empty"),
        ([{"id": "a", "prompt": "x", "answer": ""}], r"query 'a': 'answer' holds an empty"),
        ([{"id": "a", "prompt": "x", "answer": ["y", "z"]}], r"query 'a': 'answer' must be one"),
        ([{"id": "a", "prompt": "x", "answer": 3}], r"query 'a': 'answer' must be a text"),
        ([{"id": "a", "prompt": "x\ud800", "answer": "y"}], r"'x\\ud800' holds half a surrogate"),
        ([{"id": "\udfff", "prompt": "x", "answer": "y"}], r"holds half a surrogate"),
        (
            [{"id": i, "prompt": "x", "answer": "y"} for i in ("a", "b", "a")],
            r"query 'a' is there twice; ids must be unique",
        ),
        (changed(obj_label=["A", "B"]), r"query 'q0': 3 sentences but 2 labels"),
        (changed(obj_label=None), r"query 'q0': 'obj_label' must be a text"),
        (changed(sentences=[]), r"query 'q0': 'sentences' must be a text"),
        (changed(sentences=["x", "", "y"]), r"query 'q0': 'sentences' holds an empty"),
        (
            changed(obj_label=["A", "E", "B"]),
            r"'q0': label 'E' is no option: sentence 2 has the op",
        ),
        (changed(sentences=["x"] * 3), r"'q0': label 'A' is no option: sentence 1 has no options"),
        *[
            (
                changed(sentences=["Which?\n" + "\n".join(f" {a}. x" for a in lines)] * 3),
                rf"sentence 1 has option lines {', '.join(lines)}: they must be A, B",
            )
            for lines in ("A", "AC", "ABBC", "ABD")
        ],
        (b"\xff\xfe{", r"not in UTF-16 \(byte 2, line 1\); save it as UTF-8"),
        (b"{\n" + b"\xe9", r"not in UTF-8 \(byte 2, line 2\); save it as UTF-8"),
        (b"{\n ab\0", r"line 2 holds a zero byte"),
        (GOOD.encode("utf-16-le")[:-1], r"not in UTF-16-LE \(byte 58, line 1\)"),
        ('[{"prompt": "x", "answer": NaN}]', r"NaN is no JSON value"),
        (GOOD + '\n{"prompt": "x", "answer": -Infinity}', r"line 2: -Infinity is no JSON value"),
        ('[{"prompt": "x", "answer": "y", "w": 1e400}]', r"the number 1e400 is too large"),
        *[
            ([{"prompt": "x", "answer": "y", key: value}], f"query .*: '{key}' must be a text, got")
            for key in ("id", "group")
            for value in (True, 1.5, ["a"], {})
        ],
        ([{"id": n, "prompt": "x", "answer": "y"} for n in (7, "7")], r"query '7' is there twice"),
    ],
)
def test_bad_files(read, content, message):
    with pytest.raises(DataError, match=r"(?s)queries\.json: .*" + message) as caught:
        read(content)
    str(caught.value).encode()  # can be printed


def test_not_a_file(tmp_path):
    (tmp_path / "a").symlink_to("b")
    (tmp_path / "b").symlink_to("a")
    os.mkfifo(tmp_path / "pipe")
    for path, reason in (
        (tmp_path / "none.json", "no such query file"),
        (tmp_path, "it is a directory"),
        (tmp_path / "a", "Too many levels of symbolic links"),
        ("/dev/zero", "it is a device"),
    ):
        with pytest.raises(DataError, match=f": .*{reason}"):
            read_queries(path)
    with pytest.raises(ConfigError, match="path must be a path; got"):
        read_queries("a\0b")  # what no file can be called
    with pytest.raises(DataError, match="pipe: line 1, column 1: not JSON"):
        read_queries(tmp_path / "pipe")  # nobody writes into it


def test_a_pipe_is_read(tmp_path):
    text = json.dumps(multi_choice(40))
    os.mkfifo(tmp_path / "pipe")
    writer = subprocess.Popen(["sh", "-c", 'exec cat > "$0"', tmp_path / "pipe"], stdin=-1)
    with os.fdopen(os.open(tmp_path / "pipe", os.O_RDONLY)):  # until the writer is there
        feed = threading.Thread(target=writer.communicate, args=(text.encode(),))
        feed.start()
        assert len(read_queries(tmp_path / "pipe")) == 40
    feed.join()


@pytest.mark.parametrize(
    "encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32"]
)
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_files_as_other_programs_save_them(tmp_path, encoding, end):
    records = [{"prompt": "首都は", "answer": "東京"}, {"prompt": "b", "answer": "c"}]
    for text in (lines(records), json.dumps(records, indent=1, ensure_ascii=False)):
        path = tmp_path / "q"
        path.write_bytes((text + "\n\n").replace("\n", end).encode(encoding))
        assert [query.answers[0] for query in read_queries(path)] == ["東京", "c"]


def test_texts_stay_texts(read):
    texts = ["NaN", "None", "null", "TRUE", "1e5", "007", "-0", " 1.50"]
    found = read([{"id": text, "group": text, "prompt": text, "answer": text} for text in texts])
    assert [query.answers for query in found] == [(text,) for text in texts]
    assert [(q.id, q.group, q.prompts[0]) for q in found] == [(t, t, t) for t in texts]


def test_null_is_not_there(read):
    records = [{"id": None, "group": None, "prompt": "x", "answer": "y"}] * 2
    assert [(query.id, query.group) for query in read(records)] == [("0", "all"), ("1", "all")]


# --- anything at all ------------------------------------------------------------------------------


def tolerant(path):
    said, queries = "", []
    try:
        queries = read_queries(path)
    except DataError as error:
        said = str(error)
    if not queries:
        assert str(path) in said
        said.encode()
    assert len({query.id for query in queries}) == len(queries)
    for query in queries:
        assert len(query.prompts) == len(query.answers) == len(query.options) > 0
        for prompt, answer, options in zip(
            query.prompts, query.answers, query.options, strict=True
        ):
            assert prompt.strip()
            assert answer.strip()
            assert not options or answer in options


fuzz = settings(
    max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)

KEYS = st.sampled_from(["id", "group", "prompt", "prompts", "answer", "sentences", "obj_label"])
CHOICE = "Which?\n A. x\n B. y\n\nResponse:"
VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=5)
    | st.sampled_from(["A", "B", CHOICE]),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(KEYS | st.text(max_size=3), inner, max_size=5)
    ),
    max_leaves=12,
)


@fuzz
@given(st.binary(max_size=60))
@example(b"\xef\xbb\xbf{}")
def test_arbitrary_bytes(tmp_path, content):
    path = tmp_path / "q"
    path.write_bytes(content)
    tolerant(path)


@fuzz
@given(VALUES)
@example({"a": {"sentences": [CHOICE], "obj_label": "A"}})
def test_arbitrary_json(tmp_path, value):
    tolerant(write_queries_escaped(tmp_path / "q", value))


@fuzz
@given(st.lists(VALUES, max_size=4))
def test_arbitrary_json_lines(tmp_path, values):
    path = tmp_path / "q"
    path.write_text("\n".join(json.dumps(value) for value in values), encoding="utf-8")
    tolerant(path)


def write_queries_escaped(path, value):
    path.write_text(json.dumps(value), encoding="utf-8")
    return path


def test_unescaped_and_escaped_text_are_the_same(tmp_path):
    records = [{"prompt": "首都は", "answer": "東京"}]
    escaped = write_queries_escaped(tmp_path / "a", records)
    assert read_queries(write_queries(tmp_path / "b", records)) == read_queries(escaped)
