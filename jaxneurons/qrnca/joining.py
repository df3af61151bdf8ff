"""What joins a prompt and its answer, decided by the model where the texts leave two forms.

After "He bought a second-" a model says "hand", after "He said -" rather " no": no rule on
characters can tell. Where `answers.separators` leaves both forms, the one of higher probability is
taken: what the model would say is what its neurons are to be looked for.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Array

from jaxneurons.engine.device_memory import prompts_here
from jaxneurons.engine.out_of_memory import ChunkSize
from jaxneurons.errors import DataError
from jaxneurons.model.config import ModelConfig
from jaxneurons.model.parameters import Params
from jaxneurons.prompts import batches
from jaxneurons.prompts.answers import TokenPrompt, encode_query, separators
from jaxneurons.prompts.queries import Query
from jaxneurons.qrnca.method import run_prompts


def join(
    params: Params,
    tokenizer: Any,
    queries: Sequence[Query],
    *,
    config: ModelConfig,
    site: str = "up",
    wordings: int | None = None,
    batch_size: int | None = None,
) -> list[Query]:
    """The queries, with the separator stated wherever the texts leave two.

    Both forms of such an answer are read once by teacher forcing; of equal probabilities the
    likelier form of `answers.separators` is taken. Where there are options, the form in which all
    of them together are likelier: the right one has no say of its own. Nothing is run where nothing
    is left open.

    Args:
      params: the model's parameters.
      tokenizer: the model's.
      queries: as `queries.read_queries` reads them.
      config: the model's shape.
      site: whose activations `run_prompts` keeps: the same program as locating.
      wordings: of each query, the first so many; default: all.
      batch_size: as `batches.plan` takes it.
    """
    open_ends: list[tuple[int, int, str]] = []
    forms: list[TokenPrompt] = []
    for number, query in enumerate(queries):
        texts_of = zip(query.prompts[:wordings], query.answers[:wordings], strict=True)
        for wording, (prompt, answer) in enumerate(texts_of):
            if query.separator(wording) is not None or not (prompt.strip() and answer.strip()):
                continue
            between = separators(prompt, answer)
            texts = query.options[wording] or (answer,)
            for separator in between if len(between) > 1 else ():
                encoded = [
                    _encode(tokenizer, query, wording, text, separator, config) for text in texts
                ]
                usable = [form for form in encoded if form is not None]
                if len(usable) == len(texts):
                    open_ends += [(number, wording, separator)] * len(usable)
                    forms += usable
    chances: dict[tuple[int, int, str], float] = {}
    logps = _log_probabilities(params, forms, config=config, site=site, batch_size=batch_size)
    for place, logp in zip(open_ends, logps, strict=True):
        chances[place] = float(np.logaddexp(chances.get(place, -np.inf), logp))
    best: dict[tuple[int, int], tuple[float, str]] = {}
    for (number, wording, between), logp in chances.items():
        if (number, wording) not in best or logp > best[number, wording][0]:
            best[number, wording] = logp, between
    joined = list(queries)
    for (number, wording), (_, between) in best.items():
        query = joined[number]
        stated = list(query.separators) or [None] * len(query.prompts)
        stated[wording] = between
        joined[number] = dataclasses.replace(query, separators=tuple(stated))
    return joined


def _encode(
    tokenizer: Any, query: Query, wording: int, text: str, between: str, config: ModelConfig
) -> TokenPrompt | None:
    try:
        return encode_query(
            tokenizer,
            query.prompts[wording],
            text,
            separator=between,
            max_length=config.max_position,
            vocab_size=config.vocab_size,
        )
    except DataError:  # no tokens of its own in this form: an error when it is encoded
        return None


def _log_probabilities(
    params: Params,
    prompts: Sequence[TokenPrompt],
    *,
    config: ModelConfig,
    site: str,
    batch_size: int | None,
) -> list[float]:
    """Log-probability of each whole answer."""
    logps = np.zeros(len(prompts))
    planned = batches.plan(prompts, batch_size)
    chunk = ChunkSize(max((len(batch.index) for batch in planned), default=1), what="prompts")
    for batch in planned:

        def of_rows(first: int, end: int, batch: batches.Batch = batch) -> Array:
            part = batches.some(batch, first, end)
            return run_prompts(params, part, config=config, site=site).probability

        count, tokens = batch.tokens.shape
        fit, parts = prompts_here(params, config, prompts=count, tokens=tokens)
        p = chunk.run_rows(of_rows, count, axis=0, most=fit, parts=parts)
        p = np.maximum(np.asarray(p, np.float64), np.finfo(np.float64).tiny)
        real = batch.index >= 0
        logps[batch.index[real]] = np.log(p).sum(-1)[real]
    return logps.tolist()
