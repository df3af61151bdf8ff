"""The order of the packages, who may import whom, and what is public.

README's table under "How it is built" lists the packages bottom first: nothing imports from above
it, and the systems beside each other never import each other.
"""

import ast
import importlib
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "jaxneurons"
SYSTEMS = ("qrnca", "relspec", "edit")
"""They stand on one floor, side by side; each may import itself and what is below."""
SHARED = {"lazy", "data"}
"""What makes faces, and files that are no code."""


def floors():
    """Package or module to floor, from the rows of the table under "How it is built"."""
    text = (ROOT / "README.md").read_text().split("## How it is built")[1].split("\n## ")[0]
    rows = [line.split("|")[1] for line in text.splitlines() if line.startswith("| `")]
    names = [re.findall(r"`(\w+)`", row) for row in rows]
    return {name: number for number, row in enumerate(names) for name in row}


def imported(path):
    """Dotted names below `jaxneurons` that a file imports when it runs."""
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and getattr(node.test, "id", "") == "TYPE_CHECKING":
            node.body = []
    return list(_imported(tree))


def _imported(tree):
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module:
            top, *rest = node.module.split(".")
            if top == "jaxneurons":
                yield from ([".".join(rest)] if rest else [alias.name for alias in node.names])
        elif isinstance(node, ast.Import):
            yield from (a.name[11:] for a in node.names if a.name.startswith("jaxneurons."))


def places():
    """Every package or top-level module of the library, with its files."""
    found = {path.stem: [path] for path in PACKAGE.glob("*.py")} | {
        path.name: sorted(path.rglob("*.py")) for path in PACKAGE.iterdir() if path.is_dir()
    }
    found["convert"] = sorted((ROOT / "convert").rglob("*.py"))
    return {
        name: files
        for name, files in found.items()
        if files and not name.startswith("__") and name not in SHARED
    }


def test_nothing_imports_from_above():
    floor, found = floors(), places()
    assert floor.keys() == found.keys(), floor.keys() ^ found.keys()
    seen = 0
    for name, files in found.items():
        for path in files:
            for other in {dotted.split(".")[0] for dotted in imported(path)} & floor.keys():
                assert other == name or floor[other] < floor[name], f"{path} imports {other}"
                seen += 1
    assert seen > 100
    assert len({floor[name] for name in SYSTEMS}) == 1


def names_of(package):
    """What a face imports, and its `__all__`."""
    where = ROOT / "convert" if package == "convert" else PACKAGE / package
    tree = ast.parse((where / "__init__.py").read_text())
    names = {
        alias.asname or alias.name
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("jaxneurons")
        for alias in node.names
    }
    return names - {"face"}


@pytest.mark.parametrize(
    "package", ["", *(name for name, files in places().items() if len(files) > 1)]
)
def test_a_face_says_what_it_holds(package):
    module = importlib.import_module(f"jaxneurons.{package}".rstrip("."))
    assert module.__doc__
    assert names_of(package) == set(module.__all__) - {"__version__"}
    assert len(set(module.__all__)) == len(module.__all__)
    for name in module.__all__:
        assert getattr(module, name) is not None
        assert name in dir(module)
    if package:  # or whoever imports the module of that name first gets it from the face
        assert {path.stem for path in (PACKAGE / package).glob("*.py")} & names_of(package) == set()
    with pytest.raises(AttributeError, match="nothing_of_ours"):
        module.nothing_of_ours  # noqa: B018


@pytest.mark.parametrize(
    "path", sorted((ROOT / "tests").rglob("conftest.py")), ids=lambda path: path.parent.name
)
def test_conftests_import_the_package_in_fixtures_only(path):
    # pytest imports those beside the files it is given before jaxtyping 0.2.36 instruments the
    # package, which must not be imported then.
    names = [
        name
        for node in ast.parse(path.read_text()).body
        if isinstance(node, ast.Import | ast.ImportFrom)
        for name in [getattr(node, "module", None) or "", *(alias.name for alias in node.names)]
    ]
    assert [name for name in names if name.split(".")[0] == "jaxneurons"] == []
