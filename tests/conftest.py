"""Two CPU devices and full float32 matmuls for every test; the real model, loaded once."""

import gc
import sys
from pathlib import Path

import jax
import pytest

# Before JAX initialises its backends. Rank promotion stays allowed: norms, biases of the mask and
# rotary angles are written as broadcasts.
jax.config.update("jax_num_cpu_devices", 2)
jax.config.update("jax_default_matmul_precision", "highest")

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


BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"


@pytest.fixture(scope="session")
def smollm2_path() -> Path:
    """SmolLM2-135M-Instruct as GGUF, fetched once and cached."""
    from jaxneurons.checkpoints.loading import fetch_smollm2

    return fetch_smollm2()


@pytest.fixture(scope="session")
def smollm2(smollm2_path):
    """SmolLM2-135M-Instruct as this library loads it."""
    import jaxneurons

    return jaxneurons.load("smollm2-135m")


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
