"""Changes beside the kernels, against the kernels with the changes added."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.models import compiled, random_tokens, tiny_config, tiny_params

from jaxneurons.edit import LowRank, Multipliers, Rows, apply
from jaxneurons.edit.low_rank_terms import low_rank_terms, stacked_terms
from jaxneurons.model import forward, greedy

CONFIG = tiny_config(num_layers=4, hidden_size=32, intermediate_size=48)
SHAPES = {"ffn.down": (48, 32), "ffn.up": (32, 48), "attn.o": (32, 32)}


@pytest.fixture(scope="module")
def params():
    return tiny_params(CONFIG)


def term(module, layer, seed=0, rank=1):
    rng = np.random.default_rng(seed)
    inputs, outputs = SHAPES[module]
    left = rng.normal(size=(inputs, rank)).astype(np.float32)
    right = rng.normal(size=(rank, outputs)).astype(np.float32)
    return LowRank(module, layer, left, right)


def rows(layer, index=(3, 30)):
    values = np.random.default_rng(5).normal(size=(len(index), 32)).astype(np.float32)
    return Rows("ffn.down", layer, np.array(index), values)


STAND_FOR = {
    "one": (term("ffn.down", 2),),
    "two of a kernel": (term("ffn.down", 2), term("ffn.down", 2, seed=1)),
    "two layers of other ranks": (term("ffn.down", 0), term("ffn.down", 3, rank=2)),
    "other modules": (term("ffn.up", 1), term("attn.o", 1), term("ffn.down", 1)),
    "rows": (rows(1), rows(3, (7,))),
    "rows beside a product": (rows(1), term("ffn.down", 2)),
}


@pytest.mark.parametrize("name", STAND_FOR)
def test_a_term_is_the_kernel_with_it_added(params, name):
    changes = STAND_FOR[name]
    terms = low_rank_terms(params, changes, config=CONFIG)
    tokens = random_tokens(CONFIG, (3, 9))

    @compiled
    def run(params, low_rank=None):
        return forward(params, tokens, config=CONFIG, at="all", low_rank=low_rank).logits

    expected = run(apply(params, changes, config=CONFIG))
    beside = run(params, terms)
    np.testing.assert_allclose(beside, expected, rtol=1e-4, atol=1e-4)
    assert np.abs(expected - run(params)).max() > 0.01


@pytest.mark.parametrize(
    "changes",
    [
        (),
        (rows(1), term("ffn.down", 1)),
        (term("ffn.down", 1), rows(1)),
        (rows(1), rows(1, (4,))),
        (term("ffn.down", 1, rank=40),),
        (Multipliers("act", np.array([0]), np.array([1]), np.array([2.0], np.float32)),),
    ],
    ids=["none", "added to rows", "rows of a sum", "rows twice", "too wide", "multipliers"],
)
def test_what_terms_do_not_stand_for_is_left_to_apply(params, changes):
    assert low_rank_terms(params, changes, config=CONFIG) is None


def test_narrow_parameters_keep_what_rounding_leaves_of_an_edit(params):
    narrow = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
    assert low_rank_terms(narrow, STAND_FOR["one"], config=CONFIG) is None


def test_edits_of_other_ranks_and_layers_are_one_batch(params):
    edits = [STAND_FOR["one"], STAND_FOR["two layers of other ranks"], STAND_FOR["rows"]]
    terms = stacked_terms([low_rank_terms(params, edit, config=CONFIG) for edit in edits])
    tokens, lengths = random_tokens(CONFIG, (2, 7)), jnp.array([7, 4])

    @compiled
    def run(params, low_rank=None):
        rows = {"lengths": lengths, "steps": 6}
        return greedy(params, tokens, config=CONFIG, low_rank=low_rank, **rows)

    together = jax.vmap(lambda low_rank: run(params, low_rank))(terms)
    each = [run(apply(params, edit, config=CONFIG)) for edit in edits]
    np.testing.assert_array_equal(together, each)
    assert not (np.array(each) == np.asarray(run(params))).all()
