"""What a program holds and does, read off its jaxpr: nothing is compiled or computed.

`cost` walks the operations of a traced function in their order and keeps account of which arrays
are alive, as the compiler's assignment of buffers does: what is elementwise is computed inside of
its consumers and takes no buffer of its own; a result may take the place of an operand that is no
longer needed; a loop has one set of temporaries, and stacks of what it emits. Operations and bytes
are those of matrix products, which is where both go.
"""

import collections
import dataclasses
import math
import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxneurons.model.experts import LOOP

VIEWS = {"reshape", "squeeze", "expand_dims", "stop_gradient", "copy", "optimization_barrier"}
"""The same bytes under another shape."""

CALLS = {"jit", "pjit", "closed_call", "core_call", "remat2", "checkpoint", "remat"} | {
    "custom_jvp_call",
    "custom_vjp_call",
    "custom_vjp_call_jaxpr",
    "custom_vmap_call",
}
"""Functions that are called once: the compiler inlines them."""

WHOLE = {"dot_general", "sort", "scatter", "scatter-add", "scatter_add", "scan", "while"} | {
    "gather",
    "top_k",
    "cond",
    "conv_general_dilated",
}
"""What reads its operands from buffers."""

FROM_FUSION = {"reduce_sum", "reduce_max", "reduce_min", "reduce_and", "reduce_or", "argmax"} | {
    "argmin",
    "cumsum",
    "cumlogsumexp",
    "reduce_prod",
    "concatenate",
    "pad",
    "dynamic_update_slice",
}
"""What reads operands that are computed on the way, and writes a buffer."""

EXPENSIVE = {"log", "log1p", "tanh", "logistic", "div", "rsqrt", "sqrt", "pow"} | {
    "sin",
    "cos",
    "sinh",
    "cosh",
    "asinh",
    "erf",
}
"""What is not computed twice: a second consumer gives it a buffer."""


MOVES = {
    "broadcast_in_dim",
    "transpose",
    "slice",
    "dynamic_slice",
    "rev",
    "split",
    "iota",
    "tile",
} | {
    "reshape",
}
"""What is computed on the way, but not each value from those at its own place."""

LOOPS = {"scan", "while", "cond"}


class Cost(NamedTuple):
    """What a program takes, on one device.

    Attributes:
      arguments: bytes of its arguments.
      outputs: bytes of its results.
      temporaries: bytes alive at once, beside arguments and results, at most.
      operations: of matrix products: a multiplication and an addition are two.
      bytes_moved: read and written by them.
    """

    arguments: int
    outputs: int
    temporaries: int
    operations: float
    bytes_moved: float

    @property
    def peak(self) -> int:
        """Bytes of everything."""
        return self.arguments + self.outputs + self.temporaries


def cost(
    function: Callable[..., Any], *arguments: Any, loops: int = 1, copies: bool = True
) -> Cost:
    """What calling a function takes; it is traced, with shapes in place of arrays.

    Args:
      function: pure, of arrays.
      arguments: trees of arrays or `jax.ShapeDtypeStruct`.
      loops: turns that a loop of unknown length is taken to make.
      copies: products copy operands whose axes are in another order, as on a CPU.
    """
    closed = jax.make_jaxpr(function)(*arguments)
    jaxpr = closed.jaxpr
    scope = _Scope(jaxpr, [True] * len(jaxpr.outvars))
    read = {number for op in scope.ops for number in op.reads} | set(scope.outputs)
    inputs = sum(scope.sizes[number] for number in scope.inputs if number in read)
    outputs = sum(_nbytes(v.aval) for v in jaxpr.outvars)
    account = _Account(loops, copies, widen=copies)
    scope.walk(account, returned=True)
    temporaries = arena(account.buffers)
    return Cost(inputs, outputs, temporaries, account.operations, account.moved)


class Buffer(NamedTuple):
    """An array that is alive from one tick of the program to another, both included.

    It ends a tick after its last use: a kernel does not write where the one before it has read.
    """

    size: int
    start: int
    end: int


