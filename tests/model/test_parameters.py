"""The table of parameters: what it says of a model, and that everything follows when it grows."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, PartitionSpec
from safetensors.numpy import load_file
from support.checkpoints import hf_tensors, tiny, write_hf
from support.models import random_tokens, tiny_config, tiny_params

from jaxneurons import ModelConfig, SourceError, Transformer, forward
from jaxneurons.checkpoints.description import describe
from jaxneurons.convert import export
from jaxneurons.convert.config import config_from_hf
from jaxneurons.convert.hf import read_hf
from jaxneurons.convert.native import read_native, write_marker, write_params
from jaxneurons.convert.rules import gguf_biases, stored_names
from jaxneurons.engine.row_memory import rows_in_budget
from jaxneurons.model import parameters as table
from jaxneurons.model.config import PROJECTIONS
from jaxneurons.model.parameters import (
    TABLE,
    count_parameters,
    list_parameters,
    norm,
    param_shapes,
    params_dtype,
    projection,
    site_widths,
)
from jaxneurons.model.sharding import logical_axes, param_shardings
from jaxneurons.neurons.sets import SITES, site_width

IS_TUPLE = {"is_leaf": lambda x: isinstance(x, tuple)}

# Qwen3 norms each head of q; a router as of Mixtral, here with a bias.
GROWN = (
    *TABLE,
    norm("layers.attn.q_norm", "head_dim", when=lambda config: config.family == "llama"),
    projection("layers.ffn.router", "hidden", "intermediate", bias=lambda config: True),
)
ADDED = {
    ("layers", "attn", "q_norm", "scale"): (2, 8),
    ("layers", "ffn", "router", "kernel"): (2, 32, 64),
    ("layers", "ffn", "router", "bias"): (2, 64),
}


@pytest.fixture
def grown(monkeypatch):
    """Every reader sees a copy of the table with two rows more."""
    monkeypatch.setattr(table, "TABLE", GROWN)


def config_of(**changes) -> ModelConfig:
    return config_from_hf(tiny(**changes), where="x")


def leaves(tree):
    """Path to leaf."""
    found = jax.tree_util.tree_leaves_with_path(tree, **IS_TUPLE)
    return {tuple(key.key for key in path): leaf for path, leaf in found}


def test_the_module_makes_what_the_table_says():
    for config in (tiny_config(), tiny_config(tied=True, biases=PROJECTIONS)):
        tokens = jnp.zeros((1, 2), jnp.int32)
        params = Transformer(config).init(jax.random.key(0), tokens)["params"]
        assert jax.tree.map(jnp.shape, params) == param_shapes(config)
        assert count_parameters(config) == sum(x.size for x in jax.tree.leaves(params))
        assert params_dtype(params) == np.float32
        for path, values in leaves(params).items():
            if path[-1] in ("scale", "bias"):
                assert (np.asarray(values) == (path[-1] == "scale")).all(), path
            elif path[-1] == "kernel":  # LeCun: variance 1 / inputs
                assert np.std(values) == pytest.approx(values.shape[-2] ** -0.5, rel=0.1), path


def test_biases_are_along_the_outputs_of_the_projections_that_a_configuration_names():
    there = [module for module in TABLE if module.when(tiny_config())]
    kernels = [module.path for module in there if module.weight == "kernel"]
    assert sorted(path.split(".")[-1] for path in kernels) == sorted((*PROJECTIONS, "unembed"))
    for name in PROJECTIONS:
        found = [p for p in list_parameters(tiny_config(biases=(name,))) if p.path[-1] == "bias"]
        (bias,) = found
        (kernel,) = (p for p in list_parameters(tiny_config()) if p.path[2:] == (name, "kernel"))
        assert (bias.path[2], bias.axes) == (name, ("layers", kernel.axes[-1]))


def test_a_site_is_as_wide_as_its_activations():
    config = tiny_config()
    tokens = random_tokens(config, (1, 3))
    out = forward(tiny_params(config), tokens, config=config, capture=SITES)
    widths = {site: out.activations[site].shape[-1] for site in SITES}
    assert widths == site_widths(config) == {site: site_width(config, site) for site in SITES}
    assert tuple(site_widths(config)) == SITES


@pytest.mark.usefixtures("grown")
def test_the_module_follows_the_table():
    config = config_of()
    params = Transformer(config).init(jax.random.key(0), jnp.zeros((1, 2), jnp.int32))["params"]
    made = leaves(params)
    assert {path: made[path].shape for path in ADDED} == ADDED
    q_norm, kernel, bias = (np.asarray(made[path]) for path in ADDED)
    assert (q_norm == 1).all()
    assert (bias == 0).all()
    assert np.std(kernel) == pytest.approx(32**-0.5, rel=0.1)
    assert not np.array_equal(kernel[0], kernel[1])  # each layer's own draw


@pytest.mark.usefixtures("grown")
def test_shardings_follow_the_table():
    mesh = Mesh(np.array(jax.devices()[:2]).reshape(1, 2), ("data", "model"))
    config = config_of()
    specs = {path: x.spec for path, x in leaves(param_shardings(config, mesh)).items()}
    assert [specs[path] for path in ADDED] == [
        PartitionSpec(None, None),
        PartitionSpec(None, None, "model"),
        PartitionSpec(None, "model"),
    ]
    assert leaves(logical_axes(config))[next(iter(ADDED))] == ("layers", "head_dim")


@pytest.mark.usefixtures("grown")
def test_conversion_follows_the_table(tmp_path):
    config = tiny()
    old = hf_tensors(config)
    with pytest.raises(SourceError, match=r"6 tensors are missing: .*0\.self_attn\.q_norm"):
        read_hf(write_hf(tmp_path / "old", config, old))
    with pytest.raises(SourceError, match="6 tensors are missing"):
        describe(str(write_hf(tmp_path / "old", config, old)))
    new = dict(old)
    rng = np.random.default_rng(1)
    for layer in range(2):
        at = f"model.layers.{layer}"
        for name, shape in {
            f"{at}.self_attn.q_norm.weight": (8,),
            f"{at}.mlp.router_proj.weight": (64, 32),
            f"{at}.mlp.router_proj.bias": (64,),
        }.items():
            new[name] = rng.normal(size=shape).astype(np.float32)
    parsed, params = read_hf(write_hf(tmp_path / "new", config, new))
    read = leaves(params)
    assert {path: read[path].shape for path in ADDED} == ADDED
    router = np.asarray(params["layers"]["ffn"]["router"]["kernel"])
    np.testing.assert_array_equal(router[1].T, new["model.layers.1.mlp.router_proj.weight"])

    (tmp_path / "again").mkdir()
    export.write_hf(tmp_path / "again", params, config=parsed)
    again = load_file(tmp_path / "again" / "model.safetensors")
    assert again.keys() == new.keys()
    for name, values in new.items():
        np.testing.assert_array_equal(again[name], values, err_msg=name)

    (tmp_path / "native").mkdir()
    write_params(tmp_path / "native", params)
    write_marker(
        tmp_path / "native", config=parsed, facts={"dtype": "float32", "stored_dtypes": {}}
    )
    assert leaves(read_native(tmp_path / "native")[1]).keys() == read.keys()


@pytest.mark.usefixtures("grown")
def test_names_in_gguf_files_follow_the_table():
    config = config_of()
    names = stored_names(config, "gguf")
    assert {"blk.0.attn_q_norm.weight", "blk.1.ffn_router.weight", "blk.1.ffn_router.bias"} <= {
        *names
    }
    assert len(names) == 2 + 2 * 12
    assert "blk.0.attn_q_norm.weight" not in stored_names(
        dataclasses.replace(config, family="mistral"), "gguf"
    )
    assert gguf_biases({"blk.0.ffn_router.bias": 0, "blk.0.attn_k.bias": 0}) == ("k", "router")


def test_counts_and_the_row_budget_follow_the_table(monkeypatch):
    config = config_of()
    count, rows = count_parameters(config), rows_in_budget(config, 100, 10**6)
    monkeypatch.setattr(table, "TABLE", GROWN)
    assert count_parameters(config) == count + 2 * (8 + 32 * 64 + 64)
    assert 1 < rows_in_budget(config, 100, 10**6) < rows


def test_rows_in_budget_counts_what_the_backward_pass_keeps():
    """By hand: every projection's output, attention's mixed values, scores, three vocabularies."""
    config = tiny_config()
    hidden, inner, query, kv, vocab, heads, layers = 32, 40, 32, 16, 48, 4, 3
    kept = 2 * inner + 2 * hidden + 2 * query + 2 * kv + heads * (10 + 1)
    row = 4 * (layers * kept + 3 * vocab)
    assert rows_in_budget(config, 10, 7 * row) == 7
    assert rows_in_budget(config, 10, 7 * row - 1) == 6
