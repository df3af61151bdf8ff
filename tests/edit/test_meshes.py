"""Edits and their measures on eight devices equal those on one."""

import dataclasses
import functools

import jax
import numpy as np
import pytest
from support.editing_models import OPTIMISATION, PREFIXES, REQUESTS, covariances, kernel_change
from support.edits import capital_requests, lab, low_rank
from support.fixtures import transformers_tokenizer
from support.models import tiny_config, tiny_params

from jaxneurons.edit import MEMIT, ROME, MeasureSettings, apply, edit, measure
from jaxneurons.model.sharding import PRESETS, make_mesh, shard_params

TOKENIZER = transformers_tokenizer("bytes")
CONFIG = tiny_config(vocab_size=len(TOKENIZER) + len(TOKENIZER) % 2)
METHODS = {
    "rome": ROME(layer=1, optimisation=OPTIMISATION),
    "memit": MEMIT(layers=(0, 1), weight=2.0, optimisation=OPTIMISATION),
}


@functools.cache
def edited(method, mesh=None, preset=None):
    """The edit of parameters on a mesh, and the parameters that it makes."""
    params = tiny_params(CONFIG)
    if mesh is not None:
        params = shard_params(params, CONFIG, make_mesh(mesh), PRESETS[preset])
    settings = METHODS[method]
    layers = (1,) if method == "rome" else (0, 1)
    done = edit(
        params,
        REQUESTS[:1],
        config=CONFIG,
        tokenizer=TOKENIZER,
        settings=settings,
        covariance=covariances(CONFIG, layers),
        prefixes=PREFIXES,
    )
    return done, layers, params


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "mesh", "preset"),
    [("memit", "4x2", "fsdp-tensor"), ("rome", "2x4", "fsdp"), ("rome", "8x1", "data")],
)
def test_an_edit_is_the_same(method, mesh, preset):
    ours, layers, params = edited(method, mesh, preset)
    theirs, _, alone = edited(method)
    for layer in layers:
        one, other = kernel_change(ours, layer), kernel_change(theirs, layer)
        assert np.linalg.norm(one - other) <= 1e-5 * np.linalg.norm(other)
    after, expected = (
        apply(tree, done.changes, config=CONFIG) for tree, done in ((params, ours), (alone, theirs))
    )
    for leaf, before, other in zip(*map(jax.tree.leaves, (after, params, expected)), strict=True):
        assert leaf.sharding.is_equivalent_to(before.sharding, leaf.ndim)
        np.testing.assert_allclose(leaf, other, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(("mesh", "preset"), [("2x4", "fsdp-tensor")])
def test_measures_are_the_same(mesh, preset):
    lm, requests = lab(), capital_requests(2)
    params = shard_params(lm.params, lm.config, make_mesh(mesh), PRESETS[preset])
    changes = [[low_rank(request, layer=2, size=120.0, config=lm.config)] for request in requests]
    settings = MeasureSettings(steps=4, fluency_tokens=8, perplexity_tokens=30, batch=2)
    ours, theirs = (
        measure(model, requests, changes, settings=settings, texts=("Wenmonia .",))
        for model in (dataclasses.replace(lm, params=params), lm)
    )
    assert len(ours) == len(theirs) == 2
    for one, other in zip(ours, theirs, strict=True):
        assert one.keys() == other.keys()
        for name, value in other.items():
            if isinstance(value, float):
                assert one[name] == pytest.approx(value, rel=1e-5, abs=1e-5, nan_ok=True), name
            else:
                assert one[name] == value, name
