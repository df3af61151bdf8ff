"""Losses of sentences against a loop over their tokens, and with neurons changed."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import logsumexp
from support.models import compiled, random_tokens, tiny_config, tiny_params

from jaxneurons import forward
from jaxneurons.engine.likelihood import sentence_loss, token_loss
from jaxneurons.neurons import NeuronSet

CONFIG = tiny_config(num_layers=2)
PARAMS = tiny_params(CONFIG)
TOKENS = random_tokens(CONFIG, (3, 9))
LENGTHS = jnp.array([9, 4, 1])
NEURONS = NeuronSet.of(up=[(0, 3), (1, 7)], down=[(1, 0)])


def loss_of(scales=None, params=PARAMS):
    return np.asarray(sentence_loss(params, TOKENS, LENGTHS, config=CONFIG, scales=scales))


def test_a_loop_over_the_tokens_of_each_sentence_alone():
    """In NumPy, without padding; a sentence of one token has nothing to be told."""
    run = compiled(lambda ids: forward(PARAMS, ids, config=CONFIG, at="all").logits[0])
    for row, length in enumerate(LENGTHS.tolist()):
        ids = np.asarray(TOKENS[row, :length])
        logits = np.asarray(run(ids[None]), np.float64)
        expected = sum(logsumexp(logits[i]) - logits[i, ids[i + 1]] for i in range(length - 1))
        assert loss_of()[row] == pytest.approx(expected, rel=1e-5)
    assert loss_of()[2] == 0


def test_multipliers_are_as_neuron_sets_give_them():
    """A neuron of `up` or `down` turned off is a column of its matrix that is zero."""
    edited = jax.tree.map(np.array, PARAMS)
    for site, (layer, index) in NEURONS:
        edited["layers"]["ffn"][site]["kernel"][layer, :, index] = 0
    off = loss_of(NEURONS.scales(CONFIG))
    np.testing.assert_allclose(off, loss_of(params=edited), rtol=1e-6)
    assert (np.abs(off - loss_of())[:2] > 1e-3).all()
    np.testing.assert_array_equal(loss_of(NEURONS.scales(CONFIG, 1.0)), loss_of())


def test_within_a_callers_vmap_and_grad():
    factors = jnp.array([0.0, 0.5, 1.0])
    masks = {site: jnp.asarray(values) for site, values in NEURONS.scales(CONFIG).items()}

    def total(factor):
        scales = {site: mask + (1 - mask) * factor for site, mask in masks.items()}
        return sentence_loss(PARAMS, TOKENS, LENGTHS, config=CONFIG, scales=scales).sum()

    together = jax.vmap(total)(factors)
    alone = [loss_of(NEURONS.scales(CONFIG, float(factor))).sum() for factor in factors]
    np.testing.assert_allclose(together, alone, rtol=1e-5)
    slope = (total(0.5 + 1e-2) - total(0.5 - 1e-2)) / 2e-2
    assert float(jax.grad(total)(0.5)) == pytest.approx(float(slope), rel=2e-2)


def test_a_token_of_uniform_logits():
    losses = token_loss(jnp.zeros((2, 3, 8)), jnp.zeros((2, 3), jnp.int32))
    np.testing.assert_allclose(losses, np.log(8), rtol=1e-6)
