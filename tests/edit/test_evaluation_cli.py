"""What `edit evaluate`, `sequential`, `layers` and `trace` read, check and say."""

import json

import pytest
from support.edits import capital_requests, lab

import jaxneurons as jn
from jaxneurons.edit import evaluation, evaluation_cli, layers, located, method_names, sequential
from jaxneurons.edit.arguments import read_facts
from jaxneurons.edit.cases import MeasureSettings
from jaxneurons.edit.method import ROME, LearnedNeurons
from jaxneurons.edit.requests import KnownFact
from jaxneurons.edit.world_requests import lab_requests
from jaxneurons.neurons.sets import NeuronSet
from jaxneurons.storage.store import RunDirectory
from jaxneurons.storage.tables import Tables


class Slow(Exception):
    """Something that takes long has begun."""


def slow(*unused, **also_unused):
    raise Slow


@pytest.fixture
def loaded(monkeypatch):
    """The model is there at once."""
    monkeypatch.setattr(evaluation_cli, "load_and_say", lambda *unused, **also_unused: lab())


def test_sizes_beyond_the_requests_are_said_before_the_work_and_at_the_end(
    run, loaded, capsys, monkeypatch, tmp_path
):
    before = []

    def evaluate_sequential(lm, requests, methods, *, sizes, **unused):
        before.append(capsys.readouterr().err)
        _, left_out = sequential.fitting_sizes(sizes, len(requests))
        return Tables({"sequential": []}, facts={"left_out": [], "sizes_left_out": left_out})

    monkeypatch.setattr(sequential, "evaluate_sequential", evaluate_sequential)
    command = ("edit", "sequential", "--model", "lab", "--requests", "lab", "--limit", 2,
               "--methods", "finetune", "--out", tmp_path / "run", "--sizes")  # fmt: skip
    code, shown, err = run(*command, "1,10,1000")
    assert code == 0, err
    assert before[0].startswith("warning: Not measured after 10, 1,000 edits: there are fewer")
    assert "Not measured after 10, 1,000 edits" in shown
    code, shown, err = run(*command, "1,2")
    assert code == 0, err
    assert before[1] == ""
    assert "Not measured" not in shown
    code, _, err = run(*command, "5,10")
    assert code == 1
    assert "2 requests, fewer than the smallest of the sizes [5, 10]" in err.replace("\n", " ")
    assert len(before) == 2


def identity(**other):
    whole = {
        **lab().identity(),
        **evaluation.request_identity(lab_requests(2), MeasureSettings()),
        "seed": 0,
        "format": evaluation.FORMAT,
        "texts": "x",
        "covariance": {},
    }
    return {**whole, **other}


def test_the_directory_is_checked_before_anything_slow(run, loaded, monkeypatch, tmp_path):
    command = ("edit", "evaluate", "--model", "lab", "--requests", "lab", "--limit", 2,
               "--methods", "learn", "--out")  # fmt: skip
    monkeypatch.setattr(located, "locate_neurons", slow)
    RunDirectory(tmp_path / "model", identity(model="other"))
    code, _, err = run(*command, tmp_path / "model")
    assert code == 1
    assert "holds a run with another model" in err
    monkeypatch.setattr(evaluation_cli, "load_and_say", slow)
    (tmp_path / "file").write_text("x")
    RunDirectory(tmp_path / "seed", identity(seed=3))
    for name, message in (("file", "is a file; give a directory"), ("seed", "(3 there, 0 here)")):
        code, _, err = run(*command, tmp_path / name)
        assert code == 1
        assert message in err
    for more in (("layers", "--method", "finetune"), ("trace", "--facts", "lab")):
        given = ("--requests", "lab") if more[0] == "layers" else ()
        code, _, err = run("edit", *more, *given, "--model", "lab", "--out", tmp_path / "seed")
        assert code == 1
        assert "holds a run with another format" in err
    with pytest.raises(Slow):
        run(*command, tmp_path / "new")


