"""The command line of several processes, as far as one process shows it."""

import sys

import numpy as np

from jaxneurons.cli import _options_of
from jaxneurons.storage.store import RunDirectory


def test_options_that_need_distributed(run):
    code, _, err = run("--process", 0, "inspect", "lab")
    assert code == 1
    assert "give --distributed too" in err
    code, _, err = run("--local-disks", "inspect", "lab")
    assert code == 1
    assert "give --distributed too" in err
    code, _, err = run("--distributed", "--processes", 2, "inspect", "lab")
    assert code == 1
    assert "give --coordinator and --process too" in err


def test_merge(run, tmp_path):
    for number, name in enumerate("ab"):
        RunDirectory(tmp_path / name, {"seed": 0}).save(number, {"value": np.array(number)})
        inner = RunDirectory(tmp_path / name / "sites" / "up", {"seed": 1})
        inner.save(f"inner-{name}", {"value": np.array(number)})
    code, out, err = run("merge", tmp_path / "a", tmp_path / "b", "--out", tmp_path / "both")
    assert (code, err) == (0, "")
    assert "(4 parts added)" in out
    both = RunDirectory(tmp_path / "both", {"seed": 0})
    assert [int((both.load(number) or {})["value"]) for number in range(2)] == [0, 1]
    inner = RunDirectory(tmp_path / "both" / "sites" / "up", {"seed": 1})
    assert all(inner.load(f"inner-{name}") is not None for name in "ab")
    code, _, err = run("merge", tmp_path / "a", tmp_path / "c", "--out", tmp_path / "both")
    assert code == 1
    assert "no parts of a run here" in err


def test_what_must_be_the_same_in_all():
    line = "--distributed --coordinator h:1 --process 1 --timeout=9 --processes 2 qrnca locate"
    line += " --model /a/model --limit 5 --rule=gauss --out run"
    assert _options_of(line.split()) == {
        "--distributed": [],
        "--processes": ["2", "qrnca", "locate"],
        "--model": [],
        "--limit": ["5"],
        "--rule": ["gauss"],
        "--out": ["run"],
    }
    assert _options_of(sys.argv[:0]) == {}