@dataclasses.dataclass
class _Op:
    """An operation on values, which are numbers; `over`: those that it may write over."""

    name: str
    reads: list[int]
    writes: list[int]
    params: dict[str, Any]
    over: frozenset[int] = frozenset()


@dataclasses.dataclass
class _Account:
    """What a walk has seen: the clock, buffers, operations and bytes."""

    loops: int
    copies: bool
    widen: bool = False
    clock: int = 0
    buffers: list[Buffer] = dataclasses.field(default_factory=list)
    operations: float = 0.0
    moved: float = 0.0

    def size(self, aval: Any, made_by: str) -> int:
        """Bytes of a buffer: what a CPU computes in bfloat16 it computes, and holds, in float32."""
        narrow = self.widen and made_by not in LOOPS and getattr(aval, "dtype", None) == "bfloat16"
        return _nbytes(aval) * (2 if narrow else 1)


class _Scope:
    """A function's body, or a loop's."""

    def __init__(self, jaxpr: Any, used: Sequence[bool]):
        self.sizes: list[int] = []
        self.avals: list[Any] = []
        self.shapes: list[tuple[int, ...]] = []
        self.ops: list[_Op] = []
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
        self.sizes.append(_nbytes(aval))
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
            self.ops.append(_Op(name, reads, [self._new(v) for v in eqn.outvars], params))
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
                self.ops.append(_Op("reshape", [number], [self._new(var)], {}))
        for var in body.constvars:
            self._new(var)
        results = self._flatten(body)
        for at, (var, number) in enumerate(zip(eqn.outvars, results, strict=True)):
            if number is None:
                self._new(var)
            elif at < eqn.params["num_carry"]:
                self.env[var] = number
            else:
                self.ops.append(_Op("reshape", [number], [self._new(var)], {}))
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

    # --- which values have buffers ------------------------------------------------------------

    def steps(self, copies: bool) -> tuple[list[_Op], set[int]]:
        """What writes buffers, in order, and those of the results."""
        return _Fusion(self, copies).steps()

    def walk(self, account: _Account, *, returned: bool = False) -> None:
        """Run through the operations; `returned`: results have their places elsewhere."""
        steps, ends = self.steps(account.copies)
        last = {number: at for at, op in enumerate(steps) for number in op.reads}
        place: dict[int, int] = {}  # value -> its buffer
        open_: dict[int, list[int]] = {}  # buffer -> [size, start]
        count = 0
        for at, op in enumerate(steps):
            started = account.clock
            dying = {n for n in op.reads if last[n] == at and n in place and n not in ends}
            if op.name == "dot_general":
                work, traffic = _dot(op.params["_eqn"])
                account.operations, account.moved = (
                    account.operations + work,
                    account.moved + traffic,
                )
            if op.name in LOOPS:
                _loop(op, account)
            account.clock += 1
            reusable = dying if op.name in ("scan", "while") else dying & op.over
            for number, used in zip(op.writes, op.params["_used"], strict=True):
                if not used:
                    continue
                size = account.size(self.avals[number], op.name)
                same = next((n for n in reusable if self.sizes[n] == self.sizes[number]), None)
                if returned and number in ends:
                    if same is not None:
                        open_.pop(place.pop(same), None)
                        reusable = reusable - {same}
                        dying.discard(same)
                    continue
                if same is not None:
                    reusable = reusable - {same}
                    dying.discard(same)
                    place[number] = place.pop(same)
                    continue
                place[number], open_[count] = count, [size, started]
                count += 1
            for number in dying:
                if number in place:
                    _close(open_, place.pop(number), account)
            for number in op.writes:
                if number in place and number not in last and number not in ends:
                    _close(open_, place.pop(number), account)
        for buffer in list(open_):
            _close(open_, buffer, account)
        account.clock += 1


def _close(opened: dict[int, list[int]], buffer: int, account: _Account) -> None:
    size, start = opened.pop(buffer)
    if size:
        account.buffers.append(Buffer(size, start, account.clock))


