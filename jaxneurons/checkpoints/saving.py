"""Writing a model to disk: natively, or as a Hugging Face directory that other tools load.

A directory appears under its name when it is whole, and not before; what a killed run leaves behind
is a hidden directory beside it, which the next run replaces.
"""

import os
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal, get_args

import jax
from filelock import FileLock, Timeout

from jaxneurons.checkpoints.fetch import TOKENIZER_FILES, cache_directory
from jaxneurons.checkpoints.loading import LM
from jaxneurons.checkpoints.provenance import PATCHES
from jaxneurons.convert.export import GENERATION, copy_files, sync, write_hf
from jaxneurons.convert.hf import CONFIG, read_json, stored_dtypes
from jaxneurons.convert.native import MARKER, read_marker, write_marker, write_params
from jaxneurons.convert.rules import file_names
from jaxneurons.errors import ConfigError, SourceError, WriteError, near_matches
from jaxneurons.model.axis_types import any_axes
from jaxneurons.storage.progress import Advance
from jaxneurons.storage.settings import as_path, check_argument
from jaxneurons.storage.store import digest, write_json

Format = Literal["native", "hf"]
FORMATS: tuple[Format, ...] = get_args(Format)


@any_axes
def save(
    lm: LM,
    directory: str | os.PathLike[str],
    *,
    to: Format = "native",
    progress: Advance | None = None,
) -> Path:
    """Write a model with its tokenizer and configuration; `load` reads both formats.

    Patches that are in the parameters are recorded: natively in the marker, else in
    `jaxneurons_patches.json`.

    Args:
      lm: the model; its parameters are written in their own dtype.
      directory: must not exist yet, or be empty.
      to: `native` (Orbax, sharded) or `hf` (safetensors, for transformers and others).
      progress: called with the bytes that have been written (`native`: once, all of them).

    Raises:
      SourceError: the directory is not empty or cannot be written.
      ConfigError: an unknown format, or a model that `hf` cannot describe.
    """
    check_argument("lm", LM, lm)
    check_argument("progress", Callable | None, progress)
    check_format(to)
    target = as_path("directory", directory)
    check_free(target)
    original, dtypes = _origin(lm)
    with published(target) as partial:
        _write_tokenizer(lm, partial)
        if lm.files.directory is not None:
            copy_files((lm.files.directory / GENERATION,), partial)
        if to == "hf":
            write_hf(
                partial,
                lm.params,
                config=lm.config,
                original={**_token_ids(lm), **(original or {})},
                dtypes=dtypes,
                progress=progress,
            )
            if patches := lm.patch_facts():
                write_json(partial / PATCHES, patches)
            return target
        if original is not None:
            write_json(partial / CONFIG, original)
        with ThreadPoolExecutor(1) as pool:  # hashing takes as long as writing
            source = pool.submit(lambda: lm.hash)
            write_params(partial, lm.params)
            if progress is not None:
                progress(sum(leaf.nbytes for leaf in jax.tree.leaves(lm.params)))
            facts = {
                "dtype": lm.dtype.name,
                "stored_dtypes": dtypes,
                "source": {
                    "name": lm.source,
                    "sha256": source.result(),
                    **({"edited": True} if lm.changed else {}),
                },
                **lm.patch_facts(),
                **({"ignored_keys": list(lm.ignored_keys)} if lm.ignored_keys else {}),
                "jaxneurons": version("jaxneurons"),
            }
        write_marker(partial, config=lm.config, facts=facts)
    return target


def check_format(to: Any) -> Format:
    """The format, which must be one of `FORMATS`.

    Raises:
      ConfigError: it is not.
    """
    if to not in FORMATS:
        raise ConfigError(f"unknown format {to!r}; {near_matches(str(to), FORMATS)}")
    return to


def check_free(directory: Path) -> None:
    """Raise unless nothing is there yet.

    Raises:
      SourceError: the directory exists and is not empty, or is a file.
    """
    if directory.is_dir() and not any(directory.iterdir()):
        return
    if directory.exists() or directory.is_symlink():
        raise SourceError(f"{directory} exists already; remove it or give another destination")


@contextmanager
def published(target: Path) -> Iterator[Path]:
    """A hidden directory beside the target, which takes its name when the block has succeeded.

    It is held under a lock: what a killed process left there is replaced, what another process is
    writing is not.

    Raises:
      SourceError: it cannot be written, or another process is writing it.
    """
    partial = target.absolute().with_name(f".{target.name}.partial")
    try:
        # A lock that is deleted can be held twice, so it lies where it may stay.
        lock = cache_directory() / "locks" / f"{digest(str(target.absolute()))[:32]}.lock"
        for parent in (partial.parent, lock.parent):
            parent.mkdir(parents=True, exist_ok=True)
        with FileLock(lock, timeout=0):
            try:
                shutil.rmtree(partial, ignore_errors=True)
                partial.mkdir()
                yield partial
                sync(partial)
                os.replace(partial, target)
            finally:
                shutil.rmtree(partial, ignore_errors=True)
    except Timeout:
        raise SourceError(f"{target}: another process is writing it") from None
    except WriteError as error:
        raise SourceError(f"{target}: cannot be written: {error.reason}") from None
    except OSError as error:
        reason = WriteError(target, error).reason
        raise SourceError(f"{target}: cannot be written: {reason}") from None


def _origin(lm: LM) -> tuple[dict[str, Any] | None, dict[str, str]]:
    """The config.json a model came with, and stored dtypes narrower than its parameters'."""
    directory = lm.files.directory
    if directory is None:
        return None, {}
    original = read_json(directory / CONFIG) if (directory / CONFIG).is_file() else None
    if (directory / MARKER).is_file():
        stored = read_marker(directory)[1].get("stored_dtypes") or {}
    else:
        stored = stored_dtypes(directory)
    dtype = lm.params["embed"]["embedding"].dtype.name
    names = set(file_names(lm.config, "hf"))
    if dtype != "float32" or len({d for n, d in stored.items() if n in names}) < 2:
        return original, {}
    # A checkpoint of mixed dtypes: what was widened on the way in may be narrowed again.
    narrow = ("bfloat16", "float16")
    return original, {n: d for n, d in stored.items() if n in names and d in narrow}


def _token_ids(lm: LM) -> dict[str, int | None]:
    """What config.json says of special tokens, from the tokenizer: absent is not "none" there."""
    names = ("bos_token_id", "eos_token_id", "pad_token_id")
    return {name: getattr(lm.tokenizer, name) for name in names}


def _write_tokenizer(lm: LM, directory: Path) -> None:
    files = lm.files.tokenizer
    unchanged = lm.loaded.is_tokenizer(lm.tokenizer)
    if unchanged and files and all(path.name in TOKENIZER_FILES for path in files):
        copy_files(files, directory)
    else:
        lm.tokenizer.save_pretrained(str(directory))
