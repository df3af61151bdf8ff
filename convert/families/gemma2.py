"""Gemma 2: Gemma with norms on both sides, soft caps, and a window in every other layer."""

import math
from typing import Any

from jaxneurons.convert.families.gemma import GELU
from jaxneurons.convert.family import ATTENTION_BIAS, Family, GGUFForm, Shape
from jaxneurons.convert.gguf_options import gguf_periodic_window
from jaxneurons.convert.hf_rope import read_rope
from jaxneurons.convert.keys import Keys
from jaxneurons.convert.windows import periodic_window, types_of
from jaxneurons.model.config import ModelConfig

ACTIVATIONS = {"hidden_activation": (GELU,), "hidden_act": (GELU, "gelu", None)}
"""What the keys of the activation may say: `hidden_activation` decides."""
NAMES = {"layers.ffn_norm": "model.layers.{i}.pre_feedforward_layernorm"}
_WINDOW, _PERIOD, _ATTENTION_CAP, _FINAL_CAP = 4096, 2, 50.0, 30.0
_SCALED_BY_WIDTH = 46
"""Layers of the 27B model, whose scores llama.cpp scales by hidden / heads: no key says so."""


def _read(keys: Keys, shape: Shape) -> dict[str, Any]:
    return {
        **periodic_window(keys, shape, default=_WINDOW, period=_PERIOD),
        **read_scores(keys, shape, attention=_ATTENTION_CAP, final=_FINAL_CAP),
        "rope": read_rope(keys, shape.max_position),
    }


def read_scores(
    keys: Keys, shape: Shape, *, attention: float | None, final: float | None
) -> dict[str, Any]:
    """The scale of scores and the soft caps.

    Args:
      keys: of the configuration.
      shape: of the model.
      attention: cap of attention scores, where it is not stated.
      final: the same of logits.
    """
    divisor = keys.need("query_pre_attn_scalar", keys.number("query_pre_attn_scalar", 256))
    if divisor <= 0:
        raise keys.error("query_pre_attn_scalar", divisor, "a positive number is needed")
    return {
        "query_scale": query_scale(divisor, shape),
        "attention_softcap": keys.number("attn_logit_softcapping", attention),
        "final_softcap": keys.number("final_logit_softcapping", final),
    }


def query_scale(divisor: float | int, shape: Shape) -> float | None:
    """What scores are multiplied by, of the square of its reciprocal; None: the usual."""
    return None if divisor == shape.head_dim else 1 / math.sqrt(divisor)


def write_scores(config: ModelConfig) -> dict[str, Any]:
    """The keys of `read_scores`, and those of the activation."""
    divisor = config.score_scale**-2
    if math.isclose(divisor, round(divisor), rel_tol=1e-9):
        divisor = round(divisor)
    return {
        "hidden_act": GELU,
        "hidden_activation": GELU,
        "query_pre_attn_scalar": divisor,
        "attn_logit_softcapping": config.attention_softcap,
        "final_logit_softcapping": config.final_softcap,
    }


def write_window(config: ModelConfig) -> dict[str, Any]:
    """The keys of the window, which transformers needs also where no layer has it."""
    window = config.sliding_window or config.max_position
    return {"sliding_window": window, "layer_types": types_of(config)}


def _write(config: ModelConfig) -> dict[str, Any]:
    return {**write_scores(config), **write_window(config)}


def _read_gguf(keys: Keys, shape: Shape) -> dict[str, Any]:
    return {
        **gguf_periodic_window(keys, shape, default=_WINDOW, period=_PERIOD),
        "query_scale": gguf_query_scale(keys, shape, by_width=_SCALED_BY_WIDTH),
        "attention_softcap": keys.number("attn_logit_softcapping", _ATTENTION_CAP),
        "final_softcap": keys.number("final_logit_softcapping", _FINAL_CAP),
    }


def gguf_query_scale(keys: Keys, shape: Shape, *, by_width: int) -> float | None:
    """The scale of scores, which only the largest model of a family has another of.

    Args:
      keys: of the file.
      shape: of the model.
      by_width: layers of the model whose scores are scaled by hidden / heads.
    """
    stated = keys.number("attention.scale", 0.0)
    usual = query_scale(
        shape.hidden // shape.heads if shape.layers == by_width else shape.head_dim, shape
    )
    if stated and not math.isclose(stated, usual or shape.head_dim**-0.5, rel_tol=1e-6):
        return stated
    return usual


GEMMA2 = Family(
    name="gemma2",
    model_class="Gemma2ForCausalLM",
    defaults={
        "vocab_size": 256000,
        "hidden_size": 2304,
        "intermediate_size": 9216,
        "num_hidden_layers": 26,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 256,
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": True,
    },
    read=_read,
    write=_write,
    activations=ACTIVATIONS,
    biases=ATTENTION_BIAS,
    names=NAMES,
    gguf=GGUFForm("gemma2", _read_gguf),
)
