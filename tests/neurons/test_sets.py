"""Sets of neurons: algebra against Python's sets, tables, multipliers, controls."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.models import tiny_config

from jaxneurons.errors import ConfigError, DataError
from jaxneurons.neurons.sets import (
    FFN,
    SITES,
    Neuron,
    NeuronSet,
    Ranking,
    neuron_count,
    neuron_table,
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
    np.testing.assert_array_equal(found.flat(config, sites), np.sort(chosen))


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
    with pytest.raises(
        DataError, match=r"which has .*: (indices|layers) go from 0 to .* belong to another"
    ):
        NeuronSet.of(up=[pair]).scales(tiny_config())


@pytest.mark.parametrize(
    ("pairs", "message"),
    [
        ([(0, 2**33 + 2)], "neuron 8589934594 is in no model"),
        ([(0, 2**32)], "neuron 4294967296 is in no model: the most is 4294967295"),
        ([(2**31, 1)], "layer 2147483648 is in no model"),
        ([(10**30, 1)], "layer 10{30} is in no model"),
        ([(0, 1), (0, -(10**30))], "counted from 0, got -10{30}"),
        ([(1.5, 2)], r"pairs of whole numbers, layer and index; got \(1\.5, 2\)"),
        ([(2.0, 2)], "pairs of whole numbers"),
        ([(float("nan"), 2)], "pairs of whole numbers"),
        (np.array([[1.0, 2.0]]), "pairs of whole numbers"),
        (["12"], "pairs of whole numbers"),
        ([("1", "2")], "pairs of whole numbers"),
        ([3], "pairs of whole numbers"),
        ([(1, 2, 3), (4, 5, 6)], "pairs of layer and index, got"),
        ([(1, 2), (3,)], "pairs of layer and index, got"),
        (np.arange(6), "pairs of layer and index, got"),
        (np.array([[0, 2**64 - 1]], np.uint64), f"neuron {2**64 - 1} is in no model"),
    ],
)
def test_what_is_no_neuron(pairs, message):
    with pytest.raises(ConfigError, match=message):
        NeuronSet.of(up=pairs)


def test_any_whole_numbers_make_neurons():
    """Each kind of integers, to the ends of what a code holds."""
    want = {("up", 2**31 - 1, 2**32 - 1), ("up", 0, 0), ("up", 3, 5)}
    pairs = [(2**31 - 1, 2**32 - 1), (0, 0), (3, 5)]
    kinds = [np.array(pairs), np.array(pairs, np.uint64), map(Neuron._make, pairs)]
    mixed = [(np.uint64(a), np.int64(b)) for a, b in pairs]  # numpy makes floats of these
    for one in (pairs, iter(pairs), *kinds, mixed):
        assert plain(NeuronSet.of(up=one)) == want
    assert not len(NeuronSet.of(up=np.zeros((0, 2))))


def test_what_is_no_code_or_position():
    for codes in ([-1], [1.5], ["1"], np.array([2**63], np.uint64), [[float("nan")]]):
        with pytest.raises(ConfigError, match="needed, got"):
            NeuronSet({"up": np.asarray(codes)})
    config = tiny_config()
    size = neuron_count(config, ("up",))
    for flat in ([-1], [size], [0.5]):
        with pytest.raises(ConfigError):
            NeuronSet.of_flat(np.asarray(flat), config, ("up",))
    assert len(NeuronSet.of_flat(np.zeros(0), config, ("up",))) == 0


def test_other_neurons_are_no_members():
    """Not those whose code would be the same."""
    one = NeuronSet.of(up=[(1, 3), (2, 0)])
    assert ("up", (1, 3)) in one
    for pair in ((0, 2**32 + 3), (2, -(2**32) + 3), (3, -(2**32)), (1.0, 3.0), (1, 3, 0)):
        assert ("up", pair) not in one


def test_bad_members():
    with pytest.raises(ConfigError, match="unknown site 'ups'; did you mean 'up'"):
        NeuronSet.of(ups=[(0, 0)])
    with pytest.raises(ConfigError, match="counted from 0, got -1"):
        NeuronSet.of(up=[(0, -1)])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("site,layer\nup,1\n", "needs the columns site, layer, index; its first row is 'site', 'l"),
        ("site,layer,index\nup,1,2\nups,1,2\n", "line 3"),
        ("site,layer,index\nup,1,-2\n", "line 2"),
        ("site,layer,index\nup,x,2\n", "line 2"),
        ("", "n.csv: needs the columns site, layer, index; it is empty"),
        *[
            (f"site,layer,index,score\nup,0,1,\nup,{pair},3\n", f"n.csv: line 3: {said}")
            for pair, said in (
                ("0,8589934594", "neuron 8589934594 is in no model"),
                ("1099511627776,1", "layer 1099511627776 is in no model"),
                (f"1,{10**30}", "needs a site"),
                ("1,1e30", "needs a site"),
                ("1.0,2", "needs a site"),
                ("nan,2", "needs a site"),
                ("1_0,2", "needs a site"),
                ("٣,2", "needs a site"),  # a digit to Python
            )
        ],
    ],
)
def test_bad_tables(tmp_path, text, message):
    (tmp_path / "n.csv").write_text(text)
    with pytest.raises(DataError, match=message):
        read_neurons(tmp_path / "n.csv")
    with pytest.raises(DataError, match="cannot be read"):
        read_neurons(tmp_path / "none.csv")


def test_a_ranking_is_a_set_with_an_order():
    pairs = (Neuron(2, 5), Neuron(0, 1), Neuron(1, 7))
    ranking = Ranking(pairs, "gate")
    assert list(ranking) == [("gate", neuron) for neuron in pairs]
    assert len(ranking) == 3
    assert ranking.neurons == NeuronSet.of(gate=sorted(pairs))


def test_a_ranking_of_no_site(as_users_call):
    with pytest.raises(ConfigError, match="unknown site 'gat'"):
        Ranking((), "gat")


def test_a_set_shows_its_members_or_how_many():
    few = NeuronSet.of(up=[(0, 3), (2, 1)], down=[(1, 0)])
    assert repr(few) == "NeuronSet.of(up=[(0, 3), (2, 1)], down=[(1, 0)])"
    assert eval(repr(few)) == few
    many = NeuronSet.of(up=[(0, i) for i in range(300)], q=[(1, 1)])
    assert repr(many) == "<NeuronSet of 301 neurons: 300 up, 1 q>"
    assert repr(NeuronSet()) == "NeuronSet.of()"
