"""Where a model came from, and whether it still is what was loaded: files, hashes, edits."""

import abc
import dataclasses
import hashlib
import json
import platform
import weakref
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxneurons.convert.hf import read_json
from jaxneurons.errors import SourceError
from jaxneurons.model.config import ModelConfig, config_values
from jaxneurons.model.parameters import LAYERS, Params, get, list_parameters

_THREADS = 4  # that hash parameters: each holds one layer's array
PATCHES = "jaxneurons_patches.json"
"""In a Hugging Face directory of an edited model: what its patches are."""


@dataclasses.dataclass(frozen=True)
class Files:
    """The files a model came from, and how they looked when it was loaded.

    Attributes:
      weights: the files of its weights.
      tokenizer: the files of its tokenizer.
      directory: holds config.json and the like; None for a GGUF file.
      seen: size and time of change of each file.
      digests: SHA-256 of those files that have been hashed already.
    """

    weights: tuple[Path, ...]
    tokenizer: tuple[Path, ...]
    directory: Path | None
    seen: tuple[tuple[int, int], ...]
    digests: Mapping[Path, str] = dataclasses.field(default_factory=dict, repr=False)

    @classmethod
    def of(
        cls,
        weights: tuple[Path, ...],
        tokenizer: tuple[Path, ...],
        directory: Path | None,
        digests: Mapping[Path, str] | None = None,
    ) -> "Files":
        """The files as they look now."""
        return cls(weights, tokenizer, directory, _stamps(weights + tokenizer), digests or {})

    def check(self) -> None:
        """Raise `SourceError` if a file looks otherwise now."""
        if _stamps(self.weights + self.tokenizer) != self.seen:
            raise SourceError(
                f"{self.weights[0].parent}: files have changed since the model was loaded; "
                "load it again"
            )


def _stamps(paths: tuple[Path, ...]) -> tuple[tuple[int, int], ...]:
    stats = [path.stat() if path.is_file() else None for path in paths]
    return tuple((stat.st_size, stat.st_mtime_ns) if stat else (-1, -1) for stat in stats)


class Loaded:
    """What `load` returned, to tell later whether a model still is that; keeps nothing alive.

    Device arrays cannot be changed in place, so a leaf that is the same object has the same values.

    Args:
      config: the model's shape.
      params: its parameters.
      tokenizer: its tokenizer.
    """

    def __init__(self, config: ModelConfig, params: Params, tokenizer: Any = None):
        self._config = config
        leaves = _named_leaves(params)
        self._fixed = all(isinstance(leaf, jax.Array) for leaf in leaves.values())
        self._leaves = {n: weakref.ref(leaf) for n, leaf in leaves.items()} if self._fixed else {}
        self._tokenizer = None if tokenizer is None else weakref.ref(tokenizer)
        self._tokens = 0 if tokenizer is None else len(tokenizer)

    def is_model(self, config: ModelConfig, params: Params) -> bool:
        """Whether these are the shape and the parameters."""
        leaves = _named_leaves(params)
        return (
            self._fixed
            and config == self._config
            and leaves.keys() == self._leaves.keys()
            and all(self._leaves[name]() is leaf for name, leaf in leaves.items())
        )

    def is_tokenizer(self, tokenizer: Any) -> bool:
        """Whether this is the tokenizer, with as many tokens."""
        same = self._tokenizer is not None and self._tokenizer() is tokenizer
        return same and len(tokenizer) == self._tokens

    def with_model(self, config: ModelConfig, params: Params) -> "Loaded":
        """The same tokenizer with another shape and other parameters."""
        other = Loaded(config, params)
        other._tokenizer, other._tokens = self._tokenizer, self._tokens
        return other


class AnyPatch(abc.ABC):
    """What a model must know of a patch that is in its parameters; see `jaxneurons.edit.Patch`."""

    @property
    @abc.abstractmethod
    def digest(self) -> str:
        """SHA-256 of all that it is."""

    @abc.abstractmethod
    def summary(self) -> dict[str, Any]:
        """What files of results say of it."""


@dataclasses.dataclass(frozen=True, eq=False)
class Patched:
    """Patches that are in a model's parameters.

    Attributes:
      patches: in the order in which they were applied.
      base: `hash_values` of the parameters before the first.
      base_changed: whether those were others than had been loaded.
      base_dtype: of those.
      result: what the patches made, to tell whether the parameters still are that.
    """

    patches: tuple[AnyPatch, ...]
    base: str
    base_changed: bool
    base_dtype: str
    result: Loaded


def _named_leaves(params: Params) -> dict[str, Any]:
    return {jax.tree_util.keystr(p): x for p, x in jax.tree_util.tree_leaves_with_path(params)}


