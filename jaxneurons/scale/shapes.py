"""What a plan needs to know of a model: its shape, by name or from headers; no weight is read."""

import dataclasses
import os
import re
from pathlib import Path

from jaxneurons.checkpoints.fetch import locate_source
from jaxneurons.convert.gguf import config_of, open_gguf
from jaxneurons.convert.hf import CONFIG, read_config
from jaxneurons.convert.native import MARKER, read_marker
from jaxneurons.errors import SourceError, near_matches
from jaxneurons.model.config import ModelConfig, RopeConfig


def _llama(
    vocab: int, hidden: int, intermediate: int, layers: int, heads: int, kv_heads: int
) -> ModelConfig:
    llama3 = vocab > 100_000
    return ModelConfig(
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=hidden // heads,
        max_position=131_072 if llama3 else 4096,
        rope=RopeConfig(theta=500_000.0) if llama3 else RopeConfig(),
        tied=hidden == 2048,
    )


SHAPES = {
    "1B": _llama(128_256, 2048, 8192, 16, 32, 8),  # Llama 3.2 1B
    "7B": _llama(32_000, 4096, 11_008, 32, 32, 32),  # Llama 2 7B
    "8B": _llama(128_256, 4096, 14_336, 32, 32, 8),  # Llama 3.1 8B
    "13B": _llama(32_000, 5120, 13_824, 40, 40, 40),  # Llama 2 13B
    "70B": _llama(32_000, 8192, 28_672, 80, 64, 8),  # Llama 2 70B
}
"""Published shapes by the number of their parameters."""


@dataclasses.dataclass(frozen=True)
class Shape:
    """A model as a plan sees it.

    Attributes:
      name: of the shape, or of the source.
      config: its shape.
    """

    name: str
    config: ModelConfig


def read_shape(model: str | os.PathLike[str] | ModelConfig) -> Shape:
    """The shape of a model: "1B", "7B", "8B", "13B", "70B", a config.json, or what `load` takes.

    Raises:
      SourceError: no such shape, or a source that cannot be found or read.
      ConfigError: a configuration that is not supported.
    """
    if isinstance(model, ModelConfig):
        return Shape("the configuration given", model)
    name = str(model)
    if name.upper() in SHAPES:
        return Shape(name.upper(), SHAPES[name.upper()])
    if re.fullmatch(r"\d+(\.\d+)?[bB]", name) and not Path(name).exists():
        raise SourceError(
            f"there is no shape {name!r}; {near_matches(name.upper(), SHAPES)}: give one of them, "
            "a config.json, a directory, a .gguf file or a hub id"
        )
    path = Path(name).expanduser()
    if path.is_file() and path.name == CONFIG:
        return Shape(name, read_config(path.parent))
    if path.is_file() and path.suffix == ".json":
        raise SourceError(f"{name}: a configuration must be called {CONFIG}")
    where, label = locate_source(model, weights=False)
    if where.is_file():
        return Shape(label, config_of(open_gguf(where)))
    if (where / MARKER).is_file():
        return Shape(label, read_marker(where)[0])
    return Shape(label, read_config(where))
