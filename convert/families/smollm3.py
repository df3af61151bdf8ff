"""SmolLM3: Llama in which every fourth layer has no rotary embedding."""

from typing import Any

from jaxneurons.convert.family import ATTENTION_BIAS, MLP_BIAS, Family, GGUFForm, Shape
from jaxneurons.convert.gguf_options import no_gguf_window
from jaxneurons.convert.hf_rope import RopeRules, read_rope
from jaxneurons.convert.keys import Keys
from jaxneurons.convert.windows import switched_window, types_of
from jaxneurons.model.config import ModelConfig

_INTERVAL = 4
"""Of so many layers the last has no rotary embedding, where files do not say."""
_THETA = 2_000_000.0


def _read(keys: Keys, shape: Shape) -> dict[str, Any]:
    rotary = _rotary_layers(keys, shape)
    keys.integer("max_window_layers")  # not looked at
    fields = switched_window(
        keys, shape, model_type="smollm3", default=None, sliding=[not turns for turns in rotary]
    )
    return {
        **fields,
        "rotary_layers": None if all(rotary) else rotary,
        "rope": read_rope(keys, shape.max_position, RopeRules(_THETA)),
    }


def _rotary_layers(keys: Keys, shape: Shape) -> tuple[bool, ...]:
    """Which layers have one: the list decides, the interval only fills it in."""
    interval = keys.integer("no_rope_layer_interval", _INTERVAL)
    stated = keys.left.pop("no_rope_layers", None)
    if stated is None:
        if interval is None or interval <= 0:
            raise keys.error("no_rope_layer_interval", interval, "a positive number is needed")
        return _every(interval, shape.layers)
    if not isinstance(stated, list) or len(stated) < shape.layers:
        why = f"a list of {shape.layers} entries is needed, 0 for layers without rotary embedding"
        raise keys.error("no_rope_layers", stated, why)
    if any(entry not in (0, 1) for entry in stated):
        raise keys.error("no_rope_layers", stated, "entries must be 0 or 1")
    return tuple(map(bool, stated[: shape.layers]))


def _every(interval: int, layers: int) -> tuple[bool, ...]:
    return tuple((layer + 1) % interval != 0 for layer in range(layers))


def _write(config: ModelConfig) -> dict[str, Any]:
    rotary = config.rotary_layers or (True,) * config.num_layers
    return {
        "no_rope_layers": list(map(int, rotary)),
        "use_sliding_window": config.sliding_window is not None,
        "sliding_window": config.sliding_window,
        "layer_types": types_of(config),
    }


def _read_gguf(keys: Keys, shape: Shape) -> dict[str, Any]:
    rotary = _every(_INTERVAL, shape.layers)
    fields = no_gguf_window(keys, shape)
    return {**fields, "rotary_layers": None if all(rotary) else rotary}


SMOLLM3 = Family(
    name="smollm3",
    model_class="SmolLM3ForCausalLM",
    defaults={
        "vocab_size": 128256,
        "hidden_size": 2048,
        "intermediate_size": 11008,
        "num_hidden_layers": 36,
        "num_attention_heads": 16,
        "num_key_value_heads": 4,
        "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": True,
    },
    read=_read,
    write=_write,
    biases=ATTENTION_BIAS | MLP_BIAS,
    gguf=GGUFForm("smollm3", _read_gguf, interleaved=True),
)
