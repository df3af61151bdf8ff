"""How files state mixtures of experts: keys of configurations, tensors that hold all experts."""

from typing import Any

from jaxneurons.convert.family import Fused
from jaxneurons.convert.keys import Keys
from jaxneurons.model.config import ModelConfig

_GATE, _UP, _DOWN = "layers.ffn.gate", "layers.ffn.up", "layers.ffn.down"

ROUTER = "layers.ffn.router"
FUSED = (
    Fused("model.layers.{i}.mlp.gate.weight", (ROUTER,), written=False),
    Fused(
        "model.layers.{i}.mlp.experts.gate_up_proj", (_GATE, _UP), of_experts=True, written=False
    ),
    Fused("model.layers.{i}.mlp.experts.down_proj", (_DOWN,), of_experts=True, written=False),
)
"""Tensors as transformers 5 has them in memory; it saves those of each expert."""

GGUF_FUSED = (
    Fused("blk.{i}.ffn_gate_exps.weight", (_GATE,), of_experts=True),
    Fused("blk.{i}.ffn_up_exps.weight", (_UP,), of_experts=True),
    Fused("blk.{i}.ffn_down_exps.weight", (_DOWN,), of_experts=True),
)
"""Tensors of GGUF files; those of early 2024 have one for each expert."""

GGUF_NAMES = {ROUTER: "blk.{i}.ffn_gate_inp"}

_TRAINING = ("router_aux_loss_coef", "router_jitter_noise", "output_router_logits")
"""Keys of the loss that balances experts, and of noise in training."""


def read_experts(keys: Keys, *, experts: int, chosen: int) -> dict[str, Any]:
    """How many experts there are and how many a token runs.

    Args:
      keys: of a config.json.
      experts: how many there are, where neither of the two names of the key is stated.
      chosen: how many a token runs, where it is not stated.
    """
    stated = {
        key: keys.integer(key) for key in ("num_local_experts", "num_experts") if key in keys.left
    }
    if len({*stated.values()}) > 1:
        raise keys.error("num_experts", stated["num_experts"], "contradicts num_local_experts")
    count = next(iter(stated.values()), experts)
    if count is None or count <= 0:
        raise keys.error("num_experts", count, "a model of this type has experts")
    for key in _TRAINING:
        keys.left.pop(key, None)
    return {"experts": count, "experts_per_token": keys.integer("num_experts_per_tok", chosen)}


def read_gguf_experts(keys: Keys) -> dict[str, Any]:
    """The fields of a file's experts; none, if it has none."""
    count = keys.integer("expert_count") or 0
    chosen = keys.integer("expert_used_count") or 0
    if not count:
        if chosen:
            raise keys.error("expert_used_count", chosen, "there are no experts to use")
        return {}
    if not chosen:
        why = "expert_used_count has to say how many of them a token runs"
        raise keys.error("expert_count", count, why)
    # What llama.cpp computes for these architectures, whatever else a file might say.
    for key, only in (
        ("expert_gating_func", 1),
        ("expert_weights_norm", True),
        ("expert_weights_scale", 1.0),
        ("expert_group_count", 0),
    ):
        value = keys.left.pop(key, only)
        if value not in (only, 0.0 if key == "expert_weights_scale" else only):
            raise keys.error(key, value, f"only {only!r} is supported")
    return {"experts": count, "experts_per_token": chosen, "normalise_experts": True}


def write_experts(config: ModelConfig, key: str) -> dict[str, Any]:
    """The keys of experts; `key` says how many there are."""
    return {key: config.experts, "num_experts_per_tok": config.experts_per_token}
