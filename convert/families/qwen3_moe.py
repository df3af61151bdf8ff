"""Qwen3-MoE: Qwen 3 with experts of a width of their own in every layer."""

from typing import Any

from jaxneurons.convert.family import ATTENTION_BIAS, Family, GGUFForm, Shape
from jaxneurons.convert.gguf_options import no_gguf_window
from jaxneurons.convert.hf_rope import read_rope
from jaxneurons.convert.keys import Keys
from jaxneurons.convert.mixtures import (
    FUSED,
    GGUF_FUSED,
    GGUF_NAMES,
    read_experts,
    read_gguf_experts,
    write_experts,
)
from jaxneurons.convert.windows import window_fields
from jaxneurons.model.config import ModelConfig

_EXPERT = "model.layers.{i}.mlp.experts.{e}"
_MIXED = (
    "some layers would have experts and others one dense feed-forward, and here all layers of a "
    "model are alike"
)


def _read(keys: Keys, shape: Shape) -> dict[str, Any]:
    fields = _window(keys, shape)
    fields |= read_experts(keys, experts=128, chosen=8)
    fields["normalise_experts"] = keys.boolean("norm_topk_prob", False)
    fields["intermediate_size"] = keys.need(
        "moe_intermediate_size", keys.integer("moe_intermediate_size", 768)
    )
    step = keys.integer("decoder_sparse_step", 1)
    if step != 1:
        raise keys.error("decoder_sparse_step", step, _MIXED)
    dense = keys.left.pop("mlp_only_layers", None)
    if dense not in (None, []):
        raise keys.error("mlp_only_layers", dense, _MIXED)
    return {**fields, "rope": read_rope(keys, shape.max_position)}


def _window(keys: Keys, shape: Shape) -> dict[str, Any]:
    """The window, which all layers have if it is used."""
    window, first = keys.integer("sliding_window", 4096), keys.integer("max_window_layers")
    if not keys.boolean("use_sliding_window", False):
        window = None
    elif first:
        raise keys.error(
            "max_window_layers", first, "transformers gives the window to every layer all the same"
        )
    return window_fields(window, [window is not None] * shape.layers)


def _write(config: ModelConfig) -> dict[str, Any]:
    return {
        "moe_intermediate_size": config.intermediate_size,
        "norm_topk_prob": config.normalise_experts,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "use_sliding_window": config.sliding_window is not None,
        "sliding_window": config.sliding_window,
        **write_experts(config, "num_experts"),
    }


def _read_gguf(keys: Keys, shape: Shape) -> dict[str, Any]:
    width = keys.integer("expert_feed_forward_length")
    fields = {**no_gguf_window(keys, shape), **read_gguf_experts(keys)}
    return {**fields, "intermediate_size": keys.need("expert_feed_forward_length", width)}


QWEN3_MOE = Family(
    name="qwen3_moe",
    model_class="Qwen3MoeForCausalLM",
    defaults={
        "vocab_size": 151936,
        "hidden_size": 2048,
        "intermediate_size": 6144,
        "num_hidden_layers": 24,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": False,
    },
    read=_read,
    write=_write,
    biases=ATTENTION_BIAS,
    names={
        "layers.ffn.router": "model.layers.{i}.mlp.gate",
        "layers.ffn.gate": f"{_EXPERT}.gate_proj",
        "layers.ffn.up": f"{_EXPERT}.up_proj",
        "layers.ffn.down": f"{_EXPERT}.down_proj",
    },
    fused=FUSED[1:],  # its router has that name
    gguf=GGUFForm("qwen3moe", _read_gguf, fused=GGUF_FUSED, names=GGUF_NAMES),
)
