"""What README, documentation, notebooks and benchmarks show: it runs, and it uses faces only.

Every Python block of README and `docs/` is run, those of a page one after the other in one
namespace. A block that is not says why in an HTML comment on the line before it:
`<!-- no run: REASON -->`. They are counted here.
"""

import ast
import dataclasses
import importlib
import re
import sys
from pathlib import Path
from types import ModuleType

import nbformat
import pytest

ROOT = Path(__file__).resolve().parent.parent
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    *sorted((ROOT / "docs").rglob("*.md")),
]
NOT_RUN = {"docs/families.md": 1, "docs/pod.md": 1}
"""Blocks that are not run, by page."""
LAB = {"smollm2-135m": "lab"}
"""Models that a page may name, and the one that is loaded here instead."""

_FENCE = re.compile(
    r"(?:^<!-- no run: (?P<reason>[^\n]*?) -->\n)?^```python\n(?P<code>.*?)^```$", re.M | re.S
)


@dataclasses.dataclass(frozen=True)
class Block:
    """A Python block of a page.

    Attributes:
      page: its file, from the root.
      line: of the file, of the first line of the code, from 1.
      code: what is between the fences.
      reason: why it is not run, if it says so.
    """

    page: str
    line: int
    code: str
    reason: str | None


def blocks_of(text: str, page: str) -> list[Block]:
    return [
        Block(page, 1 + text.count("\n", 0, match.start("code")), match["code"], match["reason"])
        for match in _FENCE.finditer(text)
    ]


def page_name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


BLOCKS = {
    page_name(path): blocks
    for path in PAGES
    if (blocks := blocks_of(path.read_text("utf-8"), page_name(path)))
}


def test_blocks_are_found_with_line_and_reason():
    text = "a\n```python\nx = 1\n```\n\n<!-- no run: it is slow -->\n```python\ny = 2\n```\n"
    first, second = blocks_of(text, "p.md")
    assert (first.line, first.code, first.reason) == (3, "x = 1\n", None)
    assert (second.line, second.code, second.reason) == (8, "y = 2\n", "it is slow")


def test_no_block_escapes():
    """As many fences are matched as are opened, and those that are not run are these."""
    for path in PAGES:
        opened = len(re.findall(r"^\s*(?:```|~~~)\s*\{?\.?py", path.read_text("utf-8"), re.M))
        assert opened == len(BLOCKS.get(page_name(path), [])), path
    not_run = {
        page: count
        for page, blocks in BLOCKS.items()
        if (count := sum(block.reason is not None for block in blocks))
    }
    assert not_run == NOT_RUN
    assert {"README.md", "docs/index.md", "docs/sites.md"} <= BLOCKS.keys()


SOON = ("README.md",)
"""Pages whose blocks run in every run of the tests; the others are slow."""


