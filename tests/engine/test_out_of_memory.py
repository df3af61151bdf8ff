"""Memory that runs out: less is run at once, with a warning, and the same comes out."""

import functools
import re
import warnings

import jax
import numpy as np
import pytest
from support.models import tiny_config, tiny_params

import jaxneurons
from jaxneurons.engine import SmallerChunkWarning, ablate, ablation, generate, responses, texts
from jaxneurons.engine.out_of_memory import ChunkSize
from jaxneurons.engine.responses import ResponseStore, mean_responses

CONFIG = tiny_config()
RNG = np.random.default_rng(0)


class ExhaustedError(RuntimeError):
    """As XLA's: its message says it."""

    def __init__(self):
        super().__init__("RESOURCE_EXHAUSTED: Out of memory allocating 1234 bytes.")


def test_halved_until_it_fits():
    tried = []

    def function(size):
        tried.append(size)
        if size > 20:
            raise ExhaustedError
        return size

    chunk = ChunkSize(100, what="prompts", least=3)
    with pytest.warns(SmallerChunkWarning) as warned:
        assert chunk.run(function) == 12
    assert re.search("100 prompts at once .*1234.* with 50", str(warned[0].message))
    assert tried == [100, 50, 25, 12]
    assert chunk.run(function) == 12  # and not tried with more again
    assert tried[4:] == [12]


def test_what_failed_halves_later_calls_by_as_much_and_no_more():
    def function(size):
        if size > limit:
            raise ExhaustedError
        return size

    chunk, limit = ChunkSize(64, what="prompts"), 1
    with pytest.warns(SmallerChunkWarning):
        assert chunk.run(function, most=2) == 1  # long prompts
    limit = 64
    assert chunk.run(function) == 32  # short ones
    assert chunk.run(function, most=8) == 4


@pytest.mark.parametrize(("count", "parts", "limit"), [(8, 1, 2), (8, 4, 4), (6, 2, 3), (1, 1, 1)])
def test_rows_in_parts_that_the_devices_divide(count, parts, limit):
    rows, sizes = np.arange(3 * count).reshape(3, count), []

    def function(first, end):
        sizes.append(end - first)
        if end - first > limit:
            raise ExhaustedError
        return {"rows": rows[:, first:end]}

    chunk = ChunkSize(32, what="prompts")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        made = chunk.run_rows(function, count, axis=1, parts=parts)
    np.testing.assert_array_equal(made["rows"], rows)
    assert sizes[0] == count  # not more than there is
    assert [size % parts for size in sizes] == [0] * len(sizes)
    assert len(caught) == sum(size > limit for size in sizes)


def test_fewer_rows_than_devices_are_not_tried():
    def function(first, end):
        raise ExhaustedError

    with pytest.raises(ExhaustedError), pytest.warns(SmallerChunkWarning) as warned:
        ChunkSize(8, what="prompts").run_rows(function, 8, axis=0, parts=4)
    assert len(warned) == 1


def test_the_least_is_tried_and_then_the_error_is_the_callers():
    tried = []

    def function(size):
        tried.append(size)
        raise MemoryError

    with pytest.raises(MemoryError), pytest.warns(SmallerChunkWarning):
        ChunkSize(8, what="edits", least=3).run(function)
    assert tried == [8, 4, 3]


def test_other_errors_pass():
    def function(size):
        raise RuntimeError("INTERNAL: something else")

    with pytest.raises(RuntimeError, match="something else"):
        ChunkSize(8, what="edits").run(function)


def test_the_arrays_of_a_call_that_failed_are_gone():
    import gc
    import weakref

    alive = []

    class Large:
        pass

    def function(size):
        large = Large()
        alive.append(weakref.ref(large))
        if size > 1:
            raise ExhaustedError
        gc.collect()
        return [reference() is None for reference in alive[:-1]]

    with pytest.warns(SmallerChunkWarning):
        assert ChunkSize(4, what="prompts").run(function) == [True, True]


def failing_above(monkeypatch, module, name, size, rows=lambda arguments: len(arguments[1])):
    """Let a function of a module run out of memory on more than so many rows."""
    function, calls = getattr(module, name), []

    def limited(*arguments, **options):
        calls.append(rows(arguments))
        if calls[-1] > size:
            raise ExhaustedError
        return function(*arguments, **options)

    monkeypatch.setattr(module, name, limited)
    return calls


