"""What joins a prompt and its answer, and answers of several tokens: judged whole, from end to end.

The oracle is a plain forward pass over one unpadded text at a time.
"""

import dataclasses
import itertools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.fixtures import cloze, located_run, multi_choice, write_lm, write_queries

import jaxneurons
from jaxneurons import forward
from jaxneurons.engine.quadrature import Quadrature
from jaxneurons.errors import DataError
from jaxneurons.prompts.answers import encode_query, separators
from jaxneurons.prompts.queries import parse_queries, read_queries
from jaxneurons.qrnca import joining
from jaxneurons.qrnca.baselines import MATCHED
from jaxneurons.qrnca.caveats import LowOptionMassWarning, UnlikelyAnswerWarning
from jaxneurons.qrnca.encoding import encode_queries
from jaxneurons.qrnca.joining import join
from jaxneurons.qrnca.locating import locate
from jaxneurons.qrnca.method import QRNCAConfig, run_prompts
from jaxneurons.qrnca.opening import open_run
from jaxneurons.qrnca.pcr import FACTORS
from jaxneurons.qrnca.prediction import predict
from jaxneurons.qrnca.trials import run_trials

SETTINGS = QRNCAConfig(quadrature=Quadrature("gauss", 2), common=0.6, prompts=1)
LAYERS, WIDTH = 3, 64
CLOSE = 1e-3  # relative, of a product of probabilities


@pytest.fixture(scope="module")
def lm(tmp_path_factory):
    return jaxneurons.load(write_lm(tmp_path_factory.mktemp("model")))


@pytest.fixture(scope="module")
def spaced_lm(tmp_path_factory):
    """Its tokenizer has a token for the space before a letter."""
    return jaxneurons.load(write_lm(tmp_path_factory.mktemp("model"), "single bytes"))


plain = jax.jit(forward, static_argnames=("config", "at"))


def log_probabilities(lm, prompt, answer, scales=None):
    """Of each token of an answer, teacher-forced, and whether it is the first choice."""
    tokens = jnp.array([[*prompt, *answer[:-1]]])
    full = np.ones((LAYERS, 1, tokens.shape[1], WIDTH), np.float32)
    if scales is not None:
        full[:, 0, len(prompt) - 1 :] = scales[:, None]
    out = plain(lm.params, tokens, config=lm.config, scales={"up": jnp.asarray(full)}, at="all")
    logp = np.asarray(jax.nn.log_softmax(out.logits[0, len(prompt) - 1 :]), np.float64)
    return logp[np.arange(len(answer)), answer], logp.argmax(-1) == answer, logp.max(-1)


def whole(lm, prompt, answer, scales=None):
    return np.exp(log_probabilities(lm, prompt, answer, scales)[0].sum())


# --- the separator --------------------------------------------------------------------------------

ENDS = ["a second-", "it costs $", "either/", "user@", "either -", "x =", "In 19", "l'", "a_"]


@pytest.mark.slow
def test_the_model_decides_where_the_texts_leave_two_forms(lm):
    records = {
        f"{end} {answer}": {"prompts": [f"The capital {end}", "The capital is"], "answer": answer}
        for end, answer in itertools.product(ENDS, ["hand", "45", "Paris"])
        if len(separators(f"The capital {end}", answer)) == 2
    }
    queries = parse_queries("test", records)
    joined = join(lm.params, lm.tokenizer, queries, config=lm.config)
    chosen = set()
    for query, found in zip(queries, joined, strict=True):
        assert found == dataclasses.replace(query, separators=found.separators)
        assert found.separator(1) is None  # after a word there is nothing to decide
        p = {}
        for between in ("", " "):
            form = encode_query(lm.tokenizer, query.prompts[0], query.answers[0], separator=between)
            p[between] = whole(lm, form.prompt, form.answer)
        assert found.separator(0) == max(p, key=p.__getitem__), (query.prompts[0], p)
        chosen.add(found.separator(0))
    assert chosen == {"", " "}


def test_options_are_joined_by_all_of_them_not_by_the_right_one(lm):
    wording = "Which {}?\n A. one\n B. two\n C. three\nIt is option-"
    records = {
        f"{n} {letter}": {"sentences": [wording.format(n)], "obj_label": [letter]}
        for n in range(8)
        for letter in "ABC"
    }
    queries = parse_queries("test", records)
    joined = join(lm.params, lm.tokenizer, queries, config=lm.config)
    lured = 0
    for n in range(8):
        p = {}
        for between, letter in itertools.product(("", " "), "ABC"):
            form = encode_query(lm.tokenizer, wording.format(n), letter, separator=between)
            p[between, letter] = whole(lm, form.prompt, form.answer)
        mass = {between: sum(p[between, letter] for letter in "ABC") for between in ("", " ")}
        best = max(mass, key=mass.__getitem__)
        assert {query.separator(0) for query in joined[3 * n : 3 * n + 3]} == {best}
        lured += any((p["", letter] > p[" ", letter]) != (best == "") for letter in "ABC")
    assert lured  # else one letter would decide alike


