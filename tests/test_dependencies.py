"""What pyproject declares is what is imported."""

import ast
import itertools
import re
import sys
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

RUN_NOT_IMPORTED = {
    "": {"pip"},  # fetches `smollm2-135m`
    "test": {"ipykernel", "pytest-xdist"},  # the kernel of the notebooks; `pytest -n`
    "oracle": {"accelerate"},  # transformers reads GGUF with it
}
OURS = {"jaxneurons", "support"} | {path.stem for path in (ROOT / "benchmarks").glob("*.py")}


def declared(extra=""):
    """The distributions that pyproject asks for, by name in small letters and with hyphens."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    lines = project["optional-dependencies"][extra] if extra else project["dependencies"]
    return {re.match(r"[\w-]+", line)[0].lower().replace("_", "-") for line in lines}


def imported(*places):
    """The distributions whose modules are imported, at the top or anywhere below."""
    modules = set()
    for path in itertools.chain.from_iterable(sorted((ROOT / at).rglob("*.py")) for at in places):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                modules |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                modules.add(node.module)
            elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("importorskip"):
                modules.add(node.args[0].value)
    tops = {module.split(".")[0] for module in modules} - sys.stdlib_module_names - OURS
    of = packages_distributions()
    return {(*(name.lower().replace("_", "-") for name in of.get(top, [top])),) for top in tops}


def test_what_the_package_imports_is_declared_and_nothing_else():
    names = imported("jaxneurons", "convert")
    asked = declared()
    optional = declared("oracle")  # for `jaxneurons verify`
    assert {names_of for names_of in names if not {*names_of} & (asked | optional)} == set()
    assert asked - {name for names_of in names for name in names_of} == RUN_NOT_IMPORTED[""]
    assert {names_of for names_of in names if not {*names_of} & asked} == {("torch",)}


def test_what_tests_and_benchmarks_import_is_declared_and_nothing_else():
    tests, benchmarks = imported("tests"), imported("benchmarks")
    extras = {extra: declared(extra) for extra in ("test", "oracle")}
    everything = declared() | extras["test"] | extras["oracle"] | declared("tpu-plan")
    assert {names for names in tests | benchmarks if not {*names} & everything} == set()
    used = {name for names in tests for name in names}
    assert extras["test"] - used == RUN_NOT_IMPORTED["test"]
    used |= {name for names in benchmarks for name in names}
    assert extras["oracle"] - used == RUN_NOT_IMPORTED["oracle"]
