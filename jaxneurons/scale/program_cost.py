"""What a program holds and does, read off its jaxpr: nothing is compiled or computed.

`cost` walks the operations of a traced function in their order and keeps account of which arrays
are alive, as the compiler's assignment of buffers does: what is elementwise is computed inside of
its consumers and takes no buffer of its own; a result may take the place of an operand that is no
longer needed; a loop has one set of temporaries, and stacks of what it emits. Operations and bytes
are those of matrix products, which is where both go.
"""

import dataclasses
import math
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from jaxneurons.model.experts import LOOP
from jaxneurons.scale.arena import Buffer, arena
from jaxneurons.scale.fusion import Fusion
from jaxneurons.scale.program_body import LOOPS, Body, Operation, byte_count


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
    body = Body(jaxpr, [True] * len(jaxpr.outvars))
    read = {number for op in body.ops for number in op.reads} | set(body.outputs)
    inputs = sum(body.sizes[number] for number in body.inputs if number in read)
    outputs = sum(byte_count(v.aval) for v in jaxpr.outvars)
    account = _Account(loops, copies, widen=copies)
    _walk(body, account, returned=True)
    temporaries = arena(account.buffers)
    return Cost(inputs, outputs, temporaries, account.operations, account.moved)


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
        return byte_count(aval) * (2 if narrow else 1)


def _walk(body: Body, account: _Account, *, returned: bool = False) -> None:
    """Run through the operations; `returned`: results have their places elsewhere."""
    steps, ends = Fusion(body, account.copies).steps()
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
            size = account.size(body.avals[number], op.name)
            same = next((n for n in reusable if body.sizes[n] == body.sizes[number]), None)
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


def _loop(op: Operation, account: _Account) -> None:
    eqn = op.params["_eqn"]
    if op.name == "scan":
        carries, body = eqn.params["num_carry"], eqn.params["jaxpr"].jaxpr
        used = [True] * carries + op.params["_used"][carries:]
        bodies, turns = [Body(body, used)], float(eqn.params["length"])
    elif op.name == "while":
        body = eqn.params["body_jaxpr"].jaxpr
        bodies, turns = [Body(body, [True] * len(body.outvars))], _turns(eqn, account.loops)
    else:
        branches = [branch.jaxpr for branch in eqn.params["branches"]]
        bodies, turns = [Body(b, [True] * len(b.outvars)) for b in branches], 1.0
    operations, moved = account.operations, account.moved
    account.operations = account.moved = 0.0
    for each in bodies:
        _walk(each, account)
    account.operations = operations + turns * account.operations
    account.moved = moved + turns * account.moved


def _turns(eqn: Any, usual: int) -> float:
    """Turns of a loop of unknown length: of one over blocks of experts, as many as are full.

    So the operations of experts are those of the rows that they are given.
    """
    stated = re.search(LOOP + r"(\d+)", str(eqn.source_info.name_stack))
    return float(stated[1] if stated else usual)


def _dot(eqn: Any) -> tuple[float, float]:
    """Operations of a matrix product, and bytes that it reads and writes."""
    left, right = (v.aval for v in eqn.invars)
    out = eqn.outvars[0].aval
    (contracted, _), _ = eqn.params["dimension_numbers"]
    inner = math.prod(left.shape[axis] for axis in contracted)
    work = 2.0 * math.prod(out.shape) * inner
    return work, float(byte_count(left) + byte_count(right) + byte_count(out))
