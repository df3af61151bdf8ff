"""Edits, interventions and restored runs on every option of a configuration, against plain runs."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.editing_models import covariances, kernel_change
from support.fixtures import transformers_tokenizer
from support.models import compiled, random_tokens, tiny_params
from support.options import BUNDLES, params_of
from support.plain import Plain, wide

from jaxneurons import SITES, forward
from jaxneurons.edit import (
    MEMIT,
    ROME,
    AlphaEdit,
    EditRequest,
    FineTune,
    LearnedNeurons,
    Optimisation,
    ablate,
    apply,
    edit,
    force,
    scale,
    scale_at,
    with_biases,
)
from jaxneurons.edit.contexts import encode_contexts
from jaxneurons.edit.editing import values_of
from jaxneurons.edit.encoding import encode_request
from jaxneurons.edit.finetune import fine_tune_each
from jaxneurons.edit.learned import learn_neurons_each
from jaxneurons.edit.restoring import KINDS, NoisedPrompts, restored_probabilities
from jaxneurons.edit.traced_facts import TracedFact
from jaxneurons.edit.tracing import _spread
from jaxneurons.neurons.sets import NeuronSet, site_width

pytestmark = pytest.mark.slow

TOKENS = random_tokens(BUNDLES["gemma2"], (2, 12))


@functools.cache
def run(name):
    return compiled(functools.partial(forward, config=BUNDLES[name], at="all"))


def relative(one, other):
    one, other = np.asarray(one, float), np.asarray(other, float)
    return np.linalg.norm(one - other) / np.linalg.norm(other)


# --- an edit is a multiplier ----------------------------------------------------------------------


def members(config, site):
    """Some neurons of a site in several layers, and what each is multiplied by."""
    flat = np.random.default_rng(0).choice(config.num_layers * site_width(config, site), 5, False)
    pairs = np.stack(np.divmod(flat, site_width(config, site)), axis=1)
    return NeuronSet.of(**{site: pairs}), np.array([-1.5, 0.0, 0.3, 2.5, 4.0], np.float32)


@pytest.mark.parametrize("name", BUNDLES)
def test_an_edit_of_a_site_is_its_multiplier(name):
    config, params = BUNDLES[name], params_of(name)
    untouched = {site: jnp.ones((config.num_layers, site_width(config, site))) for site in SITES}
    plain = run(name)(params, TOKENS, scales=untouched).logits
    for site in SITES:
        neurons, factors = members(config, site)
        pairs = neurons.pairs(site)
        tables = {**untouched, site: untouched[site].at[tuple(pairs.T)].set(factors)}
        expected = run(name)(params, TOKENS, scales=tables).logits
        assert relative(expected, plain) > 1e-3
        edited = scale(params, neurons, factors, config=config)
        assert relative(run(name)(edited, TOKENS, scales=untouched).logits, expected) < 1e-6
        off = run(name)(params, TOKENS, scales={**untouched, **neurons.scales(config, 0.0)})
        ablated = ablate(params, neurons, config=config)
        assert relative(run(name)(ablated, TOKENS, scales=untouched).logits, off.logits) < 1e-6


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gemma3", "olmo2"])
def test_inside_of_jit_and_vmap(name):
    config, params = BUNDLES[name], params_of(name)
    factors = jnp.array([0.0, -2.0, 3.0])

    @compiled
    def both(params, factors):
        def of(factor):
            edited = params
            for site in SITES:
                layer, index = members(config, site)[0].pairs(site).T
                edited = scale_at(edited, site, layer, index, factor, config=config)
            return forward(edited, TOKENS, config=config, at="all").logits

        def by_scales(factor):
            scales = {}
            for site in SITES:
                layer, index = members(config, site)[0].pairs(site).T
                table = jnp.ones((config.num_layers, site_width(config, site)))
                scales[site] = table.at[layer, index].set(factor)
            return forward(params, TOKENS, config=config, at="all", scales=scales).logits

        return jax.vmap(of)(factors), jax.vmap(by_scales)(factors)

    edited, scaled = both(params, factors)
    for one, other in zip(edited, scaled, strict=True):
        assert relative(one, other) < 1e-6


@pytest.mark.parametrize("name", ["gemma2", "phi"])
def test_constants_pass_the_activation_function(name):
    """`act` is forced by its gate, which gelu must leave as it is too."""
    params, config = with_biases(params_of(name), ["up", "gate", "down"], config=BUNDLES[name])
    neurons = NeuronSet.of(act=[(0, 3), (1, 5)], down=[(1, 2)])
    constants = np.array([0.7, -1.3, 0.4], np.float32)
    edited = force(params, neurons, constants, config=config)
    plain = Plain(edited, np.asarray(TOKENS[0]), config)
    values = dict(zip(neurons, constants.tolist(), strict=True))
    for (site, (layer, index)), value in values.items():
        np.testing.assert_allclose(plain.sites[site, layer][:, index], value, rtol=1e-6)
    logits = compiled(functools.partial(forward, config=config, at="all"))(edited, TOKENS[:1])
    assert relative(logits.logits[0], plain.logits) < 1e-5


# --- restored runs --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["gemma2", "gemma3", "olmo2"])
def test_restored_runs_equal_plain_ones(name):
    config, params = BUNDLES[name], params_of(name)
    ids, answer, window = np.array(TOKENS[0, :8]), [5, 11], 2
    ids[-1] = answer[0]
    noise = np.zeros((1, 1, 8, 32), np.float32)
    noise[0, 0, 1:3] = np.random.default_rng(0).normal(size=(2, 32))
    positions = np.array([[2, 6]])
    prompts = NoisedPrompts(ids[None], np.array([8]), np.array([answer]), noise, positions)
    ours = jax.jit(restored_probabilities, static_argnames=("config", "window"))(
        params, prompts, config=config, window=window
    )

    def probability(plain):
        p = plain.probabilities[-2:]
        return p[0, answer[0]] * p[1, answer[1]]

    clean = Plain(params, ids, config)
    np.testing.assert_allclose(ours.clean[0], probability(clean), rtol=2e-4)
    noised = Plain(params, ids, config, noise=noise[0, 0])
    np.testing.assert_allclose(ours.noised[0, 0], probability(noised), rtol=2e-4)
    apart = []
    for k, kind in enumerate(KINDS):
        place = "mixed" if kind == "o" else kind
        for layer in range(config.num_layers):
            low = layer if kind == "residual" else layer - window // 2
            span = range(max(low, 0), layer + 1)
            for column, position in enumerate(positions[0].tolist()):
                replaced = {(place, at, position): clean.sites[place, at][position] for at in span}
                theirs = Plain(params, ids, config, replaced=replaced, noise=noise[0, 0])
                here = ours.restored[0, k, layer, column, 0]
                np.testing.assert_allclose(here, probability(theirs), rtol=5e-4)
                apart.append(abs(probability(theirs) / probability(noised) - 1))
    assert np.median(apart) > 0.01


def test_noise_is_counted_in_embeddings_as_they_enter():
    config, params = BUNDLES["gemma3"], params_of("gemma3")
    facts = {0: TracedFact((4, 7, 9, 2), (5,), (1, 3))}
    entering = config.embed_scale * wide(params["embed"]["embedding"])[[7, 9]]
    np.testing.assert_allclose(_spread(params, facts, config), entering.std(), rtol=1e-5)


# --- what an optimisation promises is what the edited parameters give -----------------------------

TOKENIZER = transformers_tokenizer("bytes")
REQUEST = EditRequest("The capital of Italy is", "Italy", "Paris", ground_truth="Rome", id="rome")
STEPS = Optimisation(
    steps=8, learning_rate=0.5, kl_factor=0.1, weight_decay=0.05, clamp=4.0, stop=0.01
)
EDITED = ["gemma2", "gemma3", "olmo2"]


@functools.cache
def editable(name):
    """A bundle with room for the tokenizer's vocabulary, and few layers."""
    config = dataclasses.replace(BUNDLES[name].first_layers(3), vocab_size=len(TOKENIZER))
    return config, tiny_params(config)


