"""Conversion between published checkpoints (Hugging Face, GGUF) and this library's parameters."""

from typing import TYPE_CHECKING

from jaxneurons.lazy import face

if TYPE_CHECKING:
    from jaxneurons.convert.config import config_from_hf
    from jaxneurons.convert.export import config_to_hf, write_hf
    from jaxneurons.convert.gguf import open_gguf, read_gguf
    from jaxneurons.convert.hf import read_config, read_hf
    from jaxneurons.convert.native import read_native
    from jaxneurons.convert.rules import rules_for, stored_names
    from jaxneurons.convert.safetensors_file import ToWrite, open_safetensors, write_safetensors
    from jaxneurons.convert.tokenizer import tokenizer_from_gguf
    from jaxneurons.convert.tokenizer_directory import tokenizer_from_directory

__getattr__, __dir__ = face(__name__, __file__)

__all__ = [
    "ToWrite",
    "config_from_hf",
    "config_to_hf",
    "open_gguf",
    "open_safetensors",
    "read_config",
    "read_gguf",
    "read_hf",
    "read_native",
    "rules_for",
    "stored_names",
    "tokenizer_from_directory",
    "tokenizer_from_gguf",
    "write_hf",
    "write_safetensors",
]
