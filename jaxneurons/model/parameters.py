"""What a model's parameters are: one table, and all that the library reads off it.

A row of `TABLE` is a module of the model: an embedding, a norm or a projection. The rows that a
configuration has give every array of the parameters with its path, named axes, shape and
initialiser (`list_parameters`). The Flax module makes these arrays, conversion expects these
tensors, shardings go by these axes, and the memory of rows, parameter counts and the widths of
sites (`site_widths`) follow from the same sizes. A family that has another norm or projection adds
a row.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from jaxneurons.errors import ConfigError, near_matches
from jaxneurons.model.config import ModelConfig

Params = Mapping[str, Any]
"""Nested mapping of arrays; layers are stacked on axis 0, kernels are [layer, in, out]."""

Initializer = jax.nn.initializers.Initializer
Condition = Callable[[ModelConfig], bool]

LAYERS = "layers"
"""The key below which parameters are stacked by layer, and the name of that axis."""


@dataclasses.dataclass(frozen=True)
class Axis:
    """A named axis of parameters.

    Attributes:
      parts: that stay whole where the axis is split over devices: heads, or single values.
      width: values of a part.
    """

    parts: int
    width: int = 1

    @property
    def size(self) -> int:
        """Values along the axis."""
        return self.parts * self.width


def axes(config: ModelConfig) -> dict[str, Axis]:
    """The named axes of a model's parameters."""
    return {
        LAYERS: Axis(config.num_layers),
        "vocab": Axis(config.vocab_size),
        "hidden": Axis(config.hidden_size),
        "intermediate": Axis(config.intermediate_size),
        "experts": Axis(config.experts),
        "heads": Axis(config.num_heads, config.head_dim),
        "kv_heads": Axis(config.num_kv_heads, config.head_dim),
        "head_dim": Axis(config.head_dim),
    }


SITE_AXES = {
    "up": "intermediate",
    "gate": "intermediate",
    "act": "intermediate",
    "down": "hidden",
    "q": "heads",
    "k": "kv_heads",
    "v": "kv_heads",
    "o": "hidden",
}
"""The axis that the neurons of a site (of one expert, where there are any) lie along."""


def check_site(site: str) -> None:
    """Raise `ConfigError` with near matches unless `site` is one."""
    if site not in SITE_AXES:
        raise ConfigError(f"unknown site {site!r}; {near_matches(site, SITE_AXES)}")


def site_axis(site: str) -> str:
    """The name of the axis that the neurons of a site lie along."""
    return SITE_AXES[site]


def site_widths(config: ModelConfig) -> dict[str, int]:
    """Neurons of every site in one layer: at `up`, `gate` and `act` those of all experts."""
    sizes = {name: axis.size for name, axis in axes(config).items()}
    sizes["intermediate"] = config.neurons_per_layer
    return {site: sizes[axis] for site, axis in SITE_AXES.items()}


def neuron_place(index: Any, config: ModelConfig) -> tuple[Any, ...]:
    """Where feed-forward neurons of a layer are in its kernels: (expert, index in it) or (index,).

    Args:
      index: of neurons at `up`, `gate` or `act`, numbers or arrays.
      config: the model's shape.
    """
    if not config.experts:
        return (index,)
    return index // config.intermediate_size, index % config.intermediate_size


@dataclasses.dataclass(frozen=True)
class Module:
    """A row of the table: a module's weight and, for some models, the bias beside it.

    Attributes:
      path: its place among the parameters, joined by dots; below `layers` every layer has one.
      weight: name of its array: "embedding", "scale" or "kernel".
      axes: names of the weight's axes, of one layer: a kernel's are its inputs and its outputs,
        behind the experts, where each has one.
      initializer: of the weight, of one layer; a bias starts as zeros.
      bias: which models add a bias, along the weight's last axis.
      when: which models have the module.
    """

    path: str
    weight: str
    axes: tuple[str, ...]
    initializer: Initializer
    bias: Condition
    when: Condition


