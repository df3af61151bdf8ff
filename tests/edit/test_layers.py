"""The choice of layers: scores against the standard library, tables against measures of edits."""

import dataclasses
import statistics

import numpy as np
import pytest
from support.edits import capital_requests, lab, low_rank

from jaxneurons.edit import layers
from jaxneurons.edit.cases import MeasureSettings
from jaxneurons.edit.layer_scores import NUMBERS, SCORE, harmonic_mean, means, score_table
from jaxneurons.edit.layers import choose_layers, default_candidates, with_layers
from jaxneurons.edit.measures import measure
from jaxneurons.edit.method import MEMIT, ROME, AlphaEdit, Edit, FineTune, KnowledgeNeurons, Trace
from jaxneurons.errors import ConfigError, DataError
from jaxneurons.neurons.sets import NeuronSet
from jaxneurons.storage.tables import read_tables

REQUESTS = capital_requests(3)
QUICK = MeasureSettings(steps=4, fluency_tokens=0, perplexity_tokens=0)
METHOD = ROME(covariance="identity")
SIZES = {1: 0.01, 4: 3000.0}
"""How large the stand-ins' changes are: next to nothing, and more than the model survives."""


def changes_at(layer):
    config = lab().config
    return [(low_rank(each, layer=layer, size=SIZES[layer], config=config),) for each in REQUESTS]


@pytest.fixture
def stand_ins(monkeypatch):
    """Edits that need no optimisation; returns the layers that were edited."""
    edited = []

    def edit_each(params, requests, *, settings, **given):
        assert params is lab().params
        assert given["prefixes"] == PREFIXES
        edited.append(settings.layer)
        if settings.layer == 3:
            raise DataError("request 'x': numbers that are not finite")
        reached = np.array([[True], [True], [settings.layer == 1]])
        numbers = np.zeros((1, 1)), np.zeros(1), np.zeros(1, int)
        return [
            Edit(changes, settings, Trace(*numbers, of_request), {}, {})
            for changes, of_request in zip(changes_at(settings.layer), reached, strict=True)
        ]

    monkeypatch.setattr(layers, "edit_each", edit_each)
    monkeypatch.setattr(layers, "generate_prefixes", lambda *_, **how: [str(how["count"])])
    return edited


PREFIXES = [str(METHOD.optimisation.prefixes)]


def table(values, score=SCORE, seed=0):
    """The score table of [candidate, request, part], one layer a candidate."""
    spans = [(c,) for c in range(len(values))]
    numbers = np.full((len(values), len(values[0]), len(NUMBERS)), np.nan)
    for k, name in enumerate(score):
        numbers[..., NUMBERS.index(name)] = np.array(values)[..., k]
    rows = [
        {"layers": str(c), "reached": True, "failed": ""}
        for c in range(len(values))
        for _ in values[0]
    ]
    return score_table(spans, dict(zip(spans, numbers, strict=True)), rows, score, seed)


def test_the_score_is_the_harmonic_mean_of_the_means():
    rng = np.random.default_rng(0)
    values = rng.uniform(0.1, 1, (3, 5, 3))
    rows, parts = table(values)
    assert parts == list(SCORE)
    for row, of_candidate in zip(rows, values, strict=True):
        by_part = of_candidate.mean(0).tolist()
        assert row["score"] == pytest.approx(statistics.harmonic_mean(by_part))
        assert [row[name] for name in SCORE] == pytest.approx(by_part)
        assert row["low"] < row["score"] < row["high"]


def test_a_part_that_is_nothing_makes_the_score_nothing():
    assert harmonic_mean(np.array([[0.5, 0.0, 1.0], [0.5, 0.5, 0.5]])).tolist() == [0.0, 0.5]


def test_parts_that_no_request_has_are_left_out():
    values = np.full((2, 4, 3), 0.5)
    values[..., 1] = np.nan
    values[0, 0, 2] = np.nan  # one request without neighbours
    rows, parts = table(values)
    assert parts == ["efficacy_free", "locality_free"]
    assert [row["score"] for row in rows] == [0.5, 0.5]
    assert rows[0]["generalisation_free"] is None
    assert means(values[0]).tolist()[::2] == [0.5, 0.5]


def test_intervals_pair_the_requests_of_candidates():
    better = np.array([1.0, 1, 1, 1, 0, 0, 0, 0, 1, 1])
    much, little = np.zeros(10), better.copy()
    much[0], little[0] = 1.0, 0.0
    values = np.stack([better, little, much])[..., None].repeat(3, -1)
    rows, _ = table(values)
    # One request less of the same ones may be chance; most of them less may not.
    assert [row["as_good"] for row in rows] == [True, True, False]
    index = np.random.default_rng(0).integers(10, size=(2000, 10))
    expected = np.quantile(better[index].mean(1), (0.025, 0.975))
    np.testing.assert_allclose((rows[0]["low"], rows[0]["high"]), expected, atol=0.11)


