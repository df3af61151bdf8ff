"""Mistral and Mistral-Nemo: Llama with a sliding window in every layer, or without one."""

from typing import Any

from jaxneurons.convert.family import Family, Shape
from jaxneurons.convert.hf_rope import read_rope
from jaxneurons.convert.keys import Keys
from jaxneurons.convert.windows import one_window
from jaxneurons.model.config import ModelConfig


def _read(keys: Keys, shape: Shape) -> dict[str, Any]:
    fields = one_window(keys, shape, model_type="mistral", default=4096)
    return {**fields, "rope": read_rope(keys, shape.max_position)}


def _write(config: ModelConfig) -> dict[str, Any]:
    return {"sliding_window": config.sliding_window}


MISTRAL = Family(
    name="mistral",
    model_class="MistralForCausalLM",
    defaults={
        "vocab_size": 32000,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": False,
    },
    read=_read,
    write=_write,
)
"""GGUF files of these models name the architecture "llama"."""
