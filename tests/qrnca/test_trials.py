"""Trials of a run against the plain model, one prompt, one set and one full pass at a time."""

import dataclasses
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.fixtures import (
    assert_same_outcomes,
    cloze,
    located_run,
    multi_choice,
    write_lm,
    write_queries,
)

import jaxneurons
from jaxneurons import forward
from jaxneurons.engine.quadrature import Quadrature
from jaxneurons.engine.readout import words
from jaxneurons.errors import ConfigError, DataError
from jaxneurons.neurons.controls import activation_matched
from jaxneurons.neurons.sets import NeuronSet, Ranking
from jaxneurons.prompts import batches
from jaxneurons.prompts.queries import read_queries
from jaxneurons.qrnca import prediction, trials
from jaxneurons.qrnca.analyses import (
    against_rows,
    average_overlap,
    balanced,
    count_rows,
    kind_rows,
    layer_rows,
    neuron_rows,
    overlap_rows,
    word_rows,
)
from jaxneurons.qrnca.baselines import MATCHED, method_sets
from jaxneurons.qrnca.effects import (
    change_rows,
    completeness_share,
    editing_rows,
    evaluation_rows,
)
from jaxneurons.qrnca.method import QRNCAConfig
from jaxneurons.qrnca.opening import open_run
from jaxneurons.qrnca.pcr import FACTORS
from jaxneurons.qrnca.prediction import READOUTS, _read, halves, pools, predict
from jaxneurons.qrnca.trials import run_trials

# A random model says anything rather than the answer.
pytestmark = pytest.mark.filterwarnings("ignore::jaxneurons.qrnca.caveats.UnlikelyAnswerWarning")

SETTINGS = QRNCAConfig(quadrature=Quadrature("gauss", 3), common=0.6)
LAYERS, WIDTH = 3, 64
QUERIES = 12
CLOSE = 5e-4  # relative, of a probability: logits of tens in float32, summed in another order


@pytest.fixture(scope="module")
def lm(tmp_path_factory):
    return jaxneurons.load(write_lm(tmp_path_factory.mktemp("model")))


@pytest.fixture(scope="module")
def run(lm, tmp_path_factory):
    """Multi-choice queries of two groups, three wordings each."""
    home = tmp_path_factory.mktemp("run")
    queries = read_queries(write_queries(home / "queries.json", multi_choice(QUERIES)))
    return located_run(lm, queries, out=home / "run", settings=SETTINGS, batch_size=4)


@pytest.fixture(scope="module")
def outcomes(run):
    return run_trials(run)


def multipliers(neurons, factor):
    """[layer, width]."""
    scales = np.ones((LAYERS, WIDTH), np.float32)
    for _, (layer, index) in neurons:
        scales[layer, index] = factor
    return scales


plain = jax.jit(forward, static_argnames=("config", "capture"))


def option_logits(lm, prompt, scales=None, step=0):
    """Log-probabilities after a prompt and tokens of its answer: not padded, nothing cached."""
    tokens = jnp.array([[*prompt.prompt, *prompt.answer[:step]]])
    full = np.ones((LAYERS, 1, tokens.shape[1], WIDTH), np.float32)
    if scales is not None:
        full[:, 0, len(prompt.prompt) - 1 :] = scales[:, None]
    out = plain(lm.params, tokens, config=lm.config, scales={"up": jnp.asarray(full)})
    return np.asarray(jax.nn.log_softmax(out.logits[0, -1]), np.float64)


@pytest.mark.parametrize("which", ["related", "unrelated"])
def test_every_trial_as_a_full_pass(run, outcomes, which):
    """Related: a query's neurons on its own prompts. Unrelated: on those of its other query."""
    prompts, owners = run.encoded, run.owners()
    changed = 0.0
    for query in ("q0", "q5"):
        asked = query if which == "related" else outcomes.other[query]
        for wording, index in enumerate(i for i, owner in enumerate(owners) if owner == asked):
            prompt = prompts[index]
            options = [token for (token,) in prompt.options]
            right = options.index(prompt.answer[0])
            before = option_logits(run.lm, prompt)
            for method, change, name in getattr(outcomes, which):
                if name != query or method == MATCHED:
                    continue
                found = getattr(outcomes, which)[method, change, query]
                p = np.exp(before[prompt.answer[0]])
                assert found.before[wording] == pytest.approx(p, rel=CLOSE)
                assert found.right_before[wording] == (before[options].argmax() == right)
                neurons = outcomes.sets[method][query]
                scales = multipliers(neurons, FACTORS[change])
                want = option_logits(run.lm, prompt, scales)
                after = np.exp(want[prompt.answer[0]])
                assert found.after[wording] == pytest.approx(after, rel=CLOSE), (method, change)
                assert found.right_after[wording] == (want[options].argmax() == right)
                changed = max(changed, abs(after / p - 1))
    assert changed > 0.01


