"""The method's arithmetic against plain Python written from the paper, and by hand."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxneurons.engine.quadrature import Quadrature
from jaxneurons.errors import ConfigError, DataError
from jaxneurons.neurons.sets import Neuron
from jaxneurons.qrnca.method import PromptScores, QRNCAConfig, check_count, coarse, merge, rank

WIDTH = 7
LAYERS = 3


def kept(scores, threshold=0.2):
    """What `attribute_batch` keeps of one prompt's scores."""
    scores = np.asarray(scores, np.float32)
    neurons = coarse(scores, threshold)
    none = np.zeros(1, np.float32)
    return PromptScores(
        neurons, scores[neurons], float(scores.sum(dtype=np.float64)), 0.5, 0.9, True, none, none, 1
    )


# --- the oracle: the paper's formulas, one neuron at a time ---------------------------------------


def oracle(queries, config, width):
    """From {query: [prompt scores]}: {query: best}, {query: {neuron: naica}}, {common: count}."""
    na = {}
    for name, prompts in queries.items():
        total = {}
        for scores in prompts:
            limit = np.float32(config.threshold) * max(scores)
            for n, score in enumerate(scores):
                if max(scores) > 0 and score > limit:
                    value = float(score)
                    if config.decimals is not None:
                        value = round(value, config.decimals)
                    total[n] = total.get(n, 0.0) + value
        if config.normalise == "coarse":
            z = math.fsum(total.values())
        else:
            z = math.fsum(float(score) for scores in prompts for score in scores)
        na[name] = {n: value / z if z != 0 else 0.0 for n, value in total.items()}

    found, naica, counts = {}, {}, {}
    for n in range(LAYERS * width):
        counts[n] = sum(n in cluster for cluster in na.values())
    common = {n: c for n, c in counts.items() if c > math.floor(config.common * len(na))}
    for name, cluster in na.items():
        own = {n: value * math.log(len(na) / (counts[n] + 1)) for n, value in cluster.items()}
        best = sorted(own, key=lambda n: (-own[n], n))[: config.top]
        found[name] = [n for n in best if own[n] > 0 and n not in common]
        naica[name] = own
    return found, naica, common


SCORES = st.lists(
    # Multiples of 1/64: sums are exact, so that equal scores are ties in both.
    st.just(0.0) | st.integers(-64, 64).map(lambda k: k / 64) | st.sampled_from([0.25, 0.5, 1.0]),
    min_size=LAYERS * WIDTH,
    max_size=LAYERS * WIDTH,
).map(lambda scores: np.array(scores, np.float32))
QUERIES = st.lists(st.lists(SCORES, min_size=1, max_size=3), min_size=4, max_size=9).map(
    lambda queries: {f"q{i}": prompts for i, prompts in enumerate(queries)}
)
CONFIGS = st.builds(
    QRNCAConfig,
    threshold=st.sampled_from([0.0, 0.2, 0.5, 0.9]),
    common=st.sampled_from([0.25, 0.3, 0.5, 0.7, 1.0]),
    top=st.integers(1, 30),
    normalise=st.sampled_from(["coarse", "all"]),
    decimals=st.sampled_from([None, 2, 6]),
)


@given(QUERIES, CONFIGS)
@settings(max_examples=300, deadline=None)
def test_against_the_oracle(queries, config):
    clusters = {
        name: merge([kept(scores, config.threshold) for scores in prompts], config)
        for name, prompts in queries.items()
    }
    found, common = rank(clusters, width=WIDTH, settings=config)
    want, naica, want_common = oracle(queries, config, WIDTH)
    assert {neuron.layer * WIDTH + neuron.index: n for neuron, n in common} == want_common
    assert list(found) == list(want)
    for name, result in found.items():
        flat = [neuron.layer * WIDTH + neuron.index for neuron in result.ranking]
        # Which of two neurons comes first is free where their scores are equal up to rounding.
        np.testing.assert_allclose(result.naica, [naica[name][n] for n in flat], rtol=1e-9)
        np.testing.assert_allclose(result.naica, [naica[name][n] for n in want[name]], rtol=1e-9)
        np.testing.assert_allclose(np.multiply(result.na, result.ica), result.naica, rtol=1e-9)
        assert len(flat) == len(set(flat)) <= config.top
        assert not set(flat) & set(want_common)


@given(SCORES, st.sampled_from([0.0, 0.2, 0.5, 1.0]))
def test_coarse_keeps_what_exceeds_the_share(scores, threshold):
    top = scores.max()
    want = [n for n, s in enumerate(scores) if top > 0 and s > np.float32(threshold) * top]
    assert coarse(scores, threshold).tolist() == want


