"""`edit neurons`, `apply`, `revert` and `inspect`, in-process, on a tiny model."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file
from support.fixtures import write_lm

import jaxneurons as jn
from jaxneurons import NeuronSet
from jaxneurons.edit import LowRank, apply_patches, make_patch, read_patch, write_patch

CSV = "site,layer,index\nup,0,3\nup,2,7\nact,1,5\n"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_lm(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="module")
def lm(model):
    return jn.load(model)


@pytest.fixture
def neurons(tmp_path):
    (tmp_path / "neurons.csv").write_text(CSV)
    return tmp_path / "neurons.csv"


@pytest.fixture
def low_rank(lm, tmp_path):
    rng = np.random.default_rng(0)
    left, right = rng.normal(size=(64, 1)), rng.normal(size=(1, 32))
    edit = LowRank("ffn.down", 1, jnp.asarray(left, "float32"), jnp.asarray(right, "float32"))
    facts = {"method": "ROME", "optimisation": {"reached": [True, False]}, "targets": ["a", "b"]}
    write_patch(make_patch(lm, edit, facts=facts), tmp_path / "low")
    return tmp_path / "low"


def weights(directory):
    return load_file(directory / "model.safetensors")


def same(one, other):
    return one.keys() == other.keys() and all(
        np.array_equal(one[name], other[name]) for name in one
    )


def test_neurons_into_a_patch_applied_and_reverted(run, lm, model, neurons, tmp_path):
    patch, edited, back = (tmp_path / name for name in ("p.safetensors", "edited", "back"))
    code, out, _ = run("edit", "neurons", "--model", model, "--neurons", neurons,
                       "--factor", "0.5", "--out", patch)  # fmt: skip
    assert code == 0
    assert f"Written: {patch}" in out
    expected = NeuronSet.of(up=[(0, 3), (2, 7)], act=[(1, 5)])
    facts = {"neurons": str(neurons)}
    assert read_patch(patch).digest == make_patch(lm, expected, factor=0.5, facts=facts).digest
    code, out, _ = run("edit", "apply", patch, "--model", model, "--out", edited)
    assert code == 0
    name = f"Applied: {read_patch(patch).name}, for tiny ("
    assert name in out
    by_hand = weights(model)
    by_hand["model.layers.0.mlp.up_proj.weight"][3] *= 0.5
    by_hand["model.layers.2.mlp.up_proj.weight"][7] *= 0.5
    by_hand["model.layers.1.mlp.down_proj.weight"][:, 5] *= 0.5
    assert same(weights(edited), by_hand)
    assert not same(weights(edited), weights(model))
    record = json.loads((edited / "jaxneurons_patches.json").read_text())
    assert record["patches"][0]["digest"] == read_patch(patch).digest
    code, out, _ = run("edit", "revert", patch, "--model", edited, "--out", back)
    assert code == 0
    assert same(weights(back), weights(model))
    assert not (back / "jaxneurons_patches.json").exists()
    code, shown, _ = run("inspect", edited)
    assert code == 0
    held = read_patch(patch)
    assert f"1 in the parameters, on tiny (parameters {held.base[:12]})" in " ".join(shown.split())
    assert f"multipliers {held.digest[:12]}" in " ".join(shown.split())
    assert "in the parameters" not in run("inspect", back)[1]
    code, _, err = run("edit", "apply", patch, "--model", edited, "--out", tmp_path / "twice")
    assert code == 1
    assert "is in the model already" in err


def test_a_low_rank_patch_takes_its_base(run, lm, model, low_rank, neurons, tmp_path):
    other = tmp_path / "other"
    run("edit", "neurons", "--model", model, "--neurons", neurons, "--out", other)
    apply = ("edit", "apply", low_rank, other, "--model", model, "--to", "native", "--out")
    code, _, err = run(*apply, tmp_path / "edited")
    assert code == 1
    assert "patches 1 and 2 both touch 1 rows" in err
    code, _, err = run(*apply, tmp_path / "edited", "--allow-conflicts")
    assert code == 0, err
    edited = jn.load(tmp_path / "edited")
    patches = [read_patch(low_rank), read_patch(other)]
    both = apply_patches(lm, patches, allow_conflicts=True)
    assert edited.values_hash == both.values_hash
    code, _, err = run("edit", "apply", low_rank, "--model", model, "--out", tmp_path / "low-only")
    assert code == 0
    revert = ("edit", "revert", low_rank, "--model", tmp_path / "low-only", "--out")
    code, _, err = run(*revert, tmp_path / "back")
    assert code == 1
    assert "give the base (base=, --base SRC)" in err
    code, _, err = run(*revert, tmp_path / "back", "--base", model)
    assert code == 0, err
    assert same(weights(tmp_path / "back"), weights(model))


def test_a_stack_that_was_saved(run, model, low_rank, neurons, tmp_path):
    other, edited = tmp_path / "other", tmp_path / "edited"
    run("edit", "neurons", "--model", model, "--neurons", neurons, "--out", other)
    code, _, err = run("edit", "apply", low_rank, other, "--model", model, "--allow-conflicts",
                       "--out", edited)  # fmt: skip
    assert code == 0, err
    revert = ("edit", "revert", low_rank, "--model", edited, "--base", model, "--out")
    code, _, err = run(*revert, tmp_path / "part")
    assert code == 1
    assert read_patch(other).digest in err.replace("\n", "")
    code, out, err = run(*revert, tmp_path / "back", other)
    assert code == 0, err
    assert out.count("Reverted: patch ") == 2
    assert same(weights(tmp_path / "back"), weights(model))
    code, _, err = run(*revert, tmp_path / "part", "--keep", other)
    assert code == 0, err
    run("edit", "apply", other, "--model", model, "--out", tmp_path / "other-only")
    assert same(weights(tmp_path / "part"), weights(tmp_path / "other-only"))


def test_an_adapter(run, model, low_rank, neurons, tmp_path):
    out = tmp_path / "adapter"
    code, _, err = run("edit", "apply", low_rank, "--model", model, "--to", "lora", "--out", out)
    assert code == 0, err
    config = json.loads((out / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(model)
    other = tmp_path / "other"
    run("edit", "neurons", "--model", model, "--neurons", neurons, "--out", other)
    code, _, err = run("edit", "apply", other, "--model", model, "--to", "lora", "--out",
                       tmp_path / "no")  # fmt: skip
    assert code == 1
    assert "an adapter holds low-rank terms only" in " ".join(err.split())
    assert "--to hf" in err


def test_a_patch_takes_no_file_s_place(run, model, neurons, tmp_path, monkeypatch):
    """Refused before anything is loaded; a directory that is missing is made."""
    monkeypatch.setattr("jaxneurons.checkpoints.loading.load", None)
    notes = tmp_path / "notes.txt"
    notes.write_text("important")
    for out, said in ((notes, "exists already; delete it or give another name"),
                      (tmp_path, "is a directory; give the name of a file")):  # fmt: skip
        for command in (
            ("edit", "neurons", "--model", model, "--neurons", neurons, "--out", out),
            ("edit", "rome", "--model", model, "--requests", "lab", "--out", out),
            ("edit", "finetune", "--model", model, "--requests", "lab", "--out", out),
            ("edit", "learn", "--model", model, "--requests", "lab", "--out", out),
            ("edit", "surgery", "--model", model, "--requests", "lab", "--out", out),
            ("qrnca", "edit", "--run", tmp_path, "--write", out),
            ("relspec", "neurons", "--out", tmp_path, "--write", out),
        ):
            code, _, err = run(*command)
            assert (code, said in " ".join(err.split())) == (1, True), (command, err)
    assert notes.read_text() == "important"
    monkeypatch.undo()
    out = tmp_path / "new" / "patch"
    assert run("edit", "neurons", "--model", model, "--neurons", neurons, "--out", out)[0] == 0
    assert out.is_file()


def test_what_inspect_shows(run, low_rank):
    code, out, _ = run("edit", "inspect", low_rank)
    assert code == 0
    text = " ".join(out.split())
    assert "patch " in text
    assert "(ROME)" in text
    assert "below stop loss 1 of 2" in text
    assert "request a request b" in text
    assert "reverted by its base" in text
    assert "low-rank ffn.down 1 1" in text


def test_inspect_names_facts_settings_and_texts(run, lm, tmp_path):
    from support.tiny_edits import REQUESTS

    from jaxneurons.edit import MEMIT, Edit

    left, right = (jnp.ones(shape, "float32") for shape in ((64, 1), (1, 32)))
    layer = {"model": "a" * 64, "tokenizer": "b" * 64, "text": "neutral", "text_sha256": "c" * 64,
             "vectors": 4096, "dtype": "float32", "format": 1, "weight": 697.6744186}  # fmt: skip
    facts = {"covariance": {"1": layer, "2": layer}, "prefixes": ["one two"] * 10}
    edit = Edit((LowRank("ffn.down", 1, left, right),), MEMIT(layers=(1, 2)), None, {}, facts,
                requests=(*REQUESTS[:2], *REQUESTS[:2], *REQUESTS[:2], REQUESTS[0]))  # fmt: skip
    write_patch(make_patch(lm, edit), tmp_path / "p")
    code, out, _ = run("edit", "inspect", tmp_path / "p")
    assert code == 0
    text = " ".join(out.split())
    assert text.count("Italy: 'The capital of Italy is' -> 'Paris'") == 3
    assert text.count("'People who live in France speak' -> 'Greek'") == 2
    assert "request ... and 2 more" in text
    covariance = f"layer 2: 4096 keys of text 'neutral' ({'c' * 12}), model {'a' * 12}"
    for said in (covariance, "layers 1, 2", "optimisation.kl_factor 0.0625", "prefixes 10",
                 "weight not set"):  # fmt: skip
        assert said in text
    assert "a" * 13 not in text
    assert "one two" not in text
    # Patches of before had targets.
    old = {"method": "ROME", "targets": [["id", "The capital of Italy is", "Paris"]]}
    write_patch(make_patch(lm, edit.changes, facts=old), tmp_path / "old")
    text = " ".join(run("edit", "inspect", tmp_path / "old")[1].split())
    assert "request 'The capital of Italy is' -> 'Paris'" in text


def test_inspect_counts_neurons_and_names_where_they_come_from(run, lm, tmp_path):
    from jaxneurons.edit import KnowledgeNeurons
    from jaxneurons.edit.patch_cli import write_neurons

    members = NeuronSet.of(up=[(0, 3), (2, 7)])
    facts = {"run": "runs/first", "queries": [f"q{n}" for n in range(11)]}
    write_neurons(lm, members, 0.5, tmp_path / "p", facts=facts)
    text = " ".join(run("edit", "inspect", tmp_path / "p")[1].split())
    assert "run runs/first" in text
    assert "queries q0, q1, q2, q3, q4, q5, q6, q7 and 3 more" in text
    assert "factor 0.5" in text
    settings = KnowledgeNeurons((members, NeuronSet.of(act=[(1, 1)])))
    facts = {"settings": settings}
    write_patch(make_patch(lm, members, facts=facts), tmp_path / "s")
    text = " ".join(run("edit", "inspect", tmp_path / "s")[1].split())
    assert "neurons 3 in 2 sets" in text


def test_wrong_commands(run, model, low_rank, neurons, tmp_path):
    for arguments, said in (
        (("apply", tmp_path / "x", "--model", model, "--out", tmp_path / "o"), "No such file"),
        (("apply", neurons, "--model", model, "--out", tmp_path / "o"), "safetensors file"),
        (("apply", low_rank, "--model", model, "--out", tmp_path), "exists already"),
        (
            ("apply", low_rank, "--model", model, "--to", "lorra", "--out", tmp_path / "o"),
            "unknown format 'lorra'; did you mean 'lora'?",
        ),
        (("inspect", model / "model.safetensors"), "a safetensors file, but no patch"),
        (
            ("neurons", "--model", model, "--neurons", neurons, "--out", neurons),
            "give another file to write to",
        ),
    ):
        code, _, err = run("edit", *arguments)
        assert code == 1
        assert said in err
    assert not (tmp_path / "o").exists()
    neurons.write_text("site,layer,index\nup,9,3\n")
    code, _, err = run("edit", "neurons", "--model", model, "--neurons", neurons, "--out",
                       tmp_path / "p")  # fmt: skip
    assert code == 1
    assert "layer 9 is not in this model" in err
    assert not (tmp_path / "p").exists()
