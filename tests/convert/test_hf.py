"""Hugging Face directories -> parameters: every tensor accounted for, nothing executed."""

import json
import os
import pickle
import struct

import chex
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from support.checkpoints import assert_same, hf_tensors, tiny, write_hf

from jaxneurons.convert.config import config_from_hf
from jaxneurons.convert.fill import Stored, fill
from jaxneurons.convert.hf import read_hf, stored_dtype
from jaxneurons.convert.rules import permute, unpermute
from jaxneurons.errors import ConfigError, SourceError
from jaxneurons.model.parameters import param_shapes


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize(
    "changes",
    [{}, {"tie_word_embeddings": False}, {"num_key_value_heads": 1, "head_dim": 16}],
    ids=["tied", "untied", "mqa-wide-heads"],
)
def test_every_tensor_arrives_transposed_and_stacked(tmp_path, shards, changes):
    config = tiny(**changes)
    tensors = hf_tensors(config)
    parsed, params = read_hf(write_hf(tmp_path, config, tensors, shards))
    assert parsed == config_from_hf(config, where="x")
    assert_same(params, tensors)
    assert jax.tree.map(lambda x: x.shape, params) == param_shapes(parsed)
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(params))


def test_shapes_are_the_documented_ones():
    config = config_from_hf(tiny(tie_word_embeddings=False), where="x")
    assert param_shapes(config) == {
        "embed": {"embedding": (40, 32)},
        "layers": {
            "attn_norm": {"scale": (2, 32)},
            "attn": {
                "q": {"kernel": (2, 32, 32)},
                "k": {"kernel": (2, 32, 16)},
                "v": {"kernel": (2, 32, 16)},
                "o": {"kernel": (2, 32, 32)},
            },
            "ffn_norm": {"scale": (2, 32)},
            "ffn": {
                "gate": {"kernel": (2, 32, 64)},
                "up": {"kernel": (2, 32, 64)},
                "down": {"kernel": (2, 64, 32)},
            },
        },
        "final_norm": {"scale": (32,)},
        "unembed": {"kernel": (32, 40)},
    }


def test_one_file_may_mix_dtypes(tmp_path):
    tensors = hf_tensors(tiny())
    kinds = [np.float32, np.float16, ml_dtypes.bfloat16]
    mixed = {name: values.astype(kinds[n % 3]) for n, (name, values) in enumerate(tensors.items())}
    _, params = read_hf(write_hf(tmp_path, tiny(), mixed))
    assert_same(params, {name: values.astype(np.float32) for name, values in mixed.items()})


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_casts_to_the_dtype_asked_for(tmp_path, dtype):
    tensors = hf_tensors(tiny())
    _, params = read_hf(write_hf(tmp_path, tiny(), tensors), dtype=dtype)
    assert all(leaf.dtype == dtype for leaf in jax.tree.leaves(params))
    assert_same(params, {name: values.astype(dtype) for name, values in tensors.items()})


def test_dtypes_that_parameters_cannot_have(tmp_path):
    with pytest.raises(ConfigError, match="int32"):
        read_hf(write_hf(tmp_path, tiny(), hf_tensors(tiny())), dtype=jnp.int32)


def test_overflow_in_a_narrow_dtype_is_an_error(tmp_path):
    tensors = hf_tensors(tiny())
    tensors["model.norm.weight"][3] = 1e5
    write_hf(tmp_path, tiny(), tensors)
    with pytest.raises(SourceError, match=r"model.norm.weight does not fit into float16"):
        read_hf(tmp_path, dtype=jnp.float16)
    read_hf(tmp_path, dtype=jnp.bfloat16)


def test_large_tensors_are_read_in_pieces(tmp_path, monkeypatch):
    monkeypatch.setattr("jaxneurons.convert.blocks._CHUNK", 100)
    config = tiny(tie_word_embeddings=False)
    tensors = hf_tensors(config)
    _, params = read_hf(write_hf(tmp_path, config, tensors))
    assert_same(params, tensors)


