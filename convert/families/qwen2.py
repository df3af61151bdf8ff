"""Qwen 2 and 2.5: biases on q, k and v; a window in the layers from some layer on, if used."""

from typing import Any

from jaxneurons.convert.family import Family, GGUFForm, Shape
from jaxneurons.convert.hf_rope import read_rope
from jaxneurons.convert.keys import Keys
from jaxneurons.convert.windows import FULL, late_window, types_of
from jaxneurons.model.config import ModelConfig


def _read(keys: Keys, shape: Shape) -> dict[str, Any]:
    fields = late_window(keys, shape, model_type="qwen2", default=4096, first=28)
    return {**fields, "rope": read_rope(keys, shape.max_position)}


def write_late_window(config: ModelConfig) -> dict[str, Any]:
    """The keys of a window in some of the layers, as Qwen's configurations state it."""
    types = types_of(config)
    return {
        "use_sliding_window": config.sliding_window is not None,
        "sliding_window": config.sliding_window,
        # transformers 4 knows only "the first so many layers are full".
        "max_window_layers": types.count(FULL),
        "layer_types": types,
    }


def _read_gguf(keys: Keys, shape: Shape) -> dict[str, Any]:
    return {"sliding_window": keys.integer("attention.sliding_window") or None}


QWEN2 = Family(
    name="qwen2",
    model_class="Qwen2ForCausalLM",
    defaults={
        "vocab_size": 151936,
        "hidden_size": 4096,
        "intermediate_size": 22016,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": False,
    },
    read=_read,
    write=write_late_window,
    gguf=GGUFForm("qwen2", _read_gguf),
)
