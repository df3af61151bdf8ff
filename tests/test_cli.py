"""The command line in-process: what it prints, exit codes, and one line for every bad input."""

import json
import re
import struct
import subprocess
import sys

import numpy as np
import pytest
from support.checkpoints import (
    byte_level_vocabulary,
    gguf_fields,
    gguf_tensors,
    hf_tensors,
    tiny,
    write_gguf,
)
from support.fixtures import cloze, multi_choice, write_lm, write_queries
from support.pictures import ink, pixels

import jaxneurons
from jaxneurons.engine.quadrature import Quadrature
from jaxneurons.neurons.sets import Neuron
from jaxneurons.plots.figures import neuron_map
from jaxneurons.prompts.queries import read_queries
from jaxneurons.qrnca.method import QRNCAConfig

# A random model says anything rather than the answer.
pytestmark = pytest.mark.filterwarnings("ignore::jaxneurons.qrnca.caveats.UnlikelyAnswerWarning")

PROGRAM = (sys.executable, "-m", "jaxneurons.cli")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_lm(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture
def facts(tmp_path):
    """Of one shape, so that one program is compiled."""
    records = [{**record, "answer": "Rome"} for record in cloze(4)]
    return write_queries(tmp_path / "facts.json", records)


def locate(run, model, queries, out, *more):
    return run("qrnca", "locate", "--model", model, "--queries", queries, "--out", out, *more)


# --- what works -----------------------------------------------------------------------------------


def test_version_and_help(run):
    assert run("--version") == (0, jaxneurons.__version__ + "\n", "")
    code, out, err = run("--help")
    assert (code, err) == (0, "")
    assert "demo" in out
    assert "qrnca" in out
    code, out, _ = run("qrnca", "locate", "--help")
    assert code == 0
    assert "--queries" in out


def test_locate(run, model, facts, tmp_path):
    out = tmp_path / "run"
    code, said, err = locate(run, model, facts, out, "--rule", "gauss", "--steps", 2)
    assert (code, "error" in err, "Traceback" in err) == (0, False, False)
    assert "4 queries, 8 prompts" in said
    assert str(out) in said.replace("\n", "")
    lines = (out / "neurons.jsonl").read_text().splitlines()
    assert [json.loads(line)["id"] for line in lines] == [f"fact-{n}" for n in range(4)]
    settings = json.loads((out / "run.json").read_text())["settings"]
    assert (settings["quadrature"]["rule"], settings["quadrature"]["steps"]) == ("gauss", 2)
    before = (out / "neurons.jsonl").read_bytes()
    assert locate(run, model, facts, out, "--rule", "gauss", "--steps", 2)[0] == 0
    assert (out / "neurons.jsonl").read_bytes() == before
    code, _, err = locate(run, model, facts, out, "--rule", "gauss", "--steps", 3)
    assert code == 1
    assert "other settings" in err


@pytest.mark.filterwarnings("default::jaxneurons.qrnca.caveats.LowOptionMassWarning")
def test_reference_mode_limit_and_warning(run, model, tmp_path):
    queries = write_queries(tmp_path / "choice.json", multi_choice(6))
    out = tmp_path / "run"
    more = ("--mode", "reference", "--limit", 4, "--steps", 2)
    code, said, err = locate(run, model, queries, out, *more)
    assert code == 0
    assert "4 queries, 12 prompts" in said
    assert len(re.findall(r"^warning: the options hold only .*$", err, re.MULTILINE)) == 1
    settings = json.loads((out / "run.json").read_text())["settings"]
    assert settings["quadrature"]["rule"] == "reference"
    assert (settings["form"], settings["decimals"]) == ("bare", 6)


def test_as_a_program(tmp_path):
    done = subprocess.run(
        [*PROGRAM, "qrnca", "locate", "--model", "none", "--queries", "none", "--out", "run"],
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
    )
    assert (done.returncode, done.stdout) == (1, "")
    assert re.fullmatch(
        r"error: .*none: no such query file, nor one .* \(lab, .*facts\)\n", done.stderr
    )


def test_stop_says_how_to_go_on(run, monkeypatch, model, facts, tmp_path):
    def stop(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("jaxneurons.qrnca.locating.locate", stop)
    code, _, err = locate(run, model, facts, tmp_path / "run")
    assert code == 130
    assert err.splitlines()[-1].startswith("stopped; what was finished is kept")


def test_odd_names_are_printed_as_they_are(run, model, facts, tmp_path):
    """Square brackets are markup to rich."""
    out = tmp_path / "[bold]run[/nothing]"
    code, said, _ = locate(run, model, facts, out, "--rule", "gauss", "--steps", 2)
    assert code == 0
    assert "[bold]run[/nothing]" in said.replace("\n", "")


# --- what is wrong --------------------------------------------------------------------------------


def fails(result, message):
    """Exit code 1, and nothing but one line on standard error."""
    code, _, err = result
    assert code == 1, err
    assert err.endswith("\n")
    (line,) = err.splitlines()
    assert line.startswith("error: ")
    assert "Traceback" not in err
    assert re.search(message, line), line


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--rule", "gaus"], r"unknown quadrature rule 'gaus'; did you mean 'gauss'"),
        (["--mode", "papers"], r"unknown mode 'papers'; did you mean 'paper'"),
        (["--site", "ups"], r"site must be one of .*; got 'ups'; did you mean 'up'"),
        (["--rule", "reference", "--steps", "1"], r"needs steps >= 2, got 1"),
        (["--limit", "1"], r"one query only"),
        (["--limit", "2"], r"2 queries leave no neurons"),
    ],
)
def test_bad_options(run, model, facts, tmp_path, more, message):
    fails(locate(run, model, facts, tmp_path / "run", *more), message)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("more", [["--limit", "0"], ["--steps", "x"], ["--colour"]])
