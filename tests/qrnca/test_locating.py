"""Locating on a tiny model: what is written, and that nothing depends on how it was run."""

import dataclasses
import functools
import json
import math
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.fixtures import cloze, multi_choice, write_lm, write_queries

import jaxneurons
from jaxneurons.engine.attribution import integrated_gradients
from jaxneurons.engine.quadrature import Quadrature
from jaxneurons.errors import ConfigError, DataError, JaxneuronsError
from jaxneurons.neurons.sets import Neuron
from jaxneurons.prompts import batches
from jaxneurons.prompts.queries import read_queries
from jaxneurons.qrnca import method as qrnca
from jaxneurons.qrnca.caveats import LowOptionMassWarning, UnresolvedWarning
from jaxneurons.qrnca.encoding import encode_queries
from jaxneurons.qrnca.files import read_facts
from jaxneurons.qrnca.locating import locate
from jaxneurons.qrnca.method import QRNCAConfig
from jaxneurons.qrnca.opening import open_run, source_of
from jaxneurons.qrnca.views import show_located

# A random model says anything rather than the answer.
pytestmark = pytest.mark.filterwarnings("ignore::jaxneurons.qrnca.caveats.UnlikelyAnswerWarning")

SETTINGS = QRNCAConfig(quadrature=Quadrature("gauss", 2))
WIDTH, LAYERS = 64, 3
RESULTS = ("neurons.jsonl", "common_neurons.json")


@pytest.fixture(scope="module")
def lm(tmp_path_factory):
    return jaxneurons.load(write_lm(tmp_path_factory.mktemp("model")))


@pytest.fixture(scope="module")
def queries(tmp_path_factory):
    """Cloze queries: two lengths of answer, so several shapes."""
    path = tmp_path_factory.mktemp("queries") / "cloze.json"
    return read_queries(write_queries(path, cloze(6)))


@pytest.fixture(scope="module")
def whole(lm, queries, tmp_path_factory):
    """An uninterrupted run: (what was returned, its directory)."""
    out = tmp_path_factory.mktemp("whole") / "run"
    return locate(lm, queries, out=out, settings=SETTINGS, batch_size=2, cache_bytes=1 << 28), out


def contents(out):
    return [(out / name).read_bytes() for name in RESULTS]


# --- the files ------------------------------------------------------------------------------------


def test_neurons_file(whole, queries):
    located, out = whole
    lines = [json.loads(line) for line in (out / "neurons.jsonl").read_text().splitlines()]
    assert [line["id"] for line in lines] == [query.id for query in queries]
    assert [line["group"] for line in lines] == [query.group for query in queries]
    assert any(line["neurons"] for line in lines)
    for line in lines:
        found = located.neurons[line["id"]]
        assert [Neuron(*neuron) for neuron in line["neurons"]] == found.ranking
        assert (line["naica"], line["na"], line["ica"]) == (found.naica, found.na, found.ica)
        assert line["naica"] == sorted(line["naica"], reverse=True)
        assert all(value > 0 for value in line["naica"])
        assert all(0 <= a < LAYERS and 0 <= b < WIDTH for a, b in line["neurons"])
        assert len(line["probabilities"]) == len(line["correct"]) == 2
        assert line["probability"] == pytest.approx(np.mean(line["probabilities"]))
        assert line["option_mass"] is None
        assert 0 <= line["gap_max"] < 1


def test_common_file(whole):
    located, out = whole
    common = json.loads((out / "common_neurons.json").read_text())
    assert common["clusters"] == 6
    assert [(Neuron(*c["neuron"]), c["clusters"]) for c in common["neurons"]] == located.common
    assert all(c["share"] == c["clusters"] / 6 > 0.3 for c in common["neurons"])


