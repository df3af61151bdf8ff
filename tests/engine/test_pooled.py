"""Panels of a whole batch from one pool: the values of panels evaluated by themselves."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.models import compiled, random_tokens, tiny_config, tiny_params

from jaxneurons.engine import pooled
from jaxneurons.engine.rows import evaluate, prefill

CONFIG = tiny_config(num_layers=4, sliding_window=3, sliding_layers=(True, False, True, False))
LENGTHS = jnp.array([7, 4, 2])
CAPACITY, NODES = 5, 3


def prompts(batch, answers):
    params = tiny_params(CONFIG)
    tokens, targets = random_tokens(CONFIG, (batch, 7)), random_tokens(CONFIG, (batch, answers), 1)
    run = compiled(lambda *args: prefill(*args[:3], config=CONFIG, lengths=args[3]))
    return params, run(params, tokens, targets, LENGTHS[:batch])


@pytest.mark.parametrize(
    ("batch", "answers"), [(3, 1), pytest.param(2, 2, marks=pytest.mark.slow), (1, 2)]
)
def test_equal_to_each_panel_by_itself(batch, answers, monkeypatch):
    params, pre = prompts(batch, answers)
    rng = np.random.default_rng(0)
    shape = (batch, answers, CAPACITY)
    layer = jnp.asarray(rng.integers(0, CONFIG.num_layers, shape))
    alpha = jnp.asarray(rng.uniform(size=(*shape, NODES)), jnp.float32)
    valid = np.asarray(rng.uniform(size=shape) < 0.6)
    valid[0] = True  # a prompt of which everything waits
    options = {"config": CONFIG, "site": "up"}
    monkeypatch.setattr(pooled, "FEWEST", 2)
    monkeypatch.setattr(pooled, "MOST", 3)  # several passes
    p, gradient = compiled(lambda *args: pooled.evaluate_pooled(*args, **options, rows=1000))(
        params, pre, layer, alpha, jnp.asarray(valid)
    )

    alone = compiled(lambda *args: evaluate(*args, **options))
    flat = jnp.repeat(layer, NODES, axis=-1), alpha.reshape(*shape[:2], -1)
    one_p, one_gradient = alone(params, pre, *flat)
    one_gradient = np.asarray(one_gradient).reshape(*shape, NODES, -1)
    np.testing.assert_allclose(p[valid], np.asarray(one_p).reshape(p.shape)[valid], rtol=1e-5)
    scale = np.abs(one_gradient).max()
    np.testing.assert_allclose(gradient[valid], one_gradient[valid], atol=1e-5 * scale)
    assert (np.asarray(p)[~valid] == 0).all()


def test_passes_start_where_their_lowest_panel_does(monkeypatch):
    """Sorted by layer: the panels of the upper layers do not run the lower ones."""
    params, pre = prompts(3, 1)
    started = []
    original = pooled.evaluate

    def recorded(*args, entries, **options):
        jax.debug.callback(started.append, jnp.int32(entries[0][0]))
        return original(*args, entries=entries, **options)

    monkeypatch.setattr(pooled, "evaluate", recorded)
    monkeypatch.setattr(pooled, "STARTS", (0.0, 0.5))
    monkeypatch.setattr(pooled, "FEWEST", 2)
    monkeypatch.setattr(pooled, "MOST", 2)
    layer = jnp.array([3, 0, 2, 0, 0, 1])[:, None].repeat(2, 1).reshape(3, 1, 4)
    valid = jnp.ones((3, 1, 4), bool).at[2].set(False)  # of the last prompt nothing waits
    alpha = jnp.zeros((3, 1, 4, NODES))
    options = {"config": CONFIG, "site": "up", "rows": 1000}
    jax.block_until_ready(
        compiled(lambda *args: pooled.evaluate_pooled(*args, **options))(
            params, pre, layer, alpha, valid
        )
    )
    jax.effects_barrier()
    assert [int(first) for first in started] == [0, 0, 2, 2]
