"""Attribution, ablation and responses of mixtures of experts against the dense oracle."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.models import compiled, random_tokens, tiny_config, tiny_params

from jaxneurons import NeuronSet, Quadrature, integrated_gradients
from jaxneurons.engine import mean_responses, prefill
from jaxneurons.engine.last_position import changes, last_position, scaled_answers
from jaxneurons.engine.quadrature import nodes_and_weights
from jaxneurons.engine.readout import written_directions
from jaxneurons.engine.rows import rows_in_budget

pytest.importorskip("torch")
pytest.importorskip("transformers")

from support.experts import dense_forward

CONFIG = tiny_config(experts=4, experts_per_token=2, intermediate_size=12, tied=True)
WIDTH = CONFIG.experts * CONFIG.intermediate_size
PARAMS = tiny_params(CONFIG)
TOKENS, LENGTHS, TARGETS = random_tokens(CONFIG, (3, 6)), jnp.array([6, 4, 1]), jnp.array([5, 9, 2])
SITES = ("up", "act", "down")


def scaled_at_last(layer, site, alpha):
    """For `dense_forward`: one site of one layer, at the last position."""

    def scale(name, number, values):
        if (name, number) != (site, layer):
            return values
        return values.at[-1].multiply(alpha)

    return scale


@functools.cache
def path(site, length, layer):
    """dP/dscale, P and the router's choices at each alpha, of a prompt of this length."""

    def probability(ids, target, alpha):
        scale = scaled_at_last(layer, site, alpha)
        logits, seen = dense_forward(PARAMS, np.arange(length) * 0 + ids, CONFIG, scale)
        return jax.nn.softmax(logits[-1])[target], seen["router"][:, -1] > 0

    def at(ids, target, alpha):
        width = WIDTH if site != "down" else CONFIG.hidden_size
        vector = jnp.full(width, alpha)
        (p, chosen), gradient = jax.value_and_grad(probability, 2, has_aux=True)(
            ids, target, vector
        )
        return gradient, p, chosen

    return compiled(jax.vmap(at, (None, None, 0)))


def oracle(site, nodes, weights):
    """Scores, P(0), P(1), and whether routing is the same along the path, [prompt, layer]."""
    alphas = jnp.concatenate([jnp.array([0.0, 1.0]), jnp.asarray(nodes, jnp.float32)])
    weights = np.concatenate([[0, 0], weights])
    rows = []
    for ids, length, target in zip(TOKENS, LENGTHS.tolist(), TARGETS, strict=True):
        for layer in range(CONFIG.num_layers):
            gradient, p, chosen = path(site, length, layer)(ids[:length], target, alphas)
            scores = np.einsum("aw,a->w", np.asarray(gradient, float), weights)
            rows.append((scores, p[0], p[1], (chosen == chosen[:1]).all()))
    shape = (len(TOKENS), CONFIG.num_layers)
    return tuple(
        np.array(column).reshape(*shape, *np.shape(column[0])) for column in zip(*rows, strict=True)
    )


@pytest.mark.parametrize("site", SITES)
def test_attribution_equals_the_dense_model(site):
    quadrature = Quadrature("gauss", steps=8)
    run = functools.partial(integrated_gradients, config=CONFIG, site=site, lengths=LENGTHS)
    found = compiled(functools.partial(run, quadrature=quadrature))(PARAMS, TOKENS, TARGETS)
    scores, ablated, untouched, _ = oracle(site, *nodes_and_weights("gauss", 8))
    norm = np.linalg.norm(scores, axis=-1)
    assert (np.linalg.norm(found.scores - scores, axis=-1) < 1e-4 * norm).all()
    np.testing.assert_allclose(found.ablated, ablated, rtol=1e-4, atol=1e-7)
    np.testing.assert_allclose(found.probability, untouched[:, 0], rtol=1e-4)
    if site != "down":  # neurons of experts that the last token does not run
        shown = (np.asarray(found.scores) != 0).reshape(3, CONFIG.num_layers, CONFIG.experts, -1)
        assert (shown.any(-1).sum(-1) == CONFIG.experts_per_token).all()


def test_scores_add_up_where_routing_does_not_change_on_the_way():
    found = compiled(functools.partial(integrated_gradients, config=CONFIG, lengths=LENGTHS))(
        PARAMS, TOKENS, TARGETS
    )
    *_, same = oracle("up", np.linspace(0, 1, 65)[1:-1], np.zeros(63))
    assert same.sum() >= 4
    assert same[:, -1].all()  # nothing is routed above the last layer
    gap = np.asarray(found.gap)
    assert np.median(gap[same]) < 1e-5
    assert gap[same].max() < 1e-3


def test_scaled_answers_and_responses_equal_the_dense_model():
    neurons = NeuronSet.of(up=[(layer, i) for layer in range(3) for i in range(0, WIDTH, 3)])
    scales = neurons.scales(CONFIG, 0.0)["up"]
    pre = prefill(PARAMS, TOKENS, TARGETS[:, None], config=CONFIG, lengths=LENGTHS)
    trials = changes([[(NeuronSet(), 0.0)] * 3, [(neurons, 0.0)] * 3], site="up")
    answers = scaled_answers(PARAMS, last_position(pre), trials, config=CONFIG)
    means = mean_responses(PARAMS, TOKENS, config=CONFIG, lengths=LENGTHS, sites=("up", "act"))
    for row, (ids, length) in enumerate(zip(TOKENS, LENGTHS.tolist(), strict=True)):

        def off(name, layer, values):
            return values.at[-1].multiply(scales[layer]) if name == "up" else values

        plain, seen = dense_forward(PARAMS, ids[:length], CONFIG)
        ablated, _ = dense_forward(PARAMS, ids[:length], CONFIG, off)
        wanted = [jax.nn.softmax(x[-1])[TARGETS[row]] for x in (plain, ablated)]
        np.testing.assert_allclose(answers.probability[:, row], wanted, rtol=1e-4)
        for site in ("up", "act"):
            np.testing.assert_allclose(
                means[site][:, row], seen[site].mean(1), rtol=1e-4, atol=1e-5
            )


def test_what_a_neuron_of_an_expert_writes():
    found = written_directions(PARAMS, NeuronSet.of(act=[(1, 2 * 12 + 5)]), config=CONFIG)
    kernel = PARAMS["layers"]["ffn"]["down"]["kernel"]
    np.testing.assert_array_equal(found, kernel[1, 2, 5][None])


def test_rows_in_a_budget_count_chosen_experts():
    few, many = (
        rows_in_budget(tiny_config(experts=n, experts_per_token=2, vocab_size=8), 10, 1 << 20)
        for n in (2, 64)
    )
    dense = rows_in_budget(tiny_config(vocab_size=8), 10, 1 << 20)
    assert dense > few > many > few / 8
