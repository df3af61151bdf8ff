"""Tiny shapes that together use every option of a model's configuration but experts."""

import functools
from typing import Any

from support.models import tiny_config, tiny_params

from jaxneurons import RopeConfig

GEMMA: dict[str, Any] = {
    "activation": "gelu_tanh",
    "embed_scale": 32**0.5,
    "norm_offset": 1.0,
    "norm_eps": 1e-6,
    "post_norms": True,
    "query_scale": 0.3,
    "tied": True,
    "sliding_window": 3,
}
BUNDLES = {
    "gemma2": tiny_config(
        num_layers=4,
        attention_softcap=2.0,
        final_softcap=3.0,
        sliding_layers=(True, False, True, False),
        **GEMMA,
    ),
    "gemma3": tiny_config(
        num_layers=6,
        qk_norm="head",
        sliding_layers=(True,) * 5 + (False,),
        sliding_rope=RopeConfig(theta=100.0),
        rope=RopeConfig(theta=5000.0, rope_type="linear", factor=2.0),
        **GEMMA,
    ),
    "olmo2": tiny_config(pre_norms=False, post_norms=True, qk_norm="width"),
    "qwen3": tiny_config(qk_norm="head", head_dim=12, norm_eps=1e-6),
    "smollm3": tiny_config(num_layers=4, rotary_layers=(True, False, True, True), tied=True),
    "phi": tiny_config(
        rope=RopeConfig(
            rope_type="longrope",
            dim=6,
            original_max_position=10,
            short_divisors=(1.0, 1.5, 2.0),
            long_divisors=(2.0, 4.0, 8.0),
            attention_factor=1.2,
        )
    ),
}


@functools.cache
def params_of(name: str) -> Any:
    """Random parameters of a bundle, of a size at which every part of it matters."""
    return tiny_params(BUNDLES[name])