def test_run_file(whole, lm):
    located, out = whole
    run = json.loads((out / "run.json").read_text())
    assert run == json.loads(json.dumps(located.facts))
    assert run["model"]["sha256"] == lm.hash
    assert run["model"]["tokenizer_sha256"] == lm.tokenizer_hash
    assert (run["model"]["source"], run["model"]["dtype"]) == (lm.source, "float32")
    assert run["settings"]["quadrature"]["rule"] == "gauss"
    assert (run["queries"], run["prompts"]) == (6, 12)
    assert run["groups"] == {"language": 3, "capital": 3}
    assert run["answers"]["option_mass_mean"] is None
    assert 0 <= run["completeness"]["gap_median"] <= run["completeness"]["gap_max"]
    assert 0 <= run["completeness"]["gap_max_layer"] < LAYERS
    assert run["completeness"]["nodes_mean"] >= 2 * LAYERS
    assert run["versions"]["jaxneurons"] == jaxneurons.__version__
    assert run["seconds"]["attribution"] > 0


def places(value, path=()):
    """The paths of all values in a JSON value, its own first."""
    yield path
    items = value.items() if isinstance(value, dict) else ()
    for key, inner in items:
        yield from places(inner, (*path, key))


def changed(value, path, new):
    """A copy with another value at a path; without the key, where it is KeyError."""
    if not path:
        return None if new is KeyError else new
    copy = dict(value)
    copy[path[0]] = changed(copy[path[0]], path[1:], new)
    if len(path) == 1 and new is KeyError:
        del copy[path[0]]
    return copy


ODD = [KeyError, None, True, -1, 2.5, math.nan, "x", [], {}, [1], {"a": 1}]


def test_every_value_of_the_run_file_replaced(whole, tmp_path):
    """What is read of it is checked; the rest may be anything."""
    located, out = whole
    facts = json.loads((out / "run.json").read_text())
    identity = json.loads((out / "parts" / "identity.json").read_text())
    taken = 0
    for path in places(facts):
        for odd in ODD:
            made = changed(facts, path, odd)
            (tmp_path / "run.json").write_text(json.dumps(made))
            try:
                read = read_facts(tmp_path / "run.json", identity)
            except DataError:
                continue
            taken += 1
            show_located(dataclasses.replace(located, facts=read), tmp_path)
            assert path[0] != "settings" or made == facts
    assert 100 < taken < len(list(places(facts))) * len(ODD) - 100
    (tmp_path / "run.json").write_text(json.dumps(facts))
    assert read_facts(tmp_path / "run.json", identity) == facts
    with pytest.raises(DataError, match=r"none\.json: cannot be read"):
        read_facts(tmp_path / "none.json", identity)


@pytest.mark.parametrize(
    ("path", "new"),
    [
        ((), "["),
        ((), 3),
        (("model",), KeyError),
        (("model", "sha256"), "x"),
        (("settings",), KeyError),
        (("settings",), 3),
        (("settings", "top"), 7),
        (("settings",), {}),
        (("answers",), 0.5),
        (("answers", "option_mass_mean"), KeyError),
        (("completeness", "gap_max"), None),
        (("seconds",), KeyError),
    ],
)
def test_a_damaged_run_file(whole, lm, queries, tmp_path, path, new):
    """Opening says how to mend it and changes nothing; `locate` writes it anew."""
    _, out = whole
    copy = tmp_path / "run"
    shutil.copytree(out, copy)
    facts = json.loads((out / "run.json").read_text())
    damaged = "[" if new == "[" else json.dumps(changed(facts, path, new))
    (copy / "run.json").write_text(damaged)
    with pytest.raises(DataError, match=r"run\.json: .*`jaxneurons qrnca locate .*` makes"):
        open_run(copy, lm)
    assert (copy / "run.json").read_text() == damaged
    if path[:1] in ((), ("model",)) and path != ("model", "sha256"):
        with pytest.raises(DataError, match=r"run\.json: .*; give the model with --model, or `jax"):
            source_of(copy)
    else:
        assert source_of(copy) == lm.source
    made = locate(lm, queries, out=copy, settings=SETTINGS, batch_size=2)
    assert json.loads(json.dumps(made.facts)) == facts
    assert json.loads((copy / "run.json").read_text()) == facts
    assert contents(copy) == contents(out)
    assert open_run(copy, lm).settings == SETTINGS


