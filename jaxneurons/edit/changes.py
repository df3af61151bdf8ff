"""What an edit changes in a model's parameters, as small values, and how they are applied.

An edit never is a second tree of parameters: it is a sequence of changes, each a few arrays that
say which module of which layer (or which neurons) they are about. `apply` makes the edited
parameters of them, purely; a `Patch` writes them down.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Float, Int

from jaxneurons.edit.experts import check_one_kernel, matrix_shape, of_experts, rows_at
from jaxneurons.edit.interventions import scale_at
from jaxneurons.edit.neuron_parameters import neuron_arrays
from jaxneurons.errors import ConfigError, DataError, near_matches
from jaxneurons.model.axis_types import any_axes
from jaxneurons.model.config import ModelConfig
from jaxneurons.model.parameters import (
    LAYERS,
    SITE_AXES,
    Params,
    get,
    list_parameters,
    replace,
    site_widths,
)
from jaxneurons.neurons.sets import NeuronSet, Ranking
from jaxneurons.processes.sharing import fetch


@dataclasses.dataclass(frozen=True, eq=False)
class LowRank:
    """`left @ right` is added to the kernel of one layer.

    Attributes:
      module: below `layers`, joined by dots: "ffn.down".
      layer: from 0.
      left: float32, inputs of the kernel x rank.
      right: float32, rank x outputs of the kernel.
    """

    module: str
    layer: int
    left: Float[Array | np.ndarray, "input rank"]
    right: Float[Array | np.ndarray, "rank output"]


@dataclasses.dataclass(frozen=True, eq=False)
class Rows:
    """Rows of the kernel of one layer, what neurons of its input write, are set to values.

    Attributes:
      module: below `layers`, joined by dots: "ffn.down".
      layer: from 0.
      index: which rows.
      values: float32, what they become.
    """

    module: str
    layer: int
    index: Int[Array | np.ndarray, " row"]
    values: Float[Array | np.ndarray, "row output"]


@dataclasses.dataclass(frozen=True, eq=False)
class Multipliers:
    """Neurons of a site are multiplied by factors.

    Attributes:
      site: of all of them.
      layer: of each neuron.
      index: of each neuron.
      factor: float32, of each neuron.
    """

    site: str
    layer: Int[Array | np.ndarray, " neuron"]
    index: Int[Array | np.ndarray, " neuron"]
    factor: Float[Array | np.ndarray, " neuron"]


Change = LowRank | Rows | Multipliers


def _register(kind: type, arrays: tuple[str, ...], rest: tuple[str, ...]) -> None:
    """Make a dataclass a pytree of some fields.

    Unlike `jax.tree_util.register_dataclass` without calling the class: JAX's own bookkeeping puts
    other things than arrays in their places for a while.
    """

    def flatten(change: Any) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
        return tuple(getattr(change, n) for n in arrays), tuple(getattr(change, n) for n in rest)

    def flatten_with_keys(change: Any) -> Any:
        keys = (jax.tree_util.GetAttrKey(name) for name in arrays)
        return tuple(zip(keys, flatten(change)[0], strict=True)), flatten(change)[1]

    def unflatten(others: tuple[Any, ...], leaves: Any) -> Any:
        change = object.__new__(kind)
        for name, value in zip((*arrays, *rest), (*leaves, *others), strict=True):
            object.__setattr__(change, name, value)
        return change

    jax.tree_util.register_pytree_with_keys(kind, flatten_with_keys, unflatten, flatten)


# Pytrees, so that `apply` composes with `jit` and `vmap` over the arrays of changes.
_register(LowRank, ("left", "right"), ("module", "layer"))
_register(Rows, ("index", "values"), ("module", "layer"))
_register(Multipliers, ("layer", "index", "factor"), ("site",))


@any_axes
def apply(params: Params, changes: Sequence[Change], *, config: ModelConfig) -> Params:
    """The parameters with changes applied in their order. Pure; `params` are not touched.

    Composes with `jit` and `vmap` (over the arrays of changes), and keeps shardings. Products and
    sums are made in float32 and rounded to the parameters' dtype; low-rank changes of one kernel
    with no other change of it between them are summed first and rounded once.

    Args:
      params: the parameters.
      changes: what to change.
      config: the model's shape.

    Raises:
      DataError: a module, layer or neuron that this model does not have, or arrays of another
        shape. Indices that are traced are not checked.
    """
    check_changes(changes, config=config)
    terms: dict[str, dict[int, list[LowRank]]] = {}  # not added yet: by module, by layer
    for change in changes:
        if isinstance(change, LowRank):
            terms.setdefault(change.module, {}).setdefault(change.layer, []).append(change)
            continue
        if isinstance(change, Multipliers):
            module = site_kernel(change.site, config)[0]
        else:
            module = change.module
        if module in terms:
            params = _add(params, module, terms.pop(module))
        if isinstance(change, Rows):
            params = _set_rows(params, change)
        else:
            neurons = (change.site, change.layer, change.index, change.factor)
            params = scale_at(params, *neurons, config=config)
    for module, layers in terms.items():
        params = _add(params, module, layers)
    return params


def _add(params: Params, module: str, layers: Mapping[int, Sequence[LowRank]]) -> Params:
    """Low-rank terms added to the kernels of some layers."""
    path = kernel_path(module)
    kernel = get(params, path)
    deltas = [
        jnp.matmul(
            _joined([term.left for term in terms], axis=1),
            _joined([term.right for term in terms], axis=0),
            precision=jax.lax.Precision.HIGHEST,
        )
        for terms in layers.values()
    ]
    where = jnp.asarray(list(layers))
    new = (kernel[where].astype(jnp.float32) + jnp.stack(deltas)).astype(kernel.dtype)
    return replace(params, path, kernel.at[where].set(new))


def _joined(arrays: Sequence[Any], axis: int) -> jax.Array:
    return jnp.concatenate([jnp.asarray(array, jnp.float32) for array in arrays], axis=axis)


def _set_rows(params: Params, rows: Rows) -> Params:
    path = kernel_path(rows.module)
    kernel = get(params, path)
    values = rows.values.astype(kernel.dtype)
    return replace(params, path, kernel.at[rows_at(kernel, rows.layer, rows.index)].set(values))


def multipliers(
    neurons: NeuronSet | Ranking | Mapping[str, Any],
    factor: float | int = 0.0,
    *,
    config: ModelConfig,
) -> tuple[Multipliers, ...]:
    """Changes that multiply neurons, one for each site.

    Args:
      neurons: a set, or multipliers [layer, width] by site, of which those that are 1 are left out.
      factor: of the neurons of a set; 0 turns them off.
      config: the model's shape.

    Raises:
      DataError: neurons that the model does not have, or tables of another shape.
    """
    if isinstance(neurons, Ranking):
        neurons = neurons.neurons
    if isinstance(neurons, NeuronSet):
        neurons = neurons.scales(config, factor)
    changes = []
    for site, scales in neurons.items():
        _check_site(site, "multipliers")
        table = np.asarray(scales, np.float32)
        if table.shape != (shape := (config.num_layers, site_widths(config)[site])):
            raise DataError(
                f"multipliers of site {site!r} have the shape {table.shape}, not {shape} "
                "(layer, neuron)"
            )
        layer, index = np.nonzero(table != 1)
        changes.append(
            Multipliers(
                site,
                jnp.asarray(layer.astype(np.int32)),
                jnp.asarray(index.astype(np.int32)),
                jnp.asarray(table[layer, index]),
            )
        )
    return tuple(change for change in changes if change.factor.size)


def check_changes(
    changes: Sequence[Change], *, config: ModelConfig, finite: bool = False, where: str = ""
) -> None:
    """Raise unless a model of this shape has what is changed, in these shapes.

    Args:
      changes: what to change.
      config: the model's shape.
      finite: numbers must be finite, too.
      where: what messages begin with.

    Raises:
      DataError: it has not; says which change, and why. Values that are traced are not checked.
    """
    for number, change in enumerate(changes, 1):
        at = f"{where}change {number} of {len(changes)}: "
        if isinstance(change, Multipliers):
            _check_site(change.site, at[:-2])
            sizes = {"layer": config.num_layers, "index": site_widths(config)[change.site]}
            shape = change.factor.shape
            _check_arrays(at, change, {"layer": shape, "index": shape, "factor": (None,)})
        elif isinstance(change, LowRank | Rows):
            inputs, outputs = _kernel_shape(at, change, config)
            if not 0 <= change.layer < config.num_layers:
                raise DataError(
                    f"{at}layer {change.layer} is not in this model, which has "
                    f"{config.num_layers}: layers go from 0 to {config.num_layers - 1}"
                )
            if isinstance(change, LowRank):
                rank = change.left.shape[-1]
                _check_arrays(at, change, {"left": (inputs, None), "right": (rank, outputs)})
                sizes = {}
            else:
                count = change.index.shape[0] if change.index.ndim else 0
                _check_arrays(at, change, {"index": (count,), "values": (count, outputs)})
                sizes = {"index": inputs}
        else:
            raise DataError(f"{at}{type(change).__name__} is no LowRank, Rows or Multipliers")
        _check_indices(at, change, sizes)
        if finite:
            _check_finite(at, change)


def _check_site(site: str, where: str) -> None:
    if site not in SITE_AXES:
        raise DataError(f"{where}: unknown site {site!r}; {near_matches(site, SITE_AXES)}")


def _kernel_shape(at: str, change: LowRank | Rows, config: ModelConfig) -> tuple[int, int]:
    module = change.module
    kernels = {
        ".".join(parameter.path[1:-1]): parameter
        for parameter in list_parameters(config)
        if parameter.per_layer and parameter.path[-1] == "kernel"
    }
    if module not in kernels:
        raise DataError(f"{at}no module {module!r} in a layer; {near_matches(module, kernels)}")
    kernel = kernels[module]
    if of_experts(kernel) and (isinstance(change, LowRank) or kernel.axes[-1] != "hidden"):
        try:
            check_one_kernel(config, f"{type(change).__name__} of {module}")
        except ConfigError as error:
            raise DataError(f"{at}{error}") from None
    inputs, outputs = matrix_shape(kernel)
    return inputs, outputs


def _check_arrays(at: str, change: Change, shapes: Mapping[str, tuple[int | None, ...]]) -> None:
    """Raise unless arrays have these shapes (None: any size) and kinds of numbers."""
    for name, shape in shapes.items():
        array = getattr(change, name)
        fits = len(array.shape) == len(shape) and all(
            wanted in (None, size) for size, wanted in zip(array.shape, shape, strict=True)
        )
        if not fits:
            wanted = " x ".join("any" if size is None else str(size) for size in shape)
            raise DataError(f"{at}{name} has the shape {array.shape}, not {wanted}")
        whole = name in ("index", "layer")
        if not jnp.issubdtype(array.dtype, jnp.integer if whole else jnp.floating):
            raise DataError(f"{at}{name} holds {array.dtype.name}, not {_KINDS[whole]}")


_KINDS = {True: "whole numbers", False: "floating-point numbers"}


def _check_indices(at: str, change: Change, sizes: Mapping[str, int]) -> None:
    """Raise unless layers and neurons are there, and none twice."""
    arrays = [getattr(change, name) for name in sizes]
    if not arrays or any(isinstance(array, Tracer) for array in arrays):
        return
    columns = [np.asarray(array, np.int64) for array in arrays]
    for (name, size), values in zip(sizes.items(), columns, strict=True):
        if values.size and not 0 <= values.min() <= values.max() < size:
            wrong = int(values.min() if values.min() < 0 else values.max())
            what, which = ("layer", "layers") if name == "layer" else ("neuron", "indices")
            raise DataError(
                f"{at}{what} {wrong} is not in this model, which has {size}: {which} go from 0 to "
                f"{size - 1}; the change belongs to another model"
            )
    if len(np.unique(np.stack(columns), axis=1).T) < len(columns[0]):
        raise DataError(f"{at}a neuron is there twice; give each of them once")


def _check_finite(at: str, change: Change) -> None:
    for name in ("left", "right", "values", "factor"):
        array = getattr(change, name, None)
        if array is not None and not np.isfinite(fetch(array)).all():
            raise DataError(f"{at}{name} holds NaN or infinite numbers: the edit has failed")


def kernel_path(module: str) -> tuple[str, ...]:
    """Where the kernels of a module of every layer are among the parameters."""
    return (LAYERS, *module.split("."), "kernel")


def site_kernel(site: str, config: ModelConfig) -> tuple[str, Literal["input", "output"]]:
    """The module whose kernel holds a site's neurons, and along which of its axes."""
    parameter, axis = neuron_arrays(site, config)[0]
    return ".".join(parameter.path[1:-1]), "input" if axis == len(parameter.axes) - 2 else "output"
