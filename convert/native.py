"""The native format: Orbax parameters, configuration and tokenizer in one directory.

DIR/jaxneurons.json      marker, written last: format, configuration, where it came from, checksums
DIR/params/              Orbax, uncompressed Zarr, in chunks: a process reads what it holds
DIR/config.json ...      configuration, generation configuration and tokenizer, as they came
"""

import hashlib
import json
import logging
import os
import re
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from jaxneurons.convert.fill import parameter_dtype
from jaxneurons.convert.hf import read_json
from jaxneurons.convert.rules import Place
from jaxneurons.convert.zarr_chunks import open_array, read_array
from jaxneurons.errors import ConfigError, SourceError, WriteError
from jaxneurons.model.config import ModelConfig, config_of_values, config_values
from jaxneurons.model.parameters import Params, get, list_parameters, param_shapes, put
from jaxneurons.storage.hashes import hash_each
from jaxneurons.storage.progress import Advance
from jaxneurons.storage.settings import as_path
from jaxneurons.storage.store import write_json

MARKER = "jaxneurons.json"
PARAMS = "params"
FORMAT = 1
_CHECKSUM = "sha256_of_the_above"
_CHUNK_BYTES = 32 << 20
_NEVER_BEGAN = r"coroutine '[\w.<>]*(serialize|write)[\w.<>]*' was never awaited"


def write_params(directory: Path, params: Params) -> None:
    """Write parameters, of any sharding, into an existing directory that holds none yet.

    Raises:
      WriteError: they cannot be written.
    """
    import orbax.checkpoint as ocp

    save_args = jax.tree.map(lambda _: ocp.SaveArgs(chunk_byte_size=_CHUNK_BYTES), params)
    try:
        with _quiet(), _one_report(directory), ocp.Checkpointer(_handler()) as checkpointer:
            checkpointer.save(
                (directory / PARAMS).absolute(),
                args=ocp.args.PyTreeSave(dict(params), save_args=save_args),
            )
    except Exception as error:  # Orbax and TensorStore raise whatever they find
        raise WriteError(directory, error) from None


@contextmanager
def _one_report(directory: Path) -> Iterator[None]:
    """Without what Orbax's and TensorStore's threads print of a failure that is raised anyway.

    Some of it comes when the failure is known already: after one it stays unsaid, of this directory
    only.
    """
    before = sys.unraisablehook

    def hook(raised: Any) -> None:  # a write that ended after another one's failure, or never began
        message = str(raised.exc_value)
        if message != "Event loop is closed" and not re.match(_NEVER_BEGAN, message):
            before(raised)

    def other(record: logging.LogRecord) -> bool:
        error = record.exc_info[1] if record.exc_info else None
        message = record.getMessage()
        if isinstance(error, OSError) and error.filename is None:
            return "orbax" not in f"{record.pathname} {message}"  # no room, say: of no file by name
        return str(directory) not in f"{message} {error}"

    loggers = [logging.getLogger(name) for name in ("absl", "asyncio")]
    for logger in loggers:
        logger.addFilter(other)
    sys.unraisablehook = hook
    try:
        yield
    except BaseException:
        warnings.filterwarnings("ignore", _NEVER_BEGAN, RuntimeWarning)
        raise
    for logger in loggers:
        logger.removeFilter(other)
    if sys.unraisablehook is hook:
        sys.unraisablehook = before


def write_marker(directory: Path, *, config: ModelConfig, facts: Mapping[str, Any]) -> None:
    """Write the marker: configuration, facts, and the SHA-256 of every file of parameters.

    Zarr's own checksums are for compressed or sharded chunks, which Orbax does not write here.
    """
    digests = hash_each(sorted(p for p in (directory / PARAMS).rglob("*") if p.is_file()))
    files = {path.relative_to(directory).as_posix(): digest for path, digest in digests.items()}
    values = {"format": FORMAT, "config": config_values(config), **facts, "sha256": files}
    values = json.loads(json.dumps(values))
    values[_CHECKSUM] = _digest(values)
    write_json(directory / MARKER, values)


