"""Activations that float16 does not hold: an error that says where, never a rank."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.fixtures import cloze, write_lm, write_queries
from support.models import compiled, random_tokens, tiny_config, tiny_params

import jaxneurons
from jaxneurons import DataError, Quadrature, integrated_gradients
from jaxneurons.engine.ablation import ablated
from jaxneurons.engine.responses import ResponseStore
from jaxneurons.model import finite
from jaxneurons.neurons.sets import NeuronSet
from jaxneurons.prompts.queries import read_queries
from jaxneurons.qrnca.locating import locate
from jaxneurons.qrnca.method import QRNCAConfig

CONFIG = tiny_config(num_layers=3)
FOUND = (
    r"not finite from layer 1 on \(first: 'act', float16\); load the model in bfloat16 or float32"
)


def overflowing(params):
    """In float16, with a product of up and gate in layer 1 that is too large for it."""
    params = jax.tree.map(lambda x: x.astype(jnp.float16), params)
    ffn = params["layers"]["ffn"]
    for name in ("up", "gate"):
        ffn[name] = {"kernel": ffn[name]["kernel"].at[1].multiply(500)}
    return params


@pytest.fixture(scope="module")
def params():
    return overflowing(tiny_params(CONFIG))


TOKENS = random_tokens(CONFIG, (2, 7))
PROMPTS = [row.tolist() for row in np.asarray(TOKENS)]


def test_the_first_layer_and_site_are_named(params):
    assert re.match("activations are " + FOUND, finite.explain(params, PROMPTS[0], config=CONFIG))
    fine = jax.tree.map(lambda x: x.astype(jnp.float16), tiny_params(CONFIG))
    assert "are finite in float16" in finite.explain(fine, PROMPTS[0], config=CONFIG)


def test_integrated_gradients(params):
    run = functools.partial(integrated_gradients, config=CONFIG, quadrature=Quadrature("gauss", 1))
    targets = jnp.array([3, 4])
    inside = compiled(run)(params, TOKENS, targets)  # nothing is checked in there
    assert np.isnan(inside.scores).any()
    with pytest.raises(DataError, match="prompt 1: activations are " + FOUND):
        run(params, TOKENS, targets)


def test_generation_with_neurons_off(params):
    sets = [NeuronSet()]
    with pytest.raises(DataError, match="prompt [12] with set 1 off says nothing: .*" + FOUND):
        list(ablated(params, sets, PROMPTS, config=CONFIG))


def test_responses(params, tmp_path):
    store = ResponseStore(tmp_path / "r", PROMPTS, config=CONFIG, identity={})
    with pytest.raises(DataError, match="prompt 1 of 2: no responses: activations are " + FOUND):
        store.fill(params, ("up", "act"))
    with pytest.raises(DataError, match="not complete"):
        store.read("act", 0)


def test_responses_that_are_on_disk(tmp_path):
    store = ResponseStore(tmp_path / "r", PROMPTS, config=CONFIG, identity={})
    values = np.ones((CONFIG.num_layers, 64, CONFIG.intermediate_size), np.float32)
    values[2, 1, 5] = np.nan
    store.write(0, {"up": jnp.asarray(values)})
    assert store.read("up", 0).shape == (2, CONFIG.intermediate_size)
    with pytest.raises(DataError, match="responses to prompt 2 are not finite at layer 2"):
        store.read("up", 2)


def test_locating_names_query_prompt_and_layer(tmp_path):
    lm = jaxneurons.load(write_lm(tmp_path / "lm"))
    lm = dataclasses.replace(lm, params=overflowing(lm.params))
    queries = read_queries(write_queries(tmp_path / "q.json", cloze(6)))
    settings = QRNCAConfig(quadrature=Quadrature("gauss", 1))
    with pytest.raises(DataError, match=r"query 'fact-\d', prompt [12]: activations are " + FOUND):
        locate(lm, queries, out=tmp_path / "run", settings=settings)
