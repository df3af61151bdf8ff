"""What all models of a family have in common, as fields of `ModelConfig`.

Readers of checkpoints (`convert/`) begin with these and add what files state; nothing else asks
which family a model is of.
"""

import math
from collections.abc import Mapping
from typing import Any

_GEMMA = {"activation": "gelu_tanh", "norm_offset": 1.0}

FIXED: Mapping[str, Mapping[str, Any]] = {
    "llama": {},
    "mistral": {},
    "qwen2": {"biases": ("q", "k", "v")},
    "qwen3": {"qk_norm": "head"},
    "gemma": _GEMMA,
    "gemma2": {**_GEMMA, "post_norms": True},
    "gemma3": {**_GEMMA, "post_norms": True, "qk_norm": "head"},
    "smollm3": {},
    "olmo2": {"pre_norms": False, "post_norms": True, "qk_norm": "width"},
    "phi3": {},
}
"""By family: the fields that are the same for every model of it."""

SCALED_EMBEDDING = frozenset({"gemma", "gemma2", "gemma3"})
"""Families that multiply the embedding by the square root of its width."""


def fixed_fields(family: str, *, hidden_size: int) -> dict[str, Any]:
    """The fields of `ModelConfig` that a family fixes.

    Args:
      family: a key of `FIXED`.
      hidden_size: width of the residual stream.
    """
    fields = dict(FIXED[family])
    if family in SCALED_EMBEDDING:
        fields["embed_scale"] = math.sqrt(hidden_size)
    return fields
