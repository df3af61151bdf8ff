"""Files that are whole or not there, and directories that belong to one run."""

import json
import math
import os
import re

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from jaxneurons.errors import DataError, WriteError
from jaxneurons.storage import store
from jaxneurons.storage.store import (
    Memory,
    RunDirectory,
    check_not_input,
    digest,
    null_for_nan,
    write_bytes,
    write_json,
    write_json_lines,
    write_text,
)

IDENTITY = {"model": "abc", "settings": {"top": 20, "rule": ("right", 16)}}


class Crash(BaseException):
    """Not an Exception: as a kill or a KeyboardInterrupt is not."""


@pytest.mark.parametrize("step", ["fsync", "replace", "chmod"])
@pytest.mark.parametrize("error", [Crash, OSError(28, "No space left on device")])
def test_crash_leaves_the_old_file_or_none(tmp_path, monkeypatch, step, error):
    path = tmp_path / "file.json"
    said = None if error is Crash else f"^{re.escape(str(path))}: cannot be written: No space left"
    for old in (None, "old\n"):
        if old:
            write_text(path, old)

        def crash(*_):
            raise error

        with monkeypatch.context() as patch:
            patch.setattr(store.os, step, crash)
            with pytest.raises(Crash if error is Crash else WriteError, match=said):
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


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
def test_json_is_strict(tmp_path, number):
    path = tmp_path / "a"
    value = {"b": [1.0, {"c": number}], "d": (0.5, number)}
    for write in (write_json, lambda path, value: write_json_lines(path, [value])):
        with pytest.raises(DataError, match=rf"a: not written: b\[1\]\.c = {number}"):
            write(path, value)
    assert not path.exists()
    write_json(path, null_for_nan(value))
    found = json.loads(path.read_text(), parse_constant=pytest.fail)
    assert found == {"b": [1.0, {"c": None}], "d": [0.5, None]}


def test_names_that_are_no_text(tmp_path):
    """A file name of other bytes, as Python spells it, survives a file of ours."""
    name = os.fsdecode(b"/models/\xff")
    write_json(tmp_path / "a", {"source": name})
    assert json.loads((tmp_path / "a").read_text("utf-8")) == {"source": name}


def test_links_are_followed_and_pipes_written_into(tmp_path):
    (tmp_path / "real").write_text("old")
    (tmp_path / "link").symlink_to("real")
    write_text(tmp_path / "link", "new")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real").read_text() == "new"
    os.mkfifo(tmp_path / "pipe")
    reader = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    try:
        write_text(tmp_path / "pipe", "through")
        assert os.read(reader, 100) == b"through"
    finally:
        os.close(reader)
    assert (tmp_path / "pipe").is_fifo()


def test_long_names(tmp_path):
    name = "東" * 80  # 240 of the 255 bytes that a name may have
    write_text(tmp_path / name, "x")
    assert [p.name for p in tmp_path.iterdir()] == [name]


@pytest.mark.parametrize(
    ("path", "reason"),
    [("none/a", "No such file or directory"), ("file/a", "Not a directory"), ("", "directory")],
)
def test_what_cannot_be_written_is_named(tmp_path, path, reason):
    (tmp_path / "file").write_text("x")
    with pytest.raises(WriteError, match=rf"^{tmp_path / path}: cannot be written: .*{reason}"):
        write_bytes(tmp_path / path, b"x")


def test_an_output_is_no_input(tmp_path):
    (tmp_path / "a").write_text("x")
    (tmp_path / "soft").symlink_to("a")
    os.link(tmp_path / "a", tmp_path / "hard")
    (tmp_path / "d").symlink_to(tmp_path)
    for name in ("a", "soft", "hard", "d/a"):
        with pytest.raises(DataError, match=f"{name}: is what is read"):
            check_not_input(tmp_path / name, tmp_path / "a")
    check_not_input(tmp_path / "b", tmp_path / "a")
    with pytest.raises(DataError, match="is what is read"):
        check_not_input(tmp_path / "none", tmp_path / "a", tmp_path / "none")


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
        ({**IDENTITY, "model": "xyz"}, 'another model ("abc" there, "xyz" here)'),
        (
            {**IDENTITY, "settings": {"top": 10, "rule": ("right", 16)}},
            "other settings (top 20 there, 10 here)",
        ),
        ({**IDENTITY, "model": "0f" * 32}, "another model"),
        ({**IDENTITY, "dtype": "float32"}, 'another dtype (none there, "float32" here)'),
        ({"model": "abc"}, 'other settings ({"top": 20, "rule": ["right", 16]} there, none here)'),
        (
            {"model": "x", "settings": {"top": 1, "rule": (), "a": 1, "b": 2}},
            'another model ("abc" there, "x" here), other settings (top 20 there, 1 here; rule '
            '["right", 16] there, [] here; a none there, 1 here; ...)',
        ),
    ],
)
def test_another_run_is_refused_and_left_alone(tmp_path, other, key):
    RunDirectory(tmp_path, IDENTITY).save(0, PART)
    with pytest.raises(DataError, match=re.escape(f"holds a run with {key}; give a new directory")):
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


@pytest.mark.parametrize("step", ["fsync", "replace"])
@pytest.mark.parametrize("error", [Crash, OSError(28, "No space left on device")])
def test_a_first_write_that_fails_does_not_stand_in_the_way(tmp_path, monkeypatch, step, error):
    """Neither where the directory was made, nor what a kill leaves in it."""
    path = tmp_path / "a" / "run"

    def crash(*_, **__):
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(store.os, step, crash)
        if error is Crash:
            patch.setattr(store.Path, "unlink", crash)  # a kill cleans nothing up
        kinds = (Crash, WriteError)
        with pytest.raises(
            kinds, match=None if error is Crash else "run.*No space left on device; "
        ):
            RunDirectory(path, IDENTITY)
    assert path.is_dir()
    run = RunDirectory(path, IDENTITY)
    run.save(0, PART)
    assert RunDirectory(path, IDENTITY).load(0) is not None


def test_a_run_is_taken_up_where_nothing_can_be_written(tmp_path, monkeypatch):
    RunDirectory(tmp_path, IDENTITY).save(0, PART)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(store.os, "fsync", full)
    run = RunDirectory(tmp_path, IDENTITY)
    assert run.load(0) is not None
    with pytest.raises(WriteError, match=r"00001\.npz: cannot be written: No space left"):
        run.save(1, PART)
    assert run.load(1) is None


def test_parts_of_nobody_are_refused(tmp_path):
    (tmp_path / "parts").mkdir()
    (tmp_path / "parts" / "00000.npz").write_bytes(b"x")
    with pytest.raises(DataError, match="holds files but no run of ours"):
        RunDirectory(tmp_path, IDENTITY)


@pytest.mark.parametrize("content", [b"", b"{", b"\xff", b"[1]", b"null", b"[" * 10**5])
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


@pytest.mark.parametrize("keep", [lambda path: RunDirectory(path, {"n": 1}), lambda path: Memory()])
def test_a_part_is_made_once(tmp_path, keep):
    parts = keep(tmp_path / "run")
    made = []

    def make():
        made.append(1)
        return {"values": [1.5, 2.5]}

    for _ in range(2):
        assert parts.part("a", make)["values"].tolist() == [1.5, 2.5]
    assert len(made) == 1
    assert parts.load("b") is None
    assert parts.path is None or (parts.path / "parts" / "a.npz").is_file()
