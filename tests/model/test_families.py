"""Every supported shape of model against PyTorch transformers, and every value against its absence.

Tiny random models made by transformers, written by it, read by this library.
"""

import dataclasses
import itertools
import json
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from support.checkpoints import gguf_fields, gguf_tensors, write_gguf

from jaxneurons import SourceError
from jaxneurons.convert.config import config_from_hf
from jaxneurons.convert.gguf import read_gguf
from jaxneurons.convert.hf import read_hf

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from support.families import (  # noqa: E402
    CONTEXT,
    FAMILIES,
    HEADS,
    IDS,
    LENGTH,
    ROPES,
    make,
    our_logits,
    torch_logits,
)

BETAS = "yarn-betas"  # another set of values of one type: once for each family
CASES = [
    *itertools.product(FAMILIES, [name for name in ROPES if name != BETAS], HEADS, (False, True)),
    *itertools.product(FAMILIES, [BETAS], ["gqa"], [False]),
]


def thinned(cases, every):
    """All cases, of which only one in `every` is quick enough not to be marked as slow."""
    return [
        case if number % every == 0 else pytest.param(*case, marks=pytest.mark.slow)
        for number, case in enumerate(cases)
    ]


# Seven shares no factor with the six kinds of heads: every kind and type comes up.
@pytest.mark.parametrize(("family", "rope", "heads", "tied"), thinned(CASES, 7))
def test_logits_equal_pytorch(tmp_path, family, rope, heads, tied):
    model = make(family, rope, heads, tied)
    model.save_pretrained(tmp_path)
    config, params = read_hf(tmp_path)
    assert (config.tied, config.num_kv_heads) == (tied, HEADS[heads])
    assert config.rope.rope_type == ROPES[rope].get("rope_type", "default")
    theirs = torch_logits(model, IDS)
    ours = our_logits(params, IDS, config)
    for position in (0, 1, CONTEXT - 1, CONTEXT, LENGTH - 1):
        np.testing.assert_allclose(ours[:, position], theirs[:, position], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("family", "rope", "loud"), thinned([*itertools.product(FAMILIES, ROPES, (False, True))], 5)
)
def test_bfloat16_logits_equal_pytorch(tmp_path, family, rope, loud):
    model = make(family, rope, "gqa", tied=False, loud=loud).to(torch.bfloat16)
    model.save_pretrained(tmp_path)
    config, params = read_hf(tmp_path, dtype=jnp.bfloat16)
    # Against the same bfloat16 weights in exact arithmetic.
    theirs = torch_logits(model.float(), IDS)
    apart = np.abs(our_logits(params, IDS, config) - theirs)
    if loud:  # PyTorch's own bfloat16 is up to 0.09 off at places: eight bits are what they are
        assert apart.mean() / np.std(theirs) < 2e-2
    else:
        assert apart.max() < 2e-2


