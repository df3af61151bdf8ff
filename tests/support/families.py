"""Tiny random models of every supported family, made by transformers, and logits of both sides."""

from typing import Any

import jax.numpy as jnp
import numpy as np
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


def torch_logits(model: Any, ids: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        return model(torch.tensor(ids)).logits.numpy()


def our_logits(params: Any, ids: np.ndarray, config: ModelConfig) -> np.ndarray:
    run = compiled(lambda params, ids: forward(params, ids, config=config, at="all").logits)
    return np.asarray(run(params, jnp.asarray(ids)))


IDS = np.random.default_rng(0).integers(0, 50, (1, LENGTH)).astype(np.int32)
