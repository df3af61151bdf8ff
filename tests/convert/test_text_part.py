"""Gemma 3 with images: its text part is read, under either spelling of names, and that is said."""

import functools
import json

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from support.fixtures import transformers_tokenizer

import jaxneurons as jn
from jaxneurons import SourceError
from jaxneurons.checkpoints.certificate import verify
from jaxneurons.checkpoints.description import describe
from jaxneurons.convert.hf import read_hf, stored_dtype, stored_dtypes
from jaxneurons.convert.rules import file_names

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from support.families import BY_TYPE, COMMON, IDS, our_logits, torch_logits  # noqa: E402

SAID = "the text part of a model that also reads images: 34 tensors .* are left out"
VISION = {
    "model_type": "siglip_vision_model",
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}


@functools.cache
def both():
    """A tiny model of text and images."""
    tokenizer = transformers_tokenizer("bytes")
    text = {**COMMON, "vocab_size": len(tokenizer), "head_dim": 8, "sliding_window": 7}
    text |= {"rope_parameters": BY_TYPE, "sliding_window_pattern": 2, "num_hidden_layers": 2}
    text["max_position_embeddings"] = 96
    config = transformers.Gemma3Config(
        text_config=transformers.Gemma3TextConfig(**text).to_dict(),
        vision_config=VISION,
        mm_tokens_per_image=4,
        attn_implementation="eager",
    )
    torch.manual_seed(0)
    model = transformers.Gemma3ForConditionalGeneration(config).eval()
    with torch.no_grad():
        for name, values in model.named_parameters():
            if "language_model" in name:
                values.normal_(0.0, 0.15)
    return model, tokenizer


@pytest.fixture
def directory(tmp_path):
    model, tokenizer = both()
    model.save_pretrained(tmp_path / "both")
    tokenizer.save_pretrained(tmp_path / "both")
    return tmp_path / "both"


def renamed(directory):
    """The spelling that transformers has in memory, which some files have too."""
    path = directory / "model.safetensors"
    outside = ("language_model.model.", "vision_tower.", "multi_modal_projector.")
    assert all(name.startswith(outside) for name in load_file(path))
    new = {
        "model." + name.replace("language_model.model.", "language_model."): values
        for name, values in load_file(path).items()
    }
    save_file(new, path)


@pytest.mark.parametrize("spelling", ["hub", "memory"])
def test_the_text_part_is_read(directory, spelling):
    if spelling == "memory":
        renamed(directory)
    with pytest.warns(UserWarning, match=SAID):
        config, params = read_hf(directory)
    assert config.family == "gemma3"
    model, _ = both()
    theirs = torch_logits(model, IDS)
    apart = np.abs(our_logits(params, IDS, config) - theirs).max()
    assert apart < 1e-5 * np.abs(theirs).max()
    assert set(stored_dtypes(directory)) == set(file_names(config, "hf"))
    assert stored_dtype(directory) == np.float32
    assert describe(str(directory)).kind == "Hugging Face, its text part"


def test_it_is_written_as_a_model_of_text(directory, tmp_path):
    with pytest.warns(UserWarning, match=SAID):
        lm = jn.load(directory)
    jn.save(lm, tmp_path / "text", to="hf")
    assert json.loads((tmp_path / "text" / "config.json").read_text())["model_type"] == (
        "gemma3_text"
    )
    again = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "text", attn_implementation="eager"
    )
    assert type(again) is transformers.Gemma3ForCausalLM
    np.testing.assert_array_equal(torch_logits(again, IDS), torch_logits(both()[0], IDS))
    assert describe(str(tmp_path / "text")).kind == "Hugging Face"


def test_inspect_says_what_it_is(run, directory):
    code, out, err = run("inspect", directory)
    assert code == 0, err
    text = " ".join(out.split())
    for part in (
        "family gemma3, Hugging Face, its text part",
        "sliding window 7 positions, 1 of 2 layers",
        "rotary embedding default, theta 500; of sliding layers default, theta 20",
        "GELU (tanh form); embedding times 5.65685; norms by 1 + weight;",
        "queries and keys normed per head; scores times 0.0625",
    ):
        assert part in text
    assert "capped" not in text


@pytest.mark.slow
def test_it_is_verified_against_the_whole(directory):
    with pytest.warns(UserWarning, match=SAID):
        lm = jn.load(directory)
    assert verify(lm, directory, long=40)["passed"]


@pytest.mark.filterwarnings("ignore:.*text part:UserWarning")
def test_tensors_that_do_not_fit(directory):
    path = directory / "model.safetensors"
    tensors = load_file(path)
    name = "language_model.model.layers.1.self_attn.q_norm.weight"
    save_file({k: v for k, v in tensors.items() if k != name}, path)
    with pytest.raises(SourceError, match=r"missing: model\.layers\.1\.self_attn\.q_norm\.weight"):
        read_hf(directory)
    twice = {"model.layers.1.self_attn.q_norm.weight": tensors[name], **tensors}
    save_file(twice, path)
    with pytest.raises(SourceError, match=r"q_norm\.weight is stored twice"):
        read_hf(directory)
    save_file({**tensors, "audio_tower.weight": np.zeros(3, np.float32)}, path)
    with pytest.raises(SourceError, match=r"no place: audio_tower\.weight"):
        read_hf(directory)
