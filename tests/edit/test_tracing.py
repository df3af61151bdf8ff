"""Causal tracing of the lab model: tables by layer and token, what is left out, a stopped run."""

import dataclasses

import jax
import numpy as np
import pytest

import jaxneurons as jn
from jaxneurons.edit.requests import KnownFact
from jaxneurons.edit.restoring import KINDS, NoisedPrompts, restored_probabilities
from jaxneurons.edit.traced_facts import POSITIONS, TracedFact, encode_fact, plan
from jaxneurons.edit.tracing import answered, summarise, trace
from jaxneurons.errors import ConfigError, DataError
from jaxneurons.storage.tables import read_tables

SAID = "Everyone knows that, as for {}, its capital is"
FACTS = [
    KnownFact(SAID.format("Kaldunia"), "as for Kaldunia", "Gramdi", id="clause"),
    KnownFact("The capital of Wenmonia is", "Wenmonia", "Gramdi", id="wrong"),
    KnownFact(SAID.format("Wenmonia"), "Wenmonia", "Vouthbu", id="word"),
]
SAMPLES = 2


@pytest.fixture(scope="module")
def lab():
    return jn.load("lab")


@pytest.fixture(scope="module")
def tables(lab):
    return trace(lab, FACTS, samples=SAMPLES, seed=5)


def effects(tables, fact, kind, layer):
    return {
        row["position"]: row["effect"]
        for row in tables.rows("effects")
        if (row["fact"], row["kind"], row["layer"]) == (fact, kind, layer)
    }


def test_position_classes():
    fact = TracedFact(tuple(range(10)), (1,), (2, 6))
    names = [fact.position_class(i) for i in fact.positions]
    first, middle, last, after, further, end = POSITIONS
    assert names == [first, middle, middle, last, after, further, further, end]
    short = TracedFact((0, 1, 2), (1,), (1, 2))
    assert [short.position_class(i) for i in short.positions] == [last, end]
    at_end = TracedFact((0, 1, 2), (1,), (1, 3))
    assert [at_end.position_class(i) for i in at_end.positions] == [first, last]


def test_facts_as_tokens(lab):
    fact = encode_fact(lab.tokenizer, FACTS[0], config=lab.config)
    words = lab.tokenizer.convert_ids_to_tokens(list(fact.prompt[slice(*fact.subject)]))
    assert words == ["as", "for", "Kaldunia"]
    assert lab.tokenizer.decode(list(fact.answer)).strip() == "Gramdi"


def test_effects_are_means_over_samples_and_tokens(lab, tables):
    """Against runs of one fact alone, with its noise drawn here."""
    embedding = np.asarray(lab.params["embed"]["embedding"])
    ids = lab.tokenizer(FACTS[0].prompt)["input_ids"]
    subjects = [
        lab.tokenizer(fact.subject, add_special_tokens=False)["input_ids"] for fact in FACTS
    ]
    spread = embedding[np.concatenate(subjects)].std()
    start = ids.index(subjects[0][0])
    noise = np.zeros((SAMPLES, 1, len(ids), embedding.shape[1]), np.float32)
    drawn = np.random.default_rng([5, 0]).standard_normal((SAMPLES, 3, embedding.shape[1]))
    noise[:, 0, start : start + 3] = 3 * spread * drawn
    answer = lab.tokenizer("Gramdi", add_special_tokens=False)["input_ids"]
    places = np.arange(start, len(ids))
    prompts = NoisedPrompts(
        np.array([ids]), np.array([len(ids)]), np.array([answer]), noise, places[None]
    )
    run = jax.jit(restored_probabilities, static_argnames=("config",))
    p = jax.device_get(run(lab.params, prompts, config=lab.config))
    effect = (p.restored[..., 0] - p.noised[:, None, None, None, 0]).mean(0)
    columns = dict(zip(POSITIONS, ([0], [1], [2], [3], [4, 5], [6]), strict=True))
    assert len(places) == 7
    for k, kind in enumerate(KINDS):
        for layer in range(lab.config.num_layers):
            for name, value in effects(tables, "clause", kind, layer).items():
                mean = effect[k, layer, columns[name]].mean()
                np.testing.assert_allclose(value, mean, atol=2e-6, err_msg=f"{kind} {name}")
    (about, *_) = tables.rows("facts")
    np.testing.assert_allclose(about["clean"], p.clean[0], rtol=1e-5)
    np.testing.assert_allclose(about["noised"], p.noised.mean(), rtol=1e-4)
    assert abs(effect).max() > 0.1


