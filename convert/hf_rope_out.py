"""Rotary embeddings -> the keys of config.json, in the spelling of transformers 4 or of 5."""

import dataclasses
from typing import Any

import numpy as np

from jaxneurons.errors import ConfigError
from jaxneurons.model.config import ModelConfig, RopeConfig


def rope_scaling(config: ModelConfig) -> dict[str, Any] | None:
    """`rope_scaling` of a model, as transformers 4 states it beside `rope_theta`.

    Raises:
      ConfigError: a table of divisors that no configuration states.
    """
    return _scaling(config.rope, config.head_dim)


def rope_values(rope: RopeConfig, head_dim: int) -> dict[str, Any]:
    """One rotary embedding as transformers 5 states it.

    Raises:
      ConfigError: a table of divisors that no configuration states.
    """
    return {"rope_type": "default", "rope_theta": rope.theta, **(_scaling(rope, head_dim) or {})}


def _scaling(rope: RopeConfig, head_dim: int) -> dict[str, Any] | None:
    if rope.inv_freq_divisors is not None:
        return _llama3_of_divisors(rope, head_dim)
    if rope.rope_type == "default":
        return None
    values: dict[str, Any] = {"rope_type": rope.rope_type}
    if rope.rope_type != "longrope":
        values["factor"] = rope.factor
    if rope.rope_type == "llama3":
        values |= {
            "low_freq_factor": rope.low_freq_factor,
            "high_freq_factor": rope.high_freq_factor,
            "original_max_position_embeddings": rope.original_max_position,
        }
    if rope.rope_type in ("yarn", "longrope"):
        values |= {
            "original_max_position_embeddings": rope.original_max_position,
            "attention_factor": rope.attention_factor,
        }
    if rope.rope_type == "longrope":
        values["short_factor"] = list(rope.short_divisors or ())
        values["long_factor"] = list(rope.long_divisors or ())
    if rope.rope_type == "yarn":
        values |= {"beta_fast": rope.beta_fast, "beta_slow": rope.beta_slow}
        if not rope.truncate:
            values["truncate"] = False
    return values


def _llama3_of_divisors(rope: RopeConfig, head_dim: int) -> dict[str, Any]:
    """The llama3 values behind a GGUF file's table of divisors, if they are Llama 3's."""
    from jaxneurons.model.rotary import rope_frequencies

    frequencies = rope_frequencies(rope, head_dim)
    for factor in (8.0, 32.0):
        stated = dataclasses.replace(
            rope,
            inv_freq_divisors=None,
            factor=factor,
            low_freq_factor=1.0,
            high_freq_factor=4.0,
            original_max_position=8192,
        )
        if np.allclose(rope_frequencies(stated, head_dim), frequencies, rtol=1e-6):
            return _scaling(stated, head_dim) or {}
    raise ConfigError(
        "rope_freqs of this GGUF file are not those of Llama 3.1 or 3.2, and config.json has no "
        "place for a table of frequencies; keep the model in the native format"
    )
