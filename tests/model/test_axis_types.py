"""Meshes with `Explicit` axes, as `jax.make_mesh` makes them: the same results as without."""

import contextlib
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from support.fixtures import write_lm
from support.meshes import assert_equal
from support.models import random_tokens, tiny_config, tiny_params

import jaxneurons
from jaxneurons import NeuronSet, Quadrature, forward, integrated_gradients
from jaxneurons.edit import ablate, add, interpolate, restore, scale, set_rows, swap
from jaxneurons.engine import ResponseStore, ablated, mean_responses, sentence_loss
from jaxneurons.model import greedy, sample
from jaxneurons.model.axis_types import any_axes
from jaxneurons.model.sharding import param_shardings, shard_params

CONFIG = tiny_config(num_layers=2)
NEURONS = NeuronSet.of(act=[(0, 1), (1, 3)])
LENGTHS = np.array([7, 5, 6, 7], np.int32)

EDITS = {
    "scale": lambda p: scale(p, NEURONS, 0.5, config=CONFIG),
    "ablate": lambda p: ablate(p, NEURONS, config=CONFIG),
    "interpolate": lambda p: interpolate(p, p, NEURONS, 0.3, config=CONFIG),
    "restore": lambda p: restore(p, p, NEURONS, config=CONFIG),
    "add": lambda p: add(p, NEURONS, jnp.ones(CONFIG.hidden_size), config=CONFIG),
    "set_rows": lambda p: set_rows(p, NEURONS, jnp.ones(CONFIG.hidden_size), config=CONFIG),
    "swap": lambda p: swap(p, "up", (0, 1), (1, 3), config=CONFIG),
}
RUNS = {
    "forward": lambda p, t, n: forward(p, t, config=CONFIG, lengths=n, capture=("up",)),
    "greedy": lambda p, t, n: greedy(p, t, config=CONFIG, lengths=n, steps=3),
    "sample": lambda p, t, n: sample(p, t, jax.random.key(0), config=CONFIG, lengths=n, steps=3),
    "responses": lambda p, t, n: mean_responses(p, t, n, config=CONFIG, sites=("up",)),
    "loss": lambda p, t, n: sentence_loss(p, t, n, config=CONFIG),
    "right": lambda p, t, n: (
        integrated_gradients(
            p, t, n, config=CONFIG, lengths=n, quadrature=Quadrature("right", 3)
        ).scores
    ),
    "adaptive": lambda p, t, n: integrated_gradients(p, t, n, config=CONFIG, lengths=n).scores,
}


def explicit_mesh():
    return jax.make_mesh((4, 2), ("data", "model"), axis_types=(AxisType.Explicit,) * 2)


def with_axes(params, mesh):
    """Parameters whose types say how they are split."""
    shardings = param_shardings(CONFIG, mesh)
    return jax.tree.map(
        lambda x, s: jax.device_put(x, NamedSharding(mesh, s.spec)), params, shardings
    )


@functools.cache
def model():
    """Parameters alone, with `Auto` axes and with `Explicit` ones; tokens alone and split."""
    mesh, params = explicit_mesh(), tiny_params(CONFIG)
    tokens = np.asarray(random_tokens(CONFIG, (4, 7)))
    rows = NamedSharding(mesh, PartitionSpec("data"))
    return {
        "mesh": mesh,
        "params": params,
        "auto": shard_params(params, CONFIG, mesh),
        "explicit": with_axes(params, mesh),
        "tokens": (jnp.asarray(tokens), jnp.asarray(LENGTHS)),
        "split": jax.device_put((tokens, LENGTHS), rows),
    }


def is_explicit(array):
    return AxisType.Explicit in array.sharding.mesh.axis_types


@pytest.mark.parametrize("name", EDITS)
def test_edits_of_explicit_parameters(name):
    given, edit = model(), EDITS[name]
    expected = edit(given["params"])
    for context in (contextlib.nullcontext, functools.partial(jax.set_mesh, given["mesh"])):
        with context():
            edited = edit(given["explicit"])
        assert_equal(edited, expected, 1e-7)
        same = 0
        for leaf, before in zip(
            jax.tree.leaves(edited), jax.tree.leaves(given["explicit"]), strict=True
        ):
            assert is_explicit(leaf)
            assert leaf.sharding.is_equivalent_to(before.sharding, leaf.ndim)
            same += leaf is before
        assert same >= 5  # what is not edited is not copied


