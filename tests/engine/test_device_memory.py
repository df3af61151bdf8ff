"""How much is run at once by what a device has room for: the same in a plan and in a run."""

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.meshes import EVEN, MESHES, ODD, inputs
from support.models import tiny_config

import jaxneurons
from jaxneurons.engine import ablate, ablation, device_memory, memory_bound, responses
from jaxneurons.engine.device_memory import (
    LEAST_PLANNED,
    ROW_BYTES,
    machine_memory,
    prompts_for,
    prompts_here,
    prompts_that_fit,
    room_beside,
    row_bytes_that_fit,
    rows_here,
)
from jaxneurons.engine.responses import ResponseStore
from jaxneurons.model import PRESETS
from jaxneurons.model.device_share import device_share
from jaxneurons.qrnca import method
from jaxneurons.scale import Placement, Work, plan
from jaxneurons.scale.placement import held, on_one_device
from jaxneurons.scale.prediction import batch_parts
from jaxneurons.scale.targets import parse_target

MIB = 1 << 20
SMALL = tiny_config(
    vocab_size=49152,
    hidden_size=576,
    intermediate_size=1536,
    num_layers=30,
    num_heads=9,
    num_kv_heads=3,
    max_position=8192,
)


@pytest.mark.parametrize(
    ("texts", "limit"),
    [([], None), (["max\n"], None), ([f"{64 * MIB}\n"], 64 * MIB), (["x", "4096\n"], 4096)],
)
def test_a_containers_limit(monkeypatch, tmp_path, texts, limit):
    files = [tmp_path / str(number) for number in range(len(texts))]
    for file, text in zip(files, texts, strict=True):
        file.write_text(text)
    monkeypatch.setattr(device_memory, "LIMITS", (*files, tmp_path / "none"))
    monkeypatch.setattr(
        device_memory.os, "sysconf", {"SC_PAGE_SIZE": 4096, "SC_PHYS_PAGES": 1 << 20}.get
    )
    assert machine_memory() == (limit or 4096 << 20)


@given(
    room=st.integers(0, 1 << 34),
    prompts=st.sampled_from([1, 2, 8, 32]),
    tokens=st.sampled_from([32, 128, 2048]),
)
def test_halved_until_the_bound_is_within_the_room_and_no_further(room, prompts, tokens):
    def bound(size):
        fewer = prompts_for(size, prompts)
        return memory_bound(SMALL, tokens, prompts=fewer, memory_budget=size)

    size = row_bytes_that_fit(SMALL, room, prompts=prompts, tokens=tokens)
    assert size.bit_count() == 1
    assert LEAST_PLANNED <= size <= ROW_BYTES
    assert bound(size) <= room or size == LEAST_PLANNED
    assert size == ROW_BYTES or bound(2 * size) > room
    assert 1 <= prompts_for(size, prompts) <= prompts
    fit = prompts_that_fit(SMALL, room, prompts=prompts, tokens=tokens)
    needed = [memory_bound(SMALL, tokens, prompts=n, memory_budget=0) for n in (fit, 2 * fit)]
    assert needed[0] <= room or fit == 1
    assert fit == prompts or needed[1] > room


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("mesh", MESHES)
@pytest.mark.parametrize("config", [EVEN, ODD], ids=["even", "odd"])
def test_what_a_device_computes_and_holds_is_what_the_plan_says(config, mesh, preset):
    data, model = map(int, mesh.split("x"))
    placement = Placement(data, model, preset)
    params = inputs(config).on(mesh, preset).params
    local, parts = device_share(params, config)
    assert local == on_one_device(config, placement)
    if config == EVEN:  # else axes of the mesh that split nothing have prompts too
        assert parts == batch_parts("locate", placement)
    kept, target = held(config, placement, 4), parse_target("here")
    memory = int(target.fill * target.device.memory)
    assert room_beside(params, config) == memory - kept.resting - kept.gathered