def _always(config: ModelConfig) -> bool:
    return True


def _never(config: ModelConfig) -> bool:
    return False


def _untied(config: ModelConfig) -> bool:
    return not config.tied


def _pre_norms(config: ModelConfig) -> bool:
    return config.pre_norms


def _post_norms(config: ModelConfig) -> bool:
    return config.post_norms


def _norms_heads(config: ModelConfig) -> bool:
    return config.qk_norm == "head"


def _norms_width(config: ModelConfig) -> bool:
    return config.qk_norm == "width"


def _has_experts(config: ModelConfig) -> bool:
    return config.experts > 0


def _has_no_experts(config: ModelConfig) -> bool:
    return config.experts == 0


def _names_bias(config: ModelConfig, projection: str) -> bool:
    return projection in config.biases


_ones = jax.nn.initializers.ones
_zeros = jax.nn.initializers.zeros
_normal = jax.nn.initializers.normal(0.02)
_lecun_normal = jax.nn.initializers.lecun_normal()
_lecun_normal_of_experts = jax.nn.initializers.lecun_normal(batch_axis=(0,))


def embedding(path: str, rows: str, columns: str) -> Module:
    """A row of the table: vectors [rows, columns] that are looked up."""
    return Module(path, "embedding", (rows, columns), _normal, bias=_never, when=_always)


def norm(
    path: str, axis: str, *, initializer: Initializer = _ones, when: Condition = _always
) -> Module:
    """A row of the table: the weight of a normalisation over an axis."""
    return Module(path, "scale", (axis,), initializer, bias=_never, when=when)


def projection(
    path: str,
    inputs: str,
    outputs: str,
    *,
    bias: Condition | None = None,
    when: Condition = _always,
) -> Module:
    """A row of the table: a kernel [inputs, outputs]; its bias is there if `config.biases` has it.

    Args:
      path: as of `Module`.
      inputs: the axis that is summed over.
      outputs: the other one.
      bias: which models add a bias, instead of those whose `config.biases` name the projection.
      when: which models have the projection.
    """
    if bias is None:
        bias = functools.partial(_names_bias, projection=path.split(".")[-1])
    return Module(path, "kernel", (inputs, outputs), _lecun_normal, bias=bias, when=when)


def projections_of_experts(path: str, inputs: str, outputs: str) -> Module:
    """A row of the table: a kernel [experts, inputs, outputs], of models that have experts."""
    names = ("experts", inputs, outputs)
    initializer = _lecun_normal_of_experts
    return Module(path, "kernel", names, initializer, bias=_never, when=_has_experts)


TABLE: tuple[Module, ...] = (
    embedding("embed", "vocab", "hidden"),
    norm("layers.attn_norm", "hidden", when=_pre_norms),
    projection("layers.attn.q", "hidden", "heads"),
    projection("layers.attn.k", "hidden", "kv_heads"),
    projection("layers.attn.v", "hidden", "kv_heads"),
    norm("layers.attn.q_norm", "head_dim", when=_norms_heads),
    norm("layers.attn.k_norm", "head_dim", when=_norms_heads),
    norm("layers.attn.q_norm", "heads", when=_norms_width),
    norm("layers.attn.k_norm", "kv_heads", when=_norms_width),
    projection("layers.attn.o", "heads", "hidden"),
    norm("layers.attn_post_norm", "hidden", when=_post_norms),
    norm("layers.ffn_norm", "hidden", when=_pre_norms),
    projection("layers.ffn.gate", "hidden", "intermediate", when=_has_no_experts),
    projection("layers.ffn.up", "hidden", "intermediate", when=_has_no_experts),
    projection("layers.ffn.down", "intermediate", "hidden", when=_has_no_experts),
    projection("layers.ffn.router", "hidden", "experts", bias=_never, when=_has_experts),
    projections_of_experts("layers.ffn.gate", "hidden", "intermediate"),
    projections_of_experts("layers.ffn.up", "hidden", "intermediate"),
    projections_of_experts("layers.ffn.down", "intermediate", "hidden"),
    norm("layers.ffn_post_norm", "hidden", when=_post_norms),
    norm("final_norm", "hidden"),
    projection("unembed", "hidden", "vocab", when=_untied),
)
"""Every module of every model."""


