"""Hugging Face directories (config.json and safetensors) -> configuration and parameters.

Torch is never imported: pickled weights are refused.
"""

import functools
import json
import os
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from jaxneurons.convert.config import config_from_hf
from jaxneurons.convert.families import MODEL_TYPES
from jaxneurons.convert.fill import Stored, fill
from jaxneurons.convert.rules import (
    DROPPABLE,
    EMBEDDING,
    UNEMBEDDING,
    Place,
    file_names,
    tensor_name,
    text_part,
)
from jaxneurons.convert.safetensors_file import Entry, open_safetensors, read_rows
from jaxneurons.errors import SourceError
from jaxneurons.model.config import ModelConfig
from jaxneurons.model.parameters import Params
from jaxneurons.storage.progress import Advance
from jaxneurons.storage.settings import as_path

CONFIG = "config.json"
SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
_PICKLED = (".bin", ".pth", ".pt", ".ckpt")


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
      SourceError: no such file, or not a JSON object; names the file and the line.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise SourceError(f"{path}: cannot be read: {error.strerror or error}") from None
    except json.JSONDecodeError as error:
        raise SourceError(f"{path}:{error.lineno}: not valid JSON: {error.msg}") from None
    except (ValueError, RecursionError):  # not UTF-8, numbers of thousands of digits, depth
        raise SourceError(f"{path}: not valid JSON") from None
    if not isinstance(values, dict):
        raise SourceError(f"{path}: a JSON object is needed, this is a {type(values).__name__}")
    return values


def weight_files(directory: Path) -> dict[str, tuple[str, ...] | None]:
    """The weight files a directory names -> the tensors each is said to hold (None: not said).

    `model.safetensors`, or else what the index lists. Names are never globbed: repositories also
    hold `consolidated.*` duplicates.

    Raises:
      SourceError: no weights, pickled weights only, or a malformed or malicious index.
    """
    if (directory / SINGLE).is_file():
        return {SINGLE: None}
    if not (directory / INDEX).is_file():
        raise _no_weights(directory)
    where = directory / INDEX
    weight_map = read_json(where).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise SourceError(f"{where}: no weight_map (tensor name -> file name)")
    shards: dict[str, list[str]] = {}
    for tensor, shard in weight_map.items():
        if not isinstance(shard, str) or not _is_inside(shard):
            raise SourceError(f"{where}: tensor {tensor}: {shard!r} is not a file in the directory")
        shards.setdefault(shard, []).append(tensor)
    return {shard: tuple(tensors) for shard, tensors in sorted(shards.items())}


def _is_inside(name: str) -> bool:
    """Judge the name, not where it leads: files of the hub's cache are links out of the folder."""
    parts = PurePosixPath(name).parts
    return (
        bool(parts)
        and ".." not in parts
        and not PurePosixPath(name).is_absolute()
        and not PureWindowsPath(name).is_absolute()
        and not PureWindowsPath(name).drive
        and "\\" not in name
        and "\0" not in name
        and name.endswith(".safetensors")
        and len(name) < 256
    )


def check_links(directory: Path, *names: str) -> None:
    """Refuse files that are links out of the directory, other than those of the hub's cache.

    In that cache `snapshots/REVISION/FILE` is a link to `../../blobs/HASH`.

    Raises:
      SourceError: names the file.
    """
    home = directory.resolve()
    # Either folder of the cache may itself be a link, to a larger disk.
    blobs = {
        (place.parent.parent / "blobs").resolve()
        for place in (home, directory.absolute())
        if place.parent.name == "snapshots"
    }
    for name in names:
        target = (directory / name).resolve()
        if not (target.is_relative_to(home) or target.parent in blobs):
            raise SourceError(
                f"{directory / name}: a link out of the directory; give the directory that it "
                "points into, or put the file itself there"
            )


def _no_weights(directory: Path) -> SourceError:
    try:
        names = sorted(entry.name for entry in directory.iterdir())
    except OSError as error:
        return SourceError(f"{directory}: cannot be read: {error.strerror or error}")
    pickled = [name for name in names if name.endswith(_PICKLED)]
    if pickled:
        return SourceError(
            f"{directory}: only pickled weights ({pickled[0]}), which run code when they are "
            "loaded and are therefore refused; write safetensors once with "
            "save_pretrained(..., safe_serialization=True)"
        )
    ggufs = [name for name in names if name.endswith(".gguf")]
    if ggufs:
        return SourceError(
            f"{directory}: no {SINGLE}; to load {ggufs[0]} give the path of the file"
        )
    return SourceError(f"{directory}: neither {SINGLE} nor {INDEX}")


