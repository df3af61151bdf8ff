"""Methods beside controls: kept, resumed, the same numbers twice; edits are stand-ins."""

import dataclasses
import json
import types
from typing import Any

import numpy as np
import pytest
from support.edits import capital_requests, lab, stand_in

from jaxneurons.edit import editing, measures
from jaxneurons.edit.cases import MeasureSettings
from jaxneurons.edit.changes import LowRank, Multipliers, Rows, apply
from jaxneurons.edit.controls import change_norm, random_changes
from jaxneurons.edit.evaluation import evaluate
from jaxneurons.edit.method import ROME, Edit, KnowledgeNeurons, Optimisation
from jaxneurons.edit.outcomes import MEASURES
from jaxneurons.edit.summaries import difference_rows, summary_rows
from jaxneurons.errors import ConfigError, DataError
from jaxneurons.neurons.sets import NeuronSet

SMALL = MeasureSettings(steps=4, fluency_tokens=8, perplexity_tokens=20, batch=2)
TEXTS = ("The capital of Wenmonia is Vouthbu .",)
METHODS = {
    "weak": ROME(layer=2, covariance="identity", optimisation=Optimisation(clamp=1.0)),
    "strong": ROME(layer=3, covariance="identity", optimisation=Optimisation(clamp=60.0)),
}


@pytest.fixture
def editor(monkeypatch):
    """Edits that need no optimisation, in place of the methods'; counts the calls."""
    calls = types.SimpleNamespace(calls=0, edit_each=stand_in)

    def edit_each(*arguments, **options):
        calls.calls += 1
        return calls.edit_each(*arguments, **options)

    monkeypatch.setattr(editing, "edit_each", edit_each)
    monkeypatch.setattr(editing, "values_of", lambda *arguments, **options: None)
    return calls


def run(requests=None, methods=METHODS, **options):
    requests = capital_requests(3) if requests is None else requests
    return evaluate(lab(), requests, methods, measures=SMALL, texts=TEXTS, **options)


@pytest.mark.slow
def test_every_request_method_and_control_has_a_row(editor):
    steps = []
    tables = run(progress=lambda *done: steps.append(done))
    rows = tables.rows("edits")
    labels = [request.id for request in capital_requests(3)]
    assert [(r["method"], r["control"]) for r in rows[::3]] == [
        ("unedited", ""),
        ("weak", ""),
        ("weak", "random"),
        ("strong", ""),
        ("strong", "random"),
    ]
    assert [row["request"] for row in rows] == labels * 5
    assert editor.calls == 4  # two methods, two chunks
    assert steps == [(2, 6), (4, 6), (5, 6), (6, 6)]
    for method, norm in (("weak", 8.0), ("strong", 480.0)):
        of_method = [row for row in rows if row["method"] == method]
        for row, control in zip(of_method[:3], of_method[3:], strict=True):
            assert row["norm"] == pytest.approx(control["norm"], rel=1e-5)
            assert row["norm"] == pytest.approx(norm, rel=0.3)
    assert tables.facts["left_out"] == []
    assert set(tables.facts["seconds"]) == {"unedited", "weak", "strong", "all"}


def test_rows_are_those_of_measure(editor):
    requests = capital_requests(3)
    rows = [row for row in run().rows("edits") if row["method"] == "strong"]
    edits = stand_in(lab().params, requests, config=lab().config, settings=METHODS["strong"])
    plain = measures.measure(
        lab(), requests, [edit.changes for edit in edits], settings=SMALL, texts=TEXTS
    )
    for row, expected in zip(rows[:3], plain, strict=True):
        for name, value in expected.items():
            same = value if isinstance(value, str | None) else pytest.approx(value, rel=1e-4)
            assert row[name] == same, name


def test_every_answer_is_there_and_makes_the_means(editor):
    tables = run()
    rows, answers = tables.rows("edits"), tables.rows("answers")
    for row in rows:
        key = [row[name] for name in ("request", "method", "control")]
        mine = [a for a in answers if [a[name] for name in ("request", "method", "control")] == key]
        assert [a["kind"] for a in mine][:1] == ["prompt"]
        for kind, measure in (("prompt", "efficacy"), ("paraphrase", "generalisation")):
            members = [a for a in mine if a["kind"] == kind]
            assert [a["number"] for a in members] == list(range(len(members)))
            for how in ("forced", "free"):
                assert np.mean([a[how] for a in members]) == pytest.approx(row[f"{measure}_{how}"])
        assert mine[0]["generated"] == row["generated"]
    assert len({a["free"] for a in answers}) > 1


