"""Runs in memory and from a directory: the same results, and reading changes nothing."""

import inspect
import json
import math
import os
import shlex
import shutil
import stat
import subprocess
import sys

import numpy as np
import pytest
from support.fixtures import located_run, multi_choice, write_lm, write_queries

import jaxneurons
from jaxneurons.cli import app
from jaxneurons.engine.quadrature import Quadrature
from jaxneurons.errors import ConfigError, DataError
from jaxneurons.neurons.sets import NeuronSet
from jaxneurons.prompts.queries import Query, read_queries
from jaxneurons.qrnca import joining, trials
from jaxneurons.qrnca import locating as locate
from jaxneurons.qrnca import method as qrnca
from jaxneurons.qrnca import run as qrnca_run
from jaxneurons.qrnca.method import QRNCAConfig
from jaxneurons.qrnca.opening import open_run
from jaxneurons.qrnca.stages import analyse, edit, evaluate, predict
from jaxneurons.storage.tables import read_tables

# A random model says anything rather than the answer.
pytestmark = [
    pytest.mark.filterwarnings("ignore::jaxneurons.qrnca.caveats.UnlikelyAnswerWarning"),
    pytest.mark.filterwarnings("ignore::jaxneurons.qrnca.caveats.LowOptionMassWarning"),
]

SETTINGS = QRNCAConfig(quadrature=Quadrature("gauss", 2), common=0.6, prompts=1)
QUERIES = 8
IDENTITY = {
    "settings": {
        "quadrature": {"rule": "gauss", "steps": 2, "tolerance": 0.0005, "max_nodes": 16},
        "threshold": 0.2,
        "prompts": 1,
        "common": 0.6,
        "top": 20,
        "normalise": "coarse",
        "form": "context",
        "decimals": None,
        "site": "up",
    },
    "batch size": 4,
    "format": 3,
}
"""As version 0.1 wrote it, beside hashes: what later versions must read."""


@pytest.fixture(scope="module")
def lm(tmp_path_factory):
    return jaxneurons.load(write_lm(tmp_path_factory.mktemp("model")))


@pytest.fixture(scope="module")
def queries(tmp_path_factory):
    path = tmp_path_factory.mktemp("queries") / "choice.json"
    return read_queries(write_queries(path, multi_choice(QUERIES)))


@pytest.fixture(scope="module")
def run(lm, queries, tmp_path_factory):
    out = tmp_path_factory.mktemp("run") / "run"
    return located_run(lm, queries, out=out, settings=SETTINGS, batch_size=4)


def snapshot(directory):
    """Bytes and time of change of every file, time of change of every directory."""
    return {
        path.relative_to(directory): (
            path.read_bytes() if path.is_file() else None,
            path.stat().st_mtime_ns,
        )
        for path in [directory, *directory.rglob("*")]
    }


def closed(directory):
    """Without permission to write: no hindrance to root, whom the snapshot tells on."""
    for path in [directory, *directory.rglob("*")]:
        path.chmod(path.stat().st_mode & ~(stat.S_IWUSR | stat.S_IWGRP | stat.S_IWOTH))


@pytest.fixture
def frozen(run, tmp_path):
    """A copy that nobody may write to."""
    copy = tmp_path / "frozen"
    shutil.copytree(run.path, copy)
    closed(copy)
    yield copy
    for path in [copy, *copy.rglob("*")]:
        path.chmod(path.stat().st_mode | stat.S_IWUSR)


def same_neurons(one, other):
    assert list(one) == list(other)
    for query in one:
        assert one[query] == other[query]
        assert one[query].neurons == other[query].neurons
    assert one.common == other.common


# --- reading --------------------------------------------------------------------------------------


def test_opening_computes_nothing_and_changes_nothing(run, frozen, lm, monkeypatch):
    for module, name in (
        (joining, "join"),
        (locate, "join"),
        (qrnca, "run_prompts"),
        (qrnca, "attribute_batch"),
        (qrnca, "merge"),
        (qrnca, "rank"),
        (qrnca_run, "encode_queries"),
    ):
        monkeypatch.setattr(module, name, None)
    before = snapshot(frozen)
    opened = open_run(frozen, lm)
    assert snapshot(frozen) == before
    same_neurons(run, opened)
    assert (opened.queries, opened.settings) == (run.queries, SETTINGS)
    assert opened.facts == json.loads(json.dumps(run.facts))
    assert (opened.batch_size, opened.path, opened.identity) == (4, frozen, run.identity)
    for query, scores in run.prompts.items():
        for a, b in zip(scores, opened.prompts[query], strict=True):
            for value, read in zip(a, b, strict=True):
                np.testing.assert_array_equal(value, read)


