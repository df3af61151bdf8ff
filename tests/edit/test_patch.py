"""Patches: made, written, read, applied, stacked, reverted and refused."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.fixtures import room, write_lm
from support.models import tiny_config, tiny_params

import jaxneurons as jn
from jaxneurons import ConfigError, DataError, NeuronSet
from jaxneurons.checkpoints.provenance import hash_values
from jaxneurons.edit import (
    LowRank,
    Multipliers,
    Rows,
    apply_patches,
    conflicts,
    make_patch,
    read_patch,
    revert,
    write_patch,
)
from jaxneurons.neurons.sets import SITES

HIDDEN, WIDTH, LAYERS = 32, 64, 3


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return write_lm(tmp_path_factory.mktemp("lm") / "model", model_type="qwen2")


@pytest.fixture(scope="module")
def lm(directory):
    return jn.load(directory)


@pytest.fixture(autouse=True)
def the_base_stays_as_it_is(request):
    """Whatever a test does: the base's parameters have the same hash afterwards."""
    if "lm" not in request.fixturenames:
        yield
        return
    lm = request.getfixturevalue("lm")
    yield
    assert hash_values(lm.config, lm.params) == lm.values_hash
    assert not lm.edited
    assert lm.patches == ()


def rank_one(layer=1, seed=0, rank=1, module="ffn.down"):
    rng = np.random.default_rng(seed)
    left = rng.normal(size=(WIDTH, rank), scale=0.3).astype(np.float32)
    right = rng.normal(size=(rank, HIDDEN), scale=0.3).astype(np.float32)
    return LowRank(module, layer, jnp.asarray(left), jnp.asarray(right))


def rows(layer=1, index=(3, 7), seed=5):
    values = np.random.default_rng(seed).normal(size=(len(index), HIDDEN)).astype(np.float32)
    return Rows("ffn.down", layer, jnp.asarray(index), jnp.asarray(values))


def some_of_every_site():
    return NeuronSet.of(**{site: [(0, 3), (2, 5), (2, 11)] for site in SITES})


def bits(params):
    return {
        jax.tree_util.keystr(path): np.asarray(leaf).tobytes()
        for path, leaf in jax.tree_util.tree_leaves_with_path(params)
    }


def down(lm, layer):
    return np.asarray(lm.params["layers"]["ffn"]["down"]["kernel"][layer], np.float32)


# --- what a patch knows its base by ---------------------------------------------------------------


def test_the_base_is_known_by_its_values(lm, directory, tmp_path):
    native = jn.load(jn.save(lm, tmp_path / "native"))
    assert native.hash != lm.hash
    assert native.values_hash == lm.values_hash
    narrow = jn.load(directory, dtype=jnp.bfloat16)
    assert narrow.values_hash != lm.values_hash
    stored = jn.save(narrow, tmp_path / "narrow", to="hf")
    wide = jn.load(stored, dtype=jnp.float32)
    assert wide.dtype != narrow.dtype
    assert wide.values_hash == narrow.values_hash
    other = write_lm(tmp_path / "other", model_type="qwen2", seed=1)
    assert jn.load(other).values_hash != lm.values_hash
    down = lm.params["layers"]["ffn"]["down"]["kernel"]
    swapped = down[jnp.asarray([1, 0, 2])]
    from jaxneurons.model.parameters import replace

    params = replace(lm.params, ("layers", "ffn", "down", "kernel"), swapped)
    assert dataclasses.replace(lm, params=params).values_hash != lm.values_hash


def test_sharded_parameters_have_the_same_values(lm):
    from jaxneurons.model.sharding import ShardingRules, shard_params

    mesh = jax.make_mesh((1, 2), ("data", "model"))
    sharded = shard_params(lm.params, lm.config, mesh)
    assert hash_values(lm.config, sharded) == lm.values_hash
    config = tiny_config(num_layers=4)
    params = tiny_params(config)
    by_layer = ShardingRules(
        layers="model", vocab=None, intermediate=None, heads=None, kv_heads=None
    )
    sharded = shard_params(params, config, mesh, by_layer)
    assert len(sharded["layers"]["ffn"]["up"]["kernel"].addressable_shards[0].data) == 2
    assert hash_values(config, sharded) == hash_values(config, params)


