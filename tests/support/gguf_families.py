"""GGUF files of the tiny models of `families`, in the way of llama.cpp's converter.

Written out independently of the library: names, what is permuted, what has 1 added, what is fused.
"""

from pathlib import Path
from typing import Any

import numpy as np
from support.checkpoints import GGUF_NAMES, llama_cpp_permute, write_gguf

NAMES = {
    **GGUF_NAMES,
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "self_attn.qkv_proj": "attn_qkv",
    "mlp.gate_up_proj": "ffn_up",
}
POST_NORMS = {
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}
TOP = {"embed_tokens": "token_embd", "norm": "output_norm"}
WITH_POST_NORMS = ("gemma2", "gemma3", "olmo2")
GEMMAS = ("gemma", "gemma2", "gemma3")


def architecture(model: Any) -> str:
    return model.config.model_type.removesuffix("_text")


def fields(model: Any) -> dict[str, Any]:
    """The metadata of a model."""
    config, arch = model.config, architecture(model)
    head_dim = getattr(config, "head_dim", None)
    rope = config.rope_parameters
    full = rope.get("full_attention", rope)
    values: dict[str, Any] = {
        "block_count": config.num_hidden_layers,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        "vocab_size": config.vocab_size,
        "rope.freq_base": full["rope_theta"],
    }
    if head_dim is not None:
        values |= {"attention.key_length": head_dim, "attention.value_length": head_dim}
    if arch == "gemma2":
        values["attn_logit_softcapping"] = config.attn_logit_softcapping
    if arch in ("gemma2", "gemma3") and config.final_logit_softcapping:
        values["final_logit_softcapping"] = config.final_logit_softcapping
    if arch in ("gemma2", "gemma3"):
        values["attention.sliding_window"] = config.sliding_window
    if full["rope_type"] in ("linear", "yarn"):
        values |= {"rope.scaling.type": full["rope_type"], "rope.scaling.factor": full["factor"]}
    if full["rope_type"] == "yarn":
        original = full["original_max_position_embeddings"]
        values["rope.scaling.original_context_length"] = original
    if arch == "phi3":
        original = config.original_max_position_embeddings
        width = config.hidden_size // config.num_attention_heads
        values |= {
            "rope.scaling.original_context_length": original,
            "rope.dimension_count": int(width * full.get("partial_rotary_factor", 1.0)),
            "attention.sliding_window": config.sliding_window or 0,
        }
        if "long_factor" in full:
            scale = config.max_position_embeddings / original
            values["rope.scaling.attn_factor"] = float(
                np.sqrt(1 + np.log(scale) / np.log(original))
            )
    return {
        "general.architecture": arch,
        "general.type": "model",
        **{f"{arch}.{key}": value for key, value in values.items()},
    }


def tensors(model: Any) -> dict[str, np.ndarray]:
    """The tensors of a model."""
    config, arch = model.config, architecture(model)
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    names = {**NAMES, **(POST_NORMS if arch in WITH_POST_NORMS else {})}
    stored = {}
    for name, parameter in model.state_dict().items():
        values = parameter.numpy()
        if name == "lm_head.weight":
            if not config.tie_word_embeddings:
                stored["output.weight"] = values
            continue
        part, _, kind = name.removeprefix("model.").rpartition(".")
        if arch in GEMMAS and part.endswith("norm"):
            values = values + np.float32(1)
        if part in TOP:
            stored[f"{TOP[part]}.{kind}"] = values
            continue
        _, layer, inner = part.split(".", 2)
        renamed = names[inner]
        if arch == "smollm3" and renamed in heads:
            values = llama_cpp_permute(values, heads[renamed])
        stored[f"blk.{layer}.{renamed}.{kind}"] = values
    rope = config.rope_parameters
    if arch == "phi3" and "long_factor" in rope:
        for length in ("long", "short"):
            factors = np.asarray(rope[f"{length}_factor"], np.float32)
            stored[f"rope_factors_{length}.weight"] = factors
    return stored


def write(path: Path, model: Any, **changes: Any) -> Path:
    """Write a model; `changes` replace fields, with `__` for dots."""
    arch = architecture(model)
    values = fields(model) | {f"{arch}.{k.replace('__', '.')}": v for k, v in changes.items()}
    return write_gguf(path, values, tensors(model))