def test_nothing_is_run_where_nothing_is_open_or_all_is_stated(lm, monkeypatch):
    monkeypatch.setattr(joining, "run_prompts", None)
    records = cloze(4)
    records[0] |= {"prompts": ["a second-", "a third-"], "separator": ""}
    records[1] |= {"prompts": ["a second-", "The end is"], "separator": [" ", None]}
    queries = parse_queries("test", {record["id"]: record for record in records})
    assert join(lm.params, lm.tokenizer, queries, config=lm.config) == queries
    forms = encode_queries(lm, queries, QRNCAConfig())
    texts = [lm.tokenizer.decode([*form.prompt, *form.answer]) for form in forms[:4]]
    assert texts == ["a second-Paris", "a third-Paris", "a second- Rome", "The end is Rome"]


@pytest.mark.filterwarnings("ignore::jaxneurons.qrnca.caveats.UnlikelyAnswerWarning")
def test_only_wordings_that_are_used_are_decided_in_batches_as_asked(lm, tmp_path, monkeypatch):
    shapes = []

    def seen(params, batch, **settings):
        shapes.append(batch.tokens.shape[0])
        return run_prompts(params, batch, **settings)

    monkeypatch.setattr(joining, "run_prompts", seen)
    records = {f"q{n}": {"prompts": [f"{n} or-", f"{n} so-"], "answer": "no"} for n in range(4)}
    queries = parse_queries("test", records)
    locate(lm, queries, out=tmp_path / "run", settings=SETTINGS, batch_size=2)
    assert set(shapes) == {2}
    for query in open_run(tmp_path / "run", lm).queries:
        assert query.separator(0) is not None
        assert query.separator(1) is None  # `SETTINGS` uses one


@pytest.mark.parametrize(
    ("stated", "message"),
    [
        ("-", "must be white space or nothing, got '-'"),
        (3, "must be a text, or a list of 2"),
        ([" "], "must be a text, or a list of 2"),
        ([" ", 0], "must be white space or nothing, got 0"),
    ],
)
def test_separators_that_cannot_be(stated, message):
    record = {"prompts": ["a", "b"], "answer": "c", "separator": stated}
    with pytest.raises(DataError, match=message):
        parse_queries("test", {"x": record})


@pytest.mark.filterwarnings("ignore::jaxneurons.qrnca.caveats.UnlikelyAnswerWarning")
def test_what_was_decided_is_kept_in_the_run(lm, tmp_path, monkeypatch):
    records = cloze(6)
    for record in records:
        record["prompts"] = [f"{record['id']} second-", "The capital is"]
    queries = read_queries(write_queries(tmp_path / "q.json", records))
    settings = dataclasses.replace(SETTINGS, prompts=2)
    located = locate(lm, queries, out=tmp_path / "run", settings=settings)
    monkeypatch.setattr(joining, "run_prompts", None)  # nothing is decided again
    again = open_run(tmp_path / "run", lm)
    assert {query.separator(0) for query in again.queries} <= {"", " "}
    assert again.encoded == located.encoded
    assert again.neurons == located.neurons


@pytest.mark.smollm2
@pytest.mark.parametrize(
    ("prompt", "answer", "between", "least"),
    [
        ("He bought a second-", "hand", "", 0.9),
        ("She is a well-", "known", "", 0.3),
        ("The capital of France is", "Paris", None, 0.1),
    ],
)
def test_smollm2_decides_as_people_write(smollm2, prompt, answer, between, least):
    (query,) = parse_queries("test", {"x": {"prompts": [prompt], "answer": answer}})
    (query,) = join(smollm2.params, smollm2.tokenizer, [query], config=smollm2.config)
    assert query.separator(0) == between
    form = encode_query(smollm2.tokenizer, prompt, answer, separator=between)
    out = forward(smollm2.params, jnp.array([form.prompt]), config=smollm2.config)
    assert float(jax.nn.softmax(out.logits[0, -1])[form.answer[0]]) > least