def check_params(directory: Path) -> dict[Path, str]:
    """Compare every file of parameters with the checksum in the marker.

    Reads them all once (about a second for 1.5 GB, several files at a time). A directory of a
    version that wrote no checksums passes.

    Returns:
      Each file that was compared -> its SHA-256.

    Raises:
      SourceError: a file is missing or has changed.
    """
    recorded = recorded_digests(directory)
    for path in recorded:
        if not path.is_file():
            raise SourceError(f"{path}: no such file, but {MARKER} lists it; convert again")
    try:
        digests = hash_each(recorded)
    except OSError as error:
        raise SourceError(f"{directory}: cannot be read: {error.strerror or error}") from None
    for path, digest in digests.items():
        if digest != recorded[path]:
            raise SourceError(
                f"{path}: damaged: its SHA-256 is not the one in {MARKER}; convert the model again"
            )
    return digests


def recorded_digests(directory: Path) -> dict[Path, str]:
    """The SHA-256 that the marker records of each file of parameters; none by an early version.

    Raises:
      SourceError: no marker, or it is malformed.
    """
    files = read_marker(directory)[1].get("sha256", {})
    if not isinstance(files, dict) or any(".." in name.split("/") for name in files):
        raise SourceError(f"{directory / MARKER}: sha256 is malformed; convert the model again")
    return {directory / name: digest for name, digest in files.items()}


def recorded_keys(directory: Path, ignored: Sequence[str] = ()) -> tuple[str, ...]:
    """The configuration's keys that were ignored when the model was converted.

    Args:
      directory: a native one.
      wanted: keys to be ignored now, which can only be some of those.

    Raises:
      ConfigError: others are wanted.
    """
    recorded = tuple(read_marker(directory)[1].get("ignored_keys", ()))
    for name in ignored:
        if name not in recorded:
            raise ConfigError(
                f"{directory}: no key {name!r} to ignore: a native directory holds what the model "
                "is, not the keys that it came with"
            )
    return recorded


