"""`convert`, `verify` and `inspect`, in-process, on a tiny model."""

import json
import shutil

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from support.checkpoints import (
    byte_level_vocabulary,
    gguf_fields,
    gguf_tensors,
    hf_tensors,
    tiny,
    write_gguf,
)
from support.fixtures import write_lm
from support.models import tiny_config

import jaxneurons
from jaxneurons import RopeConfig
from jaxneurons.checkpoints.certificate import long_enough, verify


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_lm(tmp_path_factory.mktemp("model") / "tiny")


def test_convert_there_and_back(run, model, tmp_path):
    native, back = tmp_path / "native", tmp_path / "back"
    code, out, _ = run("convert", model, native)
    assert code == 0
    assert f"Written: {native} (native, float32" in out.replace("\n", "")
    code, _, _ = run("convert", native, back, "--to", "hf")
    assert code == 0
    source, written = (load_file(path / "model.safetensors") for path in (model, back))
    assert set(source) == set(written)
    assert all((source[name] == written[name]).all() for name in source)
    code, _, _ = run("convert", native, tmp_path / "half", "--to", "hf", "--dtype", "bfloat16")
    assert code == 0
    assert jaxneurons.load(tmp_path / "half", dtype=None).params["embed"]["embedding"].dtype == (
        "bfloat16"
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--to", "onnx"], "unknown format 'onnx'; known: 'native', 'hf'"),
        (["--dtype", "float8"], "unknown dtype 'float8'"),
    ],
)
def test_options_that_are_refused(run, model, tmp_path, options, message):
    code, out, err = run("convert", model, tmp_path / "x", *options)
    assert (code, out) == (1, "")
    assert message in err
    assert len(err.splitlines()) == 1
    assert not (tmp_path / "x").exists()


def test_destination_and_source_are_checked_first(run, model, tmp_path):
    code, _, err = run("convert", "no-such-model", model)
    assert (code, len(err.splitlines())) == (1, 1)
    assert "exists already; remove it or give another destination" in err
    code, _, err = run("convert", tmp_path / "nothing", tmp_path / "x")
    assert code == 1
    assert "no such file or directory" in err


def test_inspect_reads_no_weight(run, model, tmp_path, monkeypatch):
    native = tmp_path / "native"
    run("convert", model, native)

    def fail(*_, **__):
        raise AssertionError("a weight was read")

    monkeypatch.setattr("jaxneurons.convert.fill._read", fail)
    for source, kind in ((model, "Hugging Face"), (native, "native")):
        code, out, err = run("inspect", source)
        assert (code, err) == (0, "")
        config = jaxneurons.convert.native.read_marker(native)[0]
        assert f"llama, {kind}" in out
        text = " ".join(out.split())
        assert f"layers {config.num_layers}" in text
        assert f"FFN neurons {config.num_layers * config.intermediate_size:,}" in text
        assert "float32" in text


def test_inspect_names_what_is_wrong(run, model, tmp_path):
    broken = tmp_path / "broken"
    broken.mkdir()
    values = json.loads((model / "config.json").read_text())
    (broken / "config.json").write_text(json.dumps({**values, "clever": 1}))
    code, out, err = run("inspect", broken)
    assert (code, out) == (1, "")
    assert "clever = 1: this key is not known" in err


@pytest.mark.parametrize("kind", ["gguf", "hf"])
def test_inspect_says_what_load_says_of_the_tensors(run, model, tmp_path, kind):
    """From the headers: what `load` refuses is not described as if it were fine."""
    if kind == "hf":
        path = tmp_path / "hf"
        shutil.copytree(model, path)
        tensors = load_file(path / "model.safetensors")
        del tensors["model.layers.1.mlp.up_proj.weight"]
        save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
        missing = "1 tensors are missing: model.layers.1.mlp.up_proj.weight"
    else:
        vocabulary = byte_level_vocabulary()
        config = tiny(vocab_size=len(vocabulary["tokenizer.ggml.tokens"]))
        fields = gguf_fields(config) | vocabulary
        tensors = gguf_tensors(config, hf_tensors(config))
        biased = {f"blk.{i}.attn_q.bias": np.ones(32, np.float32) for i in range(2)}
        good = write_gguf(tmp_path / "good.gguf", fields, tensors | biased)
        code, out, _ = run("inspect", good)
        assert (code, "biases q" in " ".join(out.split())) == (0, True)
        assert jaxneurons.load(good).config.biases == ("q",)
        odd = {"rope_factors_long.weight": np.ones(4, np.float32)}
        path = write_gguf(tmp_path / "bad.gguf", fields, tensors | odd)
        missing = "1 tensors have no place: rope_factors_long.weight"
    code, out, err = run("inspect", path)
    assert (code, out) == (1, "")
    assert missing in err
    with pytest.raises(jaxneurons.SourceError, match=missing):
        jaxneurons.load(path)


