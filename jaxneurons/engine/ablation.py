"""Many ablations at once: what a model says after each prompt with each set of neurons off.

Controlled generation of arXiv 2502.17355, section 4: outputs are overridden with 0 everywhere.
Sets and prompts meet in batches of one shape, sets x prompts: few programs are compiled, the
weights are read once for many ablations, and a result is the same whatever it shares a batch with.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Array, Bool, Int

from jaxneurons.errors import DataError
from jaxneurons.model import finite
from jaxneurons.model.config import ModelConfig
from jaxneurons.model.generation import NO_TOKEN, greedy
from jaxneurons.model.token_ids import check_ids
from jaxneurons.neurons.sets import FFN, NeuronSet, site_width
from jaxneurons.prompts import batches


class Shape(NamedTuple):
    """How many sets and prompts meet in one batch."""

    sets: int
    prompts: int


def default_shape() -> Shape:
    """What keeps the platform busy."""
    return Shape(4, 16) if jax.default_backend() == "cpu" else Shape(8, 64)


@functools.partial(jax.jit, static_argnames=("config", "steps"))
def generate_ablated(
    params: Any,
    tokens: Int[Array, "prompt seq"],
    lengths: Int[Array, " prompt"],
    keep: dict[str, Bool[Array, "set layer width"]],
    *,
    config: ModelConfig,
    steps: int,
) -> Int[Array, "set prompt step"]:
    """Greedy continuations of right-padded prompts under each set of kept neurons.

    Sets together; one after the other where prompts are long (`batches.LENGTH_TOKENS`).
    """

    def one(keep: Any) -> Array:
        return greedy(params, tokens, config=config, lengths=lengths, steps=steps, scales=keep)

    if tokens.shape[1] > batches.LENGTH_TOKENS:
        return jax.lax.map(one, keep)
    return jax.vmap(one)(keep)


def kept(
    sets: Sequence[NeuronSet], config: ModelConfig, sites: Sequence[str] = ()
) -> dict[str, Bool[np.ndarray, "set layer width"]]:
    """By site, False where a set turns a neuron off; for `sites` and those of any set."""
    masks = {}
    for site in dict.fromkeys([*sites, *(site for each in sets for site in each.codes)]):
        masks[site] = np.ones((len(sets), config.num_layers, site_width(config, site)), bool)
        for number, each in enumerate(sets):
            layers, indices = each.pairs(site).T
            masks[site][number, layers, indices] = False
    return masks


def ablated(
    params: Any,
    sets: Sequence[NeuronSet],
    prompts: Sequence[Sequence[int]],
    *,
    config: ModelConfig,
    steps: int = 2,
    shape: Shape | None = None,
    sites: Sequence[str] = FFN,
    progress: Callable[[int], None] | None = None,
) -> Iterator[tuple[int, Int[np.ndarray, "prompt step"]]]:
    """Greedy continuations of every prompt with each set off; sets come out as they finish.

    Args:
      params: the model's parameters.
      sets: neurons to turn off; an empty set is the untouched model.
      prompts: token ids.
      config: the model's shape.
      steps: tokens to generate.
      shape: sets and prompts in a batch; default: what suits the platform.
      sites: sites that are masked in any case; fixes the program.
      progress: told how many generations have been added.

    Yields:
      Number of the set, and what follows each prompt.

    Raises:
      DataError: a set with neurons, or a prompt with tokens, that the model does not have; logits
        that are not finite.
    """
    for each in sets:
        each.check(config)
    for prompt in prompts:
        check_ids(prompt, config.vocab_size)
    shape = shape or default_shape()
    plan = batches.by_length(prompts, shape.prompts)
    for start in range(0, len(sets), shape.sets):
        group = list(sets[start : start + shape.sets])
        filled = group + [NeuronSet()] * (shape.sets - len(group))
        keep = kept(filled, config, sites)
        found = np.zeros((len(group), len(prompts), steps), np.int32)
        masks = jax.device_put(keep)
        for batch in plan:
            said = generate_ablated(
                params, batch.tokens, batch.lengths, masks, config=config, steps=steps
            )
            count = len(batch.index)
            said = np.asarray(said)[: len(group), :count]
            if (said == NO_TOKEN).any():
                raise _not_finite(params, batch, keep, said, start, config)
            found[:, batch.index] = said
            if progress is not None:
                progress(len(group) * count)
        yield from enumerate(found, start)


def _not_finite(
    params: Any,
    batch: batches.PromptBatch,
    keep: dict[str, np.ndarray],
    said: np.ndarray,
    start: int,
    config: ModelConfig,
) -> DataError:
    """The error of the first generation that came to no token."""
    number, row = (int(i) for i in np.argwhere((said == NO_TOKEN).any(-1))[0])
    before = said[number, row][: int(np.argmax(said[number, row] == NO_TOKEN))]
    tokens = np.concatenate([batch.tokens[row, : batch.lengths[row]], before])
    scales = {site: mask[number][:, None, None] for site, mask in keep.items()}
    where = finite.explain(params, tokens, config=config, scales=scales)
    prompt = int(batch.index[row]) + 1
    return DataError(f"prompt {prompt} with set {start + number + 1} off says nothing: {where}")