def test_missing_tensors_are_listed(tmp_path):
    tensors = hf_tensors(tiny())
    gone = [name for name in tensors if ".mlp." in name]
    kept = {name: values for name, values in tensors.items() if name not in gone}
    write_hf(tmp_path, tiny(), kept)
    with pytest.raises(SourceError, match=r"6 tensors are missing: .*mlp.*, \.\.\.$"):
        read_hf(tmp_path)


def test_left_over_tensors_are_listed(tmp_path):
    tensors = hf_tensors(tiny())
    tensors["model.layers.0.self_attn.q_proj.bias"] = np.zeros(32, np.float32)
    write_hf(tmp_path, tiny(), tensors)
    with pytest.raises(SourceError, match=r"1 tensors have no place: .*q_proj.bias"):
        read_hf(tmp_path)


def test_a_layer_too_many_is_left_over(tmp_path):
    write_hf(tmp_path, tiny(), hf_tensors(tiny(num_hidden_layers=3)))
    with pytest.raises(SourceError, match=r"9 tensors have no place: model\.layers\.2"):
        read_hf(tmp_path)


def test_wrong_shape_names_tensor_and_both_shapes(tmp_path):
    tensors = hf_tensors(tiny())
    tensors["model.layers.1.mlp.up_proj.weight"] = np.zeros((32, 64), np.float32)
    write_hf(tmp_path, tiny(), tensors)
    with pytest.raises(SourceError, match=r"up_proj.weight has shape \(32, 64\).*\(64, 32\)"):
        read_hf(tmp_path)


def test_shape_is_checked_before_anything_is_read():
    def read(rows):
        raise AssertionError("read")

    config = config_from_hf(tiny(), where="x")
    stored = [Stored("a", (1,), read), Stored("model.norm.weight", (7,), read)]
    with pytest.raises(SourceError, match="has shape"):
        fill(config, stored, naming="hf", where="x")


def test_absurd_layer_counts_are_refused_at_once(tmp_path):
    write_hf(tmp_path, tiny(num_hidden_layers=10**12), hf_tensors(tiny()))
    with pytest.raises(ConfigError, match=r"num_hidden_layers = 1000000000000"):
        read_hf(tmp_path)
    write_hf(tmp_path, tiny(num_hidden_layers=10**5), hf_tensors(tiny()))
    with pytest.raises(SourceError, match=r"100000 layers, but there are only 20 tensors"):
        read_hf(tmp_path)


def test_a_tensor_stored_twice_is_an_error():
    one = Stored("model.norm.weight", (32,), lambda rows: np.zeros(32, np.float32)[rows])
    with pytest.raises(SourceError, match="stored twice"):
        fill(config_from_hf(tiny(), where="x"), [one, one], naming="hf", where="x")


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_weights_that_are_not_finite_are_named(tmp_path, bad):
    tensors = hf_tensors(tiny())
    tensors["model.layers.1.self_attn.v_proj.weight"][3, 4] = bad
    write_hf(tmp_path, tiny(), tensors)
    with pytest.raises(SourceError, match=r"layers\.1\.self_attn\.v_proj\.weight holds NaN"):
        read_hf(tmp_path)


def test_integer_weights_are_refused(tmp_path):
    tensors = hf_tensors(tiny())
    tensors["model.norm.weight"] = np.ones(32, np.int8)
    write_hf(tmp_path, tiny(), tensors)
    with pytest.raises(SourceError, match=r"model.norm.weight has dtype int8"):
        read_hf(tmp_path)


def test_redundant_unembedding_of_a_tied_model(tmp_path):
    tensors = hf_tensors(tiny())
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].copy()
    write_hf(tmp_path, tiny(), tensors)
    _, params = read_hf(tmp_path)
    assert "unembed" not in params
    tensors["lm_head.weight"][1, 1] += 1
    write_hf(tmp_path, tiny(), tensors)
    with pytest.raises(SourceError, match=r"ties the unembedding.*lm_head.weight differs"):
        read_hf(tmp_path)


