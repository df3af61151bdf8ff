"""Meshes with `Explicit` axes: every public function computes on them with `Auto` ones.

`jax.make_mesh` gives `Explicit` axes: shardings are part of types, and an operation whose result
could be split in several ways is an error. What this library computes leaves that choice to XLA.
`any_axes` makes a function take arrays of either kind, inside and outside of `jax.set_mesh` and of
`jit`, and gives back the kind that came in.
"""

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar, cast

import jax
from jax.core import Tracer
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

Function = TypeVar("Function", bound=Callable[..., Any])


def any_axes(function: Function) -> Function:
    """A function for arrays whose meshes have `Auto` or `Explicit` axes, or a class of such.

    Outside of `jit` no array is copied or moved: the same buffers are looked at with the other kind
    of axes, and results keep the sharding that XLA gave them. Inside of a caller's `jit` with
    `Explicit` axes, parameters that come out keep the shardings of those that went in; any other
    result is whole on every device.
    """
    if isinstance(function, type):
        for name, method in list(vars(function).items()):
            if inspect.isfunction(method) and not name.startswith("_"):
                setattr(function, name, any_axes(method))
        return cast(Function, function)
    call = _concrete_steps if inspect.isgeneratorfunction(inspect.unwrap(function)) else _concrete

    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        leaves = [leaf for value in (*args, *kwargs.values()) for leaf in _leaves(value)]
        traced = [leaf for leaf in leaves if isinstance(leaf, Tracer)]
        if any(_is_explicit(jax.typeof(leaf).sharding.mesh) for leaf in traced):
            return _traced(function, args, kwargs)
        inside = _is_explicit(jax.sharding.get_abstract_mesh())
        if not traced and (inside or any(map(_explicit_mesh, leaves))):
            return call(function, args, kwargs, _mesh_of_results(leaves))
        return function(*args, **kwargs)

    for name in ("lower", "trace", "eval_shape", "clear_cache", "_cache_size"):  # of what jit made
        if hasattr(function, name):
            setattr(run, name, getattr(function, name))
    return cast(Function, run)


def _concrete(
    function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], back: Mesh | None
) -> Any:
    """Call with `Auto` axes in place of `Explicit` ones, outside of any trace."""
    same: dict[int, tuple[jax.Array, jax.Array]] = {}
    with _auto_context():
        out = function(
            *(_with_auto(value, same) for value in args),
            **{name: _with_auto(value, same) for name, value in kwargs.items()},
        )
    return _given_back(out, back, same)


def _concrete_steps(
    function: Callable[..., Iterator[Any]],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    back: Mesh | None,
) -> Iterator[Any]:
    """`_concrete` of a generator, whose caller has its own context between two results."""
    results = function(
        *(_with_auto(value, {}) for value in args),
        **{name: _with_auto(value, {}) for name, value in kwargs.items()},
    )
    while True:
        with _auto_context():
            try:
                out = next(results)
            except StopIteration:
                return
        yield _given_back(out, back, {})


def _with_auto(value: Any, same: dict[int, tuple[jax.Array, jax.Array]]) -> Any:
    """An argument whose arrays have `Auto` axes; `same` gets each new array with what it was."""
    if not any(map(_explicit_mesh, _leaves(value))):
        return value  # as it is, whatever it is

    def auto(leaf: Any) -> Any:
        mesh = _explicit_mesh(leaf)
        if mesh is None:
            return leaf
        new = _seen_with(leaf, _auto(mesh))
        same[id(new)] = (new, leaf)
        return new

    return jax.tree.map(auto, value, is_leaf=_is_text_or_ids)


def _given_back(out: Any, back: Mesh | None, same: dict[int, tuple[jax.Array, jax.Array]]) -> Any:
    """Results on a mesh with `Explicit` axes, if there is one to go back to.

    What was handed through is the same object as before.
    """
    if back is None or not any(map(_mesh, _leaves(out))):
        return out
    return jax.tree.map(
        lambda leaf: same[id(leaf)][1] if id(leaf) in same else _explicit(leaf, back), out
    )


def _leaves(value: Any) -> list[Any]:
    """The leaves of an argument, if it has any that JAX can see."""
    try:
        return jax.tree.leaves(value, is_leaf=_is_text_or_ids)
    except (TypeError, ValueError):  # a mapping whose keys have no order, say
        return []


def _outer_mesh() -> Mesh | None:
    """The mesh of `jax.set_mesh`, if it has `Explicit` axes."""
    mesh = jax.sharding.get_mesh() if hasattr(jax.sharding, "get_mesh") else None
    return mesh if _is_explicit(mesh) else None


def _auto_context() -> contextlib.AbstractContextManager[Any]:
    """The mesh of `jax.set_mesh` with `Auto` axes for a while, if it has `Explicit` ones."""
    outer = _outer_mesh()
    return contextlib.nullcontext() if outer is None else jax.set_mesh(_auto(outer))


def _mesh_of_results(leaves: list[Any]) -> Mesh | None:
    """The mesh with `Explicit` axes that results are to lie on; None: `Auto` is what comes out."""
    outer = _outer_mesh()
    meshes = [mesh for leaf in leaves if (mesh := _mesh(leaf)) is not None]
    explicit = bool(meshes) and all(map(_is_explicit, meshes))
    return outer if outer is not None else meshes[0] if explicit else None


def _traced(function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Call inside of a trace whose types say how arrays are split."""
    leaves, tree = jax.tree.flatten((args, kwargs), is_leaf=_is_text_or_ids)
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


def _is_text_or_ids(value: Any) -> bool:
    """Whether this is a sequence of plain values, or of such sequences: a batch of prompts, say."""
    if not isinstance(value, list | tuple):
        return False
    while isinstance(value, list | tuple) and value:
        value = value[0]
    return isinstance(value, int | float | str)


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