@pytest.mark.parametrize("name", ["parts/identity.json", "queries.jsonl"])
def test_what_a_run_is_opened_with_is_checked(whole, lm, tmp_path, name):
    _, out = whole
    copy = tmp_path / "run"
    shutil.copytree(out, copy)
    text = (out / name).read_text()
    text, rest = text.split("\n", 1) if name == "queries.jsonl" else (text, "")
    first = json.loads(text)
    for path in places(first):
        for odd in ODD:
            made = changed(first, path, odd)
            if path[:1] == ("settings",) and odd not in (KeyError, None, "x"):
                continue  # test_typed_json.py has them
            (copy / name).write_text(json.dumps(made) + "\n" + rest)
            message = None
            try:
                assert open_run(copy, lm).encoded
            except JaxneuronsError as error:
                message = str(error)
            if name == "queries.jsonl" and path == ("separators",) and odd is KeyError:
                made = first  # none is stated either way
            assert (message is None) == (made == first), (path, odd)
            assert message is None or str(copy) in message


def test_no_litter(whole):
    _, out = whole
    names = (*RESULTS, "queries.jsonl", "run.json", "parts", "caches")
    assert sorted(p.name for p in out.iterdir()) == sorted(names)


# --- scores ---------------------------------------------------------------------------------------


def test_scores_are_those_of_each_prompt_alone(whole, lm, queries):
    located, _ = whole
    prompts = encode_queries(lm, queries, SETTINGS)
    assert len({len(prompt.answer) for prompt in prompts}) > 1
    assert len({len(prompt.prompt) for prompt in prompts}) > 1
    run = jax.jit(
        functools.partial(integrated_gradients, config=lm.config, quadrature=SETTINGS.quadrature)
    )
    found = [scores for query in queries for scores in located.prompts[query.id]]
    for prompt, scores in list(zip(prompts, found, strict=True))[:8:2]:
        alone = run(lm.params, jnp.array([prompt.prompt]), jnp.array([prompt.answer]))
        flat = np.asarray(alone.scores).reshape(-1)
        np.testing.assert_allclose(scores.scores, flat[scores.neurons], rtol=1e-5, atol=1e-7)
        assert scores.neurons.tolist() == qrnca.coarse(flat, 0.2).tolist()
        assert scores.probability == pytest.approx(float(alone.probability[0]), rel=1e-5)
        np.testing.assert_allclose(scores.gap, alone.gap[0], atol=1e-6)
        # Each score to 1e-5 of itself, as above.
        close = 1e-5 * float(np.abs(flat).sum())
        assert scores.total == pytest.approx(float(flat.sum(dtype=np.float64)), abs=close)


def test_result_is_merge_and_rank_of_the_prompts(whole):
    located, _ = whole
    clusters = {name: qrnca.merge(found, SETTINGS) for name, found in located.prompts.items()}
    neurons, common = qrnca.rank(clusters, width=WIDTH, settings=SETTINGS)
    assert (neurons, common) == (located.neurons, located.common)


def test_site_and_number_of_prompts(lm, queries, tmp_path):
    settings = QRNCAConfig(quadrature=Quadrature("gauss", 2), site="down", prompts=1)
    located = locate(lm, queries[:4], out=tmp_path / "run", settings=settings)
    assert all(len(found) == 1 for found in located.prompts.values())
    found = [n for each in located.neurons.values() for n in each.ranking]
    assert found
    assert max(neuron.index for neuron in found) < lm.config.hidden_size


# --- multi-choice ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def choices(tmp_path_factory):
    path = tmp_path_factory.mktemp("queries") / "choice.json"
    return read_queries(write_queries(path, multi_choice(4)))