def test_a_tied_model_that_stores_only_its_unembedding(tmp_path):
    tensors = hf_tensors(tiny())
    stored = dict(tensors)
    stored["lm_head.weight"] = stored.pop("model.embed_tokens.weight")
    for directory, shards in ((tmp_path / "one", 1), (tmp_path / "two", 2)):
        write_hf(directory, tiny(), stored, shards=shards)
        _, params = read_hf(directory)
        assert_same(params, tensors)
        assert stored_dtype(directory) == np.float32
    stored["lm_head.weight"] = np.ones((41, 32), np.float32)
    write_hf(tmp_path / "one", tiny(), stored)
    with pytest.raises(SourceError, match=r"lm_head.weight has shape \(41, 32\)"):
        read_hf(tmp_path / "one")
    untied = {**tiny(), "tie_word_embeddings": False}
    write_hf(tmp_path / "one", untied, {**stored, "lm_head.weight": np.ones((40, 32), np.float32)})
    with pytest.raises(SourceError, match=r"missing: model\.embed_tokens"):
        read_hf(tmp_path / "one")


@pytest.mark.parametrize("listed", [True, False])
@pytest.mark.parametrize("there", [True, False])
def test_an_index_that_lists_rotary_tables(tmp_path, listed, there):
    tensors = hf_tensors(tiny())
    write_hf(tmp_path, tiny(), tensors, shards=2)
    name, shard = "model.layers.0.self_attn.rotary_emb.inv_freq", "model-00002-of-00002.safetensors"
    where = tmp_path / "model.safetensors.index.json"
    index = json.loads(where.read_text())
    if listed:
        index["weight_map"][name] = shard
        # and a file of nothing else, which nobody kept
        index["weight_map"][name.replace("0", "1")] = "model-00003-of-00003.safetensors"
    if there:
        own = load_file(tmp_path / shard)
        save_file({**own, name: np.ones(4, np.float32)}, tmp_path / shard)
    where.write_text(json.dumps(index))
    _, params = read_hf(tmp_path)
    assert_same(params, tensors)


def test_an_index_that_lists_both_embeddings_of_a_tied_model(tmp_path):
    write_hf(tmp_path, tiny(), hf_tensors(tiny()), shards=2)
    where = tmp_path / "model.safetensors.index.json"
    index = json.loads(where.read_text())
    index["weight_map"]["lm_head.weight"] = "model-00001-of-00002.safetensors"
    where.write_text(json.dumps(index))
    assert "unembed" not in read_hf(tmp_path)[1]
    (tmp_path / "config.json").write_text(json.dumps({**tiny(), "tie_word_embeddings": False}))
    with pytest.raises(SourceError, match=r"1 tensors are missing: lm_head\.weight"):
        read_hf(tmp_path)


def test_rotary_tables_are_dropped(tmp_path):
    tensors = hf_tensors(tiny())
    _, expected = read_hf(write_hf(tmp_path / "without", tiny(), tensors))
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(4, np.float32)
    _, params = read_hf(write_hf(tmp_path / "with", tiny(), tensors))
    chex.assert_trees_all_equal(params, expected)


