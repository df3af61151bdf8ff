"""Tiny random models of every supported family, made by transformers, and logits of both sides."""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from support.models import compiled

from jaxneurons import ModelConfig, forward

CONTEXT, LENGTH = 24, 40  # the original context, and a sequence that goes beyond it

ROPES: dict[str, dict[str, Any]] = {
    "default": {},
    "linear": {"rope_type": "linear", "factor": 2.5},
    "dynamic": {"rope_type": "dynamic", "factor": 2.0},
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": CONTEXT},
    "yarn-betas": {
        "rope_type": "yarn",
        "rope_theta": 10.0,
        "factor": 4.0,
        "original_max_position_embeddings": CONTEXT,
        "beta_fast": 1.0,
        "beta_slow": 0.2,
    },
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": CONTEXT,
    },
}
HEADS = {"mha": 4, "gqa": 2, "mqa": 1}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "llama-biases": ("Llama", {"attention_bias": True, "mlp_bias": True}),
    "mistral": ("Mistral", {"sliding_window": None}),
    "mistral-window": ("Mistral", {"sliding_window": 7}),
    "nemo": ("Mistral", {"sliding_window": None, "head_dim": 12}),
    "qwen2": ("Qwen2", {}),
    "qwen2-window": (
        "Qwen2",
        {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 0},
    ),
    "qwen2-mixed": (
        "Qwen2",
        {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 1},
    ),
}


COMMON: dict[str, Any] = {
    "vocab_size": 50,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": CONTEXT,
    "rms_norm_eps": 1e-5,
    "rope_parameters": {"rope_theta": 500.0, "rope_type": "default"},
    "attn_implementation": "eager",
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
}
WINDOW = 7
FULL, SLIDING = "full_attention", "sliding_attention"
BY_TYPE = {
    "full_attention": {"rope_theta": 500.0, "rope_type": "default"},
    "sliding_attention": {"rope_theta": 20.0, "rope_type": "default"},
}
LINEAR_FULL = {**BY_TYPE, FULL: {"rope_theta": 500.0, "rope_type": "linear", "factor": 8.0}}
# GGUF files state no base of sliding layers: it is 10,000.
THETAS_OF_GGUF = {**BY_TYPE, SLIDING: {"rope_theta": 10000.0, "rope_type": "default"}}
LINEAR_FULL_OF_GGUF = {**THETAS_OF_GGUF, FULL: LINEAR_FULL[FULL]}
LONG = {
    "rope_type": "longrope",
    "rope_theta": 500.0,
    "short_factor": [1.0, 1.1, 1.3, 1.2],
    "long_factor": [1.5, 2.5, 3.0, 4.0],
}
# Phi-4-mini: three quarters of a head of 8 dimensions rotate.
PARTIAL = {**LONG, "partial_rotary_factor": 0.75} | {
    key: LONG[key][:3] for key in ("short_factor", "long_factor")
}
EXTENDED = {"max_position_embeddings": 4 * CONTEXT, "original_max_position_embeddings": CONTEXT}

