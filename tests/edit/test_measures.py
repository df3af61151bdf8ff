"""What an edit did, against plain loops over whole forward passes, without cache or batches."""

import collections
import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.edits import capital_requests, lab, low_rank
from support.fixtures import write_lm

from jaxneurons.edit import measures
from jaxneurons.edit.cases import MeasureSettings, encode_case
from jaxneurons.edit.changes import Rows
from jaxneurons.edit.measures import measure, run_cases
from jaxneurons.edit.outcomes import SHARES
from jaxneurons.errors import ConfigError, DataError
from jaxneurons.model.transformer import forward

SMALL = MeasureSettings(steps=6, fluency_tokens=12, perplexity_tokens=30, batch=2)
TEXTS = ("The capital of Wenmonia is Vouthbu .", "As for Kaldunia , its capital is Gramdi .")


@pytest.fixture(scope="module")
def requests():
    return capital_requests(3)


@pytest.fixture(scope="module")
def changes(requests):
    return [
        [low_rank(request, layer=2, size=size, config=lab().config)]
        for request, size in zip(requests, (30.0, 120.0, 480.0), strict=True)
    ]


@pytest.fixture(scope="module")
def rows(requests, changes):
    return measure(lab(), requests, changes, settings=SMALL, texts=TEXTS)


def edited_by_hand(change):
    """The parameters with a kernel that NumPy has changed."""
    params = jax.tree.map(np.array, lab().params)
    params["layers"]["ffn"]["down"]["kernel"][change.layer] += np.asarray(change.left) @ (
        np.asarray(change.right)
    )
    return params


@jax.jit
def _all_log_p(params, tokens):
    out = forward(params, tokens, config=lab().config, at="all")
    return jax.nn.log_softmax(out.logits[0], axis=-1)


def log_p(params, ids):
    """[position, vocab] in one pass over the whole text, padded to few lengths."""
    padded = [*ids, *[0] * (-len(ids) % 32)]
    return np.asarray(_all_log_p(params, jnp.array([padded])), np.float64)[: len(ids)]


def ids_of(text):
    return lab().tokenizer(text)["input_ids"]


def answer_ids(prompt, answer):
    return ids_of(f"{prompt} {answer}")[len(ids_of(prompt)) :]


def forced(params, prompt, answer):
    """log p of the answer, and whether each of its tokens is the first choice."""
    before, ids = ids_of(prompt), answer_ids(prompt, answer)
    table = log_p(params, before + ids)[len(before) - 1 : -1]
    return table[np.arange(len(ids)), ids].sum(), (table.argmax(-1) == ids).all()


def generated(params, prompt, steps):
    ids = ids_of(prompt)
    start = len(ids)
    for _ in range(steps):
        ids = [*ids, int(log_p(params, ids)[-1].argmax())]
    if lab().tokenizer.eos_token_id in ids[start:]:
        ids = ids[: ids.index(lab().tokenizer.eos_token_id, start)]
    whole, before = lab().tokenizer.decode(ids), lab().tokenizer.decode(ids[:start])
    return whole[len(before) :]


def test_efficacy_by_teacher_forcing(rows, requests, changes):
    for row, request, (change,) in zip(rows, requests, changes, strict=True):
        params = edited_by_hand(change)
        new, right = forced(params, request.prompt, request.target)
        old, _ = forced(params, request.prompt, request.ground_truth)
        assert row["probability_new"] == pytest.approx(math.exp(new), rel=1e-3, abs=1e-7)
        assert row["probability_old"] == pytest.approx(math.exp(old), rel=1e-3, abs=1e-7)
        assert row["efficacy_probability"] == float(new > old)
        assert row["efficacy_forced"] == float(right)