def test_consolidated_duplicates_are_not_read(tmp_path):
    write_hf(tmp_path, tiny(), hf_tensors(tiny()), shards=2)
    _, expected = read_hf(tmp_path)
    (tmp_path / "consolidated.safetensors").write_bytes(b"garbage")
    _, params = read_hf(tmp_path)
    chex.assert_trees_all_equal(params, expected)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_links_out_of_the_directory_are_refused(tmp_path, name):
    write_hf(tmp_path / "mine", tiny(), hf_tensors(tiny()))
    outside = tmp_path / "outside" / name
    outside.parent.mkdir()
    (tmp_path / "mine" / name).rename(outside)
    os.symlink(outside, tmp_path / "mine" / name)
    with pytest.raises(SourceError, match=rf"{name}: a link out of the directory"):
        read_hf(tmp_path / "mine")
    inside = tmp_path / "mine" / "own"
    inside.mkdir()
    outside.rename(inside / name)
    (tmp_path / "mine" / name).unlink()
    os.symlink(inside / name, tmp_path / "mine" / name)
    os.symlink(tmp_path / "mine", tmp_path / "alias")
    for directory in ("mine", "alias"):
        read_hf(tmp_path / directory)


@pytest.mark.parametrize("linked", [None, "blobs", "snapshots", "."])
def test_the_hubs_cache_is_made_of_links(tmp_path, linked):
    """The hub's cache: snapshots/x/model.safetensors -> ../../blobs/...; folders may be links."""
    cache = tmp_path / "models--org--name"
    blobs, snapshot = cache / "blobs", cache / "snapshots" / "x"
    write_hf(blobs, tiny(), hf_tensors(tiny()), shards=2)
    snapshot.mkdir(parents=True)
    for n, path in enumerate(sorted(blobs.iterdir())):
        path.rename(blobs / f"blob{n}")
        relative = f"../../blobs/blob{n}"
        os.symlink(blobs / f"blob{n}" if linked == "snapshots" else relative, snapshot / path.name)
    if linked is not None:
        folder = (cache / linked).resolve()
        elsewhere = tmp_path / "larger disk" / f"{folder.name} moved"
        elsewhere.parent.mkdir()
        folder.rename(elsewhere)
        os.symlink(elsewhere, folder)
    _, params = read_hf(snapshot)
    assert_same(params, hf_tensors(tiny()))


def test_the_hubs_cache_does_not_lead_out_of_itself(tmp_path):
    write_hf(tmp_path / "outside", tiny(), hf_tensors(tiny()))
    snapshot = tmp_path / "cache" / "snapshots" / "x"
    snapshot.mkdir(parents=True)
    (tmp_path / "cache" / "blobs").mkdir()
    for name in ("config.json", "model.safetensors"):
        os.symlink(tmp_path / "outside" / name, tmp_path / "cache" / "blobs" / name)
        os.symlink(f"../../blobs/{name}", snapshot / name)
    with pytest.raises(SourceError, match="a link out of the directory"):
        read_hf(snapshot)


@pytest.mark.parametrize(
    "name",
    ["../model.safetensors", "/etc/x.safetensors", "a/../../x.safetensors", "..\\x.safetensors",
     "x" * 300 + ".safetensors", "C:\\x.safetensors", "C:x.safetensors", "model.bin", "", 3],
)  # fmt: skip
def test_index_cannot_leave_the_directory(tmp_path, name):
    write_hf(tmp_path / "sub", tiny(), hf_tensors(tiny()), shards=2)
    save_file(hf_tensors(tiny()), tmp_path / "model.safetensors")
    index = tmp_path / "sub" / "model.safetensors.index.json"
    values = json.loads(index.read_text())
    values["weight_map"]["model.norm.weight"] = name
    index.write_text(json.dumps(values))
    with pytest.raises(SourceError, match=r"model.norm.weight: .* is not a file in the directory"):
        read_hf(tmp_path / "sub")


def test_index_and_shards_must_agree(tmp_path):
    write_hf(tmp_path, tiny(), hf_tensors(tiny()), shards=2)
    index = tmp_path / "model.safetensors.index.json"
    values = json.loads(index.read_text())
    shard = values["weight_map"].pop("model.norm.weight")
    index.write_text(json.dumps(values))
    with pytest.raises(SourceError, match=r"model.norm.weight is in .* but not in"):
        read_hf(tmp_path)
    (tmp_path / shard).unlink()
    with pytest.raises(SourceError, match=r"no such file, but model\..*json lists"):
        read_hf(tmp_path)