def test_usage_errors(run, model, facts, tmp_path, more):
    code, _, err = locate(run, model, facts, tmp_path / "run", *more)
    assert code == 2
    assert "Traceback" not in err


def longer(records, prompt):
    records[2]["prompts"][0] = prompt
    return records


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", r"queries\.json: line 1, column 2: not JSON"),
        (
            '{"prompt": "x", "answer": "y"}\n{"prompt"}\n',
            r"queries\.json: line 2, column \d+: not J",
        ),
        (cloze(1), r"one query only"),
        ([], r"holds no queries"),
        (longer(cloze(4), " "), r"query 'fact-2': 'prompts' holds an empty"),
        (
            longer(cloze(4), "Rome is " * 99 + "in"),
            r"query 'fact-2', prompt 1: .*context holds 128",
        ),
        ([{"id": "[/x]\n\x1b[31m", "prompt": "x"}], r"\[/x\].*'answer' must be a text"),
    ],
)
def test_bad_queries(run, model, tmp_path, content, message):
    path = tmp_path / "queries.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    fails(locate(run, model, path, tmp_path / "run"), message)
    assert not (tmp_path / "run").exists()


def test_missing_query_file(run, model, tmp_path):
    fails(locate(run, model, tmp_path / "none.json", tmp_path / "run"), "no such query file")


def test_output_is_a_file(run, model, facts):
    fails(locate(run, model, facts, facts), r"facts\.json: is a file")


def test_output_is_foreign(run, model, facts, tmp_path):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "main.tex").write_text("x")
    fails(locate(run, model, facts, tmp_path / "thesis"), "holds files but no run of ours")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("smollm2-135", r"unknown model 'smollm2-135'.*did you mean 'smollm2-135m'"),
        ("nowhere/at/all", r"nowhere/at/all: no such file or directory"),
        ("./none.gguf", r"none\.gguf: no such file"),
    ],
)
def test_unknown_models(run, facts, tmp_path, name, message):
    fails(locate(run, name, facts, tmp_path / "run"), message)


def test_directory_without_a_model(run, facts, tmp_path):
    fails(locate(run, tmp_path, facts, tmp_path / "run"), r"config\.json")


@pytest.fixture
def gguf_file(tmp_path):
    vocabulary = byte_level_vocabulary()
    config = tiny(vocab_size=len(vocabulary["tokenizer.ggml.tokens"]))
    tensors = gguf_tensors(config, hf_tensors(config))

    def write(**changes):
        fields = {**gguf_fields(config), **vocabulary, **changes}
        return write_gguf(tmp_path / "tiny.gguf", fields, tensors)

    return write


def test_gguf(run, gguf_file, facts, tmp_path):
    model = gguf_file()
    assert locate(run, model, facts, tmp_path / "run", "--rule", "gauss", "--steps", 2)[0] == 0


def test_gguf_of_another_architecture(run, gguf_file, facts, tmp_path):
    model = gguf_file(**{"general.architecture": "qwen3moe"})
    fails(locate(run, model, facts, tmp_path / "run"), r"tiny\.gguf.*qwen3moe")


@pytest.mark.parametrize("keep", [0.0, 3, 30, 0.01, 0.3, 0.9, -1])
def test_truncated_gguf(run, gguf_file, facts, tmp_path, keep):
    model = gguf_file()
    content = model.read_bytes()
    model.write_bytes(content[: int(keep * len(content)) if isinstance(keep, float) else keep])
    fails(locate(run, model, facts, tmp_path / "run"), r"tiny\.gguf")