def test_a_tied_model_that_stores_only_its_unembedding(tmp_path):
    model = make("llama", "default", "gqa", tied=True)
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["lm_head.weight"] = tensors.pop("model.embed_tokens.weight")
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    again = transformers.LlamaForCausalLM.from_pretrained(tmp_path).eval()
    theirs = torch_logits(again, IDS)
    np.testing.assert_allclose(theirs, torch_logits(model, IDS), atol=1e-5)
    config, params = read_hf(tmp_path)
    np.testing.assert_allclose(our_logits(params, IDS, config), theirs, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kinds", ["qkv", "qkvo", "all"])
def test_biases_of_a_gguf_llama(tmp_path, kinds):
    """Tensors as llama.cpp's converter writes them: biases of q and k permuted like the rows."""
    model = make("llama-biases", "default", "gqa", tied=False)
    with torch.no_grad():
        for name, values in model.named_parameters():
            own = name.split(".")[-2].removesuffix("_proj")
            if name.endswith("bias") and kinds != "all" and own not in kinds:
                values.zero_()
    model.save_pretrained(tmp_path)
    config = {**json.loads((tmp_path / "config.json").read_text()), "rope_theta": 500.0}
    config = {**config, "head_dim": 8}
    tensors = {
        name: values
        for name, values in load_file(tmp_path / "model.safetensors").items()
        if not name.endswith("bias") or values.any()
    }
    path = write_gguf(tmp_path / "m.gguf", gguf_fields(config), gguf_tensors(config, tensors))
    read, params = read_gguf(path)
    assert read.biases == {"qkv": tuple("qkv"), "qkvo": tuple("qkvo")}.get(
        kinds, (*"qkvo", "gate", "up", "down")
    )
    ours, theirs = our_logits(params, IDS, read), torch_logits(model, IDS)
    np.testing.assert_allclose(ours, theirs, atol=1e-5, rtol=1e-5)


# --- mutation: every value matters ----------------------------------------------------------------


def rope(**changes: Any) -> Any:
    return lambda config: {"rope": dataclasses.replace(config.rope, **changes)}


def plain(**changes: Any) -> Any:
    return lambda config: changes


MUTATIONS = [
    ("llama", "default", rope(theta=510.0)),
    ("llama", "default", plain(norm_eps=1e-4)),
    ("llama", "default", plain(sliding_window=LENGTH - 1)),
    ("llama", "default", plain(num_kv_heads=4)),
    ("llama", "linear", rope(factor=2.6)),
    ("llama", "linear", rope(rope_type="default")),
    ("llama", "dynamic", rope(factor=2.1)),
    ("llama", "dynamic", rope(original_max_position=CONTEXT + 1)),
    ("llama", "dynamic", rope(rope_type="default")),
    ("llama", "yarn", rope(factor=4.1)),
    ("llama", "yarn", rope(attention_factor=1.0)),
    ("llama", "yarn-betas", rope(beta_fast=2.0)),
    ("llama", "yarn-betas", rope(beta_slow=0.4)),
    ("llama", "yarn-betas", rope(truncate=False)),
    ("llama", "yarn", rope(original_max_position=4 * CONTEXT)),
    ("llama", "llama3", rope(factor=8.1)),
    ("llama", "llama3", rope(low_freq_factor=0.5)),
    ("llama", "llama3", rope(high_freq_factor=5.0)),
    ("llama", "llama3", rope(original_max_position=CONTEXT + 1)),
    ("mistral-window", "default", plain(sliding_window=6)),
    ("mistral-window", "default", plain(sliding_window=None)),
    ("qwen2-mixed", "default", plain(sliding_layers=(False, False, True))),
    ("qwen2-mixed", "default", plain(sliding_layers=None)),
]


@pytest.mark.parametrize(("family", "kind", "change"), MUTATIONS)
def test_a_wrong_value_is_noticed(tmp_path, family, kind, change):
    """Break it on purpose: the bound of `test_logits_equal_pytorch` must not hold any more."""
    model = make(family, kind, "gqa", tied=False)
    model.save_pretrained(tmp_path)
    config, params = read_hf(tmp_path)
    wrong = dataclasses.replace(config, **change(config))
    if wrong.num_kv_heads != config.num_kv_heads:
        for name in "kv":
            kernel = params["layers"]["attn"][name]["kernel"]
            params["layers"]["attn"][name]["kernel"] = jnp.tile(kernel, (1, 1, 2))
    apart = np.abs(our_logits(params, IDS, wrong) - torch_logits(model, IDS))
    assert apart.max() > 1e-4


@pytest.mark.parametrize("name", ["q", "k", "v", "o", "gate", "up", "down"])
def test_a_missing_bias_is_noticed(tmp_path, name):
    model = make("llama-biases", "default", "gqa", tied=True)
    model.save_pretrained(tmp_path)
    config, params = read_hf(tmp_path)
    block = "attn" if name in "qkvo" else "ffn"
    bias = params["layers"][block][name]["bias"]
    params["layers"][block][name]["bias"] = jnp.zeros_like(bias)
    apart = np.abs(our_logits(params, IDS, config) - torch_logits(model, IDS))
    # Softmax does not see a bias of the keys but through the rotary embedding.
    assert apart.max() > 1e-4
    wrong = config_from_hf(
        {**json.loads((tmp_path / "config.json").read_text()), "mlp_bias": False}, where="x"
    )
    assert set(wrong.biases) == set("qkvo")


@pytest.mark.parametrize("change", [{"head_dim": 16}, {"tie_word_embeddings": True}])
def test_shapes_that_contradict_the_weights_are_refused(tmp_path, change):
    make("llama", "default", "gqa", tied=False).save_pretrained(tmp_path)
    where = tmp_path / "config.json"
    where.write_text(json.dumps({**json.loads(where.read_text()), **change}))
    with pytest.raises(SourceError, match=r"has shape|differs from it"):
        read_hf(tmp_path)
