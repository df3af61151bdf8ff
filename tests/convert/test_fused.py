"""Phi's fused tensors: read in parts, verified and described as any other; no adapter fits them."""

import functools

import chex
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from support.fixtures import transformers_tokenizer

import jaxneurons as jn
from jaxneurons import DataError, SourceError
from jaxneurons.checkpoints.certificate import verify
from jaxneurons.checkpoints.description import describe
from jaxneurons.convert import fill
from jaxneurons.convert.gguf import read_gguf
from jaxneurons.convert.hf import read_hf, stored_dtype
from jaxneurons.convert.rules import file_names, fused_tensors, stored_names
from jaxneurons.edit import LowRank, make_patch, write_adapter
from jaxneurons.model.sharding import PRESETS, make_mesh, param_shardings

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from support import gguf_families  # noqa: E402
from support.families import COMMON, variant  # noqa: E402

QKV = "model.layers.1.self_attn.qkv_proj.weight"


@functools.cache
def phi():
    tokenizer = transformers_tokenizer("bytes")
    changes = {"vocab_size": len(tokenizer), "original_max_position_embeddings": 96}
    changes |= {"max_position_embeddings": 96, "hidden_size": 64, "num_attention_heads": 4}
    assert changes.keys() - COMMON.keys() == {"original_max_position_embeddings"}
    return variant("phi", {"phi": ("Phi3", changes)}), tokenizer


@pytest.fixture
def directory(tmp_path):
    model, tokenizer = phi()
    model.save_pretrained(tmp_path / "phi")
    tokenizer.save_pretrained(tmp_path / "phi")
    return tmp_path / "phi"


def test_names_of_files_and_of_their_parts(directory):
    config, _ = read_hf(directory)
    names = file_names(config, "hf")
    assert set(names) == set(load_file(directory / "model.safetensors"))
    fused = fused_tensors(config, "hf")
    assert len(fused) == 6
    apart = {part for parts in fused.values() for part in parts}
    assert set(stored_names(config, "hf")) == (set(names) - set(fused)) | apart
    assert stored_dtype(directory) == np.float32


def fused_size(params):
    """Values in the kernels that files hold with others."""
    places = [("attn", name) for name in "qkv"] + [("ffn", name) for name in ("gate", "up")]
    return sum(params["layers"][block][name]["kernel"].size for block, name in places)


class OfFirstDevice(jax.sharding.NamedSharding):
    """What a process sees that has the first device of a mesh only."""

    def addressable_devices_indices_map(self, shape):
        indices = super().addressable_devices_indices_map(shape)
        first = self.mesh.devices.flat[0]
        return {first: indices[first]}


@pytest.mark.parametrize("source", ["hf", "gguf"])
def test_a_process_reads_its_own_rows_and_no_others(directory, tmp_path, monkeypatch, source):
    """Rows and columns of fused tensors that are read, and what comes of them."""
    read = functools.partial(read_hf, directory)
    if source == "gguf":
        read = functools.partial(read_gguf, gguf_families.write(tmp_path / "m.gguf", phi()[0]))
    config, whole = read()
    values_read, original = 0, fill._read_below

    def count(*args):
        nonlocal values_read
        found = original(*args)
        values_read += found.size
        return found

    monkeypatch.setattr(fill, "_read_below", count)
    monkeypatch.setattr(fill, "to_devices", lambda blocks, *_: jnp.asarray(blocks[0].host))
    shardings = param_shardings(config, make_mesh("1x2"), PRESETS["fsdp"])
    first = jax.tree.map(lambda s: OfFirstDevice(s.mesh, s.spec), shardings)
    _, parts = read(place=lambda _: first)

    def held(x, sharding):
        (index,) = sharding.addressable_devices_indices_map(x.shape).values()
        return np.asarray(x)[index]

    expected = jax.tree.map(held, whole, first)
    chex.assert_trees_all_equal(parts, expected)
    assert values_read == fused_size(expected) < fused_size(whole)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(QKV), r"1 tensors are missing: model\.layers\.1\.self_attn\.qkv_proj"),
        (
            lambda t: t.update({QKV: t[QKV][:-1]}),
            r"layers\.1\.self_attn\.qkv_proj\.weight has shape \(127, 64\), .* says \(128, 64\)",
        ),
        (
            lambda t: t.update({"model.layers.1.self_attn.q_proj.weight": t[QKV][:64]}),
            r"qkv_proj\.weight is stored twice|q_proj\.weight is stored twice",
        ),
        (lambda t: t[QKV].__setitem__((100, 3), np.inf), r"tensor .*qkv_proj\.weight holds NaN"),
    ],
)
def test_tensors_that_do_not_fit(directory, change, message):
    path = directory / "model.safetensors"
    tensors = {name: values.copy() for name, values in load_file(path).items()}
    change(tensors)
    save_file(tensors, path)
    with pytest.raises(SourceError, match=message):
        read_hf(directory)


def test_mixed_dtypes_come_back(directory, tmp_path):
    path = directory / "model.safetensors"
    tensors = load_file(path)
    narrow = tensors[QKV].astype(ml_dtypes.bfloat16)
    save_file({**tensors, QKV: narrow}, path)
    jn.save(jn.load(directory), tmp_path / "again", to="hf")
    again = load_file(tmp_path / "again" / "model.safetensors")
    assert again.keys() == tensors.keys()
    assert again[QKV].dtype == narrow.dtype
    np.testing.assert_array_equal(again[QKV], narrow)


def test_it_is_described_and_has_no_adapter(directory, tmp_path):
    assert describe(str(directory)).stored.keys() == {"float32"}
    lm = jn.load(directory)
    sizes = {"ffn.up": (64, 48), "ffn.down": (48, 64)}

    def patch(module):
        inputs, outputs = sizes[module]
        term = LowRank(module, 1, jnp.ones((inputs, 1)), jnp.ones((1, outputs)))
        return make_patch(lm, [term])

    write_adapter(lm, patch("ffn.down"), tmp_path / "down")
    with pytest.raises(DataError, match=r"up_proj\.weight in .*gate_up_proj\.weight, with others"):
        write_adapter(lm, patch("ffn.up"), tmp_path / "up")


@pytest.mark.slow
def test_it_is_verified(directory):
    assert verify(jn.load(directory), directory, long=40)["passed"]
