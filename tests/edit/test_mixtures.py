"""Edits of neurons of experts: equal to their multipliers, and put back; what is refused."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.models import compiled, random_tokens, tiny_config, tiny_params

from jaxneurons import ConfigError, DataError, NeuronSet, forward
from jaxneurons import edit as ed
from jaxneurons.edit.changes import LowRank, Rows, apply, check_changes, multipliers
from jaxneurons.edit.entries import put, regions, take
from jaxneurons.edit.layered import layers_of
from jaxneurons.edit.method import MEMIT, ROME, FineTune
from jaxneurons.edit.teacher_forcing import Additions, run_layers
from jaxneurons.model import layers

pytestmark = pytest.mark.slow

CONFIG = tiny_config(experts=4, experts_per_token=2, intermediate_size=12)
WIDTH = CONFIG.neurons_per_layer
PARAMS, TOKENS = tiny_params(CONFIG), random_tokens(CONFIG, (2, 7))
KERNELS = PARAMS["layers"]["ffn"]
NEURONS = {
    site: NeuronSet.of(**{site: [(0, 3), (1, 12), (1, 47), (2, 30)]})
    for site in ("up", "gate", "act")
} | {"down": NeuronSet.of(down=[(0, 3), (2, 31)])}


@functools.cache
def logits_of():
    return compiled(
        lambda params, scales: (
            forward(params, TOKENS, config=CONFIG, at="all", scales=scales).logits
        )
    )


def close(a, b, tolerance=1e-6):
    a, b = np.asarray(a), np.asarray(b)
    assert np.abs(a - b).max() <= tolerance * np.abs(b).max()


@pytest.mark.parametrize("site", NEURONS)
def test_an_edit_of_a_site_equals_its_multiplier(site):
    neurons = NEURONS[site]
    edited = ed.scale(PARAMS, neurons, 0.3, config=CONFIG)
    ones = {name: np.ones((3, WIDTH if name != "down" else 32), np.float32) for name in NEURONS}
    plain = logits_of()(PARAMS, ones)
    scaled = logits_of()(PARAMS, {**ones, **neurons.scales(CONFIG, 0.3)})
    close(logits_of()(edited, ones), scaled)
    assert np.abs(np.asarray(scaled - plain)).max() > 1e-3
    changed = multipliers(neurons, 0.3, config=CONFIG)
    jax.tree.map(np.testing.assert_array_equal, apply(PARAMS, changed, config=CONFIG), edited)
    kept = take(PARAMS, regions(changed, CONFIG), CONFIG)
    jax.tree.map(np.testing.assert_array_equal, put(edited, kept), PARAMS)
    back = ed.restore(edited, PARAMS, neurons, config=CONFIG)
    jax.tree.map(np.testing.assert_array_equal, back, PARAMS)


def test_rows_of_experts_are_set_added_to_and_swapped():
    neurons, (layer, index) = NEURONS["up"], NEURONS["up"].pairs("up").T
    expert, i = index // 12, index % 12
    vectors = np.random.default_rng(0).normal(size=(4, 32)).astype(np.float32)
    before = np.asarray(KERNELS["down"]["kernel"])
    added = ed.add(PARAMS, neurons, vectors, config=CONFIG)["layers"]["ffn"]["down"]["kernel"]
    set_ = ed.set_rows(PARAMS, neurons, vectors, config=CONFIG)
    rows = set_["layers"]["ffn"]["down"]["kernel"]
    np.testing.assert_array_equal(rows[layer, expert, i], vectors)
    close(added[layer, expert, i], before[layer, expert, i] + vectors)
    assert (np.asarray(rows) != before).any(-1).sum() == 4
    one = Rows("ffn.down", 1, np.array([12, 47], np.int32), vectors[1:3])
    made = apply(PARAMS, [one], config=CONFIG)["layers"]["ffn"]["down"]["kernel"]
    np.testing.assert_array_equal(made[1, [1, 3], [0, 11]], vectors[1:3])
    back = ed.restore(set_, PARAMS, neurons, config=CONFIG)
    jax.tree.map(np.testing.assert_array_equal, back, PARAMS)
    for site in ("up", "act"):
        swapped = ed.swap(PARAMS, site, (1, 3), (1, 40), config=CONFIG)
        kernel = swapped["layers"]["ffn"]["up" if site == "up" else "down"]["kernel"]
        old = KERNELS["up" if site == "up" else "down"]["kernel"]
        place = (1, 0, slice(None), 3) if site == "up" else (1, 0, 3)
        partner = (1, 3, slice(None), 4) if site == "up" else (1, 3, 4)
        np.testing.assert_array_equal(kernel[place], old[partner])
        np.testing.assert_array_equal(kernel[partner], old[place])


def test_additions_to_rows_equal_the_edit():
    vectors = np.random.default_rng(0).normal(size=(3, 2, 32)).astype(np.float32)
    rows = np.array([[3, 20], [12, 47], [0, 30]], np.int32)
    changes = [
        Rows("ffn.down", layer, at, KERNELS["down"]["kernel"][layer, at // 12, at % 12] + new)
        for layer, (at, new) in enumerate(zip(rows, vectors, strict=True))
    ]
    edited = apply(PARAMS, changes, config=CONFIG)
    x, lengths = layers.embed(PARAMS, TOKENS, CONFIG), jnp.array([7, 7])
    run = compiled(functools.partial(run_layers, config=CONFIG))
    additions = Additions(jnp.asarray(rows), jnp.asarray(vectors))
    close(run(PARAMS, x, lengths, additions=additions), run(edited, x, lengths), 1e-5)


def test_what_is_refused_says_what_to_do():
    nothing = jnp.zeros((WIDTH, 1)), jnp.zeros((1, 32))
    with pytest.raises(DataError, match="change neurons of named experts instead"):
        check_changes([LowRank("ffn.down", 0, *nothing)], config=CONFIG)
    with pytest.raises(DataError, match="change neurons of named experts instead"):
        check_changes([Rows("ffn.up", 0, np.array([1]), jnp.zeros((1, 12)))], config=CONFIG)
    check_changes([Rows("ffn.down", 0, np.array([47]), jnp.zeros((1, 32)))], config=CONFIG)
    with pytest.raises(DataError, match="which has 48"):
        check_changes([Rows("ffn.down", 0, np.array([48]), jnp.zeros((1, 32)))], config=CONFIG)
    with pytest.raises(ConfigError, match="one for each of its 4 experts"):
        layers_of(MEMIT(), CONFIG)
    request = ed.EditRequest(prompt="a b", subject="a", target=" c")
    for settings in (ROME(covariance="identity"), FineTune(), MEMIT()):
        with pytest.raises(ConfigError, match="LearnedNeurons"):
            ed.edit(PARAMS, [request], config=CONFIG, tokenizer=None, settings=settings)
    with pytest.raises(ConfigError, match="projections of experts have none"):
        ed.force(PARAMS, NEURONS["act"], 1.0, config=CONFIG)
    with pytest.raises(ConfigError, match="add no bias"):
        ed.with_biases(PARAMS, ["up"], config=CONFIG)
