"""Edited models in PyTorch: as an adapter that PEFT loads, and as an exported model."""

import dataclasses
import json

import jax.numpy as jnp
import numpy as np
import pytest
from support.checkpoints import hf_tensors, tiny, write_hf
from support.fixtures import room, transformers_tokenizer, write_lm

import jaxneurons as jn
from jaxneurons import DataError, NeuronSet, SourceError
from jaxneurons.checkpoints.description import describe
from jaxneurons.edit import LowRank, apply_patches, make_patch, write_adapter

IDS = np.random.default_rng(0).integers(0, 200, (2, 9))
SIZES = {"ffn.down": (64, 32), "attn.o": (32, 32), "ffn.up": (32, 64)}


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """Of smaller weights than other tests': float32 differs by less than 1e-4 then."""
    where = tmp_path_factory.mktemp("lm") / "model"
    tokenizer = transformers_tokenizer("bytes")
    config = tiny(vocab_size=len(tokenizer), num_hidden_layers=3)
    write_hf(where, config, {name: 0.3 * values for name, values in hf_tensors(config).items()})
    tokenizer.save_pretrained(where)
    return where


@pytest.fixture(scope="module")
def lm(directory):
    return jn.load(directory)


def term(layer, rank=1, seed=0, module="ffn.down"):
    rng = np.random.default_rng(seed)
    inputs, outputs = SIZES[module]
    left = rng.normal(size=(inputs, rank), scale=0.3).astype(np.float32)
    right = rng.normal(size=(rank, outputs), scale=0.3).astype(np.float32)
    return LowRank(module, layer, jnp.asarray(left), jnp.asarray(right))


def our_logits(lm):
    ids = jnp.asarray(IDS, jnp.int32)
    return np.asarray(jn.forward(lm.params, ids, config=lm.config, at="all").logits)


def torch_model(directory):
    torch = pytest.importorskip("torch")
    from transformers import AutoModelForCausalLM

    return torch, AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()


def torch_logits(torch, model):
    with torch.no_grad():
        return model(torch.tensor(IDS)).logits.numpy()


SETS = {
    "one term": [[term(1)]],
    "several layers and ranks": [[term(0, 2), term(1), term(2, 3, 1)]],
    "two patches of one kernel": [[term(1)], [term(1, 2, 1), term(2, 1, 2)]],
    "other modules in other layers": [[term(1), term(0, 1, 1, "attn.o"), term(2, 1, 2, "ffn.up")]],
    "two modules in each layer": [[term(1), term(1, 2, 1, "ffn.up")]],
}


@pytest.mark.parametrize("name", SETS)
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_peft_makes_of_base_and_adapter_what_we_make(lm, directory, tmp_path, name):
    peft = pytest.importorskip("peft")
    patches = [make_patch(lm, edit) for edit in SETS[name]]
    out = write_adapter(lm, patches, tmp_path / "adapter")
    torch, base = torch_model(directory)
    before = torch_logits(torch, base)
    theirs = torch_logits(torch, peft.PeftModel.from_pretrained(base, out).eval())
    ours = our_logits(apply_patches(lm, patches))
    np.testing.assert_allclose(theirs, ours, atol=1e-4)
    assert np.abs(before - ours).max() > 0.05
    np.testing.assert_allclose(before, our_logits(lm), atol=1e-4)


@pytest.mark.parametrize("name", ["one term", "neurons"])
def test_transformers_makes_of_an_export_what_we_make(lm, tmp_path, name):
    neurons = NeuronSet.of(up=[(0, 3), (1, 7)], q=[(2, 4)], act=[(0, 1)], down=[(2, 20)])
    patch = make_patch(lm, neurons if name == "neurons" else term(1), factor=0.0)
    edited = apply_patches(lm, patch)
    out = jn.save(edited, tmp_path / "out", to="hf")
    record = json.loads((out / "jaxneurons_patches.json").read_text())
    assert record == {"patches": [patch.summary()]}
    theirs = torch_logits(*torch_model(out))
    np.testing.assert_allclose(theirs, our_logits(edited), atol=1e-4)
    assert np.abs(theirs - our_logits(lm)).max() > 0.01
    again = jn.load(out)
    assert again.values_hash == edited.values_hash
    assert again.facts()["patches"] == [patch.summary()]


