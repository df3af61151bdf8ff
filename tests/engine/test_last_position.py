"""Suppressing and boosting against a full forward pass; random controls."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.models import random_tokens, tiny_config, tiny_params

from jaxneurons import forward
from jaxneurons.engine.attribution import prefill
from jaxneurons.engine.last_position import (
    TRIALS,
    changes,
    last_position,
    scaled_answers,
    unchanged,
)
from jaxneurons.errors import DataError
from jaxneurons.model.config import RopeConfig
from jaxneurons.neurons.sets import NeuronSet, site_width

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


def answers(model, trials, site="up"):
    """`trials`: (neurons, factor) of each trial and prompt."""
    params, _, pre = model
    return jax.device_get(
        scaled_answers(
            params, last_position(pre), changes(trials, site=site), config=CONFIG, site=site
        )
    )


@pytest.mark.parametrize("site", ["up", "gate", "down", "q"])
def test_as_a_full_forward_with_the_last_position_scaled(model, site):
    """One prompt at a time, not padded, nothing cached."""
    params, tokens, pre = model
    width = site_width(CONFIG, site)
    rng = np.random.default_rng(0)
    sizes, factors = [[0, 5], [37, 8], [1, 30]], [[2.0, 0.0], [2.0, -1.5], [0.0, 2.0]]
    sets = [[draw(rng, size, site) for size in each] for each in sizes]
    trials = [list(zip(*each, strict=True)) for each in zip(sets, factors, strict=True)]
    p, first, _ = answers(model, trials, site)
    changed = 0
    for trial in range(3):
        for row, length in enumerate(LENGTHS):
            full = np.ones((CONFIG.num_layers, 1, length, width), np.float32)
            for _, (layer, index) in sets[trial][row]:
                full[layer, 0, -1, index] = factors[trial][row]
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


@pytest.mark.parametrize(
    "changed",
    [
        {"num_kv_heads": 1, "tied": True, "sliding_window": 3},
        {
            "biases": ("q", "k", "v"),
            "sliding_window": 3,
            "sliding_layers": (False, True, True),
            "rope": RopeConfig(rope_type="dynamic", factor=3.0, original_max_position=5),
        },
    ],
    ids=["window", "some-windows-dynamic"],
)
def test_windows_and_angles_that_depend_on_the_length(changed):
    config = tiny_config(**changed)
    params, tokens = tiny_params(config), random_tokens(config, (2, 9))
    targets = jnp.array([[5, 3], [11, 2]])
    pre = prefill(params, tokens, targets, config=config, lengths=jnp.array(LENGTHS))
    neurons = [(0, 1), (1, 7), (2, 30)]
    off = changes([[(NeuronSet.of(up=neurons), 0.0)] * 2], site="up")
    found = scaled_answers(params, last_position(pre), off, config=config)
    for row, length in enumerate(LENGTHS):
        whole = jnp.concatenate([tokens[row, :length], targets[row, :1]])[None]
        full = np.ones((config.num_layers, 1, length + 1, 40), np.float32)
        for layer, index in neurons:
            full[layer, 0, length - 1 :, index] = 0
        at, scales = jnp.array([[length - 1, length]]), {"up": jnp.asarray(full)}
        out = forward(params, whole, config=config, at=at, scales=scales)
        p = jax.nn.softmax(out.logits[0])
        want = p[0, targets[row, 0]] * p[1, targets[row, 1]]
        np.testing.assert_allclose(found.probability[0, row], want, rtol=1e-4)


def test_no_trials(model):
    with pytest.raises(DataError, match="no trials"):
        answers(model, [])


def draw(rng, size, site="up"):
    width = site_width(CONFIG, site)
    places = rng.choice(CONFIG.num_layers * width, size, replace=False)
    return NeuronSet.of(**{site: [divmod(int(place), width) for place in places]})


@pytest.mark.parametrize("neurons", [NeuronSet(), NeuronSet.of(up=[(0, 1), (1, 39)])])
def test_factor_one_changes_nothing(model, neurons):
    p, first, options = answers(model, [[(neurons, 1.0)] * 2])
    _, _, pre = model
    np.testing.assert_allclose(p[0], pre.probability[:, 0], rtol=1e-5)
    np.testing.assert_array_equal(first[0], pre.logits[:, 0].argmax(-1) == pre.targets[:, 0])
    assert options.shape == (1, 2, 0)


def test_more_trials_than_run_together(model):
    """Each by itself, and as one of many that do not fill the last part."""
    rng = np.random.default_rng(1)
    trials = [[(draw(rng, 9), 0.0) for _ in range(2)] for _ in range(TRIALS + 3)]
    together = answers(model, trials)
    assert together.probability.shape == (TRIALS + 3, 2)
    for place in (0, TRIALS // 2 + 2, TRIALS + 2):
        (alone,) = answers(model, [trials[place]]).probability
        np.testing.assert_allclose(together.probability[place], alone, rtol=1e-5)
    assert len(set(together.probability[:, 0].tolist())) > TRIALS


def test_the_options_log_probabilities(model):
    params, _, pre = model
    options = jnp.array([[5, 7, 2], [11, 0, 3]])
    found = scaled_answers(
        params,
        last_position(pre),
        unchanged(2),
        config=CONFIG,
        options=options[..., None],
    )
    want = jax.nn.log_softmax(pre.logits[:, 0])[jnp.arange(2)[:, None], options]
    np.testing.assert_allclose(found.options[0], want, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(np.exp(found.options[0, :, 0]), found.probability[0], rtol=1e-5)


@pytest.mark.parametrize("site", ["up", "o"])
def test_whole_answers_and_options_by_teacher_forcing(site):
    """Answers of three tokens and options that begin alike, each alone in one plain pass."""
    params, tokens = tiny_params(CONFIG), random_tokens(CONFIG, (2, 9)).at[1, 4:].set(0)
    targets = jnp.array([[5, 3, 8], [11, 2, 2]])
    options = jnp.array([[[5, 3, 8], [5, 3, -1]], [[11, 2, 2], [11, -1, -1]]])
    pre = prefill(params, tokens, targets, config=CONFIG, lengths=jnp.array(LENGTHS))
    width = site_width(CONFIG, site)
    neurons = [(0, 1), (1, 7), (2, 30)]
    members = NeuronSet.of(**{site: neurons})
    trials = changes([[(NeuronSet(), 1.0)] * 2, [(members, -2.0)] * 2], site=site)
    found = jax.device_get(
        scaled_answers(
            params, last_position(pre), trials, config=CONFIG, site=site, options=options
        )
    )
    for trial, factor in enumerate((1.0, -2.0)):
        for row, length in enumerate(LENGTHS):
            for option, ids in enumerate(np.asarray(options[row])):
                ids = ids[ids >= 0]
                whole = jnp.asarray([*tokens[row, :length], *ids[:-1]])[None]
                scales = np.ones((CONFIG.num_layers, 1, whole.shape[1], width), np.float32)
                for layer, index in neurons:
                    scales[layer, 0, length - 1 :, index] = factor
                out = forward(
                    params, whole, config=CONFIG, at="all", scales={site: jnp.asarray(scales)}
                )
                logp = np.asarray(jax.nn.log_softmax(out.logits[0, length - 1 :]), np.float64)
                want = logp[np.arange(len(ids)), ids].sum()
                np.testing.assert_allclose(found.options[trial, row, option], want, rtol=1e-4)
                if option == 0:
                    np.testing.assert_allclose(
                        found.probability[trial, row], np.exp(want), rtol=1e-3
                    )
                    says = (logp.argmax(-1) == ids).all()
                    assert found.first[trial, row] == says


def test_the_whole_answer_is_first_only_if_each_token_is():
    params, tokens = tiny_params(CONFIG), random_tokens(CONFIG, (1, 6))
    ids = [int(t) for t in tokens[0]]
    for _ in range(3):
        out = forward(params, jnp.array([ids]), config=CONFIG)
        ids.append(int(out.logits[0, -1].argmax()))
    greedy = ids[6:]
    late, early = [*greedy[:2], (greedy[2] + 1) % 48], [(greedy[0] + 1) % 48, *greedy[1:]]
    for answer in (greedy, late, early):
        pre = prefill(params, tokens, jnp.array([answer]), config=CONFIG, lengths=jnp.array([6]))
        found = scaled_answers(params, last_position(pre), unchanged(1), config=CONFIG)
        assert bool(found.first[0, 0]) == (answer == greedy)


def test_multipliers_as_a_set_gives_them(model):
    """Dense [layer, width] by site, with a factor of its own for each neuron."""
    a, b = NeuronSet.of(up=[(0, 1), (2, 3)]), NeuronSet.of(up=[(1, 5), (2, 9), (0, 0)])
    sparse = changes([[(a, 0.0), (b, 2.5)], [(b, 0.0), (NeuronSet(), 1.0)]], site="up")
    dense = [[a.scales(CONFIG, 0), b.scales(CONFIG, 2.5)], [b.scales(CONFIG, 0), {}]]
    for got, want in zip(changes(dense, site="up"), sparse, strict=True):
        np.testing.assert_array_equal(got, want)
    both = a.scales(CONFIG, 0)["up"] * b.scales(CONFIG, 2.5)["up"]
    mixed = changes([[{"up": both}]], site="up")
    by_neuron = {
        (int(layer), int(index)): float(factor)
        for layer, index, factor in zip(*(x[0, 0] for x in mixed), strict=True)
        if layer < CONFIG.num_layers
    }
    assert by_neuron == {
        **dict.fromkeys([(0, 1), (2, 3)], 0.0),
        **dict.fromkeys([(1, 5), (2, 9), (0, 0)], 2.5),
    }


@pytest.mark.parametrize("change", [(NeuronSet.of(down=[(0, 1)]), 0.0), "dense"])
def test_changes_of_another_site(change):
    if change == "dense":
        change = NeuronSet.of(down=[(0, 1)]).scales(CONFIG, 0)
    with pytest.raises(DataError, match="site 'up' can be changed here, not of down"):
        changes([[change]], site="up")
