"""Several processes on this host: what they write is what one writes, and none is left waiting."""

import json
import os
import shutil
import signal
import socket
import time
from pathlib import Path

import numpy as np
import pytest
from support.fixtures import multi_choice, write_lm, write_queries
from support.known import write_relations
from support.worker import (
    edits,
    ends,
    every_method,
    free_port,
    launch,
    locate,
    spread_values,
    start,
    study,
)

import jaxneurons
from jaxneurons.neurons import read_neurons
from jaxneurons.storage.tables import read_tables

pytestmark = pytest.mark.filterwarnings("ignore::jaxneurons.qrnca.caveats.CaveatWarning")

HOST = socket.gethostname()
FILES = ("neurons.jsonl", "common_neurons.json", "queries.jsonl")


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """A model and queries, as arguments of the job."""
    place = tmp_path_factory.mktemp("inputs")
    queries = write_queries(place / "choice.json", multi_choice(8))
    return {"model": str(write_lm(place / "model")), "queries": str(queries)}


@pytest.fixture(scope="module")
def alone(inputs, tmp_path_factory):
    """The directory of one process."""
    out = tmp_path_factory.mktemp("alone") / "run"
    locate(**inputs, out=out)
    return out


def done(processes):
    results = ends(processes)
    for number, (code, out, err) in enumerate(results):
        assert code == 0, err
        assert f"process {number} is done" in out


def compare(out: Path, alone: Path):
    for name in FILES:
        assert (out / name).read_bytes() == (alone / name).read_bytes(), name
    tables, expected = read_tables(out / "tables"), read_tables(alone / "tables")
    assert tables.keys() == expected.keys() >= {"evaluation", "changes", "prediction"}
    assert tables == expected
    parts = {path.name for path in (alone / "parts").iterdir()}
    assert {path.name for path in (out / "parts").iterdir()} == parts
    assert (out / "figures").is_dir()


def test_two_locate_what_one_locates(inputs, tmp_path):
    locate(**inputs, out=tmp_path / "alone", stages=False)
    out = tmp_path / "run"
    done(start([("locate", {**inputs, "out": str(out), "stages": False})] * 2))
    for name in FILES:
        assert (out / name).read_bytes() == (tmp_path / "alone" / name).read_bytes(), name


@pytest.mark.slow
def test_two_write_what_one_writes(inputs, alone, tmp_path):
    out = tmp_path / "run"
    done(start([("locate", {**inputs, "out": str(out)})] * 2))
    compare(out, alone)
    facts = json.loads((out / "run.json").read_text())
    assert (
        facts["neurons_per_query"]
        == json.loads((alone / "run.json").read_text())["neurons_per_query"]
    )


@pytest.mark.slow
def test_resumed_on_other_numbers(inputs, alone, tmp_path):
    for number, count in enumerate((4, 3, 1)):
        out = tmp_path / f"run{number}"
        shutil.copytree(alone, out)
        shutil.rmtree(out / "tables")
        shutil.rmtree(out / "figures")
        for path in sorted((out / "parts").glob("*.npz"))[number::2]:
            path.unlink()
        for name in (*FILES, "run.json"):
            (out / name).unlink()
        done(start([("locate", {**inputs, "out": str(out)})] * count))
        compare(out, alone)


@pytest.fixture(scope="module")
def relations(inputs, tmp_path_factory):
    """Arguments of the job, and the directory of one process."""
    place = tmp_path_factory.mktemp("relations")
    known = write_relations(place / "known", jaxneurons.load(inputs["model"]))
    job = {"model": inputs["model"], "relations": str(known)}
    study(**job, out=place / "run")
    return job, place / "run"


def compare_study(out, alone):
    assert read_tables(out / "tables") == read_tables(alone / "tables")
    assert {"ablation", "overlap", "perplexity"} <= read_tables(out / "tables").keys()
    for path in (alone / "neurons").iterdir():
        assert (out / "neurons" / path.name).read_bytes() == path.read_bytes()
    parts = {path.name for path in (alone / "parts").iterdir()}
    assert {path.name for path in (out / "parts").iterdir()} == parts


@pytest.mark.slow
def test_relations_in_two(relations, tmp_path):
    job, alone = relations
    out = tmp_path / "run"
    done(start([("study", {**job, "out": str(out)})] * 2))
    compare_study(out, alone)


@pytest.mark.slow
def test_edits_in_two(inputs, tmp_path):
    alone, out = tmp_path / "alone", tmp_path / "run"
    edits(inputs["model"], alone)
    done(start([("edits", {"model": inputs["model"], "out": str(out)})] * 2))
    for name in ("", "-sequence"):
        one, two = Path(f"{alone}{name}"), Path(f"{out}{name}")
        assert read_tables(one / "tables") == read_tables(two / "tables")
        assert read_tables(one / "tables")["edits"]
        parts = {path.name for path in (one / "parts").iterdir()}
        assert {path.name for path in (two / "parts").iterdir()} == parts


