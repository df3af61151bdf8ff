"""A traced function, or a loop's body, as one list of operations on numbered values."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

CALLS = {"jit", "pjit", "closed_call", "core_call", "remat2", "checkpoint", "remat"} | {
    "custom_jvp_call",
    "custom_vjp_call",
    "custom_vjp_call_jaxpr",
    "custom_vmap_call",
}
"""Functions that are called once: the compiler inlines them."""

LOOPS = {"scan", "while", "cond"}


@dataclasses.dataclass
class Operation:
    """An operation on values, which are numbers; `over`: those that it may write over."""

    name: str
    reads: list[int]
    writes: list[int]
    params: dict[str, Any]
    over: frozenset[int] = frozenset()


class Body:
    """A function's body, or a loop's."""

    def __init__(self, jaxpr: Any, used: Sequence[bool]):
        self.sizes: list[int] = []
        self.avals: list[Any] = []
        self.shapes: list[tuple[int, ...]] = []
        self.ops: list[Operation] = []
        self.env: dict[Any, int] = {}
        self.emitted: dict[int, int] = {}
        self.inputs = [self._new(v) for v in (*jaxpr.invars, *jaxpr.constvars)]
        outs = self._flatten(jaxpr)
        self.outputs = [v for v, keep in zip(outs, used, strict=True) if keep and v is not None]
        self._drop_unused()

    def _new(self, var: Any) -> int:
        self.env[var] = number = self.add_value(var.aval)
        return number

    def add_value(self, aval: Any) -> int:
        """The number of a new value."""
        self.sizes.append(byte_count(aval))
        self.shapes.append(tuple(getattr(aval, "shape", ())))
        self.avals.append(aval)
        return len(self.sizes) - 1

    def _read(self, var: Any) -> int | None:
        return None if hasattr(var, "val") else self.env[var]

    def _flatten(self, jaxpr: Any) -> list[int | None]:
        for eqn in jaxpr.eqns:
            name = eqn.primitive.name
            if name in CALLS:
                self._inline(eqn)
                continue
            if name == "reduce_precision" and _keeps(eqn):
                self.env[eqn.outvars[0]] = self.env[eqn.invars[0]]
                continue
            if name == "scan" and eqn.params["length"] == 1:
                self._unroll(eqn)
                continue
            reads = [number for v in eqn.invars if (number := self._read(v)) is not None]
            params = {**eqn.params, "_eqn": eqn}
            state = {self._read(v) for v in eqn.invars[_carried(eqn)]}
            params["_state"] = state - {None}
            self.ops.append(Operation(name, reads, [self._new(v) for v in eqn.outvars], params))
        return [self._read(v) for v in jaxpr.outvars]

    def _inline(self, eqn: Any) -> None:
        names = ("jaxpr", "call_jaxpr", "fun_jaxpr", "call")
        inner = next(eqn.params[name] for name in names if name in eqn.params)
        body = getattr(inner, "jaxpr", inner)
        given = eqn.invars[len(eqn.invars) - len(body.invars) :]
        for outer, var in zip(given, body.invars, strict=True):
            number = self._read(outer)
            self.env[var] = self.add_value(var.aval) if number is None else number
        for var in body.constvars:
            self._new(var)
        for var, number in zip(eqn.outvars, self._flatten(body), strict=True):
            self.env[var] = self.add_value(var.aval) if number is None else number

    def _unroll(self, eqn: Any) -> None:
        """A loop of one turn, which is none: what it stacks is what it emits."""
        body = eqn.params["jaxpr"].jaxpr
        stacked = eqn.params["num_consts"] + eqn.params["num_carry"]
        for at, (outer, var) in enumerate(zip(eqn.invars, body.invars, strict=True)):
            number = self._read(outer)
            if number is None:
                self._new(var)
            elif at < stacked:
                self.env[var] = number
            elif number in self.emitted:
                self.env[var] = self.emitted[number]
            else:
                self.ops.append(Operation("reshape", [number], [self._new(var)], {}))
        for var in body.constvars:
            self._new(var)
        results = self._flatten(body)
        for at, (var, number) in enumerate(zip(eqn.outvars, results, strict=True)):
            if number is None:
                self._new(var)
            elif at < eqn.params["num_carry"]:
                self.env[var] = number
            else:
                self.ops.append(Operation("reshape", [number], [self._new(var)], {}))
                self.emitted[self.env[var]] = number

    def _drop_unused(self) -> None:
        needed = set(self.outputs)
        kept = []
        for op in reversed(self.ops):
            if needed.isdisjoint(op.writes):
                continue
            op.params["_used"] = [number in needed for number in op.writes]
            needed.update(op.reads)
            kept.append(op)
        self.ops = kept[::-1]


def _keeps(eqn: Any) -> bool:
    """Whether a reduction of precision leaves all of it: it marks what a gradient keeps."""
    info = jnp.finfo(eqn.invars[0].aval.dtype)
    return (eqn.params["exponent_bits"], eqn.params["mantissa_bits"]) == (info.nexp, info.nmant)


def _carried(eqn: Any) -> slice:
    """Which operands of a loop are its state; of another operation none."""
    params = eqn.params
    if eqn.primitive.name == "scan":
        return slice(params["num_consts"], params["num_consts"] + params["num_carry"])
    if eqn.primitive.name == "while":
        return slice(params["cond_nconsts"] + params["body_nconsts"], None)
    return slice(0, 0)


def byte_count(aval: Any) -> int:
    """Bytes of an array."""
    shape, dtype = getattr(aval, "shape", ()), getattr(aval, "dtype", None)
    try:
        width = np.dtype(dtype).itemsize
    except TypeError:
        width = 4  # keys of jax.random
    return math.prod(shape) * width
