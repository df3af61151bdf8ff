"""Mixtures of experts from and to Hugging Face and GGUF files, and what is wrong with some."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from safetensors.numpy import load_file, save_file
from support.checkpoints import llama_cpp_permute, write_gguf
from support.fixtures import transformers_tokenizer

import jaxneurons as jn
from jaxneurons import ConfigError, SourceError
from jaxneurons.checkpoints.certificate import verify
from jaxneurons.checkpoints.description import describe
from jaxneurons.convert import export
from jaxneurons.convert.config import config_from_hf
from jaxneurons.convert.gguf import read_gguf
from jaxneurons.convert.hf import read_hf
from jaxneurons.convert.native import read_native, write_marker, write_params
from jaxneurons.model import make_mesh
from jaxneurons.model.parameters import list_parameters, parameter_tree, replace

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from support.experts import MODELS, config_of, make, params_of  # noqa: E402

WEIGHTS = "model.safetensors"


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    """Directories of the models as transformers writes them, with the models."""
    made = {}
    for name in MODELS:
        directory = tmp_path_factory.mktemp(name)
        model = make(name)
        model.save_pretrained(directory)
        made[name] = (model, directory)
    return made


def same(ours, theirs):
    jax.tree.map(np.testing.assert_array_equal, dict(ours), dict(theirs))


@pytest.mark.parametrize("name", MODELS)
def test_hugging_face_both_ways_and_native(tmp_path, stored, name):
    model, directory = stored[name]
    config, params = read_hf(directory)
    assert config == config_of(model)
    same(params, params_of(model))
    ours = tmp_path / "ours"
    ours.mkdir()
    export.write_hf(ours, params, config=config)
    names = load_file(directory / WEIGHTS)
    assert load_file(ours / WEIGHTS).keys() == names.keys()
    for key, values in load_file(ours / WEIGHTS).items():
        np.testing.assert_array_equal(values, names[key], err_msg=key)
    again = transformers.AutoModelForCausalLM.from_pretrained(ours)
    assert type(again) is type(model)
    for key, values in again.state_dict().items():
        assert torch.equal(values, model.state_dict()[key]), key
    native = tmp_path / "native"
    native.mkdir()
    write_params(native, params)
    write_marker(native, config=config, facts={"dtype": "float32", "stored_dtypes": {}})
    read, values = read_native(native)[:2]
    assert read == config
    same(values, params)


@pytest.mark.parametrize("name", ["mixtral", "qwen3-moe"])
def test_kernels_of_all_experts_in_one_tensor(tmp_path, stored, name):
    """As transformers 5 has them in memory, one expert's parts below the other's."""
    model, directory = stored[name]
    tensors = {k: values.contiguous().numpy() for k, values in model.state_dict().items()}
    save_file(tensors, tmp_path / WEIGHTS, metadata={"format": "pt"})
    (tmp_path / "config.json").write_bytes((directory / "config.json").read_bytes())
    same(read_hf(tmp_path)[1], params_of(model))
    key = "model.layers.1.mlp.experts.down_proj"
    save_file({**tensors, key: tensors[key][:-1]}, tmp_path / WEIGHTS)
    with pytest.raises(SourceError, match=rf"{key} has shape \(\d, 32, \d+\)"):
        read_hf(tmp_path)


def test_a_mesh_reads_its_parts(stored):
    model, directory = stored["qwen3-moe"]
    mesh = make_mesh("1x2")
    for axis in ("experts", "intermediate", "hidden"):

        def place(config, axis=axis):
            def sharding(parameter):
                names = ("model" if name == axis else None for name in parameter.axes)
                return NamedSharding(mesh, PartitionSpec(*names))

            return parameter_tree(config, sharding)

        params = read_hf(directory, place=place)[1]
        same(params, params_of(model))
        kernel = params["layers"]["ffn"]["up"]["kernel"]
        assert kernel.sharding.shard_shape(kernel.shape) != kernel.shape


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mixtral", "qwen3-moe"])
def test_it_is_described_and_verified(tmp_path, name):
    tokenizer = transformers_tokenizer("bytes")
    model = make(name, vocab_size=len(tokenizer))
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    told = describe(str(tmp_path))
    assert told.neurons["up"] == told.config.experts * told.config.intermediate_size
    assert told.parameters == model.num_parameters()
    lm = jn.load(tmp_path)
    assert f"{told.neurons['up']} FFN neurons each" in repr(lm)
    found = verify(lm, tmp_path, long=40)
    assert found["passed"]
    assert found["weights"]["differ"] == {}
    kernel = lm.params["layers"]["ffn"]["up"]["kernel"]
    changed = replace(lm.params, ("layers", "ffn", "up", "kernel"), kernel.at[1, 2, 0, 0].add(0.5))
    found = verify(dataclasses.replace(lm, params=changed), tmp_path, long=40)
    assert list(found["weights"]["differ"].values()) == [pytest.approx(0.5)]
    assert not found["passed"]


# --- GGUF -----------------------------------------------------------------------------------------

GGUF_NAMES = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate": "ffn_gate_inp",
    "self_attn.o_proj": "attn_output",
    **{f"self_attn.{n}_proj": f"attn_{n}" for n in "qkv"},
    **{f"self_attn.{n}_norm": f"attn_{n}_norm" for n in "qk"},
}


def gguf_fields(model):
    c = model.config
    qwen = c.model_type == "qwen3_moe"
    arch = "qwen3moe" if qwen else "llama"
    values = {
        "block_count": c.num_hidden_layers,
        "context_length": c.max_position_embeddings,
        "embedding_length": c.hidden_size,
        "feed_forward_length": c.intermediate_size,
        "attention.head_count": c.num_attention_heads,
        "attention.head_count_kv": c.num_key_value_heads,
        "attention.key_length": c.head_dim,
        "attention.value_length": c.head_dim,
        "attention.layer_norm_rms_epsilon": c.rms_norm_eps,
        "rope.freq_base": c.rope_parameters["rope_theta"],
        "expert_count": c.num_local_experts,
        "expert_used_count": c.num_experts_per_tok,
    }
    if qwen:
        values["expert_feed_forward_length"] = c.moe_intermediate_size
    return {"general.architecture": arch, **{f"{arch}.{k}": v for k, v in values.items()}}


def gguf_tensors(model, *, apart=False):
    """As llama.cpp's converter writes them; `apart`: each expert its own, as in early 2024."""
    c, tensors = model.config, {}
    heads = {"attn_q": c.num_attention_heads, "attn_k": c.num_key_value_heads}
    for key, tensor in model.state_dict().items():
        values, (*module, last) = tensor.numpy(), key.removeprefix("model.").split(".")
        if key == "lm_head.weight":
            tensors["output.weight"] = values
        elif module[0] != "layers":
            top = {"embed_tokens": "token_embd", "norm": "output_norm"}[module[0]]
            tensors[f"{top}.weight"] = values
        elif last.endswith("_proj"):
            block, half = f"blk.{module[1]}", values.shape[1] // 2
            parts = {"ffn_gate": values[:, :half], "ffn_up": values[:, half:]}
            for name, part in ({"ffn_down": values} if last == "down_proj" else parts).items():
                if apart:
                    tensors |= {f"{block}.{name}.{e}.weight": part[e] for e in range(len(part))}
                else:
                    tensors[f"{block}.{name}_exps.weight"] = np.ascontiguousarray(part)
        else:
            name = GGUF_NAMES[".".join(module[2:])]
            if c.model_type == "mixtral" and name in heads:
                values = llama_cpp_permute(values, heads[name])
            tensors[f"blk.{module[1]}.{name}.weight"] = values
    return tensors


