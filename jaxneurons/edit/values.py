"""Keys and values: where a fact is looked up, and what should be found there.

The key k* of a request is the mean of `act` at the subject's last token over its contexts: the
prompt alone, and after prefixes. The value v* is the mean of what stands there, unedited, plus the
delta of `optimising`. Sources: ROME, arXiv 2202.05262, section 3.1, where v is what the down
projection writes; MEMIT, arXiv 2210.07229, section 4.3, where it is the residual stream after the
layer. Both papers' code takes v after the prompt alone; here it is the mean over the contexts that
the key is a mean of, so that `v* - k* K` is the delta and nothing else.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float

from jaxneurons.edit.contexts import batch_size, batches, encode_contexts, name_of
from jaxneurons.edit.method import Optimisation, Trace
from jaxneurons.edit.optimising import Optimised, Place, optimise_batch
from jaxneurons.edit.prefixes import generate_prefixes
from jaxneurons.edit.requests import EditRequest
from jaxneurons.engine.out_of_memory import ChunkSize
from jaxneurons.errors import ConfigError, DataError
from jaxneurons.model.config import ModelConfig
from jaxneurons.model.parameters import Params
from jaxneurons.storage.progress import Progress
from jaxneurons.storage.settings import shorten

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclasses.dataclass(frozen=True, eq=False)
class Values:
    """Keys and values of requests at one layer, for methods that optimise the same thing.

    Attributes:
      layer: where the delta was added.
      place: what `initial` is.
      keys: k*.
      initial: unedited, v.
      delta: v* - v.
      trace: of the optimisation.
      optimisation: its settings.
      prefixes: texts that came before the prompts.
      requests: whose values they are.
    """

    layer: int
    place: Place
    keys: Float[np.ndarray, "request width"]
    initial: Float[np.ndarray, "request hidden"]
    delta: Float[np.ndarray, "request hidden"]
    trace: Trace
    optimisation: Optimisation
    prefixes: tuple[str, ...]
    requests: tuple[EditRequest, ...]

    @property
    def target(self) -> Float[np.ndarray, "request hidden"]:
        """v*, what is to stand there."""
        return self.initial + self.delta


def find_values(
    params: Params,
    requests: Sequence[EditRequest],
    *,
    config: ModelConfig,
    tokenizer: "PreTrainedTokenizerBase",
    layer: int,
    place: Place,
    optimisation: Optimisation,
    prefixes: Sequence[str] | None = None,
    progress: Progress | None = None,
) -> Values:
    """Keys and values of requests, each by itself on these parameters, optimised in batches.

    Args:
      params: the parameters.
      requests: what is to be edited.
      config: the model's shape.
      tokenizer: the model's.
      layer: whose down projection is to write the value.
      place: whose norm bounds the delta: ROME's "down" or MEMIT's "residual".
      optimisation: its settings.
      prefixes: texts to put before the prompts; None: as the settings say, by this model.
      progress: called with how many requests are done.

    Raises:
      DataError: a request that cannot be encoded, or whose key, value or loss is not finite.
      ConfigError: a layer that this model does not have.
    """
    check_layers((layer,), config)
    prefixes = prefixes_of(params, config, tokenizer, optimisation, prefixes)
    contexts = encode_contexts(tokenizer, requests, prefixes, config=config)
    rows: list[Any] = [None] * len(requests)
    done = 0
    size = batch_size(contexts, config)
    optimise = functools.partial(
        *(optimise_batch, params),
        config=config,
        layer=layer,
        place=place,
        optimisation=optimisation,
    )
    chunk = ChunkSize(size, what="requests")
    for batch in batches(contexts, size):
        result = chunk.run_rows(
            lambda first, end, whole=batch: optimise(whole.some(first, end)),
            len(batch.members),
            axis=0,
        )
        for n, i in enumerate(batch.members.tolist()):
            if i >= 0:
                rows[i] = Optimised(*(array[n] for array in result))
                done += 1
        if progress is not None:
            progress(done, len(requests))
    columns = [np.stack(column) for column in zip(*rows, strict=True)]
    _check_finite(requests, Optimised(*columns))
    keys, initial, delta, *trace = columns
    return Values(
        layer,
        place,
        keys,
        initial,
        delta,
        Trace(*trace),
        optimisation,
        tuple(prefixes),
        tuple(requests),
    )


def prefixes_of(
    params: Params,
    config: ModelConfig,
    tokenizer: "PreTrainedTokenizerBase",
    optimisation: Optimisation,
    prefixes: Sequence[str] | None,
    values: Values | None = None,
) -> tuple[str, ...]:
    """Texts to put before prompts: those given, else those of given values, else of this model."""
    if prefixes is not None:
        return tuple(prefixes)
    if values is not None:
        return values.prefixes
    if not optimisation.prefixes:
        return ()
    texts = generate_prefixes(
        params,
        tokenizer,
        config=config,
        count=optimisation.prefixes,
        lengths=optimisation.prefix_tokens,
        seed=optimisation.seed,
    )
    return tuple(texts)


def check_values(
    values: Values,
    requests: Sequence[EditRequest],
    *,
    layer: int,
    place: Place,
    optimisation: Optimisation,
    prefixes: Sequence[str],
) -> None:
    """Raise `DataError` for values that were found for something else than what is asked of them.

    That they were found on the same parameters is the caller's to see to.
    """
    for name, has, needs in (
        ("layer", values.layer, layer),
        ("place", values.place, place),
        ("optimisation", values.optimisation, optimisation),
        ("prefixes", values.prefixes, tuple(prefixes)),
        ("requests", values.requests, tuple(requests)),
    ):
        if has != needs:
            raise DataError(
                f"values= were found for other {name} ({shorten(has)}) than this edit needs "
                f"({shorten(needs)}); find them with these settings, or leave them out"
            )


def check_layers(layers_: Sequence[int], config: ModelConfig) -> None:
    """Raise `ConfigError` for a layer that the model does not have."""
    if wrong := [layer for layer in layers_ if not 0 <= layer < config.num_layers]:
        raise ConfigError(
            f"layer {wrong[0]} is not in this model, which has layers 0 to {config.num_layers - 1}"
        )


def _check_finite(requests: Sequence[EditRequest], values: Optimised) -> None:
    losses = np.take_along_axis(values.loss, np.asarray(values.steps)[:, None], axis=1)
    for name, array in (
        ("key", values.key),
        ("value", values.initial),
        ("loss", losses),
        ("edit", values.delta),
    ):
        bad = ~np.isfinite(np.asarray(array)).all(-1)
        if bad.any():
            raise DataError(
                f"request {name_of(requests[int(bad.argmax())])}: its {name} is not finite; "
                "float16 overflows in some models: load it in float32 or bfloat16; else lower the "
                "learning rate or the clamp of the optimisation"
            )