def test_inspect_of_a_sharded_model_whose_weights_are_not_here(run, model, tmp_path):
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((model / name).read_bytes())
    shards = {"model.norm.weight": "model-00001-of-00002.safetensors"}
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": shards}))
    code, out, err = run("inspect", tmp_path)
    assert (code, err) == (0, "")
    assert "not here" in out


@pytest.fixture
def converted(run, model, tmp_path):
    run("convert", model, tmp_path / "native")
    return tmp_path / "native"


def test_verify_writes_a_certificate(run, model, converted):
    pytest.importorskip("torch")
    code, out, err = run("verify", converted, "--against", model)
    assert (code, "error" in err) == (0, False), err
    assert "Passed" in out
    found = json.loads((converted / "certificate.json").read_text())
    assert found["passed"]
    assert found["continuations_equal"] == "4 of 4"
    assert found["logits_worst"]["largest"] < 1e-3
    assert found["source"]["sha256"] != found["result"]["sha256"]
    assert found["source"]["sha256"] == jaxneurons.load(model).hash
    assert {"logits", "gate", "up", "act", "down"} <= set(found["sequences"][0])
    assert {"torch", "transformers", "jax"} <= set(found["versions"])


def test_verify_in_bfloat16(run, model, tmp_path):
    pytest.importorskip("torch")
    run("convert", model, tmp_path / "half", "--dtype", "bfloat16")
    code, out, _ = run("verify", tmp_path / "half", "--against", model)
    assert code == 0
    assert "Computed in bfloat16 itself" in out
    found = json.loads((tmp_path / "half" / "certificate.json").read_text())
    assert found["sequences"][0]["own_arithmetic"]["mean"] > found["logits_worst"]["mean"]


def broken_weights(directory):
    path = directory / "model.safetensors"
    tensors = load_file(path)
    tensors["model.layers.0.mlp.up_proj.weight"] *= np.float32(1.01)
    save_file(tensors, path, metadata={"format": "pt"})


def broken_config(directory):
    path = directory / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "rms_norm_eps": 1e-3}))


@pytest.mark.parametrize("breaks", [broken_weights, broken_config])
def test_verify_notices_a_wrong_conversion(run, model, tmp_path, breaks):
    pytest.importorskip("torch")
    run("convert", model, tmp_path / "out", "--to", "hf")
    breaks(tmp_path / "out")
    code, out, err = run("verify", tmp_path / "out", "--against", model)
    assert code == 1
    assert "FAILED" in out
    assert "is not what PyTorch makes of" in err
    assert not json.loads((tmp_path / "out" / "certificate.json").read_text())["passed"]


def test_verify_against_something_else(run, converted):
    pytest.importorskip("torch")
    code, _, err = run("verify", converted, "--against", converted)
    assert code == 1
    assert "a native directory; give the checkpoint that it came from" in err


def rope(**values):
    return tiny_config(max_position=131072, rope=RopeConfig(**values))


@pytest.mark.parametrize(
    ("config", "length"),
    [
        (tiny_config(max_position=4096), 512),
        (tiny_config(max_position=128), 128),
        (rope(rope_type="llama3", factor=8.0, original_max_position=8192), 8256),
        (rope(rope_type="llama3", inv_freq_divisors=(1.0, 1.0, 2.0, 8.0)), 8256),
        (rope(rope_type="yarn", factor=4.0, original_max_position=32768), 32832),
        (rope(rope_type="linear", factor=32.0), 4160),
        (rope(rope_type="dynamic", factor=2.0, original_max_position=131072), 131136),
    ],
)
def test_the_long_sequence_ends_beyond_the_original_context(config, length):
    assert long_enough(config) == length


def test_very_long_sequences_are_compared_at_their_end(model):
    pytest.importorskip("torch")
    found = verify(jaxneurons.load(model), model, long=1100)
    assert found["passed"]
    assert found["sequences"][-1]["tokens"] == 1100