def _loop(op: _Op, account: _Account) -> None:
    eqn = op.params["_eqn"]
    if op.name == "scan":
        carries, body = eqn.params["num_carry"], eqn.params["jaxpr"].jaxpr
        used = [True] * carries + op.params["_used"][carries:]
        bodies, turns = [_Scope(body, used)], float(eqn.params["length"])
    elif op.name == "while":
        body = eqn.params["body_jaxpr"].jaxpr
        bodies, turns = [_Scope(body, [True] * len(body.outvars))], _turns(eqn, account.loops)
    else:
        branches = [branch.jaxpr for branch in eqn.params["branches"]]
        bodies, turns = [_Scope(b, [True] * len(b.outvars)) for b in branches], 1.0
    operations, moved = account.operations, account.moved
    account.operations = account.moved = 0.0
    for scope in bodies:
        scope.walk(account)
    account.operations = operations + turns * account.operations
    account.moved = moved + turns * account.moved


def _turns(eqn: Any, usual: int) -> float:
    """Turns of a loop of unknown length: of one over blocks of experts, as many as are full.

    So the operations of experts are those of the rows that they are given.
    """
    stated = re.search(LOOP + r"(\d+)", str(eqn.source_info.name_stack))
    return float(stated[1] if stated else usual)


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


class _Fusion:
    """Which values of a scope are computed inside of their consumers, and which have buffers."""

    def __init__(self, scope: _Scope, copies: bool):
        self.scope, self.copies = scope, copies
        self.uses = collections.Counter(number for op in scope.ops for number in op.reads)
        self.uses.update(scope.outputs)
        inputs = {number: frozenset((number,)) for number in scope.inputs}
        # Of constants none.
        self.roots: dict[int, frozenset[int]] = collections.defaultdict(frozenset, inputs)
        self.aligned = self.roots.copy()
        """Of a value, the buffers that it depends on at the same place only."""
        self.virtual: set[int] = set()
        self.wider: dict[int, int] = {}
        self.made_here: set[int] = set()
        self.made: list[_Op] = []

    def steps(self) -> tuple[list[_Op], set[int]]:
        for op in self.scope.ops:
            if op.name in VIEWS and len(op.reads) == 1:
                (source,), (number,) = op.reads, op.writes
                self.roots[number] = self.roots[source]
                same = self.scope.shapes[source] == self.scope.shapes[number]
                self.aligned[number] = self.aligned[source] if same else frozenset()
                if source in self.virtual:
                    self.virtual.add(number)
            elif op.name in WHOLE:
                for number in op.reads:
                    if op.name not in LOOPS or number in op.params["_state"] or self.roots[number]:
                        self.buffer(number)
                if self.copies and op.name in ("scan", "while", "dot_general"):
                    op = self.widened(op)
                if self.copies and op.name == "dot_general":
                    op = self.ordered(op)
                self.add(op, ())
            elif op.name in FROM_FUSION:
                if op.name == "reduce_max" and self.uses[op.reads[0]] > 1:
                    self.buffer(op.reads[0])  # of a softmax, which is one kernel
                self.add(op, self.over(op) if op.name == "dynamic_update_slice" else ())
            else:
                self.compute(op)
        for number in self.scope.outputs:
            self.buffer(number)
        return self.made, {r for number in self.scope.outputs for r in self.roots[number]}

    def add(self, op: _Op, over: Sequence[int] | frozenset[int]) -> None:
        """An operation that writes buffers."""
        reads = sorted({r for number in op.reads for r in self.roots[number]})
        self.made.append(_Op(op.name, reads, op.writes, op.params, frozenset(over)))
        if op.name not in LOOPS:
            self.made_here.update(op.writes)
        for number in op.writes:
            self.roots[number] = self.aligned[number] = frozenset((number,))

    def over(self, op: _Op) -> frozenset[int]:
        """Buffers that an elementwise operation may write over."""
        shape = self.scope.shapes[op.writes[0]]
        same = [n for n in op.reads if self.scope.shapes[n] == shape]
        return frozenset().union(*(self.aligned[n] for n in same)) if same else frozenset()

    def compute(self, op: _Op) -> None:
        """An operation inside of its consumers."""
        sources = frozenset().union(*(self.roots[n] for n in op.reads))
        elementwise = op.name not in MOVES | {"exp"}
        for number in op.writes:
            self.roots[number] = sources
            self.aligned[number] = self.over(op) if elementwise else frozenset()
            self.virtual.add(number)
            if op.name in EXPENSIVE and self.uses[number] > 1:
                self.buffer(number)

    def buffer(self, number: int) -> None:
        """Give a value that is computed on the way a buffer of its own."""
        if number not in self.virtual:
            return
        self.virtual.discard(number)
        reads, over = sorted(self.roots[number]), self.aligned[number]
        self.made.append(_Op("fusion", reads, [number], {"_used": [True]}, over))
        self.made_here.add(number)
        self.roots[number] = self.aligned[number] = frozenset((number,))

    def widened(self, op: _Op) -> _Op:
        """A loop or product whose operands in bfloat16 are copied to float32 first, once."""
        state = op.params["_state"]
        reads = [n if n in state else self.wide(n) for n in op.reads]
        return dataclasses.replace(op, reads=reads)

    def wide(self, number: int) -> int:
        aval = self.scope.avals[number]
        if getattr(aval, "dtype", None) != "bfloat16" or number in self.made_here:
            return number
        if number not in self.wider:
            self.wider[number] = copy = self.scope.add_value(aval)
            used = {"_used": [True]}
            self.made.append(_Op("copy", sorted(self.roots[number]), [copy], used))
            self.roots[copy] = self.aligned[copy] = frozenset((copy,))
        return self.wider[number]

    def ordered(self, op: _Op) -> _Op:
        """A product whose operands are copied where their axes are not in the order it takes."""
        eqn = op.params["_eqn"]
        (contracted, batches) = eqn.params["dimension_numbers"]
        if not batches[0] or len(op.reads) != 2:
            return op
        reads = list(op.reads)
        for side, number in enumerate(op.reads):
            ndim = len(eqn.invars[side].aval.shape)
            batch, inner = list(batches[side]), list(contracted[side])
            free = [a for a in range(ndim) if a not in batch and a not in inner]
            order = batch + (free + inner if side == 0 else inner + free)
            if order != list(range(ndim)):
                copy = self.scope.add_value(eqn.invars[side].aval)
                used = {"_used": [True]}
                self.made.append(_Op("copy", sorted(self.roots[number]), [copy], used))
                self.roots[copy] = self.aligned[copy] = frozenset((copy,))
                reads[side] = copy
        return dataclasses.replace(op, reads=reads)


