"""What an installed jaxneurons looks like from outside."""

import subprocess
import sys
from importlib.metadata import entry_points, requires, version
from importlib.resources import files

import jaxneurons


def test_it_is_typed():
    assert files("jaxneurons").joinpath("py.typed").is_file()


def test_version_is_the_distributions():
    assert jaxneurons.__version__ == version("jaxneurons")


def test_everything_exported_exists():
    assert [name for name in jaxneurons.__all__ if not hasattr(jaxneurons, name)] == []
    assert len(set(jaxneurons.__all__)) == len(jaxneurons.__all__)


def test_torch_is_an_optional_dependency():
    needed = [line for line in requires("jaxneurons") or [] if "extra ==" not in line]
    assert needed
    assert not [line for line in needed if line.startswith(("torch", "accelerate"))]


# In a clean interpreter, away from the checkout (where convert/ is on the path) and from what
# other tests imported.
def _python(code: str, directory) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=directory, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_convert_is_inside_the_package_only(tmp_path):
    code = (
        "import importlib.util, jaxneurons.convert;"
        "print(jaxneurons.convert.__name__, importlib.util.find_spec('convert'))"
    )
    assert _python(code, tmp_path) == "jaxneurons.convert None"


def test_import_is_light(tmp_path):
    code = "import sys, jaxneurons; print({'torch', 'accelerate', 'matplotlib'} & {*sys.modules})"
    assert _python(code, tmp_path) == "set()"


def test_the_program_heeds_signals_before_it_imports_what_is_slow(tmp_path):
    code = "import sys, jaxneurons.__main__; print({'jax', 'numpy', 'typer'} & {*sys.modules})"
    assert _python(code, tmp_path) == "set()"


def test_the_program_is_a_module_too(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "jaxneurons", "--version"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout.strip() == version("jaxneurons"), done.stderr
    assert entry_points(group="console_scripts", name="jaxneurons")["jaxneurons"].value == (
        "jaxneurons.__main__:main"
    )
