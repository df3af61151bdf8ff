"""Sharded equals unsharded, on a mesh of two CPU devices."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, PartitionSpec
from support.models import compiled, random_tokens, tiny_config, tiny_params

from jaxneurons import ConfigError, Quadrature, forward, integrated_gradients
from jaxneurons.model.device_share import spread_batch
from jaxneurons.model.sharding import (
    PRESETS,
    ShardingRules,
    batch_sharding,
    logical_axes,
    make_mesh,
    param_shardings,
    parse_mesh,
    partition_specs,
    resolve_rules,
    shard_params,
    undivided,
    whole_parameters,
)

TUPLE = {"is_leaf": lambda x: isinstance(x, tuple)}


def mesh_of(data, model):
    return Mesh(np.array(jax.devices()[: data * model]).reshape(data, model), ("data", "model"))


@pytest.mark.parametrize("tied", [False, True])
def test_every_parameter_has_logical_axes(tied):
    config = tiny_config(tied=tied)
    params, axes = tiny_params(config), logical_axes(config)
    assert jax.tree.structure(params) == jax.tree.structure(axes, **TUPLE)
    names = {name for tuple_ in jax.tree.leaves(axes, **TUPLE) for name in tuple_}
    assert names <= {*ShardingRules.__dataclass_fields__} - {"batch"}
    sizes = {
        "vocab": config.vocab_size,
        "hidden": config.hidden_size,
        "intermediate": config.intermediate_size,
        "heads": config.query_width,
        "kv_heads": config.kv_width,
        "layers": config.num_layers,
    }
    jax.tree.map(
        lambda names, x: np.testing.assert_equal(tuple(sizes[n] for n in names), x.shape),
        axes,
        params,
        **TUPLE,
    )


def test_layout():
    config = tiny_config(tied=False)
    shardings = param_shardings(config, mesh_of(1, 2))
    layer = shardings["layers"]
    assert layer["ffn"]["up"]["kernel"].spec == PartitionSpec(None, None, "model")
    assert layer["ffn"]["down"]["kernel"].spec == PartitionSpec(None, "model", None)
    assert layer["attn"]["o"]["kernel"].spec == PartitionSpec(None, "model", None)
    assert shardings["embed"]["embedding"].spec == PartitionSpec("model", None)
    params = shard_params(tiny_params(config), config, mesh_of(1, 2))
    up = params["layers"]["ffn"]["up"]["kernel"]
    assert {shard.data.shape for shard in up.addressable_shards} == {(3, 32, 20)}


def test_heads_are_never_cut():
    # kv_width (24) is even, but three heads of 8 do not go on two devices.
    config = tiny_config(num_heads=6, num_kv_heads=3)
    attn = param_shardings(config, mesh_of(1, 2))["layers"]["attn"]
    assert attn["q"]["kernel"].spec == PartitionSpec(None, None, "model")
    assert attn["k"]["kernel"].spec == PartitionSpec(None, None, None)


def test_rules_that_cannot_be():
    config, mesh = tiny_config(), mesh_of(1, 2)
    with pytest.raises(ConfigError, match=r"vocab='modle'.*did you mean 'model'"):
        param_shardings(config, mesh, ShardingRules(vocab="modle"))
    with pytest.raises(ConfigError, match=r"batch='dat'.*did you mean 'data'"):
        batch_sharding(mesh, ShardingRules(batch="dat"))
    with pytest.raises(ConfigError, match=r"no axis 'dta'.*did you mean 'data'"):
        param_shardings(config, mesh, ShardingRules(hidden=("dta", "model")))
    with pytest.raises(ConfigError, match="same mesh axis twice"):
        param_shardings(config, mesh, ShardingRules(hidden="model"))
    with pytest.raises(ConfigError, match="same mesh axis twice"):  # whatever divides
        param_shardings(config, mesh, ShardingRules(hidden=("data", "model")))
    with pytest.raises(ConfigError, match="names a mesh axis twice"):
        ShardingRules(hidden=("data", "data"))


def test_several_mesh_axes_and_presets():
    config, sizes = tiny_config(), {"data": 4, "model": 2}
    specs = partition_specs(config, sizes, PRESETS["fsdp"])
    both = ("data", "model")
    assert specs["layers"]["ffn"]["up"]["kernel"] == PartitionSpec(None, both, None)
    assert specs["embed"]["embedding"] == PartitionSpec(None, both)
    assert whole_parameters(config, sizes, PRESETS["fsdp"]) == {}
    specs = partition_specs(config, sizes, PRESETS["fsdp-tensor"])
    assert specs["layers"]["ffn"]["up"]["kernel"] == PartitionSpec(None, "data", "model")
    assert batch_sharding(mesh_of(1, 2), PRESETS["data"]).spec == PartitionSpec(both)
    assert set(whole_parameters(config, sizes, PRESETS["data"]).values()) == {
        "no rule splits its axes"
    }
    assert resolve_rules("tensor") == ShardingRules()
    with pytest.raises(ConfigError, match=r"unknown sharding 'fdsp'; did you mean 'fsdp'"):
        resolve_rules("fdsp")


def test_what_does_not_divide_is_named():
    config = tiny_config(num_heads=6, num_kv_heads=3)
    (odd,) = undivided(config, {"data": 4, "model": 2})
    assert (odd.axis, odd.parts, odd.devices) == ("kv_heads", 3, 2)
    assert str(odd) == (
        "kv_heads (3) cannot be divided over 2 devices (model) and is not split: "
        "layers.attn.k.kernel, layers.attn.v.kernel"
    )
    whole = whole_parameters(config, {"data": 4, "model": 2})
    assert whole["layers.attn.k.kernel"] == "kv_heads (3) cannot be divided over 2 devices"
    assert whole["final_norm.scale"] == "no rule splits its axes"
    assert "layers.attn.q.kernel" not in whole
    assert undivided(config, {"data": 4, "model": 1}) == ()


def test_meshes_in_words():
    assert make_mesh("1x2") == mesh_of(1, 2) == make_mesh((1, 2))
    assert make_mesh("1x1").devices.size == 1  # fewer devices than there are
    assert parse_mesh(" 16X8") == (16, 8)
    with pytest.raises(ConfigError, match=r"4x4 needs 16 devices, but there are 8 devices \(cpu\)"):
        make_mesh("4x4")
    for wrong in ("4", "4x", "0x2", "4x2x1", "-1x2", "axb", ""):
        with pytest.raises(ConfigError, match=r"written DATAxMODEL, such as 4x2; got"):
            make_mesh(wrong)
    with pytest.raises(ConfigError, match="two counts"):
        make_mesh((2, 0))


LAYOUTS = {
    "data": ((2, 1), ShardingRules()),
    "model": ((1, 2), ShardingRules()),
    "hidden": (
        (1, 2),
        ShardingRules(
            vocab=None, hidden="model", intermediate=None, heads=None, kv_heads=None, layers=None
        ),
    ),
    "weights-over-data": ((2, 1), ShardingRules(hidden="data", vocab=None)),
}


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("kv_heads", [1, 2])
def test_forward_is_the_same(name, kv_heads):
    shape, rules = LAYOUTS[name]
    config, mesh = tiny_config(num_kv_heads=kv_heads), mesh_of(*shape)
    params, tokens = tiny_params(config), random_tokens(config, (2, 9))
    lengths = jnp.array([9, 6])
    run = compiled(functools.partial(forward, config=config, at="all", capture=("act",)))
    expected = run(params, tokens, lengths=lengths)
    split = jax.device_put((tokens, lengths), batch_sharding(mesh, rules))
    out = run(shard_params(params, config, mesh, rules), split[0], lengths=split[1])
    np.testing.assert_allclose(out.logits, expected.logits, atol=1e-5, rtol=1e-5)
    np.testing.assert_allclose(
        out.activations["act"], expected.activations["act"], atol=1e-5, rtol=1e-5
    )
    assert len(out.logits.sharding.device_set) == 2


@pytest.mark.slow
@pytest.mark.parametrize("rule", ["adaptive", "gauss"])
@pytest.mark.parametrize("name", ["data", "model"])
def test_attribution_is_the_same(name, rule):
    shape, rules = LAYOUTS[name]
    config, mesh = tiny_config(num_layers=2), mesh_of(*shape)
    params, tokens = tiny_params(config), random_tokens(config, (4, 7))
    targets, lengths = jnp.array([3, 5, 7, 9]), jnp.array([7, 5, 6, 7])
    run = compiled(
        functools.partial(
            integrated_gradients, config=config, quadrature=Quadrature(rule=rule, steps=4)
        )
    )
    expected = run(params, tokens, targets, lengths=lengths)
    split = jax.device_put((tokens, targets, lengths), batch_sharding(mesh, rules))
    # A mesh made with jax.make_mesh has explicit axes: that must do as well.
    made = jax.make_mesh(shape, ("data", "model"))
    out = run(shard_params(params, config, made, rules), *split[:2], lengths=split[2])
    size = np.linalg.norm(expected.scores)
    assert np.linalg.norm(np.asarray(out.scores) - np.asarray(expected.scores)) < 1e-5 * size
    np.testing.assert_allclose(out.ablated, expected.ablated, atol=1e-6)
    np.testing.assert_array_equal(out.nodes, expected.nodes)


def test_prompts_go_over_the_axes_that_split_no_part_of_the_model():
    config = tiny_config(num_heads=8, num_kv_heads=8)
    params, tokens = tiny_params(config), np.zeros((8, 5), np.int32)
    for mesh, preset, places in (
        ("4x2", "tensor", "data"),
        ("4x2", "fsdp-tensor", "data"),
        ("4x2", "fsdp", ("data", "model")),
        ("2x4", "data", ("data", "model")),
        ("1x8", "tensor", "data"),
    ):
        placed = shard_params(params, config, make_mesh(mesh), PRESETS[preset])
        out, lengths = spread_batch(placed, (tokens, tokens[:, 0]), config=config)
        assert out.sharding.spec[0] == lengths.sharding.spec[0] == places, (mesh, preset)
        assert out.sharding.is_equivalent_to(batch_sharding(make_mesh(mesh), PRESETS[preset]), 2)
    placed = shard_params(params, config, make_mesh("4x2"), PRESETS["data"])
    out = spread_batch(placed, tokens[:6], config=config)  # six prompts: over no four, but two
    assert out.sharding.spec[0] == "model"
    assert spread_batch(params, tokens, config=config) is tokens