def _digest(values: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def _handler() -> Any:
    import orbax.checkpoint as ocp

    # Weights do not compress, and a file for each chunk lets processes read only their own.
    return ocp.PyTreeCheckpointHandler(
        use_ocdbt=False, use_zarr3=False, use_compression=False, save_concurrent_gb=1
    )


def read_marker(directory: Path) -> tuple[ModelConfig, dict[str, Any]]:
    """The configuration of a native directory, and what else its marker says.

    Raises:
      SourceError: no marker, or one that is malformed or of a later format.
      ConfigError: a configuration that is not valid.
    """
    where = directory / MARKER
    values = read_json(where)
    checksum = values.pop(_CHECKSUM, None)
    intact = checksum is None or checksum == _digest(values)
    if values.pop("format", None) != FORMAT:
        raise SourceError(f"{where}: not of format {FORMAT}; convert the model again")
    config = values.pop("config", None)
    dtypes = values.get("stored_dtypes")
    if not isinstance(values.get("dtype"), str) or not isinstance(dtypes, dict):
        raise SourceError(f"{where}: dtype or stored_dtypes are malformed; convert the model again")
    try:
        parsed = config_of_values(config)
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from None
    except (TypeError, KeyError, ValueError, AttributeError):
        raise SourceError(f"{where}: its config is malformed; convert the model again") from None
    if not intact:
        raise SourceError(f"{where}: damaged or edited: not what was written; convert again")
    return parsed, values


def read_native(
    directory: str | os.PathLike[str],
    *,
    dtype: DTypeLike | None = None,
    place: Place | None = None,
    progress: Advance | None = None,
) -> tuple[ModelConfig, Params]:
    """Restore a native directory, under any mesh; each process reads only what it holds.

    Args:
      directory: a native one.
      dtype: of the parameters; default: as saved.
      place: from the configuration, where each parameter goes; default: the default device.
      progress: called with bytes that have been read.

    Raises:
      SourceError: a directory that is incomplete or damaged.
    """
    directory = as_path("directory", directory)
    config, facts = read_marker(directory)
    param_dtype = parameter_dtype(facts["dtype"] if dtype is None else dtype)
    shapes = param_shapes(config)
    shardings = None if place is None else place(config)
    if shardings is not None:
        params = _read_parts(directory / PARAMS, config, param_dtype, shardings, progress)
        if params is not None:
            return config, params
    params = _restore(directory / PARAMS, shapes, param_dtype, shardings)
    if jax.tree.map(lambda leaf: tuple(leaf.shape), params) != shapes:
        raise SourceError(
            f"{directory / PARAMS}: cannot be restored: its shapes are not those of {MARKER}"
        )
    if place is None:
        params = _on_device(params)
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        if not bool(jnp.isfinite(leaf).all()):
            name = ".".join(key.key for key in path)
            raise SourceError(
                f"{directory / PARAMS}: {name} holds NaN or infinite values"
                + (" in float16; load with dtype=bfloat16" if param_dtype == np.float16 else "")
            )
        if progress is not None:
            progress(leaf.nbytes)
    return config, params


def _read_parts(
    path: Path,
    config: ModelConfig,
    dtype: np.dtype,
    shardings: dict[str, Any],
    progress: Advance | None,
) -> dict[str, Any] | None:
    """Parameters in their shardings, read in parts; None if they are stored in another way."""
    params: dict[str, Any] = {}
    for parameter in list_parameters(config):
        name = ".".join(parameter.path)
        try:
            array = open_array(path / name)
        except (OSError, ValueError) as error:
            raise SourceError(f"{path}: cannot be restored: {name}: {error}") from None
        if array is None:
            return None
        if array.shape != parameter.shape:
            raise SourceError(f"{path}: cannot be restored: its shapes are not those of {MARKER}")
        sharding = get(shardings, parameter.path)
        put(params, parameter.path, read_array(array, sharding, dtype, progress=progress))
    return params


def _restore(
    path: Path, shapes: dict[str, Any], dtype: np.dtype, shardings: dict[str, Any] | None
) -> dict[str, Any]:
    """Parameters as Orbax has them: numpy's without shardings, else arrays laid out by them."""
    import orbax.checkpoint as ocp

    if shardings is None:
        # By way of numpy: arrays that Orbax places itself are tied to their device.
        abstract = jax.tree.map(lambda _: np.empty(0), shapes, is_leaf=_is_shape)
        restore_args = jax.tree.map(
            lambda _: ocp.RestoreArgs(restore_type=np.ndarray, dtype=dtype),
            shapes,
            is_leaf=_is_shape,
        )
    else:
        abstract = jax.tree.map(
            lambda shape, sharding: jax.ShapeDtypeStruct(shape, dtype, sharding=sharding),
            shapes,
            shardings,
            is_leaf=_is_shape,
        )
        restore_args = ocp.checkpoint_utils.construct_restore_args(abstract)
    try:
        with _quiet(), ocp.Checkpointer(_handler()) as checkpointer:
            return checkpointer.restore(
                path.absolute(), args=ocp.args.PyTreeRestore(abstract, restore_args=restore_args)
            )
    except Exception as error:  # Orbax and TensorStore raise whatever they find
        text = " ".join(str(error).split())[:200]
        raise SourceError(f"{path}: cannot be restored: {text}") from None


def _on_device(tree: dict[str, Any]) -> dict[str, Any]:
    """Device arrays in place of numpy's, one at a time."""
    for key in list(tree):
        value = tree.pop(key)
        tree[key] = _on_device(value) if isinstance(value, dict) else jnp.asarray(value)
    return tree


@contextmanager
def _quiet() -> Iterator[None]:
    """Without Orbax's warning that there is nothing to merge (of a format that is not used).

    And without asyncio's reports of an error that is raised anyway.
    """
    levels = {"absl": logging.ERROR, "asyncio": logging.CRITICAL}
    before = {name: logging.getLogger(name).level for name in levels}
    for name, level in levels.items():
        logging.getLogger(name).setLevel(level)
    try:
        yield
    finally:
        for name, level in before.items():
            logging.getLogger(name).setLevel(level)


def _is_shape(value: Any) -> bool:
    return isinstance(value, tuple)
