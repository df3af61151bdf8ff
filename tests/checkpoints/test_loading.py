"""load(): every kind of source, and what it says when it cannot."""

import hashlib
import importlib
import json
import warnings

import chex
import jax
import jax.numpy as jnp
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

from jaxneurons.checkpoints.fetch import TOKENIZER_FILES
from jaxneurons.checkpoints.loading import load
from jaxneurons.errors import ConfigError, SourceError
from jaxneurons.model.sharding import PRESETS, make_mesh

loading = importlib.import_module(
    "jaxneurons.checkpoints.loading"
)  # `jaxneurons.load` is the function

VOCABULARY = byte_level_vocabulary()
CONFIG = tiny(vocab_size=len(VOCABULARY["tokenizer.ggml.tokens"]))


def test_directory_and_file_give_the_same_model(gguf_file, hf_directory):
    one, two = load(gguf_file), load(str(hf_directory))
    assert one.config == two.config
    chex.assert_trees_all_equal(one.params, two.params)
    text = "hello  12<|end|>"
    assert one.tokenizer(text)["input_ids"] == two.tokenizer(text)["input_ids"]
    assert one.source == str(gguf_file)
    assert load(gguf_file, dtype=jnp.bfloat16).params["final_norm"]["scale"].dtype == jnp.bfloat16


def test_hashes(gguf_file, hf_directory):
    one = load(gguf_file)
    assert one.hash == hashlib.sha256(gguf_file.read_bytes()).hexdigest()
    assert len(one.tokenizer_hash) == 64
    two = load(hf_directory)
    assert two.hash != one.hash
    assert two.hash == load(hf_directory).hash
    changed = hf_directory / "tokenizer_config.json"
    values = json.loads(changed.read_text())
    before = two.tokenizer_hash
    changed.write_text(json.dumps(values | {"model_max_length": 77}))
    assert load(hf_directory).tokenizer_hash != before


def test_a_hash_of_other_weights_than_were_loaded_is_never_given(gguf_file):
    lm = load(gguf_file)
    gguf_file.write_bytes(gguf_file.read_bytes() + b"x")
    with pytest.raises(SourceError, match="changed since the model was loaded"):
        _ = lm.hash


def test_tokenizer_must_be_there_and_fit(hf_directory, tmp_path):
    for name in TOKENIZER_FILES:
        (hf_directory / name).unlink(missing_ok=True)
    with pytest.raises(SourceError, match=r"no tokenizer \(tokenizer\.json"):
        load(hf_directory)
    (hf_directory / "tokenizer.json").write_text("{")
    with pytest.raises(SourceError, match=r"tokenizer\.json:1: not valid JSON"):
        load(hf_directory)
    fields = gguf_fields(CONFIG) | VOCABULARY
    del fields["tokenizer.ggml.model"]
    tensors = gguf_tensors(CONFIG, hf_tensors(CONFIG))
    with pytest.raises(SourceError, match="tokenizer model None"):
        load(write_gguf(tmp_path / "bare.gguf", fields, tensors))


def test_the_tokenizer_is_read_before_the_weights(gguf_file, hf_directory, tmp_path, monkeypatch):
    """A refusal costs a second, not the minutes that weights take; the configuration is first."""

    def never(*_, **__):
        raise AssertionError("weights were read")

    for name in ("read_gguf", "read_hf", "read_native"):
        monkeypatch.setattr(loading, name, never)
    (hf_directory / "tokenizer.json").write_text('{"model": {"type": "NoSuch"}}')
    with pytest.raises(SourceError, match="or written by a newer release"):
        load(hf_directory)
    (hf_directory / "config.json").unlink()
    with pytest.raises(SourceError, match=r"no config\.json"):
        load(hf_directory)
    fields = gguf_fields(CONFIG) | VOCABULARY | {"tokenizer.ggml.pre": "viking"}
    tensors = gguf_tensors(CONFIG, hf_tensors(CONFIG))
    with pytest.raises(SourceError, match="pre-tokenizer 'viking'"):
        load(write_gguf(tmp_path / "other.gguf", fields, tensors))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, np.float16])
def test_the_dtype_of_a_model_is_a_dtype_and_files_say_its_name(gguf_file, dtype):
    lm = load(gguf_file, dtype=dtype)
    assert lm.dtype == jnp.dtype(dtype)
    assert jnp.zeros(2, dtype=lm.dtype).dtype == lm.params["final_norm"]["scale"].dtype
    assert load(gguf_file, dtype=lm.dtype).dtype == lm.dtype
    name = np.dtype(dtype).name
    assert json.loads(json.dumps(lm.facts()))["dtype"] == lm.identity()["dtype"] == name


def test_a_mesh_and_its_rules_in_words(hf_directory):
    whole = load(hf_directory)
    for mesh, rules, spec in (
        ("1x2", "tensor", (None, None, "model")),
        ((2, 1), "fsdp", (None, ("data", "model"), None)),
        (make_mesh("1x2"), PRESETS["fsdp-tensor"], (None, "data", "model")),
    ):
        with warnings.catch_warnings():  # 263 tokens do not divide
            warnings.simplefilter("ignore")
            lm = load(hf_directory, mesh=mesh, rules=rules)
        assert tuple(lm.params["layers"]["ffn"]["up"]["kernel"].sharding.spec) == spec
        chex.assert_trees_all_equal(lm.params, whole.params)
        assert lm.hash == whole.hash
    with pytest.warns(UserWarning, match=r"vocab \(\d+\) cannot be divided over 2 devices") as said:
        load(hf_directory, mesh="1x2")
    assert len(said) == 1


def test_meshes_that_cannot_be(hf_directory):
    with pytest.raises(ConfigError, match=r"4x4 needs 16 devices, but there are 8 devices"):
        load(hf_directory, mesh="4x4")
    with pytest.raises(ConfigError, match=r"written DATAxMODEL"):
        load(hf_directory, mesh="2,1")
    with pytest.raises(ConfigError, match=r"unknown sharding 'tensr'; did you mean 'tensor'"):
        load(hf_directory, mesh="2x1", rules="tensr")
    with pytest.raises(ConfigError, match=r"rule batch='data': the mesh has no axis"):
        load(hf_directory, mesh=jax.make_mesh((2,), ("model",)))
