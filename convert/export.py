"""Parameters -> a Hugging Face directory that transformers 4 and 5 both load.

The same table of names as on the way in (`rules.py`), read in the other direction.
"""

import dataclasses
import functools
import itertools
import math
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxneurons.convert.config import config_from_hf
from jaxneurons.convert.families import FAMILIES
from jaxneurons.convert.family import Family
from jaxneurons.convert.fill import transpose_into
from jaxneurons.convert.hf import CONFIG, INDEX, SINGLE
from jaxneurons.convert.hf_rope_out import rope_scaling
from jaxneurons.convert.keys import IRRELEVANT
from jaxneurons.convert.rules import TensorRule, file_names, fused_tensors, stored_names
from jaxneurons.convert.safetensors_file import ToWrite, write_safetensors
from jaxneurons.errors import ConfigError
from jaxneurons.model.config import ModelConfig
from jaxneurons.model.families import FIXED
from jaxneurons.model.parameters import Params, get, params_dtype
from jaxneurons.storage.progress import Advance
from jaxneurons.storage.store import write_json

GENERATION = "generation_config.json"
SHARD_BYTES = 5_000_000_000
_PIECE = 1 << 21  # values written at a time


def config_to_hf(
    config: ModelConfig, *, dtype: np.dtype, original: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """The `config.json` of a model, in the spelling of transformers 4, which 5 reads too.

    Args:
      config: the model's shape.
      dtype: of the stored weights.
      original: the configuration it came with: what does not change the model is kept.

    Raises:
      ConfigError: a model that no configuration of transformers describes.
    """
    family = _written_as(config)
    _check_biases(config, family)
    harmless = {k: v for k, v in (original or {}).items() if k in IRRELEVANT}
    for key in ("dtype", "architectures", "transformers_version"):
        harmless.pop(key, None)
    values: dict[str, Any] = {
        "architectures": [family.model_class],
        "model_type": family.types[0],
        **harmless,
        "hidden_act": "silu",
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "max_position_embeddings": config.max_position,
        "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope.theta,
        "rope_scaling": rope_scaling(config),
        "tie_word_embeddings": config.tied,
        "torch_dtype": dtype.name,
        **{key: set(names) <= set(config.biases) for key, names in family.biases.items()},
    }
    values |= family.write(config)
    _check_complete(config, family, values)
    return values


def _written_as(config: ModelConfig) -> Family:
    """The family whose configurations describe a model."""
    name = config.family
    family = FAMILIES.get(name)
    if family is not None and family.written_as is not None:
        name = family.written_as(config)
        family = FAMILIES.get(name)
    if family is None:
        raise ConfigError(f"family {name!r} cannot be written ({', '.join(FAMILIES)})")
    return family


def _check_biases(config: ModelConfig, family: Family) -> None:
    fixed = FIXED[family.name].get("biases", ())
    left = set(config.biases)
    for group in (fixed, *family.biases.values()):
        if set(group) <= left:
            left -= set(group)
    if left or not set(fixed) <= set(config.biases):
        raise ConfigError(
            f"model_type {family.types[0]!r} has no place for biases on "
            f"{config.biases or 'no projection'}"
        )


def _check_complete(config: ModelConfig, family: Family, values: dict[str, Any]) -> None:
    """Read back what will be written: a value that it does not state must not be lost.

    Rotary embeddings may come back otherwise than they came (a table as the values behind it).
    """
    what = f"model_type {family.types[0]!r}"
    try:
        again = config_from_hf(values, where=f"config.json of {what}")
    except ConfigError as error:
        raise ConfigError(f"{what} cannot describe this model: {error}") from None
    for field in dataclasses.fields(ModelConfig):
        ours, theirs = getattr(config, field.name), getattr(again, field.name)
        if field.name in ("family", "rope", "sliding_rope") or ours == theirs:
            continue
        if isinstance(ours, float) and isinstance(theirs, float) and math.isclose(ours, theirs):
            continue
        if field.name == "query_scale" and math.isclose(config.score_scale, again.score_scale):
            continue
        if field.name == "sliding_layers":
            raise ConfigError(f"{what} has the same window in every layer")
        raise ConfigError(
            f"{what} cannot describe this model: {field.name} is {ours!r}, models of it have "
            f"{theirs!r}"
        )
    if (config.sliding_rope is None) != (again.sliding_rope is None):
        raise ConfigError(f"{what} has the same rotary embedding in every layer")


def write_hf(
    directory: Path,
    params: Params,
    *,
    config: ModelConfig,
    original: Mapping[str, Any] | None = None,
    dtypes: Mapping[str, str] | None = None,
    shard_bytes: int = SHARD_BYTES,
    progress: Advance | None = None,
) -> None:
    """Write config.json and the weights, sharded with an index if they are large.

    Args:
      directory: an existing one.
      params: the parameters, all of one dtype.
      config: the model's shape.
      original: the configuration it came with.
      dtypes: stored dtypes of tensors that were widened on the way in, by name; used where no
        value changes by it.
      shard_bytes: most bytes of tensors in a file.
      progress: called with the bytes of every piece written.

    Raises:
      ConfigError: a model that no configuration of transformers describes; nothing is written.
    """
    # Before the weights: it fails if no configuration describes the model.
    dtype = params_dtype(params)
    config_json = config_to_hf(config, dtype=dtype, original=original)
    tensors = _tensors(config, params, dtype, dtypes or {})
    write_json(directory / CONFIG, config_json)

    shards = _shards(tensors, shard_bytes)
    if len(shards) == 1:
        write_safetensors(directory / SINGLE, shards[0], progress=progress)
        return
    weight_map = {}
    for number, shard in enumerate(shards, 1):
        file = f"model-{number:05}-of-{len(shards):05}.safetensors"
        write_safetensors(directory / file, shard, progress=progress)
        weight_map |= dict.fromkeys(shard, file)
    total = sum(map(_nbytes, tensors.values()))
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    write_json(directory / INDEX, index)


def _tensors(
    config: ModelConfig, params: Params, dtype: np.dtype, dtypes: Mapping[str, str]
) -> dict[str, ToWrite]:
    """Every tensor by name, in its stored dtype where its values allow, else in the parameters'."""
    host = _Host(params)
    rules, fused = stored_names(config, "hf"), fused_tensors(config, "hf")
    tensors = {}
    for name in file_names(config, "hf"):
        parts = [rules[part] for part in fused.get(name, (name,))]
        pieces = functools.partial(_pieces, host, parts)
        narrow = np.dtype(dtypes.get(name, dtype))
        exact = narrow == dtype or all(np.array_equal(p, p.astype(narrow)) for p in pieces())
        shapes = [rule.stored_shape for rule, _ in parts]
        shape = (sum(shape[0] for shape in shapes), *shapes[0][1:])
        tensors[name] = ToWrite(narrow if exact else dtype, shape, pieces)
    return tensors


def _pieces(host: "_Host", parts: Sequence[tuple[TensorRule, int | None]]) -> Iterator[np.ndarray]:
    """A stored tensor, some rows at a time: those of its parts one after the other."""
    return itertools.chain.from_iterable(host.pieces(rule, layer) for rule, layer in parts)


def _shards(tensors: Mapping[str, ToWrite], shard_bytes: int) -> list[dict[str, ToWrite]]:
    """The tensors in order, in files of at most so many bytes (or of one larger tensor)."""
    shards: list[dict[str, ToWrite]] = [{}]
    room = shard_bytes
    for name, tensor in tensors.items():
        if _nbytes(tensor) > room and shards[-1]:
            shards.append({})
            room = shard_bytes
        shards[-1][name] = tensor
        room -= _nbytes(tensor)
    return shards


def _nbytes(tensor: ToWrite) -> int:
    return math.prod(tensor.shape) * tensor.dtype.itemsize


class _Host:
    """The parameter in hand, in host memory (a view of it, where the device is the host)."""

    def __init__(self, params: Params):
        self._params = params
        self._path: tuple[str, ...] | None = None
        self._values = np.empty(0)

    def get(self, path: tuple[str, ...]) -> np.ndarray:
        if path != self._path:
            self._values, self._path = np.asarray(get(self._params, path)), path
        return self._values

    def pieces(self, rule: TensorRule, layer: int | None) -> Iterator[np.ndarray]:
        """One layer's tensor as stored, some rows at a time."""
        values = self.get(rule.path)
        values = values if layer is None else values[layer]
        rows = values.shape[-1] if rule.transposed else values.shape[0]
        step = max(1, _PIECE // max(1, values.size // rows))
        for start in range(0, rows, step):
            end = min(start + step, rows)
            if rule.transposed:
                piece = np.empty((end - start, values.shape[0]), values.dtype)
                transpose_into(piece, values[:, start:end])
            else:
                piece = values[start:end]
            yield piece


def copy_files(paths: tuple[Path, ...], directory: Path) -> None:
    """Copy small files (tokenizer, generation configuration) as they are."""
    for path in paths:
        if path.is_file():
            shutil.copyfile(path, directory / path.name)


def sync(directory: Path) -> None:
    """Flush every file below a directory, so that a rename after this publishes whole files."""
    for root, _, files in os.walk(directory):
        for name in files:
            handle = os.open(os.path.join(root, name), os.O_RDONLY)
            try:
                os.fsync(handle)
            finally:
                os.close(handle)