@pytest.mark.parametrize("name", ["mixtral", "qwen3-moe"])
@pytest.mark.parametrize("apart", [False, True])
def test_gguf(tmp_path, stored, name, apart):
    model, _ = stored[name]
    tensors = gguf_tensors(model, apart=apart)
    path = write_gguf(tmp_path / "m.gguf", gguf_fields(model), tensors)
    config, params = read_gguf(path)
    assert config == config_of(model)
    same(params, params_of(model))
    key = "blk.1.ffn_up.2.weight" if apart else "blk.1.ffn_up_exps.weight"
    left = {k: v for k, v in tensors.items() if k != key}
    path = write_gguf(tmp_path / "less.gguf", gguf_fields(model), left)
    with pytest.raises(SourceError, match=r"missing: blk\.1\.ffn_up_exps\.weight"):
        read_gguf(path)
    both = {**gguf_tensors(model), "blk.1.ffn_up.2.weight": tensors["blk.1.ffn_norm.weight"]}
    both["blk.1.ffn_up.2.weight"] = gguf_tensors(model, apart=True)["blk.1.ffn_up.2.weight"]
    path = write_gguf(tmp_path / "twice.gguf", gguf_fields(model), both)
    with pytest.raises(SourceError, match=r"blk.1.ffn_up\S* is stored twice"):
        read_gguf(path)