def test_responses_go_on_with_fewer_prompts(monkeypatch):
    params = tiny_params(CONFIG)
    prompts = [tuple(RNG.integers(0, CONFIG.vocab_size, n).tolist()) for n in (5, 3, 6, 4, 8, 2)]
    monkeypatch.setattr(responses, "ROWS", 4)
    whole = ResponseStore(None, prompts, config=CONFIG)
    whole.fill(params, ["up", "down"])
    calls = failing_above(monkeypatch, responses, "mean_responses", 1)
    parts = ResponseStore(None, prompts, config=CONFIG)
    with pytest.warns(SmallerChunkWarning) as warned:
        parts.fill(params, ["up", "down"])
    assert re.search("4 prompts at once", str(warned[0].message))
    assert calls[:4] == [4, 2, 1, 1]
    assert max(calls[3:]) == 1
    for site in ("up", "down"):
        for layer in range(CONFIG.num_layers):
            np.testing.assert_allclose(
                parts.read(site, layer), whole.read(site, layer), rtol=1e-5, atol=1e-6
            )
    assert mean_responses is not responses.mean_responses


def test_locating_goes_on_with_fewer_rows(monkeypatch):
    from jaxneurons.qrnca import method

    lm = jaxneurons.load("lab")
    queries = jaxneurons.qrnca.bundled_queries("lab-cloze")[::160]
    settings = jaxneurons.qrnca.QRNCAConfig(prompts=1)
    whole = jaxneurons.qrnca.locate(lm, queries, settings=settings)
    attribute, budgets = method._attribute, []

    def limited(*arguments, memory_budget, **options):
        budgets.append(memory_budget)
        if memory_budget > 1 << 28:
            raise ExhaustedError
        return attribute(*arguments, memory_budget=memory_budget, **options)

    monkeypatch.setattr(method, "_attribute", limited)
    with pytest.warns(SmallerChunkWarning) as warned:
        parts = jaxneurons.qrnca.locate(lm, queries, settings=settings)
    assert re.search("bytes of rows", str(warned[0].message))
    assert budgets[:3] == [1 << 30, 1 << 29, 1 << 28]
    assert set(budgets[3:]) <= {1 << 28}  # the next batches begin there
    for name, scores in whole.prompts.items():
        for one, other in zip(scores, parts.prompts[name], strict=True):
            np.testing.assert_array_equal(one.neurons, other.neurons)
            np.testing.assert_allclose(one.scores, other.scores, rtol=1e-4, atol=1e-7)


@pytest.mark.slow
def test_measures_go_on_with_fewer_edits(monkeypatch):
    from jaxneurons.edit import measures

    lm = jaxneurons.load("lab")
    requests = jaxneurons.edit.lab_requests(3)
    settings = jaxneurons.edit.MeasureSettings(steps=2, fluency_tokens=4, perplexity_tokens=0)
    rng = np.random.default_rng(1)
    shapes = ((lm.config.intermediate_size, 1), (1, lm.config.hidden_size))
    changes = [
        (jaxneurons.edit.LowRank("ffn.down", 1, *(rng.normal(0, 0.2, s) for s in shapes)),)
        for _ in requests
    ]
    whole = jaxneurons.edit.measure(lm, requests, changes, settings=settings)
    # Parameters before the edits, changes, tokens: the first axis is that of edits.
    calls = failing_above(monkeypatch, measures, "score_answers", 1, lambda a: len(a[2]))
    with pytest.warns(SmallerChunkWarning) as warned:
        parts = jaxneurons.edit.measure(lm, requests, changes, settings=settings)
    assert re.search("edits at once", str(warned[0].message))
    assert max(calls) > 1
    assert calls[-1] == 1
    for one, other in zip(whole, parts, strict=True):
        assert one["generated"] == other["generated"]
        assert one["probability_new"] == pytest.approx(other["probability_new"], rel=1e-4)
        assert one["locality_kl"] == pytest.approx(other["locality_kl"], rel=1e-3, abs=1e-7)


