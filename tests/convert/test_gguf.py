"""GGUF files -> parameters: permutation, quantisation, and files that are not what they say."""

import struct

import chex
import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Kind
from support.checkpoints import assert_same, gguf_fields, gguf_tensors, hf_tensors, tiny, write_gguf

from jaxneurons.convert.config import config_from_hf
from jaxneurons.convert.gguf import open_gguf, read_gguf, read_tensor
from jaxneurons.convert.hf import read_hf
from jaxneurons.errors import ConfigError, SourceError


def write(tmp_path, config=None, fields=None, tensors=None, kinds=None):
    config = config or tiny()
    own = gguf_tensors(config, hf_tensors(config)) if tensors is None else tensors
    return write_gguf(tmp_path / "m.gguf", gguf_fields(config) | (fields or {}), own, kinds)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"tie_word_embeddings": False},
        {"num_key_value_heads": 4},
        {"num_key_value_heads": 1},
        {"model_type": "qwen2"},
        {"model_type": "qwen2", "tie_word_embeddings": False, "num_key_value_heads": 1},
    ],
    ids=["gqa", "untied", "mha", "mqa", "qwen2", "qwen2-mqa-untied"],
)
def test_same_parameters_as_from_hugging_face(tmp_path, changes):
    from support.checkpoints import write_hf

    config = tiny(**changes)
    theirs = read_hf(write_hf(tmp_path, config, hf_tensors(config)))
    mine = read_gguf(write(tmp_path, config))
    assert mine[0] == theirs[0]
    chex.assert_trees_all_equal(mine[1], theirs[1])


def test_query_and_key_rows_are_put_back(tmp_path):
    config = tiny()
    source = hf_tensors(config)
    stored = gguf_tensors(config, source)
    for name in ("q", "k"):
        hf = source[f"model.layers.0.self_attn.{name}_proj.weight"]
        assert not np.array_equal(stored[f"blk.0.attn_{name}.weight"], hf)
    _, params = read_gguf(write(tmp_path))
    for name in ("q", "k"):
        hf = source[f"model.layers.0.self_attn.{name}_proj.weight"]
        np.testing.assert_array_equal(params["layers"]["attn"][name]["kernel"][0], hf.T)


@pytest.mark.parametrize("kind", [Kind.Q8_0, Kind.Q4_0, Kind.Q4_1, Kind.Q5_1, Kind.BF16, Kind.F16])
def test_dequantises_as_the_gguf_package_does(tmp_path, kind):
    name = "blk.1.ffn_down.weight"
    path = write(tmp_path, kinds={name: kind})
    original = hf_tensors(tiny())["model.layers.1.mlp.down_proj.weight"]
    expected = gguf.quants.dequantize(gguf.quants.quantize(original, kind), kind)
    file = open_gguf(path)
    np.testing.assert_array_equal(read_tensor(file, name), expected)
    np.testing.assert_array_equal(read_tensor(file, name, slice(3, 7)), expected[3:7])
    some = read_tensor(file, name, slice(3, 7), slice(5, 40))  # across blocks of 32
    np.testing.assert_array_equal(some, expected[3:7, 5:40])
    _, params = read_gguf(file)
    np.testing.assert_array_equal(params["layers"]["ffn"]["down"]["kernel"][1], expected.T)


@pytest.mark.parametrize("kind", [Kind.Q4_K, Kind.Q5_K, Kind.Q6_K, Kind.Q5_0])
def test_dequantises_what_the_gguf_package_cannot_quantise(tmp_path, kind):
    block, nbytes = gguf.constants.GGML_QUANT_SIZES[kind]
    rng = np.random.default_rng(0)
    raw = rng.integers(0, 256, (6, 512 // block * nbytes), dtype=np.uint8)
    writer = gguf.GGUFWriter(tmp_path / "k.gguf", arch="llama")
    writer.add_tensor("x", raw, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with np.errstate(all="ignore"):  # random scales: some are infinite
        expected = gguf.quants.dequantize(raw, kind)
        file = open_gguf(tmp_path / "k.gguf")
        assert file.tensors["x"].shape == (6, 512)
        np.testing.assert_array_equal(read_tensor(file, "x"), expected)
        np.testing.assert_array_equal(read_tensor(file, "x", slice(2, 5)), expected[2:5])
        some = read_tensor(file, "x", slice(2, 5), slice(100, 300))
        np.testing.assert_array_equal(some, expected[2:5, 100:300])


@pytest.mark.parametrize("architecture", ["llama", "qwen2"])
@pytest.mark.parametrize("tied", [True, False])
def test_logits_equal_pytorchs_reading_of_the_same_file(tmp_path, architecture, tied):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    from jaxneurons import forward

    config = tiny(model_type=architecture, tie_word_embeddings=tied)
    small = {name: 0.2 * values for name, values in hf_tensors(config).items()}
    path = write(tmp_path, config, tensors=gguf_tensors(config, small))
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=path.name).eval()
    ids = np.random.default_rng(0).integers(0, 40, (1, 30)).astype(np.int32)
    with torch.no_grad():
        theirs = model(torch.tensor(ids)).logits.numpy()
    own, params = read_gguf(path)
    ours = forward(params, jnp.asarray(ids), config=own, at="all").logits
    np.testing.assert_allclose(ours, theirs, atol=1e-5, rtol=1e-4)


def test_yarn_means_what_config_json_means_by_it(tmp_path):
    values = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
    fields = {
        "llama.rope.scaling.type": "yarn",
        "llama.rope.scaling.factor": 4.0,
        "llama.rope.scaling.original_context_length": 32,
    }
    config, _ = read_gguf(write(tmp_path, fields=fields))
    assert config == config_from_hf(tiny(rope_scaling=values), where="x")


def test_header_equals_the_gguf_packages_reading(tmp_path):
    fields = {"general.name": "é", "x.list": [1, 2, 3], "x.words": ["a", "bc", ""], "x.yes": True}
    path = write(tmp_path, fields=fields)
    reader = gguf.GGUFReader(path)
    file = open_gguf(path)
    theirs = {k: f.contents() for k, f in reader.fields.items() if not k.startswith("GGUF.")}
    assert file.metadata == theirs
    assert {t.name: t.data_offset for t in reader.tensors} == {
        name: t.offset for name, t in file.tensors.items()
    }


def test_rope_freqs_become_divisors(tmp_path):
    tensors = gguf_tensors(tiny(), hf_tensors(tiny()))
    tensors["rope_freqs.weight"] = np.array([1, 1, 2.5, 8], np.float32)
    config, _ = read_gguf(write(tmp_path, tensors=tensors))
    assert config.rope.inv_freq_divisors == (1.0, 1.0, 2.5, 8.0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("blk.1.ffn_up.weight"), r"1 tensors are missing: blk\.1\.ffn_up\.weight"),
        (
            lambda t: t.update({"blk.0.attn_q.bias": np.zeros(32, np.float32)}),
            r"1 tensors are missing: blk\.1\.attn_q\.bias",
        ),
        (
            lambda t: t.update({"blk.1.attn_q.bias": np.zeros(32, np.float32)}),
            r"no place: blk\.1\.attn_q\.bias",
        ),
        (
            lambda t: t.update({"output_norm.weight": np.zeros(31, np.float32)}),
            r"output_norm.weight has shape \(31,\)",
        ),
        (
            lambda t: t["blk.0.ffn_up.weight"].__setitem__((1, 1), np.nan),
            r"blk\.0\.ffn_up\.weight holds NaN",
        ),
    ],
)
def test_tensors_that_do_not_fit(tmp_path, change, message):
    tensors = gguf_tensors(tiny(), hf_tensors(tiny()))
    change(tensors)
    with pytest.raises(SourceError, match=message):
        read_gguf(write(tmp_path, tensors=tensors))