def lines(out):
    return [json.loads(line) for line in (out / "neurons.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_a_model_on_the_devices_of_two(inputs, alone, tmp_path):
    out = tmp_path / "values.npz"
    done(start([("spread", {**inputs, "out": str(out)})] * 2))
    lm = jaxneurons.load(inputs["model"])
    values, expected = np.load(out), spread_values(lm)
    assert values["whole"]
    for name, array in expected.items():
        np.testing.assert_allclose(values[name], array, atol=1e-5 * np.abs(array).max(), rtol=0)
    (said,) = jaxneurons.generate(lm, ["The capital of France is"], steps=3)
    assert [Path(f"{out}-{number}.txt").read_text() for number in range(2)] == [said] * 2
    run = Path(f"{out}-run")
    for line, other in zip(lines(run), lines(alone), strict=True):
        assert line["neurons"] == other["neurons"]
        np.testing.assert_allclose(line["naica"], other["naica"], rtol=0, atol=1e-5)
    nearly_equal(*(read_tables(o / "tables")["changes"] for o in (run, alone)))


def nearly_equal(rows, expected):
    """Rows of a table, whose numbers may be rounded otherwise."""
    assert len(rows) == len(expected) > 0
    for row, other in zip(rows, expected, strict=True):
        for name, value in row.items():
            numbers = isinstance(value, float) and isinstance(other[name], float)
            assert value == (
                pytest.approx(other[name], rel=1e-3, abs=2e-4) if numbers else other[name]
            ), name


@pytest.mark.slow
def test_a_study_of_a_model_on_the_devices_of_two(relations, tmp_path):
    job, alone = relations
    out = tmp_path / "run"
    done(start([("study", {**job, "out": str(out), "mesh": "1x4"})] * 2))
    tables, expected = read_tables(out / "tables"), read_tables(alone / "tables")
    assert tables.keys() == expected.keys()
    for name, rows in expected.items():
        nearly_equal(tables[name], rows)
    for path in (alone / "neurons").iterdir():
        mine, theirs = (read_neurons(p) for p in (out / "neurons" / path.name, path))
        assert mine == theirs


@pytest.mark.slow
def test_edits_of_a_model_on_the_devices_of_two(inputs, tmp_path):
    alone, out = tmp_path / "alone", tmp_path / "run"
    edits(inputs["model"], alone)
    done(start([("edits", {"model": inputs["model"], "out": str(out), "mesh": "1x4"})] * 2))
    for name in ("", "-sequence"):
        one, two = (read_tables(Path(f"{place}{name}") / "tables") for place in (alone, out))
        for table, rows in one.items():
            nearly_equal(two[table], rows)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::jaxneurons.edit.covariance.SingularCovarianceWarning")
def test_every_method_on_the_devices_of_two(inputs, tmp_path):
    alone, out = tmp_path / "alone.npz", tmp_path / "two.npz"
    every_method(inputs["model"], alone)
    done(start([("every_method", {"model": inputs["model"], "out": str(out), "mesh": "1x4"})] * 2))
    one, two = np.load(alone), np.load(out)
    assert one.keys() == two.keys() >= {"rome", "memit", "alphaedit", "finetune", "rows"}
    np.testing.assert_array_equal(two["base"], one["base"])
    for name in one.keys() - {"base"}:
        scale = 1 if "probability" in name else np.abs(one[name] - one["base"]).max()
        assert scale > 0, name
        np.testing.assert_allclose(two[name], one[name], atol=1e-3 * scale, rtol=0, err_msg=name)


def killed(tmp_path, victim, count=2):
    """Kill one of some processes that wait for each other; what the others came to, and when."""
    ill = {"process": victim, "how": "hangs"}
    processes = start([("hold", {"out": str(tmp_path), "ill": ill})] * count)
    while sum(1 for _ in tmp_path.iterdir()) < count:
        time.sleep(0.05)
    os.kill(processes[victim].pid, signal.SIGKILL)
    started = time.monotonic()
    results = ends(processes)
    assert results[victim][0] == -signal.SIGKILL
    return results[:victim] + results[victim + 1 :], time.monotonic() - started


def test_process_0_is_killed(tmp_path):
    ((code, _, err),), seconds = killed(tmp_path, 0)
    assert code == 1, err
    assert err.splitlines()[-1].startswith(
        f"error: process 0 (host {HOST}) has ended or is out of reach; process 1"
    )
    assert seconds < 30


@pytest.mark.slow
def test_another_is_killed(tmp_path):
    others, seconds = killed(tmp_path, 1, 3)
    for code, _, err in others:
        assert code == 1, err
        assert err.splitlines()[-1].startswith(f"error: process 1 (host {HOST}) has ended")
    assert seconds < 60


def test_an_exception_ends_all(tmp_path):
    ill = {"process": 0, "how": "raises"}
    results = ends(start([("hold", {"out": str(tmp_path), "ill": ill})] * 2))
    assert [code for code, _, _ in results] == [1, 1]
    assert "RuntimeError: no more of this" in results[0][2].splitlines()[-1]
    assert f"process 0 (host {HOST}) failed: RuntimeError: no more of this" in results[1][2]


def test_one_that_never_joins():
    (result,) = ends(start([("nothing", {})], processes=2, timeout=4))
    code, _, err = result
    assert code == 1
    assert "not all processes have joined at 127.0.0.1:" in err.splitlines()[-1]
    assert f"within 4 s (process 0 of 2, host {HOST}, waited)" in err.splitlines()[-1]


def test_the_command_line(inputs, tmp_path):
    """Settings that differ are named before anything is computed; nothing is written."""
    port = free_port()
    common = ["--distributed", "--coordinator", f"127.0.0.1:{port}", "--processes", "2"]
    words = ["qrnca", "locate", "--model", inputs["model"], "--queries", inputs["queries"]]
    out = tmp_path / "run"
    results = ends(
        [
            launch(["-m", "jaxneurons", *common, "--process", str(number), *words, *given])
            for number, given in enumerate(
                ("--threshold", t, "--out", str(out)) for t in ("0.2", "0.3")
            )
        ]
    )
    for code, _, err in results:
        assert code == 1
        assert '--threshold[0]: "0.3"' in err or "--threshold: " in err, err
    assert not out.exists()
