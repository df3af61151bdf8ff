"""Gemma 3, text: Gemma 2 without soft caps, q and k normed, five sliding layers to a full one.

Of a checkpoint that also reads images the text part is taken.
"""

import re
from typing import Any

from jaxneurons.convert.families.gemma2 import (
    ACTIVATIONS,
    NAMES,
    gguf_query_scale,
    read_scores,
    write_scores,
    write_window,
)
from jaxneurons.convert.family import ATTENTION_BIAS, Family, GGUFForm, Shape, TextPart
from jaxneurons.convert.gguf_options import gguf_periodic_window
from jaxneurons.convert.hf_rope import read_ropes_by_type
from jaxneurons.convert.hf_rope_out import rope_scaling, rope_values
from jaxneurons.convert.keys import IRRELEVANT, Keys
from jaxneurons.convert.windows import FULL, SLIDING, periodic_window, types_of
from jaxneurons.errors import ConfigError
from jaxneurons.model.config import ModelConfig, RopeConfig

_TEXT, _WITH_IMAGES = "gemma3_text", "gemma3"
_WINDOW, _PERIOD, _FULL_THETA, _SLIDING_THETA = 4096, 6, 1_000_000.0, 10_000.0
_SCALED_BY_WIDTH = 62
"""Layers of the 27B model, whose scores llama.cpp scales by hidden / heads: no key says so."""
_OF_IMAGES = (
    "vision_config",
    "mm_tokens_per_image",
    "boi_token_index",
    "eoi_token_index",
    "image_token_index",
    "boi_token_id",
    "eoi_token_id",
    "image_token_id",
)


def _unwrap(model_type: str, keys: Keys) -> Keys:
    """The keys of the text part: those that stand beside it must not say anything of it."""
    if model_type != _WITH_IMAGES:
        return keys
    text = keys.left.pop("text_config", None)
    if not isinstance(text, dict):
        why = "the configuration of the text part is needed"
        raise keys.error("text_config", text, why)
    tied = keys.left.pop("tie_word_embeddings", None)
    for key in (*_OF_IMAGES, *IRRELEVANT):
        keys.left.pop(key, None)
    keys.done()
    inner = Keys(text, keys.where, prefix="text_config.")
    kind = inner.left.pop("model_type", _TEXT)
    if kind != _TEXT:
        raise inner.error("model_type", kind, f"only {_TEXT!r} is supported")
    if tied is not None and inner.left.setdefault("tie_word_embeddings", tied) != tied:
        raise ConfigError(
            f"{keys.where}: tie_word_embeddings = {tied!r} contradicts the one in text_config"
        )
    return inner


def _read(keys: Keys, shape: Shape) -> dict[str, Any]:
    listed = keys.left.get("layer_types") is not None
    left_behind = keys.integer("_sliding_window_pattern")
    if left_behind is not None and not listed:  # transformers writes it, and never reads it
        period = keys.left.setdefault("sliding_window_pattern", _PERIOD)
        if left_behind != period:
            why = f"without layer_types, transformers takes sliding_window_pattern = {period}"
            raise keys.error("_sliding_window_pattern", left_behind, why)
    window = periodic_window(
        keys, shape, default=_WINDOW, period=_PERIOD, stated="sliding_window_pattern"
    )
    if (cap := keys.left.get("attn_logit_softcapping")) is not None:
        why = "Gemma 3 has no such cap, and transformers does not look at it"
        raise keys.error("attn_logit_softcapping", cap, why)
    ropes = read_ropes_by_type(keys, shape.max_position, full=_FULL_THETA, sliding=_SLIDING_THETA)
    return {
        **window,
        **read_scores(keys, shape, attention=None, final=None),
        **_rope_fields(window, *ropes),
    }


def _rope_fields(window: dict[str, Any], full: RopeConfig, sliding: RopeConfig) -> dict[str, Any]:
    """The fields that say which layers have which rotary embedding."""
    if window["sliding_layers"] is not None:
        return {"rope": full, "sliding_rope": None if sliding == full else sliding}
    return {"rope": full if window["sliding_window"] is None else sliding}


def _write(config: ModelConfig) -> dict[str, Any]:
    types = types_of(config)
    sliding = config.sliding_rope or config.rope
    values = {
        **write_scores(config),
        **write_window(config),
        "rope_theta": config.rope.theta,
        "rope_local_base_freq": sliding.theta,
        "rope_scaling": rope_scaling(config),
    }
    period = types.index(FULL) + 1 if FULL in types else config.num_layers + 1
    if types == [SLIDING if (i + 1) % period else FULL for i in range(config.num_layers)]:
        values["sliding_window_pattern"] = period  # for transformers 4, which knows no list
    if SLIDING in types and (sliding.rope_type != "default" or FULL not in types):
        # Only transformers 5 can say it.
        for key in ("rope_theta", "rope_local_base_freq", "rope_scaling"):
            del values[key]
        values["rope_parameters"] = {
            FULL: rope_values(config.rope, config.head_dim),
            SLIDING: rope_values(sliding, config.head_dim),
        }
    return values


def _read_gguf(keys: Keys, shape: Shape) -> dict[str, Any]:
    for key in list(keys.left):  # some files hold the projector of images too
        if key.startswith(("vision.", "mm.")):
            del keys.left[key]
    window = gguf_periodic_window(keys, shape, default=None, period=_PERIOD)
    theta = keys.number("rope.freq_base_swa", _SLIDING_THETA)
    fields: dict[str, Any] = {
        **window,
        "query_scale": gguf_query_scale(keys, shape, by_width=_SCALED_BY_WIDTH),
        "final_softcap": keys.number("final_logit_softcapping", 0.0) or None,
    }
    if window["sliding_window"] is not None:
        every = window["sliding_layers"] is None
        fields["rope" if every else "sliding_rope"] = RopeConfig(theta=theta)
    return fields


GEMMA3 = Family(
    name="gemma3",
    model_class="Gemma3ForCausalLM",
    defaults={
        "vocab_size": 262208,
        "hidden_size": 2304,
        "intermediate_size": 9216,
        "num_hidden_layers": 26,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 256,
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": True,
    },
    read=_read,
    write=_write,
    model_types=(_TEXT, _WITH_IMAGES),
    activations=ACTIVATIONS,
    biases=ATTENTION_BIAS,
    names=NAMES,
    text=TextPart(
        prefixes={
            "language_model.model.": "model.",
            "language_model.lm_head.": "lm_head.",
            "model.language_model.": "model.",
        },
        left_out=re.compile(r"(model\.)?(vision_tower|multi_modal_projector)\."),
    ),
    unwrap=_unwrap,
    gguf=GGUFForm(
        "gemma3",
        _read_gguf,
        text=TextPart(prefixes={}, left_out=re.compile(r"(v|mm)\.")),
    ),
)
