"""What a jaxpr says of memory and work, against numbers that are counted by hand."""

import jax
import jax.numpy as jnp
import pytest

from jaxneurons.scale.arena import Buffer, arena
from jaxneurons.scale.program_cost import cost

F32 = jnp.float32


def struct(*shape, dtype=F32):
    return jax.ShapeDtypeStruct(shape, dtype)


def test_a_product_counts_its_operations_and_bytes():
    taken = cost(lambda a, b: a @ b, struct(3, 5), struct(5, 7))
    assert taken.operations == 2 * 3 * 5 * 7
    assert taken.bytes_moved == 4 * (15 + 35 + 21)
    assert taken[:3] == (4 * 50, 4 * 21, 0)
    assert taken.peak == 4 * 71


def test_what_is_elementwise_takes_no_buffer():
    taken = cost(lambda a, b: jnp.sum((2 * a + 1) @ b) * 3, struct(8, 8), struct(8, 8))
    # The left operand and the product; the sum is a number.
    assert 2 * 256 <= taken.temporaries <= 2 * 256 + 64


def test_products_one_after_the_other_do_not_add_up():
    def chain(x, w):
        for _ in range(10):
            x = x @ w
        return x

    taken = cost(chain, struct(16, 16), struct(16, 16))
    # One that is read, one that is written, and the one before them.
    assert taken.temporaries == 3 * 4 * 256
    assert taken.operations == 10 * 2 * 16**3


@pytest.mark.parametrize("turns", [3, 50])
def test_a_loop_has_one_set_of_temporaries_and_stacks_what_it_emits(turns):
    def loop(x, ws):
        def step(x, w):
            y = x @ w
            return y @ w, y

        return jax.lax.scan(step, x, ws)[1].sum()

    taken = cost(loop, struct(16, 16), struct(turns, 16, 16))
    assert taken.operations == turns * 2 * 2 * 16**3
    stacked = turns * 1024
    assert stacked <= taken.temporaries <= stacked + 5 * 1024


def test_a_loop_of_unknown_length_turns_as_often_as_it_is_told():
    def loop(x):
        return jax.lax.while_loop(lambda x: x.sum() < 9, lambda x: x @ x, x)

    one, many = cost(loop, struct(8, 8)), cost(loop, struct(8, 8), loops=5)
    assert many.operations == 5 * one.operations == 5 * 2 * 8**3
    assert many.temporaries == one.temporaries


def test_what_is_not_used_is_not_counted():
    taken = cost(lambda a, b: (a @ a, b @ b)[0], struct(8, 8), struct(64, 64))
    assert taken.operations == 2 * 8**3
    assert taken.arguments == 256


def test_a_gradient_keeps_what_it_needs():
    def deep(x, ws):
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, ws)[0].sum()

    forward = cost(deep, struct(16, 16), struct(9, 16, 16))
    backward = cost(jax.grad(deep), struct(16, 16), struct(9, 16, 16))
    assert backward.temporaries > forward.temporaries + 8 * 1024
    assert backward.operations == 2 * forward.operations  # none for the weights


def test_bfloat16_is_computed_in_float32_on_a_cpu_alone():
    shapes = (struct(64, 64, dtype=jnp.bfloat16),) * 2
    on_cpu = cost(lambda a, b: (a @ b) @ b, *shapes)
    elsewhere = cost(lambda a, b: (a @ b) @ b, *shapes, copies=False)
    assert elsewhere.temporaries == 2 * 64**2
    assert on_cpu.temporaries >= 3 * 4 * 64**2  # the product, and wide copies of both operands


def test_the_arena_is_no_smaller_than_what_lives_at_once_and_no_larger_than_all():
    buffers = [Buffer(10, 0, 2), Buffer(20, 1, 3), Buffer(10, 3, 5), Buffer(5, 4, 9)]
    at_once = max(sum(b.size for b in buffers if b.start <= t <= b.end) for t in range(10))
    assert at_once == 30
    assert arena(buffers) == 30
    assert arena([]) == 0
    assert arena([Buffer(7, 0, 1), Buffer(7, 2, 3)]) == 7
