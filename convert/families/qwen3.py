"""Qwen 3: queries and keys are normed per head; no biases unless stated; else as Qwen 2."""

from typing import Any

from jaxneurons.convert.families.qwen2 import write_late_window
from jaxneurons.convert.family import ATTENTION_BIAS, Family, GGUFForm, Shape
from jaxneurons.convert.gguf_options import no_gguf_window
from jaxneurons.convert.hf_rope import read_rope
from jaxneurons.convert.keys import Keys
from jaxneurons.convert.windows import late_window


def _read(keys: Keys, shape: Shape) -> dict[str, Any]:
    fields = late_window(keys, shape, model_type="qwen3", default=4096, first=28)
    return {**fields, "rope": read_rope(keys, shape.max_position)}


QWEN3 = Family(
    name="qwen3",
    model_class="Qwen3ForCausalLM",
    defaults={
        "vocab_size": 151936,
        "hidden_size": 4096,
        "intermediate_size": 22016,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "head_dim": 128,
        "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": False,
    },
    read=_read,
    write=write_late_window,
    biases=ATTENTION_BIAS,
    gguf=GGUFForm("qwen3", no_gguf_window),
)
