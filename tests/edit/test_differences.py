"""What differs between two models, as the smallest patch of one."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.fixtures import write_lm

import jaxneurons as jn
from jaxneurons import DataError
from jaxneurons.edit import LowRank, Multipliers, Rows, apply, apply_patches, diff, revert
from jaxneurons.edit.changes import multipliers
from jaxneurons.model.parameters import replace
from jaxneurons.neurons.sets import NeuronSet

DOWN = ("layers", "ffn", "down", "kernel")


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return write_lm(tmp_path_factory.mktemp("lm") / "model", model_type="qwen2")


@pytest.fixture(scope="module")
def lm(directory):
    return jn.load(directory)


def with_params(lm, params):
    return dataclasses.replace(lm, params=params)


def kernels(lm):
    return {
        jax.tree_util.keystr(path): np.asarray(leaf, np.float32)
        for path, leaf in jax.tree_util.tree_leaves_with_path(lm.params)
    }


def low_rank(rank, seed=0):
    rng = np.random.default_rng(seed)
    left = jnp.asarray(rng.normal(size=(64, rank)), jnp.float32)
    return LowRank("ffn.down", 1, left, jnp.asarray(rng.normal(size=(rank, 32)), jnp.float32))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("rank", [1, 3])
def test_a_low_rank_edit_is_found_with_its_rank(directory, dtype, rank):
    lm = jn.load(directory, dtype=dtype)
    edited = with_params(lm, apply(lm.params, [low_rank(rank)], config=lm.config))
    patch = diff(lm, edited)
    (change,) = patch.changes
    assert isinstance(change, LowRank)
    assert change.left.shape == (64, rank)
    again = apply_patches(lm, patch)
    step = float(jnp.finfo(dtype).eps)
    for name, values in kernels(edited).items():
        most = 2 * step * np.abs(values).max()
        np.testing.assert_allclose(kernels(again)[name], values, atol=most, rtol=0)
    assert patch.facts["edited"] == edited.values_hash
    assert kernels(lm)["['layers']['ffn']['down']['kernel']"].size * 4 > 10 * patch.nbytes / rank


def test_rows_and_neurons_are_found_bit_for_bit(lm):
    rows = Rows("ffn.down", 2, jnp.array([4, 9]), jnp.ones((2, 32)))
    pairs = {"up": [(0, 3), (1, 5)], "q": [(1, 2)], "act": [(0, 7)], "down": [(1, 8)]}
    neurons = NeuronSet.of(**pairs)
    changes = [*multipliers(neurons, 0.3, config=lm.config), rows]
    edited = with_params(lm, apply(lm.params, changes, config=lm.config))
    patch = diff(lm, edited)
    again = apply_patches(lm, patch)
    assert again.values_hash == edited.values_hash
    kinds = [type(change) for change in patch.changes]
    assert kinds.count(Rows) == 1
    assert kinds.count(LowRank) == 0
    sites = {}
    for change in patch.changes:
        if isinstance(change, Multipliers):
            np.testing.assert_array_equal(change.factor, np.float32(0.3))
            here = zip(change.layer.tolist(), change.index.tolist(), strict=True)
            sites.setdefault(change.site, []).extend(here)
    assert {site: sorted(found) for site, found in sites.items()} == pairs
    assert patch.revertible
    assert revert(again, patch).values_hash == lm.values_hash
    ablated = with_params(lm, apply(lm.params, multipliers(neurons, 0, config=lm.config),
                                    config=lm.config))  # fmt: skip
    assert apply_patches(lm, diff(lm, ablated)).values_hash == ablated.values_hash


def test_whatever_else_a_kernel_becomes_is_rows(lm):
    kernel = lm.params["layers"]["ffn"]["down"]["kernel"]
    noise = jnp.asarray(np.random.default_rng(0).normal(size=kernel.shape), jnp.float32)
    edited = with_params(lm, replace(lm.params, DOWN, kernel + noise))
    patch = diff(lm, edited)
    assert [type(change) for change in patch.changes] == [Rows] * 3
    assert apply_patches(lm, patch).values_hash == edited.values_hash


def test_what_no_patch_holds(lm, directory, tmp_path):
    with pytest.raises(DataError, match="the models are equal"):
        diff(lm, jn.load(directory))
    for path in (("embed", "embedding"), ("layers", "attn_norm", "scale")):
        leaf = lm.params[path[0]][path[1]] if len(path) == 2 else lm.params["layers"]["attn_norm"]
        leaf = leaf if len(path) == 2 else leaf["scale"]
        edited = with_params(lm, replace(lm.params, path, leaf.at[0].add(1.0)))
        with pytest.raises(DataError, match=rf"{path[-2]}\.{path[-1]} differs"):
            diff(lm, edited)
    bias = lm.params["layers"]["attn"]["q"]["bias"]
    edited = with_params(lm, replace(lm.params, ("layers", "attn", "q", "bias"), bias + 1))
    with pytest.raises(DataError, match=r"attn\.q\.bias differs otherwise than with its neurons"):
        diff(lm, edited)
    broken = lm.params["layers"]["ffn"]["down"]["kernel"].at[0, 0, 0].set(jnp.nan)
    with pytest.raises(DataError, match=r"ffn\.down of layer 0 holds NaN"):
        diff(lm, with_params(lm, replace(lm.params, DOWN, broken)))
    with pytest.raises(DataError, match="the models are in float32 and bfloat16"):
        diff(lm, jn.load(directory, dtype=jnp.bfloat16))
    deeper = jn.load(write_lm(tmp_path / "deeper", model_type="qwen2", num_hidden_layers=4))
    with pytest.raises(DataError, match="different configurations: num_layers"):
        diff(lm, deeper)
