"""What a model says of itself: hashes after edits in memory, and keys that were ignored."""

import dataclasses
import gc
import json
import weakref

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.fixtures import cloze, write_lm, write_queries

import jaxneurons as jn
from jaxneurons.checkpoints.provenance import hash_params
from jaxneurons.convert.native import MARKER
from jaxneurons.errors import ConfigError, DataError
from jaxneurons.qrnca.opening import open_run
from jaxneurons.relspec.method import RelSpecConfig
from jaxneurons.relspec.stages import begin, ignored_keys_of, resume
from jaxneurons.storage.store import RunDirectory

# A random model says anything rather than the answer.
pytestmark = pytest.mark.filterwarnings("ignore::jaxneurons.qrnca.caveats.UnlikelyAnswerWarning")


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return write_lm(tmp_path_factory.mktemp("provenance") / "tiny")


@pytest.fixture(scope="module")
def lm(directory):
    return jn.load(directory)


def changed(lm, number, *, to=None):
    """The model with one value of one of its parameters another one."""
    leaves, tree = jax.tree.flatten(lm.params)
    old = leaves[number]
    value = old.ravel()[-1] + 1 if to is None else to
    leaves[number] = old.at[tuple(size - 1 for size in old.shape)].set(value)
    return dataclasses.replace(lm, params=jax.tree.unflatten(tree, leaves))


def test_every_edit_of_the_parameters_is_another_hash(lm):
    assert not lm.edited
    before, count = lm.hash, len(jax.tree.leaves(lm.params))
    edits = [changed(lm, number) for number in range(count)]
    assert all(edit.edited for edit in edits)
    hashes = [edit.hash for edit in edits]
    assert len({before, *hashes}) == count + 1
    assert [changed(lm, number).hash for number in range(count)] == hashes  # the same edits again
    assert (lm.hash, lm.edited) == (before, False)
    # What was loaded, put back: the source again.
    assert dataclasses.replace(edits[0], params=lm.params).hash == before


def test_the_hash_of_an_edited_model_follows_further_edits(directory):
    lm = jn.load(directory)
    before = lm.hash
    edit = changed(lm, 0)
    first = edit.hash
    old = edit.params["final_norm"]["scale"]
    edit.params["final_norm"]["scale"] = old * 2  # the dictionary is the user's own
    assert edit.hash not in (before, first)
    edit.params["final_norm"]["scale"] = old
    assert edit.hash == first
    # Arrays of numpy can be changed in place.
    mine = jax.tree.map(np.array, lm.params)
    own = dataclasses.replace(lm, params=mine)
    copied = own.hash
    assert copied == hash_params(lm.config, lm.params) != before
    mine["final_norm"]["scale"][0] += 1
    assert own.hash != copied
    lm.params["final_norm"]["scale"] = lm.params["final_norm"]["scale"] * 2
    assert lm.edited
    assert lm.hash != before


def test_another_shape_or_dtype_is_another_hash(lm):
    rope = dataclasses.replace(lm.config.rope, theta=7.0)
    other = dataclasses.replace(lm, config=dataclasses.replace(lm.config, rope=rope))
    half = dataclasses.replace(lm, params=jax.tree.map(lambda x: x.astype("bfloat16"), lm.params))
    assert len({lm.hash, other.hash, half.hash}) == 3


def test_another_tokenizer_is_another_hash(lm, tmp_path):
    other = jn.load(write_lm(tmp_path / "other", "bytes+bos")).tokenizer
    edit = dataclasses.replace(lm, tokenizer=other)
    assert edit.hash == lm.hash
    assert edit.tokenizer_hash != lm.tokenizer_hash
    saved = jn.load(jn.save(edit, tmp_path / "saved"))
    assert saved.tokenizer("A")["input_ids"] == other("A")["input_ids"]
    assert saved.tokenizer("A")["input_ids"] != lm.tokenizer("A")["input_ids"]


def test_remembering_what_was_loaded_keeps_no_parameters_alive(directory):
    lm = jn.load(directory)
    seen = weakref.ref(lm.params["embed"]["embedding"])
    edit = dataclasses.replace(lm, params=jax.tree.map(lambda x: x * 1, lm.params))
    del lm
    gc.collect()
    assert seen() is None
    assert edit.edited


def test_an_edited_model_has_its_own_runs(lm, tmp_path):
    edit = changed(lm, 3)
    RunDirectory(tmp_path / "run", lm.identity())
    with pytest.raises(DataError, match="holds a run with another model"):
        RunDirectory(tmp_path / "run", edit.identity())
    assert lm.facts().keys() == {"source", "sha256", "tokenizer_sha256", "dtype", "config"}
    assert edit.facts()["edited"] is True
    assert edit.facts()["sha256"] == edit.hash


