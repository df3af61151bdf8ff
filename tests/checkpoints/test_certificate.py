"""`verify`: right conversions pass, whatever is said of generation; wrong ones do not."""

import dataclasses
import json

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from support.fixtures import write_lm

import jaxneurons as jn
from jaxneurons.checkpoints.certificate import NEW_TOKENS, SHORT, _sequences, verify
from jaxneurons.checkpoints.fetch import locate_source

pytest.importorskip("torch")


def assert_passed(found):
    assert found["passed"], {key: found[key] for key in ("logits_worst", "continuations")}
    assert found["weights"]["differ"] == {}
    assert {one["tokens_agreeing"] for one in found["continuations"]} == {NEW_TOKENS}


@pytest.mark.slow
def test_the_model_that_ships_with_the_package(run, tmp_path):
    assert run("convert", "lab", tmp_path / "lab")[0] == 0
    code, out, err = run("verify", tmp_path / "lab", "--against", "lab")
    assert code == 0, err
    assert "Passed" in out
    assert_passed(json.loads((tmp_path / "lab" / "certificate.json").read_text()))


@pytest.mark.slow
@pytest.mark.smollm2
def test_the_model_that_is_fetched_by_name(smollm2, smollm2_path):
    assert locate_source("smollm2-135m")[0] == smollm2_path
    assert_passed(verify(smollm2, smollm2_path, long=48))


GENERATION = {
    "eos_token_id": list(range(0, 400, 2)),
    "pad_token_id": 0,
    "repetition_penalty": 5.0,
    "suppress_tokens": list(range(100, 300)),
    "begin_suppress_tokens": list(range(300, 400)),
    "forced_eos_token_id": 3,
    "no_repeat_ngram_size": 1,
    "min_new_tokens": 3,
    "do_sample": True,
    "temperature": 2.0,
    "num_beams": 3,
}


def test_what_a_checkpoint_says_of_generation_does_not_matter(tmp_path):
    """A prompt that begins with token 0, which is the padding, and everything that is decoding."""
    model = write_lm(tmp_path / "tiny", "bytes+bos")
    (model / "generation_config.json").write_text(json.dumps(GENERATION))
    lm = jn.load(model)
    assert lm.tokenizer("x")["input_ids"][0] == 0
    assert_passed(verify(lm, model, long=SHORT))


def test_a_value_that_no_sequence_meets(tmp_path):
    model = write_lm(tmp_path / "tiny", vocab_size=3000, tie_word_embeddings=False)
    lm = jn.load(model)
    met = {int(i) for ids in _sequences(lm, SHORT).values() for i in ids}
    row = next(i for i in range(2999, 0, -1) if i not in met)
    table = lm.params["embed"]["embedding"]
    changed = {**lm.params, "embed": {"embedding": table.at[row, 3].add(0.5)}}
    found = verify(dataclasses.replace(lm, params=changed), model, long=SHORT)
    assert found["logits_worst"]["largest"] < 1e-3
    assert found["continuations_equal"] == "4 of 4"
    assert found["weights"]["differ"] == {"model.embed_tokens.weight": pytest.approx(0.5)}
    assert not found["passed"]


@pytest.mark.slow
def test_first_choices_that_rounding_may_turn_are_one_choice(tmp_path):
    """Pairs of tokens have equal logits in PyTorch, and logits 5e-7 of them apart here."""
    model = write_lm(tmp_path / "tiny", tie_word_embeddings=False)
    tensors = load_file(model / "model.safetensors")
    rows = tensors["lm_head.weight"]
    rows[1::2] = rows[0 : 2 * (len(rows) // 2) : 2]
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    lm = jn.load(model)
    kernel = np.array(lm.params["unembed"]["kernel"])
    kernel[:, 1::2] *= np.float32(1 + 5e-7)
    found = verify(
        dataclasses.replace(lm, params={**lm.params, "unembed": {"kernel": kernel}}),
        model,
        long=SHORT,
    )
    assert_passed(found)
    assert sum(one["near_ties"] for one in found["continuations"]) > 0
    kernel[:, 1::2] *= np.float32(1.01)
    found = verify(
        dataclasses.replace(lm, params={**lm.params, "unembed": {"kernel": kernel}}),
        model,
        long=SHORT,
    )
    assert not found["passed"]
    assert found["continuations_equal"] != "4 of 4"
