"""One table of parameter names, shapes and reshapes, for Hugging Face and GGUF checkpoints.

Parameters are a nested dict of arrays: layers stacked on axis 0, kernels [in, out] (checkpoints
store them [out, in]). `fill.py` reads a checkpoint by it, `export.py` writes one.
"""

import dataclasses
import math
import re
from collections.abc import Callable, Container
from typing import Any, Literal

import jax
import numpy as np

from jaxneurons.model.config import ModelConfig

Naming = Literal["hf", "gguf"]
Progress = Callable[[int], None]
"""Told bytes as they pass."""
Place = Callable[[ModelConfig], Any]
"""A `Sharding` for every parameter, nested as they are."""


@dataclasses.dataclass(frozen=True)
class Rule:
    """Where one parameter lives in each format.

    Attributes:
      path: keys in the parameter tree.
      hf: name in a Hugging Face checkpoint, `{i}` = layer.
      gguf: name in a GGUF file of architecture "llama".
      dims: the axes of the parameter of one layer, as names that `dimensions` resolves.
      transposed: stored with its two axes swapped.
      rotary: the dimension that counts this projection's heads, if GGUF stores the rows of each
        head interleaved for rotary embedding.
    """

    path: tuple[str, ...]
    hf: str
    gguf: str
    dims: tuple[str, ...]
    transposed: bool = False
    rotary: str | None = None

    @property
    def per_layer(self) -> bool:
        """Stacked over layers."""
        return self.path[0] == "layers"


def _kernel(
    block: str, name: str, hf: str, gguf: str, dims: tuple[str, str], rotary: str | None = None
) -> Rule:
    return Rule(
        path=("layers", block, name, "kernel"),
        hf=f"model.layers.{{i}}.{hf}.weight",
        gguf=f"blk.{{i}}.{gguf}.weight",
        dims=dims,
        transposed=True,
        rotary=rotary,
    )


def _bias(block: str, name: str) -> Rule:
    """The bias beside a kernel: same names, its outputs' axis, never transposed."""
    kernel = next(rule for rule in RULES if rule.path[1:3] == (block, name))
    return dataclasses.replace(
        kernel,
        path=("layers", block, name, "bias"),
        hf=kernel.hf.removesuffix("weight") + "bias",
        gguf=kernel.gguf.removesuffix("weight") + "bias",
        dims=kernel.dims[1:],
        transposed=False,
    )


def _norm(name: str, hf: str, gguf: str) -> Rule:
    return Rule(
        path=("layers", name, "scale"),
        hf=f"model.layers.{{i}}.{hf}.weight",
        gguf=f"blk.{{i}}.{gguf}.weight",
        dims=("hidden",),
    )


RULES: tuple[Rule, ...] = (
    Rule(
        ("embed", "embedding"),
        "model.embed_tokens.weight",
        "token_embd.weight",
        ("vocab", "hidden"),
    ),
    _norm("attn_norm", "input_layernorm", "attn_norm"),
    _kernel("attn", "q", "self_attn.q_proj", "attn_q", ("hidden", "query"), rotary="heads"),
    _kernel("attn", "k", "self_attn.k_proj", "attn_k", ("hidden", "kv"), rotary="kv_heads"),
    _kernel("attn", "v", "self_attn.v_proj", "attn_v", ("hidden", "kv")),
    _kernel("attn", "o", "self_attn.o_proj", "attn_output", ("query", "hidden")),
    _norm("ffn_norm", "post_attention_layernorm", "ffn_norm"),
    _kernel("ffn", "gate", "mlp.gate_proj", "ffn_gate", ("hidden", "inner")),
    _kernel("ffn", "up", "mlp.up_proj", "ffn_up", ("hidden", "inner")),
    _kernel("ffn", "down", "mlp.down_proj", "ffn_down", ("inner", "hidden")),
    Rule(("final_norm", "scale"), "model.norm.weight", "output_norm.weight", ("hidden",)),
)
UNEMBED = Rule(
    ("unembed", "kernel"), "lm_head.weight", "output.weight", ("hidden", "vocab"), transposed=True
)

# Stored tensors that carry nothing: tables which the model computes from its configuration.
DROPPABLE: dict[str, re.Pattern[str]] = {
    "hf": re.compile(r"(model\.layers\.\d+\.self_attn|model)\.rotary_emb\.inv_freq"),
    "gguf": re.compile(r"blk\.\d+\.attn_rot_embd\.weight|rope_freqs\.weight"),
}


def dimensions(config: ModelConfig) -> dict[str, int]:
    """Sizes of the named axes in `Rule.dims`."""
    return {
        "vocab": config.vocab_size,
        "hidden": config.hidden_size,
        "inner": config.intermediate_size,
        "query": config.query_width,
        "kv": config.kv_width,
        "heads": config.num_heads,
        "kv_heads": config.num_kv_heads,
    }


def rules_for(config: ModelConfig) -> tuple[Rule, ...]:
    """The rules that apply: `RULES`, biases, and the unembedding unless it is tied."""
    biases = [
        _bias(rule.path[1], rule.path[2])
        for rule in RULES
        if rule.path[-1] == "kernel" and rule.path[2] in config.biases
    ]
    return (*RULES, *biases) if config.tied else (*RULES, *biases, UNEMBED)


def gguf_biases(names: Container[str]) -> tuple[str, ...]:
    """The projections that a GGUF file has a bias for (in its first layer: all must be alike)."""
    kernels = {rule.path[2]: rule.gguf for rule in RULES if rule.path[-1] == "kernel"}
    return tuple(
        name
        for name, kernel in kernels.items()
        if kernel.format(i=0).removesuffix("weight") + "bias" in names
    )


def param_shapes(config: ModelConfig) -> dict[str, Any]:
    """Shapes of every parameter, in the nesting of the parameters themselves."""
    sizes = dimensions(config)
    tree: dict[str, Any] = {}
    for rule in rules_for(config):
        shape = tuple(sizes[dim] for dim in rule.dims)
        put(tree, rule.path, (config.num_layers, *shape) if rule.per_layer else shape)
    return tree


def param_sizes(config: ModelConfig) -> list[int]:
    """Values in each (stacked) parameter."""
    shapes = jax.tree.leaves(param_shapes(config), is_leaf=lambda x: isinstance(x, tuple))
    return [math.prod(shape) for shape in shapes]


def stored_shape(rule: Rule, config: ModelConfig) -> tuple[int, ...]:
    """Shape of the rule's tensor of one layer as checkpoints store it."""
    sizes = dimensions(config)
    shape = tuple(sizes[dim] for dim in rule.dims)
    return shape[::-1] if rule.transposed else shape


def stored_names(config: ModelConfig, naming: Naming) -> dict[str, tuple[Rule, int | None]]:
    """Every tensor name that a checkpoint of this configuration holds -> its rule and layer."""
    names: dict[str, tuple[Rule, int | None]] = {}
    for rule in rules_for(config):
        template = getattr(rule, naming)
        if rule.per_layer:
            for layer in range(config.num_layers):
                names[template.format(i=layer)] = (rule, layer)
        else:
            names[template] = (rule, None)
    return names


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


def put(tree: dict[str, Any], path: tuple[str, ...], value: Any) -> None:
    """Set the leaf of a nested dict."""
    for key in path[:-1]:
        tree = tree.setdefault(key, {})
    tree[path[-1]] = value