def test_every_stage_writes_elsewhere(frozen, lm, tmp_path, monkeypatch):
    """From the shell; the run's directory stays as it is, and its neurons are not located again."""
    before = snapshot(frozen)
    monkeypatch.setattr(qrnca, "attribute_batch", None)
    out = tmp_path / "out"
    for stage in ("evaluate", "edit", "predict", "analyse"):
        more = ["--against", str(frozen)] if stage == "analyse" else []
        words = ["qrnca", stage, "--run", str(frozen), "--out", str(out), "--model", lm.source]
        app([*words, *more], standalone_mode=False)
    assert snapshot(frozen) == before
    names = {path.name for path in out.iterdir()}
    assert names == {"tables", "figures", "parts", "evaluation.json", "editing.json"}
    assert {"evaluation", "editing", "prediction", "against"} <= set(read_tables(out / "tables"))
    assert all(path.name.startswith(("trials-", "predict-")) for path in out.glob("parts/*.npz"))
    with pytest.raises(DataError, match="no finished run"):
        open_run(out, lm)


def test_results_go_nowhere_unless_told(frozen, lm, monkeypatch):
    before = snapshot(frozen)
    opened = open_run(frozen, lm)
    tables = evaluate(opened)
    assert tables.path is None
    monkeypatch.setattr(trials, "scaled_answers", None)  # editing shares the trials, in memory
    assert edit(opened).rows("editing")
    assert snapshot(frozen) == before


def test_a_directory_that_cannot_be_written_to(run, lm, tmp_path):
    with pytest.raises(DataError, match=r"cannot be written: .*; give another directory: out="):
        evaluate(run, out="/proc/none")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").touch()
    with pytest.raises(DataError, match="holds files but no run of ours"):
        evaluate(run, out=tmp_path / "mine")
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["thesis.tex"]


def test_results_beside_another_run_are_refused(run, lm, queries, tmp_path):
    other = located_run(lm, queries, out=tmp_path / "other", settings=SETTINGS, batch_size=QUERIES)
    before = snapshot(other.path)
    with pytest.raises(DataError, match="holds a run with another batch size"):
        analyse(run, out=other.path)
    assert snapshot(other.path) == before


@pytest.mark.parametrize(
    "damage",
    ["cut", *(pytest.param(damage, marks=pytest.mark.slow) for damage in ("missing", "turned"))],
)
def test_a_part_that_is_lost(run, lm, tmp_path, damage, monkeypatch):
    """Reading never computes it; the command in the message does."""
    copy = tmp_path / "a run"
    shutil.copytree(run.path, copy)
    part = copy / "parts" / "00001.npz"
    content = part.read_bytes()
    if damage == "missing":
        part.unlink()
    else:
        part.write_bytes(content[:-1] if damage == "cut" else content[:99] + content[100:] + b"x")
    with monkeypatch.context() as patched:
        patched.setattr(qrnca, "attribute_batch", None)
        with pytest.raises(DataError, match=r"parts/00001\.npz is missing or damaged") as raised:
            open_run(copy, lm)
    assert not (damage == "missing" and part.exists())
    command = str(raised.value).split("`")[1]
    assert command.startswith("jaxneurons qrnca locate --model ")
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            "from jaxneurons.cli import main; main()",
            *shlex.split(command)[1:],
        ],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONWARNINGS": "ignore"},
    )
    assert done.returncode == 0, done.stderr
    mended = open_run(copy, lm)
    for query, located in run.items():  # another process: its devices and precision are others
        assert mended[query].ranking == located.ranking
        np.testing.assert_allclose(mended[query].naica, located.naica, rtol=1e-4)


def test_a_run_of_version_0_1(run, lm, tmp_path):
    """Identity and files as they were written then."""
    copy = tmp_path / "old"
    shutil.copytree(run.path, copy)
    known = copy / "parts" / "identity.json"
    identity = json.loads(known.read_text())
    keys = ["model", "tokenizer", "dtype", "settings", "queries", "prompts", "batch size", "format"]
    assert list(identity) == keys
    known.write_text(json.dumps({**identity, **IDENTITY}, indent=2) + "\n")
    same_neurons(run, open_run(copy, lm))
    known.write_text(json.dumps({**identity, "format": 2}))
    with pytest.raises(DataError, match=r"older run \(.*format 2, where 3 is read\); run `jaxn"):
        open_run(copy, lm)


