"""Tiny random models of every shape, as plain parameters."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxneurons import ModelConfig, Transformer

TINY: dict[str, Any] = {
    "vocab_size": 48,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_layers": 3,
    "num_heads": 4,
    "num_kv_heads": 2,
    "head_dim": 8,
    "max_position": 128,
}


def tiny_config(**changes: Any) -> ModelConfig:
    return ModelConfig(**{**TINY, **changes})


def tiny_params(config: ModelConfig, seed: int = 0) -> dict[str, Any]:
    """Random parameters: real attention patterns, weighted norms, uneven answers."""
    rng = np.random.default_rng(seed)

    def draw(path: Any, x: jax.ShapeDtypeStruct) -> jax.Array:
        name = path[-1].key
        if name == "scale":
            values = rng.uniform(0.5, 1.5, x.shape) - config.norm_offset
        else:
            spread = 0.4 if name == "embedding" else 1.5 / np.sqrt(x.shape[-2])
            values = rng.normal(scale=spread, size=x.shape)
        return jnp.asarray(values, x.dtype)

    init = Transformer(config).init
    shapes: Any = jax.eval_shape(init, jax.random.key(0), jnp.zeros((1, 2), jnp.int32))
    return jax.tree_util.tree_map_with_path(draw, shapes["params"])


def random_tokens(config: ModelConfig, shape: tuple[int, ...], seed: int = 0) -> jax.Array:
    rng = np.random.default_rng(seed)
    return jnp.asarray(rng.integers(0, config.vocab_size, shape), jnp.int32)


def compiled(function: Callable[..., Any]) -> Any:
    """For tiny models, where compiling takes all the time: jit without LLVM's optimisations."""
    return jax.jit(function, compiler_options={"xla_backend_optimization_level": 0})