def test_what_is_known_before_is_in_the_identity_of_a_run(tmp_path):
    """Else runs that are there would be refused, or others only after the work."""
    none = MeasureSettings(fluency_tokens=0, perplexity_tokens=0)
    requests = capital_requests(1)
    found = evaluation._prepare(lab(), requests, None, none, (), 4, tmp_path / "run").identity
    known = evaluation.request_identity(requests, none)
    assert (known | {"seed": 4, "format": 2}).items() <= found.items()
    assert found.keys() == identity().keys()
    settings = ROME(covariance="identity")
    whole = layers._identity(lab(), requests, settings, {}, layers.MEASURED)
    assert layers.known_identity(requests, settings).items() <= whole.items()


def test_located_neurons_are_kept_by_model_and_requests(monkeypatch, tmp_path):
    calls = []

    def locate(lm, requests, *, count, progress):
        calls.append(len(requests))
        return tuple(NeuronSet.of(act=[(n, 3), (1, 7), (2, 5)]) for n, _ in enumerate(requests))

    monkeypatch.setattr(located, "locate_neurons", locate)
    requests = lab_requests(3)
    first, again = (
        method_names.named_methods(lab(), requests, ["learn"], out=tmp_path / "run-neurons")
        for _ in range(2)
    )
    assert calls == [3]
    assert isinstance(first["learn"], LearnedNeurons)
    assert first["learn"].neurons == again["learn"].neurons == locate(None, requests, count=0,
                                                                     progress=None)  # fmt: skip
    method_names.named_methods(lab(), requests[:2], ["surgery"], out=tmp_path / "run-neurons")
    method_names.named_methods(lab(), requests, ["learn"])
    assert calls == [3, 3, 2, 3]
    method_names.named_methods(lab(), requests, ["rome"], out=tmp_path / "none")
    assert not (tmp_path / "none").exists()


@pytest.mark.usefixtures("as_users_call")
def test_names_in_place_of_settings():
    for methods in (["rome", "finetune"], {"finetune": "finetune"}, "finetune"):
        for call in (evaluation.evaluate, sequential.evaluate_sequential):
            with pytest.raises(
                jn.ConfigError, match=r"named_methods\(lm, requests, \[.*'finetune'"
            ):
                call(lab(), capital_requests(1), methods)


def test_facts_of_any_file(tmp_path):
    (request,) = lab_requests(1)
    old = KnownFact(request.prompt, request.subject, request.ground_truth, request.id)
    assert read_facts("lab", 1) == [old]
    assert len(read_facts("lab", 2)) == 2
    known = {"known_id": 7, "prompt": old.prompt, "subject": old.subject, "attribute": "x"}
    (tmp_path / "known.json").write_text(json.dumps([known]))
    assert read_facts(str(tmp_path / "known.json")) == [
        KnownFact(old.prompt, old.subject, "x", "7")
    ]
    edit = {"case_id": 3, "prompt": old.prompt, "subject": old.subject, "target_new": "x",
            "ground_truth": old.attribute}  # fmt: skip
    (tmp_path / "edits.json").write_text(json.dumps([edit]))
    assert read_facts(str(tmp_path / "edits.json")) == [
        KnownFact(old.prompt, old.subject, old.attribute, "3")
    ]
    (tmp_path / "own.csv").write_text("prompt,subject,target\nGrass is,Grass,blue\n")
    with pytest.raises(jn.DataError, match="request '0' says no old answer"):
        read_facts(str(tmp_path / "own.csv"))
    del known["attribute"]
    (tmp_path / "known.json").write_text(json.dumps([known]))
    with pytest.raises(jn.DataError, match="no 'attribute'"):
        read_facts(str(tmp_path / "known.json"))


def test_columns_that_are_passed_over_are_said_once(run, capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(evaluation_cli, "load_and_say", slow)
    path = tmp_path / "own.csv"
    path.write_text("prompt,subject,target,source\nGrass is,Grass,blue,x\nMoss is,Moss,red,y\n")
    with pytest.raises(Slow):
        run("edit", "layers", "--model", "lab", "--requests", path, "--out", tmp_path / "run")
    assert capsys.readouterr().err.count("not known, and passed over: 'source'") == 1
    path.write_text("prompt,subject,target,paraphrase\nGrass is,Grass,blue,x\n")
    code, _, err = run("edit", "layers", "--model", "lab", "--requests", path, "--out", "run")
    assert code == 1
    assert f"{path}: line 1: unknown column 'paraphrase'; did you mean 'paraphrases'?" in err