@pytest.mark.parametrize("name", ["neurons.jsonl", "common_neurons.json"])
def test_neurons_that_were_edited(run, lm, tmp_path, name):
    copy = tmp_path / "run"
    shutil.copytree(run.path, copy)
    text = (copy / name).read_text()
    first = json.loads(text.split("\n")[0] if name == "neurons.jsonl" else text)
    changes = {
        "neurons.jsonl": [
            {"id": "another"},
            {"neurons": first.get("neurons", [])[1:]},
            {"neurons": [[0, -1]] * len(first.get("neurons", []))},
            {"naica": [0.5] * len(first.get("neurons", []))},
            {"na": None},
        ],
        "common_neurons.json": [
            {"neurons": {}},
            {"neurons": [{"neuron": [0], "clusters": 1}]},
            {"neurons": [{"neuron": [0, 0], "clusters": 0.5}]},
        ],
    }[name]
    for change in changes:
        line = json.dumps({**first, **change})
        rest = text.split("\n", 1)[1] if name == "neurons.jsonl" else ""
        (copy / name).write_text(f"{line}\n{rest}")
        with pytest.raises(DataError, match=f"{name}.*`jaxneurons qrnca locate .*` makes it again"):
            open_run(copy, lm)


def test_another_model_or_way_to_read_it(run, lm, tmp_path):
    half = jaxneurons.load(lm.source, dtype="bfloat16")
    with pytest.raises(DataError, match=r"another dtype: float32, not bfloat16; load the model"):
        open_run(run.path, half)
    other = jaxneurons.load(write_lm(tmp_path / "other", seed=1))
    with pytest.raises(DataError, match="give the model of the run"):
        open_run(run.path, other)


def test_prompts_that_become_other_tokens(run, lm, tmp_path):
    copy = tmp_path / "run"
    shutil.copytree(run.path, copy)
    lines = (copy / "queries.jsonl").read_text().replace("option is right?", "option is it?")
    (copy / "queries.jsonl").write_text(lines)
    opened = open_run(copy, lm)
    same_neurons(run, opened)
    with pytest.raises(DataError, match="become other tokens than those that were located"):
        evaluate(opened)


def test_the_directory_is_checked_before_separators_are_decided(run, lm, queries, monkeypatch):
    monkeypatch.setattr(locate, "join", None)
    with pytest.raises(DataError, match="holds a run with another batch size"):
        locate.locate(lm, queries, out=run.path, settings=SETTINGS, batch_size=3)


# --- in memory ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def memory(lm, queries):
    return located_run(lm, queries, settings=SETTINGS, batch_size=4)