@pytest.mark.parametrize("name", ["add", "swap"])
def test_edits_in_a_callers_jit(name):
    given, edit = model(), EDITS[name]
    with jax.set_mesh(given["mesh"]):
        program = jax.jit(edit).lower(given["explicit"]).compile()
        edited = jax.jit(edit)(given["explicit"])
    assert_equal(edited, edit(given["params"]), 1e-7)
    for leaf, before in zip(
        jax.tree.leaves(edited), jax.tree.leaves(given["explicit"]), strict=True
    ):
        assert leaf.sharding.is_equivalent_to(before.sharding, leaf.ndim)
    assert "all-gather" not in (program.as_text() or "") or name == "swap"


def test_a_pass_inside_of_set_mesh():
    given = model()
    run = RUNS["responses"]
    expected = run(given["params"], *given["tokens"])
    with jax.set_mesh(given["mesh"]):
        for params, tokens in (("auto", "tokens"), ("explicit", "split"), ("auto", "split")):
            out = run(given[params], *given[tokens])
            assert is_explicit(out["up"])
            total = out["up"].sum()  # goes on in the caller's context
            assert_equal(out, expected)
            assert float(total) == pytest.approx(float(expected["up"].sum()), rel=1e-4)
    out = run(given["auto"], *given["split"])  # of both kinds
    assert not is_explicit(out["up"])
    assert_equal(out, expected)


SCENES = {
    "explicit-tokens": ("auto", "split", False, False),
    "set-mesh": ("auto", "tokens", True, False),
    "all-explicit": ("explicit", "split", False, False),
    "all-explicit-set-mesh": ("explicit", "split", True, False),
    "jit": ("explicit", "split", False, True),
    "jit-set-mesh": ("explicit", "split", True, True),
}


@pytest.mark.slow
@pytest.mark.parametrize("scene", SCENES)
def test_every_computation(scene):
    given = model()
    params, tokens, inside, jit = SCENES[scene]
    for run in RUNS.values():
        expected = run(given["params"], *given["tokens"])
        with jax.set_mesh(given["mesh"]) if inside else contextlib.nullcontext():
            out = (jax.jit(run) if jit else run)(given[params], *given[tokens])
        assert_equal(out, expected)


def test_the_callers_mesh_comes_back_between_results():
    mesh = explicit_mesh()

    @any_axes
    def steps(values):
        for value in values:
            assert jax.sharding.get_abstract_mesh().axis_types == (AxisType.Auto,) * 2
            yield value * 2

    with jax.set_mesh(mesh):
        values = jax.device_put(jnp.arange(8.0), PartitionSpec("data"))
        for number, out in enumerate(steps([values, values + 1])):
            assert jax.sharding.get_mesh() == mesh
            np.testing.assert_array_equal(out, 2 * (np.arange(8.0) + number))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*cannot be divided")
def test_texts_in_texts_out_inside_of_set_mesh(tmp_path):
    source = write_lm(tmp_path / "model")
    alone = jaxneurons.load(source)
    lm = jaxneurons.load(source, mesh=explicit_mesh(), rules="fsdp-tensor")
    prompts = ["The capital of", "Once upon a time there", "a b c", "It"]
    ids = [lm.tokenizer(prompt)["input_ids"] for prompt in prompts]
    sets = [NeuronSet(), NEURONS]

    def everything(lm):
        store = ResponseStore(None, ids, config=lm.config)
        store.fill(lm.params, ("up",))
        return (
            jaxneurons.generate(lm, prompts, steps=4),
            [row.tolist() for _, row in ablated(lm.params, sets, ids, config=lm.config)],
            store.read("up", 1),
        )

    expected = everything(alone)
    with jax.set_mesh(explicit_mesh()):
        texts, rows, responses = everything(lm)
    assert texts == expected[0]
    assert rows == expected[1]
    np.testing.assert_allclose(responses, expected[2], rtol=1e-4, atol=1e-6)