def test_free_generation_is_the_plain_loop(rows, requests, changes):
    cases = [encode_case(lab(), request, settings=SMALL) for request in requests]
    outcomes = run_cases(lab(), cases, changes, settings=SMALL)
    for row, outcome, request, (change,) in zip(rows, outcomes, requests, changes, strict=True):
        params = edited_by_hand(change)
        prompts = [request.prompt, *request.paraphrases]
        prompts += [text for text, _ in (*request.neighbours, *request.portability)]
        steps = SMALL.steps + measures.answer_width(cases)
        assert list(outcome.texts) == [generated(params, prompt, steps) for prompt in prompts]
        assert outcome.continuation == generated(params, request.prompt, SMALL.fluency_tokens)
        assert row["generated"] == outcome.texts[0]


def test_neighbours_keep_what_they_said(rows, requests, changes):
    for row, request, (change,) in zip(rows, requests, changes, strict=True):
        params = edited_by_hand(change)
        kept, divergences = [], []
        for prompt, answer in request.neighbours:
            ids = answer_ids(prompt, answer) if answer else ids_of(prompt)[-1:]
            before, after = (
                log_p(tree, ids_of(prompt) + ids)[len(ids_of(prompt)) - 1 : -1]
                for tree in (lab().params, params)
            )
            kept.append((before.argmax(-1) == after.argmax(-1)).all())
            divergences.append((np.exp(before[0]) * (before[0] - after[0])).sum())
        assert row["locality_forced"] == np.mean(kept)
        assert row["locality_kl"] == pytest.approx(np.mean(divergences), rel=1e-3, abs=1e-6)
        (prompt, answer), _ = request.neighbours
        own, _ = forced(params, prompt, answer)
        new, _ = forced(params, prompt, request.target)
        assert row["locality_probability"] == float(own > new)
    assert any(row["locality_forced"] < 1 for row in rows)  # these changes are felt


def test_perplexity_is_that_of_pytorch(rows, changes):
    torch = pytest.importorskip("torch")
    for row, (change,) in zip(rows, changes, strict=True):
        losses, before = [], []
        for text in TEXTS:
            ids = ids_of(text)
            for tree, to in ((edited_by_hand(change), losses), (lab().params, before)):
                table = torch.from_numpy(log_p(tree, ids)[:-1])
                to += torch.nn.functional.nll_loss(
                    table, torch.tensor(ids[1:]), reduction="none"
                ).tolist()
        assert row["perplexity"] == pytest.approx(math.exp(np.mean(losses)), rel=1e-4)
        ratio = math.exp(np.mean(losses) - np.mean(before))
        assert row["perplexity_ratio"] == pytest.approx(ratio, rel=1e-4)


def test_fluency_is_the_weighted_entropy(rows, requests, changes):
    for row, request, (change,) in zip(rows, requests, changes, strict=True):
        words = generated(edited_by_hand(change), request.prompt, SMALL.fluency_tokens).split()
        entropies = []
        for n in (2, 3):
            grams = [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]
            counts = collections.Counter(grams).values()
            entropies.append(-sum(c / len(grams) * math.log2(c / len(grams)) for c in counts))
        expected = (2 / 3 * entropies[0] + 4 / 3 * entropies[1]) / 2
        assert row["fluency"] == pytest.approx(expected)


def test_nothing_is_changed_and_nothing_counts_as_kept(requests):
    before = jax.tree.map(np.array, lab().params)
    rows = measure(lab(), requests, settings=SMALL, texts=TEXTS)
    jax.tree.map(np.testing.assert_array_equal, before, lab().params)
    for row in rows:
        # The lab model knows all these capitals.
        assert row["efficacy_probability"] == row["efficacy_forced"] == row["efficacy_free"] == 0
        assert row["generalisation_free"] == row["portability_forced"] == 0
        assert row["locality_forced"] == row["locality_free"] == row["locality_known"] == 1
        assert row["locality_kl"] == 0
        assert row["perplexity_ratio"] == 1
        assert row["failed"] == ""