def test_matched_neurons_are_changed_as_said(run, outcomes):
    """The control of a prompt, drawn again as `controls` says, against a full pass."""
    prompts, owners = run.encoded, run.owners()
    index = owners.index("q5")
    prompt = prompts[index]
    out = forward(run.lm.params, jnp.array([prompt.prompt]), config=run.lm.config, capture=("up",))
    active = {"up": np.abs(np.asarray(out.activations["up"][:, 0, 0]))}
    rng = np.random.default_rng([0, index])
    common = NeuronSet.of(up=[neuron for neuron, _ in run.common])
    rankings = method_sets(run.prompts, run, common, config=run.lm.config, settings=run.settings)
    for method in outcomes.sets:  # in the order in which they are drawn
        assert outcomes.sets[method]["q5"] == rankings[method]["q5"].neurons
        if method == "random":
            continue
        drawn = activation_matched(rankings[method]["q5"], active, rng)
        if method == "QRNCA":
            # An unrelated query's control is drawn right after it.
            (source,) = (q for q, other in outcomes.other.items() if other == "q5")
            activation_matched(rankings[method][source], active, rng)
        scales = multipliers(drawn, 0.0)
        want = np.exp(option_logits(run.lm, prompt, scales)[prompt.answer[0]])
        assert outcomes.matched[method, "suppress", "q5"].after[0] == pytest.approx(want, rel=CLOSE)
        if method == "QRNCA":
            assert outcomes.related[MATCHED, "suppress", "q5"].after[0] == pytest.approx(
                want, rel=1e-4
            )


def test_trials_taken_up_again_and_spoilt_parts_made_anew(run, outcomes):
    parts = sorted(run.store.parts.glob("trials-*.npz"))
    assert len(parts) > 2
    parts[0].write_bytes(parts[0].read_bytes()[:-1])
    parts[1].unlink()
    seen = []
    again = run_trials(run, progress=lambda done, of: seen.append((done, of)))
    assert seen[-1] == (3 * QUERIES, 3 * QUERIES)
    assert_same_outcomes(outcomes, again)


def test_what_was_kept_is_that_of_its_order(run, outcomes):
    """The same trials asked for in another order are other rows of the parts."""
    turned = run_trials(
        run,
        methods=tuple(outcomes.sets)[::-1],
        factors=dict(reversed(FACTORS.items())),
    )
    for key, found in outcomes.related.items():
        if key[0] != MATCHED:  # drawn in the order of the methods
            np.testing.assert_allclose(turned.related[key].after, found.after, rtol=1e-5)


def test_boosting_by_one_changes_nothing(run):
    found = run_trials(run, methods=("QRNCA",), factors={"boost": 1.0, "suppress": 1.0})
    rows = change_rows(run, found)
    assert max(abs(row[w]) for row in rows for w in ("related", "unrelated")) < 1e-4
    assert all(row["turned"] == 0 for row in editing_rows(run, found))


def test_neurons_of_ones_own(run, outcomes):
    """As one more method: QRNCA's under another name come to the same."""
    mine = {query: found.neurons for query, found in run.items()}
    found = run_trials(run, methods=("QRNCA",), extra={"mine": mine})
    for query in mine:
        a, b = (found.related[method, "boost", query].after for method in ("QRNCA", "mine"))
        np.testing.assert_allclose(a, b, rtol=1e-6)
        np.testing.assert_allclose(a, outcomes.related["QRNCA", "boost", query].after, rtol=1e-4)


