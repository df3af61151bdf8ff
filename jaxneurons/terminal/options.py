"""Options of the command line that several commands share, and those of settings dataclasses.

A setting's default stands in its dataclass, its help in the dataclass's docstring; the command line
reads both.
"""

import dataclasses
import functools
import inspect
import re
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from contextvars import ContextVar
from typing import Annotated, Any, NamedTuple, TypeVar

import typer

from jaxneurons.errors import ConfigError

IgnoreKeys = Annotated[
    list[str] | None,
    typer.Option(
        "--ignore-key",
        metavar="NAME",
        help="A key of the model's configuration to read as if it were not there; may be given "
        "several times. Results say so.",
    ),
]

Settings = TypeVar("Settings")

_PLACEMENT: ContextVar[Mapping[str, Any] | None] = ContextVar("placement", default=None)


def on_mesh(command: Callable[..., Any]) -> Callable[..., Any]:
    """A decorator of typer commands that load a model: the options `--mesh` and `--sharding`.

    What they say reaches whatever loads a model while the command runs, by `placement`.
    """
    mesh = typer.Option(
        metavar="DATAxMODEL",
        help="Devices to spread the model over, such as 4x2: prompts over 4, the model over 2.",
    )
    sharding = typer.Option(
        metavar="NAME",
        show_default="tensor",
        help="With --mesh: tensor (the model over the second number of devices), fsdp (every "
        "parameter over all), fsdp-tensor (both), or data (whole on each).",
    )
    hints = typing.get_type_hints(command, include_extras=True)
    keyword = inspect.Parameter.KEYWORD_ONLY
    added = [
        inspect.Parameter(name, keyword, default=None, annotation=Annotated[str | None, option])
        for name, option in (("mesh", mesh), ("sharding", sharding))
    ]
    parameters = [
        each.replace(kind=keyword, annotation=hints[each.name])
        for each in inspect.signature(command).parameters.values()
    ]

    @functools.wraps(command)
    def run(*, mesh: str | None, sharding: str | None, **values: Any) -> Any:
        if sharding is not None and mesh is None:
            raise ConfigError("--sharding says how a model lies on a mesh: give --mesh too")
        given = {"mesh": mesh, "rules": sharding}
        token = _PLACEMENT.set({name: value for name, value in given.items() if value is not None})
        try:
            return command(**values)
        finally:
            _PLACEMENT.reset(token)

    vars(run)["__signature__"] = inspect.Signature([*parameters, *added])
    run.__annotations__ = {each.name: each.annotation for each in [*parameters, *added]}
    return run


def placement() -> Mapping[str, Any]:
    """`mesh` and `rules` for `load`, as far as the command that runs was given them."""
    return _PLACEMENT.get() or {}


class Text(NamedTuple):
    """How a setting is written on the command line, where it is not a plain number or text.

    Attributes:
      parse: from the option's text to the setting.
      show: from the setting (its default) to the option's text.
    """

    parse: Callable[[str], Any]
    show: Callable[[Any], str]


def names_of(text: str) -> tuple[str, ...]:
    """Names written with commas between them."""
    return tuple(name.strip() for name in text.split(",") if name.strip())


NAMES = Text(names_of, ",".join)