def test_the_old_answer_as_a_target_has_been_reached(requests):
    true = [dataclasses.replace(r, target=r.ground_truth, ground_truth="") for r in requests]
    for row in measure(lab(), true, settings=SMALL):
        assert row["efficacy_forced"] == row["efficacy_free"] == row["generalisation_free"] == 1
        assert row["efficacy_probability"] is None  # nothing to compare with
        assert row["probability_old"] is row["perplexity"] is None


def test_an_answer_that_goes_on_is_right_when_forced_and_wrong_when_free(tmp_path):
    """Each byte is a token here: "A" is the first choice, and what is said is "Ab"."""
    import jaxneurons
    from jaxneurons.edit.requests import EditRequest

    lm = jaxneurons.load(write_lm(tmp_path / "model", "single bytes", seed=1))
    prompts = [f"{a}{b} is\n" for a in "ABCDEFGH" for b in "abcdefgh"]
    said = zip(prompts, jaxneurons.generate(lm, prompts, steps=3), strict=True)
    prompt, text = next((p, t) for p, t in said if t.isascii() and t[:2].isalnum())
    settings = MeasureSettings(steps=3, fluency_tokens=0)
    request = EditRequest(prompt, prompt[:2], text[0])
    (row,) = measure(lm, [request], settings=settings)
    assert row["efficacy_forced"] == 1
    assert row["generated"].startswith(text[:2])
    assert row["efficacy_free"] == 0


def test_a_batch_is_each_edit_alone(rows, requests, changes):
    alone = dataclasses.replace(SMALL, batch=1)
    for row, request, change in zip(rows, requests, changes, strict=True):
        (other,) = measure(lab(), [request], [change], settings=alone, texts=TEXTS)
        assert row.keys() == other.keys()
        for name, value in row.items():
            expected = value if isinstance(value, str | None) else pytest.approx(value, rel=1e-3)
            assert other[name] == expected, name


def test_edits_of_different_kinds_in_one_call(requests, changes):
    kernel = np.asarray(lab().params["layers"]["ffn"]["down"]["kernel"])
    (change,) = changes[0]
    whole = kernel[2] + np.asarray(change.left) @ np.asarray(change.right)
    rows = [Rows("ffn.down", 2, jnp.arange(len(whole)), jnp.asarray(whole))]
    mixed = measure(lab(), requests[:2], [rows, changes[1]], settings=SMALL)
    same = measure(lab(), requests[:2], changes[:2], settings=SMALL)
    for row, other in zip(mixed, same, strict=True):
        assert row["probability_new"] == pytest.approx(other["probability_new"], rel=1e-3)
        assert row["generated"] == other["generated"]


def test_an_edit_that_breaks_the_model_has_failed(requests, changes):
    ((change,), *_) = changes
    broken = dataclasses.replace(change, right=jnp.full_like(change.right, jnp.nan))
    row, other = measure(lab(), requests[:2], [[broken], changes[1]], settings=SMALL, texts=TEXTS)
    assert "not finite" in row["failed"]
    assert other["failed"] == ""
    assert {row[name] for name in SHARES} <= {0, None}
    assert row["efficacy_free"] == row["locality_free"] == row["locality_forced"] == 0
    assert row["perplexity"] is row["locality_kl"] is row["fluency"] is None


def test_what_cannot_be_asked_is_refused(requests):
    with pytest.raises(DataError, match="paraphrases holds an empty text"):
        dataclasses.replace(requests[0], paraphrases=(" ",))
    with pytest.raises(DataError, match="context holds 128"):
        measure(lab(), requests[:1], settings=dataclasses.replace(SMALL, fluency_tokens=500))
    with pytest.raises(ConfigError, match="1 changes for 3 requests"):
        measure(lab(), requests, [[]], settings=SMALL)
    with pytest.raises(ConfigError, match="steps must be at least 1"):
        MeasureSettings(steps=0)
    assert measure(lab(), []) == []
