"""Mixtral: Mistral with experts, of which a router chooses two; their weights sum to 1."""

from typing import Any

from jaxneurons.convert.family import Family, GGUFForm, Shape
from jaxneurons.convert.hf_rope import RopeRules, read_rope
from jaxneurons.convert.keys import Keys
from jaxneurons.convert.mixtures import (
    FUSED,
    GGUF_FUSED,
    GGUF_NAMES,
    read_experts,
    read_gguf_experts,
    write_experts,
)
from jaxneurons.convert.windows import one_window
from jaxneurons.model.config import ModelConfig

_EXPERT = "model.layers.{i}.block_sparse_moe.experts.{e}"


def _read(keys: Keys, shape: Shape) -> dict[str, Any]:
    fields = one_window(keys, shape, model_type="mixtral")
    fields |= read_experts(keys, experts=8, chosen=2)
    return {**fields, "rope": read_rope(keys, shape.max_position, RopeRules(theta=1_000_000.0))}


def _write(config: ModelConfig) -> dict[str, Any]:
    return {
        "sliding_window": config.sliding_window,
        **write_experts(config, "num_local_experts"),
    }


def _read_gguf(keys: Keys, shape: Shape) -> dict[str, Any]:
    window = keys.integer("attention.sliding_window") or None
    return {"sliding_window": window, **read_gguf_experts(keys)}


MIXTRAL = Family(
    name="mixtral",
    model_class="MixtralForCausalLM",
    defaults={
        "vocab_size": 32000,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
    },
    read=_read,
    write=_write,
    names={
        "layers.ffn.router": "model.layers.{i}.block_sparse_moe.gate",
        "layers.ffn.gate": f"{_EXPERT}.w1",
        "layers.ffn.up": f"{_EXPERT}.w3",
        "layers.ffn.down": f"{_EXPERT}.w2",
    },
    fused=FUSED,
    gguf=GGUFForm(
        "llama", _read_gguf, interleaved=True, fused=GGUF_FUSED, names=GGUF_NAMES, within=True
    ),
)
"""GGUF files of these models name the architecture "llama", with experts."""
