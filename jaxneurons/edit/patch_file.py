"""Patches as files: safetensors with the arrays, all else as JSON in the file's metadata.

What is read is held against every rule before it is used, and against its own SHA-256.
"""

import json
import os
from collections.abc import Mapping
from typing import Any

import numpy as np

from jaxneurons.convert.safetensors_file import (
    encode_safetensors,
    open_safetensors,
    read_metadata,
    read_rows,
)
from jaxneurons.edit.changes import Change, LowRank, Multipliers, Rows
from jaxneurons.edit.entries import Axis, Entries
from jaxneurons.edit.patch import FORMAT, Patch
from jaxneurons.errors import ConfigError, DataError, SourceError
from jaxneurons.model.config import ModelConfig
from jaxneurons.storage.json_file import parse_json
from jaxneurons.storage.settings import as_path, check_argument
from jaxneurons.storage.store import write_bytes
from jaxneurons.storage.typed_json import typed

KIND = "jaxneurons patch"
_FIELDS = {
    "low-rank": (LowRank, {"left": np.float32, "right": np.float32}, {"module": str, "layer": int}),
    "rows": (Rows, {"index": np.int32, "values": np.float32}, {"module": str, "layer": int}),
    "multipliers": (
        Multipliers,
        {"layer": np.int32, "index": np.int32, "factor": np.float32},
        {"site": str},
    ),
}
"""By kind of change: its class, its arrays and what else it says."""
_KEPT = (
    Entries,
    {"index": np.int32, "values": np.float32},
    {"array": str, "layer": int, "axis": Axis},
)


def contents(patch: Patch) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """All that a patch is: what JSON holds of it, and its arrays by name."""
    kinds = {kind: name for name, (kind, _, _) in _FIELDS.items()}
    arrays: dict[str, np.ndarray] = {}
    changes = []
    for number, change in enumerate(patch.changes):
        name = kinds[type(change)]
        described = _take_apart(f"changes.{number}", change, _FIELDS[name], arrays)
        changes.append({"kind": name, **described})
    kept = [_take_apart(f"kept.{n}", part, _KEPT, arrays) for n, part in enumerate(patch.kept)]
    description = {
        "base": patch.base,
        "config": dict(patch.config),
        "facts": dict(patch.facts),
        "changes": changes,
        "kept": kept,
    }
    return description, arrays


def _take_apart(at: str, value: Any, rule: Any, arrays: dict[str, np.ndarray]) -> dict[str, Any]:
    _, names, rest = rule
    for name, dtype in names.items():
        arrays[f"{at}.{name}"] = np.ascontiguousarray(getattr(value, name), dtype)
    return {name: getattr(value, name) for name in rest}


def write_patch(patch: Patch, path: str | os.PathLike[str]) -> None:
    """Write a patch; whatever happens, no half one is there.

    Args:
      patch: the patch.
      path: of the file; one that is there is replaced, atomically (the commands refuse it).

    Raises:
      WriteError: no room, no permission, no such directory.
    """
    check_argument("patch", Patch, patch)
    description, arrays = contents(patch)
    metadata = {
        "kind": KIND,
        "format": str(FORMAT),
        "patch": json.dumps(description, ensure_ascii=True, allow_nan=False),
        "sha256": patch.digest,
    }
    write_bytes(as_path("path", path), encode_safetensors(arrays, metadata))


def read_patch(path: str | os.PathLike[str]) -> Patch:
    """Read a patch.

    Raises:
      DataError: no such file, none of ours, of a later format, damaged or altered; says how.
    """
    path = as_path("path", path)
    try:
        metadata = read_metadata(path)
        entries = open_safetensors(path)
    except SourceError as error:
        raise DataError(f"{error}; a patch is a file that write_patch wrote") from None
    if metadata.get("kind") != KIND:
        raise DataError(f"{path}: a safetensors file, but no patch; give one that was written here")
    if (found := metadata.get("format")) != str(FORMAT):
        raise DataError(
            f"{path}: a patch of format {found!r:.20}, this version reads {FORMAT}; "
            "use the version of jaxneurons that wrote it, or a later one"
        )
    where = f"{path}: damaged patch"
    try:
        description = typed(_DESCRIPTION, parse_json(path, metadata.get("patch", "")), where)
        arrays = {name: read_rows(path, name, entry) for name, entry in entries.items()}
        patch = _put_together(description, arrays, where)
    except (DataError, ConfigError, SourceError) as error:
        raise DataError(str(error) if str(path) in str(error) else f"{where}: {error}") from None
    if patch.digest != metadata.get("sha256"):
        raise DataError(f"{where}: its SHA-256 is not the one it was written with; get it anew")
    return patch


_DESCRIPTION = {"base": str, "config": dict, "facts": dict, "changes": list, "kept": list}


def _put_together(
    description: Mapping[str, Any], arrays: dict[str, np.ndarray], where: str
) -> Patch:
    changes: list[Change] = []
    for number, record in enumerate(description["changes"]):
        at = f"changes.{number}"
        name = typed({"kind": str}, record, f"{where}: {at}")["kind"]
        if name not in _FIELDS:
            raise DataError(f"{where}: {at}: unknown kind {name!r:.40}")
        changes.append(_make(at, record, _FIELDS[name], arrays, where))
    kept = tuple(
        _make(f"kept.{n}", record, _KEPT, arrays, where)
        for n, record in enumerate(description["kept"])
    )
    if arrays:
        raise DataError(f"{where}: an array that belongs to nothing: {min(arrays)!r:.60}")
    return Patch(
        tuple(changes), description["base"], description["config"], description["facts"], kept
    )


def _make(at: str, record: Any, rule: Any, arrays: dict[str, np.ndarray], where: str) -> Any:
    """A change, or kept entries, of a record and the arrays of its name, which are used up."""
    kind, names, rest = rule
    values = typed(rest, record, f"{where}: {at}")
    for name, dtype in names.items():
        array = arrays.pop(f"{at}.{name}", None)
        if array is None or array.dtype != dtype:
            raise DataError(f"{where}: {at}.{name} is missing or not {np.dtype(dtype).name}")
        if array.ndim != _RANKS.get((kind, name), array.ndim):
            raise DataError(f"{where}: {at}.{name} has {array.ndim} axes")
        values[name] = array
    return kind(**values)


_RANKS: dict[tuple[type, str], int] = {
    (LowRank, "left"): 2,
    (LowRank, "right"): 2,
    (Rows, "index"): 1,
    (Rows, "values"): 2,
    (Multipliers, "layer"): 1,
    (Multipliers, "index"): 1,
    (Multipliers, "factor"): 1,
    (Entries, "index"): 1,
}
"""Axes of arrays, as far as they are known without the model."""


def config_of(values: Mapping[str, Any]) -> ModelConfig:
    """A configuration from what JSON holds of it.

    Raises:
      DataError: it is none.
    """
    return typed(ModelConfig, values, "config")
