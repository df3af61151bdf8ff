"""What a family of models says of itself to readers and writers of checkpoints.

Each has a file in `families/`, with one `Family`. What all of its models share is stated in
`model/families.py`; here is how files state the rest: keys of configurations, names of tensors.
"""

import dataclasses
import re
from collections.abc import Callable, Mapping
from typing import Any

from jaxneurons.convert.keys import Keys
from jaxneurons.model.config import ModelConfig


@dataclasses.dataclass(frozen=True)
class Shape:
    """Sizes that the keys of a family are read against.

    Attributes:
      layers: blocks.
      hidden: width of the residual stream.
      heads: query heads.
      head_dim: width of a head.
      max_position: longest context, in tokens.
    """

    layers: int
    hidden: int
    heads: int
    head_dim: int
    max_position: int


Read = Callable[[Keys, Shape], dict[str, Any]]
"""Consumes the keys of a family and returns fields of `ModelConfig`."""
Write = Callable[[ModelConfig], dict[str, Any]]
"""The keys of a family, as config.json states them."""

ATTENTION_BIAS = {"attention_bias": ("q", "k", "v", "o")}
MLP_BIAS = {"mlp_bias": ("gate", "up", "down")}
SILU = {"hidden_act": ("silu", "swish")}  # two names of one function


def no_fields(config: ModelConfig) -> dict[str, Any]:
    """What a family writes that has no keys of its own."""
    return {}


@dataclasses.dataclass(frozen=True)
class Fused:
    """A stored tensor that holds the weights of several projections, one below the other.

    Attributes:
      name: its name, `{i}` for the layer.
      parts: paths of the projections, joined by dots, in the order of its rows.
    """

    name: str
    parts: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class TextPart:
    """Where the text part of a checkpoint is that holds other parts too.

    Attributes:
      prefixes: what names of its tensors begin with -> what those of a model of text do.
      left_out: names of tensors of other parts.
    """

    prefixes: Mapping[str, str]
    left_out: re.Pattern[str]

    def name(self, stored: str) -> str | None:
        """The name that a tensor has in a model of text; None: it belongs to another part."""
        if self.left_out.match(stored):
            return None
        for prefix, plain in self.prefixes.items():
            if stored.startswith(prefix):
                return plain + stored[len(prefix) :]
        return stored


@dataclasses.dataclass(frozen=True)
class GGUFForm:
    """How GGUF files state a family, as far as it is a matter of the family.

    Attributes:
      architecture: its name there.
      read: as of `Family`, for the keys behind `ARCHITECTURE.`.
      interleaved: rows of each head of q and k are stored interleaved.
      fused: stored tensors that hold several.
      longrope: a head may rotate in part, and by the divisors of tensors of the file.
      text: where the text part is, if files may hold others.
    """

    architecture: str
    read: Read
    interleaved: bool = False
    fused: tuple[Fused, ...] = ()
    longrope: bool = False
    text: TextPart | None = None


@dataclasses.dataclass(frozen=True)
class Family:
    """How files state a family of models.

    Attributes:
      name: what `ModelConfig.family` says, a key of `model.families.FIXED`.
      model_class: transformers' class of its causal language models.
      defaults: what transformers fills in for absent keys.
      read: its own keys of a config.json -> fields, rotary embeddings and windows among them.
      write: the reverse.
      model_types: what config.json calls it; the first is written.
      activations: keys that name the activation function -> what they may say (the first, where
        they are absent).
      biases: key -> the projections that have a bias where it is true.
      names: modules of which Hugging Face's name is another than Llama's.
      fused: tensors of Hugging Face checkpoints that hold several.
      text: where the text part is, if checkpoints may hold others.
      unwrap: from a model type and its keys, those of the text part.
      written_as: the family that describes a model, where it is another.
      gguf: how GGUF files state it; None: under another family's name.
    """

    name: str
    model_class: str
    defaults: Mapping[str, Any]
    read: Read
    write: Write = no_fields
    model_types: tuple[str, ...] = ()
    activations: Mapping[str, tuple[str | None, ...]] = dataclasses.field(
        default_factory=lambda: SILU
    )
    biases: Mapping[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)
    names: Mapping[str, str] = dataclasses.field(default_factory=dict)
    fused: tuple[Fused, ...] = ()
    text: TextPart | None = None
    unwrap: Callable[[str, Keys], Keys] | None = None
    written_as: Callable[[ModelConfig], str] | None = None
    gguf: GGUFForm | None = None

    @property
    def types(self) -> tuple[str, ...]:
        """What config.json calls it; the first is written."""
        return self.model_types or (self.name,)
