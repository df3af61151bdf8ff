"""Options of settings dataclasses, as typer makes them into a command."""

import dataclasses
import re

import pytest
import typer
from typer.testing import CliRunner

from jaxneurons.terminal.options import IgnoreKeys, Text, attributes, changed, settings_options


@dataclasses.dataclass(frozen=True)
class Grid:
    """A rule.

    Attributes:
      rule: its name.
      nodes: how many.
    """

    rule: str = "gauss"
    nodes: int | None = None


@dataclasses.dataclass(frozen=True)
class Study:
    """Made for these tests.

    Attributes:
      sites: the neurons; a text
        over two lines.
      share: of all neurons, below 1.
      count: how many.
      exact: nothing is rounded.
      grid: of the integral.
      limit: at most so many; None: all.

    Raises:
      count: is no attribute.
    """

    sites: tuple[str, ...] = ("up", "down")
    share: float = 0.25
    count: int = 3
    exact: bool = False
    grid: Grid = Grid("right", 16)
    limit: int | None = None

    def __post_init__(self):
        if self.count < 1:
            raise ValueError("count must be at least 1")


PERCENT = Text(lambda text: float(text.rstrip("%")) / 100, lambda share: f"{100 * share:g}%")


def called(arguments, **how):
    """What a command gets."""
    app = typer.Typer()
    seen = {}

    @app.command()
    @settings_options(Study, texts={"share": PERCENT}, **how)
    def command(model: str, out: str = "here", *, settings: Study, ignore_key: IgnoreKeys = None):
        """What it does."""
        seen.update(model=model, out=out, settings=settings, ignore_key=ignore_key)

    result = CliRunner().invoke(app, arguments, env={"COLUMNS": "200", "NO_COLOR": "1"})
    return result, seen


def test_defaults_are_the_dataclass_s():
    result, seen = called(["--model", "m"])
    assert result.exit_code == 2  # an argument, as typer has it: the wrapper changes no kind
    result, seen = called(["m"])
    assert result.exit_code == 0
    assert seen == {"model": "m", "out": "here", "settings": Study(), "ignore_key": None}


def test_every_field_has_an_option():
    line = "m --out o --sites up,,gate --share 5% --count 4 --exact --rule left --nodes 8 --limit 2"
    result, seen = called([*line.split(), "--ignore-key", "a", "--ignore-key", "b"])
    assert result.exit_code == 0, result.output
    assert seen["settings"] == Study(("up", "gate"), 0.05, 4, True, Grid("left", 8), 2)
    assert seen["ignore_key"] == ["a", "b"]


def test_help_and_defaults_are_shown():
    result, _ = called(["--help"])
    lines = re.sub(r"[^\S\n]+", " ", result.output)
    assert "What it does." in lines
    for option, text in {
        "--sites": r"The neurons; a text over two lines\. \[default: up,down\]",
        "--share": r"Of all neurons, below 1\. \[default: 25%\]",
        "--nodes": r"How many\. \[default: 16\]",
        "--limit": r"At most so many; None: all\. \S*\n",
    }.items():
        assert re.search(rf"{option} \S+ {text}", lines), option
    assert "--grid" not in lines


def test_the_settings_check_what_they_get():
    result, seen = called(["m", "--count", "0"])
    assert isinstance(result.exception, ValueError)
    assert not seen


def test_only_some_fields_and_only_what_was_given():
    result, seen = called(
        ["m", "--nodes", "5"], only=("rule", "nodes", "count"), changes=True, parameter="settings"
    )
    assert result.exit_code == 0, result.output
    assert seen["settings"] == {"nodes": 5}
    assert changed(Study(count=9), seen["settings"]) == Study(count=9, grid=Grid("right", 5))
    result, _ = called(["m", "--sites", "up"], only=("count",))
    assert result.exit_code == 2
    with pytest.raises(TypeError, match="no field 'cont'"):
        settings_options(Study, only=("cont",))


def test_changes_refuse_nothing_silently():
    assert changed(Study(), {}) == Study()
    with pytest.raises(ValueError, match="at least 1"):
        changed(Study(), {"count": 0})
    with pytest.raises(TypeError, match="Study has no field 'nods'"):
        changed(Study(), {"nods": 3})


def test_attributes_of_a_docstring():
    assert attributes(Grid) == {"rule": "Its name.", "nodes": "How many."}
    assert attributes(Study)["count"] == "How many."
    assert attributes(object) == {}
