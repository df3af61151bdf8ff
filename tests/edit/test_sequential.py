"""Edits one after the other: applied in order, resumed bit for bit, against a loop by hand."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.edits import capital_requests, lab, low_rank

from jaxneurons.edit import editing, sequential
from jaxneurons.edit.cases import MeasureSettings
from jaxneurons.edit.changes import apply
from jaxneurons.edit.controls import turned_at_random
from jaxneurons.edit.measures import measure
from jaxneurons.edit.method import ROME, Edit, Optimisation
from jaxneurons.edit.outcomes import MEASURES
from jaxneurons.edit.sequential import evaluate_sequential
from jaxneurons.edit.sequential_state import EditedModel, done_in, from_arrays, to_arrays
from jaxneurons.errors import ConfigError, DataError

SMALL = MeasureSettings(steps=4, fluency_tokens=8, perplexity_tokens=20, batch=4)
TEXTS = ("The capital of Wenmonia is Vouthbu .",)
SETTINGS = ROME(layer=2, covariance="identity", optimisation=Optimisation(clamp=2.0))
CALLS = []


def change(params, request, size):
    """Depends on the parameters too, so that order and what came before count."""
    kernel = params["layers"]["ffn"]["down"]["kernel"][2]
    made = low_rank(request, layer=2, size=size, config=lab().config)
    return dataclasses.replace(made, right=made.right + 3 * kernel[:1])


@pytest.fixture
def editor(monkeypatch):
    """Edits that need no optimisation; those of a request called "refused" are refused."""
    CALLS.clear()

    def edit(params, requests, *, config, settings, earlier, **unused):
        CALLS.append([request.id for request in requests])
        if any(request.id == "refused" for request in requests):
            raise DataError("the subject cannot be edited")
        count = int(earlier[2][0, 0]) if earlier else 0
        size = settings.optimisation.clamp + count  # keys of earlier edits count too
        changes = tuple(change(params, request, size) for request in requests)
        keys = {2: np.full((1, 1), float(count + len(requests)))}
        return Edit(changes, settings, None, keys, {})

    monkeypatch.setattr(editing, "edit", edit)


def run(requests=None, methods: Any = SETTINGS, **options):
    options = {"sizes": (1, 3, 6), "ends": 2, "sample": 3, **options}
    requests = capital_requests(6) if requests is None else requests
    return evaluate_sequential(lab(), requests, methods, measures=SMALL, texts=TEXTS, **options)


@pytest.mark.slow
def test_every_size_is_measured_as_a_loop_by_hand_does(editor):
    requests = capital_requests(6)
    rows = run().rows("edits")
    params = lab().params
    for count, request in enumerate(requests, 1):
        made = change(params, request, 2.0 + count - 1)
        kernel = np.array(params["layers"]["ffn"]["down"]["kernel"])
        kernel[2] += np.asarray(made.left) @ np.asarray(made.right)
        ffn = {**params["layers"]["ffn"], "down": {"kernel": jnp.asarray(kernel)}}
        params = {**params, "layers": {**params["layers"], "ffn": ffn}}
        if count not in (1, 3, 6):
            assert not [row for row in rows if row["edits"] == count]
            continue
        edited = dataclasses.replace(lab(), params=params)
        by_hand = measure(edited, requests[:count], settings=SMALL, unedited=lab(), texts=TEXTS)
        expected = {row["request"]: row for row in by_hand}
        here = [row for row in rows if row["edits"] == count and not row["control"]]
        groups = {g: [r["request"] for r in here if r["group"] == g] for g in sequential.GROUPS}
        ids = [r.id for r in requests[:count]]
        assert groups["first"] == ids[:2]
        assert groups["last"] == ids[-2:]
        assert len(groups["all"]) == min(3, count)
        assert set(groups["all"]) <= set(ids)
        for row in here:
            for name in MEASURES:
                value = expected[row["request"]][name]
                assert row[name] == (None if value is None else pytest.approx(value, rel=1e-3))
    assert [[request.id] for request in requests] == CALLS


def test_the_summary_is_the_mean_of_its_group(editor):
    tables = run()
    rows = tables.rows("edits")
    lines = tables.rows("sequential")
    assert [(r["edits"], r["control"], r["group"]) for r in lines] == [
        (edits, control, group)
        for edits in (0, 1, 3, 6)
        for control in (sequential.CONTROLS if edits else ("",))
        for group in sequential.GROUPS
    ]
    for line in lines:
        values = [
            row["locality_kl"]
            for row in rows
            if all(row[key] == line[key] for key in ("edits", "control", "group"))
        ]
        assert line["locality_kl"] == pytest.approx(np.mean(values))
    assert {r["method"] for r in lines if r["edits"] == 0} == {"unedited"}
    assert all(r["locality_kl"] == 0 for r in lines if r["edits"] == 0)


def test_batches_end_at_sizes(editor):
    run(batch=4)
    assert [len(call) for call in CALLS] == [1, 2, 3]
    CALLS.clear()
    run(batch=4, sizes=(6, 500))
    assert [len(call) for call in CALLS] == [4, 2]


@pytest.mark.slow
@pytest.mark.parametrize("stopped_at", [2, 5, 8])
def test_a_stopped_run_goes_on_to_the_same_files(editor, tmp_path, monkeypatch, stopped_at):
    from jaxneurons.storage.store import RunDirectory

    monkeypatch.setattr(sequential, "KEEP", 0.0)
    run(out=tmp_path / "whole")
    CALLS.clear()
    saved, save = [0], RunDirectory.save

    def stopping(self, name, arrays):
        if saved[0] == stopped_at:
            raise KeyboardInterrupt
        saved[0] += 1
        save(self, name, arrays)

    with monkeypatch.context() as patch:
        patch.setattr(RunDirectory, "save", stopping)
        with pytest.raises(KeyboardInterrupt):
            run(out=tmp_path / "stopped")
    before = len(CALLS)
    run(out=tmp_path / "stopped")
    assert before < 7
    # The edit whose state was not kept is made once more, and no other.
    assert len(CALLS) <= 7
    for name in ("sequential.json", "tables/edits.csv", "tables/sequential.csv"):
        whole, resumed = ((tmp_path / d / name).read_bytes() for d in ("whole", "stopped"))
        assert whole == resumed, name
    CALLS.clear()
    run(out=tmp_path / "stopped")
    assert CALLS == []
    assert (tmp_path / "whole/figures/sequential.png").exists()


def test_a_refused_request_is_passed_over_and_said(editor):
    requests = capital_requests(4)
    requests[1] = dataclasses.replace(requests[1], id="refused")
    tables = run(requests, methods={"mine": SETTINGS}, sizes=(4, 10), batch=4)
    assert tables.facts["left_out"] == [
        {"request": "refused", "reason": "the subject cannot be edited", "method": "mine"}
    ]
    assert tables.facts["sizes_left_out"] == [10]
    assert [len(call) for call in CALLS] == [4, 1, 1, 1, 1]
    rows = [row for row in tables.rows("edits") if row["method"] == "mine"]
    first = [row["request"] for row in rows if row["group"] == "first" and not row["control"]]
    assert first == [requests[0].id, requests[2].id]


def test_the_control_of_a_sequence_is_as_large_and_answers_to_the_same(editor):
    edited, base = lab().params, lab().params
    for request in capital_requests(4):
        made = change(edited, request, 2.0)
        edited = apply(edited, (made,), config=lab().config)
    turned = turned_at_random(base, edited, np.random.default_rng(0))
    kernels = [np.asarray(p["layers"]["ffn"]["down"]["kernel"]) for p in (base, edited, turned)]
    before, there, control = (kernel.astype(np.float64) for kernel in kernels)
    written, random = there - before, control - before
    assert np.flatnonzero(random.any((1, 2))).tolist() == [2]
    singular = [np.linalg.svd(each[2], compute_uv=False)[:4] for each in (written, random)]
    np.testing.assert_allclose(singular[1], singular[0], rtol=1e-3)
    # Keys that the edits do not answer to are not answered to; what is written is another thing.
    keys = np.linalg.svd(written[2])[0][:, 4:]
    assert np.linalg.norm(keys.T @ random[2]) < 1e-3 * np.linalg.norm(random[2])
    overlap = (written[2] * random[2]).sum() / np.linalg.norm(written[2]) ** 2
    assert abs(overlap) < 0.5
    rest = (jax.tree.leaves(p) for p in (base, edited, turned))
    assert sum(c is not b for b, _, c in zip(*rest, strict=True)) == 1


def test_a_control_is_another_model_too(editor):
    rows = [row for row in run(sizes=(6,)).rows("edits") if row["edits"] == 6]
    mine, random = (
        [row["locality_kl"] for row in rows if row["control"] == control]
        for control in sequential.CONTROLS
    )
    assert min(*mine, *random) > 0
    assert not np.allclose(mine, random, rtol=1e-2)


def test_wrong_arguments(editor, tmp_path):
    with pytest.raises(DataError, match=r"2 requests, fewer than the smallest of the sizes \[5"):
        run(capital_requests(2), sizes=(5, 10))
    with pytest.raises(ConfigError, match="batch must be at least 1"):
        run(batch=0)
    run(sizes=(1,), out=tmp_path / "run")
    with pytest.raises(DataError, match="another"):
        run(sizes=(1,), out=tmp_path / "run", batch=2)


def test_states_hold_what_differs_and_nothing_else():
    base = lab().params
    kernel = base["layers"]["ffn"]["down"]["kernel"]
    other = kernel.at[3, 5].add(1.0)
    ffn = {**base["layers"]["ffn"], "down": {"kernel": other}}
    params = {**base, "layers": {**base["layers"], "ffn": ffn}}
    keys = {3: np.eye(2, dtype=np.float32)}
    state = EditedModel(params, 4, (0, 1, 3), ({"request": "c", "reason": "why"},), keys)
    arrays = to_arrays(state, base)
    assert set(arrays) == {"about", "keys:3", "3:['ffn']['down']['kernel']"}
    assert done_in(arrays) == 4
    restored = from_arrays(arrays, base)
    assert (restored.done, restored.edited) == (4, (0, 1, 3))
    assert restored.refused == state.refused
    np.testing.assert_array_equal(restored.keys[3], keys[3])
    jax.tree.map(np.testing.assert_array_equal, restored.params, params)