@pytest.mark.filterwarnings("default::jaxneurons.qrnca.caveats.UnlikelyAnswerWarning")
def test_answers_far_from_the_first_choice_are_warned_of(lm, tmp_path):
    queries = read_queries(write_queries(tmp_path / "q.json", cloze(6)))
    with pytest.warns(UnlikelyAnswerWarning, match="less than 0.01 times as probable") as caught:
        located = locate(lm, queries, out=tmp_path / "run", settings=SETTINGS)
    found = [scores for query in queries for scores in located.prompts[query.id]]
    odds = []
    for form, scores in zip(located.encoded, found, strict=True):
        logp, _, highest = log_probabilities(lm, form.prompt, form.answer)
        odds.append(np.exp((logp - highest).min()))
        assert scores.odds == pytest.approx(odds[-1], rel=CLOSE)
        step = int((logp - highest).argmin())
        tokens = jnp.array([[*form.prompt, *form.answer[:step]]])
        assert scores.choice == plain(lm.params, tokens, config=lm.config).logits[0, -1].argmax()
    said = str(caught[0].message)
    far = sum(each < 0.01 for each in odds)
    assert said.startswith(f"{far} of 6 prompts")
    assert f"query 'fact-{int(np.argmin(odds))}', prompt 1" in said
    run = json.loads((tmp_path / "run" / "run.json").read_text())
    assert run["answers"]["unlikely_prompts"] == far


# --- answers whose first token says nothing -------------------------------------------------------


@pytest.fixture(scope="module")
def numbers(spaced_lm, tmp_path_factory):
    """Years: all of them begin with the token of a space."""
    home = tmp_path_factory.mktemp("numbers")
    records = [
        {"id": f"q{n}", "group": "ab"[n % 2], "prompt": f"Town {n} was built in", "answer": year}
        for n, year in enumerate(["1945", "1812", "1066", "1945", "800", "2001"])
    ]
    queries = read_queries(write_queries(home / "q.json", records))
    return located_run(spaced_lm, queries, out=home / "run", settings=SETTINGS, batch_size=4)


def test_answers_of_several_tokens_are_judged_whole(numbers):
    """Else every year would be right wherever the model says a space."""
    outcomes = run_trials(numbers)
    forms = dict(zip(numbers.owners(), numbers.encoded, strict=True))
    space = numbers.lm.tokenizer.convert_tokens_to_ids("Ġ")
    assert {form.answer[0] for form in forms.values()} == {space}
    for which in ("related", "unrelated"):
        for (method, change, query), found in getattr(outcomes, which).items():
            if method == MATCHED:
                continue
            form = forms[query if which == "related" else outcomes.other[query]]
            scales = np.ones((LAYERS, WIDTH), np.float32)
            for _, (layer, index) in outcomes.sets[method][query]:
                scales[layer, index] = FACTORS[change]
            before, says, _ = log_probabilities(numbers.lm, form.prompt, form.answer)
            assert found.before[0] == pytest.approx(np.exp(before.sum()), rel=CLOSE)
            assert found.right_before[0] == says.all()
            after = whole(numbers.lm, form.prompt, form.answer, scales)
            assert found.after[0] == pytest.approx(after, rel=CLOSE)
    changed = [abs(found.change) for found in outcomes.related.values()]
    assert max(changed) > 0.01


@pytest.fixture(scope="module")
def letters(spaced_lm, tmp_path_factory):
    """Multi-choice queries whose options all begin with the token of a space."""
    home = tmp_path_factory.mktemp("letters")
    queries = read_queries(write_queries(home / "q.json", multi_choice(8)))
    with pytest.warns(LowOptionMassWarning):
        locate(spaced_lm, queries, out=home / "run", settings=SETTINGS, batch_size=4)
    return open_run(home / "run", spaced_lm)


def test_options_that_begin_alike_are_compared_whole(letters):
    lm = letters.lm
    outcomes = run_trials(letters, methods=("QRNCA",))
    for query, form in zip(letters.owners(), letters.encoded, strict=True):
        assert len({option[0] for option in form.options}) == 1
        assert {len(option) for option in form.options} == {2}
        p = [whole(lm, form.prompt, option) for option in form.options]
        (scores,) = letters.prompts[query]
        assert scores.option_mass == pytest.approx(sum(p), rel=CLOSE)
        right = form.options[int(np.argmax(p))] == form.answer
        assert scores.correct == right
        found = outcomes.related["QRNCA", "suppress", query]
        assert found.right_before[0] == right
        scales = np.ones((LAYERS, WIDTH), np.float32)
        for _, (layer, index) in outcomes.sets["QRNCA"][query]:
            scales[layer, index] = 0
        p = [whole(lm, form.prompt, option, scales) for option in form.options]
        assert found.right_after[0] == (form.options[int(np.argmax(p))] == form.answer)


def test_prediction_reads_letters_at_their_own_token(letters):
    """What is prompted with is what is compared: the letters, after the space."""
    rows = predict(letters)
    prompting = [row["accuracy"] for row in rows if row["readout"] == "prompting"]
    correct = [p.correct for found in letters.prompts.values() for p in found]
    assert prompting[0] == pytest.approx(np.mean(correct))
