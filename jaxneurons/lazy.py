"""Faces of packages whose public names are imported when they are first used."""

import ast
import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any


def face(package: str, file: str) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """`__getattr__` and `__dir__` of a package (PEP 562).

    Its names are those that its file imports for type checkers, under `if TYPE_CHECKING:`, so that
    they stand once.

    Args:
      package: its `__name__`.
      file: its `__file__`.
    """
    where = _typed_imports(Path(file).read_text(encoding="utf-8"))

    def get(name: str) -> Any:
        if name == "__version__":
            from importlib.metadata import version

            return version(package)
        if name not in where:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        if where[name] == package:  # a package of its own
            return importlib.import_module(f"{package}.{name}")
        value = getattr(importlib.import_module(where[name]), name)
        setattr(sys.modules[package], name, value)
        return value

    def names() -> list[str]:
        version = () if "." in package else ("__version__",)
        return sorted({*vars(sys.modules[package]), *where, *version})

    return get, names


def _typed_imports(source: str) -> dict[str, str]:
    """Module of each name that is imported under `if TYPE_CHECKING:`."""
    blocks = [
        node
        for node in ast.parse(source).body
        if isinstance(node, ast.If) and getattr(node.test, "id", "") == "TYPE_CHECKING"
    ]
    return {
        alias.name: node.module or ""
        for block in blocks
        for node in block.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
