"""Checkpoints -> parameters: every stored tensor into its place, by the table of `rules`."""

import dataclasses
import functools
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jax.typing import DTypeLike

from jaxneurons.convert.blocks import (
    Block,
    Form,
    Reading,
    blocks_of,
    of_expert,
    put_into,
    readings,
    to_devices,
)
from jaxneurons.convert.rules import (
    EMBEDDING,
    FINAL_NORM,
    UNEMBEDDING,
    Naming,
    TensorRule,
    carries_nothing,
    fused_tensors,
    interleaves,
    rules_for,
    stored_names,
    stored_offset,
    tensor_name,
    text_part,
    unpermute,
)
from jaxneurons.errors import ConfigError, SourceError
from jaxneurons.model.config import ModelConfig
from jaxneurons.model.parameters import get, put
from jaxneurons.storage.progress import Advance

_MOST_BELOW_ZERO = 0.25
_STRIP = 16  # rows transposed at a time: three times as fast as a thousand
THREADS = min(4, os.cpu_count() or 1)
"""That read and transpose; numpy and the file system leave each other room."""


@dataclasses.dataclass(frozen=True)
class Stored:
    """A tensor of a checkpoint: its shape is known before it is read.

    Attributes:
      name: its name in the file.
      shape: as stored, slowest axis first.
      read: returns some of its rows (a slice of axis 0); with a second slice, which is left out
        where all are needed, some of their columns (of axis 1). Of a tensor of three axes the first
        two are one axis of rows.
      part_of: the stored tensor whose rows it is a part of, if it is not one itself.
    """

    name: str
    shape: tuple[int, ...]
    read: Callable[..., np.ndarray]
    part_of: str | None = None

    @property
    def label(self) -> str:
        """What messages call it: the tensor that files have."""
        return self.part_of or self.name


Plan = dict[str, tuple[Stored, TensorRule, int | None]]


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
    fused = fused_tensors(config, naming)
    tensors = list(_cut(_plainly_named(config, tensors, naming), fused, targets, where))
    embedding, unembedding = (tensor_name(path, naming) for path in (EMBEDDING, UNEMBEDDING))
    alone = config.tied and all(tensor.name != embedding for tensor in tensors)
    plan: Plan = {}
    left_over: list[str] = []
    duplicate: Stored | None = None
    for tensor in tensors:
        name = embedding if alone and tensor.name == unembedding else tensor.name
        if name in plan:
            raise SourceError(f"{where}: tensor {tensor.label} is stored twice")
        if name in targets:
            rule, layer = targets[name]
            _check_shape(tensor, rule.stored_shape, where)
            plan[name] = (tensor, rule, layer)
        elif config.tied and name == unembedding:
            duplicate = tensor
        elif not carries_nothing(name, config, naming):
            left_over.append(name)
    problems = []
    stored_as = fused_tensors(config, naming, written=True)
    inside = {part: name for name, parts in stored_as.items() for part in parts}
    missing = list(dict.fromkeys(inside.get(name, name) for name in targets if name not in plan))
    if missing:
        problems.append(f"{len(missing)} tensors are missing: {_some(missing)}")
    if left_over:
        problems.append(f"{len(left_over)} tensors have no place: {_some(left_over)}")
    if problems:
        raise SourceError(f"{where}: " + "; ".join(problems))
    return plan, duplicate


def _check_shape(tensor: Stored, shape: tuple[int, ...], where: str) -> None:
    if tuple(tensor.shape) != shape:
        raise SourceError(
            f"{where}: tensor {tensor.label} has shape {tuple(tensor.shape)}, "
            f"the configuration says {shape}"
        )


def _plainly_named(
    config: ModelConfig, tensors: Iterable[Stored], naming: Naming
) -> Iterator[Stored]:
    """The tensors of the text part, by the names that a model of text has."""
    part = text_part(config.family, naming)
    for tensor in tensors:
        name = tensor.name if part is None else part.name(tensor.name)
        if name is not None:
            yield tensor if name == tensor.name else dataclasses.replace(tensor, name=name)