def read_hf(
    directory: str | os.PathLike[str],
    *,
    dtype: DTypeLike = jnp.float32,
    place: Place | None = None,
    progress: Advance | None = None,
    ignore_keys: Sequence[str] = (),
) -> tuple[ModelConfig, Params]:
    """Load a model from a Hugging Face directory.

    Args:
      directory: holds config.json, and model.safetensors or its index and shards.
      dtype: of the parameters; stored dtypes may be mixed.
      place: from the configuration, where each parameter goes, nested as they are; default: the
        default device.
      progress: called with the bytes of every piece that has been read.
      ignore_keys: keys of config.json to read as if they were not there.

    Raises:
      SourceError: files that are missing, damaged or pickled, or tensors that do not fit.
      ConfigError: a configuration that this library does not handle.
    """
    directory = as_path("directory", directory)
    config = read_config(directory, ignore_keys=ignore_keys)
    files = hf_tensors(directory)
    if others := left_out(config, (name for entries in files.values() for name in entries)):
        warnings.warn(
            f"{directory}: the text part of a model that also reads images: {len(others)} tensors "
            f"of the other part are left out ({others[0]}, ...)",
            stacklevel=2,
        )
    return config, fill(
        config,
        stored_tensors(files),
        naming="hf",
        dtype=dtype,
        where=str(directory),
        shardings=place(config) if place else None,
        progress=progress,
    )


def stored_tensors(files: Mapping[Path, Mapping[str, Entry]]) -> Iterator[Stored]:
    """The tensors of `hf_tensors`, to be read by rows."""
    for path, entries in files.items():
        for name, entry in entries.items():
            yield Stored(name, entry.shape, functools.partial(read_rows, path, name, entry))


def read_config(
    directory: str | os.PathLike[str], *, ignore_keys: Sequence[str] = ()
) -> ModelConfig:
    """The configuration of a Hugging Face directory.

    Args:
      directory: holds config.json.
      ignore_keys: its keys to read as if they were not there.

    Raises:
      SourceError: no config.json, or not a JSON object.
      ConfigError: a key or value that this library does not handle.
    """
    directory = as_path("directory", directory)
    where = directory / CONFIG
    if not where.is_file():
        raise SourceError(f"{directory}: no {CONFIG}")
    check_links(directory, CONFIG, INDEX)
    return config_from_hf(read_json(where), where=str(where), ignore_keys=ignore_keys)


def hf_tensors(directory: Path) -> dict[Path, dict[str, Entry]]:
    """What each weight file of a directory holds; the index and its shards must agree.

    Raises:
      SourceError: files that are missing, damaged or pickled, or not as the index says.
    """
    files = {}
    lm_head = tensor_name(UNEMBEDDING, "hf")
    for shard, listed in weight_files(directory).items():
        path = directory / shard
        if not path.is_file():
            if listed is not None and all(map(_carries_nothing, listed)):
                continue
            raise SourceError(f"{path}: no such file, but {INDEX} lists it")
        check_links(directory, shard)
        entries = open_safetensors(path)
        for name in sorted(set(listed) ^ set(entries)) if listed is not None else ():
            # What is needed and not stored is missed later; tied models list both embeddings.
            if _carries_nothing(name) or (name == lm_head and name not in entries):
                continue
            holder, other = (INDEX, shard) if name in (listed or ()) else (shard, INDEX)
            raise SourceError(f"{directory}: tensor {name} is in {holder} but not in {other}")
        files[path] = entries
    return files


def _carries_nothing(name: str) -> bool:
    return DROPPABLE["hf"].fullmatch(name) is not None


def stored_dtypes(directory: Path) -> dict[str, str]:
    """The dtype in which each tensor of a directory's model of text is stored, by `file_names`."""
    model_type = read_json(directory / CONFIG).get("model_type")
    family = MODEL_TYPES.get(model_type) if isinstance(model_type, str) else None
    part = None if family is None else family.text
    dtypes = {
        name: entry.dtype.name
        for entries in hf_tensors(directory).values()
        for name, entry in entries.items()
    }
    if part is None:
        return dtypes
    named = ((part.name(name), dtype) for name, dtype in dtypes.items())
    return {name: dtype for name, dtype in named if name is not None}


def left_out(config: ModelConfig, names: Iterable[str]) -> list[str]:
    """Those tensors of a directory that belong to other parts than the model of text."""
    part = text_part(config.family, "hf")
    return [] if part is None else [name for name in names if part.name(name) is None]


def stored_dtype(directory: Path, *, ignore_keys: Sequence[str] = ()) -> np.dtype:
    """The narrowest dtype for parameters that holds every stored parameter exactly.

    Args:
      directory: a Hugging Face directory.
      ignore_keys: keys of config.json to read as if they were not there.

    Raises:
      SourceError: float64 weights, for which there is none.
    """
    needed = set(file_names(read_config(directory, ignore_keys=ignore_keys), "hf"))
    dtypes = stored_dtypes(directory)
    if tensor_name(EMBEDDING, "hf") not in dtypes:  # a tied model: its unembedding is stored
        needed.add(tensor_name(UNEMBEDDING, "hf"))
    used = {dtype for name, dtype in dtypes.items() if name in needed}
    if "float64" in used:
        raise SourceError(f"{directory}: float64 weights; give a dtype, such as float32")
    if used <= {"bfloat16"}:
        return np.dtype(jnp.bfloat16)
    return np.dtype(np.float16) if used <= {"float16"} else np.dtype(np.float32)
