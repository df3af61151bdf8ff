"""`qrnca locate`, then everything after it, on the lab model, as a user would run it."""

import json

import numpy as np
import pytest
from support.fixtures import located_run, write_lm

import jaxneurons as jn
from jaxneurons.cli import app
from jaxneurons.engine.quadrature import Quadrature
from jaxneurons.lab.bundled import bundled_queries
from jaxneurons.qrnca.analyses import balanced
from jaxneurons.qrnca.effects import change_rows, evaluation_rows
from jaxneurons.qrnca.locating import locate
from jaxneurons.qrnca.method import QRNCAConfig
from jaxneurons.qrnca.trials import run_trials
from jaxneurons.storage.tables import read_tables

SETTINGS = QRNCAConfig(quadrature=Quadrature("gauss", 4))
STAGES = ("evaluate", "edit", "predict", "analyse")


@pytest.fixture(scope="module")
def located(tmp_path_factory):
    """Questions of every domain, located in the lab model."""
    out = tmp_path_factory.mktemp("lab") / "run"
    locate(jn.load("lab"), balanced(bundled_queries("lab"), 32), out=out, settings=SETTINGS)
    return out


@pytest.fixture(scope="module")
def everything(located):
    """The tables that all stages leave."""
    for stage in STAGES:
        more = ["--kinds", "up,gate", "--kinds-limit", "8"] if stage == "analyse" else []
        app(["qrnca", stage, "--run", str(located), *more], standalone_mode=False)
    return read_tables(located / "tables")


def test_tables_and_figures(located, everything):
    names = {"evaluation", "changes", "editing", "prediction", "neurons", "counts", "overlap"}
    assert set(everything) == names | {"layers", "words", "kinds", "kind_overlap"}
    assert {path.stem for path in (located / "figures").glob("*.png")} == {
        "pcr",
        "changes",
        "editing",
        "overlap",
        "layers",
        "neurons",
        "prediction",
        "kinds",
    }
    assert all((located / "tables" / f"{name}.csv").is_file() for name in everything)


@pytest.mark.slow
def test_suppressing_a_lab_facts_own_neurons_hurts_it(tmp_path):
    """What locating is for: own neurons matter, matched ones do not."""
    lm = jn.load("lab")
    queries = balanced(bundled_queries("lab-cloze"), 48)
    found = located_run(lm, queries, out=tmp_path / "run", settings=SETTINGS)
    rows = {
        (row["method"], row["change"]): row
        for row in evaluation_rows(change_rows(found, run_trials(found)))
        if row["group"] == "all"
    }
    own, random = rows["QRNCA", "suppress"], rows["matched random", "suppress"]
    assert own["beyond_high"] < 0
    assert own["related"] < -0.02 < random["related"]
    assert abs(own["unrelated"]) < -own["related"] / 2


def test_the_model_itself_is_right(everything):
    rows = [r for r in everything["prediction"] if r["readout"] == "prompting"]
    assert rows[0]["accuracy"] > 0.9


def test_a_stage_says_what_it_found(run, located, everything):
    code, out, err = run("qrnca", "evaluate", "--run", located)
    assert code == 0, err
    assert "QRNCA" in out
    assert "matched random" in out
    assert "tables" in out


def test_neurons_of_ones_own(run, located, everything, tmp_path):
    own = tmp_path / "own.csv"
    own.write_text("site,layer,index\nup,5,418\nup,5,194\n")
    code, out, err = run("qrnca", "edit", "--run", located, "--neurons", own)
    assert code == 0, err
    assert "yours" in out
    for text, message in (
        ("down,5,18\n", "at down, but this run is of neurons at 'up'"),
        ("up,6,18\n", "layer 6"),
        ("", "holds no neurons"),
    ):
        own.write_text("site,layer,index\n" + text)
        code, _, err = run("qrnca", "evaluate", "--run", located, "--neurons", own)
        assert code == 1
        assert message in " ".join(err.split())


def test_locate_on_bundled_queries(run, tmp_path):
    code, _, err = run(
        "qrnca", "locate", "--model", "lab", "--queries", "lab-cloze", "--limit", 4,
        "--rule", "gauss", "--steps", 2, "--out", tmp_path / "run",
    )  # fmt: skip
    assert code == 0, err
    lines = (tmp_path / "run" / "queries.jsonl").read_text().splitlines()
    assert len(lines) == 4
    assert json.loads(lines[0])["group"] == "geography"
    code, _, err = run("qrnca", "evaluate", "--run", tmp_path / "run")
    assert code == 1
    assert "one group only ('geography')" in err
    code, _, err = run("qrnca", "predict", "--run", tmp_path / "run")
    assert code == 1
    assert "multi-choice queries are needed" in err


@pytest.mark.parametrize("stage", STAGES)
def test_no_run_there(run, stage, tmp_path):
    code, _, err = run("qrnca", stage, "--run", tmp_path / "nothing")
    assert code == 1
    assert "no finished run of `jaxneurons qrnca locate`" in err
    assert not (tmp_path / "nothing").exists()


def test_a_run_from_another_model(run, located, tmp_path):
    other = write_lm(tmp_path / "other")
    code, _, err = run("qrnca", "evaluate", "--run", located, "--model", other)
    assert code == 1
    assert "give the model of the run" in err


def test_kinds_that_share_no_numbering(run, located):
    code, _, err = run("qrnca", "analyse", "--run", located, "--kinds", "up,down")
    assert code == 1
    assert "sites to compare are of up, gate, act" in err


def test_neurons_straight_into_a_patch(run, located, tmp_path):
    from jaxneurons.qrnca.opening import open_run

    lm = jn.load("lab")
    opened = open_run(located, lm)
    names = [name for name, found in opened.items() if found.ranking][:2]
    assert len(names) == 2
    asked = [part for name in names for part in ("--query", name)]
    patch = tmp_path / "off.safetensors"
    code, _, err = run("qrnca", "edit", "--run", located, "--write", patch, *asked)
    assert code == 0, err
    facts = jn.edit.read_patch(patch).facts
    assert (facts["run"], facts["queries"], facts["settings"]) == (
        str(located),
        names,
        {"factor": 0},
    )
    members = opened[names[0]].neurons | opened[names[1]].neurons
    edited = jn.edit.apply_patches(lm, [jn.edit.read_patch(patch)])
    prompts = [opened.queries[0].prompts[0]]
    by_scales = jn.generate(lm, prompts, scales=members.scales(lm.config, 0), steps=3)
    assert jn.generate(edited, prompts, steps=3) == by_scales
    expected = jn.edit.scale(lm.params, members, 0.0, config=lm.config)["layers"]["ffn"]
    np.testing.assert_array_equal(edited.params["layers"]["ffn"]["up"]["kernel"],
                                  expected["up"]["kernel"])  # fmt: skip


def test_a_query_that_the_run_does_not_have(run, located, tmp_path):
    patch = tmp_path / "off.safetensors"
    code, _, err = run("qrnca", "edit", "--run", located, "--write", patch, "--query", "nobody")
    assert code == 1
    assert "has no query 'nobody'" in err
    assert not patch.exists()
    code, _, err = run("qrnca", "edit", "--run", located, "--query", "nobody")
    assert code == 1
    assert "--write" in err