def test_restoring_the_subject_first_and_the_last_token_at_the_end_brings_all_back(lab, tables):
    total = {row["fact"]: row["total_effect"] for row in tables.rows("facts")}
    last = lab.config.num_layers - 1
    for fact in ("clause", "word"):
        assert total[fact] > 0.1
        np.testing.assert_allclose(
            effects(tables, fact, "residual", last)["last"], total[fact], rtol=1e-5
        )
        np.testing.assert_allclose(
            effects(tables, fact, "residual", last)["last subject"], 0, atol=1e-6
        )
    # The subject is one token: what leaves the first layer there is nearly all that was noised.
    assert effects(tables, "word", "residual", 0)["last subject"] > 0.9 * total["word"]


def test_a_fact_that_is_answered_otherwise_is_left_out(lab, tables):
    assert answered(lab, FACTS) == [FACTS[0], FACTS[2]]
    left_out = {row["fact"]: row["left_out"] for row in tables.rows("facts")}
    assert left_out == {"clause": "", "wrong": "the model answers otherwise", "word": ""}
    assert {row["fact"] for row in tables.rows("effects")} == {"clause", "word"}
    assert tables.facts["facts"] == {"given": 3, "traced": 2, "left_out": 1}


def test_no_noise_no_effect(lab):
    tables = trace(lab, FACTS[2:], samples=1, noise=0.0, kinds=("residual",))
    assert max(abs(row["effect"]) for row in tables.rows("effects")) < 1e-6


def test_summary_means_over_facts(tables):
    for row in tables.rows("summary"):
        values = [
            each["effect"]
            for each in tables.rows("effects")
            if all(each[key] == row[key] for key in ("kind", "layer", "position"))
        ]
        assert row["facts"] == len(values)
        np.testing.assert_allclose(row["effect"], np.mean(values))
        # Of two facts the bootstrap's means lie between them.
        np.testing.assert_allclose((row["low"], row["high"]), (min(values), max(values)))
    again = summarise(tables.rows("effects"), seed=5)
    assert again == tables.rows("summary")


def test_a_stopped_run_goes_on(lab, tables, tmp_path):
    class Stopped(Exception):
        pass

    def stop(done, total):
        raise Stopped

    options = {"samples": SAMPLES, "seed": 5, "batch_size": 1, "out": tmp_path / "run"}
    with pytest.raises(Stopped):
        trace(lab, FACTS, progress=stop, **options)
    parts = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*.npz")}
    assert len(parts) == 1
    seen = []
    whole = trace(lab, FACTS, progress=lambda *done: seen.append(done), **options)
    assert seen == [(1, 2), (2, 2)]
    for path, content in parts.items():
        assert path.read_bytes() == content
    for row, other in zip(whole.rows("effects"), tables.rows("effects"), strict=True):
        assert {**row, "effect": 0} == {**other, "effect": 0}
        np.testing.assert_allclose(row["effect"], other["effect"], atol=2e-6)
    written = read_tables(tmp_path / "run" / "tables")
    assert written["effects"] == whole.rows("effects")
    assert (tmp_path / "run" / "figures" / "tracing.png").read_bytes()[1:4] == b"PNG"
    with pytest.raises(DataError, match="other settings"):
        trace(lab, FACTS, **{**options, "seed": 6})


def test_parameters_stay_as_they_are(lab):
    before = lab.hash
    trace(lab, FACTS[2:], samples=1, kinds=("down",))
    assert not lab.edited
    assert lab.hash == before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"samples": 0}, "samples must be at least 1"),
        ({"window": 0}, "window must be at least 1"),
        ({"noise": -1.0}, "noise must be a finite number"),
        ({"noise": float("nan")}, "noise must be a finite number"),
        ({"kinds": ("up",)}, "kinds"),
        ({"seed": 0.5}, "seed"),
    ],
)
@pytest.mark.usefixtures("as_users_call")
def test_wrong_arguments(lab, options, message):
    with pytest.raises(ConfigError, match=message):
        trace(lab, FACTS, **options)


def test_nothing_to_trace(lab):
    with pytest.raises(DataError, match="no facts"):
        trace(lab, [])
    with pytest.raises(DataError, match=r"none of 1 facts .* answers otherwise"):
        trace(lab, FACTS[1:2])
    unknown = dataclasses.replace(FACTS[1], prompt="The capital of Rome is", subject="Rome")
    with pytest.raises(DataError, match="does not know"):
        trace(lab, [unknown])


def test_batches_hold_facts_of_one_shape_and_nothing_else():
    facts = {i: TracedFact(tuple(range(6)), (1,), (1, 3)) for i in range(7)}
    facts[9] = TracedFact(tuple(range(12)), (1,), (1, 3))
    assert plan(facts, 4) == [[0, 1, 2, 3], [4, 5], [6], [9]]
    assert plan(facts, 3) == [[0, 1], [2, 3], [4, 5], [6], [9]]
