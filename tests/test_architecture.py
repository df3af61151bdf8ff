"""README's table of floors, bottom first: every module is in it and imports from no floor above."""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "jaxneurons"


def floors():
    """Module or subpackage to floor, from the rows of the table under "How it is built"."""
    text = (ROOT / "README.md").read_text().split("## How it is built")[1].split("\n## ")[0]
    rows = [line.split("|")[2] for line in text.splitlines() if line.startswith("| ")]
    return {
        name.rstrip("/"): number
        for number, row in enumerate(rows)
        for name in re.findall(r"`([\w/]+)`", row)
    }


def imports(path):
    """Modules of the package that a file imports when it runs."""
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and getattr(node.test, "id", "") == "TYPE_CHECKING":
            node.body = []
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module and node.module != "__future__":
            top, *rest = node.module.split(".")
            if top == "jaxneurons":
                yield from rest[:1] or [alias.name for alias in node.names]


def test_no_module_imports_from_a_floor_above():
    floor = floors()
    modules = {path.stem: [path] for path in PACKAGE.glob("*.py") if path.stem != "__init__"}
    modules["lab"] = list((PACKAGE / "lab").glob("*.py"))
    assert modules.keys() <= floor.keys(), modules.keys() - floor.keys()
    assert floor.keys() <= modules.keys() | {"convert"}, floor.keys() - modules.keys()
    seen = 0
    for name, paths in modules.items():
        for other in {other for path in paths for other in imports(path)} & floor.keys():
            assert floor[other] <= floor[name], f"{name} imports {other}"
            seen += 1
    assert seen > 100