def test_generations_go_on_with_fewer_prompts(monkeypatch):
    lm = jaxneurons.load("lab")
    prompts = ["the city of", "a", "the river in the", "some people"]
    sets = {"some": jaxneurons.NeuronSet.of(up=[(1, 3), (2, 5)])}
    scales = np.ones((4, lm.config.num_layers, lm.config.intermediate_size), np.float32)
    scales[2:, 1] = 0
    whole = ablate(lm, prompts, sets, steps=3), generate(lm, prompts, scales={"up": scales})
    calls = failing_above(monkeypatch, ablation, "generate_ablated", 1)
    with pytest.warns(SmallerChunkWarning) as warned:
        parts = ablate(lm, prompts, sets, steps=3)
    assert [re.search(r"\d prompts at once", str(w.message))[0][0] for w in warned] == ["4", "2"]
    assert calls == [4, 2, 1, 1, 1, 1]
    calls = failing_above(monkeypatch, texts, "_greedy", 2)
    with pytest.warns(SmallerChunkWarning):
        assert (parts, generate(lm, prompts, scales={"up": scales})) == whole
    assert calls[-2:] == [2, 2]


def test_trials_go_on_with_fewer_prompts(monkeypatch):
    from jaxneurons.qrnca import trials

    lm = jaxneurons.load("lab")
    queries = jaxneurons.qrnca.bundled_queries("lab-cloze")[::160]
    settings = jaxneurons.qrnca.QRNCAConfig(prompts=1)
    run = jaxneurons.qrnca.locate(lm, queries, settings=settings)
    whole = jaxneurons.qrnca.evaluate(run)
    calls = failing_above(monkeypatch, trials, "scaled_answers", 2, lambda a: len(a[1].targets))
    failing_above(monkeypatch, trials, "run_prompts", 2, lambda a: len(a[1].tokens))
    again = jaxneurons.qrnca.locate(lm, queries, settings=settings)
    with pytest.warns(SmallerChunkWarning):
        parts = jaxneurons.qrnca.evaluate(again)
    assert set(calls) == {2}  # the prompts had come to no more before
    for name in whole:
        for one, other in zip(whole.rows(name), parts.rows(name), strict=True):
            for key, value in one.items():
                if isinstance(value, float):
                    assert other[key] == pytest.approx(value, rel=1e-3, abs=1e-6, nan_ok=True)
                else:
                    assert other[key] == value


@pytest.mark.slow
def test_tracing_goes_on_with_fewer_facts(monkeypatch):
    from jaxneurons.edit import lab_requests, trace, tracing
    from jaxneurons.edit.requests import KnownFact

    lm = jaxneurons.load("lab")
    facts = [
        KnownFact(request.prompt, request.subject, request.ground_truth)
        for request in lab_requests(8)
    ]
    whole = trace(lm, facts, samples=2)
    function = "_restored_probabilities"
    calls = failing_above(monkeypatch, tracing, function, 1, lambda a: len(a[1].tokens))
    with pytest.warns(SmallerChunkWarning, match="facts at once"):
        parts = trace(lm, facts, samples=2)
    assert max(calls) > 1
    assert calls[-1] == 1
    for name in ("effects", "facts"):
        for one, other in zip(whole.rows(name), parts.rows(name), strict=True):
            assert one.keys() == other.keys()
            for key, value in one.items():
                wanted = pytest.approx(value, abs=1e-5) if isinstance(value, float) else value
                assert other[key] == wanted


def test_values_are_found_with_fewer_requests(monkeypatch):
    from jaxneurons.edit import Optimisation, lab_requests, values
    from jaxneurons.edit.values import find_values

    lm = jaxneurons.load("lab")
    requests = lab_requests(3)
    find = functools.partial(
        *(find_values, lm.params, requests),
        config=lm.config,
        tokenizer=lm.tokenizer,
        layer=2,
        place="residual",
        optimisation=Optimisation(steps=3, prefixes=2),
    )
    whole = find()
    calls = failing_above(monkeypatch, values, "optimise_batch", 1, lambda a: len(a[1].members))
    with pytest.warns(SmallerChunkWarning, match="requests at once"):
        parts = find()
    assert calls[0] > 1
    assert calls[-len(requests) :] == [1] * len(requests)
    for one, other in zip(jax.tree.leaves(whole.trace), jax.tree.leaves(parts.trace), strict=True):
        np.testing.assert_allclose(other, one, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(parts.delta, whole.delta, rtol=1e-3, atol=1e-5)
    np.testing.assert_allclose(parts.keys, whole.keys, rtol=1e-5, atol=1e-6)