def _cut(
    tensors: Iterable[Stored],
    fused: Mapping[str, tuple[str, ...]],
    targets: Mapping[str, tuple[TensorRule, int | None]],
    where: str,
) -> Iterator[Stored]:
    """Tensors, those that hold several in their parts."""
    for tensor in tensors:
        parts = fused.get(tensor.name)
        if parts is None:
            yield tensor
            continue
        shapes = [targets[part][0].stored_shape for part in parts]
        rows, first = sum(shape[0] for shape in shapes), targets[parts[0]][0]
        whole = (rows, *shapes[0][1:])
        if first.of_experts:
            experts = first.parameter.layer_shape[0]
            whole = (experts, rows // experts, *shapes[0][1:])
        _check_shape(tensor, whole, where)
        start = 0
        for name, shape in zip(parts, shapes, strict=True):
            read = functools.partial(_read_below, tensor.read, start)
            yield Stored(name, shape, read, part_of=tensor.name)
            start += shape[0]


def _read_below(
    read: Callable[..., np.ndarray], start: int, rows: slice, *columns: slice
) -> np.ndarray:
    """Read rows that are counted from a row on."""
    return read(slice(rows.start + start, rows.stop + start), *columns)


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
    equal the embedding. Of sharded parameters a process reads what its devices hold.

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
    sources: dict[tuple[Any, int | None], dict[int | None, Stored]] = {}
    for tensor, rule, layer in plan.values():
        sources.setdefault((rule.path, rule.expert), {})[layer] = tensor
    interleaved = interleaves(config, naming)
    if naming == "gguf" and config.norm_offset:
        _check_norms(plan[tensor_name(FINAL_NORM, naming)][0], where)
    # One parameter at a time: beside what is on the devices, the host holds the largest of them.
    params: dict[str, Any] = {}
    with ThreadPoolExecutor(THREADS) as pool:
        for rule in rules_for(config):
            shape = rule.parameter.shape
            sharding = None if shardings is None else get(shardings, rule.path)
            blocks = blocks_of(shape, target_dtype, sharding)
            heads = rule.rotary_heads if interleaved else None
            unit = 1 if heads is None else rule.stored_shape[0] // heads
            form = Form(rule.parameter.per_layer, rule.transposed, unit)
            offset = stored_offset(config, rule, naming)
            for expert in range(shape[1]) if rule.of_experts else (None,):
                parts = of_expert(blocks, expert)
                stored = sources[rule.path, expert]
                copy = functools.partial(_copy, parts, form, stored, offset=offset, where=where)
                for nbytes in pool.map(copy, readings(parts, form, rule.stored_shape)):
                    if progress is not None:
                        progress(nbytes)
            if rule.path == EMBEDDING and duplicate is not None:
                _check_duplicate(duplicate, blocks, shape, where)
            put(params, rule.path, to_devices(blocks, shape, sharding))
    return params


def _copy(
    blocks: Sequence[Block],
    form: Form,
    tensors: dict[int | None, Stored],
    reading: Reading,
    *,
    offset: float,
    where: str,
) -> int:
    """Read a piece of a stored tensor into its places in blocks; returns the bytes read.

    Where rows are read in units of more than one, they are heads, whose rows are interleaved.
    """
    tensor = tensors[reading.layer]
    values = _read(tensor, reading, where)
    if form.whole_rows > 1:
        values = unpermute(values, len(values) // form.whole_rows)
    if offset:
        values = values - np.float32(offset)
    assign = functools.partial(_assign, name=tensor.label, where=where, transposed=form.transposed)
    put_into(blocks, form, reading, values, assign)
    return values.nbytes


def _check_norms(tensor: Stored, where: str) -> None:
    """Refuse norms that lack the 1 that belongs to them in files: about half of their values are
    below zero, where a norm's factors are not.
    """
    values = tensor.read(slice(0, tensor.shape[0]))
    share = float(np.mean(values <= 0))
    if share > _MOST_BELOW_ZERO:
        raise SourceError(
            f"{where}: {share:.0%} of the values of tensor {tensor.name} are not above zero: norms "
            "of this architecture are stored with 1 added, which this file does not do; convert "
            "the model again with llama.cpp's convert_hf_to_gguf.py"
        )


def _check_duplicate(
    duplicate: Stored, blocks: Sequence[Block], shape: tuple[int, ...], where: str
) -> None:
    """A stored unembedding of a tied model must be the embedding."""
    form = Form(stacked=False, transposed=False)
    differ = duplicate.shape != shape

    def compare(place: np.ndarray, values: np.ndarray) -> None:
        nonlocal differ
        differ = differ or not np.array_equal(values.astype(place.dtype), place)

    for reading in () if differ else readings(blocks, form, shape):
        put_into(blocks, form, reading, _read(duplicate, reading, where), compare)
        if differ:
            break
    if differ:
        raise SourceError(
            f"{where}: the configuration ties the unembedding to the embedding, but "
            f"{duplicate.name} differs from it; set tie_word_embeddings to false if the "
            "stored unembedding is meant"
        )


def _read(tensor: Stored, reading: Reading, where: str) -> np.ndarray:
    """Read part of a tensor and refuse what is not finite."""
    columns = reading.columns
    if columns is None or (columns.start, columns.stop) == (0, tensor.shape[1]):
        values = tensor.read(reading.rows)
    else:
        values = tensor.read(reading.rows, columns)
    if values.dtype.name not in ("float32", "float16", "bfloat16", "float64"):
        raise SourceError(
            f"{where}: tensor {tensor.label} has dtype {values.dtype.name}; only floating-point "
            "weights are read"
        )
    with np.errstate(all="ignore"):
        # A sum is not finite if any term is not; it is one pass without a temporary array.
        suspicious = not np.isfinite(values.sum(dtype=np.float32))
    if suspicious and not np.isfinite(values).all():
        raise SourceError(f"{where}: tensor {tensor.label} holds NaN or infinite values")
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