# --- files ----------------------------------------------------------------------------------------

KINDS = {
    "low-rank": lambda: [rank_one(), rank_one(2, seed=3, rank=2)],
    "rows": lambda: [rows()],
    "neurons": some_of_every_site,
    "all": lambda: [rank_one(0), rows(2), Multipliers("up", *map(jnp.asarray, NUMBERS))],
}
NUMBERS = (np.array([0, 1]), np.array([4, 5]), np.array([0.0, 1.5], np.float32))


@pytest.mark.parametrize("kind", KINDS)
def test_a_file_holds_all_of_a_patch(lm, tmp_path, kind):
    from safetensors import safe_open

    facts = {"seed": 3, "targets": ["Rome"], "measures": {"efficacy": float("nan")}}
    patch = make_patch(lm, KINDS[kind](), facts=facts)
    write_patch(patch, path := tmp_path / "a.safetensors")
    again = read_patch(path)
    assert again.digest == patch.digest
    assert again.base == patch.base == lm.values_hash
    assert again.facts == patch.facts
    assert again.facts["measures"] == {"efficacy": None}
    assert again.facts["jaxneurons"] == jn.__version__
    edited, same = apply_patches(lm, patch), apply_patches(lm, again)
    assert bits(edited.params) == bits(same.params) != bits(lm.params)
    with safe_open(path, "numpy") as file:  # anybody's reader reads it
        assert file.metadata()["format"] == "1"
        assert json.loads(file.metadata()["patch"])["base"] == lm.values_hash
        dtypes = {file.get_tensor(name).dtype.name for name in file.keys()}  # noqa: SIM118
    assert dtypes <= {"float32", "int32"}


def test_an_edit_says_how_it_was_found(lm):
    from jaxneurons.edit import ROME, Edit, Trace

    trace = Trace(
        np.full((2, 3), 0.5, np.float32),
        np.array([0.9, 0.1], np.float32),
        np.array([2, 3]),
        np.array([True, False]),
    )
    facts = {"covariance": {"model": "ab", "text": "neutral", "count": 10}}
    patch = make_patch(lm, Edit((rank_one(),), ROME(layer=1), trace, {}, facts))
    assert patch.method == patch.facts["method"] == "ROME"
    assert patch.facts["settings"]["layer"] == 1
    assert patch.facts["seed"] == 0
    assert patch.facts["covariance"]["text"] == "neutral"
    assert patch.facts["optimisation"]["reached"] == [True, False]
    assert patch.summary()["covariance"] == patch.facts["covariance"]
    assert "rank 1 added to ffn.down of layer 1" in repr(patch)
    assert patch.table()[0]["kind"] == "low-rank"
    delta = np.asarray(rank_one().left) @ np.asarray(rank_one().right)
    assert patch.table()[0]["norm"] == pytest.approx(np.linalg.norm(delta), rel=1e-5)


# --- applying and stacking ------------------------------------------------------------------------


def test_a_model_knows_that_it_is_edited(lm):
    patch = make_patch(lm, rank_one(), facts={"method": "test"})
    edited = apply_patches(lm, [patch])
    assert edited.edited
    assert edited.hash != lm.hash
    assert edited.values_hash == hash_values(edited.config, edited.params) != lm.values_hash
    assert edited.patches == (patch,)
    facts = edited.facts()
    assert facts["edited"] is True
    assert facts["patches"] == [patch.summary()]
    assert "changed_after_patches" not in facts
    json.dumps(facts)
    assert "patches" not in lm.facts()
    moved = dataclasses.replace(edited, params=jax.tree.map(lambda x: x + 0, edited.params))
    assert moved.facts()["changed_after_patches"] is True
    back = dataclasses.replace(edited, params=lm.params)
    assert not back.edited
    assert "patches" not in back.facts()


