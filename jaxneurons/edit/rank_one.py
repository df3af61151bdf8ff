"""ROME: one rank-one term in one down kernel for each request (arXiv 2202.05262, section 3.1).

    K' = K + outer(C^-1 k*, v* - k* K) / (k*^T C^-1 k*)

maps k* to v* and changes as little as can be of what keys of covariance C map to (their appendix
A). With the identity in place of C, as public settings for Llama in fact have it, it changes as
little as can be of K itself.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from jaxneurons.edit.changes import apply
from jaxneurons.edit.contexts import name_of
from jaxneurons.edit.covariance import Covariance
from jaxneurons.edit.experts import check_one_kernel
from jaxneurons.edit.method import ROME, Edit, Trace, default_layer
from jaxneurons.edit.requests import EditRequest
from jaxneurons.edit.solving import (
    Spread,
    check_updates,
    covariance_of,
    inverse_of,
    low_rank,
    regular,
)
from jaxneurons.edit.values import Values, check_layers, check_values, find_values, prefixes_of
from jaxneurons.errors import DataError
from jaxneurons.model.config import ModelConfig
from jaxneurons.model.parameters import Params
from jaxneurons.storage.progress import Progress

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def layers_of(settings: ROME, config: ModelConfig) -> tuple[int, ...]:
    """The layer that is edited."""
    check_one_kernel(config, "ROME")
    return (default_layer(config) if settings.layer is None else settings.layer,)


def values_of(
    params: Params,
    requests: Sequence[EditRequest],
    *,
    config: ModelConfig,
    tokenizer: "PreTrainedTokenizerBase",
    settings: ROME,
    prefixes: Sequence[str] | None = None,
    progress: Progress | None = None,
) -> Values:
    """Keys and values of requests, each alone on these parameters."""
    (layer,) = layers_of(settings, config)
    return find_values(
        params,
        requests,
        config=config,
        tokenizer=tokenizer,
        layer=layer,
        place="down",
        optimisation=settings.optimisation,
        prefixes=prefixes,
        progress=progress,
    )


def rome(
    params: Params,
    requests: Sequence[EditRequest],
    *,
    config: ModelConfig,
    tokenizer: "PreTrainedTokenizerBase",
    settings: ROME,
    covariance: Mapping[int, Covariance] | None = None,
    values: Values | None = None,
    prefixes: Sequence[str] | None = None,
    progress: Progress | None = None,
) -> Edit:
    """Requests one after the other, each on the parameters that those before it edited.

    Raises:
      DataError: see `edit`; values that were found before, of more than one request: those of the
        second depend on the first.
    """
    if values is not None and len(requests) > 1:
        raise DataError(
            "ROME finds the values of a request on what those before it edited; values= serves one "
            "request at a time, or edit_each"
        )
    (layer,) = layers_of(settings, config)
    texts = prefixes_of(params, config, tokenizer, settings.optimisation, prefixes, values)
    spread, facts = _spread(settings, layer, covariance, config)
    edited, columns, rows, traces = params, [], [], []
    for n, request in enumerate(requests):
        of_request = values or values_of(
            edited,
            [request],
            config=config,
            tokenizer=tokenizer,
            settings=settings,
            prefixes=texts,
        )
        _check(of_request, [request], layer, settings, texts)
        left, right = _terms(of_request, spread)
        edited = apply(edited, [low_rank(layer, left, right)], config=config)
        columns.append(left)
        rows.append(right)
        traces.append(of_request.trace)
        if progress is not None:
            progress(n + 1, len(requests))
    change = low_rank(layer, np.concatenate(columns, axis=1), np.concatenate(rows))
    trace = Trace(*(np.concatenate(arrays) for arrays in zip(*traces, strict=True)))
    return Edit((change,), settings, trace, {}, {**facts, "prefixes": list(texts)})


def rome_each(
    params: Params,
    requests: Sequence[EditRequest],
    *,
    config: ModelConfig,
    tokenizer: "PreTrainedTokenizerBase",
    settings: ROME,
    covariance: Mapping[int, Covariance] | None = None,
    values: Values | None = None,
    prefixes: Sequence[str] | None = None,
    progress: Progress | None = None,
) -> list[Edit]:
    """Every request alone, on the parameters as they are; see `edit_each`."""
    (layer,) = layers_of(settings, config)
    texts = prefixes_of(params, config, tokenizer, settings.optimisation, prefixes, values)
    spread, facts = _spread(settings, layer, covariance, config)
    values = values or values_of(
        params,
        requests,
        config=config,
        tokenizer=tokenizer,
        settings=settings,
        prefixes=texts,
        progress=progress,
    )
    _check(values, requests, layer, settings, texts)
    left, right = _terms(values, spread)
    facts = {**facts, "prefixes": list(texts)}
    edits = []
    for n in range(len(requests)):
        one = slice(n, n + 1)
        change = low_rank(layer, left[:, one], right[one])
        trace = Trace(*(array[one] for array in values.trace))
        edits.append(Edit((change,), settings, trace, {}, facts))
    return edits


def _check(
    values: Values,
    requests: Sequence[EditRequest],
    layer: int,
    settings: ROME,
    prefixes: Sequence[str],
) -> None:
    check_values(
        values,
        requests,
        layer=layer,
        place="down",
        optimisation=settings.optimisation,
        prefixes=prefixes,
    )


def _spread(
    settings: ROME,
    layer: int,
    covariance: Mapping[int, Covariance] | None,
    config: ModelConfig,
) -> tuple[Spread, dict[str, Any]]:
    """C^-1 as an operator, and what a patch records of it."""
    check_layers((layer,), config)
    facts: dict[str, Any] = {"layers": [layer], "seed": settings.optimisation.seed}
    if settings.covariance == "identity":
        return lambda keys: keys, {**facts, "covariance": "identity"}
    of_layer = covariance_of(covariance, layer, config)
    of_layer = regular(of_layer)
    facts["covariance"] = {str(layer): {**of_layer.identity, "ridge": of_layer.ridge}}
    return inverse_of(of_layer), facts


def _terms(values: Values, spread: Spread) -> tuple[np.ndarray, np.ndarray]:
    """Columns and rows of the rank-one terms of requests, each alone.

    Raises:
      DataError: a request whose key has no length by C^-1, or whose term is not finite.
    """
    keys = np.asarray(values.keys, np.float64).T
    directions = spread(keys)
    lengths = (keys * directions).sum(0)
    if (bad := ~(np.isfinite(lengths) & (lengths > 0))).any():
        n = int(bad.argmax())
        raise DataError(
            f"request {name_of(values.requests[n])}: its key has a squared length of "
            f"{lengths[n]:g} by the covariance of layer {values.layer}, so nothing can be "
            "written there; edit another layer"
        )
    left, right = directions / lengths, np.asarray(values.delta, np.float64)
    check_updates(values.requests, left, right, values.layer)
    return left, right