def test_coarse_by_hand():
    assert coarse(np.array([1.0, 0.2, 0.25, -3.0, 0.0]), 0.2).tolist() == [0, 2]  # strictly above
    assert coarse(np.array([0.0, -1.0]), 0.2).tolist() == []
    assert coarse(np.zeros(3), 0.0).tolist() == []


# --- merge ----------------------------------------------------------------------------------------


def test_merge_sums_what_each_prompt_keeps():
    prompts = [kept([4, 2, 0.5, -1]), kept([0.5, 4, 2, 0])]
    # 0.5 is below 0.2 * 4 in both prompts and is not counted there.
    assert merge(prompts, QRNCAConfig()) == {0: 4 / 12, 1: 6 / 12, 2: 2 / 12}
    everything = QRNCAConfig(normalise="all")
    assert merge(prompts, everything) == {0: 4 / 12.0, 1: 6 / 12.0, 2: 2 / 12.0}
    assert sum([4, 2, 0.5, -1]) + sum([0.5, 4, 2, 0]) == 12.0
    three = [*prompts, kept([-6, 0, 0, 1])]
    assert merge(three, QRNCAConfig()) == {0: 4 / 13, 1: 6 / 13, 2: 2 / 13, 3: 1 / 13}
    assert merge(three, everything) == {0: 4 / 7, 1: 6 / 7, 2: 2 / 7, 3: 1 / 7}


def test_merge_rounds_before_it_sums():
    prompts = [kept([0.014, 0.006]), kept([0.014, 0.006])]
    got = merge(prompts, QRNCAConfig(decimals=2))
    assert got == {0: pytest.approx(0.02 / 0.04), 1: pytest.approx(0.02 / 0.04)}
    assert merge(prompts, QRNCAConfig())[0] == pytest.approx(0.7)
    assert merge([kept([1e-9, 2e-9])], QRNCAConfig.reference()) == {0: 0.0, 1: 0.0}


def test_merge_of_nothing():
    assert merge([kept([0.0, -1.0])], QRNCAConfig()) == {}


# --- rank -----------------------------------------------------------------------------------------


def test_rank_by_hand():
    """Five queries; neuron 0 is in all, 1 in two, the others in one; u = 0.3: int(1.5) = 1."""
    clusters = {
        "a": {0: 0.5, 1: 0.2, 3: 0.3},
        "b": {0: 0.6, 1: 0.1, 8: 0.1, 9: 0.2},
        "c": {0: 1.0},
        "d": {0: 0.4, 10: 0.6},
        "e": {0: 0.75, 11: 0.25},
    }
    found, common = rank(clusters, width=7, settings=QRNCAConfig())
    own = math.log(5 / 2)
    assert found["a"].ranking == [Neuron(0, 3)]
    assert found["a"].naica == pytest.approx([0.3 * own])
    assert (found["a"].na, found["a"].ica) == ([0.3], pytest.approx([own]))
    assert found["b"].ranking == [Neuron(1, 2), Neuron(1, 1)]  # 9 and 8, best first
    assert found["b"].naica == pytest.approx([0.2 * own, 0.1 * own])
    assert found["c"].ranking == []
    assert found["d"].ranking == [Neuron(1, 3)]
    assert common == [(Neuron(0, 0), 5), (Neuron(0, 1), 2)]  # most frequent first

    found, common = rank(clusters, width=7, settings=QRNCAConfig(common=0.4))  # int(2.0) = 2
    assert found["a"].ranking == [Neuron(0, 3), Neuron(0, 1)]
    assert found["a"].naica == pytest.approx([0.3 * own, 0.2 * math.log(5 / 3)])
    assert common == [(Neuron(0, 0), 5)]

    found, common = rank(clusters, width=7, settings=QRNCAConfig(common=1.0))
    assert common == []
    assert found["c"].ranking == []  # in every cluster: log(5/6) < 0


def test_top_is_taken_before_common_neurons_are_removed():
    clusters = {f"q{i}": {0: 0.5, 1: 0.45, 100 + i: 0.05} for i in range(3)}
    clusters |= {f"r{i}": {200 + i: 1.0} for i in range(5)}
    # 0 and 1 are in 3 of 8, more than int(0.3 * 8) = 2; log(8/4) * 0.45 > log(8/2) * 0.05.
    found, common = rank(clusters, width=1000, settings=QRNCAConfig(top=2))
    assert [neuron.index for neuron, _ in common] == [0, 1]
    assert found["q0"].ranking == []
    found, _ = rank(clusters, width=1000, settings=QRNCAConfig(top=3))
    assert found["q0"].ranking == [Neuron(0, 100)]