def test_averages_intervals_and_paired_differences(editor):
    tables = run()
    rows = tables.rows("edits")
    summary = {(r["method"], r["control"]): r for r in tables.rows("summary")}
    for name in ("efficacy_free", "locality_kl", "perplexity"):
        values = {
            key: [r[name] for r in rows if (r["method"], r["control"]) == key] for key in summary
        }
        for key, line in summary.items():
            assert line[name] == pytest.approx(np.mean(values[key]))
            assert line[f"{name}_low"] <= line[name] <= line[f"{name}_high"]
        for against, other in (("random", ("strong", "random")), ("unedited", ("unedited", ""))):
            (line,) = (
                r
                for r in tables.rows("differences")
                if (r["method"], r["against"], r["measure"]) == ("strong", against, name)
            )
            gaps = np.subtract(values["strong", ""], values[other])
            assert line["difference"] == pytest.approx(gaps.mean())
            assert line["difference_low"] >= gaps.min() - 1e-12
            assert line["difference_high"] <= gaps.max() + 1e-12


def test_pairs_are_of_the_same_request_and_missing_numbers_are_left_out():
    base = dict.fromkeys(MEASURES) | {"failed": ""}
    rows = [
        base | {"method": m, "control": c, "request": r, "fluency": f}
        for m, c, r, f in (
            ("a", "", "x", 1.0),
            ("a", "", "y", 5.0),
            ("a", "", "z", None),
            ("a", "random", "y", 2.0),
            ("a", "random", "z", 2.0),
        )
    ]
    (line,) = difference_rows(rows)
    assert (line["requests"], line["difference"]) == (1, 3.0)
    summary = summary_rows(rows)
    assert [row["fluency"] for row in summary] == [3.0, 2.0]
    assert summary[0]["requests"] == 3
    assert summary[0]["efficacy_free"] is summary[0]["efficacy_free_low"] is None


@pytest.mark.slow
@pytest.mark.parametrize("stopped_at", [3, 14])
def test_a_stopped_run_goes_on_to_the_same_files(editor, tmp_path, monkeypatch, stopped_at):
    from jaxneurons.storage.store import RunDirectory

    run(out=tmp_path / "whole")
    saved, save = [0], RunDirectory.save

    def stopping(self, name, arrays):
        if saved[0] == stopped_at:
            raise KeyboardInterrupt
        saved[0] += 1
        save(self, name, arrays)

    with monkeypatch.context() as patch:
        patch.setattr(RunDirectory, "save", stopping)
        with pytest.raises(KeyboardInterrupt):
            run(out=tmp_path / "stopped")
    editor.calls = 0
    run(out=tmp_path / "stopped")
    assert editor.calls == (4 if stopped_at < 6 else 1)
    for name in ("evaluation.json", "tables/edits.csv", "tables/summary.csv"):
        whole, resumed = ((tmp_path / d / name).read_bytes() for d in ("whole", "stopped"))
        assert whole == resumed, name
    editor.calls = 0
    run(out=tmp_path / "stopped")
    assert editor.calls == 0


def test_another_method_is_added_to_what_is_there(editor, tmp_path):
    run(methods={"weak": METHODS["weak"]}, out=tmp_path / "run")
    editor.calls = 0
    tables = run(out=tmp_path / "run")
    assert editor.calls == 2
    assert json.loads((tmp_path / "run/evaluation.json").read_text())["edits"] == json.loads(
        json.dumps(run().rows("edits"))
    )
    assert {path.name for path in (tmp_path / "run/figures").iterdir()} == {
        "efficacy.png",
        "locality.png",
    }
    assert tables.path == tmp_path / "run"
    assert tables.facts["seconds"]["weak"]["measuring"] > 0  # of the call before
    with pytest.raises(DataError, match="another seed"):
        run(out=tmp_path / "run", seed=1)


def test_bad_requests_are_left_out_and_said(editor):
    good = capital_requests(3)
    unaskable = dataclasses.replace(good[0], id="long", paraphrases=("the " * 200,))
    refused = dataclasses.replace(good[1], id="refused")

    def refusing(params, requests, **options):
        if any(request.id == "refused" for request in requests):
            raise DataError("the subject cannot be edited")
        return stand_in(params, requests, **options)

    editor.edit_each = refusing
    tables = run([good[0], unaskable, refused, good[2]])
    kept = [r["request"] for r in tables.rows("edits") if r["method"] == "strong"]
    assert kept == [good[0].id, good[2].id] * 2
    said = tables.facts["left_out"]
    assert "context holds" in said[0]["reason"]
    assert said[0] | {"reason": ""} == {"request": "long", "method": "", "reason": ""}
    assert {(s["request"], s["method"], s["reason"]) for s in said[1:]} == {
        ("refused", method, "the subject cannot be edited")
        for method in ("weak", "weak (random)", "strong", "strong (random)")
    }
    with pytest.raises(DataError, match="none of 1 requests can be asked; the first: paraphrase"):
        run([unaskable])


