"""Checkpoints -> parameters: every stored tensor into its place, by the table of `rules`."""

import dataclasses
import functools
import math
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jax.typing import DTypeLike

from jaxneurons.convert.rules import (
    DROPPABLE,
    EMBEDDING,
    UNEMBEDDING,
    Naming,
    TensorRule,
    rules_for,
    stored_names,
    tensor_name,
    unpermute,
)
from jaxneurons.errors import ConfigError, SourceError
from jaxneurons.model.config import ModelConfig
from jaxneurons.model.parameters import get, put
from jaxneurons.storage.progress import Advance

_ALIGNMENT = 64  # bytes
_CHUNK = 1 << 20  # values read at a time
_STRIP = 16  # rows transposed at a time: three times as fast as a thousand
THREADS = min(4, os.cpu_count() or 1)
"""That read and transpose; numpy and the file system leave each other room."""


@dataclasses.dataclass(frozen=True)
class Stored:
    """A tensor of a checkpoint: its shape is known before it is read.

    Attributes:
      name: its name in the file.
      shape: as stored, slowest axis first.
      read: returns some of its rows (a slice of axis 0).
    """

    name: str
    shape: tuple[int, ...]
    read: Callable[[slice], np.ndarray]


Plan = dict[str, tuple[Stored, TensorRule, int | None]]
Piece = tuple[Stored, int | None, slice]
"""Some rows of a stored tensor, and its layer."""


def match(
    config: ModelConfig, tensors: Iterable[Stored], *, naming: Naming, where: str
) -> tuple[Plan, Stored | None]:
    """Which stored tensor goes where, from names and shapes alone; arguments as of `fill`.

    A tied model that stores only its unembedding has that for its embedding.

    Returns:
      Every name of `stored_names` -> its tensor, rule and layer; the unembedding that a tied model
      stores beside its embedding.

    Raises:
      SourceError: a tensor is missing, left over, misshapen or stored twice.
    """
    tensors = list(tensors)
    if config.num_layers > len(tensors):
        raise SourceError(
            f"{where}: the configuration says {config.num_layers} layers, but there are only "
            f"{len(tensors)} tensors"
        )
    targets = stored_names(config, naming)
    embedding, unembedding = (tensor_name(path, naming) for path in (EMBEDDING, UNEMBEDDING))
    alone = config.tied and all(tensor.name != embedding for tensor in tensors)
    plan: Plan = {}
    left_over: list[str] = []
    duplicate: Stored | None = None
    for tensor in tensors:
        name = embedding if alone and tensor.name == unembedding else tensor.name
        if name in plan:
            raise SourceError(f"{where}: tensor {tensor.name} is stored twice")
        if name in targets:
            rule, layer = targets[name]
            if tuple(tensor.shape) != rule.stored_shape:
                raise SourceError(
                    f"{where}: tensor {tensor.name} has shape {tuple(tensor.shape)}, "
                    f"the configuration says {rule.stored_shape}"
                )
            plan[name] = (tensor, rule, layer)
        elif config.tied and name == unembedding:
            duplicate = tensor
        elif not DROPPABLE[naming].fullmatch(name):
            left_over.append(name)
    problems = []
    if missing := [name for name in targets if name not in plan]:
        problems.append(f"{len(missing)} tensors are missing: {_some(missing)}")
    if left_over:
        problems.append(f"{len(left_over)} tensors have no place: {_some(left_over)}")
    if problems:
        raise SourceError(f"{where}: " + "; ".join(problems))
    return plan, duplicate


def fill(
    config: ModelConfig,
    tensors: Iterable[Stored],
    *,
    naming: Naming,
    dtype: DTypeLike = jnp.float32,
    where: str,
    shardings: Any = None,
    progress: Advance | None = None,
) -> dict[str, Any]:
    """Copy a checkpoint into a fresh parameter tree, one stacked parameter at a time.

    Shapes are checked before anything is read; every parameter is filled exactly once; every
    stored tensor is used or known to carry nothing. A stored unembedding of a tied model must
    equal the embedding.

    Args:
      config: the model's shape.
      tensors: the checkpoint.
      naming: whose names they have.
      dtype: dtype of the parameters; stored values are cast.
      where: the checkpoint, for messages.
      shardings: where each parameter goes, nested as they are; default: the default device.
      progress: called with the bytes of every piece that has been read.

    Raises:
      SourceError: a tensor is missing, left over, misshapen, stored twice, or not finite.
      ConfigError: a dtype that parameters cannot have.
    """
    target_dtype = parameter_dtype(dtype)
    plan, duplicate = match(config, tensors, naming=naming, where=where)
    sources: dict[tuple[str, ...], list[tuple[Stored, int | None]]] = {}
    for tensor, rule, layer in plan.values():
        sources.setdefault(rule.path, []).append((tensor, layer))
    # Only the architecture "llama" stores the rows of each head interleaved.
    interleaved = naming == "gguf" and config.family == "llama"
    # One parameter at a time: beside what is on the devices, the host holds the largest of them.
    params: dict[str, Any] = {}
    with ThreadPoolExecutor(THREADS) as pool:
        for rule in rules_for(config):
            host = _aligned(rule.parameter.shape, target_dtype)
            heads = rule.rotary_heads if interleaved else None
            copy = functools.partial(_copy, host, rule, heads=heads, where=where)
            for nbytes in pool.map(copy, _pieces(sources[rule.path], whole=heads is not None)):
                if progress is not None:
                    progress(nbytes)
            if rule.path == EMBEDDING and duplicate is not None:
                _check_duplicate(duplicate, host, where)
            sharding = None if shardings is None else get(shardings, rule.path)
            put(params, rule.path, jax.device_put(host, sharding))
    return params


