"""What a model says after texts, untouched or with neurons scaled, and with sets of them off."""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import jax
import numpy as np
from jaxtyping import Array

from jaxneurons.checkpoints.loading import LM
from jaxneurons.engine.ablation import Shape, ablated, default_shape, explain_lost, first_lost
from jaxneurons.engine.device_memory import prompts_here
from jaxneurons.engine.out_of_memory import ChunkSize
from jaxneurons.errors import ConfigError, DataError
from jaxneurons.model.axis_types import any_axes
from jaxneurons.model.config import ModelConfig
from jaxneurons.model.device_share import spread_batch
from jaxneurons.model.generation import greedy
from jaxneurons.model.token_ids import check_ids
from jaxneurons.model.transformer import Scales
from jaxneurons.neurons.sets import FFN, NeuronSet, check_site, site_width
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
        fit, parts = prompts_here(lm.params, lm.config, prompts=filled, tokens=width + steps)
        ids = np.asarray(chunk.run_rows(of_rows, filled, axis=0, most=fit, parts=parts))[:count]
        if lost := first_lost(ids):
            (row,) = lost
            of_row = {s: v[row] if v.ndim == 3 else v for s, v in here.items()}
            where = explain_lost(
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
