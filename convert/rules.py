"""Names and forms of parameters in Hugging Face and GGUF checkpoints.

What a model's parameters are is `parameters.TABLE`; here is how checkpoints store each of them:
under what name, transposed (kernels are [in, out], checkpoints store [out, in]), with the rows of
heads in another order, several in one tensor. What differs between families is in `families/`.
`fill.py` reads a checkpoint by these rules, `export.py` writes one.
"""

import dataclasses
import itertools
import re
from collections.abc import Callable, Container, Sequence
from typing import Any, Literal

import numpy as np

from jaxneurons.convert.families import FAMILIES
from jaxneurons.convert.family import Family, Fused, TextPart
from jaxneurons.model import parameters
from jaxneurons.model.config import ModelConfig
from jaxneurons.model.families import FIXED
from jaxneurons.model.parameters import LAYERS, Parameter, axes, list_parameters

Naming = Literal["hf", "gguf"]
Place = Callable[[ModelConfig], Any]
"""A `Sharding` for every parameter, nested as they are."""

# Names of modules that do not follow from their paths; all others do, see `tensor_name`. A family
# may have others in Hugging Face checkpoints.
_NAMES: dict[Naming, dict[str, str]] = {
    "hf": {
        "embed": "model.embed_tokens",
        "layers.attn_norm": "model.layers.{i}.input_layernorm",
        "layers.attn_post_norm": "model.layers.{i}.post_attention_layernorm",
        "layers.ffn_norm": "model.layers.{i}.post_attention_layernorm",
        "layers.ffn_post_norm": "model.layers.{i}.post_feedforward_layernorm",
        "final_norm": "model.norm",
        "unembed": "lm_head",
    },
    "gguf": {
        "embed": "token_embd",
        "layers.attn.o": "blk.{i}.attn_output",
        "layers.attn_post_norm": "blk.{i}.post_attention_norm",
        "layers.ffn_post_norm": "blk.{i}.post_ffw_norm",
        "final_norm": "output_norm",
        "unembed": "output",
    },
}
_HF_BLOCKS = {"attn": "self_attn", "ffn": "mlp"}
_ROTARY = ("q", "k")
"""Projections whose outputs are rotated."""

EMBEDDING = ("embed", "embedding")
UNEMBEDDING = ("unembed", "kernel")
FINAL_NORM = ("final_norm", "scale")

# Stored tensors that carry nothing: tables which the model computes from its configuration.
DROPPABLE: dict[Naming, re.Pattern[str]] = {
    "hf": re.compile(r"(model\.layers\.\d+\.self_attn|model)\.rotary_emb\.inv_freq"),
    "gguf": re.compile(r"blk\.\d+\.attn_rot_embd\.weight|rope_freqs\.weight"),
}
_LONGROPE = re.compile(r"rope_factors_(short|long)\.weight")


@dataclasses.dataclass(frozen=True)
class TensorRule:
    """How checkpoints store a parameter.

    Attributes:
      parameter: which.
      rotary_heads: of a projection whose outputs are rotated, its heads: GGUF files of architecture
        "llama" store the rows of each of them interleaved; else None.
      expert: whose kernel it is, where each has a tensor.
    """

    parameter: Parameter
    rotary_heads: int | None
    expert: int | None = None

    @property
    def path(self) -> tuple[str, ...]:
        """The parameter's keys in the tree."""
        return self.parameter.path

    @property
    def of_experts(self) -> bool:
        """Whether each expert has a kernel."""
        return "experts" in self.parameter.axes[:-1]

    @property
    def transposed(self) -> bool:
        """Stored with its two axes swapped."""
        return self.path[-1] == "kernel"

    @property
    def stored_shape(self) -> tuple[int, ...]:
        """Shape of one layer's tensor, or one expert's, as checkpoints store it."""
        shape = self.parameter.layer_shape[1 if self.of_experts else 0 :]
        return shape[::-1] if self.transposed else shape


def rules_for(config: ModelConfig) -> tuple[TensorRule, ...]:
    """A rule for every parameter, in the order in which files are written."""
    sizes = axes(config)

    def rule(parameter: Parameter) -> TensorRule:
        rotary = parameter.path[-2] in _ROTARY
        return TensorRule(parameter, sizes[parameter.axes[-1]].parts if rotary else None)

    def place(parameter: Parameter) -> tuple[bool, bool]:
        return parameter.path == UNEMBEDDING, parameter.path[-1] == "bias"

    return tuple(map(rule, sorted(list_parameters(config), key=place)))


def tensor_name(path: tuple[str, ...], naming: Naming, family: str = "llama") -> str:
    """The name of a parameter's tensor, `{i}` for the layer.

    Unless `_NAMES` has another: `model.layers.{i}.self_attn.q_proj.weight` in a Hugging Face
    checkpoint, `blk.{i}.attn_q.weight` in a GGUF file.

    Args:
      path: the parameter's.
      naming: whose names.
      family: of the model.
    """
    *module, array = path
    inner = module[1:] if module[0] == LAYERS else module
    names = _NAMES[naming]
    if family in FAMILIES:
        form = FAMILIES[family]
        others = form.names if naming == "hf" else {} if form.gguf is None else form.gguf.names
        names = {**names, **others}
    if (name := names.get(".".join(module))) is None:
        if naming == "hf":
            name = "model.layers.{i}." if module[0] == LAYERS else "model."
            name += ".".join(_HF_BLOCKS.get(part, part) for part in inner)
            name += "_proj" if array in ("kernel", "bias") else ""
        else:
            name = ("blk.{i}." if module[0] == LAYERS else "") + "_".join(inner)
    return f"{name}.bias" if array == "bias" else f"{name}.weight"