def memory(monkeypatch, lm, room):
    """Let a device have so much room beside the model."""
    monkeypatch.setattr(device_memory, "room_beside", lambda params, config: room)
    values = sum(leaf.nbytes for leaf in jax.tree.leaves(lm.params))
    there = -(-(room + values) // device_memory.FILL)
    monkeypatch.setattr("jaxneurons.scale.targets.machine_memory", lambda: int(there))


@pytest.fixture(scope="module")
def lm():
    return jaxneurons.load("lab")


def test_locating_takes_what_the_plan_says(monkeypatch, lm):
    queries = jaxneurons.qrnca.bundled_queries("lab-cloze")[::160]
    settings = jaxneurons.qrnca.QRNCAConfig(prompts=1)
    whole = jaxneurons.qrnca.locate(lm, queries, settings=settings)
    memory(monkeypatch, lm, 400 * MIB)
    planned = plan("lab", target="cpu:1", work=Work(prompts=8, tokens=32)).chunks
    run, seen = method._attribute, []

    def watched(params, batch, *arguments, memory_budget, **options):
        seen.append((len(batch.tokens), memory_budget))
        return run(params, batch, *arguments, memory_budget=memory_budget, **options)

    monkeypatch.setattr(method, "_attribute", watched)
    fewer = jaxneurons.qrnca.locate(lm, queries, settings=settings)
    assert {budget for _, budget in seen} == {256 * MIB}
    assert max(count for count, _ in seen) == planned.prompts < 8
    for name, scores in whole.prompts.items():
        for one, other in zip(scores, fewer.prompts[name], strict=True):
            np.testing.assert_array_equal(one.neurons, other.neurons)
            np.testing.assert_allclose(one.scores, other.scores, rtol=1e-4, atol=1e-7)


def test_responses_and_generations_of_fewer_prompts(monkeypatch, lm):
    prompts = [f"{'a b ' * number}the" for number in range(1, 9)]
    ids = [tuple(lm.tokenizer(prompt).input_ids) for prompt in prompts]
    sets = {"some": jaxneurons.NeuronSet.of(up=[(1, 3), (2, 5)])}
    stores = [ResponseStore(None, ids, config=lm.config) for _ in range(2)]
    stores[0].fill(lm.params, ["up"])
    said = ablate(lm, prompts, sets, steps=3), jaxneurons.generate(lm, prompts, steps=3)
    memory(monkeypatch, lm, MIB)
    taken, mean = [], responses.mean_responses

    def watched(params, tokens, *arguments, **options):
        taken.append(len(tokens))
        return mean(params, tokens, *arguments, **options)

    monkeypatch.setattr(responses, "mean_responses", watched)
    stores[1].fill(lm.params, ["up"])
    assert max(taken) < len(prompts)
    generated, ids_of = [], ablation.generate_ablated

    def seen(params, tokens, *arguments, **options):
        generated.append(len(tokens))
        return ids_of(params, tokens, *arguments, **options)

    monkeypatch.setattr(ablation, "generate_ablated", seen)
    for layer in range(lm.config.num_layers):
        one, other = (store.read("up", layer) for store in stores)
        np.testing.assert_allclose(other, one, rtol=1e-5, atol=1e-6)
    assert (ablate(lm, prompts, sets, steps=3), jaxneurons.generate(lm, prompts, steps=3)) == said
    assert max(generated) < len(prompts)


def test_a_batch_is_whole_where_there_is_room(lm):
    shape = {"prompts": 8, "tokens": 64}
    assert rows_here(lm.params, lm.config, **shape) == (ROW_BYTES, 1)
    assert prompts_here(lm.params, lm.config, **shape) == (8, 1)


@pytest.mark.parametrize("prompts", [1, 6, 8, 32])
@pytest.mark.parametrize("parts", [1, 4, 8])
def test_a_device_never_runs_more_prompts_for_being_given_fewer_rows(prompts, parts):
    each = -(-prompts // parts)
    size = ROW_BYTES
    while size >= 1 << 20:
        taken = prompts_for(size, prompts, parts)
        assert taken == prompts or taken % parts == 0
        assert -(-taken // parts) == max(1, each * size // ROW_BYTES)
        size //= 2


def test_a_device_that_says_nothing_of_its_memory(monkeypatch, lm):
    class Accelerator:
        platform = "gpu"

        def memory_stats(self):
            return None

    assert device_memory.device_memory(Accelerator()) is None
    monkeypatch.setattr(device_memory, "device_memory", lambda device, sharing=1: None)
    assert room_beside(lm.params, lm.config) is None
    assert rows_here(lm.params, lm.config, prompts=8, tokens=2048) == (ROW_BYTES, 1)
    assert prompts_here(lm.params, lm.config, prompts=512, tokens=2048) == (512, 1)
