"""Which values are computed inside of their consumers, and which have buffers of their own."""

import collections
import dataclasses
from collections.abc import Sequence

from jaxneurons.scale.program_body import LOOPS, Body, Operation

VIEWS = {"reshape", "squeeze", "expand_dims", "stop_gradient", "copy", "optimization_barrier"}
"""The same bytes under another shape."""

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


class Fusion:
    """Which values of a body are computed inside of their consumers, and which have buffers."""

    def __init__(self, body: Body, copies: bool):
        self.body, self.copies = body, copies
        self.uses = collections.Counter(number for op in body.ops for number in op.reads)
        self.uses.update(body.outputs)
        inputs = {number: frozenset((number,)) for number in body.inputs}
        # Of constants none.
        self.roots: dict[int, frozenset[int]] = collections.defaultdict(frozenset, inputs)
        self.aligned = self.roots.copy()
        """Of a value, the buffers that it depends on at the same place only."""
        self.virtual: set[int] = set()
        self.wider: dict[int, int] = {}
        self.made_here: set[int] = set()
        self.made: list[Operation] = []

    def steps(self) -> tuple[list[Operation], set[int]]:
        """What writes buffers, in order, and those of the results."""
        for op in self.body.ops:
            if op.name in VIEWS and len(op.reads) == 1:
                (source,), (number,) = op.reads, op.writes
                self.roots[number] = self.roots[source]
                same = self.body.shapes[source] == self.body.shapes[number]
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
        for number in self.body.outputs:
            self.buffer(number)
        return self.made, {r for number in self.body.outputs for r in self.roots[number]}

    def add(self, op: Operation, over: Sequence[int] | frozenset[int]) -> None:
        """An operation that writes buffers."""
        reads = sorted({r for number in op.reads for r in self.roots[number]})
        self.made.append(Operation(op.name, reads, op.writes, op.params, frozenset(over)))
        if op.name not in LOOPS:
            self.made_here.update(op.writes)
        for number in op.writes:
            self.roots[number] = self.aligned[number] = frozenset((number,))

    def over(self, op: Operation) -> frozenset[int]:
        """Buffers that an elementwise operation may write over."""
        shape = self.body.shapes[op.writes[0]]
        same = [n for n in op.reads if self.body.shapes[n] == shape]
        return frozenset().union(*(self.aligned[n] for n in same)) if same else frozenset()

    def compute(self, op: Operation) -> None:
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
        self.made.append(Operation("fusion", reads, [number], {"_used": [True]}, over))
        self.made_here.add(number)
        self.roots[number] = self.aligned[number] = frozenset((number,))

    def widened(self, op: Operation) -> Operation:
        """A loop or product whose operands in bfloat16 are copied to float32 first, once."""
        state = op.params["_state"]
        reads = [n if n in state else self.wide(n) for n in op.reads]
        return dataclasses.replace(op, reads=reads)

    def wide(self, number: int) -> int:
        """A value's copy in float32, where it is an argument in bfloat16."""
        aval = self.body.avals[number]
        if getattr(aval, "dtype", None) != "bfloat16" or number in self.made_here:
            return number
        if number not in self.wider:
            self.wider[number] = copy = self.body.add_value(aval)
            used = {"_used": [True]}
            self.made.append(Operation("copy", sorted(self.roots[number]), [copy], used))
            self.roots[copy] = self.aligned[copy] = frozenset((copy,))
        return self.wider[number]

    def ordered(self, op: Operation) -> Operation:
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
                copy = self.body.add_value(eqn.invars[side].aval)
                used = {"_used": [True]}
                self.made.append(Operation("copy", sorted(self.roots[number]), [copy], used))
                self.roots[copy] = self.aligned[copy] = frozenset((copy,))
                reads[side] = copy
        return dataclasses.replace(op, reads=reads)
