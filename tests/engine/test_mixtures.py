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
from jaxneurons.engine.row_memory import rows_in_budget

pytest.importorskip("torch")
pytest.importorskip("transformers")

from support.experts import dense_forward

pytestmark = pytest.mark.slow

CONFIG = tiny_config(experts=4, experts_per_token=2, intermediate_size=12, tied=True)
WIDTH = CONFIG.experts * CONFIG.intermediate_size
PARAMS = tiny_params(CONFIG)
TOKENS, LENGTHS, TARGETS = random_tokens(CONFIG, (3, 6)), jnp.array([6, 4, 1]), jnp.array([5, 9, 2])
SITES = ("up", "act", "down")


@functools.cache
def path(site):
    """dP/dscale, P and the router's choices at each alpha, of a prompt with one layer scaled."""

    def probability(vector, ids, last, target, layer):
        def scale(name, number, values):
            if name != site:
                return values
            return values.at[last].multiply(jnp.where(number == layer, vector, 1))

        logits, seen = dense_forward(PARAMS, ids, CONFIG, scale)
        return jax.nn.softmax(logits[last])[target], seen["router"][:, last] > 0

    def at(alpha, *prompt):
        vector = jnp.full(CONFIG.hidden_size if site == "down" else WIDTH, alpha)
        (p, chosen), gradient = jax.value_and_grad(probability, has_aux=True)(vector, *prompt)
        return gradient, p, chosen

    return compiled(lambda alphas, *prompt: jax.lax.map(lambda a: at(a, *prompt), alphas))


def oracle(site, nodes, weights):
    """Scores, P(0), P(1), and whether routing is the same along the path, [prompt, layer]."""
    alphas = jnp.concatenate([jnp.array([0.0, 1.0]), jnp.asarray(nodes, jnp.float32)])
    weights = np.concatenate([[0, 0], weights])
    rows = []
    for ids, length, target in zip(TOKENS, LENGTHS, TARGETS, strict=True):
        for layer in range(CONFIG.num_layers):
            gradient, p, chosen = path(site)(alphas, ids, length - 1, target, layer)
            scores = np.einsum("aw,a->w", np.asarray(gradient, float), weights)
            rows.append((scores, p[0], p[1], bool((chosen == chosen[:1]).all())))
    shape = (len(TOKENS), CONFIG.num_layers)
    columns = (np.array(column) for column in zip(*rows, strict=True))
    return tuple(column.reshape(*shape, *column.shape[1:]) for column in columns)


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
    means = mean_responses(PARAMS, TOKENS, LENGTHS, config=CONFIG, sites=("up", "act"))

    @compiled
    def theirs(ids, last, off):
        def scale(name, layer, values):
            return values.at[last].multiply(off[layer]) if name == "up" else values

        logits, seen = dense_forward(PARAMS, ids, CONFIG, scale)
        return jax.nn.softmax(logits[last]), seen

    for row, (ids, length) in enumerate(zip(TOKENS, LENGTHS.tolist(), strict=True)):
        ones = np.ones_like(scales)
        (plain, seen), (ablated, _) = (theirs(ids, length - 1, off) for off in (ones, scales))
        wanted = [p[TARGETS[row]] for p in (plain, ablated)]
        np.testing.assert_allclose(answers.probability[:, row], wanted, rtol=1e-4)
        for site in ("up", "act"):
            mean = seen[site][:, :length].mean(1)
            np.testing.assert_allclose(means[site][:, row], mean, rtol=1e-4, atol=1e-5)


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