def hash_params(config: ModelConfig, params: Params) -> str:
    """SHA-256 of parameters in memory: names, dtypes, shapes and bytes, and the model's shape.

    Raises:
      SourceError: some of them are on devices of other processes.
    """
    digest = hashlib.sha256(json.dumps(config_values(config), sort_keys=True).encode())
    for name, leaf in sorted(_named_leaves(params).items()):
        if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
            raise SourceError(
                "the parameters were changed after loading and lie on several processes' devices, "
                "so they cannot be hashed; save the model and load what was saved"
            )
        values = np.ascontiguousarray(leaf)
        digest.update(f"\n{name} {values.dtype.name} {values.shape}\n".encode())
        digest.update(values.reshape(-1).view(np.uint8).data)
    return digest.hexdigest()


def hash_values(config: ModelConfig, params: Params) -> str:
    """SHA-256 of what parameters are, whatever file and dtype they are kept in.

    Of the values as float32, which holds bfloat16 and float16 exactly: a model that was stored in
    bfloat16 is the same in float32. No more than a few layers' arrays are copied at a time.

    Raises:
      SourceError: some of them are on devices of other processes.
    """
    with ThreadPoolExecutor(_THREADS) as pool:
        lines = pool.map(_value_line, _layer_arrays(config, params))
        return hashlib.sha256("".join(lines).encode()).hexdigest()


def _layer_arrays(config: ModelConfig, params: Params) -> Iterator[tuple[str, Any, int | None]]:
    """Name, array and layer of every layer's arrays and of those that all layers share."""
    for parameter in list_parameters(config):
        leaf, name = get(params, parameter.path), ".".join(parameter.path)
        if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
            raise SourceError(
                f"{name} lies on several processes' devices and cannot be hashed; edit and patch "
                "the model in one process"
            )
        if parameter.path[0] == LAYERS:
            yield from ((name, leaf, layer) for layer in range(config.num_layers))
        else:
            yield name, leaf, None


def layer_values(leaf: Any, layer: int) -> np.ndarray:
    """One layer's values of an array that is stacked by layer, on the host.

    Put together from the devices' parts where there are several: nothing is computed on them, so
    that several threads may do this.
    """
    if not isinstance(leaf, jax.Array) or len(leaf.sharding.device_set) == 1:
        return np.asarray(leaf[layer])
    values = np.empty(leaf.shape[1:], leaf.dtype)
    for shard in leaf.addressable_shards:
        layers, *rest = shard.index
        start, stop, _ = layers.indices(leaf.shape[0])
        if start <= layer < stop and shard.replica_id == 0:
            values[tuple(rest)] = np.asarray(shard.data[layer - start])
    return values


def read_recorded_patches(directory: Path, facts: Mapping[str, Any]) -> tuple[dict[str, Any], ...]:
    """What a directory, or its marker's facts, say of the patches in a model.

    Raises:
      SourceError: it is malformed.
    """
    where = directory / PATCHES
    values = read_json(where) if where.is_file() else facts
    patches = values.get("patches", [])
    if not isinstance(patches, list) or not all(isinstance(patch, dict) for patch in patches):
        raise SourceError(f"{where}: its patches are malformed; export the model again")
    return tuple(patches)


def _value_line(array: tuple[str, Any, int | None]) -> str:
    name, leaf, layer = array
    shape = leaf.shape if layer is None else leaf.shape[1:]
    return f"{name} {layer} {shape} {hash_array(leaf, layer)}\n"


def hash_array(leaf: Any, layer: int | None) -> str:
    """SHA-256 of the values, as float32, of one layer of an array, or of one without layers."""
    values = np.asarray(leaf) if layer is None else layer_values(leaf, layer)
    values = values.astype("<f4", copy=False)
    digest = hashlib.sha256(np.ascontiguousarray(values).reshape(-1).view(np.uint8).data)
    return digest.hexdigest()


def hash_tokenizer(tokenizer: Any) -> str:
    """SHA-256 of a tokenizer in memory.

    Raises:
      SourceError: it cannot be written down.
    """
    backend: Any = getattr(tokenizer, "backend_tokenizer", None)
    if not hasattr(backend, "to_str"):
        raise SourceError(
            "the tokenizer was changed after loading and cannot be hashed; save the model and load "
            "what was saved"
        )
    special = json.dumps(tokenizer.special_tokens_map, sort_keys=True, default=str)
    return hashlib.sha256(f"{special}\n{backend.to_str()}".encode()).hexdigest()


def versions() -> dict[str, str]:
    """Of the packages that numbers may depend on, and of the machine."""
    packages = ("jaxneurons", "jax", "jaxlib", "flax", "transformers", "tokenizers", "numpy")
    return {
        **{name: metadata.version(name) for name in packages},
        "python": platform.python_version(),
        "platform": platform.platform(),
    }