def test_a_model_in_one_line(lm, directory, tmp_path):
    count = sum(leaf.size for leaf in jax.tree.leaves(lm.params))
    said = f"<LM {directory}: qwen2, 3 layers, hidden size 32, 64 FFN neurons each, float32"
    assert repr(lm) == f"{said}, {count:,} parameters>"
    edited = apply_patches(lm, [make_patch(lm, rank_one()), make_patch(lm, rows(2))])
    assert repr(edited) == f"{said}, {count:,} parameters, 2 patches>"
    saved = jn.load(jn.save(edited, tmp_path / "saved"))
    assert repr(saved).endswith("parameters, 2 patches>")
    assert saved.edited
    assert not saved.changed
    moved = dataclasses.replace(lm, params=jax.tree.map(lambda x: x + 0, lm.params))
    assert repr(moved).endswith("changed since it was loaded>")


def test_two_patches_in_either_order_and_alone(lm):
    one, two = make_patch(lm, rank_one(1)), make_patch(lm, rank_one(1, seed=1))
    three = make_patch(lm, rows(2))
    want = down(lm, 1).astype(np.float64)
    want += np.asarray(one.changes[0].left, np.float64) @ np.asarray(one.changes[0].right)
    want += np.asarray(two.changes[0].left, np.float64) @ np.asarray(two.changes[0].right)
    both = [apply_patches(lm, order) for order in ([one, two, three], [three, two, one])]
    for edited in both:
        np.testing.assert_allclose(down(edited, 1), want, rtol=1e-6, atol=1e-6)
        np.testing.assert_array_equal(down(edited, 2)[[3, 7]], three.changes[0].values)
    # None leaves a trace in the other: each alone, before and after, is the same.
    alone = apply_patches(lm, two)
    after = apply_patches(revert(both[0], one, base=lm), [])
    assert bits(apply_patches(lm, [two, three]).params) == bits(after.params)
    assert bits(apply_patches(lm, two).params) == bits(alone.params)


def test_patches_made_one_after_the_other(lm):
    one = make_patch(lm, rows(1))
    first = apply_patches(lm, one)
    two = make_patch(first, rows(1, seed=6))  # the same rows: it knows what is there
    assert two.base == first.values_hash
    stepwise, together = apply_patches(first, two), apply_patches(lm, [one, two])
    assert bits(stepwise.params) == bits(together.params)
    assert [p.digest for p in together.patches] == [one.digest, two.digest]
    assert stepwise.facts()["patches"] == together.facts()["patches"]
    with pytest.raises(DataError, match="comes after that model's patches"):
        apply_patches(lm, [two])
    with pytest.raises(DataError, match="was made on top of"):
        revert(together, one)
    middle = revert(together, two)
    assert bits(middle.params) == bits(first.params)
    assert middle.patches == (one,)
    assert bits(revert(middle, one).params) == bits(lm.params)


def test_sums_are_rounded_once(directory):
    lm = jn.load(directory, dtype=jnp.bfloat16)
    one, two = make_patch(lm, rank_one(1)), make_patch(lm, rank_one(1, seed=1))
    edited = apply_patches(lm, [one, two])
    want = down(lm, 1).astype(np.float64)
    for patch in (one, two):
        want += np.asarray(patch.changes[0].left, np.float64) @ patch.changes[0].right
    want = np.asarray(want.astype(np.float32), jnp.bfloat16).astype(np.float32)
    assert (down(edited, 1) == want).mean() > 0.999  # but for float32's own last bit
    assert edited.dtype == jnp.bfloat16
    assert bits(revert(edited, two, base=lm).params) == bits(apply_patches(lm, one).params)


