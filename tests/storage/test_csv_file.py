"""Tables as other programs write them, against the rows that they were given."""

import csv
import io

import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pyarrow import csv as arrow_csv

from jaxneurons.errors import DataError
from jaxneurons.storage.csv_file import read_csv

ROWS = [
    ("Who?", "me", "a"),
    ('He said "hi", then?', "a; b, c\t|", ""),
    ("Two\nlines?\n\nThree.", "東京 é", "b"),
    ("NaN", "007", "null"),
]


def expected():
    return [dict(zip(("question", "answer", "group"), row, strict=True)) for row in ROWS]


def read(path, content):
    path.write_bytes(content)
    return [row for _, row in read_csv(path, ("question", "answer"), ("group",))]


def written(delimiter, end, header=("question", "answer", "group"), quoting=csv.QUOTE_MINIMAL):
    text = io.StringIO(newline="")
    writer = csv.writer(text, delimiter=delimiter, lineterminator=end, quoting=quoting)
    writer.writerows([header, *ROWS])
    return text.getvalue()


@pytest.mark.parametrize("delimiter", [",", ";", "\t", "|"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("quoting", [csv.QUOTE_MINIMAL, csv.QUOTE_ALL])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_pythons_writer(tmp_path, delimiter, end, quoting, encoding):
    text = written(delimiter, end, quoting=quoting)
    assert read(tmp_path / "q", text.encode(encoding)) == expected()


@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
def test_arrows_writer(tmp_path, delimiter):
    table = pa.Table.from_pylist(expected())
    options = arrow_csv.WriteOptions(delimiter=delimiter)
    buffer = io.BytesIO()
    arrow_csv.write_csv(table, buffer, options)
    assert read(tmp_path / "q", buffer.getvalue()) == expected()


@pytest.mark.parametrize("first", ["sep=;", "SEP=;", '"sep=;"'])
def test_as_spreadsheets_save_it(tmp_path, first):
    text = f"{first}\r\n" + written(";", "\r\n", ("Question", " ANSWER ", "Group"))
    assert read(tmp_path / "q", text.encode("utf-8-sig")) == expected()
    tabs = "sep=\t\r\n" + written("\t", "\r\n")
    assert read(tmp_path / "q", tabs.encode("utf-16")) == expected()
    # An index without a name, columns of no interest, empty cells at the ends, blank lines.
    text = "\n,Answer,x,question,,\n0,b,,a,,\n\n,,,,,\n1,d,,c,,,,\n2,f,,e\n"
    rows = [("a", "b"), ("c", "d"), ("e", "f")]
    want = [{"question": q, "answer": a, "group": ""} for q, a in rows]
    assert read(tmp_path / "q", text.encode()) == want


def test_lines_are_those_of_the_file(tmp_path):
    path = tmp_path / "q"
    path.write_text('sep=,\nquestion,answer\n\n"a\nb",c\nd,e\n')
    assert [line for line, _ in read_csv(path, ("question", "answer"))] == [5, 6]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "q: needs the columns question, answer; it is empty"),
        ("\n \n", "it is empty"),
        ("Frage;Antwort;x\n", "its first row is 'frage', 'antwort', 'x'"),
        ("question\nx\n", "its first row is 'question'"),
        ("sep=,\nquestion;answer\n", "its first row is 'question;answer'"),
        ("question,answer,Answer\na,b,c\n", "the column 'answer' is there twice"),
        ("question,answer\na,b\nWhere?,Paris, France\n", "line 3: 3 cells, the header has 2; put"),
        ('question,answer\na,"b\nc,d\n', "line 3: not CSV .unexpected end of data"),
        ('question,answer\n"a "b" c",d\n', "line 2: not CSV"),
        ("question,answer\na," + "b" * 200_000 + "\n", "line 2: not CSV .field larger"),
    ],
)
def test_what_would_be_read_otherwise_is_refused(tmp_path, text, message):
    with pytest.raises(DataError, match=message):
        read(tmp_path / "q", text.encode())


CELLS = st.text(st.characters(exclude_characters="\0\r", exclude_categories=["Cs"]), max_size=6)
fuzz = settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@fuzz
@given(st.lists(st.tuples(CELLS, CELLS), max_size=4), st.sampled_from(",;\t|"))
def test_any_cells_read_back(tmp_path, rows, delimiter):
    text = io.StringIO(newline="")
    # All quoted: a blank at the beginning of a cell that is not is no part of it.
    writer = csv.writer(text, delimiter=delimiter, quoting=csv.QUOTE_ALL, lineterminator="\n")
    writer.writerows([("question", "answer"), *rows])
    found = read(tmp_path / "q", text.getvalue().encode())
    kept = [row for row in rows if any(cell.strip() for cell in row)]
    assert [(row["question"], row["answer"]) for row in found] == kept


@fuzz
@given(st.binary(max_size=80), st.booleans())
def test_any_bytes(tmp_path, content, header):
    said, rows = None, []
    try:
        rows = read(tmp_path / "q", b"question,answer,group\n" * header + content)
    except DataError as error:
        said = str(error)
    assert said is None or said.startswith(f"{tmp_path / 'q'}: ")
    assert all(row.keys() == {"question", "answer", "group"} for row in rows)