# The first of each family is compared by default, with the options of its published models.
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "gemma": ("Gemma", {"head_dim": 12, "num_key_value_heads": 1}),
    "gemma, biases, untied": (
        "Gemma",
        {"head_dim": 8, "attention_bias": True, "tie_word_embeddings": False},
    ),
    "gemma2": (
        "Gemma2",
        {"head_dim": 12, "query_pre_attn_scalar": 5, "sliding_window": WINDOW}
        | {"attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0},
    ),
    "gemma2, no caps, usual scale": (
        "Gemma2",
        {"head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": WINDOW}
        | {"attn_logit_softcapping": None, "final_logit_softcapping": None},
    ),
    "gemma2, full then sliding": (
        "Gemma2",
        {"head_dim": 8, "sliding_window": WINDOW, "layer_types": [FULL, SLIDING, SLIDING]},
    ),
    "gemma3, linear": (
        "Gemma3Text",
        {"head_dim": 12, "query_pre_attn_scalar": 5, "sliding_window": WINDOW}
        | {"sliding_window_pattern": 3, "num_hidden_layers": 4, "rope_parameters": LINEAR_FULL},
    ),
    "gemma3, default rope": (
        "Gemma3Text",
        {"head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": WINDOW}
        | {"sliding_window_pattern": 2, "rope_parameters": BY_TYPE},
    ),
    "gemma3, biases, final cap, untied": (
        "Gemma3Text",
        {"head_dim": 8, "sliding_window": WINDOW, "sliding_window_pattern": 2}
        | {"rope_parameters": BY_TYPE, "attention_bias": True, "tie_word_embeddings": False}
        | {"final_logit_softcapping": 3.0},
    ),
    "gemma3, all full": (
        "Gemma3Text",
        {"head_dim": 8, "layer_types": [FULL] * 3, "rope_parameters": LINEAR_FULL},
    ),
    "gemma3, all sliding": (
        "Gemma3Text",
        {"head_dim": 8, "sliding_window": WINDOW, "layer_types": [SLIDING] * 3}
        | {"rope_parameters": LINEAR_FULL},
    ),
    "qwen3": ("Qwen3", {"head_dim": 12}),
    "qwen3, biases, tied": (
        "Qwen3",
        {"head_dim": 8, "attention_bias": True, "tie_word_embeddings": True},
    ),
    "qwen3, window": (
        "Qwen3",
        {"head_dim": 8, "use_sliding_window": True, "sliding_window": WINDOW}
        | {"max_window_layers": 1},
    ),
    "qwen3, yarn": (
        "Qwen3",
        {"head_dim": 8, "max_position_embeddings": 4 * CONTEXT}
        | {"rope_parameters": {"rope_theta": 500.0, **ROPES["yarn"]}},
    ),
    "smollm3": ("SmolLM3", {"num_hidden_layers": 5, "tie_word_embeddings": True}),
    "smollm3, biases, untied": (
        "SmolLM3",
        {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": False}
        | {"no_rope_layer_interval": 2},
    ),
    "smollm3, window, listed": (
        "SmolLM3",
        {"use_sliding_window": True, "sliding_window": WINDOW, "no_rope_layers": [0, 1, 1]},
    ),
    "smollm3, yarn": (
        "SmolLM3",
        {"max_position_embeddings": 4 * CONTEXT, "no_rope_layer_interval": 2}
        | {"rope_parameters": {"rope_theta": 500.0, **ROPES["yarn"]}},
    ),
    "olmo2": ("Olmo2", {"num_key_value_heads": 4}),
    "olmo2, biases, grouped, linear": (
        "Olmo2",
        {"attention_bias": True, "rope_parameters": {"rope_theta": 500.0, **ROPES["linear"]}},
    ),
    "phi3, longrope, partial": (
        "Phi3",
        {"rope_parameters": PARTIAL, "tie_word_embeddings": True, **EXTENDED},
    ),
    "phi3, longrope": ("Phi3", {"rope_parameters": LONG, **EXTENDED}),
    "phi3, window": (
        "Phi3",
        {"sliding_window": WINDOW, "original_max_position_embeddings": CONTEXT}
        | {"num_key_value_heads": 4},
    ),
    "phi3, partial": (
        "Phi3",
        {"original_max_position_embeddings": CONTEXT}
        | {"rope_parameters": {**COMMON["rope_parameters"], "partial_rotary_factor": 0.75}},
    ),
}


# Those that llama.cpp's converter has a place for: it writes neither periods nor scales of scores.
IN_GGUF: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "qwen2": ("Qwen2", {}),
    "gemma": ("Gemma", {"head_dim": 12, "num_key_value_heads": 1}),
    "gemma2": (
        "Gemma2",
        {"head_dim": 12, "query_pre_attn_scalar": 12, "sliding_window": WINDOW}
        | {"attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0},
    ),
    "gemma3": (
        "Gemma3Text",
        {"head_dim": 12, "query_pre_attn_scalar": 12, "sliding_window": WINDOW}
        | {"num_hidden_layers": 7, "rope_parameters": THETAS_OF_GGUF},
    ),
    "qwen3": ("Qwen3", {"head_dim": 128}),  # transformers takes it for granted
    "smollm3": ("SmolLM3", {"num_hidden_layers": 5, "tie_word_embeddings": True}),
    "olmo2": ("Olmo2", {}),
    "phi3": ("Phi3", {"rope_parameters": PARTIAL, **EXTENDED}),
    "gemma3, linear": (
        "Gemma3Text",
        {"head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": WINDOW}
        | {"num_hidden_layers": 6, "rope_parameters": LINEAR_FULL_OF_GGUF}
        | {"tie_word_embeddings": False, "final_logit_softcapping": 3.0},
    ),
    "qwen3, yarn, tied": (
        "Qwen3",
        {"head_dim": 8, "max_position_embeddings": 4 * CONTEXT, "tie_word_embeddings": True}
        | {"rope_parameters": {"rope_theta": 500.0, **ROPES["yarn"]}},
    ),
    "smollm3, biases, untied": (
        "SmolLM3",
        {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": False}
        | {"num_hidden_layers": 4},
    ),
    "phi3, window, tied": (
        "Phi3",
        {"sliding_window": WINDOW, "original_max_position_embeddings": CONTEXT}
        | {"num_key_value_heads": 4, "tie_word_embeddings": True},
    ),
}


def make(family: str, rope: str, heads: str, tied: bool, *, loud: bool = True) -> Any:
    """A tiny model; `loud`: with weights so large that every part of it matters."""
    name, changes = FAMILIES[family]
    # `dynamic` stretches beyond max_position_embeddings; elsewhere that is the extended context.
    context = CONTEXT if rope in ("default", "dynamic") else 4 * CONTEXT
    config = getattr(transformers, f"{name}Config")(
        vocab_size=50,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=HEADS[heads],
        max_position_embeddings=context,
        rms_norm_eps=1e-5,
        tie_word_embeddings=tied,
        rope_parameters={"rope_theta": 500.0, "rope_type": "default", **ROPES[rope]},
        attn_implementation="eager",
        pad_token_id=None,
        **changes,
    )
    torch.manual_seed(0)
    model = getattr(transformers, f"{name}ForCausalLM")(config).eval()
    if not loud:
        return model
    with torch.no_grad():
        for key, weights in model.named_parameters():
            spread = 0.3 if key.endswith("bias") else 0.15
            weights.normal_(1.0 if "norm" in key else 0.0, spread)
    return model


def variant(name: str, table: Mapping[str, tuple[str, dict[str, Any]]] = VARIANTS) -> Any:
    """A tiny model of a table, whose weights are so large that every part of it matters."""
    kind, changes = table[name]
    if not hasattr(transformers, f"{kind}Config"):
        pytest.skip(f"transformers {transformers.__version__} has no {kind}")
    name = kind.removesuffix("Text")
    options = {**COMMON, **changes}
    config = getattr(transformers, f"{kind}Config")(**options)
    torch.manual_seed(0)
    model = getattr(transformers, f"{name}ForCausalLM")(config).eval()
    # Gemma's norms multiply by 1 + w.
    about = 0.0 if name.startswith("Gemma") else 1.0
    with torch.no_grad():
        for key, weights in model.named_parameters():
            spread = 0.3 if key.endswith("bias") or "norm" in key else 0.15
            weights.normal_(about if "norm" in key else 0.0, spread)
    return model


def torch_greedy(model: Any, ids: np.ndarray, steps: int) -> list[int]:
    """The most probable continuation of one prompt."""
    options = {"max_new_tokens": steps, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    tokens = torch.tensor(ids)
    with torch.no_grad():
        out = model.generate(tokens, attention_mask=torch.ones_like(tokens), **options)
    return out[0, ids.shape[1] :].tolist()


def torch_logits(model: Any, ids: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        return model(torch.tensor(ids)).logits.numpy()


def our_logits(params: Any, ids: np.ndarray, config: ModelConfig) -> np.ndarray:
    run = compiled(lambda params, ids: forward(params, ids, config=config, at="all").logits)
    return np.asarray(run(params, jnp.asarray(ids)))


IDS = np.random.default_rng(0).integers(0, 50, (1, LENGTH)).astype(np.int32)
