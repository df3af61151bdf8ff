"""Attribution, trials, responses and directions on every option of a configuration."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.attributing import difference, oracle
from support.models import compiled, random_tokens
from support.options import BUNDLES, params_of
from support.plain import Plain, wide

from jaxneurons import SITES, NeuronSet, Quadrature, integrated_gradients
from jaxneurons.engine import written_directions
from jaxneurons.engine.last_position import changes, last_position, scaled_answers
from jaxneurons.engine.parametrisation import ENDS, normed_panels, normed_site, parametrise
from jaxneurons.engine.quadrature import nodes_and_weights
from jaxneurons.engine.responses import mean_responses
from jaxneurons.engine.rows import prefill
from jaxneurons.neurons.sets import site_width

pytestmark = pytest.mark.slow

LENGTHS = jnp.array([12, 5])
SLOW = functools.partial(pytest.param, marks=pytest.mark.slow)


def case(name):
    config = BUNDLES[name]
    return params_of(name), random_tokens(config, (2, 12), 1), random_tokens(config, (2,), 2)


@functools.cache
def attribute(name, quadrature, site):
    config = BUNDLES[name]
    return compiled(
        functools.partial(integrated_gradients, config=config, quadrature=quadrature, site=site)
    )


def by_oracle(name, site, x, w):
    """Scores, P(0) and P(1)."""
    params, tokens, targets = case(name)
    return oracle(params, tokens, LENGTHS, targets, config=BUNDLES[name], site=site, x=x, w=w)


@functools.cache
def finely(name, site):
    """`by_oracle` at nodes that resolve what a norm does at small alpha: some in every decade."""
    ends = [0.0, *(10.0 ** np.arange(-5, -0.5)), *np.linspace(0.1, 1, 7)[1:]]
    x, w = nodes_and_weights("gauss", 12)
    parts = list(itertools.pairwise(ends))
    nodes = np.concatenate([a + (b - a) * x for a, b in parts])
    return by_oracle(name, site, nodes, np.concatenate([(b - a) * w for a, b in parts]))


@pytest.mark.parametrize(
    ("name", "site", "rule"),
    [
        ("gemma2", "up", "gauss"),
        SLOW("gemma3", "q", "gauss"),
        SLOW("olmo2", "down", "right"),
        SLOW("gemma2", "o", "reference"),
        SLOW("gemma3", "act", "right"),
        SLOW("olmo2", "k", "gauss"),
        SLOW("qwen3", "k", "gauss"),
        SLOW("smollm3", "gate", "gauss"),
        SLOW("phi", "v", "gauss"),
    ],
)
def test_fixed_rules_equal_the_plain_oracle(name, site, rule):
    params, tokens, targets = case(name)
    out = attribute(name, Quadrature(rule, steps=4), site)(params, tokens, targets, lengths=LENGTHS)
    scores, zero, one = by_oracle(name, site, *nodes_and_weights(rule, 4))
    assert difference(out.scores, scores).max() < 1e-4
    np.testing.assert_allclose(out.ablated, zero, rtol=1e-4)
    np.testing.assert_allclose(out.probability, one[:, 0], rtol=1e-5)
    theirs = Plain(params, np.asarray(tokens)[1, :5], BUNDLES[name]).probabilities
    np.testing.assert_allclose(out.probability[1], theirs[-1, int(targets[1])], rtol=1e-4)


ADAPTIVE = [
    ("gemma2", "up"),
    *(SLOW("gemma2", site) for site in ("gate", "q", "v", "o")),
    *(SLOW("gemma3", site) for site in ("act", "down", "q", "k")),
    *(SLOW("olmo2", site) for site in ("up", "gate", "v", "o")),
    *(SLOW("qwen3", site) for site in ("up", "q", "k")),
    SLOW("smollm3", "up"),
    SLOW("phi", "o"),
]


@pytest.mark.parametrize(("name", "site"), ADAPTIVE)
def test_the_adaptive_rule_is_complete_and_exact(name, site):
    params, tokens, targets = case(name)
    out = attribute(name, Quadrature(), site)(params, tokens, targets, lengths=LENGTHS)
    scores, zero, _ = finely(name, site)
    np.testing.assert_allclose(out.ablated, zero, rtol=1e-4, atol=1e-7)
    gap, error = np.asarray(out.gap), difference(out.scores, scores)
    assert np.median(gap) < 1e-5
    assert gap.max() < 1e-3
    # Its tolerance is 5e-4; a gate is bent by the norm and by its activation function.
    assert error.max() < 2e-3
    assert np.median(error) < (5e-4 if site == "gate" else 1e-4)


def test_a_finer_tolerance_gives_the_oracles_scores():
    params, tokens, targets = case("gemma2")
    quadrature = Quadrature(tolerance=1e-5, max_nodes=200)
    out = attribute("gemma2", quadrature, "up")(params, tokens, targets, lengths=LENGTHS)
    scores, _, _ = finely("gemma2", "up")
    assert difference(out.scores, scores).max() < 1e-4


@pytest.mark.parametrize("name", BUNDLES)
def test_paths_are_parametrised_by_what_follows_the_site(name):
    """Llama's arc only where what a site adds is linear in alpha; a norm's where one follows."""
    config = BUNDLES[name]
    params, tokens, targets = case(name)
    pre = compiled(functools.partial(prefill, config=config))(
        params, tokens, targets[:, None], lengths=LENGTHS
    )
    for site in SITES:
        path = parametrise(pre, site, config=config)
        follows = site in ("q", "k") and config.qk_norm is not None
        follows |= site in ("up", "gate", "act", "down", "o") and config.post_norms
        assert (normed_site(site, config) is not None) == follows
        t = jnp.linspace(0, 1, 5)
        alpha, slope = (
            np.broadcast_to(a, (*path.length.shape, 5))
            for a in jax.tree.map(lambda a: a[..., None], path).alpha(t)
        )
        np.testing.assert_allclose(alpha[..., [0, -1]], [0, 1] + 0 * alpha[..., :2], atol=1e-5)
        assert (slope > 0).all()
        if follows:
            assert (alpha[..., 1] < 0.05).all()  # long stretches at small alpha
            first = normed_panels(path)
            length = np.asarray(path.length).repeat(len(ENDS) + 1, axis=-1)
            np.testing.assert_allclose(
                (np.asarray(first.right) * length)[..., 0], ENDS[0], rtol=1e-5
            )
            np.testing.assert_array_equal(first.left[..., 1:][..., ::3], first.right[..., ::3])
        elif config.post_norms:
            np.testing.assert_array_equal(path.length, 0)  # alpha = t
    for place, norm in (("o", "attn_post_norm"), ("down", "ffn_post_norm")):
        for row, length in enumerate(LENGTHS):
            plain = Plain(params, np.asarray(tokens)[row, :length], config)
            for layer in range(config.num_layers):
                value = plain.sites[place, layer][-1]
                if config.post_norms:
                    np.testing.assert_allclose(
                        pre.squares[place][layer, row, 0], (value**2).mean(), rtol=1e-4
                    )
                    weight = wide(params["layers"][norm]["scale"][layer]) + config.norm_offset
                    value = value / np.sqrt((value**2).mean() + config.norm_eps) * weight
                np.testing.assert_allclose(
                    pre.added[place][layer, row, 0], value, rtol=1e-3, atol=1e-4
                )


@pytest.mark.parametrize("site", ["up", SLOW("o"), SLOW("q")])
@pytest.mark.parametrize("name", BUNDLES)
def test_trials_equal_a_plain_run_with_the_neurons_scaled(name, site):
    """Whole answers and options, from the last position on, beyond the window."""
    config, (params, tokens, _) = BUNDLES[name], case(name)
    lengths = jnp.array([9, 5])
    targets = jnp.array([[5, 3], [11, 2]])
    pre = compiled(functools.partial(prefill, config=config))(
        params, tokens, targets, lengths=lengths
    )
    width = site_width(config, site)
    neurons = [(0, 1), (1, 7), (config.num_layers - 1, 3)]
    change = changes([[(NeuronSet.of(**{site: neurons}), -1.5)] * 2], site=site)
    options = jnp.array([[[4, 6], [5, -1]], [[2, -1], [7, 7]]])
    found = scaled_answers(
        params, last_position(pre), change, config=config, site=site, options=options
    )
    for row, length in enumerate(lengths):
        prompt = np.asarray(tokens)[row, :length].tolist()

        def chance(answer, prompt=prompt):
            ids = [*prompt, *answer[:-1]]
            scales = {
                (site, layer): np.ones((len(ids), width)) for layer in range(config.num_layers)
            }
            for layer, index in neurons:
                scales[site, layer][len(prompt) - 1 :, index] = -1.5
            p = Plain(params, ids, config, scales=scales).probabilities[len(prompt) - 1 :]
            return np.prod([row[token] for row, token in zip(p, answer, strict=True)])

        np.testing.assert_allclose(
            found.probability[0, row], chance(targets[row].tolist()), rtol=1e-3
        )
        if name == "phi":
            continue  # options of other lengths, whose angles are those of the answer's
        for option, ids in enumerate(np.asarray(options[row]).tolist()):
            logp = np.log(chance([i for i in ids if i >= 0]))
            np.testing.assert_allclose(found.options[0, row, option], logp, rtol=1e-3)


@pytest.mark.parametrize("name", BUNDLES)
def test_responses_are_means_over_tokens(name):
    config, (params, tokens, _) = BUNDLES[name], case(name)
    sites = ("up", "down", "q", "o")
    means = mean_responses(params, tokens, LENGTHS, config=config, sites=sites)
    for row, length in enumerate(LENGTHS):
        plain = Plain(params, np.asarray(tokens)[row, :length], config)
        for site in sites:
            theirs = [plain.sites[site, layer].mean(0) for layer in range(config.num_layers)]
            np.testing.assert_allclose(means[site][:, row], theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["gemma2", "olmo2", "qwen3"])
def test_directions_are_those_in_which_neurons_move_the_stream(name):
    """Of `act`, by a plain run in which the neuron is changed: but for the norm's divisor, and for
    what the change of that divisor does to all others."""
    config, (params, tokens, _) = BUNDLES[name], case(name)
    layer, index, step = 1, 7, 1e-4
    ids = np.asarray(tokens)[0]
    plain = Plain(params, ids, config)
    value = plain.sites["act", layer][-1].copy()
    value[index] += step
    changed = Plain(params, ids, config, replaced={("act", layer, -1): value})
    moved = (changed.sites["residual", layer] - plain.sites["residual", layer])[-1] / step
    (direction,) = written_directions(params, NeuronSet.of(act=[(layer, index)]), config=config)
    direction = wide(direction)
    if config.post_norms:
        down = plain.sites["down", layer][-1]
        size = np.sqrt((down**2).mean() + config.norm_eps)
        weight = wide(params["layers"]["ffn_post_norm"]["scale"][layer]) + config.norm_offset
        row = wide(params["layers"]["ffn"]["down"]["kernel"][layer, index])
        moved = moved * size + weight * down * (down @ row) / len(down) / size**2
    np.testing.assert_allclose(direction, moved, rtol=1e-3, atol=1e-3)
