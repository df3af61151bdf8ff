"""What a model says after prompts with neurons scaled: one set of them, or many at once.

Controlled generation of arXiv 2502.17355, section 4: outputs are overridden with 0 everywhere.
Sets and prompts meet in batches of one shape, sets x prompts: few programs are compiled, the
weights are read once for many ablations, and a result is the same whatever it shares a batch with.
"""

import functools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import jax
import numpy as np
from jaxtyping import Array, Float, Int

from jaxneurons.engine.device_memory import prompts_here
from jaxneurons.engine.out_of_memory import ChunkSize
from jaxneurons.errors import DataError
from jaxneurons.model import finite
from jaxneurons.model.axis_types import any_axes
from jaxneurons.model.config import ModelConfig
from jaxneurons.model.device_share import spread_batch
from jaxneurons.model.generation import NO_TOKEN, greedy
from jaxneurons.model.token_ids import check_ids
from jaxneurons.model.transformer import Params, Scales
from jaxneurons.neurons.sets import FFN, NeuronSet, stack_scales
from jaxneurons.prompts import batches
from jaxneurons.storage.progress import Advance


class Shape(NamedTuple):
    """How many sets and prompts meet in one batch."""

    sets: int
    prompts: int


def default_shape(platform: str | None = None) -> Shape:
    """What keeps a platform (cpu, gpu, tpu; None: this one) busy."""
    return Shape(4, 16) if (platform or jax.default_backend()) == "cpu" else Shape(8, 64)


@any_axes
@functools.partial(jax.jit, static_argnames=("config", "steps"))
def generate_ablated(
    params: Params,
    tokens: Int[Array, "prompt seq"],
    lengths: Int[Array, " prompt"],
    scales: dict[str, Float[Array, "set layer width"]],
    *,
    config: ModelConfig,
    steps: int,
) -> Int[Array, "set prompt step"]:
    """Greedy continuations of right-padded prompts under each set of multipliers.

    Sets together; one after the other where prompts are long (`batches.LENGTH_TOKENS`).
    """

    def continuations(scales: Scales) -> Array:
        return greedy(params, tokens, config=config, lengths=lengths, steps=steps, scales=scales)

    if tokens.shape[1] > batches.LENGTH_TOKENS:
        return jax.lax.map(continuations, scales)
    return jax.vmap(continuations)(scales)


@any_axes
def ablated(
    params: Params,
    sets: Sequence[NeuronSet],
    prompts: Sequence[Sequence[int]],
    *,
    config: ModelConfig,
    steps: int = 2,
    shape: Shape | None = None,
    sites: Sequence[str] = FFN,
    progress: Advance | None = None,
) -> Iterator[tuple[int, Int[np.ndarray, "prompt step"]]]:
    """Greedy continuations of every prompt with each set off; sets come out as they finish.

    Args:
      params: the model's parameters.
      sets: neurons to turn off; an empty set is the untouched model.
      prompts: token ids.
      config: the model's shape.
      steps: tokens to generate.
      shape: sets and prompts in a batch; default: what suits the platform.
      sites: sites that are scaled in any case; fixes the program.
      progress: called with how many generations have been added.

    Yields:
      Number of the set, and what follows each prompt.

    Raises:
      DataError: a set with neurons, or a prompt with tokens, that the model does not have; logits
        that are not finite.
    """
    for members in sets:
        members.check(config)
    for prompt in prompts:
        check_ids(prompt, config.vocab_size)
    shape = shape or default_shape()
    plan = batches.by_length(prompts, shape.prompts)
    chunk = ChunkSize(shape.prompts, what="prompts")
    sites = tuple(dict.fromkeys([*sites, *(site for members in sets for site in members.codes)]))
    for start in range(0, len(sets), shape.sets):
        group = list(sets[start : start + shape.sets])
        filled = group + [NeuronSet()] * (shape.sets - len(group))
        scales = stack_scales(filled, config, sites=sites)
        generated = np.zeros((len(group), len(prompts), steps), np.int32)
        on_device = jax.device_put(scales)
        for batch in plan:
            count = len(batch.index)
            ids = _generated(params, batch, on_device, config=config, steps=steps, chunk=chunk)
            ids = ids[: len(group), :count]
            if lost := first_lost(ids):
                number, row = lost
                of_set = {site: values[number] for site, values in scales.items()}
                where = explain_lost(
                    params, batch, row, ids[number, row], config=config, scales=of_set
                )
                raise DataError(
                    f"prompt {int(batch.index[row]) + 1} with set {start + number + 1} off "
                    f"says nothing: {where}"
                )
            generated[:, batch.index] = ids
            if progress is not None:
                progress(ids.shape[0] * count)
        yield from enumerate(generated, start)


def _generated(
    params: Params,
    batch: batches.PromptBatch,
    scales: dict[str, Array],
    *,
    config: ModelConfig,
    steps: int,
    chunk: ChunkSize,
) -> np.ndarray:
    """`generate_ablated` of a batch, in parts where memory does not hold all of it."""

    def of_rows(first: int, end: int) -> Array:
        rows = (batch.tokens[first:end], batch.lengths[first:end])
        rows = spread_batch(params, rows, config=config)
        return generate_ablated(params, *rows, scales, config=config, steps=steps)

    count, tokens = batch.tokens.shape
    # Where prompts are long, the sets come one after the other.
    sets = 1 if tokens > batches.LENGTH_TOKENS else max(map(len, scales.values()))
    fit, parts = prompts_here(params, config, prompts=count, tokens=tokens + steps, sets=sets)
    return np.asarray(chunk.run_rows(of_rows, count, axis=1, most=fit, parts=parts))


def first_lost(ids: np.ndarray) -> tuple[int, ...]:
    """Which generation is the first that came to no token, of [..., step]; (): none did."""
    lost = np.argwhere((ids == NO_TOKEN).any(-1))
    return tuple(lost[0].tolist()) if len(lost) else ()


def explain_lost(
    params: Params,
    batch: batches.PromptBatch,
    row: int,
    generated: np.ndarray,
    *,
    config: ModelConfig,
    scales: Scales | None,
) -> str:
    """Why a generation came to no token."""
    before = generated[: int(np.argmax(generated == NO_TOKEN))]
    tokens = np.concatenate([batch.tokens[row, : batch.lengths[row]], before])
    return finite.explain(params, tokens, config=config, scales=scales)