@pytest.mark.parametrize("text", ["{", "[]", "", '{"weight_map": []}', "{}", "\ud800"])
def test_malformed_index(tmp_path, text):
    write_hf(tmp_path, tiny(), hf_tensors(tiny()), shards=2)
    (tmp_path / "model.safetensors.index.json").write_bytes(text.encode("utf-8", "surrogatepass"))
    with pytest.raises(SourceError, match=r"index\.json"):
        read_hf(tmp_path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{\n"a": ', r"config\.json:2: not valid JSON"),
        ("[1]", "a JSON object is needed"),
        ('{"vocab_size": ' + "1" * 5000 + "}", "not valid JSON"),
    ],
)
def test_malformed_config(tmp_path, text, message):
    write_hf(tmp_path, tiny(), hf_tensors(tiny()))
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(SourceError, match=message):
        read_hf(tmp_path)


def test_unknown_config_key_is_named_with_its_file(tmp_path):
    write_hf(tmp_path, tiny(clever_new_trick=1), hf_tensors(tiny()))
    with pytest.raises(ConfigError, match=r"config\.json: clever_new_trick = 1"):
        read_hf(tmp_path)


class Bomb:
    def __reduce__(self):
        return (pytest.fail, ("unpickled",))


@pytest.mark.parametrize("name", ["pytorch_model.bin", "consolidated.00.pth"])
def test_pickled_weights_are_refused_unread(tmp_path, name):
    write_hf(tmp_path, tiny(), hf_tensors(tiny()))
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / name).write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(SourceError, match=r"pickled.*run code.*safe_serialization=True"):
        read_hf(tmp_path)


def test_no_weights_or_no_config(tmp_path):
    with pytest.raises(SourceError, match=r"no config\.json"):
        read_hf(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(tiny()))
    with pytest.raises(SourceError, match=r"neither model\.safetensors nor"):
        read_hf(tmp_path)
    (tmp_path / "m.gguf").write_bytes(b"GGUF")
    with pytest.raises(SourceError, match=r"to load m\.gguf give the path"):
        read_hf(tmp_path)


def test_truncated_or_garbled_weights_name_the_file_in_one_line(tmp_path):
    path = write_hf(tmp_path, tiny(), hf_tensors(tiny())) / "model.safetensors"
    whole = path.read_bytes()
    header = struct.unpack("<Q", whole[:8])[0]
    for bad in (b"", whole[:4], whole[: 8 + header // 2], whole[:-5], b"\xff" * 64, whole + b"x"):
        path.write_bytes(bad)
        with pytest.raises(SourceError, match=r"model\.safetensors: damaged or truncated") as e:
            read_hf(tmp_path)
        assert "\n" not in str(e.value)


@pytest.mark.parametrize("heads", [1, 2, 3])
def test_permutation_is_a_bijection_with_its_inverse(heads):
    rows = np.arange(heads * 8 * 5, dtype=np.float32).reshape(heads * 8, 5)
    np.testing.assert_array_equal(unpermute(permute(rows, heads), heads), rows)
    np.testing.assert_array_equal(permute(rows, heads)[:4, 0], [0, 20, 5, 25])


@pytest.mark.parametrize("family", ["Llama", "Mistral"])
def test_equals_what_transformers_saves(tmp_path, family):
    torch = pytest.importorskip("torch")
    import transformers

    values = {k: v for k, v in tiny(tie_word_embeddings=False).items() if k != "model_type"}
    del values["rope_theta"]
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**values)
    model = getattr(transformers, f"{family}ForCausalLM")(config)
    model.save_pretrained(tmp_path)
    parsed, params = read_hf(tmp_path)
    assert parsed.family == family.lower()
    assert_same(params, {k: v.detach().numpy() for k, v in model.state_dict().items()})
