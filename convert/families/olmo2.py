"""OLMo 2: norms on what attention and the feed-forward add, and on queries and keys as a whole."""

from typing import Any

from jaxneurons.convert.family import ATTENTION_BIAS, Family, GGUFForm, Shape
from jaxneurons.convert.gguf_options import no_gguf_window
from jaxneurons.convert.hf_rope import read_rope
from jaxneurons.convert.hf_rope_out import rope_scaling
from jaxneurons.convert.keys import Keys
from jaxneurons.convert.windows import no_window
from jaxneurons.model.config import ModelConfig


def _read(keys: Keys, shape: Shape) -> dict[str, Any]:
    fields = no_window(keys, shape, model_type="olmo2")
    return {**fields, "rope": read_rope(keys, shape.max_position)}


def _write(config: ModelConfig) -> dict[str, Any]:
    scaling = rope_scaling(config)
    if scaling is not None:  # transformers 4 wants the old name, and no other key
        scaling["type"] = scaling.pop("rope_type")
    return {"rope_scaling": scaling}


def _read_gguf(keys: Keys, shape: Shape) -> dict[str, Any]:
    why = "only OLMo 3 has a window, and that family is not supported"
    return no_gguf_window(keys, shape, why=why)


OLMO2 = Family(
    name="olmo2",
    model_class="Olmo2ForCausalLM",
    defaults={
        "vocab_size": 50304,
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": None,
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
    },
    read=_read,
    write=_write,
    biases=ATTENTION_BIAS,
    gguf=GGUFForm("olmo2", _read_gguf),
)