@pytest.mark.slow
def test_neurons_are_drawn_anew_for_each_request_of_the_control(editor):
    seen = []

    def operate(params, requests, *, settings, **unused):
        sets = settings.neurons
        sets = sets if isinstance(sets, tuple) else (sets,) * len(requests)
        seen.append(sets)
        edits = []
        for members in sets:
            layers, indices = members.pairs("act").T.astype(np.int32)
            off = Multipliers("act", layers, indices, np.zeros(len(members), np.float32))
            edits.append(Edit((off,), settings, None, {}, {}))
        return edits

    editor.edit_each = operate
    sets = tuple(NeuronSet.of(act=[(1, 3 + i), (4, 5)]) for i in range(3))
    rows = run(methods={"off": KnowledgeNeurons(sets)}).rows("edits")
    assert [(r["method"], r["control"]) for r in rows[3::3]] == [("off", ""), ("off", "random")]
    edited = [members for call in (seen[0], seen[2]) for members in call]
    random = [members for call in (seen[1], seen[3]) for members in call]
    assert edited == list(sets)
    assert len(set(map(repr, random))) == 3
    for members, drawn in zip(edited, random, strict=True):
        assert [layer for layer, _ in drawn.pairs("act")] == [1, 4]
        assert not set(map(tuple, members.pairs("act"))) & set(map(tuple, drawn.pairs("act")))
    with pytest.raises(ConfigError, match="2 sets of neurons for 3 requests"):
        run(methods={"off": KnowledgeNeurons(sets[:2])})


def test_wrong_arguments(editor):
    with pytest.raises(ConfigError, match="cannot be named 'unedited'"):
        run(methods={"unedited": METHODS["weak"]})
    with pytest.raises(DataError, match=r"text needs the covariance of layers 2; collect it"):
        run(methods={"text": ROME(layer=2)})
    with pytest.raises(ConfigError, match="layer"):
        run(methods={"deep": ROME(layer=99)})


def test_random_changes_have_the_same_size_elsewhere():
    other: Any
    params, config = lab().params, lab().config
    rng = np.random.default_rng(0)
    kernel = np.asarray(params["layers"]["ffn"]["down"]["kernel"], np.float64)
    width, hidden = kernel.shape[1:]
    left, right = rng.normal(size=(width, 3)), rng.normal(size=(3, hidden))
    low = LowRank("ffn.down", 1, left.astype(np.float32), right.astype(np.float32))
    index = np.array([4, 7])
    moved = rng.normal(size=(2, hidden))
    rows = Rows("ffn.down", 2, index, (kernel[2, index] + moved).astype(np.float32))
    off = Multipliers("act", np.array([1, 1, 3]), np.array([0, 1, 2]), np.zeros(3, np.float32))
    other = random_changes(params, (low, rows, off), np.random.default_rng(1), config=config)

    def difference(change):
        return (
            np.asarray(
                apply(params, [change], config=config)["layers"]["ffn"]["down"]["kernel"],
                np.float64,
            )
            - kernel
        )

    ours, theirs = difference(low)[1], difference(other[0])[1]
    assert np.linalg.norm(theirs) == pytest.approx(np.linalg.norm(ours), rel=1e-4)
    assert np.linalg.norm(theirs, axis=1) == pytest.approx(np.linalg.norm(ours, axis=1), rel=1e-3)
    assert abs((ours * theirs).sum()) < 0.3 * (ours**2).sum()
    ours, theirs = difference(rows)[2, index], difference(other[1])[2, index]
    assert np.linalg.norm(theirs, axis=1) == pytest.approx(np.linalg.norm(ours, axis=1), rel=1e-4)
    assert not np.allclose(ours, theirs, atol=0.1)
    np.testing.assert_array_equal(other[2].layer, off.layer)
    assert not set(np.asarray(other[2].index)[:2].tolist()) & {0, 1}
    assert int(other[2].index[2]) != 2
    assert change_norm(params, [low, rows]) == pytest.approx(
        np.sqrt((difference(low) ** 2).sum() + (difference(rows) ** 2).sum()), rel=1e-4
    )
    assert change_norm(params, [off]) is None