@pytest.mark.parametrize(("count", "most"), [(10, 3), (11, 3), (13, 3), (14, 4), (20, 6)])
def test_common_is_more_than_the_whole_part_of_the_share(count, most):
    def cluster(i):
        # Neuron 0 is in `most` clusters, neuron 1 in one more.
        own = {0: 0.1} if i < most else {}
        return own | ({1: 0.1} if i <= most else {}) | {10 + i: 0.8}

    clusters = {f"q{i}": cluster(i) for i in range(count)}
    _, common = rank(clusters, width=1000, settings=QRNCAConfig())
    assert common == [(Neuron(0, 1), most + 1)]


def test_ties_go_to_the_lower_neuron_whatever_the_order():
    one = dict.fromkeys((5, 3, 9, 1), 0.1)
    others = {f"q{i}": {20 + i: 1.0} for i in range(4)}
    for cluster in (one, dict(reversed(one.items()))):
        found, _ = rank({"a": cluster, **others}, width=100, settings=QRNCAConfig(top=3))
        assert [neuron.index for neuron in found["a"].ranking] == [1, 3, 5]


def test_too_few_queries_are_said_so():
    with pytest.raises(DataError, match=r"one query only.*log\(1/2\) < 0"):
        rank({"a": {0: 1.0}}, width=7, settings=QRNCAConfig())
    with pytest.raises(DataError, match=r"2 queries .*log\(2/2\) = 0\); give at least 4 queries"):
        rank({"a": {0: 1.0}, "b": {1: 1.0}}, width=7, settings=QRNCAConfig())
    with pytest.raises(DataError, match=r"3 queries .*more than 0\.3 .*give at least 4 queries"):
        check_count(3)
    with pytest.raises(DataError, match="give at least 20 queries"):
        check_count(19, 0.05)
    with pytest.raises(DataError, match="common = 0 is too small"):
        check_count(100, 0.0)
    check_count(4)
    check_count(3, 1.0)


@given(st.integers(1, 12), st.sampled_from([0.1, 0.3, 0.5, 1.0]))
def test_few_queries_are_refused_only_where_nothing_can_be_left(count, common):
    """Clusters without anything in common are the best case."""
    clusters = {f"q{i}": {i: 1.0} for i in range(count)}
    try:
        found, _ = rank(clusters, width=100, settings=QRNCAConfig(common=common))
    except DataError:
        assert count < 3 or int(common * count) < 1
    else:
        assert all(len(result.ranking) == 1 for result in found.values())


# --- settings -------------------------------------------------------------------------------------


def test_defaults_are_the_papers():
    config = QRNCAConfig()
    assert config.quadrature == Quadrature("right", 16)
    assert (config.threshold, config.prompts, config.common, config.top) == (0.2, 3, 0.30, 20)
    assert (config.normalise, config.form, config.decimals) == ("coarse", "context", None)
    assert config.site == "up"


def test_reference_settings():
    config = QRNCAConfig.reference()
    assert config.quadrature == Quadrature("reference", 16)
    assert (config.form, config.decimals, config.normalise) == ("bare", 6, "coarse")
    assert (config.threshold, config.prompts, config.common, config.top) == (0.2, 3, 0.30, 20)
    assert QRNCAConfig.reference(top=5, decimals=None) == QRNCAConfig(
        quadrature=Quadrature("reference", 16), form="bare", top=5
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"threshold": -0.1}, r"threshold must be between 0 and 1, got -0\.1"),
        ({"threshold": 1.1}, "threshold must be between"),
        ({"threshold": math.nan}, "threshold must be between"),
        ({"common": 30.0}, r"common must be between 0 and 1, got 30\.0"),
        ({"prompts": 0}, "prompts must be at least 1, got 0"),
        ({"top": 0}, "top must be at least 1"),
        ({"normalise": "none"}, "normalise must be one of coarse, all; got 'none'"),
        ({"form": "letter"}, "form must be one of context, bare; got 'letter'"),
        ({"site": "upp"}, r"site must be one of up, gate, .*; got 'upp'; did you mean 'up'"),
        ({"site": 3}, "site must be one of up, .*; got 3"),
        ({"top": 2.5}, r"top must be an integer; got 2\.5"),
        ({"prompts": True}, "prompts must be an integer; got True"),
        ({"threshold": "0.2"}, r"threshold must be a number; got '0\.2'"),
        ({"decimals": "6"}, "decimals must be an integer or None; got '6'"),
        ({"quadrature": "gauss"}, "quadrature must be a Quadrature; got 'gauss'"),
    ],
)
def test_bad_settings(changes, message):
    with pytest.raises(ConfigError, match=message):
        QRNCAConfig(**changes)
