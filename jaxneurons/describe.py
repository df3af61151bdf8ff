"""What a checkpoint is, from its headers: no weight is read."""

import dataclasses
from pathlib import Path
from typing import Any

from jaxneurons.config import ModelConfig
from jaxneurons.convert.gguf import config_of, open_gguf
from jaxneurons.convert.hf import hf_tensors, read_config
from jaxneurons.convert.native import MARKER, read_marker
from jaxneurons.convert.rules import param_sizes
from jaxneurons.errors import SourceError
from jaxneurons.load import locate_source, read_tokenizer
from jaxneurons.neurons import SITES, site_width

BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclasses.dataclass(frozen=True)
class Description:
    """What `jaxneurons inspect` shows.

    Attributes:
      source: name or path.
      kind: "Hugging Face", "GGUF" or "native".
      config: the model's shape.
      parameters: how many.
      stored: bytes of its weights on disk by stored type; empty if they are not here.
      neurons: by site, how many a layer has.
      memory: bytes of its parameters in memory by dtype.
      tokenizer: facts about it.
    """

    source: str
    kind: str
    config: ModelConfig
    parameters: int
    stored: dict[str, int]
    neurons: dict[str, int]
    memory: dict[str, int]
    tokenizer: dict[str, Any]


def describe(source: str, *, revision: str | None = None) -> Description:
    """Describe a model without loading it.

    Raises:
      SourceError: the source cannot be found, or its headers cannot be read.
      ConfigError: the model's configuration is not supported.
    """
    path, label = locate_source(source, revision=revision, weights=False)
    kind, config, stored = _headers(path)
    count = sum(param_sizes(config))
    return Description(
        source=label,
        kind=kind,
        config=config,
        parameters=count,
        stored=stored,
        neurons={site: site_width(config, site) for site in SITES},
        memory={name: count * width for name, width in BYTES.items()},
        tokenizer=_tokenizer_facts(path),
    )


def _headers(path: Path) -> tuple[str, ModelConfig, dict[str, int]]:
    stored: dict[str, int] = {}

    def add(name: str, nbytes: int) -> None:
        stored[name] = stored.get(name, 0) + nbytes

    if path.is_file():
        from gguf.constants import GGMLQuantizationType

        header = open_gguf(path)
        for tensor in header.tensors.values():
            add(GGMLQuantizationType(tensor.kind).name, tensor.nbytes)
        return "GGUF", config_of(header), stored
    if (path / MARKER).is_file():
        config, facts = read_marker(path)
        size = sum(f.stat().st_size for f in path.rglob("*") if f.is_file())
        add(facts["dtype"], size)
        return "native", config, stored
    config = read_config(path)
    try:
        for entries in hf_tensors(path).values():
            for entry in entries.values():
                add(entry.dtype.name, entry.nbytes)
    except SourceError:
        if any(path.glob("*.safetensors")):
            raise  # weights that are here, and damaged
    return "Hugging Face", config, stored


def _tokenizer_facts(path: Path) -> dict[str, Any]:
    tokenizer = read_tokenizer(path)
    begins = tokenizer("x")["input_ids"][:1] == [tokenizer.bos_token_id]
    return {
        "tokens": len(tokenizer),
        "bos": tokenizer.bos_token,
        "eos": tokenizer.eos_token,
        "bos put first": tokenizer.bos_token is not None and begins,
        "chat template": tokenizer.chat_template is not None,
    }
