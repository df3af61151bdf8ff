"""Average precision against scikit-learn; generation against a loop without a cache."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import average_precision_score
from support.models import compiled, random_tokens, tiny_config, tiny_params

from jaxneurons import RopeConfig, forward
from jaxneurons.engine.experts import (
    Examples,
    average_precision,
    expertise,
    resolve_k,
    separation,
    top_neurons,
)
from jaxneurons.errors import DataError
from jaxneurons.model.generation import greedy
from jaxneurons.neurons.sets import neuron_count, site_width


def oracle(positives, negatives):
    labels = np.r_[np.ones(len(positives)), np.zeros(len(negatives))]
    scores = np.concatenate([positives, negatives])
    return [average_precision_score(labels, column) for column in scores.T]


@pytest.mark.parametrize("chunk", [None, 7, 64])
@pytest.mark.parametrize("levels", [None, 1, 2, 5])
def test_equals_scikit_learn(chunk, levels):
    rng = np.random.default_rng(0)
    positives = rng.standard_normal((30, 60)).astype(np.float32) + 0.5
    negatives = rng.standard_normal((120, 60)).astype(np.float32)
    if levels:  # many ties; one level: constant responses
        positives, negatives = (np.floor(x * 0 + x % levels) for x in (positives, negatives))
    found = average_precision(jnp.asarray(positives), jnp.asarray(negatives), chunk=chunk)
    np.testing.assert_allclose(found, oracle(positives, negatives), atol=1e-6)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**31), st.integers(1, 4))
def test_properties(seed, levels):
    rng = np.random.default_rng(seed)
    shapes = ((5, 3), (9, 3))  # always the same, so that one program is compiled
    found, others = (rng.integers(0, levels, s).astype(np.float32) for s in shapes)
    ap = np.asarray(average_precision(jnp.asarray(found), jnp.asarray(others)))
    np.testing.assert_allclose(ap, oracle(found, others), atol=1e-6)
    assert ((ap > 0) & (ap <= 1)).all()
    # Only the order counts.
    again = average_precision(jnp.asarray(2 * found - 7), jnp.asarray(2 * others - 7))
    np.testing.assert_array_equal(ap, again)


def test_the_best_and_the_worst():
    found, others = jnp.ones((3, 1)), jnp.zeros((5, 1))
    assert float(average_precision(found, others)[0]) == 1.0
    assert float(average_precision(others, found)[0]) == pytest.approx(
        np.mean([5 / 8] * 5)
    )  # all positives below all negatives, one threshold
    constant = average_precision(jnp.zeros((3, 1)), jnp.zeros((5, 1)))
    assert float(constant[0]) == pytest.approx(3 / 8)


def test_top_neurons_break_ties_by_index():
    assert top_neurons(np.array([0.1, 0.9, 0.5, 0.9]), 3).tolist() == [1, 3, 2]


# --- generation -----------------------------------------------------------------------------------

CONFIGS = {
    "plain": tiny_config(),
    "window": tiny_config(sliding_window=4),
    "dynamic": tiny_config(
        rope=RopeConfig(rope_type="dynamic", factor=2.0, original_max_position=64)
    ),
}


def slow_greedy(params, prompt, config, steps, scales):
    ids = list(prompt)
    run = compiled(functools.partial(forward, config=config))
    for _ in range(steps):
        padded = jnp.asarray([ids + [0] * (12 - len(ids))], jnp.int32)
        everywhere = {site: values[:, None, None] for site, values in scales.items()}
        out = run(params, padded, lengths=jnp.array([len(ids)]), scales=everywhere)
        ids.append(int(out.logits[0, 0].argmax()))
    return ids[len(prompt) :]


@pytest.mark.parametrize("kind", CONFIGS)
def test_greedy_is_the_loop_without_a_cache(kind):
    config = CONFIGS[kind]
    params, tokens = tiny_params(config), random_tokens(config, (3, 7))
    lengths = jnp.array([7, 4, 1])
    rng = np.random.default_rng(0)
    masks = jnp.asarray(rng.random((2, config.num_layers, config.intermediate_size)) < 0.7)
    masks = masks.astype(jnp.float32)

    def generate(up):
        return greedy(params, tokens, config=config, lengths=lengths, steps=4, scales={"up": up})

    found = compiled(jax.vmap(generate))(masks)
    assert found.shape == (2, 3, 4)
    for mask, own in zip(masks, found, strict=True):
        for prompt, length, got in zip(tokens, lengths, own, strict=True):
            expected = slow_greedy(params, prompt[:length].tolist(), config, 4, {"up": mask})
            assert got.tolist() == expected
    assert not (found[0] == found[1]).all()


def test_greedy_of_one_step_and_of_an_untouched_model():
    config = CONFIGS["plain"]
    params, tokens = tiny_params(config), random_tokens(config, (3, 7))
    lengths = jnp.array([7, 4, 1])
    run = functools.partial(greedy, params, tokens, config=config, lengths=lengths)
    four, one = compiled(lambda: run(steps=4))(), compiled(lambda: run(steps=1))()
    np.testing.assert_array_equal(four[:, :1], one)
    out = forward(params, tokens, config=config, lengths=lengths)
    np.testing.assert_array_equal(one[:, 0], out.logits[:, 0].argmax(-1))


# --- layer by layer -------------------------------------------------------------------------------

CONFIG = tiny_config()
SITES = ("up", "down")


@pytest.fixture(scope="module")
def responses():
    rng = np.random.default_rng(0)
    found = {
        site: rng.standard_normal((40, CONFIG.num_layers, site_width(CONFIG, site)))
        for site in SITES
    }
    found["up"][:, 1, 3] = 0.5  # constant
    found["up"][:, 2] = np.round(found["up"][:, 2])  # ties
    return {site: values.astype(np.float32) for site, values in found.items()}


EXAMPLES = {
    "a": Examples(np.arange(10), np.arange(15, 40)),
    "b": Examples(np.array([3, 20, 21]), np.array([0, 1, 2, 30])),
}


def test_every_neuron_of_every_layer(responses):
    """Against scikit-learn for every neuron, ties and constants included; never a second layer."""
    told = []
    found = expertise(
        lambda site, layer: responses[site][:, layer],
        EXAMPLES,
        config=CONFIG,
        sites=SITES,
        progress=lambda done, total: told.append((done, total)),
    )
    steps = len(SITES) * CONFIG.num_layers
    assert told == [(step, steps) for step in range(1, steps + 1)]
    for name, (positives, negatives) in EXAMPLES.items():
        for site, values in responses.items():
            for layer in range(CONFIG.num_layers):
                wanted = oracle(values[positives, layer], values[negatives, layer])
                np.testing.assert_allclose(found[name].scores[site][layer], wanted, atol=1e-6)
            np.testing.assert_array_equal(
                found[name].medians[site], np.median(values[positives], axis=0)
            )
            a, b = values[positives].astype(float), values[negatives].astype(float)
            spread = np.sqrt((a.std(0) ** 2 + b.std(0) ** 2) / 2)
            wanted = np.divide(a.mean(0) - b.mean(0), spread, out=spread * 0, where=spread > 0)
            np.testing.assert_allclose(found[name].separations[site], wanted, rtol=1e-4, atol=1e-5)


def test_the_best_neurons_of_some_sites(responses):
    found = expertise(
        lambda site, layer: responses[site][:, layer], EXAMPLES, config=CONFIG, sites=SITES
    )["a"]
    listed = sorted(
        (-score[0], -score[1], number, site, layer, index)
        for number, (score, site, layer, index) in enumerate(
            (
                (
                    float(found.scores[site][layer, index]),
                    float(found.separations[site][layer, index]),
                ),
                site,
                layer,
                index,
            )
            for site in SITES
            for layer in range(CONFIG.num_layers)
            for index in range(site_width(CONFIG, site))
        )
    )
    for k in (1, 7, 100):
        wanted = {(site, layer, index) for *_, site, layer, index in listed[:k]}
        assert {(site, *neuron) for site, neuron in found.top(SITES, k, CONFIG)} == wanted
    assert found.top(("down",), 5, CONFIG).codes.keys() == {"down"}
    for k in (0, 10**6):
        with pytest.raises(DataError, match=f"{k} neurons asked for, the sites up, down have"):
            found.top(SITES, k, CONFIG)


def test_equal_scores_are_told_apart_by_separation():
    """Not by index: the first layers would win by being first."""
    rng = np.random.default_rng(0)
    positives = rng.normal(0, 0.1, (5, 4)).astype(np.float32)
    positives += np.array([1.0, 9.0, 3.0, 1.0], np.float32)
    negatives = rng.normal(0, 0.1, (20, 4)).astype(np.float32)
    scores = np.asarray(average_precision(jnp.asarray(positives), jnp.asarray(negatives)))
    np.testing.assert_array_equal(scores, 1)
    ties = separation(positives, negatives)
    assert top_neurons(scores, 2, ties).tolist() == [1, 2]
    assert top_neurons(np.array([0.5, 1.0, 0.5]), 3, np.array([1.0, 0, 2.0])).tolist() == [1, 2, 0]
    assert top_neurons(np.array([0.5, 1.0, 0.5]), 3).tolist() == [1, 0, 2]


def test_nothing_to_tell_apart(responses):
    for examples in (Examples(np.arange(0), np.arange(3)), Examples(np.arange(3), np.arange(0))):
        with pytest.raises(DataError, match="'x': average precision needs"):
            expertise(
                lambda site, layer: responses[site][:, layer],
                {"x": examples},
                config=CONFIG,
                sites=SITES,
            )


def test_numbers_of_neurons():
    count = neuron_count(CONFIG, SITES)
    assert resolve_k(7, CONFIG, SITES) == 7
    assert resolve_k(0.5, CONFIG, SITES) == round(count / 2)
    assert resolve_k(count, CONFIG, SITES) == count
    for k in (0, -3, count + 1, 1e-9, 1.5):
        with pytest.raises(DataError, match=f"give a number from 1 to {count}"):
            resolve_k(k, CONFIG, SITES)
