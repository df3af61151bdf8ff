"""Any edited parameters as a patch: the smallest changes that make one model of the other."""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import ml_dtypes
import numpy as np

from jaxneurons.checkpoints.loading import LM
from jaxneurons.checkpoints.provenance import layer_values
from jaxneurons.edit.changes import (
    Change,
    LowRank,
    Multipliers,
    Rows,
    apply,
    site_kernel,
)
from jaxneurons.edit.experts import as_matrix, of_experts
from jaxneurons.edit.patch import Patch, make_patch
from jaxneurons.errors import DataError
from jaxneurons.model.axis_types import any_axes
from jaxneurons.model.config import ModelConfig
from jaxneurons.model.parameters import LAYERS, SITE_AXES, get, list_parameters
from jaxneurons.processes.sharing import fetch
from jaxneurons.storage.settings import check_argument

_MOST_RANK = 64
"""Of a low-rank change that is looked for; more is kept as rows."""


@any_axes
def diff(base: LM, edited: LM, *, keep_base: bool | None = None) -> Patch:
    """What differs between two models, as a patch of the first.

    Each kernel that differs is described by what takes the fewest numbers: neurons that were
    multiplied, a low-rank term that gives every entry to the rounding of its dtype, or rows that
    are set (exact in any case).

    Args:
      base: the model.
      edited: the same model with other parameters.
      keep_base: as `make_patch` takes it.

    Raises:
      DataError: models of different shapes or dtypes, equal ones, or a difference that no patch
        holds: in embeddings, norms, or biases apart from their neurons.
    """
    check_argument("base", LM, base)
    check_argument("edited", LM, edited)
    if base.config != edited.config:
        fields = [
            field.name
            for field in dataclasses.fields(ModelConfig)
            if getattr(base.config, field.name) != getattr(edited.config, field.name)
        ]
        raise DataError(f"the models are of different configurations: {', '.join(fields)}")
    if base.dtype != edited.dtype:
        raise DataError(
            f"the models are in {base.dtype.name} and {edited.dtype.name}: load both in one dtype"
        )
    changes = list(_changes(base, edited))
    _check_biases(base, edited, changes)
    if not changes:
        raise DataError("the models are equal: there is nothing to patch")
    facts = {"method": "diff", "edited": edited.values_hash}
    return make_patch(base, changes, facts=facts, keep_base=keep_base)


def _changes(base: LM, edited: LM) -> Iterator[Change]:
    config = base.config
    for parameter in list_parameters(config):
        path = parameter.path
        before, after = get(base.params, path), get(edited.params, path)
        if before is after or path[-1] == "bias":
            continue  # biases are looked at with their kernels
        module = ".".join(path[1:-1])
        if path[0] != LAYERS or path[-1] != "kernel":
            if not np.array_equal(fetch(before), fetch(after)):
                raise DataError(
                    f"{'.'.join(path)} differs: a patch holds changes of the layers' kernels only; "
                    "save the edited model instead"
                )
            continue
        for layer in range(config.num_layers):
            yield from _of_layer(base, edited, module, layer)


def _of_layer(base: LM, edited: LM, module: str, layer: int) -> Iterator[Change]:
    path = (LAYERS, *module.split("."), "kernel")
    parameter = next(p for p in list_parameters(base.config) if p.path == path)
    raw = [as_matrix(layer_values(get(lm.params, path), layer), parameter) for lm in (base, edited)]
    before, after = (values.astype(np.float32) for values in raw)
    changed = before.view(np.uint32) != after.view(np.uint32)
    if not changed.any():
        return
    if not np.isfinite(after).all():
        raise DataError(
            f"{module} of layer {layer} holds NaN or infinite numbers: the edit has failed"
        )
    rows = np.flatnonzero(changed.any(1)).astype(np.int32)
    columns = np.flatnonzero(changed.any(0)).astype(np.int32)
    multiplied = _multiplied(base, edited, module, layer, (before, after), (rows, columns))
    if multiplied is not None:
        yield multiplied
        return
    if of_experts(parameter) and parameter.axes[-1] != "hidden":
        raise DataError(
            f"{module} of layer {layer} differs otherwise than by multiplied neurons, and a patch "
            "holds no other changes of experts' input kernels; save the edited model instead"
        )
    most = len(rows) * before.shape[1] // sum(before.shape)
    most = 0 if of_experts(parameter) else most
    low_rank = _low_rank(before, after, raw[0].dtype, min(most, _MOST_RANK))
    if low_rank is not None:
        yield LowRank(module, layer, *low_rank)
    else:
        yield Rows(module, layer, rows, after[rows])


