"""Eight CPU devices and full float32 matmuls for every test; the real model, loaded once."""

import gc
import importlib.util
import inspect
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

import jax
import pytest

# Before JAX initialises its backends. Rank promotion stays allowed: norms, biases of the mask and
# rotary angles are written as broadcasts.
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_default_matmul_precision", "highest")
# Types are mixed on purpose or not at all.
jax.config.update("jax_numpy_dtype_promotion", "strict")
# Tiny models: compiling takes most of the time. Tests of the real one compile as users do.
jax.config.update("jax_disable_most_optimizations", True)

QUICK_TO_COMPILE = "--xla_cpu_use_fusion_emitters=false"
"""XLA's older emitters of fused operations: a tiny model compiles in a third of the time."""

WORTH_KEEPING = 0.2
"""Seconds: what compiles faster is compiled anew."""

SAMPLES = Path(__file__).with_name("data")
FORMATS = {"query_file": ("qrneuron", "*.json"), "relation_directory": ("", "lre")}
"""By fixture, where in a directory of data its files are: one test each."""


class Published(NamedTuple):
    """A file or directory in a published format, and whether it is what was published."""

    path: Path
    genuine: bool


def pytest_addoption(parser):
    parser.addoption(
        "--data",
        type=Path,
        metavar="DIR",
        help="run the checks of published formats on the files in DIR/qrneuron and DIR/lre too "
        "(--data=DIR: after a space pytest would take DIR for what to collect)",
    )


def pytest_configure(config):
    compile_quickly()
    share_programs(config)
    given = config.getoption("data")
    for folder, pattern in FORMATS.values() if given is not None else []:
        if not any((given / folder).glob(pattern)):
            raise pytest.UsageError(f"--data: there is no {pattern} in {given / folder}")