def test_gguf_keys_that_say_something_else(tmp_path, stored):
    model, _ = stored["qwen3-moe"]
    for key, value, message in (
        ("expert_gating_func", 2, "only 1 is supported"),
        ("expert_weights_norm", False, "only True is supported"),
        ("expert_shared_count", 1, "only 0 is supported"),
        ("expert_used_count", 9, "experts_per_token"),
    ):
        fields = {**gguf_fields(model), f"qwen3moe.{key}": value}
        path = write_gguf(tmp_path / "m.gguf", fields, gguf_tensors(model))
        with pytest.raises(ConfigError, match=message):
            read_gguf(path)


# --- what is wrong --------------------------------------------------------------------------------


def test_experts_that_are_missing_doubled_or_of_another_size(tmp_path, stored):
    _, directory = stored["mixtral"]
    tensors = load_file(directory / WEIGHTS)
    (tmp_path / "config.json").write_bytes((directory / "config.json").read_bytes())
    key = "model.layers.1.block_sparse_moe.experts.2.w3.weight"
    another = key.replace("experts.2", "experts.4")
    fused = "model.layers.1.mlp.experts.down_proj"
    down = np.stack([tensors[key.replace("2.w3", f"{e}.w2")] for e in range(4)])
    for changed, message in (
        ({k: v for k, v in tensors.items() if k != key}, f"1 tensors are missing: {key}"),
        ({**tensors, another: tensors[key]}, f"1 tensors have no place: {another}"),
        ({**tensors, fused: down}, "is stored twice"),
        ({**tensors, key: tensors[key][:-1]}, f"{key} has shape"),
    ):
        save_file(changed, tmp_path / WEIGHTS)
        with pytest.raises(SourceError, match=message):
            read_hf(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"decoder_sparse_step": 2}, "here all layers of a model are alike"),
        ({"mlp_only_layers": [1]}, "here all layers of a model are alike"),
        ({"num_experts_per_tok": 9}, "experts_per_token must be from 1 to experts"),
        ({"num_experts": 0}, "a model of this type has experts"),
        ({"num_experts": 8, "num_local_experts": 4}, "contradicts num_local_experts"),
        ({"use_sliding_window": True, "max_window_layers": 2}, "to every layer all the same"),
        ({"shared_expert_intermediate_size": 12}, "shared_expert_intermediate_size"),
        ({"hidden_act": "gelu"}, "hidden_act"),
    ],
)
def test_configurations_that_are_refused(stored, change, message):
    _, directory = stored["qwen3-moe"]
    values = json.loads((directory / "config.json").read_text())
    if "num_experts" in change:
        values.pop("num_local_experts", None)
    with pytest.raises(ConfigError, match=message):
        config_from_hf({**values, **change}, where="config.json")


def test_what_is_absent_is_what_transformers_fills_in():
    for model_type in ("mixtral", "qwen3_moe"):
        config = config_from_hf({"model_type": model_type, "head_dim": 128}, where="x")
        name = {"mixtral": "Mixtral", "qwen3_moe": "Qwen3Moe"}[model_type]
        theirs = getattr(transformers, f"{name}Config")()
        assert (config.experts, config.experts_per_token) == (
            theirs.num_local_experts,
            theirs.num_experts_per_tok,
        )
        width = getattr(theirs, "moe_intermediate_size", theirs.intermediate_size)
        assert config.intermediate_size == width
        assert config.normalise_experts == getattr(theirs, "norm_topk_prob", True)
        assert len(list_parameters(config)) == 13 + 2 * (model_type == "qwen3_moe")