# --- reverting ------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", KINDS)
def test_reverting_restores_every_bit(directory, tmp_path, kind, dtype):
    lm = jn.load(directory, dtype=dtype)
    patch = make_patch(lm, KINDS[kind](), keep_base=True)
    edited = apply_patches(lm, patch)
    assert bits(edited.params) != bits(lm.params)
    write_patch(patch, tmp_path / "p")
    back = revert(edited, read_patch(tmp_path / "p"))
    assert bits(back.params) == bits(lm.params)
    assert not back.edited
    assert back.hash == lm.hash
    assert back.patches == ()
    # From the base, too, and of what was saved and loaded.
    assert revert(edited, patch, base=lm) is lm
    saved = jn.load(jn.save(edited, tmp_path / "saved", to="hf"), dtype=dtype)
    assert saved.facts()["patches"] == [patch.summary()]
    back = revert(saved, patch)
    assert bits(back.params) == bits(lm.params)
    assert "patches" not in back.facts()


def test_which_patches_carry_the_base(lm):
    assert make_patch(lm, rows()).revertible
    assert make_patch(lm, some_of_every_site()).revertible
    lean = make_patch(lm, rank_one())
    assert not lean.revertible
    edited = apply_patches(lm, lean)
    with pytest.raises(
        DataError, match=r"give the base \(base=, --base SRC\).* made with keep_base"
    ):
        revert(edited, lean)
    assert revert(edited, lean, base=lm) is lm


def test_reverting_one_of_several(lm):
    low, row = make_patch(lm, rank_one(1)), make_patch(lm, rows(2))
    neurons = make_patch(lm, NeuronSet.of(up=[(1, 4)], gate=[(0, 2)]), factor=2.0)
    edited = apply_patches(lm, [low, row, neurons])
    for patch, rest in ((row, [low, neurons]), (neurons, [low, row])):
        back = revert(edited, patch)
        assert bits(back.params) == bits(apply_patches(lm, rest).params)
        assert list(back.patches) == rest
        assert back.facts()["patches"] == [other.summary() for other in rest]
    back = revert(edited, low, base=lm)
    assert bits(back.params) == bits(apply_patches(lm, [row, neurons]).params)
    with pytest.raises(DataError, match="is not in this model"):
        revert(edited, make_patch(lm, rank_one(0)), base=lm)
    with pytest.raises(
        DataError, match=r"is not in this model: .* holds patch .*\(changes\), patch"
    ):
        revert(edited, make_patch(lm, rows(0)))
    with pytest.raises(DataError, match="the base has the parameters"):
        revert(edited, low, base=edited)


def test_entries_that_others_touch_need_the_base(lm):
    low = make_patch(lm, rank_one(1), keep_base=True)
    other = make_patch(lm, rank_one(1, seed=1))
    edited = apply_patches(lm, [low, other])
    with pytest.raises(DataError, match=r"touches entries of ffn\.down\.kernel of layer 1"):
        revert(edited, low)
    assert bits(revert(edited, low, base=lm).params) == bits(apply_patches(lm, other).params)


# --- what is refused ------------------------------------------------------------------------------


def test_another_model(lm, tmp_path):
    other = jn.load(write_lm(tmp_path / "other", model_type="qwen2", seed=1))
    patch = make_patch(lm, rank_one())
    with pytest.raises(DataError) as caught:
        apply_patches(other, patch)
    assert lm.values_hash[:16] in str(caught.value)
    assert other.values_hash[:16] in str(caught.value)
    assert "load the model that it was made on" in str(caught.value)
    deeper = jn.load(write_lm(tmp_path / "deeper", model_type="qwen2", num_hidden_layers=4))
    with pytest.raises(DataError, match=r"another configuration \(num_layers 3, here 4"):
        apply_patches(deeper, patch)


def test_a_patch_is_applied_once(lm, tmp_path):
    patch = make_patch(lm, rows())
    edited = apply_patches(lm, patch)
    for model in (edited, jn.load(jn.save(edited, tmp_path / "native"))):
        with pytest.raises(DataError, match="is in the model already"):
            apply_patches(model, patch)
    with pytest.raises(DataError, match="is in the model already"):
        apply_patches(lm, [patch, patch])