def _pieces(sources: list[tuple[Stored, int | None]], *, whole: bool) -> Iterator[Piece]:
    for tensor, layer in sources:
        for rows in _slices(tensor.shape, whole=whole):
            yield tensor, layer, rows


def _copy(
    host: np.ndarray, rule: TensorRule, piece: Piece, *, heads: int | None, where: str
) -> int:
    """Read a piece of a parameter into its place in `host`; returns the bytes read.

    `heads` are those whose rows are stored interleaved, if any; their tensors are read whole.
    """
    tensor, layer, rows = piece
    values = _read(tensor, rows, where)
    if heads is not None:
        values = unpermute(values, heads)
    target = host if layer is None else host[layer]
    place = target[:, rows] if rule.transposed else target[rows]
    _assign(place, values, tensor.name, where, transposed=rule.transposed)
    return values.nbytes


def _check_duplicate(duplicate: Stored, embedding: np.ndarray, where: str) -> None:
    """A stored unembedding of a tied model must be the embedding."""
    if duplicate.shape != embedding.shape or not all(
        np.array_equal(_read(duplicate, rows, where).astype(embedding.dtype), embedding[rows])
        for rows in _slices(duplicate.shape)
    ):
        raise SourceError(
            f"{where}: the configuration ties the unembedding to the embedding, but "
            f"{duplicate.name} differs from it; set tie_word_embeddings to false if the "
            "stored unembedding is meant"
        )


def _aligned(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """An empty array that a CPU device can adopt as it is: XLA copies what is not aligned."""
    nbytes = math.prod(shape) * dtype.itemsize
    raw = np.empty(nbytes + _ALIGNMENT, np.uint8)
    start = -raw.ctypes.data % _ALIGNMENT
    return raw[start : start + nbytes].view(dtype).reshape(shape)


def _slices(shape: tuple[int, ...], *, whole: bool = False) -> Iterator[slice]:
    """Rows to read at a time: bounded, so that no temporary array is large."""
    step = shape[0] if whole else max(1, _CHUNK // max(1, math.prod(shape[1:])))
    for start in range(0, shape[0], step):
        yield slice(start, min(start + step, shape[0]))


def _read(tensor: Stored, rows: slice, where: str) -> np.ndarray:
    """Read rows of a tensor and refuse what is not finite."""
    values = tensor.read(rows)
    if values.dtype.name not in ("float32", "float16", "bfloat16", "float64"):
        raise SourceError(
            f"{where}: tensor {tensor.name} has dtype {values.dtype.name}; only floating-point "
            "weights are read"
        )
    with np.errstate(all="ignore"):
        # A sum is not finite if any term is not; it is one pass without a temporary array.
        suspicious = not np.isfinite(values.sum(dtype=np.float32))
    if suspicious and not np.isfinite(values).all():
        raise SourceError(f"{where}: tensor {tensor.name} holds NaN or infinite values")
    return values


def parameter_dtype(dtype: DTypeLike) -> np.dtype:
    """The dtype, which must be one that parameters can have.

    Raises:
      ConfigError: it is not.
    """
    try:
        parsed = np.dtype(jnp.dtype(dtype))
    except (TypeError, ValueError):
        raise ConfigError(f"unknown dtype {dtype!r} (float32, bfloat16 or float16)") from None
    if parsed.name not in ("float32", "bfloat16", "float16"):
        raise ConfigError(
            f"parameters cannot have dtype {parsed.name} (float32, bfloat16, float16)"
        )
    return parsed


def transpose_into(target: np.ndarray, values: np.ndarray) -> None:
    """target[...] = values.T, a few rows of `values` at a time, which its caches can hold."""
    if target.dtype == values.dtype:  # plain integers are copied faster than bfloat16
        plain = np.dtype(f"u{target.dtype.itemsize}")
        target, values = target.view(plain), values.view(plain)
    for start in range(0, len(values), _STRIP):
        target[:, start : start + _STRIP] = values[start : start + _STRIP].T


def _assign(
    target: np.ndarray, values: np.ndarray, name: str, where: str, *, transposed: bool
) -> None:
    with np.errstate(over="ignore"):
        if transposed:
            transpose_into(target, values)
        else:
            target[...] = values
    narrower = ml_dtypes.finfo(target.dtype).max < ml_dtypes.finfo(values.dtype).max
    if narrower and not np.isfinite(target).all():
        raise SourceError(
            f"{where}: tensor {name} does not fit into {target.dtype.name}; load with "
            "dtype=float32 or bfloat16"
        )


def _some(names: list[str]) -> str:
    shown = ", ".join(names[:5])
    return shown + (", ..." if len(names) > 5 else "")
