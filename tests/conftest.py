from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def smollm2_path() -> Path:
    """SmolLM2-135M-Instruct as GGUF, fetched once and cached."""
    from jaxneurons.load import fetch_smollm2

    return fetch_smollm2()