def test_another_architecture_is_refused(tmp_path):
    fields = {"general.architecture": "falcon"}
    with pytest.raises(SourceError, match=r"m\.gguf: GGUF architecture 'falcon' is not supported"):
        read_gguf(write(tmp_path, fields=fields))


def test_unknown_key_is_named_with_its_file(tmp_path):
    with pytest.raises(ConfigError, match=r"m\.gguf: llama\.new_trick = 1"):
        read_gguf(write(tmp_path, fields={"llama.new_trick": 1}))


def test_files_that_are_not_gguf(tmp_path):
    path = tmp_path / "m.gguf"
    with pytest.raises(SourceError, match="No such file"):
        read_gguf(path)
    with pytest.raises(SourceError, match="cannot be read"):
        read_gguf(tmp_path)
    for bad in (b"", b"GG", b"PK\x03\x04 a zip"):
        path.write_bytes(bad)
        with pytest.raises(SourceError, match="not a GGUF file"):
            read_gguf(path)


def test_truncation_anywhere_is_one_clear_error(tmp_path):
    path = write(tmp_path, fields={"x.words": ["a", "bc"], "x.list": [1, 2, 3]})
    whole = path.read_bytes()
    cut = tmp_path / "cut.gguf"
    for length in [*range(4, 2500, 13), len(whole) // 2, len(whole) - 33]:
        cut.write_bytes(whole[:length])
        with pytest.raises(SourceError, match=r"cut\.gguf: truncated GGUF"):
            read_gguf(cut)


def test_garbled_headers_never_escape_as_other_errors(tmp_path):
    whole = bytearray(write(tmp_path).read_bytes())
    bad = tmp_path / "bad.gguf"
    rng = np.random.default_rng(0)
    messages = []
    for _ in range(150):
        garbled = bytearray(whole)
        for at in rng.integers(4, 1800, size=3):
            garbled[at] = rng.integers(256)
        bad.write_bytes(garbled)
        try:
            read_gguf(bad)
        except (SourceError, ConfigError) as error:
            messages.append(str(error))
    assert len(messages) > 75
    assert all("bad.gguf" in message for message in messages)


@pytest.mark.parametrize(("version", "message"), [(1, "version 1"), (3 << 24, "big-endian")])
def test_other_versions_are_refused(tmp_path, version, message):
    path = write(tmp_path)
    whole = bytearray(path.read_bytes())
    whole[4:8] = struct.pack("<I", version)
    path.write_bytes(whole)
    with pytest.raises(SourceError, match=message):
        read_gguf(path)


@pytest.mark.smollm2
def test_smollm2_config(smollm2_path):
    config, params = read_gguf(smollm2_path)
    assert (config.num_layers, config.hidden_size, config.intermediate_size) == (30, 576, 1536)
    assert (config.num_heads, config.num_kv_heads, config.head_dim) == (9, 3, 64)
    assert (config.vocab_size, config.max_position, config.tied) == (49152, 8192, True)
    assert (config.norm_eps, config.rope.theta) == (1e-5, 100000.0)
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == 134_515_008


@pytest.mark.slow
@pytest.mark.smollm2
@pytest.mark.filterwarnings("ignore")  # transformers' and torch's own
def test_every_smollm2_tensor_equals_transformers_reading(smollm2_path):
    torch = pytest.importorskip("torch")
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        smollm2_path.parent, gguf_file=smollm2_path.name, dtype=torch.float32
    )
    theirs = {name: values.numpy() for name, values in model.state_dict().items()}
    theirs.pop("lm_head.weight")  # tied
    _, params = read_gguf(smollm2_path)
    assert_same(params, theirs, layers=30)
