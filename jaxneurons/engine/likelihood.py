"""Likelihood of texts: what a model with some neurons changed makes of every token."""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxneurons.engine.logits import logits_at_once
from jaxneurons.model import layers
from jaxneurons.model.axis_types import any_axes
from jaxneurons.model.config import ModelConfig
from jaxneurons.model.transformer import LowRankTerms, Params, Scales, forward
from jaxneurons.prompts import batches


@any_axes
@functools.partial(jax.jit, static_argnames=("config",))
def sentence_loss(
    params: Params,
    tokens: Int[Array, "sentence seq"],
    lengths: Int[Array, " sentence"],
    *,
    config: ModelConfig,
    scales: Scales | None = None,
    low_rank: LowRankTerms | None = None,
) -> Float[Array, " sentence"]:
    """Sum over a sentence's tokens, but the first, of -log p: natural logarithms.

    Perplexity is exp of a sum over sentences, divided by the number of tokens that are summed.

    Args:
      params: the model's parameters.
      tokens: right-padded sentences.
      lengths: tokens of each.
      config: the model's shape.
      scales: multipliers of neurons, as `forward` takes them: `NeuronSet.scales`.
      low_rank: terms beside the kernels, as `forward` takes them.
    """
    rows = {"lengths": lengths, "scales": scales, "low_rank": low_rank}
    out = forward(params, tokens, config=config, at="all", **rows)
    real = jnp.arange(1, tokens.shape[1]) < lengths[:, None]
    # Positions at once: never all of a long text, nor many of a large vocabulary.
    together = logits_at_once(config, batches.LENGTH_TOKENS, each=len(tokens))
    if tokens.shape[1] <= together:
        losses = token_loss(out.logits[:, :-1], tokens[:, 1:])
    else:
        losses = jax.lax.map(
            lambda position: token_loss(layers.unembed(params, position[0], config), position[1]),
            (out.final[:, :-1].swapaxes(0, 1), tokens[:, 1:].T),
            batch_size=together,
        ).T
    return jnp.sum(jnp.where(real, losses, 0), axis=-1)


def token_loss(
    logits: Float[Array, "*batch vocab"], tokens: Int[Array, "*batch"]
) -> Float[Array, "*batch"]:
    """-log p of each token under the logits of the position before it."""
    chosen = jnp.take_along_axis(logits, tokens[..., None], axis=-1)[..., 0]
    return jax.nn.logsumexp(logits, axis=-1) - chosen
