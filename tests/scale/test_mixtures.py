"""Plans of mixtures of experts: all of them are held, the chosen ones are computed."""

import jax
import jax.numpy as jnp
import pytest
from support.models import tiny_config

from jaxneurons import ConfigError, forward
from jaxneurons.model import param_shapes
from jaxneurons.model.parameters import count_active_parameters, count_parameters
from jaxneurons.scale.edit_jobs import edit_programs
from jaxneurons.scale.program_cost import cost
from jaxneurons.scale.programs import Chunks, Work

TOKENS = 64


def mixture(experts):
    return tiny_config(experts=experts, experts_per_token=2, intermediate_size=16)


def needed(config):
    params = jax.tree.map(
        lambda shape: jax.ShapeDtypeStruct(shape, jnp.float32),
        param_shapes(config),
        is_leaf=lambda shape: isinstance(shape, tuple),
    )
    ids = jax.ShapeDtypeStruct((1, TOKENS), jnp.int32)
    return cost(lambda params, ids: forward(params, ids, config=config).logits, params, ids)


def test_parameters_that_a_token_is_computed_with():
    few, many = mixture(4), mixture(32)
    kernels, router = 3 * 32 * 16 * 3, 3 * 32
    assert count_parameters(many) - count_parameters(few) == 28 * (kernels + router)
    assert count_active_parameters(many) - count_active_parameters(few) == 28 * router
    dense = tiny_config(intermediate_size=32)
    assert count_active_parameters(dense) == count_parameters(dense)
    assert count_active_parameters(few) - 4 * router == count_parameters(dense)


def test_operations_are_those_of_the_chosen_experts():
    few, many, dense = (
        needed(mixture(4)),
        needed(mixture(32)),
        needed(tiny_config(intermediate_size=32)),
    )
    router = 2.0 * TOKENS * 3 * 32
    weighing = 2.0 * TOKENS * 3 * 32 * 2  # the sum over chosen experts
    assert few.operations == dense.operations + 4 * router + weighing
    assert many.operations == few.operations + 28 * router
    assert many.arguments > 3 * few.arguments
    assert many.temporaries < 2 * few.temporaries


def test_edits_that_there_are_not_are_not_planned():
    with pytest.raises(ConfigError, match="one for each of its 4 experts"):
        edit_programs(mixture(4), Work(), Chunks(1, 1, 1, 1), jnp.float32)