@pytest.mark.slow
def test_tables_are_the_measures_of_edits_at_each_layer(stand_ins):
    seen = []
    choice = choose_layers(
        lab(),
        REQUESTS,
        METHOD,
        candidates=[1, 3, 4],
        measured=QUICK,
        score=("locality_forced", "locality_free"),
        progress=lambda *done: seen.append(done),
    )
    assert stand_ins == [1, 3, 4]
    assert seen == [(1, 3), (2, 3), (3, 3)]
    by_layer = {row["layers"]: row for row in choice.tables.rows("layers")}
    for layer in SIZES:
        rows = measure(lab(), REQUESTS, changes_at(layer), settings=QUICK)
        ours = [row for row in choice.tables.rows("requests") if row["layers"] == str(layer)]
        for name in NUMBERS:
            expected = [row[name] for row in rows]
            np.testing.assert_allclose([row[name] for row in ours], expected, rtol=1e-5, atol=1e-7)
            mean = pytest.approx(np.mean(expected), rel=1e-5, abs=1e-7)
            assert by_layer[str(layer)][name] == mean
        assert [row["request"] for row in ours] == [request.id for request in REQUESTS]
    assert choice.layers == (1,)  # it changes little, and only locality was asked for
    assert choice.settings == dataclasses.replace(METHOD, layer=1)
    assert by_layer["1"]["locality_free"] == 1 > by_layer["4"]["locality_free"]
    assert (by_layer["1"]["reached"], by_layer["4"]["reached"]) == (1, pytest.approx(2 / 3))
    assert "not finite" in by_layer["3"]["failed"]
    assert (by_layer["3"]["score"], by_layer["3"]["reached"]) == (0, 0)
    text = repr(choice).splitlines()
    assert text[0] == "ROME: layers 1"
    assert [line.split()[0] for line in text[1:]] == ["layers", "1", "3", "4"]
    assert "serve best" in choice._repr_html_()


@pytest.mark.slow
def test_a_stopped_choice_goes_on(stand_ins, tmp_path):
    options = {"measured": QUICK, "out": tmp_path / "run"}
    first = choose_layers(lab(), REQUESTS, METHOD, candidates=[1, 4], **options)
    more = choose_layers(lab(), REQUESTS, METHOD, candidates=[1, 3, 4], **options)
    assert stand_ins == [1, 4, 3]
    kept = [row for row in more.tables.rows("requests") if row["layers"] != "3"]
    assert kept == first.tables.rows("requests")
    written = read_tables(tmp_path / "run" / "tables")
    assert written["layers"] == more.tables.rows("layers")
    assert (tmp_path / "run" / "figures" / "layers.png").read_bytes()[1:4] == b"PNG"
    with pytest.raises(DataError, match="other requests"):
        choose_layers(lab(), REQUESTS[:2], METHOD, candidates=[1], **options)


def test_default_candidates_reach_from_the_first_to_the_last_layer():
    config = dataclasses.replace(lab().config, num_layers=30)
    single = default_candidates(ROME(), config)
    assert single[0] == (0,)
    assert single[-1] == (29,)
    assert 10 <= len(single) <= 11
    assert (5,) in single  # the default of this depth: 5 of 32
    assert (7,) in default_candidates(FineTune(layer=7), config)
    spans = default_candidates(AlphaEdit(layers=(3, 4, 5)), config, count=4)
    assert spans == [(0, 1, 2), (3, 4, 5), (9, 10, 11), (18, 19, 20), (27, 28, 29)]
    assert default_candidates(FineTune(), lab().config) == [(i,) for i in range(6)]


def test_settings_with_layers():
    assert with_layers(MEMIT(), (2, 3)).layers == (2, 3)
    assert with_layers(FineTune(norm=0.1), (2,)) == FineTune(layer=2, norm=0.1)


@pytest.mark.parametrize(
    ("method", "candidates", "message"),
    [
        (KnowledgeNeurons(NeuronSet()), None, "ROME, MEMIT, AlphaEdit or FineTune"),
        (METHOD, [6], "layers 0 to 5"),
        (METHOD, [(1, 2)], "edits one layer"),
        (MEMIT(), [(2, 1)], "ascending"),
        (METHOD, [], "no candidates"),
    ],
)
@pytest.mark.usefixtures("as_users_call")
def test_candidates_that_cannot_be(method, candidates, message):
    with pytest.raises(ConfigError, match=message):
        choose_layers(lab(), REQUESTS, method, candidates=candidates)


def test_wrong_requests_and_scores():
    with pytest.raises(DataError, match="no requests"):
        choose_layers(lab(), [], METHOD)
    with pytest.raises(ConfigError, match="no measure perplexity"):
        choose_layers(lab(), REQUESTS, METHOD, score=("perplexity",))
