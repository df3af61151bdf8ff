"""What a model says after prompts with neurons scaled: one set of them, or many at once.

Controlled generation of arXiv 2502.17355, section 4: outputs are overridden with 0 everywhere.
Sets and prompts meet in batches of one shape, sets x prompts: few programs are compiled, the
weights are read once for many ablations, and a result is the same whatever it shares a batch with.
"""

import dataclasses
import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

import jax
import numpy as np
from jaxtyping import Array, Float, Int

from jaxneurons.checkpoints.loading import LM
from jaxneurons.engine.device_memory import prompts_here
from jaxneurons.engine.out_of_memory import ChunkSize
from jaxneurons.errors import ConfigError, DataError
from jaxneurons.model import finite
from jaxneurons.model.axis_types import any_axes
from jaxneurons.model.config import ModelConfig
from jaxneurons.model.device_share import spread_batch
from jaxneurons.model.generation import NO_TOKEN, greedy
from jaxneurons.model.token_ids import check_ids
from jaxneurons.model.transformer import Params, Scales
from jaxneurons.neurons.sets import FFN, NeuronSet, check_site, site_width, stack_scales
from jaxneurons.prompts import batches
from jaxneurons.prompts.answers import encode_prompt
from jaxneurons.storage.printable import counted
from jaxneurons.storage.progress import Advance

if TYPE_CHECKING:
    import pyarrow

STEPS = 16
"""Tokens that `generate` and `ablate` add to a prompt by default."""
SHOWN = 8
"""Prompts that a `Generations` shows."""


class Shape(NamedTuple):
    """How many sets and prompts meet in one batch."""

    sets: int
    prompts: int


def default_shape(platform: str | None = None) -> Shape:
    """What keeps a platform (cpu, gpu, tpu; None: this one) busy."""
    return Shape(4, 16) if (platform or jax.default_backend()) == "cpu" else Shape(8, 64)


# --- token ids in, token ids out ------------------------------------------------------------------


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
            if lost := _first_lost(ids):
                number, row = lost
                of_set = {site: values[number] for site, values in scales.items()}
                where = _explain(params, batch, row, ids[number, row], config=config, scales=of_set)
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
    fit = prompts_here(params, config, prompts=sets * count, tokens=tokens + steps) // sets
    return np.asarray(chunk.run_rows(of_rows, count, axis=1, most=max(1, fit)))


def _first_lost(ids: np.ndarray) -> tuple[int, ...]:
    """Which generation is the first that came to no token, of [..., step]; (): none did."""
    lost = np.argwhere((ids == NO_TOKEN).any(-1))
    return tuple(lost[0].tolist()) if len(lost) else ()


