"""Meshes with `Explicit` axes: every public function computes on them with `Auto` ones.

`jax.make_mesh` gives `Explicit` axes: shardings are part of types, and an operation whose result
could be split in several ways is an error. What this library computes leaves that choice to XLA.
`any_axes` makes a function take arrays of either kind, inside and outside of `jax.set_mesh` and of
`jit`, and gives back the kind that came in.
"""

import contextlib
import functools
from collections.abc import Callable, Mapping
from typing import Any, TypeVar, cast

import jax
from jax.core import Tracer
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

Function = TypeVar("Function", bound=Callable[..., Any])


def any_axes(function: Function) -> Function:
    """A function for arrays whose meshes have `Auto` or `Explicit` axes.

    Outside of `jit` no array is copied or moved: the same buffers are looked at with the other kind
    of axes, and results keep the sharding that XLA gave them. Inside of a caller's `jit` with
    `Explicit` axes, parameters that come out keep the shardings of those that went in; any other
    result is whole on every device.
    """

    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        leaves, tree = jax.tree.flatten((args, kwargs))
        context = jax.sharding.get_abstract_mesh()
        inside = _is_explicit(context)
        traced = [leaf for leaf in leaves if isinstance(leaf, Tracer)]
        if any(_is_explicit(jax.typeof(leaf).sharding.mesh) for leaf in traced):
            return _traced(function, leaves, tree)
        if not traced and (inside or any(map(_explicit_mesh, leaves))):
            return _concrete(function, leaves, tree)
        return function(*args, **kwargs)

    for name in ("lower", "trace", "eval_shape", "clear_cache", "_cache_size"):  # of what jit made
        if hasattr(function, name):
            setattr(run, name, getattr(function, name))
    return cast(Function, run)


def _concrete(function: Callable[..., Any], leaves: list[Any], tree: Any) -> Any:
    """Call with `Auto` axes in place of `Explicit` ones, outside of any trace."""
    meshes = [mesh for leaf in leaves if (mesh := _explicit_mesh(leaf)) is not None]
    outer = jax.sharding.get_mesh() if hasattr(jax.sharding, "get_mesh") else Mesh((), ())
    if _is_explicit(outer):
        back, switch = outer, jax.set_mesh(_auto(outer))
    else:
        # Of both kinds, `Auto` is what comes out.
        split = [leaf for leaf in leaves if _mesh(leaf) is not None]
        back = meshes[0] if meshes and len(meshes) == len(split) else None
        switch = contextlib.nullcontext()
    with switch:
        auto = [
            leaf if (mesh := _explicit_mesh(leaf)) is None else _seen_with(leaf, _auto(mesh))
            for leaf in leaves
        ]
        args, kwargs = jax.tree.unflatten(tree, auto)
        out = function(*args, **kwargs)
    if back is None:
        return out
    same = {id(new): old for new, old in zip(auto, leaves, strict=True) if new is not old}
    return jax.tree.map(lambda leaf: same.get(id(leaf), _explicit(leaf, back)), out)


def _traced(function: Callable[..., Any], leaves: list[Any], tree: Any) -> Any:
    """Call inside of a trace whose types say how arrays are split."""
    mesh = next(
        mesh
        for leaf in leaves
        if isinstance(leaf, Tracer) and _is_explicit(mesh := jax.typeof(leaf).sharding.mesh)
    )
    arrays = [n for n, leaf in enumerate(leaves) if isinstance(leaf, jax.Array)]

    def call(*values: Any) -> Any:
        given = list(leaves)
        for n, value in zip(arrays, values, strict=True):
            given[n] = value
        args, kwargs = jax.tree.unflatten(tree, given)
        return function(*args, **kwargs)

    values = [_of_mesh(leaves[n], mesh) for n in arrays]
    shapes = jax.eval_shape(
        call, *(jax.ShapeDtypeStruct(value.shape, value.dtype) for value in values)
    )
    args, _ = jax.tree.unflatten(tree, leaves)
    whole = NamedSharding(mesh, PartitionSpec())
    shardings = jax.tree.map(lambda _: whole, shapes)
    if args and isinstance(args[0], Mapping) and _alike(args[0], shapes):
        shardings = jax.tree.map(
            lambda leaf: NamedSharding(mesh, jax.typeof(leaf).sharding.spec), dict(args[0])
        )
    return jax.sharding.auto_axes(call, out_sharding=shardings)(*values)


def _alike(params: Any, shapes: Any) -> bool:
    """Whether what comes out has the arrays that went in first."""
    if jax.tree.structure(dict(params)) != jax.tree.structure(shapes):
        return False
    pairs = zip(jax.tree.leaves(params), jax.tree.leaves(shapes), strict=True)
    return all(leaf.shape == shape.shape for leaf, shape in pairs)


def _is_explicit(mesh: Any) -> bool:
    return mesh is not None and AxisType.Explicit in (mesh.axis_types or ())


def _mesh(leaf: Any) -> Mesh | None:
    """The mesh that an array lies on, if it lies on one."""
    if not isinstance(leaf, jax.Array) or isinstance(leaf, Tracer):
        return None
    mesh = leaf.sharding.mesh if isinstance(leaf.sharding, NamedSharding) else None
    return mesh if isinstance(mesh, Mesh) else None


def _explicit_mesh(leaf: Any) -> Mesh | None:
    """The mesh that an array lies on, if it has `Explicit` axes."""
    mesh = _mesh(leaf)
    return mesh if _is_explicit(mesh) else None


def _auto(mesh: Mesh) -> Mesh:
    return Mesh(mesh.devices, mesh.axis_names)


def _seen_with(array: jax.Array, mesh: Mesh) -> jax.Array:
    """The same buffers, on a mesh that differs in the type of its axes only."""
    spec = cast(NamedSharding, array.sharding).spec
    parts = [shard.data for shard in array.addressable_shards]
    return jax.make_array_from_single_device_arrays(array.shape, NamedSharding(mesh, spec), parts)


def _explicit(leaf: Any, mesh: Mesh) -> Any:
    """A result on a mesh with `Explicit` axes, if it lies on these devices."""
    own = _mesh(leaf)
    if own is None or _is_explicit(own) or own.axis_names != mesh.axis_names:
        return leaf
    return _seen_with(leaf, mesh) if (own.devices == mesh.devices).all() else leaf


def _of_mesh(leaf: Any, mesh: Any) -> Any:
    """An array that a trace can use whose context is a mesh with `Explicit` axes."""
    own = _mesh(leaf)
    if own is None or _is_explicit(own) or own.axis_names != mesh.axis_names:
        return leaf
    return _seen_with(leaf, Mesh(own.devices, own.axis_names, axis_types=mesh.axis_types))
