"""The probability change ratio and its intervals, against scipy and numbers worked out by hand."""

import collections

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from jaxneurons.engine import bootstrap
from jaxneurons.errors import DataError
from jaxneurons.prompts.queries import Query
from jaxneurons.qrnca import pcr


def query(name, group):
    return Query(name, group, ("What?",), ("x",), ((),))


def test_ratio_of_means_not_mean_of_ratios():
    found = pcr.ratio(np.array([1.0, -0.2, 0.4]), np.array([0.1, -0.3, 0.05]))
    assert found.related.value == pytest.approx(0.4)
    assert found.unrelated.value == pytest.approx(-0.05)
    assert found.pcr.value == pytest.approx(8)
    assert found.absolute.value == pytest.approx(1.6 / 0.45)


def test_unrelated_changes_that_cancel_hide_nothing_from_absolute_ones():
    own, other = np.full(50, 0.1), np.tile([0.5, -0.49], 25)
    found = pcr.ratio(own, other)
    assert found.pcr.value > 10
    assert found.absolute.value == pytest.approx(0.1 / 0.495)
    assert found.absolute.low <= found.absolute.value <= found.absolute.high < 0.21


def test_interval_as_scipy_bootstraps():
    values = np.random.default_rng(0).gamma(2.0, size=80)
    ours = bootstrap.mean(values, draws=20_000)
    theirs = stats.bootstrap(
        (values,), np.mean, n_resamples=20_000, method="percentile", random_state=1
    ).confidence_interval
    assert ours.value == pytest.approx(values.mean())
    assert ours.low == pytest.approx(theirs.low, rel=0.01)
    assert ours.high == pytest.approx(theirs.high, rel=0.01)


def test_ratio_interval_as_scipy_bootstraps():
    rng = np.random.default_rng(0)
    own, other = rng.normal(2, 1, 60), rng.normal(1, 0.5, 60)
    ours = pcr.ratio(own, other, draws=20_000).pcr
    theirs = stats.bootstrap(
        (own, other),
        lambda a, b: abs(a.mean() / b.mean()),
        n_resamples=20_000,
        paired=True,
        vectorized=False,
        method="percentile",
        random_state=1,
    ).confidence_interval
    assert (ours.low, ours.high) == pytest.approx(tuple(theirs), rel=0.02)


def test_nothing_unrelated_changes():
    found = pcr.ratio(np.array([0.5, 0.5]), np.zeros(2))
    assert found.pcr == found.absolute == (np.inf, np.inf, np.inf)


def test_nothing_changes_at_all():
    assert np.isnan(pcr.ratio(np.zeros(3), np.zeros(3)).pcr).all()


def test_lengths_must_agree():
    with pytest.raises(DataError, match="2 related and 3 unrelated"):
        pcr.ratio(np.ones(2), np.ones(3))


def test_unrelated_queries_are_of_another_group_and_vary():
    queries = [query(f"{group}{i}", group) for group in "abc" for i in range(20)]
    other = pcr.unrelated_queries(queries)
    assert set(other) == {q.id for q in queries}
    assert all(name[0] != other[name][0] for name in other)
    assert sorted(other.values()) == sorted(other)  # each used once
    assert {other[f"a{i}"][0] for i in range(20)} == {"b", "c"}
    assert other == pcr.unrelated_queries(queries) != pcr.unrelated_queries(queries, seed=1)


@given(st.lists(st.integers(0, 4), min_size=2, max_size=40), st.integers(0, 5))
def test_unrelated_queries_whatever_the_groups(groups, seed):
    queries = [query(str(i), str(group)) for i, group in enumerate(groups)]
    most = max(map(groups.count, groups))
    if most == len(groups):
        return
    other = pcr.unrelated_queries(queries, seed)
    assert set(other) == {q.id for q in queries}
    assert all(groups[int(a)] != groups[int(b)] for a, b in other.items())
    used = collections.Counter(other.values())
    assert max(used.values()) <= -(-most // (len(groups) - most))  # as evenly as can be


def test_one_group_has_no_unrelated_queries():
    with pytest.raises(DataError, match="one group only \\('a'\\)"):
        pcr.unrelated_queries([query("1", "a"), query("2", "a")])