def test_in_memory_as_in_a_directory(run, memory, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    same_neurons(run, memory)
    assert (memory.path, memory.store.path) == (None, None)
    times = ("seconds", "seconds_of_attribution")
    for stage in (evaluate, edit, predict, analyse):
        here, there = stage(memory), stage(run, out=tmp_path / "out")
        assert list(here) == list(there)
        for name in here:
            assert here[name].equals(there[name]), name
        for facts in (here.facts, there.facts):
            assert [facts.pop(time, None) is None for time in times] == [not facts] * 2
        assert here.facts == there.facts
        assert (here.path, there.path) == (None, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_run_is_a_mapping_of_neurons_by_query(memory, lm):
    query = max(memory.values(), key=lambda located: len(located.ranking))
    assert isinstance(query.neurons, NeuronSet)
    assert query.neurons == NeuronSet.of(up=query.ranking)
    assert len(query.ranking) == len(query.naica) == len(query.na) == len(query.ica) > 1
    assert query.naica == sorted(query.naica, reverse=True)
    assert query.neurons.scales(lm.config, 0.0)["up"].sum() == 3 * 64 - len(query.ranking)
    assert list(memory) == [f"q{n}" for n in range(QUERIES)]
    with pytest.raises(KeyError):
        memory["another"]


def test_what_a_notebook_shows(memory):
    text, page = repr(memory), memory._repr_html_()
    assert len(text.splitlines()) == 1 + QUERIES
    assert f"{QUERIES} queries" in text
    assert f"{memory.facts['neurons_per_query']['mean']:.1f} neurons each" in text
    assert page.count("<tr>") == 1 + QUERIES
    (row,) = (row for row in memory.rows() if row["query"] == "q1")
    assert row["neurons"] == len(memory["q1"].ranking)
    assert row["best"] == "{}, {}".format(*memory["q1"].ranking[0])
    assert row["probability"] == np.mean([p.probability for p in memory.prompts["q1"]])
    assert row["gap"] == max(p.gap.max() for p in memory.prompts["q1"])
    tables = analyse(memory)
    assert repr(tables).startswith("Tables(neurons: ")
    assert tables["counts"].column_names[:3] == ["group", "queries", "mean"]
    assert tables["counts"].to_pylist() == tables.rows("counts")
    assert tables._repr_html_().count("<table>") == len(tables)


def test_neurons_of_your_own(memory, lm, tmp_path):
    mine = memory["q1"].neurons
    tables = evaluate(memory, neurons=mine)
    yours = [row for row in tables.rows("changes") if row["method"] == "yours"]
    assert {row["neurons"] for row in yours} == {len(mine)}
    assert tables.facts["neurons_file"] == {"path": None, "sha256": mine.digest}
    for neurons, message in (
        (NeuronSet(), "holds no neurons"),
        (NeuronSet.of(down=[(0, 1)]), "at down, but this run is of neurons at 'up'"),
        (NeuronSet.of(up=[(9, 1)]), "layer 9 is not in this model"),
    ):
        with pytest.raises(DataError, match=message):
            evaluate(memory, neurons=neurons)
    (tmp_path / "own.csv").write_text("site,layer,index\n")
    with pytest.raises(DataError, match=r"own\.csv: holds no neurons"):
        edit(memory, neurons=tmp_path / "own.csv")


# --- wrong arguments ------------------------------------------------------------------------------

LOCATE = {
    "lm": [("lab", "lm is a model as jaxneurons.load gives it, got 'lab'")],
    "queries": [
        ("lab", "queries are a list of Query, got 'lab': read a file with"),
        ({"a": 1}, "queries are a list of Query, got {'a': 1}"),
        (3, "queries are a list of Query, got 3"),
        (["What?"], r"number 1 is 'What\?'"),
    ],
    "settings": [(Quadrature(), r"settings are a QRNCAConfig, got Quadrature\(")],
    "out": [(3, "out is the path of a directory, or None, got 3")],
    "batch_size": [
        (0, "batch size must be an integer of at least 1, got 0"),
        (2.5, r"batch size must be .* got 2\.5"),
        (True, "batch size must be .* got True"),
    ],
    "progress": [(3, r"progress is a function of \(done, of\), or None, got 3")],
    "cache_bytes": [(-1, "cache_bytes must be an integer of at least 0, got -1")],
}


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [(name, *case) for name, cases in LOCATE.items() for case in cases],
)
def test_locate_refuses_wrong_arguments_at_once(lm, queries, monkeypatch, name, value, message):
    monkeypatch.setattr(locate, "encode_queries", None)
    arguments = {"lm": lm, "queries": queries, "settings": SETTINGS} | {name: value}
    with pytest.raises(ConfigError, match=message):
        inspect.unwrap(locate.locate)(**arguments)  # before the types are checked


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"answers": ("A",) * 2}, "query 'q1': as many prompts as answers"),
        ({"prompts": ()}, "query 'q1': as many prompts as answers are needed, one at least"),
        ({"prompts": "Which?"}, "query 'q1': prompts, answers, options and separators are tuples"),
        ({"id": "q0"}, "query 'q0' is there twice"),
    ],
)
def test_queries_made_by_hand_are_checked(lm, queries, changes, message):
    values = {"id": "q1", "group": "a", "prompts": ("?",), "answers": ("A",), "options": ((),)}
    made = Query(**values)
    for key, value in changes.items():
        object.__setattr__(made, key, value)
    with pytest.raises(DataError, match=message):
        locate.locate(lm, [queries[0], made, *queries[2:]], settings=SETTINGS)


def test_stages_refuse_wrong_arguments_at_once(memory, monkeypatch):
    monkeypatch.setattr("jaxneurons.qrnca.stages.run_trials", None)
    for stage in (evaluate, edit, predict, analyse):
        plain = inspect.unwrap(stage)
        with pytest.raises(ConfigError, match=r"run is 'runs/lab': open it first with jaxneurons"):
            plain("runs/lab")
        with pytest.raises(ConfigError, match=r"run is what jaxneurons\.qrnca\.locate gives, got"):
            plain({})
        with pytest.raises(ConfigError, match="out is the path of a directory"):
            plain(memory, out=3)
        with pytest.raises(ConfigError, match="progress is a function of"):
            plain(memory, progress=True)
        if stage is not analyse:
            for seed in (-1, 0.5, True, None, math.nan):
                with pytest.raises(ConfigError, match="seed must be an integer of at least 0"):
                    plain(memory, seed=seed)
    for stage in (evaluate, edit):
        with pytest.raises(ConfigError, match="neurons are a NeuronSet or the CSV file of one"):
            inspect.unwrap(stage)(memory, neurons=[(0, 1)])
    for kinds, message in (
        ("up", r"kinds are a list of sites, such as \['up', 'gate'\], got 'up'"),
        (["up"], "at least two of up, gate, act are needed"),
        (["up", "down"], "got 'down'"),
    ):
        with pytest.raises(ConfigError, match=message):
            inspect.unwrap(analyse)(memory, kinds=kinds)
    with pytest.raises(ConfigError, match="kinds_limit must be an integer; got '60'"):
        inspect.unwrap(analyse)(memory, kinds=["up", "gate"], kinds_limit="60")
    with pytest.raises(DataError, match="no finished run"):
        analyse(memory, against="/nowhere")
    with pytest.raises(ConfigError, match="a run is opened by the path of its directory, got a"):
        inspect.unwrap(open_run)(memory)