@pytest.mark.parametrize("to", ["native", "hf"])
def test_a_patch_of_the_base_of_an_edited_model(lm, tmp_path, to):
    one, two = make_patch(lm, rank_one()), make_patch(lm, rows(2))
    saved = jn.load(jn.save(apply_patches(lm, one), tmp_path / "edited", to=to), dtype="bfloat16")
    with pytest.raises(DataError) as caught:
        apply_patches(saved, two)
    assert f"is edited already: it holds {one.name}" in str(caught.value)
    assert "apply all patches together to that model" in str(caught.value)
    assert "in that dtype" not in str(caught.value)


CONFLICTS = {
    "rows": ([rows(1, (3, 7)), rows(1, (7, 9), 1)], 1),
    "other rows": ([rows(1, (3, 7)), rows(1, (8, 9), 1)], 0),
    "other layers": ([rows(1), rows(2)], 0),
    "terms": ([rank_one(1), rank_one(1, seed=1)], 0),
    "term and rows": ([rank_one(1), rows(1)], 1),
    "act and rows": ([NeuronSet.of(act=[(1, 3)]), rows(1)], 1),
    "down and rows": ([NeuronSet.of(down=[(1, 20)]), rows(1)], 1),
    "up twice": ([NeuronSet.of(up=[(1, 3), (1, 4)]), NeuronSet.of(up=[(1, 4)], down=[(1, 4)])], 1),
    "q twice": ([NeuronSet.of(q=[(1, 3)]), NeuronSet.of(q=[(1, 3)])], 2),  # its bias, too
    "act and down": ([NeuronSet.of(act=[(1, 3)]), NeuronSet.of(down=[(1, 4)])], 0),
}


@pytest.mark.parametrize("name", CONFLICTS)
def test_conflicts(lm, name):
    edits, count = CONFLICTS[name]
    patches = [make_patch(lm, edit, factor=0.5, facts={"n": n}) for n, edit in enumerate(edits)]
    meeting = conflicts(patches)
    assert len(meeting) == count
    if not count:
        assert apply_patches(lm, patches).patches == tuple(patches)
        return
    assert (meeting[0].first, meeting[0].second) == (0, 1)
    said = (
        r"patches 1 and 2 both touch 1 .*the order given.*allow_conflicts=True, --allow-conflicts"
    )
    if name == "term and rows":
        said = r"patches 1 and 2 both touch 2 rows.*ffn\.down\.kernel of layer 1 \(add, set\)"
    with pytest.raises(DataError, match=said):
        apply_patches(lm, patches)
    with pytest.raises(DataError, match=said):
        apply_patches(apply_patches(lm, patches[0]), patches[1])
    edited = apply_patches(lm, patches, allow_conflicts=True)
    assert edited.patches == tuple(patches)
    assert bits(revert(edited, patches[1], base=lm).params) == bits(
        apply_patches(lm, patches[0]).params
    )


