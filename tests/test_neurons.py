"""Sets of neurons: algebra against Python's sets, tables, multipliers, controls."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from models import tiny_config

from jaxneurons.errors import ConfigError, DataError
from jaxneurons.neurons import (
    FFN,
    SITES,
    Neuron,
    NeuronSet,
    neuron_count,
    neuron_table,
    random_neurons,
    read_neurons,
    site_width,
)

MEMBERS = st.lists(
    st.tuples(st.sampled_from(SITES), st.integers(0, 40), st.integers(0, 2**31)), max_size=12
)


def made(members):
    found = {}
    for site, layer, index in members:
        found.setdefault(site, []).append((layer, index))
    return NeuronSet.of(**found)


def plain(neurons):
    return {(site, *neuron) for site, neuron in neurons}


@given(MEMBERS, MEMBERS)
def test_algebra_is_that_of_sets(a, b):
    x, y = made(a), made(b)
    assert plain(x) == set(a)
    assert len(x) == len(set(a))
    assert plain(x | y) == set(a) | set(b)
    assert plain(x & y) == set(a) & set(b)
    assert plain(x - y) == set(a) - set(b)
    assert (x <= y) == (set(a) <= set(b))
    assert (x == y) == (set(a) == set(b))
    assert (hash(x) == hash(y)) or x != y
    assert x == made(a[::-1])
    for site, layer, index in a:
        assert (site, Neuron(layer, index)) in x
    assert all(((site, (layer, i)) in y) == ((site, layer, i) in set(b)) for site, layer, i in a)


@given(MEMBERS)
def test_a_table_reads_back(tmp_path_factory, members):
    path = tmp_path_factory.mktemp("neurons") / "n.csv"
    path.write_text(neuron_table(made(members)))
    assert read_neurons(path) == made(members)


@pytest.mark.parametrize("dtype", [np.int32, np.int64, np.uint16])
def test_flat_positions(dtype):
    """Layers beyond the first survive whatever integers the positions come in."""
    config = tiny_config()
    sites = ("up", "down", "q")
    tables = {
        site: np.arange(config.num_layers * site_width(config, site)).reshape(config.num_layers, -1)
        for site in sites
    }
    flat = np.concatenate([table.reshape(-1) for table in tables.values()])
    count = len(flat)
    assert count == neuron_count(config, sites)
    chosen = np.array([count - 1, 0, 5, count // 2, count // 3])
    found = NeuronSet.of_flat(chosen.astype(dtype), config, sites)
    offsets = dict(zip(sites, np.cumsum([0, *(t.size for t in tables.values())]), strict=False))
    back = {offsets[site] + tables[site][layer, index] for site, (layer, index) in found}
    assert back == set(chosen.tolist())


def test_multipliers_and_counts():
    config = tiny_config()
    one = NeuronSet.of(up=[(0, 3), (2, 1), (2, 4)], down=[(1, 0)])
    scales = one.scales(config)
    assert set(scales) == {"up", "down"}
    assert scales["up"].shape == (config.num_layers, config.intermediate_size)
    assert np.argwhere(scales["up"] == 0).tolist() == [[0, 3], [2, 1], [2, 4]]
    assert scales["up"].sum() == scales["up"].size - 3
    assert one.scales(config, 2.5, sites=FFN)["down"][1, 0] == 2.5
    assert one.scales(config, sites=FFN)["gate"].all()
    assert one.layer_counts(3)["up"].tolist() == [1, 0, 2]
    with pytest.raises(DataError, match="up, down"):
        one.scales(config, sites=("up",))


@pytest.mark.parametrize("pair", [(3, 0), (0, 10**6)])
def test_neurons_of_another_model(pair):
    with pytest.raises(DataError, match="belong to another"):
        NeuronSet.of(up=[pair]).scales(tiny_config())


def test_bad_members():
    with pytest.raises(ConfigError, match="unknown site 'ups'; did you mean 'up'"):
        NeuronSet.of(ups=[(0, 0)])
    with pytest.raises(ConfigError, match="counted from 0, got -1"):
        NeuronSet.of(up=[(0, -1)])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("site,layer\nup,1\n", "line 2: needs a site"),
        ("site,layer,index\nup,1,2\nups,1,2\n", "line 3"),
        ("site,layer,index\nup,1,-2\n", "line 2"),
        ("site,layer,index\nup,x,2\n", "line 2"),
    ],
)
def test_bad_tables(tmp_path, text, message):
    (tmp_path / "n.csv").write_text(text)
    with pytest.raises(DataError, match=message):
        read_neurons(tmp_path / "n.csv")
    with pytest.raises(DataError, match="cannot be read"):
        read_neurons(tmp_path / "none.csv")


def test_controls():
    config = tiny_config()
    one = NeuronSet.of(up=[(0, 3), (2, 1), (2, 4)], down=[(1, 0)])
    other = one.random_like(config, np.random.default_rng(0))
    assert not one & other
    counts = [{s: c.tolist() for s, c in x.layer_counts(3).items()} for x in (one, other)]
    assert counts[0] == counts[1]
    drawn = [random_neurons(config, FFN, 20, np.random.default_rng(seed)) for seed in range(200)]
    assert {len(each) for each in drawn} == {20}
    seen = drawn[0]
    for each in drawn[1:]:
        seen = seen | each
    assert len(seen) == neuron_count(config, FFN)
