"""Values held against the types that dataclasses annotate their fields with.

A settings class calls `check_fields(self)` first in its `__post_init__`, so that a wrong value is
refused when the settings are made and not after an hour of work.
"""

import dataclasses
import functools
import os
import types
import typing
from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

from jaxneurons.errors import ConfigError, close_matches

LARGEST_INTEGER = 1 << 1000
"""Integers of at most this size stand for a float: larger ones may have none."""


class Mismatch(NamedTuple):
    """A value that is not of the type that is needed.

    Attributes:
      place: where it is inside of the value that was checked: "" or, for example, "[2]".
      kind: the type that is needed there.
      value: what is there.
    """

    place: str
    kind: Any
    value: Any


def check_fields(settings: Any) -> None:
    """Raise unless every field of a dataclass is of the type that it is annotated with.

    An integer may stand for a float, but no bool for either, and no list for a tuple, since
    settings are compared and hashed. Values in range are the class's own business.

    Args:
      settings: an instance of a dataclass.

    Raises:
      ConfigError: a field is not; says the class, the field, what is needed and what came.
    """
    kinds = field_kinds(type(settings))
    for field in dataclasses.fields(settings):
        wrong = mismatch(kinds[field.name], getattr(settings, field.name))
        if wrong is not None:
            raise ConfigError(f"{type(settings).__name__}.{field.name}{explain(wrong)}")


def check_argument(name: str, kind: Any, value: Any) -> None:
    """Raise unless an argument is of a type, as `check_fields` does for fields.

    Args:
      name: the argument's, for the message.
      kind: a type, as an annotation has it.
      value: what was passed.

    Raises:
      ConfigError: it is not; says what is needed and what came.
    """
    if (wrong := mismatch(kind, value)) is not None:
        raise ConfigError(f"{name}{explain(wrong)}")


def as_path(name: str, value: Any) -> Path:
    """An argument that is a path.

    Args:
      name: the argument's, for the message.
      value: what was passed.

    Raises:
      ConfigError: it is neither a string nor a path, or cannot name a file.
    """
    check_argument(name, str | os.PathLike, value)
    text = os.fspath(value)
    if not isinstance(text, str) or not text.strip() or "\0" in text:
        raise ConfigError(f"{name} must be a path; got {shorten(value)}")
    return Path(text)


def check_number(name: str, value: Any, *, least: int) -> None:
    """Raise unless an argument is an integer of at least so much.

    Raises:
      ConfigError: it is not; says what is needed and what came.
    """
    check_argument(name, int, value)
    if value < least:
        raise ConfigError(f"{name} must be at least {least}, got {value!r}")


def explain(wrong: Mismatch) -> str:
    """The end of a message, after the name of the field: what is needed there and what came."""
    message = f"{wrong.place} must be {kind_name(wrong.kind)}; got {shorten(wrong.value)}"
    names = [choice for choice in _choices(wrong.kind) if isinstance(choice, str)]
    if isinstance(wrong.value, str) and (close := close_matches(wrong.value, names, most=1)):
        message += f"; {close}"
    return message


def mismatch(kind: Any, value: Any) -> Mismatch | None:
    """What of a value is not of a type; None if all of it is.

    Args:
      kind: `Any`, `None`, a class, `Literal[...]`, `tuple[x, ...]`, `tuple[x, y]`, another
        collection or mapping of types, or a union of these.
      value: what may be of that type.
    """
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        wrong = [mismatch(choice, value) for choice in inner]
        if None in wrong:
            return None
        deepest = max(
            (miss for miss in wrong if miss is not None), key=lambda miss: len(miss.place)
        )
        return deepest if deepest.place else Mismatch("", kind, value)
    if origin is tuple and inner[-1:] != (...,):
        if not isinstance(value, tuple) or len(value) != len(inner):
            return Mismatch("", kind, value)
        pairs = zip(inner, value, strict=True)
        return _first_mismatch((f"[{n}]", *pair) for n, pair in enumerate(pairs))
    if isinstance(origin, type) and issubclass(origin, Mapping):
        if not isinstance(value, origin):
            return Mismatch("", kind, value)
        items = [(f"[{key!r:.40}]", inner[1], entry) for key, entry in value.items()]
        return _first_mismatch([(" keys", inner[0], key) for key in value] + items)
    if isinstance(origin, type) and issubclass(origin, Collection):
        if not isinstance(value, origin) or isinstance(value, str | bytes):
            return Mismatch("", kind, value)
        return _first_mismatch((f"[{n}]", inner[0], entry) for n, entry in enumerate(value))
    return None if _is_plain(kind, value) else Mismatch("", kind, value)


