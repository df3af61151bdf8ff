"""One table of parameter names, shapes and reshapes, for Hugging Face and GGUF checkpoints.

Parameters are a nested dict of arrays: layers stacked on axis 0, kernels [in, out] (checkpoints
store them [out, in]). `fill` copies a checkpoint into it, tensor by tensor, and accounts for every
tensor on both sides.
"""

import dataclasses
import functools
import math
import os
import re
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jax.typing import DTypeLike

from jaxneurons.config import ModelConfig
from jaxneurons.errors import ConfigError, SourceError

Naming = Literal["hf", "gguf"]
Progress = Callable[[int], None]
"""Told bytes as they pass."""
Place = Callable[[ModelConfig], Any]
"""A `Sharding` for every parameter, nested as they are."""

_ALIGNMENT = 64  # bytes
_CHUNK = 1 << 20  # values read at a time
_STRIP = 16  # rows transposed at a time: three times as fast as a thousand
THREADS = min(4, os.cpu_count() or 1)
"""That read and transpose; numpy and the file system leave each other room."""


@dataclasses.dataclass(frozen=True)
class Rule:
    """Where one parameter lives in each format.

    Attributes:
      path: keys in the parameter tree.
      hf: name in a Hugging Face checkpoint, `{i}` = layer.
      gguf: name in a GGUF file of architecture "llama".
      dims: the axes of the parameter of one layer, as names that `dimensions` resolves.
      transposed: stored with its two axes swapped.
      rotary: the dimension that counts this projection's heads, if GGUF stores the rows of each
        head interleaved for rotary embedding.
    """

    path: tuple[str, ...]
    hf: str
    gguf: str
    dims: tuple[str, ...]
    transposed: bool = False
    rotary: str | None = None

    @property
    def per_layer(self) -> bool:
        """Stacked over layers."""
        return self.path[0] == "layers"


def _kernel(
    block: str, name: str, hf: str, gguf: str, dims: tuple[str, str], rotary: str | None = None
) -> Rule:
    return Rule(
        path=("layers", block, name, "kernel"),
        hf=f"model.layers.{{i}}.{hf}.weight",
        gguf=f"blk.{{i}}.{gguf}.weight",
        dims=dims,
        transposed=True,
        rotary=rotary,
    )


def _bias(block: str, name: str) -> Rule:
    """The bias beside a kernel: same names, its outputs' axis, never transposed."""
    kernel = next(rule for rule in RULES if rule.path[1:3] == (block, name))
    return dataclasses.replace(
        kernel,
        path=("layers", block, name, "bias"),
        hf=kernel.hf.removesuffix("weight") + "bias",
        gguf=kernel.gguf.removesuffix("weight") + "bias",
        dims=kernel.dims[1:],
        transposed=False,
    )


def _norm(name: str, hf: str, gguf: str) -> Rule:
    return Rule(
        path=("layers", name, "scale"),
        hf=f"model.layers.{{i}}.{hf}.weight",
        gguf=f"blk.{{i}}.{gguf}.weight",
        dims=("hidden",),
    )


RULES: tuple[Rule, ...] = (
    Rule(
        ("embed", "embedding"),
        "model.embed_tokens.weight",
        "token_embd.weight",
        ("vocab", "hidden"),
    ),
    _norm("attn_norm", "input_layernorm", "attn_norm"),
    _kernel("attn", "q", "self_attn.q_proj", "attn_q", ("hidden", "query"), rotary="heads"),
    _kernel("attn", "k", "self_attn.k_proj", "attn_k", ("hidden", "kv"), rotary="kv_heads"),
    _kernel("attn", "v", "self_attn.v_proj", "attn_v", ("hidden", "kv")),
    _kernel("attn", "o", "self_attn.o_proj", "attn_output", ("query", "hidden")),
    _norm("ffn_norm", "post_attention_layernorm", "ffn_norm"),
    _kernel("ffn", "gate", "mlp.gate_proj", "ffn_gate", ("hidden", "inner")),
    _kernel("ffn", "up", "mlp.up_proj", "ffn_up", ("hidden", "inner")),
    _kernel("ffn", "down", "mlp.down_proj", "ffn_down", ("inner", "hidden")),
    Rule(("final_norm", "scale"), "model.norm.weight", "output_norm.weight", ("hidden",)),
)
UNEMBED = Rule(
    ("unembed", "kernel"), "lm_head.weight", "output.weight", ("hidden", "vocab"), transposed=True
)

