"""Random controls: what they share with their neurons; seeds draw what they always drew."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.models import tiny_config

from jaxneurons.errors import ConfigError, DataError
from jaxneurons.neurons.controls import (
    NEAREST,
    activation_matched,
    generator,
    layer_matched,
    layer_matched_at_most,
    layer_matched_sets,
    random_neurons,
    random_positions,
    random_sets,
)
from jaxneurons.neurons.sets import FFN, SITES, Neuron, NeuronSet, Ranking, neuron_count, site_width

CONFIG = tiny_config(num_layers=4, intermediate_size=20)
NEURONS = st.sets(st.tuples(st.integers(0, 3), st.integers(0, 19)), max_size=30)


def counts(neurons):
    return {site: layers.tolist() for site, layers in neurons.layer_counts(4).items()}


@given(NEURONS, st.integers(0, 99))
def test_layer_matched(members, seed):
    neurons = NeuronSet.of(up=members, down=[(1, 0)])
    if max(np.bincount([layer for layer, _ in members] or [0]) * bool(members)) > 10:
        with pytest.raises(DataError, match=r"layer \d: \d+ of 20 neurons leave no control set"):
            layer_matched(neurons, CONFIG, generator(seed))
        return
    drawn = layer_matched(neurons, CONFIG, generator(seed))
    assert not drawn & neurons
    assert counts(drawn) == counts(neurons)
    drawn.check(CONFIG)
    assert drawn == neurons.random_like(CONFIG, np.random.default_rng(seed))


@given(NEURONS)
def test_layer_matched_at_most_takes_all_that_are_left(members):
    neurons = NeuronSet.of(up=members)
    drawn = layer_matched_at_most(neurons, CONFIG, generator(0))
    assert not drawn & neurons
    for layer in range(4):
        own = sum(at == layer for at, _ in members)
        assert (drawn.pairs("up")[:, 0] == layer).sum() == min(own, 20 - own)


def test_layer_matched_draws_evenly():
    neurons, rng = NeuronSet.of(up=[(1, 0), (1, 1), (1, 2)]), generator(0)
    config = tiny_config(intermediate_size=13)
    drawn = [layer_matched(neurons, config, rng).pairs("up")[:, 1] for _ in range(2000)]
    times = np.bincount(np.concatenate(drawn), minlength=13)
    assert (times[:3] == 0).all()
    assert times[3:].min() > 500  # 600 expected, standard deviation 20
    assert times[3:].max() < 700


def test_neurons_of_another_model():
    with pytest.raises(DataError, match="neuron 20 is not in this model, which has 20"):
        layer_matched(NeuronSet.of(up=[(1, 20)]), CONFIG, generator(0))


def test_random_neurons_come_from_everywhere():
    drawn = [random_neurons(CONFIG, FFN, 20, generator(seed)) for seed in range(200)]
    assert {len(neurons) for neurons in drawn} == {20}
    everything = NeuronSet()
    for neurons in drawn:
        everything = everything | neurons
    assert len(everything) == neuron_count(CONFIG, FFN)
    with pytest.raises(DataError, match="81 random neurons cannot be drawn of 80"):
        random_neurons(CONFIG, ("up",), 81, generator(0))


def test_activation_matched_are_others_of_the_layer_about_as_active():
    rng = np.random.default_rng(0)
    active = {"up": np.sort(rng.gamma(1.0, size=(3, 400)), axis=1)}
    neurons = NeuronSet.of(up=[(0, 200), (0, 201), (2, 399)])
    draws = [activation_matched(neurons, active, generator(i)) for i in range(50)]
    for drawn in draws:
        assert drawn.pairs("up")[:, 0].tolist() == [0, 0, 2]
        assert not drawn & neurons
        # Sorted: near in rank is near in value.
        assert all(abs(index - 200) <= 2 * NEAREST for index in drawn.pairs("up")[:2, 1])
        assert drawn.pairs("up")[2, 1] >= 399 - 2 * NEAREST
    assert len(set(draws)) > 25


def test_a_layer_that_is_used_up_gives_fewer():
    neurons = NeuronSet.of(up=[(0, i) for i in range(7)])
    drawn = activation_matched(neurons, {"up": np.ones((1, 10))}, generator(0))
    assert drawn == NeuronSet.of(up=[(0, 7), (0, 8), (0, 9)])


# --- what seeds draw: runs that were made before must find the same controls ----------------------


def test_the_generator_is_numpys_of_the_seed_and_the_purpose():
    cases = [((7,), 7), ((7, 12), [7, 12]), ((7, 3, "né"), [7, 3, 110, 195, 169])]
    for purpose, entropy in cases:
        want = np.random.default_rng(entropy).integers(1 << 60, size=4)
        np.testing.assert_array_equal(generator(*purpose).integers(1 << 60, size=4), want)
    with pytest.raises(ConfigError, match="counted from 0, got -1"):
        generator(-1)


def test_streams_of_random_sets():
    sites = ("down", "up")
    for number, drawn in enumerate(random_sets(CONFIG, sites, 6, seed=5, count=3)):
        rng = np.random.default_rng([5, 2, number, 6, *(SITES.index(site) for site in sites)])
        widths = [site_width(CONFIG, site) for site in sites]
        flat = rng.choice(4 * sum(widths), size=6, replace=False)
        np.testing.assert_array_equal(np.sort(flat), drawn.flat(CONFIG, sites))


def test_streams_of_layer_matched_sets():
    neurons = NeuronSet.of(up=[(2, 3), (2, 9), (0, 1)])
    rng = np.random.default_rng([5, 3, *b"capital"])
    for drawn in layer_matched_sets(neurons, CONFIG, seed=5, name="capital", count=2):
        want = []
        for layer, taken in ((0, {1}), (2, {3, 9})):
            others = [index for index in range(20) if index not in taken]
            chosen = rng.choice(others, size=len(taken), replace=False)
            want += [(layer, index) for index in chosen]
        assert drawn == NeuronSet.of(up=want)


def test_positions_in_the_order_of_the_draw():
    want = np.random.default_rng(3).choice(80, 9, replace=False)
    np.testing.assert_array_equal(random_positions(CONFIG, ("up",), 9, generator(3)), want)


def test_activation_matched_in_the_order_of_a_ranking():
    """A plain loop: the best neuron's control is drawn first, and is taken for the others."""
    active = np.random.default_rng(1).gamma(1.0, size=(2, 40))
    order = (Neuron(1, 30), Neuron(0, 2), Neuron(1, 4), Neuron(1, 31))
    rng, taken, want = np.random.default_rng([0, 8]), set(order), []
    for layer, index in order:
        free = [i for i in range(40) if (layer, i) not in taken]
        free.sort(key=lambda i: abs(active[layer, i] - active[layer, index]))
        want.append((layer, free[int(rng.integers(NEAREST))]))
        taken.add(want[-1])
    drawn = activation_matched(Ranking(order, "act"), {"act": active}, generator(0, 8))
    assert drawn == NeuronSet.of(act=want)
    backwards = activation_matched(Ranking(order[::-1], "act"), {"act": active}, generator(0, 8))
    assert drawn != backwards
