"""How probable new answers are, before an edit and after it: for methods that optimise nothing."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import jax
import numpy as np
from jaxtyping import Float

from jaxneurons.edit.changes import Change
from jaxneurons.edit.encoding import encode_request
from jaxneurons.edit.measures import score_answers
from jaxneurons.edit.requests import EditRequest
from jaxneurons.model.config import ModelConfig
from jaxneurons.model.parameters import Params
from jaxneurons.processes.sharing import fetch

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_ROWS = 16
"""Prompts that are run together."""


def answer_probabilities(
    params: Params,
    requests: Sequence[EditRequest],
    changes: Sequence[Change] = (),
    *,
    config: ModelConfig,
    tokenizer: "PreTrainedTokenizerBase",
) -> Float[np.ndarray, " request"]:
    """The probability of each request's whole new answer after its prompt, teacher-forced.

    Args:
      params: the parameters.
      requests: whose targets are scored.
      changes: of an edit that is applied first.
      config: the model's shape.
      tokenizer: the model's.

    Raises:
      DataError: a request that cannot be encoded.
    """
    encoded = [encode_request(tokenizer, request, config=config) for request in requests]
    longest = max(len(ids.prompt) + len(ids.target) for ids in encoded)
    stacked = jax.tree.map(lambda array: np.asarray(array)[None], tuple(changes))
    logs = []
    for start in range(0, len(encoded), _ROWS):
        batch = encoded[start : start + _ROWS]
        rows = batch + batch[:1] * (min(_ROWS, len(encoded)) - len(batch))  # of one shape
        tokens = np.zeros((1, len(rows), longest), np.int32)
        answers = np.full((1, len(rows), max(len(ids.target) for ids in encoded)), -1, np.int32)
        for row, ids in enumerate(rows):
            whole = (*ids.prompt, *ids.target)
            tokens[0, row, : len(whole)] = whole
            answers[0, row, : len(ids.target)] = ids.target
        lengths = np.array([[len(ids.prompt) + len(ids.target) for ids in rows]], np.int32)
        starts = np.array([[len(ids.prompt) - 1 for ids in rows]], np.int32)
        scores = score_answers(params, stacked, tokens, lengths, starts, answers, config=config)
        logs.append(fetch(scores.log_probability)[0, : len(batch)])
    return np.exp(np.concatenate(logs).astype(np.float64))