BAD = {
    "layer": ([rank_one(3)], "layer 3 is not in this model, which has 3: layers go from 0 to 2"),
    "module": ([rank_one(module="ffn.dwn")], r"no module 'ffn\.dwn' in a layer.*'ffn\.down'"),
    "neuron": ([rows(1, (3, 64))], "neuron 64 is not .* which has 64: indices go from 0 to 63"),
    "negative": ([rows(1, (-1,))], "neuron -1 is not in this model"),
    "twice": ([rows(1, (3, 3))], "a neuron is there twice"),
    "shape": ([rank_one(module="ffn.up")], "left has the shape .*, not 32 x any"),
    "site": ([Multipliers("upp", *map(jnp.asarray, NUMBERS))], "unknown site 'upp'.*'up'"),
    "none": ([], "nothing differs"),
    "set": (NeuronSet.of(up=[(1, 99)]), "neuron 99 is not in this model"),
    "ones": ({"up": np.ones((3, 64), np.float32)}, "nothing differs"),
    "table": ({"up": np.ones((3, 6), np.float32)}, "shape"),
    "NaN": (
        [Multipliers("up", jnp.array([0]), jnp.array([1]), jnp.array([np.nan], np.float32))],
        "factor holds NaN or infinite numbers: the edit has failed",
    ),
    "infinite": (
        [LowRank("ffn.down", 0, jnp.full((64, 1), np.inf), jnp.ones((1, 32)))],
        "left holds NaN or infinite",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_changes(lm, name):
    edit, said = BAD[name]
    with pytest.raises(DataError, match=said):
        make_patch(lm, edit)


def test_facts_that_json_has_no_place_for(lm):
    with pytest.raises(DataError, match="facts of a patch: object has no place in JSON"):
        make_patch(lm, rows(), facts={"x": object()})


def test_numbers_beyond_the_dtype(directory):
    lm = jn.load(directory, dtype=jnp.float16)
    patch = make_patch(lm, LowRank("ffn.down", 0, jnp.full((64, 1), 1e3), jnp.full((1, 32), 1e3)))
    with pytest.raises(DataError, match="NaN or infinite numbers in float16; load the model in a"):
        apply_patches(lm, patch)


@pytest.mark.usefixtures("as_users_call")
def test_wrong_arguments(lm):
    with pytest.raises(ConfigError, match="edit must"):
        make_patch(lm, "a.safetensors")
    with pytest.raises(ConfigError, match="patches must be a Patch"):
        apply_patches(lm, ["a.safetensors"])
    with pytest.raises(ConfigError, match="lm must be an LM"):
        apply_patches(lm.params, [])


# --- damaged files --------------------------------------------------------------------------------


@pytest.fixture
def file(lm, tmp_path):
    write_patch(make_patch(lm, [rank_one(), rows(2)]), path := tmp_path / "a.patch")
    return path


def rewrite(path, change=lambda description, arrays: None, **metadata):
    """The file again, with other contents and without its own hash being made anew."""
    from safetensors import safe_open
    from safetensors.numpy import save_file

    with safe_open(path, "numpy") as file:
        texts = file.metadata()
        arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    description = json.loads(texts["patch"])
    change(description, arrays)
    save_file(arrays, path, {**texts, "patch": json.dumps(description), **metadata})


def test_a_full_disk_leaves_no_half_patch(lm, tmp_path, file):
    before = file.read_bytes()
    with room(1000), pytest.raises(DataError, match=r"a\.patch: cannot be written: File too large"):
        write_patch(make_patch(lm, rank_one(2)), file)
    assert file.read_bytes() == before
    with room(1000), pytest.raises(DataError, match="make room"):
        write_patch(make_patch(lm, rank_one(2)), tmp_path / "new.patch")
    assert [path.name for path in tmp_path.iterdir()] == ["a.patch"]
    with pytest.raises(DataError, match="No such file"):
        write_patch(make_patch(lm, rank_one(2)), tmp_path / "nowhere" / "new.patch")


def damage(name):
    def change(description, arrays):
        first = description["changes"][0]
        if name == "no base":
            del description["base"]
        elif name == "base":
            description["base"] = "../../etc"
        elif name == "layer":
            first["layer"] = 99
        elif name == "layer type":
            first["layer"] = True
        elif name == "module":
            first["module"] = "../x"
        elif name == "kind":
            first["kind"] = "pickle"
        elif name == "record":
            description["changes"][0] = 3
        elif name == "no changes":
            description["changes"] = []
        elif name == "config":
            description["config"]["num_layers"] = -1
        elif name == "config key":
            description["config"]["strange"] = 1
        elif name == "facts":
            description["facts"]["method"] = "better"
        elif name == "missing array":
            del arrays["changes.0.left"]
        elif name == "other array":
            arrays["changes.7.left"] = np.zeros((2, 2), np.float32)
        elif name == "dtype":
            arrays["changes.0.left"] = arrays["changes.0.left"].astype(np.float64)
        elif name == "axes":
            arrays["changes.0.left"] = arrays["changes.0.left"][None]
        elif name == "shape":
            arrays["changes.0.left"] = arrays["changes.0.left"][:-1]
        elif name == "NaN":
            arrays["changes.0.left"] = arrays["changes.0.left"] * np.float32(np.nan)
        elif name == "index":
            arrays["changes.1.index"] = arrays["changes.1.index"] - 5
        elif name == "one number":
            arrays["changes.0.left"] = arrays["changes.0.left"] * np.float32(1.001)

    return change


DAMAGES = {
    "no base": "no base",
    "base": "base of a patch is a SHA-256",
    "layer": "layer 99 is not in this model",
    "layer type": "layer: True where int is needed",
    "module": "no module",
    "kind": "unknown kind 'pickle'",
    "record": "3 where an object is needed",
    "no changes": "nothing differs|belongs to nothing",
    "config": "num_layers must be a positive integer",
    "config key": "unknown key 'strange'",
    "facts": "its SHA-256 is not the one it was written with",
    "missing array": r"changes\.0\.left is missing",
    "other array": "belongs to nothing",
    "dtype": "is missing or not float32",
    "axes": "has 3 axes",
    "shape": "left has the shape",
    "NaN": "NaN or infinite",
    "index": "neuron -2 is not in this model",
    "one number": "its SHA-256 is not the one it was written with",
}


@pytest.mark.parametrize("name", DAMAGES)
def test_damaged_patches(file, name):
    rewrite(file, damage(name))
    with pytest.raises(DataError, match=DAMAGES[name]) as caught:
        read_patch(file)
    assert str(file) in str(caught.value)


def test_files_that_are_no_patches(directory, file, tmp_path):
    with pytest.raises(DataError, match=r"model\.safetensors: a safetensors file, but no patch"):
        read_patch(directory / "model.safetensors")
    for content in (b"", b"PK\x03\x04", b"\xff" * 64, b"{}" * 40, file.read_bytes()[:-3]):
        (tmp_path / "x").write_bytes(content)
        with pytest.raises(DataError, match=r"/x: damaged or truncated safetensors file"):
            read_patch(tmp_path / "x")
    with pytest.raises(DataError, match=r"nothing: cannot be read: No such file"):
        read_patch(tmp_path / "nothing")
    with pytest.raises(DataError, match="Is a directory"):
        read_patch(tmp_path)
    rewrite(file, format="2")
    with pytest.raises(DataError, match="a patch of format '2', this version reads 1; use the"):
        read_patch(file)


def test_metadata_that_are_no_json(file):
    from safetensors import safe_open
    from safetensors.numpy import save_file

    with safe_open(file, "numpy") as opened:
        texts = opened.metadata()
        arrays = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    for text in ("", "[" * 100_000, "[]", '{"base": NaN}', '{"a": 1, "a": 2}'):
        save_file(arrays, file, {**texts, "patch": text})
        with pytest.raises(DataError, match=str(file)):
            read_patch(file)


# --- stacks of patches on disk --------------------------------------------------------------------


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def stacked(request, directory, tmp_path_factory):
    """A base, three patches of it of which two meet in a kernel, and the directory of them all."""
    lm = jn.load(directory, dtype=request.param)
    patches = [make_patch(lm, rank_one(1)), make_patch(lm, rank_one(1, seed=1, rank=2)),
               make_patch(lm, rows(2))]  # fmt: skip
    out = tmp_path_factory.mktemp("stacked") / "all"
    return lm, patches, jn.save(apply_patches(lm, patches), out, to="hf")


@pytest.mark.parametrize("dtype", ["float32", None])
def test_a_stack_that_was_saved_is_reverted(stacked, dtype):
    base, patches, out = stacked
    saved = jn.load(out, dtype=dtype)
    assert revert(saved, patches[::-1], base=base) is base  # in any order
    for gone in range(3):
        stay = [patch for number, patch in enumerate(patches) if number != gone]
        back = revert(saved, patches[gone], base=base, others=stay)
        want = apply_patches(base, stay)
        assert list(back.patches) == stay
        assert bits(back.params) == bits(want.params)
    with pytest.raises(DataError) as caught:
        revert(saved, patches[0], base=base)
    for needed in patches[1:]:
        assert f"{needed.name}, digest {needed.digest}" in str(caught.value)
    assert patches[0].digest not in str(caught.value)
    assert "others=, --keep PATCH" in str(caught.value)
    with pytest.raises(DataError, match=r"does not carry the base's entries: give the base"):
        revert(saved, patches)


def test_a_stack_in_bfloat16_from_a_base_in_float32(directory, tmp_path):
    narrow = jn.load(directory, dtype="bfloat16")
    base = jn.load(jn.save(narrow, tmp_path / "narrow", to="hf"))
    assert base.dtype == jnp.float32
    patches = [make_patch(base, rank_one(1)), make_patch(base, rows(2))]
    edited = apply_patches(narrow, patches)
    saved = jn.load(jn.save(edited, tmp_path / "edited", to="hf"))
    assert revert(saved, patches, base=base) is base
    back = revert(saved, patches[1], base=base, others=patches[0])
    assert back.dtype == jnp.float32
    assert back.values_hash == apply_patches(narrow, patches[0]).values_hash
    assert back.facts()["patches"] == [patches[0].summary()]
    assert "changed_after_patches" not in back.facts()


def test_a_stack_that_carries_its_entries(lm, tmp_path):
    one = make_patch(lm, rows(1))
    first = apply_patches(lm, one)
    top = make_patch(first, rank_one(1), keep_base=True)  # on top of the first, the same kernel
    aside = make_patch(lm, rows(2))
    out = jn.save(apply_patches(first, [top, aside]), tmp_path / "all")
    saved = jn.load(out)
    back = revert(saved, [aside, one, top])
    assert bits(back.params) == bits(lm.params)
    assert "patches" not in back.facts()
    back = revert(saved, aside, others=[one, top])
    assert bits(back.params) == bits(apply_patches(lm, [one, top]).params)
    with pytest.raises(DataError, match="was made on top of"):
        revert(saved, one, others=[top, aside])
    with pytest.raises(DataError, match=r"is not in this model: .*all holds patch .*, patch"):
        revert(saved, make_patch(lm, rows(0)), base=lm)
    # The last one alone, of a model that had been saved with those before it.
    part = jn.load(jn.save(first, tmp_path / "part"))
    both = jn.load(jn.save(apply_patches(part, top), tmp_path / "both"))
    back = revert(both, top)
    assert back.values_hash == first.values_hash
    assert back.facts()["patches"] == [one.summary()]
    assert revert(both, top, base=part) is part
    with pytest.raises(DataError, match=r"is in the base .* too"):
        revert(both, one, base=part, others=top)


def test_several_at_once_in_memory(lm):
    one, two = make_patch(lm, rows(1)), make_patch(lm, rows(1, (7, 9), 6))  # both set row 7
    three = make_patch(lm, rows(2))
    edited = apply_patches(lm, [one, two, three], allow_conflicts=True)
    assert bits(revert(edited, [one, two, three]).params) == bits(lm.params)
    back = revert(edited, [one, two])
    assert bits(back.params) == bits(apply_patches(lm, three).params)
    assert back.patches == (three,)
    assert revert(edited, []) is edited


def test_what_differs_otherwise_is_not_reverted(lm, tmp_path):
    """One value that no patch accounts for: nothing is reverted."""
    patches = [make_patch(lm, rows(1)), make_patch(lm, rows(2))]
    edited = apply_patches(lm, patches)
    params = jax.tree.map(lambda x: x, edited.params)
    params["final_norm"]["scale"] = params["final_norm"]["scale"].at[0].add(1)
    saved = jn.load(jn.save(dataclasses.replace(edited, params=params), tmp_path / "all", to="hf"))
    with pytest.raises(DataError, match="what they make of the base is not in this model"):
        revert(saved, patches, base=lm)
    with pytest.raises(DataError, match="are not all that differs from the base"):
        revert(saved, patches)
