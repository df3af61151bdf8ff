"""Changes applied to parameters, against loops over plain NumPy arrays."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh
from support.models import tiny_config, tiny_params

from jaxneurons import DataError
from jaxneurons.edit import LowRank, Multipliers, Rows, apply
from jaxneurons.edit.changes import multipliers
from jaxneurons.model.sharding import ShardingRules, shard_params
from jaxneurons.neurons.sets import SITES, NeuronSet

BIASED = {"biases": ("q", "k", "v", "gate", "up", "down")}


def tiny(**changes):
    config = tiny_config(num_layers=4, **changes)
    params = tiny_params(config)
    rng = np.random.default_rng(9)  # biases start as zeros

    def fill(path, leaf):
        if path[-1].key != "bias":
            return leaf
        return jnp.asarray(rng.normal(size=leaf.shape), leaf.dtype)

    return config, jax.tree_util.tree_map_with_path(fill, params)


def term(layer, seed=0, rank=2, module="ffn.down", shape=(40, 32)):
    rng = np.random.default_rng(seed)
    left = rng.normal(size=(shape[0], rank)).astype(np.float32)
    right = rng.normal(size=(rank, shape[1])).astype(np.float32)
    return LowRank(module, layer, jnp.asarray(left), jnp.asarray(right))


def rows(layer, index=(3, 30), seed=1):
    values = np.random.default_rng(seed).normal(size=(len(index), 32)).astype(np.float32)
    return Rows("ffn.down", layer, jnp.asarray(index), jnp.asarray(values))


def factors(site, pairs, values):
    layer, index = np.array(pairs, np.int32).T
    values = jnp.asarray(values, jnp.float32)
    return Multipliers(site, jnp.asarray(layer), jnp.asarray(index), values)


def numpy_tree(params):
    return jax.tree.map(lambda x: np.array(x, np.float32), params)


def by_hand(params, changes):
    """What changes come to, entry by entry: the table of the requirement, written out."""
    layers = numpy_tree(params)["layers"]
    where = {s: ("ffn", s) for s in ("up", "gate", "down")}
    where |= {s: ("attn", s) for s in "qkvo"}
    for change in changes:
        if isinstance(change, Multipliers):
            for layer, index, factor in zip(
                np.array(change.layer), np.array(change.index), np.array(change.factor), strict=True
            ):
                if change.site == "act":
                    layers["ffn"]["down"]["kernel"][layer, index] *= factor
                    continue
                block, name = where[change.site]
                layers[block][name]["kernel"][layer, :, index] *= factor
                if "bias" in layers[block][name]:
                    layers[block][name]["bias"][layer, index] *= factor
            continue
        block, name = change.module.split(".")
        kernel = layers[block][name]["kernel"][change.layer]
        if isinstance(change, LowRank):
            kernel += np.asarray(change.left) @ np.asarray(change.right)
        else:
            kernel[np.asarray(change.index)] = np.asarray(change.values)
    return layers


def assert_layers(edited, expected, **tolerance):
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(np.asarray(a, np.float32), b, **tolerance),
        dict(edited["layers"]),
        dict(expected),
    )


MIXED = [
    term(1),
    term(1, 5),
    term(2, 3, module="attn.o", shape=(32, 32)),
    rows(1),
    term(1, 6),
    factors("act", [(1, 3), (0, 2)], [0.5, 0.0]),
    factors("gate", [(2, 7)], [2.0]),
    rows(3),
]


@pytest.mark.parametrize("biases", [(), BIASED["biases"]])
def test_changes_in_their_order(biases):
    config, params = tiny(biases=biases)
    before = numpy_tree(params)
    edited = apply(params, MIXED, config=config)
    assert_layers(edited, by_hand(params, MIXED), rtol=2e-6, atol=2e-6)
    jax.tree.map(np.testing.assert_array_equal, numpy_tree(params), before)
    other = apply(params, MIXED[::-1], config=config)
    assert_layers(other, by_hand(params, MIXED[::-1]), rtol=2e-6, atol=2e-6)
    for name in ("embed", "final_norm", "unembed"):  # not touched: the same objects
        assert edited[name] is params[name]
    assert edited["layers"]["ffn"]["up"] is params["layers"]["ffn"]["up"]
    assert apply(params, [], config=config) is params


@pytest.mark.parametrize("site", SITES)
@pytest.mark.parametrize("biases", [(), BIASED["biases"]])
def test_multipliers_of_every_site(site, biases):
    config, params = tiny(biases=biases)
    pairs, values = [(0, 1), (3, 0), (3, 15)], [0.0, -1.5, 2.0]
    change = factors(site, pairs, values)
    edited = apply(params, [change], config=config)
    assert_layers(edited, by_hand(params, [change]), rtol=0, atol=0)
    (of_set,) = multipliers(NeuronSet.of(**{site: pairs}), 0.5, config=config)
    halved = factors(site, pairs, [0.5] * 3)
    assert_layers(apply(params, [of_set], config=config), by_hand(params, [halved]), rtol=0)


def test_a_parameter_edit_is_a_scale():
    from jaxneurons import forward

    config, params = tiny(biases=BIASED["biases"])
    neurons = NeuronSet.of(**{site: [(1, 2), (2, 9)] for site in SITES})
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 48, (2, 7)), jnp.int32)
    edited = apply(params, multipliers(neurons, 0.3, config=config), config=config)
    by_parameters = forward(edited, tokens, config=config, at="all").logits
    scales = neurons.scales(config, 0.3)
    by_scale = forward(params, tokens, config=config, scales=scales, at="all").logits
    np.testing.assert_allclose(by_parameters, by_scale, rtol=1e-5, atol=1e-5)
    assert np.abs(by_scale - forward(params, tokens, config=config, at="all").logits).max() > 0.01


def test_sums_are_float32_and_rounded_once():
    config, wide = tiny()
    params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), wide)
    changes = [term(1, seed) for seed in range(5)]
    edited = apply(params, changes, config=config)
    kernel = edited["layers"]["ffn"]["down"]["kernel"]
    assert kernel.dtype == jnp.bfloat16
    base = np.asarray(params["layers"]["ffn"]["down"]["kernel"][1], np.float64)
    want = base + sum(np.asarray(c.left, np.float64) @ np.asarray(c.right) for c in changes)
    rounded = want.astype(np.float32).astype(jnp.bfloat16).astype(np.float32)
    assert (np.asarray(kernel[1], np.float32) == rounded).mean() > 0.995
    scaled = apply(params, [factors("up", [(1, 2)], [1.1])], config=config)
    up = np.asarray(params["layers"]["ffn"]["up"]["kernel"][1, :, 2], np.float32)
    want = (up * np.float32(1.1)).astype(jnp.bfloat16).astype(np.float32)
    have = np.asarray(scaled["layers"]["ffn"]["up"]["kernel"][1, :, 2], np.float32)
    np.testing.assert_array_equal(have, want)


def test_under_jit_and_vmap():
    config, params = tiny(biases=("q", "k", "v"))
    plain = apply(params, MIXED, config=config)
    compiled = jax.jit(lambda p, c: apply(p, c, config=config))(params, MIXED)
    assert_layers(compiled, numpy_tree(plain)["layers"], rtol=1e-6, atol=1e-6)

    several = [[term(1, n), rows(2, (n, n + 3), n), factors("k", [(n, 3)], [n])] for n in range(3)]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *several)
    edited = jax.vmap(lambda c: apply(params, c, config=config), out_axes=0)(stacked)
    for n, changes in enumerate(several):
        alone = apply(params, changes, config=config)
        for block, name in (("attn", "k"), ("ffn", "down")):
            for array, batch in edited["layers"][block][name].items():
                one = alone["layers"][block][name][array]
                np.testing.assert_allclose(batch[n], one, rtol=1e-6, atol=1e-6)


def test_gradients_reach_the_changes():
    config, params = tiny()

    def loss(change):
        edited = apply(params, [change], config=config)
        return (edited["layers"]["ffn"]["down"]["kernel"][1] ** 2).sum()

    change = term(1)
    gradient = jax.grad(loss)(change)
    kernel = np.asarray(params["layers"]["ffn"]["down"]["kernel"][1], np.float64)
    left, right = np.asarray(change.left, np.float64), np.asarray(change.right, np.float64)
    np.testing.assert_allclose(gradient.left, 2 * (kernel + left @ right) @ right.T, rtol=1e-4)


@pytest.mark.parametrize("by", ["neurons", "hidden", "layers"])
def test_sharded_parameters_are_not_gathered(by):
    config, params = tiny(biases=("q", "k", "v"))
    mesh = Mesh(np.array(jax.devices()[:2]).reshape(1, 2), ("data", "model"))
    none = dict.fromkeys(("vocab", "intermediate", "heads", "kv_heads"))
    rules = {
        "neurons": ShardingRules(),
        "hidden": ShardingRules(**{**none, "hidden": "model"}),
        "layers": ShardingRules(**{**none, "layers": "model"}),
    }[by]
    sharded = shard_params(params, config, mesh, rules)
    expected = by_hand(params, MIXED)
    eager = apply(sharded, MIXED, config=config)
    program = jax.jit(lambda p, c: apply(p, c, config=config)).lower(sharded, MIXED).compile()
    for edited in (eager, program(sharded, MIXED)):
        assert_layers(edited, expected, rtol=2e-6, atol=2e-6)
        for new, old in zip(jax.tree.leaves(edited), jax.tree.leaves(sharded), strict=True):
            assert new.sharding.is_equivalent_to(old.sharding, old.ndim)
    assert "all-gather" not in program.as_text()


def test_indices_that_are_traced_are_not_looked_at():
    config, params = tiny()

    def rows_at(index):
        change = Rows("ffn.down", 0, index, jnp.ones((1, 32)))
        return apply(params, [change], config=config)["layers"]["ffn"]["down"]["kernel"][0]

    edited = jax.jit(rows_at)(jnp.array([5]))
    np.testing.assert_array_equal(edited[5], np.ones(32))
    with pytest.raises(DataError, match="change 1 of 1: neuron 40 is not in this model"):
        rows_at(jnp.array([40]))

    def values_of(values):
        change = loose(Rows, "ffn.down", 0, jnp.array([1]), values)
        return apply(params, [change], config=config)

    with pytest.raises(DataError, match=r"values has the shape \(2, 32\), not 1 x 32"):
        jax.jit(values_of)(jnp.ones((2, 32)))


def test_numbers_of_another_kind():
    config, params = tiny()
    with pytest.raises(DataError, match="layer 4 is not in this model, which has 4"):
        apply(params, [factors("up", [(4, 1)], [1.0])], config=config)
    with pytest.raises(DataError, match="index holds float32, not whole numbers"):
        apply(params, [loose(Rows, "ffn.down", 0, jnp.ones(1), jnp.ones((1, 32)))], config=config)
    change = loose(LowRank, "ffn.down", 0, jnp.ones((40, 1), jnp.int32), jnp.ones((1, 32)))
    with pytest.raises(DataError, match="left holds int32, not floating-point numbers"):
        apply(params, [change], config=config)


def loose(kind, module, layer, first, second):
    """A change whose arrays nobody has checked."""
    import dataclasses

    change = object.__new__(kind)
    names = [field.name for field in dataclasses.fields(kind)]
    for name, value in zip(names, (module, layer, first, second), strict=True):
        object.__setattr__(change, name, value)
    return change


def test_one_is_no_plural():
    from jaxneurons.edit.patch import _describe

    for count, shown in ((1, "1 neuron of site"), (2, "2 neurons of site")):
        places = np.arange(count, dtype=np.int32)
        change = Multipliers("act", places * 0, places, np.zeros(count, np.float32))
        assert _describe(change).startswith(shown)
