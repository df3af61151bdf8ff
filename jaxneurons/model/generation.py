"""Greedy generation with neurons scaled, on a KV cache."""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from jaxneurons.model import transformer
from jaxneurons.model.config import ModelConfig

NO_TOKEN = -1
"""Instead of a token where the logits are not finite."""
State = tuple[transformer.Cache | None, Int[Array, " batch"]]
"""What has been seen, and the token after it."""


def greedy(
    params: transformer.Params,
    tokens: Int[Array, "batch seq"],
    *,
    config: ModelConfig,
    lengths: Int[Array, " batch"],
    steps: int,
    scales: transformer.Scales | None = None,
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
      scales: by site, multipliers [layer, width] as `NeuronSet.scales` gives them, or
        [batch, layer, width], one set for each prompt; absent = untouched.
    """
    batch, seq = tokens.shape
    dtype = params["embed"]["embedding"].dtype
    cache = transformer.init_cache(config, batch, seq + max(steps - 1, 0), dtype)
    run = functools.partial(transformer.forward, params, config=config, scales=scales)
    out = run(tokens, lengths=lengths, cache=cache)
    first = _likeliest(out.logits[:, 0]).astype(tokens.dtype)

    def step(state: State, _: None) -> tuple[State, Array]:
        cache, last = state
        out = run(last[:, None], cache=cache)
        following = _likeliest(out.logits[:, 0]).astype(last.dtype)
        return (out.cache, following), following

    _, rest = jax.lax.scan(step, (out.cache, first), None, length=steps - 1)
    return jnp.concatenate([first[:, None], rest.T], axis=1)


def _likeliest(logits: Array) -> Array:
    return jnp.where(jnp.isfinite(logits).all(-1), logits.argmax(-1), NO_TOKEN)
