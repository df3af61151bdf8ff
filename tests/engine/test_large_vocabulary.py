"""Logits of 262,144 tokens, a MiB a row: memory stays within its budget, results are the same."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.models import compiled, random_tokens, tiny_config, tiny_params

from jaxneurons import Quadrature, integrated_gradients
from jaxneurons.edit.changes import LowRank
from jaxneurons.edit.measures import score_answers
from jaxneurons.engine.last_position import (
    TRIALS,
    Changes,
    last_position,
    scaled_answers,
    trials_at_once,
)
from jaxneurons.engine.likelihood import sentence_loss
from jaxneurons.engine.logits import LOGIT_BYTES, logits_at_once
from jaxneurons.engine.parametrisation import EXTRA
from jaxneurons.engine.row_memory import logits_are_most, memory_bound, rows_in_budget
from jaxneurons.engine.rows import prefill

pytestmark = pytest.mark.slow

LARGE = tiny_config(
    vocab_size=262_144, hidden_size=8, intermediate_size=16, num_layers=2, num_heads=2,
    num_kv_heads=1, head_dim=4, tied=True,
)  # fmt: skip
ROW = 4 * LARGE.vocab_size


def ids(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.int32)


def temporaries(function, *args):
    """Bytes by the compiler's own analysis; nothing runs."""
    params = jax.eval_shape(functools.partial(tiny_params, LARGE))
    memory = compiled(function).lower(params, *args).compile().memory_analysis()
    if memory is None:
        pytest.skip("this backend does not say")
    return memory.temp_size_in_bytes


@pytest.mark.slow
@pytest.mark.parametrize(("prompts", "answers"), [(8, 1), (2, 4)])
def test_rows_stay_within_the_budget(prompts, answers):
    """A pass of the least rows of every answer token would take more than the budget."""
    budget, least = 1 << 26, LARGE.num_layers + EXTRA + 1

    def run(params, tokens, targets, lengths):
        options = {"quadrature": Quadrature("adaptive"), "memory_budget": budget}
        return integrated_gradients(
            params, tokens, targets, config=LARGE, lengths=lengths, **options
        )

    assert 3 * ROW * prompts * answers * least > 2 * budget
    assert rows_in_budget(LARGE, 16, budget) == budget // (3 * ROW)
    needed = temporaries(run, ids(prompts, 16), ids(prompts, answers), ids(prompts))
    assert needed < memory_bound(LARGE, 16, prompts=prompts, answers=answers, memory_budget=budget)


@pytest.mark.parametrize("rule", ["gauss", pytest.param("adaptive", marks=pytest.mark.slow)])
def test_some_prompts_and_answers_at_a_time(rule, monkeypatch):
    config = tiny_config(num_layers=2)
    params, tokens = tiny_params(config), random_tokens(config, (4, 6), 1)
    answers, answer_lengths = random_tokens(config, (4, 3), 9), jnp.array([3, 1, 2, 3])
    lengths = jnp.array([6, 3, 5, 4])

    def run(chunk_rows):
        @compiled
        def attribution(params, tokens, answers):
            return integrated_gradients(
                params,
                tokens,
                answers,
                config=config,
                lengths=lengths,
                answer_lengths=answer_lengths,
                quadrature=Quadrature(rule, steps=4),
                chunk_rows=chunk_rows,
            )

        return attribution(params, tokens, answers)

    assert not logits_are_most(config, 8)
    together = run(200)
    calls = []
    monkeypatch.setattr(
        "jaxneurons.engine.attribution.logits_are_most", lambda *args: calls.append(args) or True
    )
    apart = run(20)  # two prompts, one answer token of each
    assert calls
    norm = np.linalg.norm(together.scores, axis=-1, keepdims=True)
    assert (np.abs(apart.scores - together.scores) / norm).max() < 1e-5
    for name in ("probability", "ablated", "gap"):
        np.testing.assert_allclose(
            getattr(apart, name), getattr(together, name), rtol=1e-5, atol=1e-7
        )
    np.testing.assert_array_equal(apart.nodes, together.nodes)