def how(name, settings, **more):
    config, _ = editable(name)
    return {"config": config, "tokenizer": TOKENIZER, "settings": settings, **more}


def context(name):
    """The only prompt of a request without prefixes, with its answer, and the subject's place."""
    (of_request,) = encode_contexts(TOKENIZER, [REQUEST], (), config=editable(name)[0])
    ((prompt, at),) = of_request.prompts
    return [*prompt, *of_request.target[:-1]], at, of_request.target


def answer_probability(plain, target):
    p = plain.probabilities[-len(target) :]
    return np.prod([row[token] for row, token in zip(p, target, strict=True)])


@pytest.mark.parametrize("name", EDITED)
def test_rome_writes_what_it_optimised(name):
    config, params = editable(name)
    settings = ROME(layer=1, covariance="identity", optimisation=STEPS)
    values = values_of(params, [REQUEST], prefixes=(), **how(name, settings))
    one = edit(params, [REQUEST], values=values, prefixes=(), **how(name, settings))
    ids, at, target = context(name)
    # With the value where it was optimised, and nothing else, the answer is as likely as it says.
    replaced = {("down", 1, at): values.target[0]}
    promised = answer_probability(Plain(params, ids, config, replaced=replaced), target)
    np.testing.assert_allclose(one.trace.probability[0], promised, rtol=1e-3)
    before = answer_probability(Plain(params, ids, config), target)
    assert promised > 1.1 * before
    # And the edited parameters put it there.
    edited = Plain(apply(params, one.changes, config=config), ids, config)
    np.testing.assert_allclose(edited.sites["down", 1][at], values.target[0], rtol=1e-3, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("layers", [(1,), (0, 1)], ids=["one", "two"])
@pytest.mark.parametrize("name", EDITED)
def test_memit_writes_what_it_optimised(name, layers):
    config, params = editable(name)
    settings = MEMIT(layers=layers, weight=1e-8, optimisation=STEPS)
    options = how(name, settings, prefixes=())
    values = values_of(params, [REQUEST], **options)
    ids, at, target = context(name)
    replaced = {("residual", 1, at): values.target[0]}
    promised = answer_probability(Plain(params, ids, config, replaced=replaced), target)
    np.testing.assert_allclose(values.trace.probability[0], promised, rtol=2e-3)
    assert promised > 1.1 * answer_probability(Plain(params, ids, config), target)
    covariance = covariances(config, layers)
    one = edit(params, [REQUEST], values=values, covariance=covariance, **options)
    edited = Plain(apply(params, one.changes, config=config), ids, config)
    missing = relative(edited.sites["residual", 1][at], values.target[0])
    before = relative(values.initial[0], values.target[0])
    # In one layer exactly; the second of two makes up for what the first turned.
    assert missing < (1e-3 if len(layers) == 1 else 0.25 * before)


@pytest.mark.slow
@pytest.mark.parametrize("name", EDITED)
def test_alphaedit_writes_what_it_optimised(name):
    config, params = editable(name)
    settings = AlphaEdit(layers=(1,), threshold=1e-4, optimisation=STEPS)
    options = how(name, settings, prefixes=())
    values = values_of(params, [REQUEST], **options)
    covariance = covariances(config, (1,), kept=10)
    one = edit(params, [REQUEST], values=values, covariance=covariance, **options)
    ids, at, _ = context(name)
    # Its equation writes a share of what is missing, by how much of the key is in the null space.
    share = float((values.keys[0].astype(np.float64) @ one.changes[0].left).sum())
    assert 0.5 < share <= 1
    plain = Plain(params, ids, config)
    down = plain.sites["down", 1][at]
    norm = params["layers"]["ffn_post_norm"]["scale"][1]
    size = np.sqrt((down**2).mean() + config.norm_eps)
    unit = size / (wide(norm) + config.norm_offset)
    wanted = down + share * unit * (values.target - values.initial)[0]
    edited = Plain(apply(params, one.changes, config=config), ids, config)
    np.testing.assert_allclose(edited.sites["down", 1][at], wanted, rtol=2e-3, atol=2e-3)
    change = kernel_change(one, 1)
    matrix = covariance[1].matrix.astype(np.float64)
    kept = np.linalg.eigh(matrix).eigenvectors[:, -10:]
    assert np.abs(kept.T @ change).max() < 1e-5 * np.abs(change).max()


EVERY_SITE = NeuronSet.of(
    up=[(1, 2)], gate=[(1, 7)], act=[(1, 0), (2, 9)], down=[(1, 5)], q=[(1, 3)], k=[(2, 4)],
    v=[(2, 0)], o=[(1, 31)],
)  # fmt: skip
ROWS = NeuronSet.of(act=[(0, 1), (1, 0), (1, 1), (2, 9)], up=[(1, 33)])
DESCENTS = {
    "fine-tuned": FineTune(layer=1, steps=4, learning_rate=0.05, stop=0.0),
    "multipliers": LearnedNeurons(
        EVERY_SITE, learn="multipliers", others=("The answer is",), steps=4, stop=0.0
    ),
    "rows": LearnedNeurons(ROWS, learn="rows", others=("The answer is",), steps=4, stop=0.0),
}


@pytest.mark.slow
@pytest.mark.parametrize("method", DESCENTS)
@pytest.mark.parametrize("name", ["gemma2", "gemma3"])
def test_the_edited_model_has_the_loss_that_the_trace_says(name, method):
    config, params = editable(name)
    each = fine_tune_each if method == "fine-tuned" else learn_neurons_each
    (one,) = each(params, [REQUEST], **how(name, DESCENTS[method]))
    ids = encode_request(TOKENIZER, REQUEST, config=config)
    whole = [*ids.prompt, *ids.target[:-1]]
    edited = Plain(apply(params, one.changes, config=config), whole, config)
    p = answer_probability(edited, ids.target)
    np.testing.assert_allclose(one.trace.probability[0], p, rtol=1e-3)
    before = answer_probability(Plain(params, whole, config), ids.target)
    np.testing.assert_allclose(one.trace.loss[0, 0], -np.log(before) / len(ids.target), rtol=1e-4)
    assert p > 1.05 * before
