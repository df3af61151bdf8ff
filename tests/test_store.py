"""Files that are whole or not there, and directories that belong to one run."""

import json
import os

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from jaxneurons import store
from jaxneurons.errors import DataError
from jaxneurons.store import RunDirectory, digest, write_json, write_json_lines, write_text

IDENTITY = {"model": "abc", "settings": {"top": 20, "rule": ("right", 16)}}


class Crash(BaseException):
    """Not an Exception: as a kill or a KeyboardInterrupt is not."""


@pytest.mark.parametrize("step", ["fsync", "replace", "chmod"])
@pytest.mark.parametrize("error", [Crash, OSError(28, "No space left on device")])
def test_crash_leaves_the_old_file_or_none(tmp_path, monkeypatch, step, error):
    path = tmp_path / "file.json"
    for old in (None, "old\n"):
        if old:
            write_text(path, old)

        def crash(*_):
            raise error

        with monkeypatch.context() as patch:
            patch.setattr(store.os, step, crash)
            with pytest.raises(Crash if error is Crash else OSError):
                write_text(path, "new\n" * 1000)
        assert (path.read_text() if path.exists() else None) == old
        assert [p.name for p in tmp_path.iterdir()] == (["file.json"] if old else [])
    write_text(path, "new\n")
    assert path.read_text() == "new\n"


def test_an_existing_file_is_replaced_and_not_written_into(tmp_path):
    path = tmp_path / "file"
    write_text(path, "old")
    with path.open() as old:
        write_text(path, "new")
        assert old.read() == "old"


def test_permissions_follow_the_umask(tmp_path):
    before = os.umask(0o027)
    try:
        write_text(tmp_path / "file", "x")
    finally:
        assert os.umask(before) == 0o027
    assert (tmp_path / "file").stat().st_mode & 0o777 == 0o640


def test_json(tmp_path):
    write_json(tmp_path / "a", {"b": 1, "a": "東京"})
    assert (tmp_path / "a").read_text("utf-8") == '{\n  "b": 1,\n  "a": "東京"\n}\n'
    write_json_lines(tmp_path / "l", ({"n": n, "t": "a\nb"} for n in range(2)))
    assert [json.loads(line)["n"] for line in (tmp_path / "l").read_text().splitlines()] == [0, 1]
    write_json_lines(tmp_path / "l", [])
    assert (tmp_path / "l").read_text() == ""


def test_digest_is_of_the_value():
    assert digest({"a": 1, "b": (2, 3)}) == digest({"b": [2, 3], "a": 1})
    assert digest([1]) != digest([2])


# --- run directories ------------------------------------------------------------------------------

PART = {"scores": np.arange(50, dtype=np.float32), "index": np.array([3, 1])}


def test_parts_are_found_again(tmp_path):
    run = RunDirectory(tmp_path / "a" / "b", IDENTITY)
    assert run.load(0) is None
    run.save(0, PART)
    again = RunDirectory(tmp_path / "a" / "b", IDENTITY).load(0)
    assert again is not None
    assert again.keys() == PART.keys()
    for name, values in PART.items():
        np.testing.assert_array_equal(again[name], values)
        assert again[name].dtype == values.dtype


def test_crash_while_a_part_is_saved(tmp_path, monkeypatch):
    run = RunDirectory(tmp_path, IDENTITY)

    def crash(*_):
        raise Crash

    with monkeypatch.context() as patch:
        patch.setattr(store.os, "replace", crash)
        with pytest.raises(Crash):
            run.save(0, PART)
    assert sorted(p.name for p in run.parts.iterdir()) == ["identity.json"]
    assert RunDirectory(tmp_path, IDENTITY).load(0) is None


@pytest.mark.parametrize(
    ("other", "key"),
    [
        ({**IDENTITY, "model": "xyz"}, "model"),
        ({**IDENTITY, "settings": {"top": 20, "rule": ("gauss", 16)}}, "settings"),
        ({**IDENTITY, "dtype": "float32"}, "dtype"),
        ({"model": "abc"}, "layout"),
        ({"model": "x", "settings": {}}, "model, settings"),
    ],
)
def test_another_run_is_refused_and_left_alone(tmp_path, other, key):
    RunDirectory(tmp_path, IDENTITY).save(0, PART)
    with pytest.raises(DataError, match=rf"holds a run with another {key}; give a new directory"):
        RunDirectory(tmp_path, other)
    assert RunDirectory(tmp_path, IDENTITY).load(0) is not None


def test_foreign_directories_are_refused_and_left_alone(tmp_path):
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(DataError, match="holds files but no run of ours"):
        RunDirectory(tmp_path, IDENTITY)
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]


def test_paths_that_cannot_be_directories(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(DataError, match="file: is a file"):
        RunDirectory(tmp_path / "file", IDENTITY)
    with pytest.raises(DataError, match="cannot be written"):
        RunDirectory(tmp_path / "file" / "run", IDENTITY)


@pytest.mark.parametrize("content", [b"", b"{", b"\xff", b"[1]", b"null"])
def test_unreadable_identity(tmp_path, content):
    RunDirectory(tmp_path, IDENTITY)
    (tmp_path / "parts" / "identity.json").write_bytes(content)
    with pytest.raises(DataError, match=r"identity\.json: unreadable; give a new directory"):
        RunDirectory(tmp_path, IDENTITY)


@settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_damaged_parts_are_made_again(tmp_path, data):
    """Whatever happens to the bytes: a part is read as it was saved, or not at all."""
    run = RunDirectory(tmp_path / "run", IDENTITY)
    run.save(0, PART)
    path = run.parts / "00000.npz"
    content = bytearray(path.read_bytes())
    if data.draw(st.booleans()):
        del content[data.draw(st.integers(0, len(content) - 1)) :]
    else:
        for at in data.draw(st.lists(st.integers(0, len(content) - 1), min_size=1, max_size=3)):
            content[at] ^= data.draw(st.integers(1, 255))
    path.write_bytes(content)
    found = run.load(0)
    if found is not None:
        for name, values in PART.items():
            np.testing.assert_array_equal(found[name], values)


def test_part_that_is_something_else(tmp_path):
    run = RunDirectory(tmp_path, IDENTITY)
    path = run.parts / "00000.npz"
    np.save(path.with_suffix(".npy"), PART["scores"])
    path.with_suffix(".npy").rename(path)
    assert run.load(0) is None
    path.unlink()
    path.mkdir()
    assert run.load(0) is None