def test_native_directories_keep_the_record(lm, tmp_path):
    patch = make_patch(lm, term(1))
    edited = apply_patches(lm, patch)
    native = jn.load(jn.save(edited, tmp_path / "native"))
    assert native.facts()["patches"] == [patch.summary()]
    assert native.edited
    assert not native.changed
    assert describe(native.source).patches == (patch.summary(),)
    second = apply_patches(native, make_patch(native, term(2)))
    back = jn.load(jn.save(second, tmp_path / "hf", to="hf"))
    assert [record["digest"] for record in back.facts()["patches"]] == [
        patch.digest,
        second.patches[0].digest,
    ]
    # One that was never edited has no record.
    jn.save(lm, tmp_path / "plain", to="hf")
    assert not (tmp_path / "plain" / "jaxneurons_patches.json").exists()
    (tmp_path / "hf" / "jaxneurons_patches.json").write_text('{"patches": 3}')
    with pytest.raises(SourceError, match=r"jaxneurons_patches\.json: its patches are malformed"):
        jn.load(tmp_path / "hf")


def test_an_adapter_says_what_it_is_for(lm, tmp_path):
    from safetensors.numpy import load_file

    patch = make_patch(lm, [term(1), term(2, 3)])
    out = write_adapter(lm, patch, tmp_path / "adapter", base_model="me/model")
    config = json.loads((out / "adapter_config.json").read_text())
    assert (config["base_model_name_or_path"], config["revision"]) == ("me/model", None)
    assert config["target_modules"] == ["down_proj"]
    assert config["layers_to_transform"] == [1, 2]
    assert (config["r"], config["lora_alpha"]) == (3, 3)
    record = json.loads((out / "jaxneurons_patches.json").read_text())
    assert record["patches"] == [patch.summary()]
    of_hub = dataclasses.replace(lm, source="me/model@0123abcd")
    written = write_adapter(of_hub, patch, tmp_path / "hub") / "adapter_config.json"
    config = json.loads(written.read_text())
    assert (config["base_model_name_or_path"], config["revision"]) == ("me/model", "0123abcd")
    name = "base_model.model.model.layers.1.mlp.down_proj.lora_{}.weight"
    tensors = load_file(out / "adapter_model.safetensors")
    assert {t.dtype.name for t in tensors.values()} == {"float32"}
    assert tensors[name.format("A")].shape == (3, 64)
    assert tensors[name.format("B")].shape == (32, 3)
    np.testing.assert_array_equal(tensors[name.format("A")][1:], 0)


def test_what_is_no_adapter(lm, tmp_path):
    low = make_patch(lm, term(1))
    neurons = make_patch(lm, NeuronSet.of(up=[(0, 1)]))
    with pytest.raises(
        DataError, match=r"neurons that are multiplied.*export the edited model .*--to hf"
    ):
        write_adapter(lm, [low, neurons], tmp_path / "a")
    with pytest.raises(DataError, match=r"is edited in memory.*give the model as it was loaded"):
        write_adapter(apply_patches(lm, low), [low], tmp_path / "a")
    with pytest.raises(DataError, match="no patches"):
        write_adapter(lm, [], tmp_path / "a")
    other = jn.load(write_lm(tmp_path / "other", seed=1))
    with pytest.raises(DataError, match="load the model that it was made on"):
        write_adapter(other, low, tmp_path / "a")
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "x").write_text("")
    with pytest.raises(SourceError, match="exists already"):
        write_adapter(lm, low, tmp_path / "there")
    with room(300), pytest.raises(SourceError, match="cannot be written: File too large"):
        write_adapter(lm, low, tmp_path / "a")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["other", "there"]


def test_a_patch_is_small(tmp_path):
    """A rank-one edit of the lab's model: its file, under 2 % of the model's."""
    from jaxneurons.edit import read_patch, write_patch
    from jaxneurons.model.parameters import count_parameters

    lab = jn.load("lab")
    width, hidden = lab.config.intermediate_size, lab.config.hidden_size
    ones = jnp.ones
    edit = LowRank("ffn.down", 1, ones((width, 1)), ones((1, hidden)))
    write_patch(make_patch(lab, edit), path := tmp_path / "edit.safetensors")
    model = 4 * count_parameters(lab.config)
    assert path.stat().st_size < 0.02 * model
    assert read_patch(path).nbytes == 4 * (width + hidden)