def test_gguf_that_claims_too_much(run, facts, tmp_path):
    path = tmp_path / "big.gguf"
    path.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 2**60, 2**60))
    fails(locate(run, path, facts, tmp_path / "run"), r"big\.gguf")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::jaxneurons.qrnca.caveats.LowOptionMassWarning")
def test_options_that_begin_with_the_same_token(run, gguf_file, tmp_path):
    """A vocabulary without " A" writes every option as a space and a letter."""
    queries = write_queries(tmp_path / "choice.json", multi_choice(4))
    model = gguf_file(**{"llama.context_length": 512})
    code, _, err = locate(run, model, queries, tmp_path / "run")
    assert code == 0, err
    lines = (tmp_path / "run" / "neurons.jsonl").read_text().splitlines()
    assert all(0 < mass < 1 for line in lines for mass in json.loads(line)["option_mass"])


def test_demo_of_a_model_that_knows_nothing(run, model, tmp_path, facts, monkeypatch):
    few = read_queries(facts)[:1]
    monkeypatch.setattr("jaxneurons.qrnca.demonstration.demo_facts", lambda source: few)
    fails(
        run("demo", "--model", model, "--out", tmp_path / "run"), "the model knows 0 of the facts"
    )


# --- the picture ----------------------------------------------------------------------------------


def png_size(path):
    content = path.read_bytes()
    assert content.startswith(b"\x89PNG\r\n\x1a\n")
    return struct.unpack(">II", content[16:24])


@pytest.mark.parametrize(
    "found",
    [
        {"a": {Neuron(0, 3): 0.5, Neuron(2, 60): 0.1}, "b": {Neuron(1, 1): 0.2}},
        {"a": {Neuron(0, 3): 0.5}, "empty": {}},
        {"empty": {}},
        {"zero": {Neuron(0, 0): 0.0}},
        {f"group {n}": {Neuron(n % 3, n): 0.1} for n in range(12)},
    ],
    ids=["two", "one-empty", "empty", "zero", "many"],
)
def test_neuron_map(tmp_path, found):
    def draw(neurons, name):
        common = [Neuron(2, 5)] if "a" in neurons else []
        return neuron_map(
            neurons, tmp_path / name, num_layers=3, width=64, title="tiny", common=common
        )

    path = draw(found, "map.png")
    width, height = png_size(path)
    assert 1000 <= width <= 4000
    assert 500 <= height <= 3000
    moved = {
        group: {Neuron(2 - neuron.layer, neuron.index): 2 * value for neuron, value in of.items()}
        for group, of in found.items()
    }
    assert ink(path) > 0.005
    same = np.array_equal(pixels(path), pixels(draw(moved, "moved.png")))
    assert same == (not any(found.values()))


def test_demo_needs_no_download(run, tmp_path, monkeypatch):
    """The default: six facts of each domain of the lab model's world."""
    few = QRNCAConfig(quadrature=Quadrature("gauss", 6))  # compiles in half the time
    monkeypatch.setattr("jaxneurons.qrnca.demonstration.SETTINGS", few)
    code, out, err = run("demo", "--out", tmp_path / "run")
    assert code == 0, err
    effects = json.loads((tmp_path / "run" / "effects.json").read_text())["effects"]
    assert [effect["group"] for effect in effects][-1] == "all"
    assert len(effects) == 7
    # The lab model is sure of its facts: a few neurons off cost little, random ones nothing.
    assert effects[-1]["suppressed"] < effects[-1]["random"] - 0.03
    assert effects[-1]["lost"] > effects[-1]["random_lost"]
    assert "geography" in out


# --- the demo on the real model -------------------------------------------------------------------


@pytest.mark.smollm2
@pytest.mark.slow
def test_demo(smollm2, tmp_path):
    from jaxneurons.qrnca.demonstration import bundled_facts
    from jaxneurons.qrnca.demonstration import demo as run_demo

    facts = [fact for fact in bundled_facts(per_group=6) if fact.group == "capital"]
    assert len(facts) == 6
    demo = run_demo(smollm2, out=tmp_path / "run", facts=facts, draws=3)
    own = json.loads((tmp_path / "run" / "effects.json").read_text())
    assert {"neurons.jsonl", "common_neurons.json", "run.json", "effects.json", "neurons.png"} <= {
        path.name for path in (tmp_path / "run").iterdir()
    }
    assert [effect["group"] for effect in own["effects"]] == ["capital", "all"]
    (_, effect) = demo.effects
    assert effect.facts + len(demo.unknown) == 6
    assert effect.neurons > 0
    assert effect.suppressed < effect.random
    assert effect.random == pytest.approx(effect.before, rel=0.3)
    assert effect.lost > effect.random_lost
    png_size(demo.figure)
