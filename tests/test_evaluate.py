"""Suppressing and boosting against a full forward pass; random controls."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from models import random_tokens, tiny_config, tiny_params

from jaxneurons import forward
from jaxneurons.attribution import prefill
from jaxneurons.errors import DataError
from jaxneurons.evaluate import scale_array, scaled_answers
from jaxneurons.neurons import Neuron, matched_random, site_width

CONFIG = tiny_config()
LENGTHS = np.array([9, 4], np.int32)


@pytest.fixture(scope="module")
def model():
    params = tiny_params(CONFIG)
    tokens = np.array(random_tokens(CONFIG, (2, 9)))
    tokens[1, 4:] = 0
    targets = jnp.array([[5], [11]])
    pre = jax.jit(prefill, static_argnames="config")(
        params, tokens, targets, config=CONFIG, lengths=LENGTHS
    )
    return params, tokens, pre


def answers(model, scales, site="up"):
    params, _, pre = model
    return jax.device_get(
        scaled_answers(params, pre, jnp.asarray(scales), config=CONFIG, site=site)[:2]
    )


@pytest.mark.parametrize("site", ["up", "gate", "down", "q"])
def test_as_a_full_forward_with_the_last_position_scaled(model, site):
    """One prompt at a time, not padded, nothing cached."""
    params, tokens, pre = model
    width = site_width(CONFIG, site)
    rng = np.random.default_rng(0)
    scales = rng.choice([0.0, 1.0, 2.0], size=(3, 2, CONFIG.num_layers, width)).astype(np.float32)
    p, first = answers(model, scales, site)
    changed = 0
    for trial in range(3):
        for row, length in enumerate(LENGTHS):
            full = np.ones((CONFIG.num_layers, 1, length, width), np.float32)
            full[:, 0, -1] = scales[trial, row]
            out = forward(
                params,
                jnp.asarray(tokens[row : row + 1, :length]),
                config=CONFIG,
                scales={site: jnp.asarray(full)},
            )
            logits = np.asarray(out.logits[0, -1], np.float64)
            want = np.exp(logits - logits.max())
            want /= want.sum()
            target = int(pre.targets[row, 0])
            np.testing.assert_allclose(p[trial, row], want[target], rtol=1e-4, atol=1e-7)
            assert first[trial, row] == (want.argmax() == target)
            changed += abs(want[target] - float(pre.probability[row, 0])) > 1e-4
    assert changed  # the scales do matter


def test_factor_one_changes_nothing(model):
    p, first = answers(model, np.ones((1, 2, CONFIG.num_layers, 40), np.float32))
    _, _, pre = model
    np.testing.assert_allclose(p[0], pre.probability[:, 0], rtol=1e-5)
    np.testing.assert_array_equal(first[0], pre.logits[:, 0].argmax(-1) == pre.targets[:, 0])


def test_scale_array():
    neurons = [Neuron(0, 1), Neuron(2, 3)]
    scales = scale_array(neurons, 0.0, num_layers=3, width=5)
    assert (scales.shape, scales.dtype, scales.sum()) == ((3, 5), np.float32, 13)
    assert scales[0, 1] == scales[2, 3] == 0
    assert (scale_array([], 0.0, num_layers=2, width=2) == 1).all()
    assert scale_array(neurons, 2.0, num_layers=3, width=5).sum() == 17


NEURONS = st.sets(st.builds(Neuron, st.integers(0, 3), st.integers(0, 19)), max_size=30)


@given(NEURONS, st.integers(0, 99))
def test_controls_match(neurons, seed):
    own = sorted(neurons)
    counts = np.bincount([n.layer for n in own] or [0], minlength=4) * bool(own)
    if counts.max() > 10:
        with pytest.raises(DataError, match=r"layer \d: \d+ of 20 neurons leave no control set"):
            matched_random(own, width=20, rng=np.random.default_rng(seed))
        return
    drawn = matched_random(own, width=20, rng=np.random.default_rng(seed))
    assert len(drawn) == len(set(drawn)) == len(own)
    assert not set(drawn) & neurons
    assert [n.layer for n in drawn] == [n.layer for n in own]
    assert all(0 <= n.index < 20 for n in drawn)
    assert drawn == matched_random(own[::-1], width=20, rng=np.random.default_rng(seed))


def test_controls_are_random():
    own = [Neuron(1, n) for n in range(3)]
    rng = np.random.default_rng(0)
    drawn = [n.index for _ in range(2000) for n in matched_random(own, width=13, rng=rng)]
    counts = np.bincount(drawn, minlength=13)
    assert (counts[:3] == 0).all()
    assert counts[3:].min() > 500  # 600 expected, standard deviation 20
    assert counts[3:].max() < 700