# Stored tensors that carry nothing: tables which the model computes from its configuration.
DROPPABLE: dict[str, re.Pattern[str]] = {
    "hf": re.compile(r"(model\.layers\.\d+\.self_attn|model)\.rotary_emb\.inv_freq"),
    "gguf": re.compile(r"blk\.\d+\.attn_rot_embd\.weight|rope_freqs\.weight"),
}


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


def dimensions(config: ModelConfig) -> dict[str, int]:
    """Sizes of the named axes in `Rule.dims`."""
    return {
        "vocab": config.vocab_size,
        "hidden": config.hidden_size,
        "inner": config.intermediate_size,
        "query": config.query_width,
        "kv": config.kv_width,
        "heads": config.num_heads,
        "kv_heads": config.num_kv_heads,
    }


def rules_for(config: ModelConfig) -> tuple[Rule, ...]:
    """The rules that apply: `RULES`, biases, and the unembedding unless it is tied."""
    biases = [
        _bias(rule.path[1], rule.path[2])
        for rule in RULES
        if rule.path[-1] == "kernel" and rule.path[2] in config.biases
    ]
    return (*RULES, *biases) if config.tied else (*RULES, *biases, UNEMBED)


def param_shapes(config: ModelConfig) -> dict[str, Any]:
    """Shapes of every parameter, in the nesting of the parameters themselves."""
    sizes = dimensions(config)
    tree: dict[str, Any] = {}
    for rule in rules_for(config):
        shape = tuple(sizes[dim] for dim in rule.dims)
        put(tree, rule.path, (config.num_layers, *shape) if rule.per_layer else shape)
    return tree


def param_sizes(config: ModelConfig) -> list[int]:
    """Values in each (stacked) parameter."""
    shapes = jax.tree.leaves(param_shapes(config), is_leaf=lambda x: isinstance(x, tuple))
    return [math.prod(shape) for shape in shapes]


def stored_shape(rule: Rule, config: ModelConfig) -> tuple[int, ...]:
    """Shape of the rule's tensor of one layer as checkpoints store it."""
    sizes = dimensions(config)
    shape = tuple(sizes[dim] for dim in rule.dims)
    return shape[::-1] if rule.transposed else shape


def stored_names(config: ModelConfig, naming: Naming) -> dict[str, tuple[Rule, int | None]]:
    """Every tensor name that a checkpoint of this configuration holds -> its rule and layer."""
    names: dict[str, tuple[Rule, int | None]] = {}
    for rule in rules_for(config):
        template = getattr(rule, naming)
        if rule.per_layer:
            for layer in range(config.num_layers):
                names[template.format(i=layer)] = (rule, layer)
        else:
            names[template] = (rule, None)
    return names


def unpermute(rows: np.ndarray, heads: int) -> np.ndarray:
    """Undo llama.cpp's interleaving of each head's rows; [heads * head_dim, in], same shape.

    GGUF stores row 2j + h of a head where Hugging Face has row h * head_dim/2 + j (h = 0, 1).
    """
    half = rows.shape[0] // heads // 2
    return rows.reshape(heads, half, 2, -1).swapaxes(1, 2).reshape(rows.shape)


def permute(rows: np.ndarray, heads: int) -> np.ndarray:
    """Interleave each head's rows as llama.cpp does; the inverse of `unpermute`."""
    half = rows.shape[0] // heads // 2
    return rows.reshape(heads, 2, half, -1).swapaxes(1, 2).reshape(rows.shape)