def test_changes_are_means_over_wordings(run, outcomes):
    rows = change_rows(run, outcomes)
    assert len(rows) == QUERIES * 7 * 2
    key = ("activation", "boost", "q5")
    (row,) = (r for r in rows if (r["method"], r["change"], r["query"]) == key)
    for column in ("related", "unrelated", "matched"):
        found = getattr(outcomes, column)[key]
        each = [a / b - 1 for a, b in zip(found.after, found.before, strict=True)]
        assert row[column] == pytest.approx(np.mean(each))
    assert row["before"] == pytest.approx(outcomes.related[key].before.mean())


def test_evaluation_table(run, outcomes):
    rows = change_rows(run, outcomes)
    table = evaluation_rows(rows)
    assert len(table) == 3 * 7 * 2  # all, biology, physics
    for row in table:
        own = [
            r
            for r in rows
            if (r["method"], r["change"]) == (row["method"], row["change"])
            and row["group"] in ("all", r["group"])
        ]
        related = np.mean([r["related"] for r in own])
        assert row["queries"] == len(own)
        assert row["related"] == pytest.approx(related)
        assert row["related_low"] <= row["related"] <= row["related_high"]
        assert row["pcr"] == pytest.approx(abs(related / np.mean([r["unrelated"] for r in own])))
        if row["method"] in (MATCHED, "random"):
            assert row["beyond"] is None
        else:
            control = np.mean([r["matched"] for r in own])
            assert row["beyond"] == pytest.approx(related - control)


def test_editing_counts_what_turned(run, outcomes):
    for row in editing_rows(run, outcomes):
        turned = could = 0
        for query in run.queries:
            if row["group"] not in ("all", query.group):
                continue
            found = outcomes.related[row["method"], row["change"], query.id]
            for i in range(3):
                if found.right_before[i] == (row["change"] == "suppress"):
                    could += 1
                    turned += found.right_after[i] != found.right_before[i]
        assert (row["prompts"], row["turned"]) == (could, turned)
        assert row["rate"] == (pytest.approx(turned / could) if could else None)


@pytest.mark.slow
def test_free_answers_and_a_group_of_most_queries(lm, tmp_path):
    """No options at all; eight queries share four unrelated ones."""
    records = cloze(12)
    for n, record in enumerate(records):
        record["group"] = "capital" if n < 8 else "language"
    queries = read_queries(write_queries(tmp_path / "q.json", records))
    free = located_run(lm, queries, out=tmp_path / "run", settings=SETTINGS, batch_size=4)
    found = run_trials(free, methods=("QRNCA", "random"))
    groups = {query.id: query.group for query in queries}
    assert all(groups[a] != groups[b] for a, b in found.other.items())
    prompts, owners = free.encoded, free.owners()
    for query in groups:
        for which, asked in (("related", query), ("unrelated", found.other[query])):
            outcome = getattr(found, which)["QRNCA", "suppress", query]
            prompt = prompts[owners.index(asked)]
            neurons = free[query].neurons
            scales = multipliers(neurons, 0.0)
            want, says = 1.0, True
            for step, token in enumerate(prompt.answer):  # each after those before it
                logp = option_logits(free.lm, prompt, scales, step)
                want, says = want * np.exp(logp[token]), says and logp.argmax() == token
            assert outcome.after[0] == pytest.approx(want, rel=CLOSE)
            assert outcome.right_after[0] == says
    evaluation_rows(change_rows(free, found))


def test_some_queries_in_no_group(lm, tmp_path):
    records = cloze(8)
    del records[3]["group"]
    queries = read_queries(write_queries(tmp_path / "q.json", records))
    with pytest.raises(DataError, match="'fact-3' is in no group"):
        located_run(lm, queries, out=tmp_path / "run", settings=SETTINGS)


def test_completeness_share_of_everything_kept(run):
    for prompts in run.prompts.values():
        kept = {n for p in prompts for n in p.neurons.tolist()}
        neurons = NeuronSet.of(up=[divmod(n, WIDTH) for n in kept])
        model = {"config": run.lm.config, "site": "up"}
        held = sum(p.scores.sum(dtype=np.float64) for p in prompts)
        whole = sum(p.total for p in prompts)
        found = completeness_share(prompts, neurons, **model)
        assert found == pytest.approx(held / whole) if whole > 0 else np.isnan(found)
        assert np.isnan(found) or completeness_share(prompts, NeuronSet(), **model) == 0


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda sets: sets.pop("q3"), DataError, "'mine' has no neurons for query 'q3'"),
        (
            lambda sets: sets.update(q3=NeuronSet.of(down=[(0, 1)])),
            DataError,
            "this run is of neurons at 'up', 'mine' has some at down",
        ),
        (
            lambda sets: sets.update(q3=NeuronSet.of(up=[(9, 1)])),
            DataError,
            "layer 9 is not in this model",
        ),
    ],
)
def test_neurons_that_cannot_be_changed(run, monkeypatch, change, error, message):
    monkeypatch.setattr(trials, "scaled_answers", None)  # said before anything is computed
    sets = {query: found.neurons for query, found in run.items()}
    change(sets)
    with pytest.raises(error, match=message):
        run_trials(run, methods=(), extra={"mine": sets})