def compile_quickly():
    """For this process and those that it starts, where XLA knows how; else it would end them."""
    flags = os.environ.get("XLA_FLAGS", "")
    if QUICK_TO_COMPILE.partition("=")[0] in flags:  # the caller's choice, or that of all workers
        return
    if importlib.util.find_spec("libtpu") is not None:  # reads them too, and knows none of a CPU's
        return
    flags = f"{flags} {QUICK_TO_COMPILE}".strip()
    environment = {**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    started = subprocess.run(
        [sys.executable, "-c", "import jax; jax.devices()"], env=environment, capture_output=True
    )
    if started.returncode == 0:
        os.environ["XLA_FLAGS"] = flags


def share_programs(config):
    """Keep what is compiled for the other tests of this run, also those in other processes."""
    if jax.config.jax_compilation_cache_dir is None:  # else: the caller's, or that of all workers
        directory = tempfile.mkdtemp()
        config.add_cleanup(lambda: shutil.rmtree(directory, ignore_errors=True))
        os.environ["JAX_COMPILATION_CACHE_DIR"] = directory
        os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = str(WORTH_KEEPING)
        jax.config.update("jax_compilation_cache_dir", directory)
        jax.config.update("jax_persistent_cache_min_compile_time_secs", WORTH_KEEPING)


def pytest_generate_tests(metafunc):
    given = metafunc.config.getoption("data")
    for name, (folder, pattern) in FORMATS.items():
        if name not in metafunc.fixturenames:
            continue
        cases = [Published(path, False) for path in sorted((SAMPLES / folder).glob(pattern))]
        if given is not None:
            cases += [Published(path, True) for path in sorted((given / folder).glob(pattern))]
        ids = [f"{'published' if case.genuine else 'sample'}-{case.path.stem}" for case in cases]
        metafunc.parametrize(name, cases, ids=ids)


MAPS = Path("/proc/self/maps")
MOST_MAPS = 20_000  # of the 65,530 that Linux allows a process by default


@pytest.fixture(autouse=True)
def few_programs(request):
    """Forget compiled programs before they fill the process's memory maps: XLA would crash."""
    yield
    request.config.tests_run = getattr(request.config, "tests_run", 0) + 1
    if request.config.tests_run % 10 == 0 and MAPS.exists():
        with MAPS.open("rb") as file:
            count = sum(1 for _ in file)
        if count > MOST_MAPS:
            jax.clear_caches()
            gc.collect()


@pytest.fixture(autouse=True, scope="session")
def settings_check_themselves():
    """Wrong fields are refused with errors of the settings' own, where beartype would be first."""
    from jaxneurons.engine.quadrature import Quadrature
    from jaxneurons.qrnca.method import QRNCAConfig

    for settings in (QRNCAConfig, Quadrature):
        settings.__init__ = inspect.unwrap(settings.__init__)


@pytest.fixture(autouse=True)
def compiled_as_for_users(request):
    """Tests of the real models and others that run for longer than they are compiled."""
    marks = ("smollm2", "gemma3", "optimised")
    long = any(request.node.get_closest_marker(name) for name in marks)
    if long:
        jax.config.update("jax_disable_most_optimizations", False)
    yield
    if long:
        jax.config.update("jax_disable_most_optimizations", True)


BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"


@pytest.fixture
def as_users_call():
    """Without the type checker that tests put around every function: arguments reach our checks."""
    from jaxtyping import config

    config.update("jaxtyping_disable", True)
    yield
    config.update("jaxtyping_disable", False)


@pytest.fixture(scope="session")
def samples() -> Path:
    """Small files in the published formats, written for the tests."""
    return SAMPLES


@pytest.fixture(scope="session")
def smollm2_path() -> Path:
    """SmolLM2-135M-Instruct as GGUF, fetched once and cached."""
    from jaxneurons.checkpoints.fetch import fetch_smollm2

    return fetch_smollm2()


@pytest.fixture(scope="session")
def smollm2(smollm2_path):
    """SmolLM2-135M-Instruct as this library loads it."""
    import jaxneurons

    return jaxneurons.load("smollm2-135m")


@pytest.fixture(scope="session")
def gemma3_path() -> Path:
    """Gemma 3 270M as GGUF, fetched once and cached; its tests are skipped where it cannot be."""
    from jaxneurons.checkpoints.fetch import fetch_model
    from jaxneurons.errors import SourceError

    try:
        return fetch_model("gemma3-270m")
    except SourceError as error:
        pytest.skip(f"Gemma 3 270M is not here: {error}")


@pytest.fixture(scope="session")
def gemma3(gemma3_path):
    """Gemma 3 270M as this library loads it."""
    import jaxneurons

    return jaxneurons.load("gemma3-270m")


@pytest.fixture(scope="session")
def published():
    """The PyTorch baseline and oracle, `benchmarks/published.py`."""
    pytest.importorskip("torch")
    if str(BENCHMARKS) not in sys.path:
        sys.path.insert(0, str(BENCHMARKS))
    import published  # pyright: ignore[reportMissingImports]

    return published


@pytest.fixture(scope="session")
def torch_smollm2(published, smollm2_path):
    """The same file as transformers reads it: (model, tokenizer), float32.

    Its tokenizer splits digits after whitespace otherwise than the model's own: feed it ids from
    `smollm2.tokenizer`.
    """
    return published.load_torch(smollm2_path)


@pytest.fixture(scope="session")
def torch_gemma3(gemma3_path):
    """The same file as transformers reads it, float32.

    Without its tokenizer, which takes most of a minute: feed it ids from `gemma3.tokenizer`.
    """
    torch = pytest.importorskip("torch")
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        gemma3_path.parent, gguf_file=gemma3_path.name, dtype=torch.float32
    )
    return model.eval().requires_grad_(False)


@pytest.fixture
def run(monkeypatch, capsys):
    """Run the command line; returns (exit code, standard output, standard error)."""

    from jaxneurons import cli

    monkeypatch.setattr(
        "jaxneurons.terminal.stopping.leave", sys.exit
    )  # not the process of the tests

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["jaxneurons", *map(str, arguments)])
        capsys.readouterr()
        try:
            cli.main()
            code = 0
        except SystemExit as stop:
            code = stop.code or 0
        out, err = capsys.readouterr()
        return code, out, err

    return run
