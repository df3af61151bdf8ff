"""Values read back from JSON that this library wrote, with every type checked.

People edit such files, and other versions write other keys.
"""

import dataclasses
import types
import typing
from collections.abc import Mapping
from typing import Any

from jaxneurons.errors import DataError, JaxneuronsError, near_matches
from jaxneurons.storage.settings import field_kinds, mismatch


def typed(kind: Any, value: Any, where: str) -> Any:
    """A JSON value as what a type says.

    Args:
      kind: a dataclass, whose fields with a default may be missing; `str`, `int`, `float`, `bool`,
        `dict`, `None`, `tuple[x, ...]` or a union; or a dict of kinds by key, beside which there
        may be others.
      value: from JSON; a list stands for a tuple.
      where: what messages call it.

    Raises:
      DataError: the value is none of this kind; says where.
    """
    if dataclasses.is_dataclass(kind):
        return _dataclass(kind, value, where)
    if isinstance(kind, dict):
        record = _mapping(value, where)
        if missing := [key for key in kind if key not in record]:
            raise DataError(f"{where}: no {' or '.join(missing)}")
        return {key: typed(inner, record[key], f"{where}: {key}") for key, inner in kind.items()}
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if origin is tuple and isinstance(value, list):
        return tuple(typed(inner[0], entry, f"{where}[{n}]") for n, entry in enumerate(value))
    if origin in (typing.Union, types.UnionType):
        for choice in inner:
            try:
                return typed(choice, value, where)
            except DataError:
                continue
    elif mismatch(kind, value) is None:
        return float(value) if kind is float else value
    if origin is typing.Literal and isinstance(value, str):
        raise DataError(f"{where}: {value!r:.40} is none of them; {near_matches(value, inner)}")
    name = getattr(kind, "__name__", str(kind))
    raise DataError(f"{where}: {value!r:.40} where {name} is needed")


def _dataclass(kind: Any, value: Any, where: str) -> Any:
    record, kinds = _mapping(value, where), field_kinds(kind)
    values = {}
    for field in dataclasses.fields(kind):
        if field.name in record:
            values[field.name] = typed(
                kinds[field.name], record[field.name], f"{where}: {field.name}"
            )
    if unknown := record.keys() - values.keys():
        raise DataError(f"{where}: unknown key {min(unknown)!r}")
    try:
        return kind(**values)
    except TypeError:
        missing = [field.name for field in dataclasses.fields(kind) if field.name not in values]
        raise DataError(f"{where}: no {' or '.join(missing)}") from None
    except JaxneuronsError as error:
        raise DataError(f"{where}: {error}") from None


def _mapping(value: Any, where: str) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise DataError(f"{where}: {value!r:.40} where an object is needed")
    return value
