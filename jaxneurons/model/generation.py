"""Greedy generation with neurons scaled, on a KV cache."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int, Shaped

from jaxneurons.model import transformer
from jaxneurons.model.config import ModelConfig

NO_TOKEN = -1
"""Instead of a token where the logits are not finite."""


def greedy(
    params: transformer.Params,
    tokens: Int[Array, "batch seq"],
    *,
    config: ModelConfig,
    lengths: Int[Array, " batch"],
    steps: int,
    scales: dict[str, Shaped[Array, "layer width"]] | None = None,
) -> Int[Array, "batch step"]:
    """The most probable continuation of each prompt, token by token.

    Neurons are scaled at every position, of the prompt and of what is generated. Pure: `jax.vmap`
    over `scales` runs many ablations at once. Where logits are not finite, a token is `NO_TOKEN`.

    Args:
      params: the parameters.
      tokens: prompts, right-padded.
      config: the model's shape.
      lengths: real tokens of each prompt.
      steps: tokens to generate.
      scales: by site, multipliers of every neuron (numbers, or False for off); absent = untouched.
    """
    batch, seq = tokens.shape
    dtype = params["embed"]["embedding"].dtype
    everywhere = None
    if scales is not None:
        everywhere = {site: values[:, None, None] for site, values in scales.items()}
    cache = transformer.init_cache(config, batch, seq + max(steps - 1, 0), dtype)
    run: Any = transformer.forward
    out = run(params, tokens, config=config, lengths=lengths, scales=everywhere, cache=cache)
    first = _likeliest(out.logits[:, 0]).astype(tokens.dtype)

    def step(state: Any, _: None) -> tuple[Any, Array]:
        cache, last = state
        out = run(params, last[:, None], config=config, scales=everywhere, cache=cache)
        following = _likeliest(out.logits[:, 0]).astype(last.dtype)
        return (out.cache, following), following

    _, rest = jax.lax.scan(step, (out.cache, first), None, length=steps - 1)
    return jnp.concatenate([first[:, None], rest.T], axis=1)


def _likeliest(logits: Array) -> Array:
    return jnp.where(jnp.isfinite(logits).all(-1), logits.argmax(-1), NO_TOKEN)