def _first_mismatch(entries: Iterable[tuple[str, Any, Any]]) -> Mismatch | None:
    for place, kind, value in entries:
        if (wrong := mismatch(kind, value)) is not None:
            return wrong._replace(place=place + wrong.place)
    return None


def _is_plain(kind: Any, value: Any) -> bool:
    """Whether a value is of a type that is no union and holds no others."""
    if kind is Any:
        return True
    if kind is None or kind is types.NoneType:
        return value is None
    origin = typing.get_origin(kind)
    if origin is Literal:
        return any(type(value) is type(c) and value == c for c in typing.get_args(kind))
    if kind is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if kind is float:
        whole = isinstance(value, int) and not isinstance(value, bool)
        return isinstance(value, float) or (whole and abs(value) < LARGEST_INTEGER)
    if origin is type:
        return isinstance(value, type)
    return isinstance(value, origin or kind)


@functools.cache
def field_kinds(dataclass: type) -> dict[str, Any]:
    """The type of each field of a dataclass, by name."""
    return typing.get_type_hints(dataclass)


_NAMES: dict[Any, tuple[str, str]] = {
    int: ("an integer", "integers"),
    float: ("a number", "numbers"),
    str: ("a string", "strings"),
    bool: ("True or False", "booleans"),
    types.NoneType: ("None", "Nones"),
    None: ("None", "Nones"),
    os.PathLike: ("a path", "paths"),
    Callable: ("a function", "functions"),
}


def kind_name(kind: Any, *, plural: bool = False) -> str:
    """A type in words: "an integer or None", "one of up, gate", "a tuple of strings"."""
    if kind in _NAMES:
        return _NAMES[kind][plural]
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        if float in inner:
            inner = tuple(choice for choice in inner if choice is not int)
        names = [kind_name(choice, plural=plural) for choice in inner]
        return " or ".join(dict.fromkeys(names))
    if origin is Literal:
        choices = ", ".join(c if isinstance(c, str) else repr(c) for c in inner)
        return f"{'each ' if plural else ''}one of {choices}"
    if isinstance(origin, type) and issubclass(origin, Collection) and inner:
        held = [kind_name(k, plural=len(inner) < 3) for k in inner if k is not ...]
        word = f"{origin.__name__.lower()}{'s' if plural else ''}"
        if issubclass(origin, Mapping):
            held = [f"{kind_name(inner[0], plural=True)} to {kind_name(inner[1], plural=True)}"]
        elif origin is tuple and inner[-1:] != (...,):
            held = [" and ".join(kind_name(k) for k in inner)]
        return f"{'' if plural else 'a '}{word} of {held[0]}"
    name = getattr(kind, "__name__", str(kind))
    if plural:
        return f"{name}s"
    vowels = "AEFHILMNORSX" if name.isupper() else "AEIOUaeiou"  # "an LM" is spelled out
    return f"{'an' if name[:1] in vowels else 'a'} {name}"


def _choices(kind: Any) -> list[Any]:
    """The values of the literals of a type."""
    if typing.get_origin(kind) is Literal:
        return list(typing.get_args(kind))
    if typing.get_origin(kind) in (typing.Union, types.UnionType):
        return [value for choice in typing.get_args(kind) for value in _choices(choice)]
    return []


def shorten(value: Any) -> str:
    """A value for a message, in one short line."""
    text = " ".join(repr(value).split())
    return text if len(text) <= 60 else f"{text[:57]}..."
