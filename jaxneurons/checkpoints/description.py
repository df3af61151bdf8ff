"""What a checkpoint is, from its headers: no weight is read."""

import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jaxneurons.checkpoints.fetch import locate_source
from jaxneurons.checkpoints.loading import check_keys, read_tokenizer
from jaxneurons.checkpoints.provenance import read_recorded_patches
from jaxneurons.convert.fill import match
from jaxneurons.convert.gguf import config_of, open_gguf, tensors_of
from jaxneurons.convert.hf import hf_tensors, left_out, read_config, stored_tensors
from jaxneurons.convert.native import MARKER, read_marker, recorded_keys
from jaxneurons.errors import SourceError
from jaxneurons.model.config import ModelConfig
from jaxneurons.model.parameters import count_parameters, site_widths

BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclasses.dataclass(frozen=True)
class Description:
    """What `jaxneurons inspect` shows.

    Attributes:
      source: name or path.
      kind: "Hugging Face", "GGUF" or "native"; whether it is the text part of a larger model.
      config: the model's shape.
      parameters: how many.
      stored: bytes of its weights on disk by stored type; empty if they are not here.
      neurons: by site, how many a layer has.
      memory: bytes of its parameters in memory by dtype.
      tokenizer: facts about it.
      patches: what its files record of patches that are in its parameters, in their order.
    """

    source: str
    kind: str
    config: ModelConfig
    parameters: int
    stored: dict[str, int]
    neurons: dict[str, int]
    memory: dict[str, int]
    tokenizer: dict[str, Any]
    patches: tuple[dict[str, Any], ...] = ()


def describe(
    source: str | os.PathLike[str], *, revision: str | None = None, ignore_keys: Sequence[str] = ()
) -> Description:
    """Describe a model without loading it.

    Args:
      source: as `load` takes it.
      revision: branch, tag or commit of a hub id.
      ignore_keys: as `load` takes them.

    Raises:
      SourceError: the source cannot be found, its headers cannot be read, or its tensors, by name
        and shape, are not those of the configuration.
      ConfigError: the model's configuration is not supported.
    """
    check_keys(ignore_keys)
    path, label = locate_source(source, revision=revision, weights=False)
    kind, config, stored = _headers(path, ignore_keys)
    count = count_parameters(config)
    return Description(
        source=label,
        kind=kind,
        config=config,
        parameters=count,
        stored=stored,
        neurons=site_widths(config),
        memory={name: count * width for name, width in BYTES.items()},
        tokenizer=_tokenizer_facts(path),
        patches=_patches(path),
    )


def _headers(path: Path, ignored: Sequence[str]) -> tuple[str, ModelConfig, dict[str, int]]:
    stored: dict[str, int] = {}

    def add(name: str, nbytes: int) -> None:
        stored[name] = stored.get(name, 0) + nbytes

    if path.is_file():
        from gguf.constants import GGMLQuantizationType

        header = open_gguf(path)
        for tensor in header.tensors.values():
            add(GGMLQuantizationType(tensor.kind).name, tensor.nbytes)
        config = config_of(header, ignore_keys=ignored)
        match(config, tensors_of(header), naming="gguf", where=str(path))
        return "GGUF", config, stored
    if (path / MARKER).is_file():
        config, facts = read_marker(path)
        recorded_keys(path, ignored)
        size = sum(f.stat().st_size for f in path.rglob("*") if f.is_file())
        add(facts["dtype"], size)
        return "native", config, stored
    config = read_config(path, ignore_keys=ignored)
    try:
        files = hf_tensors(path)
    except SourceError:
        if any(path.glob("*.safetensors")):
            raise  # weights that are here, and damaged
        return "Hugging Face", config, stored
    for entries in files.values():
        for name, entry in entries.items():
            if not left_out(config, [name]):
                add(entry.dtype.name, entry.nbytes)
    match(config, stored_tensors(files), naming="hf", where=str(path))
    others = left_out(config, (name for entries in files.values() for name in entries))
    return "Hugging Face" + (", its text part" if others else ""), config, stored


def _patches(path: Path) -> tuple[dict[str, Any], ...]:
    if not path.is_dir():
        return ()
    return read_recorded_patches(path, read_marker(path)[1] if (path / MARKER).is_file() else {})


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