def fill(
    config: ModelConfig,
    tensors: Iterable[Stored],
    *,
    naming: Naming,
    dtype: DTypeLike = jnp.float32,
    where: str,
    shardings: Any = None,
    progress: Progress | None = None,
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
      progress: told the bytes of every piece that has been read.

    Raises:
      SourceError: a tensor is missing, left over, misshapen, stored twice, or not finite.
      ConfigError: a dtype that parameters cannot have.
    """
    target_dtype = parameter_dtype(dtype)
    tensors = list(tensors)
    if config.num_layers > len(tensors):
        raise SourceError(
            f"{where}: the configuration says {config.num_layers} layers, but there are only "
            f"{len(tensors)} tensors"
        )
    targets = stored_names(config, naming)
    plan: dict[str, tuple[Stored, Rule, int | None]] = {}
    left_over: list[str] = []
    duplicate: Stored | None = None
    for tensor in tensors:
        if tensor.name in plan:
            raise SourceError(f"{where}: tensor {tensor.name} is stored twice")
        if tensor.name in targets:
            rule, layer = targets[tensor.name]
            expected = stored_shape(rule, config)
            if tuple(tensor.shape) != expected:
                raise SourceError(
                    f"{where}: tensor {tensor.name} has shape {tuple(tensor.shape)}, "
                    f"the configuration says {expected}"
                )
            plan[tensor.name] = (tensor, rule, layer)
        elif config.tied and tensor.name == getattr(UNEMBED, naming):
            duplicate = tensor
        elif not DROPPABLE[naming].fullmatch(tensor.name):
            left_over.append(tensor.name)
    problems = []
    if missing := [name for name in targets if name not in plan]:
        problems.append(f"{len(missing)} tensors are missing: {_some(missing)}")
    if left_over:
        problems.append(f"{len(left_over)} tensors have no place: {_some(left_over)}")
    if problems:
        raise SourceError(f"{where}: " + "; ".join(problems))

    sources: dict[tuple[str, ...], list[tuple[Stored, Rule, int | None]]] = {}
    for item in plan.values():
        sources.setdefault(item[1].path, []).append(item)
    sizes = dimensions(config)
    # Only the architecture "llama" stores the rows of each head interleaved.
    interleaved = naming == "gguf" and config.family == "llama"

    def build(rule: Rule) -> np.ndarray:
        """One parameter, stacked over layers."""
        shape = tuple(sizes[dim] for dim in rule.dims)
        shape = (config.num_layers, *shape) if rule.per_layer else shape
        host = _aligned(shape, target_dtype)

        def copy(item: tuple[Stored, int | None, slice]) -> int:
            tensor, layer, rows = item
            values = _read(tensor, rows, where)
            if interleaved and rule.rotary is not None:
                values = unpermute(values, sizes[rule.rotary])
            target = host if layer is None else host[layer]
            place = target[:, rows] if rule.transposed else target[rows]
            _assign(place, values, tensor.name, where, transposed=rule.transposed)
            return values.nbytes

        whole = interleaved and rule.rotary is not None
        pieces = (
            (tensor, layer, rows)
            for tensor, _, layer in sources[rule.path]
            for rows in _slices(tensor.shape, whole=whole)
        )
        for nbytes in pool.map(copy, pieces):
            if progress is not None:
                progress(nbytes)
        return host

    # One parameter at a time: beside what is on the devices, the host holds the largest of them.
    params: dict[str, Any] = {}
    with ThreadPoolExecutor(THREADS) as pool:
        for rule in rules_for(config):
            host = build(rule)
            if rule.path == ("embed", "embedding") and duplicate is not None:
                _check_duplicate(duplicate, host, where)
            put(params, rule.path, jax.device_put(host, _at(shardings, rule.path)))
    return params


def _at(tree: Any, path: tuple[str, ...]) -> Any:
    """The leaf of a nested dict; None of None."""
    return None if tree is None else functools.reduce(lambda node, key: node[key], path, tree)


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
        found = np.dtype(jnp.dtype(dtype))
    except TypeError:
        raise ConfigError(f"unknown dtype {dtype!r} (float32, bfloat16 or float16)") from None
    if found.name not in ("float32", "bfloat16", "float16"):
        raise ConfigError(f"parameters cannot have dtype {found.name} (float32, bfloat16, float16)")
    return found


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


def put(tree: dict[str, Any], path: tuple[str, ...], value: Any) -> None:
    """Set the leaf of a nested dict."""
    for key in path[:-1]:
        tree = tree.setdefault(key, {})
    tree[path[-1]] = value


def _some(names: list[str]) -> str:
    shown = ", ".join(names[:5])
    return shown + (", ..." if len(names) > 5 else "")
