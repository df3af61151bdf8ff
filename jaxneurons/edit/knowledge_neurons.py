"""Knowledge-neuron surgery: located neurons write the new answer instead of the old one.

Dai et al. 2022, arXiv 2104.08696 ("Updating Facts"): the output row of every located neuron loses
lambda1 times the old answer's word embedding and gains lambda2 times the new one's, with 1 and 8.
The paper leaves open in what unit; its published code scales either embedding to the norm of the
row first, and so does this (`unit="row"`). `unit="embedding"` takes the equation as it is printed.
An answer of several tokens stands with its first, which the model is to say after the prompt.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxneurons.edit.encoding import EncodedRequest, encode_request
from jaxneurons.edit.method import Edit, KnowledgeNeurons
from jaxneurons.edit.output_rows import OutputRows, output_rows, set_for_each
from jaxneurons.edit.requests import EditRequest
from jaxneurons.errors import DataError
from jaxneurons.model.config import ModelConfig
from jaxneurons.model.parameters import Params
from jaxneurons.neurons.sets import NeuronSet
from jaxneurons.processes.sharing import fetch
from jaxneurons.storage.progress import Progress

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def operate(
    params: Params,
    requests: Sequence[EditRequest],
    *,
    config: ModelConfig,
    tokenizer: "PreTrainedTokenizerBase",
    settings: KnowledgeNeurons,
    progress: Progress | None = None,
) -> Edit:
    """Surgery for all requests in one: a row changes by the sum of what its requests ask for.

    Nothing is optimised: `trace` is None.

    Args:
      params: the model's parameters.
      requests: what is to be edited; their old answers must be known.
      config: the model's shape.
      tokenizer: the model's.
      settings: of the method.
      progress: called with requests done and how many there are.

    Raises:
      DataError: no requests, one without `ground_truth` or that cannot be encoded, neurons that
        have no output row, or another number of sets than of requests.
    """
    sets, encoded = _prepare(requests, config, tokenizer, settings)
    rows = output_rows(functools.reduce(NeuronSet.__or__, sets), config)
    old = rows.values(params)
    new = old
    for number, (neurons, request) in enumerate(zip(sets, encoded, strict=True)):
        at = rows.places(output_rows(neurons, config))
        new = new.at[at].add(_difference(params, old[at], request, settings))
        if progress is not None:
            progress(number + 1, len(requests))
    return _edit(rows, new, settings)


def operate_each(
    params: Params,
    requests: Sequence[EditRequest],
    *,
    config: ModelConfig,
    tokenizer: "PreTrainedTokenizerBase",
    settings: KnowledgeNeurons,
    progress: Progress | None = None,
) -> list[Edit]:
    """Surgery for each request alone, on the parameters as they are; arguments as of `operate`.

    Raises:
      DataError: as `operate`.
    """
    sets, encoded = _prepare(requests, config, tokenizer, settings)
    edits = []
    for neurons, request in zip(sets, encoded, strict=True):
        rows = output_rows(neurons, config)
        old = rows.values(params)
        new = old + _difference(params, old, request, settings)
        edits.append(_edit(rows, new, dataclasses.replace(settings, neurons=neurons)))
        if progress is not None:
            progress(len(edits), len(requests))
    return edits


def _prepare(
    requests: Sequence[EditRequest],
    config: ModelConfig,
    tokenizer: "PreTrainedTokenizerBase",
    settings: KnowledgeNeurons,
) -> tuple[tuple[NeuronSet, ...], list[EncodedRequest]]:
    if not requests:
        raise DataError("no requests: give at least one fact to edit")
    encoded = [encode_request(tokenizer, request, config=config) for request in requests]
    for number, (request, ids) in enumerate(zip(requests, encoded, strict=True)):
        if not ids.ground_truth:
            raise DataError(
                f"request {request.id or number + 1!r} ({request.prompt[:60]!r}): the old answer "
                "is not known, and its embedding is to be subtracted; give ground_truth, or edit "
                "by another method"
            )
    return set_for_each(settings.neurons, len(requests)), encoded


def _difference(
    params: Params,
    rows: Float[Array, "row hidden"],
    ids: EncodedRequest,
    settings: KnowledgeNeurons,
) -> Float[Array, "row hidden"]:
    """What a request adds to rows."""
    embedding = params["embed"]["embedding"]
    answers = embedding[np.array([ids.ground_truth[0], ids.target[0]])].astype(jnp.float32)
    if settings.unit == "row":
        norms = jnp.linalg.norm(answers, axis=-1, keepdims=True)
        answers = answers / jnp.where(norms > 0, norms, 1)
    old, new = answers
    difference = settings.new * new - settings.old * old
    if settings.unit == "row":
        return jnp.linalg.norm(rows, axis=-1, keepdims=True) * difference
    return jnp.broadcast_to(difference, rows.shape)


def _edit(rows: OutputRows, values: Float[Array, "row hidden"], settings: KnowledgeNeurons) -> Edit:
    values = jnp.asarray(fetch(values))
    if not jnp.isfinite(values).all():
        raise DataError("the rows' new values are not finite: the model's weights may be damaged")
    return Edit(
        changes=rows.changes(values),
        settings=settings,
        trace=None,
        keys={},
        facts={"layers": np.unique(rows.layer).tolist(), "rows": len(rows.layer)},
    )
