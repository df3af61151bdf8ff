"""Tiny random checkpoints, written by hand: names, shapes and permutation as published."""

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from safetensors.numpy import save_file

TINY: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 40,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "hidden_act": "silu",
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
}

GGUF_NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


def tiny(**changes: Any) -> dict[str, Any]:
    return {**TINY, **changes}


def hf_tensors(config: dict[str, Any], seed: int = 0) -> dict[str, np.ndarray]:
    """Random weights under Hugging Face names, [out, in]."""
    rng = np.random.default_rng(seed)
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    query = config["num_attention_heads"] * config["head_dim"]
    kv = config["num_key_value_heads"] * config["head_dim"]
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (config["vocab_size"], hidden),
        "model.norm.weight": (hidden,),
    }
    if not config["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (config["vocab_size"], hidden)
    for layer in range(config["num_hidden_layers"]):
        at = f"model.layers.{layer}"
        shapes |= {
            f"{at}.self_attn.q_proj.weight": (query, hidden),
            f"{at}.self_attn.k_proj.weight": (kv, hidden),
            f"{at}.self_attn.v_proj.weight": (kv, hidden),
            f"{at}.self_attn.o_proj.weight": (hidden, query),
            f"{at}.mlp.gate_proj.weight": (inner, hidden),
            f"{at}.mlp.up_proj.weight": (inner, hidden),
            f"{at}.mlp.down_proj.weight": (hidden, inner),
            f"{at}.input_layernorm.weight": (hidden,),
            f"{at}.post_attention_layernorm.weight": (hidden,),
        }
        if config["model_type"] == "qwen2":
            for name, size in (("q", query), ("k", kv), ("v", kv)):
                shapes[f"{at}.self_attn.{name}_proj.bias"] = (size,)
    return {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}


def write_hf(
    directory: Path, config: dict[str, Any], tensors: dict[str, np.ndarray], shards: int = 1
) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config))
    if shards == 1:
        save_file(tensors, directory / "model.safetensors")
        return directory
    weight_map = {}
    for part in range(shards):
        name = f"model-{part + 1:05}-of-{shards:05}.safetensors"
        own = {key: tensors[key] for key in sorted(tensors)[part::shards]}
        save_file(own, directory / name)
        weight_map |= dict.fromkeys(own, name)
    index = {"metadata": {}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    return directory


def llama_cpp_permute(weights: np.ndarray, heads: int) -> np.ndarray:
    """The rule of llama.cpp's convert_hf_to_gguf.py (LlamaModel.permute), row by row."""
    head_dim = weights.shape[0] // heads
    out = np.empty_like(weights)
    for head in range(heads):
        for row in range(head_dim // 2):
            for half in range(2):
                source = head * head_dim + half * (head_dim // 2) + row
                out[head * head_dim + 2 * row + half] = weights[source]
    return out


def gguf_tensors(config: dict[str, Any], tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The same weights under llama.cpp's names; of a Llama, q and k permuted."""
    heads = {
        "attn_q": config["num_attention_heads"],
        "attn_k": config["num_key_value_heads"],
    }
    if config["model_type"] != "llama":
        heads = {}
    renamed = {}
    for name, values in tensors.items():
        if name.startswith("model.layers."):
            _, _, layer, rest = name.split(".", 3)
            part, _, kind = rest.rpartition(".")
            own = GGUF_NAMES[part]
            permuted = llama_cpp_permute(values, heads[own]) if own in heads else values
            renamed[f"blk.{layer}.{own}.{kind}"] = permuted
        else:
            own = {
                "model.embed_tokens.weight": "token_embd.weight",
                "model.norm.weight": "output_norm.weight",
                "lm_head.weight": "output.weight",
            }[name]
            renamed[own] = values
    return renamed


def gguf_fields(config: dict[str, Any]) -> dict[str, Any]:
    fields = {
        "general.architecture": "llama",
        "general.type": "model",
        "llama.block_count": config["num_hidden_layers"],
        "llama.context_length": config["max_position_embeddings"],
        "llama.embedding_length": config["hidden_size"],
        "llama.feed_forward_length": config["intermediate_size"],
        "llama.attention.head_count": config["num_attention_heads"],
        "llama.attention.head_count_kv": config["num_key_value_heads"],
        "llama.attention.layer_norm_rms_epsilon": config["rms_norm_eps"],
        "llama.rope.freq_base": config["rope_theta"],
        "llama.rope.dimension_count": config["head_dim"],
        "llama.vocab_size": config["vocab_size"],
    }
    if config["model_type"] == "llama":
        return fields
    other = config["model_type"]
    renamed = {key.replace("llama.", f"{other}.", 1): value for key, value in fields.items()}
    return {**renamed, "general.architecture": other}


def write_gguf(
    path: Path,
    fields: dict[str, Any],
    tensors: dict[str, np.ndarray],
    kinds: dict[str, gguf.GGMLQuantizationType] | None = None,
) -> Path:
    """Write with the gguf package; `kinds` quantises the tensors it names."""
    writer = gguf.GGUFWriter(path, arch=fields["general.architecture"])
    for key, value in fields.items():
        if key == "general.architecture":
            continue
        if isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        elif isinstance(value, float):
            writer.add_float32(key, value)
        elif isinstance(value, str):
            writer.add_string(key, value)
        else:
            writer.add_array(key, value)
    for name, values in tensors.items():
        kind = (kinds or {}).get(name)
        if kind is None:
            writer.add_tensor(name, values)
        else:
            writer.add_tensor(name, gguf.quants.quantize(values, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def byte_level_vocabulary() -> dict[str, Any]:
    """A GPT-2 style vocabulary of 256 bytes, a few merges and a control token."""
    from gguf import TokenType

    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    letters = {byte: chr(byte) for byte in printable}
    letters |= {b: chr(256 + n) for n, b in enumerate(b for b in range(256) if b not in letters)}
    merges = ["h e", "l l", "he ll", "hell o", "Ġ hello", "1 2"]
    tokens = ["<|end|>", *(letters[b] for b in range(256))]
    tokens += [merge.replace(" ", "") for merge in merges]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [int(TokenType.CONTROL)] + [1] * (len(tokens) - 1),
        "tokenizer.ggml.merges": merges,
        "tokenizer.ggml.bos_token_id": 0,
        "tokenizer.ggml.eos_token_id": 0,
    }


KERNELS = {
    ("attn", "q"): "self_attn.q_proj",
    ("attn", "k"): "self_attn.k_proj",
    ("attn", "v"): "self_attn.v_proj",
    ("attn", "o"): "self_attn.o_proj",
    ("ffn", "gate"): "mlp.gate_proj",
    ("ffn", "up"): "mlp.up_proj",
    ("ffn", "down"): "mlp.down_proj",
}


def assert_same(params, tensors, layers=2):
    """Compare with the source, written out independently of the rules."""
    np.testing.assert_array_equal(
        params["embed"]["embedding"], tensors["model.embed_tokens.weight"]
    )
    np.testing.assert_array_equal(params["final_norm"]["scale"], tensors["model.norm.weight"])
    assert ("unembed" in params) == ("lm_head.weight" in tensors)
    if "unembed" in params:
        np.testing.assert_array_equal(params["unembed"]["kernel"], tensors["lm_head.weight"].T)
    for i in range(layers):
        at = f"model.layers.{i}"
        own = params["layers"]
        for (block, name), theirs in KERNELS.items():
            np.testing.assert_array_equal(
                own[block][name]["kernel"][i], tensors[f"{at}.{theirs}.weight"].T, err_msg=theirs
            )
        for mine, theirs in (
            ("attn_norm", "input_layernorm"),
            ("ffn_norm", "post_attention_layernorm"),
        ):
            np.testing.assert_array_equal(own[mine]["scale"][i], tensors[f"{at}.{theirs}.weight"])
