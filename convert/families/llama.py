"""Llama 1 to 3.2, TinyLlama, SmolLM: the family that the others are compared with."""

from typing import Any

from jaxneurons.convert.family import ATTENTION_BIAS, MLP_BIAS, Family, GGUFForm, Shape
from jaxneurons.convert.hf_rope import read_rope
from jaxneurons.convert.keys import Keys
from jaxneurons.convert.windows import no_window
from jaxneurons.model.config import ModelConfig


def _read(keys: Keys, shape: Shape) -> dict[str, Any]:
    fields = no_window(keys, shape, model_type="llama")
    return {**fields, "rope": read_rope(keys, shape.max_position)}


def _read_gguf(keys: Keys, shape: Shape) -> dict[str, Any]:
    # Files of Mistral models are of this architecture too.
    return {"sliding_window": keys.integer("attention.sliding_window") or None}


def _written_as(config: ModelConfig) -> str:
    return "llama" if config.sliding_window is None else "mistral"


LLAMA = Family(
    name="llama",
    model_class="LlamaForCausalLM",
    defaults={
        "vocab_size": 32000,
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": None,
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": False,
    },
    read=_read,
    biases=ATTENTION_BIAS | MLP_BIAS,
    written_as=_written_as,
    gguf=GGUFForm("llama", _read_gguf, interleaved=True),
)
