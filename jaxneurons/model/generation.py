"""Generation with neurons scaled, on a KV cache: the most probable token, or one that is drawn."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from jaxneurons.model import transformer
from jaxneurons.model.axis_types import any_axes
from jaxneurons.model.config import ModelConfig

NO_TOKEN = -1
"""Instead of a token where the logits are not finite."""
State = tuple[transformer.Cache | None, Int[Array, " batch"]]
"""What has been seen, and the token after it."""


@any_axes
def greedy(
    params: transformer.Params,
    tokens: Int[Array, "batch seq"],
    *,
    config: ModelConfig,
    lengths: Int[Array, " batch"],
    steps: int,
    scales: transformer.Scales | None = None,
    low_rank: transformer.LowRankTerms | None = None,
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
      low_rank: as `forward` takes it.
    """
    run = functools.partial(
        transformer.forward, params, config=config, scales=scales, low_rank=low_rank
    )
    cache = _room(params, tokens, config, steps)
    return _generate(run, tokens, cache, lambda x, _: x.argmax(-1), lengths=lengths, steps=steps)


@any_axes
def sample(
    params: transformer.Params,
    tokens: Int[Array, "batch seq"],
    key: Key[Array, ""],
    *,
    config: ModelConfig,
    lengths: Int[Array, " batch"],
    steps: int,
    allowed: Bool[Array, " vocab"] | None = None,
    scales: transformer.Scales | None = None,
) -> Int[Array, "batch step"]:
    """A continuation of each prompt, every token drawn from the model's distribution.

    Pure: the same key gives the same tokens. Where logits are not finite, a token is `NO_TOKEN`.

    Args:
      params: the parameters.
      tokens: prompts, right-padded.
      key: of `jax.random`; row and step are folded in.
      config: the model's shape.
      lengths: real tokens of each prompt.
      steps: tokens to generate.
      allowed: which tokens may be drawn; None: all.
      scales: as `greedy` takes them.
    """

    def draw(logits: Float[Array, "batch vocab"], step: Int[Array, ""]) -> Int[Array, " batch"]:
        if allowed is not None:
            logits = jnp.where(allowed, logits, -jnp.inf)
        rows = jax.vmap(jax.random.fold_in, (None, 0))(
            jax.random.fold_in(key, step), jnp.arange(len(logits))
        )
        return jax.vmap(jax.random.categorical)(rows, logits)

    run = functools.partial(transformer.forward, params, config=config, scales=scales)
    cache = _room(params, tokens, config, steps)
    return _generate(run, tokens, cache, draw, lengths=lengths, steps=steps)


def _room(
    params: transformer.Params, tokens: Int[Array, "batch seq"], config: ModelConfig, steps: int
) -> transformer.Cache:
    """An empty cache for prompts and all but the last of the steps after them."""
    batch, seq = tokens.shape
    dtype = params["embed"]["embedding"].dtype
    return transformer.init_cache(config, batch, seq + max(steps - 1, 0), dtype)


def _generate(
    run: Callable[..., transformer.Output],
    tokens: Int[Array, "batch seq"],
    cache: transformer.Cache,
    choose: Callable[[Array, Array], Array],
    *,
    lengths: Int[Array, " batch"],
    steps: int,
) -> Int[Array, "batch step"]:
    """Continuations whose tokens `choose` takes from logits and the number of the step."""

    def following(out: transformer.Output, step: Array) -> Array:
        logits = out.logits[:, 0]
        chosen = jnp.where(jnp.isfinite(logits).all(-1), choose(logits, step), NO_TOKEN)
        return chosen.astype(tokens.dtype)

    out = run(tokens, lengths=lengths, cache=cache)
    first = following(out, jnp.int32(0))

    def advance(state: State, step: Array) -> tuple[State, Array]:
        cache, last = state
        out = run(last[:, None], cache=cache)
        chosen = following(out, step)
        return (out.cache, chosen), chosen

    _, rest = jax.lax.scan(advance, (out.cache, first), jnp.arange(1, steps))
    return jnp.concatenate([first[:, None], rest.T], axis=1)