def test_how_many_logits_are_made_at_once():
    assert logits_at_once(LARGE, 1000) == LOGIT_BYTES // ROW == 256
    assert logits_at_once(LARGE, 1000, each=100) == 2
    assert logits_at_once(LARGE, 1000, each=1000) == 1
    assert logits_at_once(tiny_config(), 1000) == 1000
    assert trials_at_once(LARGE, 8) == TRIALS
    assert trials_at_once(LARGE, 32) == 8


def test_trials_stay_within_theirs():
    prompts, shape = 32, (64, 32, 4)

    def run(params, tokens, targets, lengths, change):
        pre = prefill(params, tokens, targets, config=LARGE, lengths=lengths)
        return scaled_answers(params, last_position(pre), change, config=LARGE)

    change = Changes(ids(*shape), ids(*shape), jax.ShapeDtypeStruct(shape, jnp.float32))
    needed = temporaries(run, ids(prompts, 16), ids(prompts, 1), ids(prompts), change)
    assert needed < 3 * LOGIT_BYTES


def test_likelihood_stays_within_its_own(monkeypatch):
    needed = temporaries(functools.partial(sentence_loss, config=LARGE), ids(16, 96), ids(16))
    assert needed < 3 * LOGIT_BYTES
    config = tiny_config()
    params, tokens = tiny_params(config), random_tokens(config, (3, 9), 1)

    def losses():
        run = functools.partial(sentence_loss, config=config)
        return compiled(run)(params, tokens, jnp.array([9, 4, 2]))

    whole = losses()
    jax.clear_caches()
    monkeypatch.setattr("jaxneurons.engine.logits.LOGIT_BYTES", 2 * 3 * 4 * config.vocab_size)
    np.testing.assert_allclose(losses(), whole, rtol=1e-6)


def scored(config, edits, rows, answers, length=12):
    """Made-up questions under rank-one edits of a layer, and their edits."""
    rng = np.random.default_rng(0)
    changes = [
        LowRank(
            "ffn.down",
            1,
            jnp.asarray(rng.normal(size=(config.intermediate_size, 1)), jnp.float32),
            jnp.asarray(rng.normal(size=(1, config.hidden_size)), jnp.float32),
        )
        for _ in range(edits)
    ]
    change = jax.tree.map(lambda *leaves: jnp.stack(leaves), *changes)
    starts = rng.integers(1, length - answers, (edits, rows))
    ids = rng.integers(0, config.vocab_size, (edits, rows, length))
    wanted = rng.integers(-1, config.vocab_size, (edits, rows, answers))
    arrays = (ids, starts + answers, starts, wanted)
    return (change,), *(jnp.asarray(values, jnp.int32) for values in arrays)


def test_answers_under_edits_stay_within_theirs(monkeypatch):
    """All rows' logits at once would be 12 times the budget."""
    edits, *rows = scored(LARGE, 8, 32, 12, length=16)
    run = functools.partial(score_answers, config=LARGE)
    needed = temporaries(run, edits, *rows)
    kept = 8 * 32 * ROW  # of the next token, which are results
    assert 8 * 32 * 12 * ROW == 12 * LOGIT_BYTES
    assert needed < kept + 4 * LOGIT_BYTES
    config = tiny_config(num_layers=2)
    params, (edits, *rows) = tiny_params(config), scored(config, 2, 5, 3)
    whole = score_answers(params, edits, *rows, config=config)
    jax.clear_caches()
    monkeypatch.setattr(
        "jaxneurons.engine.logits.LOGIT_BYTES", 2 * 2 * 3 * 4 * config.vocab_size
    )  # two rows of five
    some = score_answers(params, edits, *rows, config=config)
    for a, b in zip(some, whole, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)