def test_low_option_mass_is_warned_of(lm, choices, tmp_path):
    """A random model knows nothing of letters: four of 363 tokens hold little."""
    with pytest.warns(LowOptionMassWarning, match=r"options hold only \d+\.\d% of the prob"):
        located = locate(lm, choices, out=tmp_path / "run", settings=SETTINGS)
    prompts = encode_queries(lm, choices, SETTINGS)
    found = [scores for query in choices for scores in located.prompts[query.id]]
    logits = jax.jit(functools.partial(jaxneurons.forward, config=lm.config))
    for prompt, scores in list(zip(prompts, found, strict=True))[:6]:
        out = logits(lm.params, jnp.array([prompt.prompt]))
        p = np.asarray(jax.nn.softmax(out.logits[0, -1]))
        options = p[[token for (token,) in prompt.options]]
        assert scores.option_mass == pytest.approx(options.sum(), rel=1e-4)
        assert scores.probability == pytest.approx(p[prompt.answer[0]], rel=1e-4)
        assert scores.correct == (prompt.options[options.argmax()] == prompt.answer)
    run = json.loads((tmp_path / "run" / "run.json").read_text())
    masses = [scores.option_mass for scores in found]
    assert run["answers"]["option_mass_mean"] == pytest.approx(np.mean(masses))
    assert run["answers"]["option_mass_min"] == min(masses)
    assert run["answers"]["option_mass_low_prompts"] == sum(m < 0.5 for m in masses)
    assert run["answers"]["accuracy"] == np.mean([scores.correct for scores in found])
    line = json.loads((tmp_path / "run" / "neurons.jsonl").read_text().splitlines()[0])
    assert line["option_mass"] == [scores.option_mass for scores in located.prompts["q0"]]


def test_high_option_mass_is_not(lm, choices, tmp_path, monkeypatch):
    monkeypatch.setattr("jaxneurons.qrnca.caveats.LOW_OPTION_MASS", 0.0)
    located = locate(lm, choices, out=tmp_path / "run", settings=SETTINGS)
    assert not any(math.isnan(s.option_mass) for each in located.prompts.values() for s in each)


def test_reference_form_takes_bare_letters(lm, choices):
    context = encode_queries(lm, choices, QRNCAConfig())
    bare = encode_queries(lm, choices, QRNCAConfig.reference())
    names = lm.tokenizer.convert_ids_to_tokens
    assert [names(list(p.answer)) for p in context[:3]] == [["ĠA"], ["ĠB"], ["ĠC"]]
    assert [names(list(p.answer)) for p in bare[:3]] == [["A"], ["B"], ["C"]]
    assert [p.prompt for p in bare] == [p.prompt for p in context]


# --- stopped and taken up again -------------------------------------------------------------------


@pytest.mark.parametrize("after", [0, 1, 3])
def test_stopped_run_gives_the_same_bytes(whole, lm, queries, tmp_path, after):
    out = tmp_path / "run"
    calls = []

    def stop(done, total):
        calls.append((done, total))
        if len(calls) > after:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        locate(
            lm,
            queries,
            out=out,
            settings=SETTINGS,
            batch_size=2,
            cache_bytes=1 << 28,
            progress=stop,
        )
    assert {p.name for p in out.iterdir()} == {"queries.jsonl", "parts", "caches"}  # and no results
    assert len(list((out / "parts").glob("*.npz"))) == after + 1
    again = []
    located = locate(
        lm, queries, out=out, settings=SETTINGS, batch_size=2, progress=lambda *a: again.append(a)
    )
    assert contents(out) == contents(whole[1])
    assert located.neurons == whole[0].neurons
    assert again[: len(calls)] == calls
    assert again[-1] == (12, 12)


def test_stop_in_the_middle_of_a_batch(whole, lm, queries, tmp_path, monkeypatch):
    """As kill -9 does: parts that are there are not computed again, the others are."""
    out, real, computed = tmp_path / "run", qrnca.attribute_batch, []

    def counted(*args, **options):
        computed.append(1)
        if len(computed) == 3:
            raise SystemExit
        return real(*args, **options)

    monkeypatch.setattr(qrnca, "attribute_batch", counted)
    with pytest.raises(SystemExit):
        locate(lm, queries, out=out, settings=SETTINGS, batch_size=2)
    assert len(list((out / "parts").glob("*.npz"))) == 2
    (out / "parts" / "00000.npz").write_bytes(b"damaged")
    del computed[:]
    monkeypatch.setattr(
        qrnca, "attribute_batch", lambda *a, **o: computed.append(1) or real(*a, **o)
    )
    locate(lm, queries, out=out, settings=SETTINGS, batch_size=2)
    total = len(batches.plan(encode_queries(lm, queries, SETTINGS), 2))
    assert len(computed) == total - 1
    assert contents(out) == contents(whole[1])