def _multiplied(
    base: LM, edited: LM, module: str, layer: int, kernels: Any, where: Any
) -> Multipliers | None:
    """Neurons of a site whose factors make one kernel of the other, bit for bit."""
    dtype = base.dtype
    for site in SITE_AXES:
        of_site, axis = site_kernel(site, base.config)
        if of_site != module:
            continue
        index = where[0] if axis == "input" else where[1]
        before, after = (k[index] if axis == "input" else k.T[index] for k in kernels)
        path = (LAYERS, *module.split("."), "bias")
        if axis == "output" and any(p.path == path for p in list_parameters(base.config)):
            biases = [
                layer_values(get(lm.params, path), layer).astype(np.float32)[index, None]
                for lm in (base, edited)
            ]
            before = np.concatenate([before, biases[0]], 1)
            after = np.concatenate([after, biases[1]], 1)
        factors = _factors(before, after, dtype)
        if factors is not None:
            layers = np.full(len(index), layer, np.int32)
            return Multipliers(site, layers, index, factors)
    return None


def _factors(before: np.ndarray, after: np.ndarray, dtype: np.dtype) -> np.ndarray | None:
    """[row]: what rows were multiplied by; None if they were not."""
    largest = np.abs(before).argmax(1)[:, None]
    denominator = np.take_along_axis(before, largest, 1)[:, 0]
    if not denominator.all():
        return None
    ratio = np.take_along_axis(after, largest, 1)[:, 0] / denominator
    factors = np.full(len(before), np.nan, np.float32)
    guesses = [ratio.round(digits).astype(np.float32) for digits in range(1, 7)]
    guesses += [ratio, *(np.nextafter(ratio, np.float32(to)) for to in (-np.inf, np.inf))]
    for guess in guesses:
        product = (before * guess[:, None]).astype(dtype).astype(np.float32)
        fits = (product.view(np.uint32) == after.view(np.uint32)).all(1) & np.isnan(factors)
        factors[fits] = guess[fits]
    return None if np.isnan(factors).any() else factors


def _low_rank(
    before: np.ndarray, after: np.ndarray, dtype: np.dtype, most: int
) -> tuple[np.ndarray, np.ndarray] | None:
    """The smallest term, of at most some rank, that gives the edited kernel to its rounding.

    By a random projection of the difference and its singular value decomposition (Halko et al.
    2011, arXiv 0909.4061): exact where the rank is as low as that, whatever the kernel's size.
    """
    if most < 1:
        return None
    delta = after.astype(np.float64) - before
    seeds = np.random.default_rng(0).normal(size=(delta.shape[1], most + 8))
    basis = np.linalg.qr(delta @ seeds)[0]
    basis = np.linalg.qr(delta @ (delta.T @ basis))[0]
    u, s, vt = np.linalg.svd(basis.T @ delta, full_matrices=False)
    u = basis @ u
    # Base, term and sum are each rounded: one step of the largest number that takes part.
    step = float(ml_dtypes.finfo(dtype).eps)
    allowed = step * np.maximum(np.maximum(np.abs(before), np.abs(after)), np.abs(delta).max())
    for rank in range(1, min(most, len(s)) + 1):
        if rank < len(s) and s[rank] > np.linalg.norm(allowed):
            continue
        left, right = (u[:, :rank] * s[:rank]).astype(np.float32), vt[:rank].astype(np.float32)
        made = before + left.astype(np.float64) @ right.astype(np.float64)
        if (np.abs(made - after) <= allowed).all():
            return left, right
    return None


def _check_biases(base: LM, edited: LM, changes: Sequence[Change]) -> None:
    """Raise if a bias differs otherwise than with its neurons."""
    made = apply(base.params, changes, config=base.config)
    for parameter in list_parameters(base.config):
        path = parameter.path
        if path[-1] != "bias" or np.array_equal(*(get(p, path) for p in (made, edited.params))):
            continue
        raise DataError(
            f"{'.'.join(path)} differs otherwise than with its neurons: a patch holds biases only "
            "of neurons that are multiplied; save the edited model instead"
        )
