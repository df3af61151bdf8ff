"""Gemma 1: scaled embedding, norms by 1 + w, the tanh form of GELU; the embedding is tied."""

from typing import Any

from jaxneurons.convert.family import ATTENTION_BIAS, Family, GGUFForm, Shape
from jaxneurons.convert.gguf_options import no_gguf_window
from jaxneurons.convert.hf_rope import read_rope
from jaxneurons.convert.keys import Keys
from jaxneurons.convert.windows import no_window
from jaxneurons.model.config import ModelConfig

GELU = "gelu_pytorch_tanh"
"""How configurations name the tanh form."""


def _read(keys: Keys, shape: Shape) -> dict[str, Any]:
    fields = no_window(keys, shape, model_type="gemma")
    return {**fields, "rope": read_rope(keys, shape.max_position)}


def _write(config: ModelConfig) -> dict[str, Any]:
    return {"hidden_act": GELU, "hidden_activation": GELU}


GEMMA = Family(
    name="gemma",
    model_class="GemmaForCausalLM",
    defaults={
        "vocab_size": 256000,
        "hidden_size": 3072,
        "intermediate_size": 24576,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
        "head_dim": 256,
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": True,
    },
    read=_read,
    write=_write,
    # The first configurations say "gelu", and transformers reads the tanh form for it.
    activations={"hidden_act": (GELU, "gelu"), "hidden_activation": (None, GELU)},
    biases=ATTENTION_BIAS,
    gguf=GGUFForm("gemma", no_gguf_window),
)