def arena(buffers: Sequence[Buffer]) -> int:
    """Bytes that hold buffers whose times overlap side by side: the largest are placed first.

    XLA's global best fit by decreasing size: each goes into the smallest gap that holds it.
    """
    return min(
        _placed(sorted(buffers, key=lambda b: (-b.size, b.start))),
        _placed(sorted(buffers, key=lambda b: (b.start - b.end, -b.size))),
    )


def _placed(buffers: Sequence[Buffer]) -> int:
    placed: list[tuple[int, Buffer]] = []
    height = 0
    for buffer in buffers:
        beside = sorted(
            (offset, offset + other.size)
            for offset, other in placed
            if other.start <= buffer.end and buffer.start <= other.end
        )
        at, best, room = 0, None, math.inf
        for low, high in beside:
            if buffer.size <= low - at < room:
                best, room = at, low - at
            at = max(at, high)
        offset = at if best is None else best
        placed.append((offset, buffer))
        height = max(height, offset + buffer.size)
    return height


def _dot(eqn: Any) -> tuple[float, float]:
    """Operations of a matrix product, and bytes that it reads and writes."""
    left, right = (v.aval for v in eqn.invars)
    out = eqn.outvars[0].aval
    (contracted, _), _ = eqn.params["dimension_numbers"]
    inner = math.prod(left.shape[axis] for axis in contracted)
    work = 2.0 * math.prod(out.shape) * inner
    return work, float(_nbytes(left) + _nbytes(right) + _nbytes(out))


def _nbytes(aval: Any) -> int:
    shape, dtype = getattr(aval, "shape", ()), getattr(aval, "dtype", None)
    try:
        width = np.dtype(dtype).itemsize
    except TypeError:
        width = 4  # keys of jax.random
    return math.prod(shape) * width