@pytest.mark.parametrize(
    "page",
    [page if page in SOON else pytest.param(page, marks=pytest.mark.slow) for page in BLOCKS],
)
def test_blocks_run(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    module = ModuleType("page")  # a dataclass looks its module up
    monkeypatch.setitem(sys.modules, "page", module)
    for block in BLOCKS[page]:
        code = block.code
        for name, instead in LAB.items():
            code = code.replace(f'"{name}"', f'"{instead}"')
        # As many lines before it as in the page, so that a traceback names the page's line.
        program = compile("\n" * (block.line - 1) + code, str(ROOT / page), "exec")
        if block.reason is None:
            exec(program, vars(module))


def sources() -> dict[str, str]:
    """Python that uses the library from outside, by where it is."""
    found = {
        f"{block.page}:{block.line}": block.code for blocks in BLOCKS.values() for block in blocks
    }
    for path in sorted((ROOT / "benchmarks").glob("*.py")):
        found[page_name(path)] = path.read_text("utf-8")
    for path in sorted((ROOT / "notebooks").glob("*.ipynb")):
        cells = nbformat.read(path, as_version=4).cells
        code = "\n".join(cell.source for cell in cells if cell.cell_type == "code")
        found[page_name(path)] = code
    return found


def public_names(module: ModuleType) -> set[str]:
    names = getattr(module, "__all__", None)
    return set(names) if names is not None else {n for n in vars(module) if n[0] != "_"}


def face(name: str) -> ModuleType | None:
    """`jaxneurons`, or a module that it shows."""
    top = importlib.import_module("jaxneurons")
    if name == "jaxneurons":
        return top
    outer, _, inner = name.partition(".")
    shown = getattr(top, inner) if outer == "jaxneurons" and inner in top.__all__ else None
    return shown if isinstance(shown, ModuleType) else None


def inner_uses(code: str) -> list[str]:
    """What code uses of `jaxneurons` that no face shows."""
    tree, found = ast.parse(code), []
    bound: dict[str, str] = {}  # names that stand for a face
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.partition(".")[0] == "jaxneurons":
                    if face(alias.name) is None:
                        found.append(f"import {alias.name}")
                    bound[alias.asname or "jaxneurons"] = (
                        alias.name if alias.asname else "jaxneurons"
                    )
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            module = node.module or ""
            if module.partition(".")[0] != "jaxneurons":
                continue
            shown = face(module)
            for alias in node.names:
                inner = f"{module}.{alias.name}"
                if shown is None or (alias.name not in public_names(shown) and face(inner) is None):
                    found.append(f"from {module} import {alias.name}")
                elif face(inner) is not None:
                    bound[alias.asname or alias.name] = inner
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            owner = dotted(node.value)
            first, *rest = owner.split(".") if owner else [""]
            if first not in bound:
                continue
            name = ".".join([bound[first], *rest])
            shown = face(name)
            if shown is not None and node.attr not in public_names(shown):
                found.append(f"{name}.{node.attr}")
    return found


def dotted(node: ast.expr) -> str | None:
    """`a.b.c` of an expression that is only that."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute) and (owner := dotted(node.value)):
        return f"{owner}.{node.attr}"
    return None


@pytest.mark.parametrize(
    ("code", "inner"),
    [
        ("import jaxneurons as jn\njn.load, jn.__version__, jn.NeuronSet.of", []),
        ("from jaxneurons import load, qrnca\nfrom jaxneurons.neurons import NeuronSet", []),
        ("import jaxneurons.model\njaxneurons.model.forward", []),
        ("from jaxneurons.errors import DataError", []),
        (
            "from jaxneurons.neurons.sets import NeuronSet",
            ["from jaxneurons.neurons.sets import NeuronSet"],
        ),
        ("import jaxneurons.model.layers", ["import jaxneurons.model.layers"]),
        ("from jaxneurons.model import layers", ["from jaxneurons.model import layers"]),
        ("import jaxneurons as jn\njn.model.layers.block", ["jaxneurons.model.layers"]),
        (
            "from jaxneurons import model as m\nm.layers, m.forward",
            ["jaxneurons.model.layers"],
        ),
    ],
)
def test_inner_uses_are_seen(code, inner):
    assert inner_uses(code) == inner


def test_only_faces_are_used():
    found = {where: inner for where, code in sources().items() if (inner := inner_uses(code))}
    assert found == {}
    assert len([where for where in sources() if where.endswith(".ipynb")]) == 4


def test_every_face_has_its_page_of_the_api():
    shown = {"jaxneurons": "index"} | {
        f"jaxneurons.{name}": name
        for name in importlib.import_module("jaxneurons").__all__
        if face(f"jaxneurons.{name}")
    }
    navigation = (ROOT / "mkdocs.yml").read_text("utf-8")
    for name, page in shown.items():
        text = (ROOT / "docs" / "api" / f"{page}.md").read_text("utf-8")
        assert f"\n::: {name}\n" in text
        assert f" api/{page}.md\n" in navigation
    assert len(shown) == 1 + len(list((ROOT / "docs" / "api").glob("*.md"))) - 1