def test_a_method_that_is_none(run):
    with pytest.raises(
        ConfigError, match="unknown method 'activations'; did you mean 'activation'"
    ):
        run_trials(run, methods=("activations",))


def test_one_group_only_is_an_error(lm, tmp_path):
    records = {name: r for name, r in multi_choice(16).items() if r["relation_name"] == "biology"}
    queries = read_queries(write_queries(tmp_path / "q.json", records))
    one = located_run(lm, queries, out=tmp_path / "run", settings=SETTINGS)
    with pytest.raises(DataError, match="one group only"):
        run_trials(one)


# --- opening a run --------------------------------------------------------------------------------


def test_a_run_opened_again(run, outcomes, monkeypatch):
    written = (run.path / "run.json").read_text()
    monkeypatch.setattr(trials, "scaled_answers", None)  # nothing is computed again
    monkeypatch.setattr(
        "jaxneurons.checkpoints.provenance.platform.platform", lambda: "another machine"
    )
    again = open_run(run.path, run.lm)
    assert again.queries == run.queries
    assert again.settings == run.settings
    assert again.neurons == run.neurons
    assert again.common == run.common
    found = run_trials(again)
    assert found.related.keys() == outcomes.related.keys()
    assert all((found.related[k].after == outcomes.related[k].after).all() for k in found.related)
    assert (run.path / "run.json").read_text() == written


def test_a_run_from_another_model(run, tmp_path):
    other = jaxneurons.load(write_lm(tmp_path / "other", seed=1))
    with pytest.raises(DataError, match="give the model of the run"):
        open_run(run.path, other)


def test_no_run_there(tmp_path):
    with pytest.raises(DataError, match="no finished run"):
        open_run(tmp_path)