def test_finished_run_computes_nothing_again(whole, lm, queries, monkeypatch):
    located, out = whole
    before = contents(out)
    monkeypatch.setattr(qrnca, "attribute_batch", None)
    again = locate(lm, queries, out=out, settings=SETTINGS, batch_size=2)
    assert (contents(out), again.neurons) == (before, located.neurons)


def test_batch_size_does_not_matter(whole, lm, queries, tmp_path):
    located, _ = whole
    other = locate(lm, queries, out=tmp_path / "run", settings=SETTINGS, batch_size=5)
    assert other.common == located.common
    for name, found in other.neurons.items():
        assert found.ranking == located[name].ranking
        np.testing.assert_allclose(found.naica, located.neurons[name].naica, rtol=1e-4)


def test_other_settings_data_or_model_in_the_same_directory(whole, lm, queries, tmp_path):
    _, out = whole
    before = contents(out)
    settings = QRNCAConfig(quadrature=Quadrature("gauss", 5))
    with pytest.raises(DataError, match="holds a run with other settings"):
        locate(lm, queries, out=out, settings=settings, batch_size=2)
    with pytest.raises(DataError, match="other queries"):
        locate(lm, queries[:5], out=out, settings=SETTINGS, batch_size=2)
    with pytest.raises(DataError, match="another batch size"):
        locate(lm, queries, out=out, settings=SETTINGS, batch_size=3)
    other = jaxneurons.load(write_lm(tmp_path / "model", seed=1))
    with pytest.raises(DataError, match="another model"):
        locate(other, queries, out=out, settings=SETTINGS, batch_size=2)
    half = jaxneurons.load(lm.source, dtype=jnp.bfloat16)
    with pytest.raises(DataError, match="another dtype"):
        locate(half, queries, out=out, settings=SETTINGS, batch_size=2)
    assert contents(out) == before


# --- refused before anything is written -----------------------------------------------------------


def read(tmp_path, records):
    return read_queries(write_queries(tmp_path / "queries.json", records))


def test_long_prompt_names_its_query(lm, tmp_path):
    records = cloze(4)
    records[2]["prompts"][1] = "The capital of Italy is " * 40 + "not"
    with pytest.raises(DataError, match=r"query 'fact-2', prompt 2: .* \d+ tokens.*holds 128"):
        locate(lm, read(tmp_path, records), out=tmp_path / "run", settings=SETTINGS)
    assert not (tmp_path / "run").exists()


def test_trailing_space_names_its_query(lm, tmp_path):
    records = cloze(4)
    records[3]["prompts"][0] += " "
    with pytest.raises(DataError, match=r"query 'fact-3', prompt 1: .*trailing space"):
        locate(lm, read(tmp_path, records), out=tmp_path / "run", settings=SETTINGS)


def test_too_few_queries(lm, queries, tmp_path):
    with pytest.raises(DataError, match="one query only"):
        locate(lm, queries[:1], out=tmp_path / "run", settings=SETTINGS)
    with pytest.raises(DataError, match="3 queries leave no neurons"):
        locate(lm, queries[:3], out=tmp_path / "run", settings=SETTINGS)
    with pytest.raises(ConfigError, match="batch size"):
        locate(lm, queries, out=tmp_path / "run", settings=SETTINGS, batch_size=-1)
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_scores_that_are_not_converged_are_warned_of(lm, queries, tmp_path, monkeypatch):
    """As few nodes as there may be, and a gap that they leave."""
    settings = QRNCAConfig(quadrature=Quadrature(max_nodes=5), prompts=1)
    monkeypatch.setattr("jaxneurons.qrnca.caveats.LARGE_GAP", 0.0)
    message = r"not converged \(largest: .*--max-nodes 20"
    with pytest.warns(UnresolvedWarning, match=message) as said:
        located = locate(lm, queries, out=tmp_path / "run", settings=settings)
    gaps = {name: float(found[0].gap.max()) for name, found in located.prompts.items()}
    largest = max(gaps, key=gaps.__getitem__)
    assert f"{gaps[largest]:.2g} in layer" in str(said[0].message)
    assert f"query {largest!r}, prompt 1" in str(said[0].message)
    assert json.loads((tmp_path / "run" / "run.json").read_text())["completeness"]["gap_max"] == (
        pytest.approx(gaps[largest])
    )
