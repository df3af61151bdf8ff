"""Rank correlations against SciPy; attribution by layer against the change it has to add up to."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from hypothesis import given
from hypothesis import strategies as st
from support.edits import lab

from jaxneurons import forward
from jaxneurons.edit.agreement import (
    agreement_table,
    attribution_by_layer,
    correlate,
    rank_correlation,
)
from jaxneurons.edit.requests import KnownFact
from jaxneurons.engine.quadrature import Quadrature
from jaxneurons.errors import DataError

FACTS = [
    KnownFact("The capital of Wenmonia is", "Wenmonia", "Vouthbu"),
    KnownFact("As for Kaldunia, its capital is", "Kaldunia", "Gramdi"),
]


@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), min_size=3, max_size=9))
def test_as_scipys_with_ties(pairs):
    a, b = np.array(pairs, float).T
    ours = rank_correlation(a, b)
    if len({*a}) == 1 or len({*b}) == 1:
        assert np.isnan(ours)
    else:
        np.testing.assert_allclose(ours, scipy.stats.spearmanr(a, b).statistic, atol=1e-12)


def test_correlations_of_facts_and_of_means():
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(2, 12, 6))
    b += a
    a[3] = 1.0  # the same at all layers
    result = correlate(a, b, seed=1)
    each = [scipy.stats.spearmanr(a[i], b[i]).statistic for i in range(12) if i != 3]
    assert result.facts == 11
    np.testing.assert_allclose(result.of_facts.value, np.mean(each))
    means = scipy.stats.spearmanr(a.mean(0), b.mean(0)).statistic
    np.testing.assert_allclose(result.of_means.value, means)
    assert result.of_facts.low < np.mean(each) < result.of_facts.high
    assert result.of_means.low <= means <= result.of_means.high
    assert correlate(a, -b).of_means.value == pytest.approx(-means)
    constant = correlate(np.ones((4, 3)), b[:4, :3])
    assert constant.facts == 0
    assert np.isnan(constant.of_facts.value)


def test_what_choosing_by_a_predictor_brings():
    predicted = {"right": np.array([[0, 1, 5.0], [0, 2, 3]]), "wrong": np.array([[3, 1, 0.0]] * 2)}
    measured = {
        "score": np.array([[0.0, 0.2, 0.6], [0.2, 0.4, 0.8]]),
        "some": np.array([[np.nan, 0.0, 0.0], [0.5, 0.1, 0.0]]),
        "none": np.full((2, 3), np.nan),
    }
    rows = agreement_table(predicted, measured, layers=(4, 8, 12))
    right, wrong, some = rows[:3]
    assert [row["measure"] for row in rows] == ["score", "score", "some", "some"]
    assert (right["of_facts"], right["of_means"], right["layer"]) == (1, 1, 12)
    assert (wrong["of_facts"], wrong["of_means"], wrong["layer"]) == (-1, -1, 4)
    assert right["at_predicted"] == right["best"] == pytest.approx(0.7)
    assert wrong["at_predicted"] == pytest.approx(0.1)
    assert wrong["at_random"] == pytest.approx(2.2 / 6)
    assert (some["facts"], some["of_facts"]) == (1, -1)


@pytest.mark.usefixtures("as_users_call")
def test_what_cannot_be_correlated():
    with pytest.raises(DataError, match="the same facts and layers"):
        correlate(np.ones((2, 3)), np.ones((3, 3)))
    with pytest.raises(DataError, match="2 layers have no order"):
        correlate(np.ones((2, 2)), np.ones((2, 2)))


@pytest.mark.slow
def test_attribution_by_layer_bounds_what_a_layer_changes():
    """Completeness: attributions of a layer add up to P - P(layer off); absolute ones to more."""
    lm = lab()
    sums = attribution_by_layer(lm, FACTS, quadrature=Quadrature("gauss", steps=8))
    assert sums.shape == (2, lm.config.num_layers)
    run = jax.jit(
        lambda tokens, scales: forward(lm.params, tokens, config=lm.config, scales=scales)
    )
    for fact, of_fact in zip(FACTS, sums, strict=True):
        tokens = jnp.asarray([lm.tokenizer(fact.prompt)["input_ids"]])
        answer = lm.tokenizer(fact.attribute, add_special_tokens=False)["input_ids"][0]
        ones = np.ones((lm.config.num_layers, 1, tokens.shape[1], 1), np.float32)
        clean = jax.nn.softmax(run(tokens, {"act": ones}).logits[0, 0])[answer]
        changes = []
        for layer in range(lm.config.num_layers):
            off = ones.copy()
            off[layer, :, -1] = 0
            changes.append(clean - jax.nn.softmax(run(tokens, {"act": off}).logits[0, 0])[answer])
        assert np.all(of_fact >= np.abs(changes) - 1e-4)
        assert scipy.stats.spearmanr(of_fact, np.abs(changes)).statistic > 0.5


def test_a_fact_without_its_subject():
    with pytest.raises(DataError, match="is not in the prompt"):
        attribution_by_layer(lab(), [dataclasses.replace(FACTS[0], subject="Rome")])
