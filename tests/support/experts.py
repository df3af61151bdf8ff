"""Tiny random mixtures of experts made by transformers, and the same model computed densely.

`dense_forward` is the oracle: every expert for every token, in plain arrays, with nothing of the
library in it.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
import transformers

from jaxneurons import ModelConfig, RopeConfig

SIZES: dict[str, Any] = {
    "vocab_size": 50,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "head_dim": 8,
    "rope_parameters": {"rope_theta": 500.0, "rope_type": "default"},
    "attn_implementation": "eager",
    "pad_token_id": None,
}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "mixtral": (
        "Mixtral",
        {"intermediate_size": 20, "num_local_experts": 4, "num_experts_per_tok": 2},
    ),
    "mixtral-window": (
        "Mixtral",
        {
            "intermediate_size": 20,
            "num_local_experts": 4,
            "num_experts_per_tok": 1,
            "sliding_window": 7,
        },
    ),
    "qwen3-moe": (
        "Qwen3Moe",
        {
            "intermediate_size": 99,
            "moe_intermediate_size": 12,
            "num_experts": 8,
            "num_experts_per_tok": 3,
            "norm_topk_prob": True,
        },
    ),
    "qwen3-moe-probabilities": (
        "Qwen3Moe",
        {
            "intermediate_size": 99,
            "moe_intermediate_size": 12,
            "num_experts": 8,
            "num_experts_per_tok": 3,
            "norm_topk_prob": False,
            "tie_word_embeddings": True,
        },
    ),
}


def make(name: str, **others: Any) -> Any:
    """A tiny model with weights so large that every part of it matters."""
    family, changes = MODELS[name]
    config = getattr(transformers, f"{family}Config")(**{**SIZES, **changes, **others})
    torch.manual_seed(0)
    model = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    with torch.no_grad():
        for key, weights in model.named_parameters():
            spread = 0.6 if key.endswith("mlp.gate.weight") else 0.2
            weights.normal_(1.0 if "norm" in key else 0.0, spread)
    return model


def config_of(model: Any) -> ModelConfig:
    """The configuration, by hand."""
    c = model.config
    qwen = c.model_type == "qwen3_moe"
    return ModelConfig(
        vocab_size=c.vocab_size,
        hidden_size=c.hidden_size,
        intermediate_size=c.moe_intermediate_size if qwen else c.intermediate_size,
        num_layers=c.num_hidden_layers,
        num_heads=c.num_attention_heads,
        num_kv_heads=c.num_key_value_heads,
        head_dim=c.head_dim,
        max_position=c.max_position_embeddings,
        norm_eps=c.rms_norm_eps,
        rope=RopeConfig(theta=500.0),
        tied=c.tie_word_embeddings,
        sliding_window=c.sliding_window,
        qk_norm="head" if qwen else None,
        experts=c.num_local_experts,
        experts_per_token=c.num_experts_per_tok,
        normalise_experts=c.norm_topk_prob if qwen else True,
        family=c.model_type,
    )


def params_of(model: Any) -> dict[str, Any]:
    """The parameters, by hand, from the fused tensors that the model has in memory."""
    state = {name: values.numpy() for name, values in model.state_dict().items()}
    count, width = model.config.num_hidden_layers, state["model.layers.0.mlp.experts.down_proj"]
    inner = width.shape[-1]

    def stack(name: str, change: Any = lambda x: x) -> jax.Array:
        return jnp.stack(
            [jnp.asarray(change(state[f"model.layers.{i}.{name}"])) for i in range(count)]
        )

    def kernel(name: str) -> dict[str, jax.Array]:
        return {"kernel": stack(f"{name}.weight", np.transpose)}

    both, swap = "mlp.experts.gate_up_proj", lambda x: np.swapaxes(x, 1, 2)
    attn = {name: kernel(f"self_attn.{name}_proj") for name in "qkvo"}
    if "model.layers.0.self_attn.q_norm.weight" in state:
        attn |= {f"{n}_norm": {"scale": stack(f"self_attn.{n}_norm.weight")} for n in "qk"}
    params = {
        "embed": {"embedding": jnp.asarray(state["model.embed_tokens.weight"])},
        "layers": {
            "attn_norm": {"scale": stack("input_layernorm.weight")},
            "attn": attn,
            "ffn_norm": {"scale": stack("post_attention_layernorm.weight")},
            "ffn": {
                "router": kernel("mlp.gate"),
                "gate": {"kernel": stack(both, lambda x: swap(x[:, :inner]))},
                "up": {"kernel": stack(both, lambda x: swap(x[:, inner:]))},
                "down": {"kernel": stack("mlp.experts.down_proj", swap)},
            },
        },
        "final_norm": {"scale": jnp.asarray(state["model.norm.weight"])},
    }
    if not model.config.tie_word_embeddings:
        params["unembed"] = {"kernel": jnp.asarray(state["lm_head.weight"].T)}
    return params


def dense_forward(
    params: Any,
    tokens: Any,
    config: ModelConfig,
    scale: Any = lambda site, layer, values: values,
) -> tuple[Any, dict[str, Any]]:
    """Logits [seq, vocab] of one prompt, and activations by site, [layer, seq, width].

    Every expert runs for every token; those that are not chosen count with weight 0.
    `scale` may change the activations [seq, width] at a site of a layer.
    """
    seq, heads, dim = len(tokens), config.num_heads, config.head_dim
    seen: dict[str, list[Any]] = {name: [] for name in ("up", "gate", "act", "down", "router")}

    def norm(x: Any, weight: Any) -> Any:
        return x / jnp.sqrt((x**2).mean(-1, keepdims=True) + config.norm_eps) * weight

    def turn(x: Any) -> Any:
        powers = config.rope.theta ** (-np.arange(0, dim, 2) / dim)
        angle = (np.arange(seq)[:, None] * powers)[:, None]
        a, b = x[..., : dim // 2], x[..., dim // 2 :]
        cos, sin = np.cos(angle), np.sin(angle)
        return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], -1)

    def site(name: str, layer: int, values: Any) -> Any:
        values = scale(name, layer, values)
        seen[name].append(values)
        return values

    gap = np.arange(seq)[:, None] - np.arange(seq)
    hidden = (gap < 0) | (gap >= (config.sliding_window or seq))
    x = params["embed"]["embedding"][jnp.asarray(tokens)]
    for layer in range(config.num_layers):
        p = jax.tree.map(lambda a, layer=layer: a[layer], params["layers"])
        h = norm(x, p["attn_norm"]["scale"])
        q, k, v = ((h @ p["attn"][n]["kernel"]).reshape(seq, -1, dim) for n in "qkv")
        if config.qk_norm:
            q, k = norm(q, p["attn"]["q_norm"]["scale"]), norm(k, p["attn"]["k_norm"]["scale"])
        q, k = turn(q), turn(k)
        k, v = (jnp.repeat(a, heads // config.num_kv_heads, axis=1) for a in (k, v))
        scores = jnp.einsum("qhd,khd->hqk", q, k) / np.sqrt(dim)
        weights = jax.nn.softmax(jnp.where(hidden, -jnp.inf, scores), -1)
        mixed = jnp.einsum("hqk,khd->qhd", weights, v).reshape(seq, -1)
        x = x + mixed @ p["attn"]["o"]["kernel"]
        h, ffn = norm(x, p["ffn_norm"]["scale"]), p["ffn"]
        odds = jax.nn.softmax(h @ ffn["router"]["kernel"], -1)
        best = jnp.argsort(-odds, axis=-1, stable=True)[:, : config.experts_per_token]
        chosen = jax.nn.one_hot(best, config.experts).sum(1)
        odds = odds * chosen
        if config.normalise_experts:
            odds = odds / odds.sum(-1, keepdims=True)
        seen["router"].append(odds)
        inside = jnp.repeat(chosen, config.intermediate_size, axis=-1)
        up, gate = (
            jnp.einsum("sh,ehw->sew", h, ffn[n]["kernel"]).reshape(seq, -1) for n in ("up", "gate")
        )
        up, gate = site("up", layer, up * inside), site("gate", layer, gate * inside)
        act = site("act", layer, up * gate / (1 + jnp.exp(-gate)))
        out = jnp.einsum(
            "sew,ewh,se->sh",
            act.reshape(seq, config.experts, -1),
            ffn["down"]["kernel"],
            odds,
        )
        x = x + site("down", layer, out)
    x = norm(x, params["final_norm"]["scale"])
    out = params["embed"]["embedding"].T if config.tied else params["unembed"]["kernel"]
    return x @ out, {name: jnp.stack(values) for name, values in seen.items()}