@dataclasses.dataclass(frozen=True)
class Parameter:
    """One array of a model's parameters.

    Attributes:
      path: keys in the parameters.
      axes: names of its axes, `layers` first where it is stacked by layer.
      shape: its size along them.
      initializer: makes one layer's array.
    """

    path: tuple[str, ...]
    axes: tuple[str, ...]
    shape: tuple[int, ...]
    initializer: Initializer

    @property
    def per_layer(self) -> bool:
        """Stacked by layer, on axis 0."""
        return self.axes[0] == LAYERS

    @property
    def layer_shape(self) -> tuple[int, ...]:
        """The shape of one layer's array; of the whole one, if there is one for all layers."""
        return self.shape[1:] if self.per_layer else self.shape

    @property
    def size(self) -> int:
        """Values in the array."""
        return math.prod(self.shape)


def list_parameters(config: ModelConfig) -> tuple[Parameter, ...]:
    """Every array of a model, in the order of the table, biases after their weights."""
    sizes = axes(config)

    def array(module: Module, name: str, names: tuple[str, ...], init: Initializer) -> Parameter:
        path = (*module.path.split("."), name)
        names = (LAYERS, *names) if path[0] == LAYERS else names
        return Parameter(path, names, tuple(sizes[axis].size for axis in names), init)

    parameters = []
    for module in TABLE:
        if module.when(config):
            parameters.append(array(module, module.weight, module.axes, module.initializer))
            if module.bias(config):
                parameters.append(array(module, "bias", module.axes[-1:], _zeros))
    return tuple(parameters)


def parameter_tree(config: ModelConfig, value: Callable[[Parameter], Any]) -> dict[str, Any]:
    """`value` of every array, nested as the parameters are."""
    tree: dict[str, Any] = {}
    for parameter in list_parameters(config):
        put(tree, parameter.path, value(parameter))
    return tree


def param_shapes(config: ModelConfig) -> dict[str, Any]:
    """Shapes of every parameter, nested as the parameters are."""
    return parameter_tree(config, lambda parameter: parameter.shape)


def outputs_per_token(parameter: Parameter, config: ModelConfig) -> int:
    """Values that a layer's kernel makes of a token: of all experts that it runs."""
    chosen = config.experts_per_token if "experts" in parameter.axes[:-1] else 1
    return chosen * parameter.layer_shape[-1]


def count_active_parameters(config: ModelConfig) -> int:
    """Values that a token is computed with: of the experts' arrays, those of as many as it runs."""
    return sum(
        parameter.size // config.experts * config.experts_per_token
        if "experts" in parameter.axes[:-1]
        else parameter.size
        for parameter in list_parameters(config)
    )


def count_parameters(config: ModelConfig) -> int:
    """Values in all arrays together."""
    return sum(parameter.size for parameter in list_parameters(config))


def get(tree: Params, path: tuple[str, ...]) -> Any:
    """The leaf of a nested mapping."""
    return functools.reduce(lambda node, key: node[key], path, tree)


def put(tree: dict[str, Any], path: tuple[str, ...], value: Any) -> None:
    """Set the leaf of a nested dict."""
    for key in path[:-1]:
        tree = tree.setdefault(key, {})
    tree[path[-1]] = value


def replace(tree: Params, path: tuple[str, ...], value: Any) -> dict[str, Any]:
    """A nested mapping with one leaf replaced; all others are the same objects."""
    key, *rest = path
    return {**tree, key: replace(tree[key], tuple(rest), value) if rest else value}


def params_dtype(params: Params) -> np.dtype:
    """The dtype of a model's parameters, which all have the embedding's."""
    return np.dtype(params["embed"]["embedding"].dtype)
