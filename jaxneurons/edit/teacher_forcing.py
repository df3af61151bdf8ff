"""Answers read by teacher forcing, from a layer up: what edits that are optimised are judged by.

A prompt runs together with all tokens of its answer but the last. An edit of layer l changes
nothing below it, so the stream that enters the layer is computed once and each step of an
optimisation runs the layers above only, at all positions, since edited parameters act at all.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from jaxneurons.model import layers, rotary
from jaxneurons.model.blockwise import causal_attention
from jaxneurons.model.config import ModelConfig
from jaxneurons.model.parameters import Params
from jaxneurons.prompts.batches import by_length


class Answers(NamedTuple):
    """Prompts with their answers, padded to one shape.

    Attributes:
      tokens: of the prompt and of its answer but the last.
      lengths: real tokens.
      positions: before each token of the answer.
      targets: the answer's tokens.
      real: which of them are no padding.
    """

    tokens: Int[Array, "*batch seq"]
    lengths: Int[Array, "*batch"]
    positions: Int[Array, "*batch answer"]
    targets: Int[Array, "*batch answer"]
    real: Bool[Array, "*batch answer"]


class Additions(NamedTuple):
    """Vectors that are added to rows of down kernels.

    Attributes:
      rows: which ones of each layer.
      vectors: what is added to them, float32; zeros change nothing.
    """

    rows: Int[Array, "layer row"]
    vectors: Float[Array, "layer row hidden"]


def answer_batches(
    prompts: Sequence[Sequence[int]], targets: Sequence[Sequence[int]], rows: int
) -> list[tuple[np.ndarray, Answers]]:
    """Prompts with answers in batches of few shapes, each with the indices of its first rows.

    Rows after those only fill the shape: they repeat the batch's first one.

    Args:
      prompts: ids.
      targets: ids of each one's answer.
      rows: of a batch, at most.
    """
    rows = min(rows, 1 << (len(prompts) - 1).bit_length())
    whole = [(*prompt, *target[:-1]) for prompt, target in zip(prompts, targets, strict=True)]
    batches = []
    for batch in by_length(whole, rows):
        filled = len(batch.tokens)
        padded = [*batch.index, *[batch.index[0]] * (filled - len(batch.index))]
        counts = np.array([len(targets[i]) for i in padded], np.int32)
        steps = np.arange(1 << (int(counts.max()) - 1).bit_length(), dtype=np.int32)
        real = steps < counts[:, None]
        answers = np.zeros(real.shape, np.int32)
        answers[real] = np.concatenate([targets[i] for i in padded])
        # Positions of padding are those of the last token.
        positions = (batch.lengths - counts)[:, None] + np.minimum(steps, counts[:, None] - 1)
        arrays = (batch.tokens, batch.lengths, positions, answers, real)
        batches.append((batch.index, Answers(*map(jnp.asarray, arrays))))
    return batches


LayerStep = Callable[..., tuple[Array, dict[str, Array]]]


def layer_step(
    params: Params, shape: tuple[int, ...], lengths: Int[Array, " batch"], *, config: ModelConfig
) -> LayerStep:
    """One layer at all positions: a function of the stream, the layer's index and multipliers.

    Args:
      params: the model's parameters.
      shape: of the tokens, [batch, seq].
      lengths: real tokens of each row, which some rotary angles depend on.
      config: the model's shape.

    Returns:
      A function of the stream [batch, seq, hidden] as it enters the layer, the layer's index and
      multipliers by site, which returns the stream as it leaves and the sites' activations.
    """
    positions = jnp.broadcast_to(jnp.arange(shape[1]), shape)
    angles = rotary.rope_angles(positions, config, lengths)

    def step(x: Array, index: Any, scales: Any = None) -> tuple[Array, dict[str, Array]]:
        kind = layers.layer_kind(config, index)
        return layers.block(
            layers.layer_params(params, index, config),
            x,
            config=config,
            rotate=lambda heads: rotary.rotate(heads, angles, kind.rope),
            attend=lambda q, k, v: causal_attention(
                q, k, v, positions, positions, kind.window, config
            ),
            scales=scales,
        )

    return step


def run_layers(
    params: Params,
    x: Float[Array, "batch seq hidden"],
    lengths: Int[Array, " batch"],
    *,
    config: ModelConfig,
    first: int = 0,
    end: int | None = None,
    scales: Mapping[str, Float[Array, "layer width"]] | None = None,
    additions: Additions | None = None,
) -> Float[Array, "batch seq hidden"]:
    """The stream after some of the layers.

    Args:
      params: the model's parameters.
      x: the stream as it enters layer `first`.
      lengths: real tokens of each row.
      config: the model's shape.
      first: the first layer that is run.
      end: the first one that is not; None: all are.
      scales: multipliers of the layers that are run, by site.
      additions: to rows of their down kernels.
    """
    end = config.num_layers if end is None else end
    step = layer_step(params, x.shape[:2], lengths, config=config)

    # Without this policy the backward pass would keep a copy of every layer's weights.
    keep = jax.checkpoint_policies.dots_saveable

    @functools.partial(jax.checkpoint, policy=keep, prevent_cse=False)
    def body(x: Array, index: Array, scales: Any, added: Additions | None) -> Array:
        y, activations = step(x, index, scales)
        if added is None:
            return y
        act = layers.read_by_down(activations, added.rows, config).astype(jnp.float32)
        change = jnp.einsum("bsr,rh->bsh", act, added.vectors)
        of_layer = layers.layer_params(params, index, config)
        return layers.change_down(of_layer, y, activations["down"], change, config)

    stacked = (jnp.arange(first, end), scales, additions)
    return jax.lax.scan(lambda x, layer: (body(x, *layer), None), x, stacked)[0]


@functools.partial(jax.jit, static_argnames=("config", "end"))
def entering(
    params: Params,
    tokens: Int[Array, "batch seq"],
    lengths: Int[Array, " batch"],
    *,
    config: ModelConfig,
    end: int,
) -> Float[Array, "batch seq hidden"]:
    """The stream as it enters layer `end`, at all positions."""
    x = layers.embed(params, tokens, config)
    return run_layers(params, x, lengths, config=config, end=end)


def answer_loss(
    params: Params,
    x: Float[Array, "seq hidden"],
    positions: Int[Array, " answer"],
    targets: Int[Array, " answer"],
    real: Bool[Array, " answer"],
    *,
    config: ModelConfig,
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """-log p of an answer, mean over its tokens, and log p of the whole of it, float32.

    Args:
      params: the model's parameters.
      x: the stream as it leaves the last layer.
      positions: before each token of the answer.
      targets: the tokens.
      real: which of them are no padding.
      config: the model's shape.
    """
    logits = layers.unembed(params, x[positions], config)
    chosen = jnp.take_along_axis(logits, targets[:, None], axis=-1)[:, 0]
    logp = jnp.where(real, chosen - jax.nn.logsumexp(logits, axis=-1), 0)
    return -jnp.sum(logp) / jnp.sum(real, dtype=jnp.float32), jnp.sum(logp)