def _explain(
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


# --- texts in, texts out --------------------------------------------------------------------------

_greedy = functools.partial(jax.jit, static_argnames=("config", "steps"))(greedy)


@any_axes
def generate(
    lm: LM, prompts: Sequence[str], *, steps: int = STEPS, scales: Scales | None = None
) -> list[str]:
    """What the model says after each prompt, its neurons scaled: greedily, token by token.

    Neurons are scaled at every position. A text ends where the model ends it, or after `steps`
    tokens.

    Args:
      lm: the model.
      prompts: texts.
      steps: tokens to generate.
      scales: multipliers by site: [layer, width], as `NeuronSet.scales` gives them, or
        [prompt, layer, width], for each prompt its own; default: the model untouched.

    Raises:
      ConfigError: steps below 1, prompts that are no list of texts, multipliers of another shape.
      DataError: a prompt that is empty, or leaves no room for the steps in the model's context;
        logits that are not finite.
    """
    tokens = _encoded(lm, prompts, steps)
    _check_scales(scales, lm.config, len(prompts))
    texts = [""] * len(prompts)
    chunk = ChunkSize(default_shape().prompts, what="prompts")
    for batch in batches.by_length(tokens, _shape(1, len(prompts)).prompts):
        count = len(batch.index)
        rows = np.concatenate([batch.index, np.repeat(batch.index[:1], len(batch.tokens) - count)])
        here = {
            site: values[rows] if values.ndim == 3 else values
            for site, values in (scales or {}).items()
        }

        def of_rows(
            first: int, end: int, batch: batches.PromptBatch = batch, here: Scales = here
        ) -> Array:
            rows = (batch.tokens[first:end], batch.lengths[first:end])
            some, lengths = spread_batch(lm.params, rows, config=lm.config)
            scales = {s: v[first:end] if v.ndim == 3 else v for s, v in here.items()}
            return _greedy(
                *(lm.params, some),
                config=lm.config,
                lengths=lengths,
                steps=steps,
                scales=scales or None,
            )

        filled, width = batch.tokens.shape
        fit = prompts_here(lm.params, lm.config, prompts=filled, tokens=width + steps)
        ids = np.asarray(chunk.run_rows(of_rows, filled, axis=0, most=fit))[:count]
        if lost := _first_lost(ids):
            (row,) = lost
            of_row = {s: v[row] if v.ndim == 3 else v for s, v in here.items()}
            where = _explain(
                lm.params, batch, row, ids[row], config=lm.config, scales=of_row or None
            )
            prompt = prompts[batch.index[row]]
            raise DataError(f"nothing can be generated after {prompt[:60]!r}: {where}")
        for row, index in enumerate(batch.index.tolist()):
            texts[index] = continuation(lm, tokens[index], ids[row].tolist())
    return texts


@dataclasses.dataclass(frozen=True, repr=False)
class Generations:
    """What a model says after prompts, untouched and with each of some sets of neurons off.

    `generations["name"]` are the texts with that set off, in the order of the prompts.

    Attributes:
      prompts: texts.
      untouched: what follows each prompt in the model as it is.
      off: by name of a set, what follows each prompt with its neurons off.
    """

    prompts: tuple[str, ...]
    untouched: tuple[str, ...]
    off: dict[str, tuple[str, ...]]

    def __getitem__(self, name: str) -> tuple[str, ...]:
        return self.off[name]

    def table(self) -> "pyarrow.Table":
        """A row for each set and prompt: `off` (the set's name), `prompt`, `untouched`, `text`."""
        import pyarrow

        rows = [
            {"off": name, "prompt": prompt, "untouched": untouched, "text": text}
            for name, texts in self.off.items()
            for prompt, untouched, text in zip(self.prompts, self.untouched, texts, strict=True)
        ]
        names = ("off", "prompt", "untouched", "text")
        schema = pyarrow.schema([(name, pyarrow.string()) for name in names])
        return pyarrow.Table.from_pylist(rows, schema=schema)

    def __repr__(self) -> str:
        width = max(map(len, ("untouched", *self.off)))
        prompts, sets = counted(len(self.prompts), "prompt"), counted(len(self.off), "set")
        lines = [f"{prompts}, untouched and with {sets} off"]
        for number, prompt in enumerate(self.prompts[:SHOWN]):
            lines.append(repr(prompt))
            for name, texts in {"untouched": self.untouched, **self.off}.items():
                lines.append(f"  {name:{width}}  {texts[number]!r}")
        if len(self.prompts) > SHOWN:
            lines.append(f"... and {len(self.prompts) - SHOWN} prompts more: see `table()`")
        return "\n".join(lines)


@any_axes
def ablate(
    lm: LM,
    prompts: Sequence[str],
    sets: Mapping[str, NeuronSet],
    *,
    steps: int = STEPS,
    progress: Advance | None = None,
) -> Generations:
    """What the model says after every prompt with each set of neurons off, many sets at once.

    As `generate` with `scales=neurons.scales(lm.config, 0)` for each set, and for none; faster.

    Args:
      lm: the model.
      prompts: texts.
      sets: neurons to turn off, by a name of yours.
      steps: tokens to generate.
      progress: called with how many generations have been added.

    Raises:
      ConfigError: steps below 1, prompts that are no list of texts, sets that are none.
      DataError: a prompt that is empty, or leaves no room for the steps in the model's context;
        neurons that the model does not have; logits that are not finite.
    """
    tokens = _encoded(lm, prompts, steps)
    if not isinstance(sets, Mapping):
        raise ConfigError(f"sets: NeuronSets by name are needed, got {sets!r:.80}")
    for name, members in sets.items():
        if not isinstance(members, NeuronSet):
            raise ConfigError(f"set {name!r}: a NeuronSet is needed, got {members!r}")
    untouched, *off = [NeuronSet(), *sets.values()]
    sites = tuple(dict.fromkeys(site for members in off for site in members.codes))
    generations = ablated(
        lm.params,
        [untouched, *off],
        tokens,
        config=lm.config,
        steps=steps,
        shape=_shape(1 + len(off), len(prompts)),
        sites=sites or FFN,
        progress=progress,
    )
    texts = [
        tuple(
            continuation(lm, prompt, row) for prompt, row in zip(tokens, ids.tolist(), strict=True)
        )
        for _, ids in generations
    ]
    return Generations(tuple(prompts), texts[0], dict(zip(sets, texts[1:], strict=True)))


def continuation(lm: LM, prompt: Sequence[int], generated: Sequence[int]) -> str:
    """Generated ids as the text that follows a prompt, up to the end-of-sequence token.

    Decoded behind the prompt: some tokenizers drop the space that a text begins with.
    """
    ids = list(generated)
    if lm.tokenizer.eos_token_id in ids:
        ids = ids[: ids.index(lm.tokenizer.eos_token_id)]

    def text(ids: list[int]) -> str:
        return str(lm.tokenizer.decode(ids, clean_up_tokenization_spaces=False))

    before, whole = text([*prompt]), text([*prompt, *ids])
    return whole[len(before) :] if whole.startswith(before) else text(ids)


def _shape(sets: int, prompts: int) -> Shape:
    """The default shape, and no larger than the next power of two of what there is."""
    most = default_shape()
    return Shape(
        min(most.sets, 1 << (sets - 1).bit_length()),
        min(most.prompts, 1 << max(0, prompts - 1).bit_length()),
    )


def _encoded(lm: LM, prompts: Sequence[str], steps: int) -> list[tuple[int, ...]]:
    if isinstance(prompts, str) or not all(isinstance(prompt, str) for prompt in prompts):
        raise ConfigError(f"prompts: a list of texts is needed, got {prompts!r}")
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
        raise ConfigError(f"steps must be at least 1, got {steps!r}")
    tokens = []
    for number, prompt in enumerate(prompts, 1):
        try:
            ids = encode_prompt(lm.tokenizer, prompt)
            check_ids(ids, lm.config.vocab_size, lm.tokenizer)
        except DataError as error:
            raise DataError(f"prompt {number}: {error}") from None
        if len(ids) + steps > lm.config.max_position:
            raise DataError(
                f"prompt {number}: {prompt[:60]!r} has {len(ids)} tokens and {steps} are generated "
                f"after it, the model's context holds {lm.config.max_position}"
            )
        tokens.append(ids)
    return tokens


def _check_scales(scales: Scales | None, config: ModelConfig, prompts: int) -> None:
    for site, values in (scales or {}).items():
        check_site(site)
        table = (config.num_layers, site_width(config, site))
        if np.shape(values) not in (table, (prompts, *table)):
            raise ConfigError(
                f"scales of site {site!r} are of shape {np.shape(values)}: [layer, width] = "
                f"{table} is needed, or [prompt, layer, width] = {(prompts, *table)}"
            )