def test_a_damaged_run(run, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(run.path, copy)
    (copy / "queries.jsonl").write_text('{"id": "x"}\n')
    with pytest.raises(DataError, match=r"queries\.jsonl: query 1: no .*--queries QUERIES --out "):
        open_run(copy, run.lm)


# --- analyses -------------------------------------------------------------------------------------


def test_neurons_are_accumulated_by_group(run):
    rows = neuron_rows(run)
    for group, members in run.groups.items():
        weight = {}
        for query in members:
            found = run[query]
            for neuron, naica in zip(found.ranking, found.naica, strict=True):
                weight.setdefault(neuron, []).append(naica)
        own = {(r["layer"], r["index"]): r for r in rows if r["group"] == group}
        assert set(own) == set(weight)
        for neuron, values in weight.items():
            assert own[neuron]["queries"] == len(values)
            assert own[neuron]["naica"] == pytest.approx(sum(values))


def test_counts_layers_and_overlap_agree_with_the_sets(run):
    rows = neuron_rows(run)
    sets = {
        group: [run[query].ranking for query in members] for group, members in run.groups.items()
    }
    counts = {row["group"]: row for row in count_rows(run)}
    for group, each in sets.items():
        assert counts[group]["mean"] == pytest.approx(np.mean([len(s) for s in each]))
        assert counts[group]["different"] == len({n for s in each for n in s})
    layers = layer_rows(run, rows)
    for group, each in sets.items():
        own = [row for row in layers if row["group"] == group]
        assert [row["layer"] for row in own] == list(range(LAYERS))
        want = np.bincount([n.layer for s in each for n in s], minlength=LAYERS)
        assert [row["neurons"] for row in own] == want.tolist()
        assert sum(row["share"] for row in own) == pytest.approx(1)
    a, b = ({n for s in sets[g] for n in s} for g in ("biology", "physics"))
    for row in overlap_rows(rows):
        if (row["group"], row["other"]) == ("biology", "physics"):
            assert row["overlap"] == pytest.approx(len(a & b) / len(a))
            assert row["jaccard"] == pytest.approx(len(a & b) / len(a | b))
        if row["group"] == row["other"]:
            assert row["overlap"] == row["jaccard"] == 1


def test_words_are_the_ends_of_the_unembedded_row(run):
    lm = run.lm
    neurons = run["q1"].ranking[:2]
    ranking = Ranking(tuple(neurons), "up")
    down = np.asarray(lm.params["layers"]["ffn"]["down"]["kernel"])
    table = (
        np.asarray(lm.params["embed"]["embedding"]).T
        if lm.config.tied
        else np.asarray(lm.params["unembed"]["kernel"])
    )
    for neuron, (promotes, demotes) in zip(neurons, words(lm, ranking, count=3), strict=True):
        logits = (down[neuron] * np.asarray(lm.params["final_norm"]["scale"])) @ table
        order = np.argsort(logits)
        assert promotes == [lm.tokenizer.decode([i]) for i in order[::-1][:3]]
        assert demotes == [lm.tokenizer.decode([i]) for i in order[:3]]
    rows = word_rows(run, neuron_rows(run), count=2)
    assert [row["group"] for row in rows].count("physics") == 2
    assert [row["group"] for row in rows].count("common") == len(run.common)


def test_average_overlap():
    assert average_overlap("abc", "abc") == 1
    assert average_overlap("abc", "xyz") == 0
    assert average_overlap("ab", "ba") == pytest.approx((0 + 1) / 2)
    assert average_overlap("abcd", "ab") == pytest.approx((1 + 1 + 2 / 3 + 2 / 4) / 4)


def test_balanced_takes_of_each_group(run):
    chosen = balanced(run.queries, 7)
    assert len(chosen) == 7
    groups = [query.group for query in chosen]
    assert sorted(map(groups.count, set(groups))) == [3, 4]
    assert chosen == [query for query in run.queries if query in chosen]


@pytest.mark.slow
def test_kinds_of_neurons_on_the_same_queries(run, tmp_path):
    pairs, effects = kind_rows(run, limit=8, out=tmp_path)
    assert [(row["site"], row["other"]) for row in pairs] == [
        ("up", "gate"),
        ("up", "act"),
        ("gate", "act"),
    ]
    neurons = {
        site: {
            line["id"]: set(map(tuple, line["neurons"]))
            for line in map(
                json.loads,
                (tmp_path / "sites" / f"{site}-8" / "neurons.jsonl").read_text().splitlines(),
            )
        }
        for site in ("up", "gate", "act")
    }
    for row in pairs:
        a, b = neurons[row["site"]], neurons[row["other"]]
        assert a.keys() == b.keys()
        assert row["queries"] == len(a) == 8
        shared = [len(a[query] & b[query]) / len(a[query] | b[query]) for query in a]
        assert row["jaccard"] == pytest.approx(np.mean(shared))
    assert pairs[1]["jaccard"] == 1  # they multiply each other: scaling either is the same
    assert pairs[0]["jaccard"] < 1
    assert {row["site"] for row in effects} == {"up", "gate", "act"}
    assert {row["method"] for row in effects} == {"QRNCA", MATCHED}


def test_a_run_agrees_with_itself(run):
    rows = against_rows(run, open_run(run.path, run.lm), "itself")
    assert [row["group"] for row in rows] == ["all", "physics", "biology"]
    assert all(row["jaccard"] == row["average_overlap"] == 1 for row in rows)
    assert {row["other"] for row in rows} == {"itself"}
    assert rows[0]["jaccard_other_query"] < 1


# --- prediction -----------------------------------------------------------------------------------


def test_what_is_read_off_is_what_the_plain_model_has(run):
    """Activations with a letter put, and logit contributions, one prompt and letter at a time."""
    lm = run.lm
    prompts = run.encoded
    where = np.array([[0, 5], [2, 60], [1, 7]], np.int32)
    batch = batches.plan(prompts, 4)[0]
    at = jnp.broadcast_to(where, (len(batch.index), 3, 2))
    chance, seen, added = _read(lm.params, batch, at, config=lm.config, site="up")
    down = np.asarray(lm.params["layers"]["ffn"]["down"]["kernel"])
    weight = np.asarray(lm.params["final_norm"]["scale"])
    for row, index in enumerate(batch.index.tolist()):
        prompt = prompts[index]
        tokens = jnp.array([prompt.prompt])
        out = plain(lm.params, tokens, config=lm.config, capture=("act",))
        logp = np.asarray(jax.nn.log_softmax(out.logits[0, -1]))
        np.testing.assert_allclose(
            chance[row], logp[[token for (token,) in prompt.options]], atol=1e-4
        )
        act = np.asarray(out.activations["act"])
        for o, (token,) in enumerate(prompt.options):
            put = jnp.array([[*prompt.prompt, token]])
            with_it = plain(lm.params, put, config=lm.config, capture=("up",))
            up = np.asarray(with_it.activations["up"])
            said = (
                np.asarray(lm.params["embed"]["embedding"])[token]
                if lm.config.tied
                else np.asarray(lm.params["unembed"]["kernel"])[:, token]
            )
            for n, (layer, neuron) in enumerate(where):
                want = up[layer, 0, 0, neuron]
                assert seen[row, o, n] == pytest.approx(want, rel=CLOSE, abs=CLOSE)
                want = act[layer, 0, 0, neuron] * (down[layer, neuron] * weight) @ said
                assert added[row, o, n] == pytest.approx(want, rel=CLOSE, abs=CLOSE)


def test_pools_come_from_the_other_half_alone(run):
    half = halves(run.groups)
    for members in run.groups.values():
        assert sorted(half[query] for query in members) == [0] * 3 + [1] * 3
    found = pools(run, half, 0)
    # What the other half's prompts say must not matter.
    emptied = {
        name: prompts
        if half[name] == 0
        else [p._replace(neurons=(p.neurons + 7) % (LAYERS * WIDTH)) for p in prompts]
        for name, prompts in run.prompts.items()
    }
    changed = dataclasses.replace(run, prompts=emptied)
    assert pools(changed, half, 0) == found
    assert pools(changed, half, 1) != pools(run, half, 1)  # and where they count, they do


def test_prediction_table(run, monkeypatch):
    rows = predict(run)
    groups = ["all", *run.groups]
    assert [row["group"] for row in rows if row["readout"] == "chance"] == groups
    assert all(row["accuracy"] == 0.25 for row in rows if row["readout"] == "chance")
    prompting = [row for row in rows if row["readout"] == "prompting"]
    correct = [p.correct for found in run.prompts.values() for p in found]
    assert prompting[0]["accuracy"] == pytest.approx(np.mean(correct))
    for readout in READOUTS:
        own = [r for r in rows if r["readout"] == readout and r["group"] == "all"]
        assert [row["pool"] for row in own] == ["own", "another group's", "random"]
        for row in own:
            groups = [r for r in rows if (r["readout"], r["pool"]) == (readout, row["pool"])]
            of_groups = [r["accuracy"] for r in groups if r["group"] != "all"]
            assert row["accuracy"] == pytest.approx(np.mean(of_groups))  # of equal sizes
            assert row["accuracy_low"] <= row["accuracy"] <= row["accuracy_high"]
    monkeypatch.setattr(prediction, "_read", None)
    assert predict(run) == rows  # from what was kept


def test_readouts_of_activations_that_are_known(run, monkeypatch):
    """Every neuron falls at the right letter and writes it: alone the sum goes wrong."""

    def read(params, batch, at, *, config, site):
        chance = np.eye(4)[batch.answers_by_option.argmax(1)]
        direct = np.repeat(chance[..., None], at.shape[1], axis=-1)
        return chance, -direct, direct

    monkeypatch.setattr(prediction, "_read", read)
    rows = predict(run, seed=1)
    accuracy = {"prompting": 1, "presented": 0, "signed": 1, "direct": 1, "chance": 0.25}
    assert {row["readout"] for row in rows} == set(accuracy)
    assert all(row["accuracy"] == accuracy[row["readout"]] for row in rows)


def test_prediction_needs_options(lm, tmp_path):
    queries = read_queries(write_queries(tmp_path / "q.json", cloze(8)))
    free = located_run(lm, queries, out=tmp_path / "run", settings=SETTINGS)
    with pytest.raises(DataError, match="has no options"):
        predict(free)