def gguf_biases(names: Container[str]) -> tuple[str, ...]:
    """The projections that a GGUF file has a bias for (in its first layer: all must be alike)."""
    paths = [
        tuple(module.path.split(".")) for module in parameters.TABLE if module.weight == "kernel"
    ]
    biased = (
        path[-1]
        for path in paths
        if path[0] == LAYERS and tensor_name((*path, "bias"), "gguf").format(i=0) in names
    )
    return tuple(dict.fromkeys(biased))


def stored_names(config: ModelConfig, naming: Naming) -> dict[str, tuple[TensorRule, int | None]]:
    """Every tensor of a checkpoint of this configuration -> its rule and layer.

    Each by a name of its own, also where a family stores several in one tensor: `file_names`.
    """
    names: dict[str, tuple[TensorRule, int | None]] = {}
    for rule in rules_for(config):
        template = tensor_name(rule.path, naming, config.family)
        if rule.of_experts:
            template = _of_experts(template)
            for layer, expert in itertools.product(range(config.num_layers), range(config.experts)):
                one = dataclasses.replace(rule, expert=expert)
                names[template.format(i=layer, e=expert)] = (one, layer)
        elif rule.parameter.per_layer:
            for layer in range(config.num_layers):
                names[template.format(i=layer)] = (rule, layer)
        else:
            names[template] = (rule, None)
    return names


def _of_experts(template: str) -> str:
    """The name of an expert's tensor, `{e}` for the expert."""
    return template if "{e}" in template else template.replace(".weight", ".{e}.weight")


def _fused(family: Family | None, naming: Naming) -> tuple[Fused, ...]:
    if family is None or naming == "hf":
        return () if family is None else family.fused
    return () if family.gguf is None else family.gguf.fused


def fused_tensors(
    config: ModelConfig, naming: Naming, *, written: bool = False
) -> dict[str, tuple[str, ...]]:
    """Names of tensors that hold several -> those of `stored_names` that they hold, by rows.

    Args:
      config: the model's shape.
      naming: whose names.
      written: only those that files are written with.
    """
    tensors = {}
    for fused in _fused(FAMILIES.get(config.family), naming):
        if written and not fused.written:
            continue
        names = [
            tensor_name((*path.split("."), "kernel"), naming, config.family) for path in fused.parts
        ]
        experts: Sequence[int | None] = range(config.experts) if fused.of_experts else (None,)
        if fused.of_experts:
            names = [_of_experts(name) for name in names]
        for layer in range(config.num_layers):
            tensors[fused.name.format(i=layer)] = tuple(
                name.format(i=layer, e=expert) for expert in experts for name in names
            )
    return tensors


def file_names(config: ModelConfig, naming: Naming) -> tuple[str, ...]:
    """The names that tensors have in files of this configuration, in their order."""
    fused = fused_tensors(config, naming, written=True)
    inside = {part: name for name, parts in fused.items() for part in parts}
    return tuple(dict.fromkeys(inside.get(name, name) for name in stored_names(config, naming)))


def text_part(family: str, naming: Naming) -> TextPart | None:
    """Where the text part of checkpoints of a family is, if they may hold others."""
    known = FAMILIES.get(family)
    if known is None or naming == "hf":
        return None if known is None else known.text
    return None if known.gguf is None else known.gguf.text


def interleaves(config: ModelConfig, naming: Naming) -> bool:
    """Whether the rows of each head of q and k are stored interleaved."""
    family = FAMILIES.get(config.family)
    return naming == "gguf" and family is not None and bool(family.gguf and family.gguf.interleaved)


def stored_offset(config: ModelConfig, rule: TensorRule, naming: Naming) -> float:
    """What stored values are larger by than the parameter's.

    llama.cpp's converter adds Gemma's 1 to the weights of norms, so that files hold the factor.
    """
    return config.norm_offset if naming == "gguf" and rule.path[-1] == "scale" else 0.0


def carries_nothing(name: str, config: ModelConfig, naming: Naming) -> bool:
    """Whether a stored tensor is a table that the configuration has, or computes."""
    if naming == "gguf" and _LONGROPE.fullmatch(name):
        return config.rope.rope_type == "longrope"
    return DROPPABLE[naming].fullmatch(name) is not None


def optional_biases(config: ModelConfig) -> tuple[str, ...]:
    """The projections whose bias not every model of the family has."""
    fixed = FIXED.get(config.family, {}).get("biases", ())
    return tuple(name for name in config.biases if name not in fixed)


def unpermute(rows: np.ndarray, heads: int) -> np.ndarray:
    """Undo llama.cpp's interleaving of each head's rows; [heads * head_dim, in], same shape.

    GGUF stores row 2j + h of a head where Hugging Face has row h * head_dim/2 + j (h = 0, 1).
    """
    half = rows.shape[0] // heads // 2
    return rows.reshape(heads, half, 2, -1).swapaxes(1, 2).reshape(rows.shape)


def permute(rows: np.ndarray, heads: int) -> np.ndarray:
    """Interleave each head's rows as llama.cpp does; the inverse of `unpermute`."""
    half = rows.shape[0] // heads // 2
    return rows.reshape(heads, 2, half, -1).swapaxes(1, 2).reshape(rows.shape)
