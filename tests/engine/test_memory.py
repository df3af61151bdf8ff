"""What attribution needs above its parameters, by the compiler's own analysis; nothing runs."""

import functools

import jax
import jax.numpy as jnp
import pytest
from support.models import compiled, tiny_config

from jaxneurons import Quadrature, integrated_gradients
from jaxneurons.model import param_shapes


def temporaries(*, tokens, layers, nodes):
    config = tiny_config(num_layers=layers, max_position=1024)
    shapes = jax.tree.map(
        lambda shape: jax.ShapeDtypeStruct(shape, jnp.float32),
        param_shapes(config),
        is_leaf=lambda shape: isinstance(shape, tuple),
    )
    run = functools.partial(
        integrated_gradients,
        config=config,
        quadrature=Quadrature("gauss", steps=nodes),
        chunk_rows=4 * layers,
    )
    ids = jax.ShapeDtypeStruct((1, tokens), jnp.int32)
    target = jax.ShapeDtypeStruct((1,), jnp.int32)
    program = compiled(run).lower(shapes, ids, target).compile()
    return program.memory_analysis().temp_size_in_bytes


@pytest.mark.slow
def test_nothing_grows_with_tokens_times_layers_times_nodes():
    """More nodes are more passes of the same memory, whatever the prompt's length and the depth."""
    few, many = (temporaries(tokens=512, layers=4, nodes=n) for n in (4, 16))
    assert many < 1.05 * few
    # Keys and values of every position and layer there are, and no more than twice.
    deep = temporaries(tokens=512, layers=8, nodes=16)
    config = tiny_config()
    keys_and_values = 4 * 2 * 512 * config.kv_width
    assert deep - many < 4 * (2 * keys_and_values + 100_000)