@pytest.mark.parametrize("to", ["native", "hf"])
def test_saving_an_edited_model(lm, tmp_path, to):
    edit = changed(lm, 3)
    saved = jn.load(jn.save(edit, tmp_path / "edit", to=to))
    same = jn.load(jn.save(lm, tmp_path / "same", to=to))
    chex.assert_trees_all_equal(saved.params, edit.params)
    assert not saved.edited
    assert len({lm.hash, edit.hash, saved.hash, same.hash}) == 4
    if to == "native":
        source = json.loads((tmp_path / "edit" / MARKER).read_text())["source"]
        assert source == {"name": lm.source, "sha256": edit.hash, "edited": True}
        source = json.loads((tmp_path / "same" / MARKER).read_text())["source"]
        assert source == {"name": lm.source, "sha256": lm.hash}


# --- keys that are ignored ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def strange(tmp_path_factory):
    """A model with a key that nobody knows."""
    path = write_lm(tmp_path_factory.mktemp("strange") / "tiny")
    values = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**values, "strange": 3}))
    return path


def test_ignored_keys_are_kept_with_the_model(strange, lm, tmp_path):
    with pytest.raises(ConfigError, match="strange = 3"):
        jn.load(strange)
    found = jn.load(strange, ignore_keys=("strange",))
    assert found.ignored_keys == ("strange",)
    assert found.config == lm.config
    assert found.facts()["ignored_keys"] == ["strange"]
    assert found.identity() == {**lm.identity(), "ignored keys": ["strange"]}
    RunDirectory(tmp_path / "run", {**found.identity(), "ignored keys": []})
    with pytest.raises(DataError, match="other ignored keys"):
        RunDirectory(tmp_path / "run", found.identity())
    native = jn.save(found, tmp_path / "native")
    assert json.loads((native / MARKER).read_text())["ignored_keys"] == ["strange"]
    for names in ((), ("strange",)):
        assert jn.load(native, ignore_keys=names).ignored_keys == ("strange",)
    with pytest.raises(ConfigError, match="no key 'other' to ignore: a native directory"):
        jn.load(native, ignore_keys=("other",))
    assert jn.load(jn.save(found, tmp_path / "hf", to="hf")).ignored_keys == ()
    assert jn.load(strange, ignore_keys=("strange",), dtype=None).dtype == "float32"


def test_commands_take_keys_to_ignore(run, strange, tmp_path):
    ignore = ("--ignore-key", "strange")
    code, _, err = run("inspect", strange)
    assert code == 1
    assert "--ignore-key strange" in " ".join(err.split())
    assert run("inspect", strange, *ignore)[0] == 0
    code, _, err = run("inspect", strange, "--ignore-key", "strang")
    assert (code, "no key 'strang' to ignore; did you mean 'strange'" in err) == (1, True)
    assert run("convert", strange, tmp_path / "native", *ignore)[0] == 0
    for command in (
        ("demo", "--model", strange),
        ("verify", strange, "--against", strange),
        ("qrnca", "locate", "--model", strange, "--queries", "facts"),
        ("relspec", "run", "--model", strange, "--relations", "bundled"),
        ("relspec", "collect", "--model", strange, "--relations", "bundled"),
    ):
        out = () if command[0] == "verify" else ("--out", tmp_path / "out")
        code, _, err = run(*command, *out, "--ignore-key", "strang")
        assert (code, "no key 'strang' to ignore" in err) == (1, True), (command, err)


def test_a_run_keeps_the_keys_that_it_was_made_without(run, strange, tmp_path):
    out, queries = tmp_path / "run", write_queries(tmp_path / "queries.json", cloze())
    located = ("qrnca", "locate", "--model", strange, "--queries", queries, "--out", out)
    code, _, err = run(*located, "--rule", "gauss", "--steps", 2, "--ignore-key", "strange")
    assert code == 0, err
    assert json.loads((out / "run.json").read_text())["model"]["ignored_keys"] == ["strange"]
    identity = json.loads((out / "parts" / "identity.json").read_text())
    assert identity["ignored keys"] == ["strange"]
    assert open_run(out).lm.ignored_keys == ("strange",)  # without being told again


def test_a_study_keeps_the_keys_that_it_was_begun_without(tmp_path):
    settings = RelSpecConfig()
    begin(tmp_path, "m", ["bundled"], settings)
    assert ignored_keys_of(tmp_path) == []
    begin(tmp_path, "m", ["bundled"], settings, ["strange"])
    assert ignored_keys_of(tmp_path) == ["strange"]
    assert resume(tmp_path) == ("m", ["bundled"], settings)


@pytest.mark.filterwarnings("ignore:.*cannot be divided")
def test_a_loaded_model_is_not_edited_wherever_it_lies(directory):
    mesh = jax.make_mesh((2,), ("model",))
    lm = jn.load(directory, mesh=mesh, rules=jn.ShardingRules(batch=None))
    assert not lm.edited
    assert lm.hash == jn.load(directory, dtype=jnp.bfloat16).hash
