"""Parameters -> a Hugging Face directory that transformers 4 and 5 both load.

The same table of names as on the way in (`rules.py`), read in the other direction.
"""

import dataclasses
import functools
import math
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jaxneurons.convert.fill import transpose_into
from jaxneurons.convert.hf import CONFIG, INDEX, SINGLE
from jaxneurons.convert.keys import IRRELEVANT
from jaxneurons.convert.rules import TensorRule, stored_names
from jaxneurons.convert.safetensors_file import ToWrite, write_safetensors
from jaxneurons.errors import ConfigError
from jaxneurons.model.config import ModelConfig
from jaxneurons.model.parameters import Params, get, params_dtype
from jaxneurons.storage.progress import Advance
from jaxneurons.storage.store import write_json

GENERATION = "generation_config.json"
SHARD_BYTES = 5_000_000_000
_CLASSES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
}
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
    family = config.family
    if config.sliding_window is not None and family == "llama":
        family = "mistral"  # how GGUF files name it
    _check_family(config, family)
    harmless = {k: v for k, v in (original or {}).items() if k in IRRELEVANT}
    for key in ("dtype", "architectures", "transformers_version"):
        harmless.pop(key, None)
    values: dict[str, Any] = {
        "architectures": [_CLASSES[family]],
        "model_type": family,
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
        "rope_scaling": _rope_scaling(config),
        "tie_word_embeddings": config.tied,
        "torch_dtype": dtype.name,
    }
    if family == "llama":
        values["attention_bias"] = "q" in config.biases
        values["mlp_bias"] = "up" in config.biases
    if family == "mistral":
        values["sliding_window"] = config.sliding_window
    if family == "qwen2":
        values["use_sliding_window"] = config.sliding_window is not None
        values["sliding_window"] = config.sliding_window
        windowed = config.sliding_layers or (config.sliding_window is not None,) * config.num_layers
        full = sum(not sliding for sliding in windowed)
        # transformers 4 knows only "the first so many layers are full".
        values["max_window_layers"] = full
        values["layer_types"] = [
            "sliding_attention" if sliding else "full_attention" for sliding in windowed
        ]
    return values


def _check_family(config: ModelConfig, family: str) -> None:
    allowed = {
        "llama": [(), ("q", "k", "v", "o"), ("gate", "up", "down")],
        "mistral": [()],
        "qwen2": [("q", "k", "v")],
    }
    if family not in allowed:
        raise ConfigError(f"family {family!r} cannot be written ({', '.join(allowed)})")
    groups = [set(group) for group in allowed[family]]
    left = set(config.biases)
    for group in groups:
        if group <= left:
            left -= group
    if left or (family == "qwen2" and not config.biases):
        raise ConfigError(
            f"model_type {family!r} has no place for biases on {config.biases or 'no projection'}"
        )
    if config.sliding_layers is not None and family != "qwen2":
        raise ConfigError(f"model_type {family!r} has the same window in every layer")


def _rope_scaling(config: ModelConfig) -> dict[str, Any] | None:
    rope = config.rope
    if rope.inv_freq_divisors is not None:
        return _llama3_of_divisors(config)
    if rope.rope_type == "default":
        return None
    values: dict[str, Any] = {"rope_type": rope.rope_type, "factor": rope.factor}
    if rope.rope_type == "llama3":
        values |= {
            "low_freq_factor": rope.low_freq_factor,
            "high_freq_factor": rope.high_freq_factor,
            "original_max_position_embeddings": rope.original_max_position,
        }
    if rope.rope_type == "yarn":
        values |= {
            "original_max_position_embeddings": rope.original_max_position,
            "attention_factor": rope.attention_factor,
            "beta_fast": rope.beta_fast,
            "beta_slow": rope.beta_slow,
        }
        if not rope.truncate:
            values["truncate"] = False
    return values


def _llama3_of_divisors(config: ModelConfig) -> dict[str, Any]:
    """The llama3 values behind a GGUF file's table of divisors, if they are Llama 3's.

    Raises:
      ConfigError: a table of another origin.
    """
    from jaxneurons.model.layers import rope_frequencies

    frequencies = rope_frequencies(config.rope, config.head_dim)
    for factor in (8.0, 32.0):
        rope = dataclasses.replace(
            config.rope,
            inv_freq_divisors=None,
            factor=factor,
            low_freq_factor=1.0,
            high_freq_factor=4.0,
            original_max_position=8192,
        )
        if np.allclose(rope_frequencies(rope, config.head_dim), frequencies, rtol=1e-6):
            return _rope_scaling(dataclasses.replace(config, rope=rope)) or {}
    raise ConfigError(
        "rope_freqs of this GGUF file are not those of Llama 3.1 or 3.2, and config.json has no "
        "place for a table of frequencies; keep the model in the native format"
    )


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
    tensors = {}
    for name, (rule, layer) in stored_names(config, "hf").items():
        pieces = functools.partial(host.pieces, rule, layer)
        narrow = np.dtype(dtypes.get(name, dtype))
        exact = narrow == dtype or all(np.array_equal(p, p.astype(narrow)) for p in pieces())
        tensors[name] = ToWrite(narrow if exact else dtype, rule.stored_shape, pieces)
    return tensors


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
