"""Facts edited, measured and traced from the shell, on the lab model."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.edits import lab

import jaxneurons as jn
from jaxneurons.edit import (
    MEMIT,
    ROME,
    EditRequest,
    LearnedNeurons,
    lab_requests,
    locate_neurons,
    named_methods,
    read_patch,
)
from jaxneurons.edit.evaluation_cli import chosen
from jaxneurons.edit.method_names import METHODS, SINGLE
from jaxneurons.storage.tables import read_tables

QUICK = ("--prefixes", 2)


def test_rome_writes_a_patch_that_edits(run, tmp_path):
    patch = tmp_path / "rome.safetensors"
    code, out, err = run(
        "edit", "rome", "--model", "lab", "--requests", "lab", "--limit", 1, "--out", patch,
        "--layer", 1, "--covariance", "identity", *QUICK,
    )  # fmt: skip
    assert code == 0, err
    assert "Written" in out
    (request,) = lab_requests(1)
    edited = jn.edit.apply_patches(lab(), [read_patch(patch)])
    steps = len(lab().tokenizer(request.target, add_special_tokens=False)["input_ids"])
    before, after = (
        jn.generate(lm, [request.prompt], steps=steps)[0].strip() for lm in (lab(), edited)
    )
    assert before == request.ground_truth
    assert after == request.target
    facts = read_patch(patch).facts
    assert facts["method"] == "ROME"
    assert facts["settings"]["optimisation"]["prefixes"] == 2
    names = ("id", "subject", "prompt", "target", "ground_truth")
    assert facts["requests"] == [{name: getattr(request, name) for name in names}]


def test_an_optimisation_that_stops_early_is_no_success(run, tmp_path):
    patch = tmp_path / "rome.safetensors"
    code, out, err = run(
        "edit", "rome", "--model", "lab", "--requests", "lab", "--limit", 1, "--out", patch,
        "--layer", 1, "--covariance", "identity", "--steps", 0, "--prefixes", 0,
    )  # fmt: skip
    assert code == 0, err
    assert "below stop" in out
    assert "1 of 1 optimisations ended above the stop loss of 0.05" in out
    assert "1 of 1 new answers have a probability below 0.5" in err
    (change,) = read_patch(patch).changes
    np.testing.assert_array_equal(np.asarray(change.left) @ np.asarray(change.right), 0)


@pytest.mark.slow
def test_learned_edits_change_the_located_neurons_alone(run, tmp_path):
    patch = tmp_path / "learn.safetensors"
    code, _, err = run(
        "edit", "learn", "--model", "lab", "--requests", "lab", "--limit", 1, "--out", patch,
        "--steps", 2,
    )  # fmt: skip
    assert code == 0, err
    (located,) = locate_neurons(lab(), lab_requests(1))
    assert len(located) == 20
    rows = {(c.layer, int(i)) for c in read_patch(patch).changes for i in np.asarray(c.index)}
    assert rows == {tuple(pair) for pair in located.pairs("act").tolist()}


@pytest.mark.slow
def test_surgery_says_what_it_did(run, tmp_path):
    patch = tmp_path / "surgery.safetensors"
    code, out, err = run(
        "edit", "surgery", "--model", "lab", "--requests", "lab", "--limit", 2, "--out", patch,
    )  # fmt: skip
    assert code == 0, err
    requests = lab_requests(2)
    edited = jn.edit.apply_patches(lab(), [read_patch(patch)])
    for request in requests:
        query = jn.prompts.encode_query(lab().tokenizer, request.prompt, request.target)
        row = next(line for line in out.splitlines() if request.prompt in line).split()
        assert row[-3] == "20"
        for lm, shown in ((lab(), row[-2]), (edited, row[-1])):
            logits = jn.forward(lm.params, jnp.array([query.prompt]), config=lm.config).logits
            p = jax.nn.softmax(logits[0, -1])[query.answer]
            assert float(shown) == pytest.approx(float(p), abs=6e-4)
    assert "may well have failed" in err


@pytest.mark.slow
def test_located_neurons_are_those_of_the_highest_attribution():
    lm, requests = lab(), lab_requests(3)
    sets = locate_neurons(lm, requests, count=5)
    for request, members in zip(requests, sets, strict=True):
        query = jn.prompts.encode_query(lm.tokenizer, request.prompt, request.ground_truth)
        scores = jn.integrated_gradients(
            lm.params,
            jnp.array([query.prompt]),
            jnp.array([query.answer]),
            config=lm.config,
            site="act",
        ).scores[0]
        least = min(float(scores[layer, index]) for _, (layer, index) in members)
        assert int((scores > least + 1e-6).sum()) <= 4
    broken = dataclasses.replace(lm, params=jax.tree.map(lambda x: x * jnp.nan, lm.params))
    with pytest.raises(jn.DataError, match="not finite"):
        locate_neurons(broken, requests, count=5)
    with pytest.raises(jn.DataError, match="ground_truth"):
        locate_neurons(lm, [EditRequest("The capital of Ada is", "Ada", "Rome")])


def test_evaluate_from_the_shell(run, tmp_path):
    out = tmp_path / "run"
    command = ("edit", "evaluate", "--model", "lab", "--requests", "lab", "--limit", 2,
               "--methods", "finetune", "--out", out, "--fluency-tokens", 0,
               "--perplexity-tokens", 0)  # fmt: skip
    code, shown, err = run(*command)
    assert code == 0, err
    assert "finetune" in shown
    rows = read_tables(out / "tables")["edits"]
    assert {row["method"] for row in rows} == {"unedited", "finetune"}
    first = (out / "evaluation.json").read_text()
    assert run(*command)[0] == 0
    assert (out / "evaluation.json").read_text() == first
    assert json.loads(first)


def test_trace_from_the_shell(run, tmp_path):
    code, shown, err = run("edit", "trace", "--model", "lab", "--facts", "lab", "--limit", 1,
                           "--samples", 1, "--out", tmp_path / "run")  # fmt: skip
    assert code == 0, err
    assert "Indirect effect at the layer where it is largest" in shown
    (fact,) = read_tables(tmp_path / "run" / "tables")["facts"]
    assert fact["attribute"] == lab_requests(1)[0].ground_truth
    assert (tmp_path / "run" / "figures" / "tracing.png").is_file()


def test_methods_by_name_with_layers_and_prefixes():
    lm, requests = lab(), lab_requests(1)
    made = named_methods(lm, requests, ["rome", "memit", "finetune"], layer=0, layers=[1, 2],
                         prefixes=3)  # fmt: skip
    assert (made["rome"].layer, made["finetune"].layer, made["memit"].layers) == (0, 0, (1, 2))
    assert made["rome"].optimisation == dataclasses.replace(ROME().optimisation, prefixes=3)
    assert made["memit"].optimisation == dataclasses.replace(MEMIT().optimisation, prefixes=3)
    assert named_methods(lm, requests, ["memit"]) == {"memit": MEMIT()}
    with pytest.raises(jn.ConfigError, match="memit"):
        named_methods(lm, requests, ["memti"])


def test_names_of_methods():
    names = list(METHODS)
    assert chosen("rome, memit,rome", names) == ["rome", "memit"]
    assert chosen("all", names) == names
    assert chosen("all", names, every=SINGLE) == [name for name in names if name != "accumulate"]
    assert METHODS["learn"] is LearnedNeurons
    with pytest.raises(jn.ConfigError, match="memit"):
        chosen("memti", names)
    with pytest.raises(jn.ConfigError, match="a method"):
        chosen("rome,memit", names, most=1)