def settings_options(
    settings: type,
    *,
    only: Sequence[str] = (),
    texts: Mapping[str, Text] | None = None,
    changes: bool = False,
    parameter: str = "settings",
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """A decorator of typer commands: one option a field in place of the parameter `settings`.

    A field that is itself a dataclass gives its own fields' options. Bounds are not checked here:
    the settings do it when they are made.

    Args:
      settings: a dataclass; what its docstring says under "Attributes:" is the options' help.
      only: the fields (nested ones too) that get an option; empty: all of them.
      texts: fields that are written in a way of their own. Tuples of names need none.
      changes: the command gets a dict of the options that were given, for `changed`, in place of
        settings with the dataclass's defaults.
      parameter: name of the command's parameter.
    """
    fields = {name: field for name, field in _fields(settings).items() if not only or name in only}
    unknown = [name for name in only if name not in fields]
    if unknown:
        raise TypeError(f"{settings.__name__} has no field {unknown[0]!r}")
    written = {
        name: text
        for name, field in fields.items()
        if (text := (texts or {}).get(name) or (NAMES if _is_names(field.type) else None))
    }

    def decorate(command: Callable[..., Any]) -> Callable[..., Any]:
        hints = typing.get_type_hints(command, include_extras=True)
        parameters: list[inspect.Parameter] = []
        for each in inspect.signature(command).parameters.values():
            if each.name == parameter:
                parameters += [
                    _parameter(name, field, written.get(name), given_only=changes)
                    for name, field in fields.items()
                ]
            else:
                kind = inspect.Parameter.KEYWORD_ONLY
                parameters.append(each.replace(kind=kind, annotation=hints[each.name]))

        @functools.wraps(command)
        def run(**values: Any) -> Any:
            given = {name: values.pop(name) for name in fields}
            for name, text in written.items():
                if given[name] is not None:
                    given[name] = text.parse(given[name])
            if changes:
                given = {name: value for name, value in given.items() if value is not None}
            values[parameter] = given if changes else _made(settings, given)
            return command(**values)

        signature = inspect.Signature(parameters)
        vars(run)["__signature__"] = signature
        run.__annotations__ = {each.name: each.annotation for each in parameters}
        return run

    return decorate


def changed(settings: Settings, changes: Mapping[str, Any]) -> Settings:
    """Settings with some fields, or fields of the dataclasses among them, replaced.

    Raises:
      TypeError: a change of what is no field.
    """
    unknown = changes.keys() - _fields(type(settings), settings).keys()
    if unknown:
        raise TypeError(f"{type(settings).__name__} has no field {sorted(unknown)[0]!r}")
    values = {}
    for field in dataclasses.fields(settings):  # type: ignore[arg-type]
        value = getattr(settings, field.name)
        if field.name in changes:
            values[field.name] = changes[field.name]
        elif dataclasses.is_dataclass(value):
            inner = {n: v for n, v in changes.items() if n in _fields(type(value), value)}
            values[field.name] = changed(value, inner)
    return dataclasses.replace(settings, **values)  # type: ignore[type-var]


class _Field(NamedTuple):
    type: Any
    default: Any
    help: str


def _fields(settings: type, instance: Any = None) -> dict[str, _Field]:
    """The fields of a dataclass, nested ones in place; defaults are those of an instance's."""
    hints, helps = typing.get_type_hints(settings), attributes(settings)
    fields: dict[str, _Field] = {}
    for field in dataclasses.fields(settings):
        if not field.init:
            continue
        if instance is not None:
            default = getattr(instance, field.name)
        elif field.default_factory is not dataclasses.MISSING:
            default = field.default_factory()
        else:
            default = field.default
        if dataclasses.is_dataclass(default) and not isinstance(default, type):
            inner = _fields(type(default), default)
        else:
            inner = {field.name: _Field(hints[field.name], default, helps.get(field.name, ""))}
        twice = fields.keys() & inner.keys()
        if twice:
            raise TypeError(f"{settings.__name__}: two fields are called {twice.pop()!r}")
        fields.update(inner)
    return fields


def _made(settings: type, given: Mapping[str, Any]) -> Any:
    """Settings of flat values; a field that is a dataclass is its default, changed."""
    values = {}
    for field in dataclasses.fields(settings):
        if field.name in given:
            values[field.name] = given[field.name]
        elif dataclasses.is_dataclass(field.default) and not isinstance(field.default, type):
            inner = _fields(type(field.default), field.default)
            values[field.name] = changed(
                field.default, {n: v for n, v in given.items() if n in inner}
            )
    return settings(**values)


def _parameter(
    name: str, field: _Field, text: Text | None, *, given_only: bool
) -> inspect.Parameter:
    kind = str if text else _plain(field.type)
    default = field.default
    shown: bool | str = True
    if text and default is not None and default is not dataclasses.MISSING:
        default = text.show(default)
    if given_only:
        shown = False if default in (None, dataclasses.MISSING) else str(default)
        default = None
    if default is dataclasses.MISSING:
        default = inspect.Parameter.empty
    option = typer.Option(_flag(name, kind), help=field.help, show_default=shown)
    annotation = kind | None if default is None else kind
    return inspect.Parameter(
        name,
        inspect.Parameter.KEYWORD_ONLY,
        default=default,
        annotation=Annotated[annotation, option],
    )


def _flag(name: str, kind: type) -> str:
    """`--k` also for a name of one letter, which typer would make `-k`."""
    flag = "--" + name.replace("_", "-")
    return f"{flag}/--no-{flag[2:]}" if kind is bool else flag


def _alternatives(hint: Any) -> list[Any]:
    """The types of a union but None."""
    union = typing.get_origin(hint) in (typing.Union, types.UnionType)
    return [kind for kind in typing.get_args(hint) if kind is not type(None)] if union else [hint]


def _is_names(hint: Any) -> bool:
    return any(
        typing.get_origin(kind) is tuple and typing.get_args(kind) == (str, ...)
        for kind in _alternatives(hint)
    )


def _plain(hint: Any) -> type:
    """The type that typer is to parse: text where it knows none."""
    kinds = _alternatives(hint)
    return kinds[0] if len(kinds) == 1 and kinds[0] in (int, float, bool) else str


def attributes(described: type) -> dict[str, str]:
    """What a docstring's "Attributes:" says of each name, as a sentence."""
    _, _, section = (inspect.getdoc(described) or "").partition("\nAttributes:\n")
    described_as: dict[str, list[str]] = {}
    name = ""
    for line in section.splitlines():
        start = re.match(r"  (\w+): (.*)", line)
        if start:
            name = start[1]
            described_as[name] = [start[2]]
        elif line.startswith("   ") and name:
            described_as[name].append(line.strip())
        elif line.strip():  # the next section
            break
    return {name: _sentence(" ".join(lines)) for name, lines in described_as.items()}


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:]
