"""Second moments of keys against a plain float64 loop, and against numpy's solver."""

import dataclasses
import functools
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh
from support.fixtures import write_lm
from support.models import tiny_config, tiny_params

import jaxneurons
from jaxneurons.edit import (
    Covariance,
    SingularCovarianceWarning,
    check_covariance,
    collect_covariance,
    covariance,
    held_out_text,
    neutral_text,
    read_covariances,
    regularise,
    sample_text,
    texts,
    write_covariances,
)
from jaxneurons.errors import ConfigError, DataError
from jaxneurons.model.sharding import shard_params
from jaxneurons.model.transformer import forward

TEXT = ["The capital of France is Paris.", "", "A or B?", "Rome is old; nobody built it in a day."]


@pytest.fixture(scope="module", params=["bytes", "bytes+bos"])
def lm(request, tmp_path_factory):
    return jaxneurons.load(write_lm(tmp_path_factory.mktemp("lm"), request.param))


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return jaxneurons.load(write_lm(tmp_path_factory.mktemp("lm")))


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch):
    """Pieces of 16 tokens, a few of them in a batch."""
    for module in (texts, covariance):
        monkeypatch.setattr(module, "CHUNK", 16)
    monkeypatch.setattr(covariance, "TOKENS", 64)


@functools.partial(jax.jit, static_argnames=("config",))
def activations(params, tokens, config):
    return forward(params, tokens, config=config, at="all", capture=("act",)).activations["act"]


def keys_of(lm, piece):
    """[layer, key, width] in float64: one piece by itself, without its first token."""
    tokens = jnp.array([list(piece) + [7] * (16 - len(piece))], jnp.int32)
    keys = np.asarray(activations(lm.params, tokens, lm.config))[:, 0]
    return keys[:, 1 : len(piece)].astype(np.float64)


def all_keys(lm, texts, size=16):
    """[layer, key, width] in float64, piece by piece."""
    keys = []
    for text in filter(str.strip, texts):
        ids = list(lm.tokenizer(text)["input_ids"])
        begin = [lm.tokenizer.bos_token_id] * (ids[0] == lm.tokenizer.bos_token_id)
        ids, step = ids[len(begin) :], size - len(begin)
        for start in range(0, len(ids), step):
            piece = begin + ids[start : start + step]
            if len(piece) > 1:
                keys.append(keys_of(lm, piece))
    return np.concatenate(keys, axis=1)


def collect(lm, layers, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SingularCovarianceWarning)
        return collect_covariance(lm, layers, **options)


def test_it_is_the_second_moment_of_a_plain_loop(lm):
    layers, keys = [2, 0], all_keys(lm, TEXT)
    got = collect(lm, layers, text=TEXT)
    assert list(got) == layers
    for layer in layers:
        expected = keys[layer].T @ keys[layer] / keys.shape[1]
        scale = np.abs(expected).max()
        np.testing.assert_allclose(got[layer].matrix, expected, atol=3e-6 * scale)
        assert np.abs(expected - np.cov(keys[layer].T, bias=True)).max() > 0.01 * scale
        assert (got[layer].layer, got[layer].count) == (layer, keys.shape[1])
        assert got[layer].matrix.dtype == np.float32


def test_layers_above_the_last_one_are_not_needed(plain):
    both, alone = collect(plain, [0, 2], text=TEXT), collect(plain, [0], text=TEXT)
    np.testing.assert_allclose(alone[0].matrix, both[0].matrix, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("slides", [(True, True, False), (False, False, True), (False, True, True)])
def test_lower_layers_keep_their_windows(slides):
    config = tiny_config(sliding_window=3, sliding_layers=slides)
    params = tiny_params(config)
    tokens = jnp.arange(12, dtype=jnp.int32)[None]
    lower, below = covariance._lower_layers(config, params, 2)
    assert lower.num_layers == 2
    every = forward(params, tokens, config=config, at="all", capture=("act",))
    some = forward(below, tokens, config=lower, at="all", capture=("act",))
    np.testing.assert_allclose(some.activations["act"], every.activations["act"][:2], rtol=1e-4)


def test_exactly_so_many_keys_of_pieces_in_a_drawn_order(plain):
    got = collect(plain, [1], text=TEXT, vectors=21)[1]
    assert got.count == got.identity["vectors"] == 21
    pieces = texts.chunks(plain, TEXT)
    assert sorted(pieces) == sorted(texts.chunks(plain, TEXT, seed=5))
    assert pieces != texts.chunks(plain, TEXT, seed=5)
    keys = np.concatenate([keys_of(plain, piece)[1] for piece in pieces])
    expected = keys[:21].T @ keys[:21] / 21
    np.testing.assert_allclose(got.matrix, expected, atol=3e-6 * np.abs(expected).max())


def test_sharded_parameters_give_the_same(plain):
    mesh = Mesh(np.array(jax.devices()[:2]).reshape(1, 2), ("data", "model"))
    sharded = dataclasses.replace(plain, params=shard_params(plain.params, plain.config, mesh))
    one, two = collect(plain, [0, 1], text=TEXT), collect(sharded, [0, 1], text=TEXT)
    for layer in (0, 1):
        scale = np.abs(one[layer].matrix).max()
        np.testing.assert_allclose(two[layer].matrix, one[layer].matrix, atol=1e-5 * scale)


class Stopped(Exception):
    pass


def test_a_stopped_run_goes_on_to_the_same_result(plain, tmp_path, monkeypatch):
    monkeypatch.setattr(covariance, "KEPT", 2)
    whole = collect(plain, [0, 2], text=TEXT * 6)
    calls = []

    def stop(done, total):
        calls.append((done, total))
        if len(calls) == 5:
            raise Stopped

    with pytest.raises(Stopped):
        collect(plain, [0, 2], text=TEXT * 6, out=tmp_path / "c", progress=stop)
    went_on = []
    again = collect(
        plain, [0, 2], text=TEXT * 6, out=tmp_path / "c",
        progress=lambda done, total: went_on.append((done, total)),
    )  # fmt: skip
    assert went_on[0][0] == calls[4][0] > calls[3][0]  # four batches were kept, the fifth was not
    assert went_on[-1] == (whole[0].count, whole[0].count)
    for layer in (0, 2):
        np.testing.assert_array_equal(again[layer].matrix, whole[layer].matrix)
    assert again[0].identity == whole[0].identity
    third = collect(plain, [2, 0], text=TEXT * 6, out=tmp_path / "c", progress=stop)  # not called
    np.testing.assert_array_equal(third[2].matrix, whole[2].matrix)
    assert len(calls) == 5
    with pytest.raises(DataError, match="holds a run with another text_sha256, other vectors"):
        collect(plain, [0], text=TEXT, out=tmp_path / "c")


# --- solving --------------------------------------------------------------------------------------


def second_moment(keys, layer=0):
    matrix = (keys.T @ keys / len(keys)).astype(np.float32)
    return Covariance(layer, matrix, len(keys), {})


def test_solve_is_numpys():
    rng = np.random.default_rng(0)
    regular = second_moment(rng.normal(size=(200, 30)) * rng.uniform(0.1, 3, 30))
    asked = rng.normal(size=(4, 30)).astype(np.float32)
    expected = np.linalg.solve(regular.matrix.astype(np.float64), asked.T).T
    np.testing.assert_allclose(regular.solve(asked), expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(regular.solve(asked[0]), regular.solve(asked[:1])[0])
    assert regularise(regular).ridge == 0
    with pytest.raises(DataError, match="keys of width 29 for the covariance of layer 0"):
        regular.solve(asked[:, :29])


@pytest.mark.parametrize("why", ["few", "rather few", "dead"])
def test_a_singular_one_is_regularised_and_said_so(why):
    rng = np.random.default_rng(0)
    keys = rng.normal(size=({"few": 29, "rather few": 59}.get(why, 200), 30))
    if why == "dead":
        keys[:, 3] = 0
    singular = second_moment(keys, layer=5)
    with pytest.warns(SingularCovarianceWarning, match="covariance of layer 5 is singular"):
        regular = regularise(singular)
    mean = np.linalg.eigvalsh(singular.matrix.astype(np.float64)).mean()
    assert regular.ridge == pytest.approx(0.3 * mean)
    np.testing.assert_array_equal(regular.matrix, singular.matrix)
    whole = singular.matrix.astype(np.float64) + 0.3 * mean * np.eye(30)
    np.testing.assert_allclose(regular.regularised(), whole, rtol=1e-7)
    asked = rng.normal(size=30).astype(np.float32)
    np.testing.assert_allclose(regular.solve(asked), np.linalg.solve(whole, asked), rtol=1e-4)
    if why == "dead":
        with pytest.raises(DataError, match=r"layer 5 is singular \(200 keys of width 30\)"):
            singular.solve(asked)


def test_nothing_to_invert():
    for bad in (np.zeros((3, 3)), np.full((3, 3), np.nan)):
        with pytest.raises(DataError, match="covariance of layer 1 is zero or not finite"):
            regularise(Covariance(1, bad.astype(np.float32), 9, {}))


# --- files and identities -------------------------------------------------------------------------


def test_files_keep_all_and_refuse_another_model(plain, tmp_path, tmp_path_factory):
    got = collect(plain, [0, 2], text=TEXT)
    write_covariances(got, tmp_path / "keys.npz")
    back = read_covariances(tmp_path / "keys.npz", lm=plain)
    assert list(back) == [0, 2]
    for layer, one in back.items():
        np.testing.assert_array_equal(one.matrix, got[layer].matrix)
        assert (one.layer, one.count, one.ridge) == (layer, got[layer].count, got[layer].ridge)
        assert one.identity == got[layer].identity
    assert {"model", "tokenizer", "dtype", "text", "text_sha256", "vectors"} <= back[
        0
    ].identity.keys()
    other = jaxneurons.load(write_lm(tmp_path_factory.mktemp("other"), seed=1))
    with pytest.raises(DataError, match=r"keys.npz: .* collected with another model; collect it"):
        read_covariances(tmp_path / "keys.npz", lm=other)
    check_covariance(got[0], plain)
    with pytest.raises(DataError, match="another shape"):
        check_covariance(second_moment(np.eye(7)), plain)


@pytest.mark.parametrize("content", [None, b"", b"PK\x03\x04 cut off"])
def test_files_that_are_none(tmp_path, content):
    path = tmp_path / "keys.npz"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(DataError, match=r"keys\.npz: "):
        read_covariances(path)


def test_what_cannot_be_collected(plain):
    for layers, message in (([3], "layer 3: the model has 3 layers, 0 to 2"), ([], "no layers")):
        with pytest.raises(ConfigError, match=message):
            collect_covariance(plain, layers, text=TEXT)
    with pytest.raises(DataError, match=r"the text gives \d+ keys, 500 are needed; give more text"):
        collect_covariance(plain, [0], text=TEXT, vectors=500)
    with pytest.raises(DataError, match="no two tokens on end"):
        collect_covariance(plain, [0], text=["A", " "])
    with pytest.raises(DataError, match="the text gives 0 keys"):
        collect_covariance(plain, [0], text=[])
    with pytest.raises(ConfigError, match="text must be a sequence of strings"):
        collect_covariance(plain, [0], text="The capital of France is Paris.")


# --- texts ----------------------------------------------------------------------------------------


def test_bundled_texts_are_apart():
    neutral, held_out = neutral_text(), held_out_text()
    assert len(neutral) == len({*neutral}) > 20
    assert len(held_out) == len({*held_out}) >= 8
    assert not {*neutral} & {*held_out}
    assert min(len(text.split()) for text in (*neutral, *held_out)) > 60


def test_own_samples_fill_what_text_lacks(plain, monkeypatch):
    monkeypatch.setattr(texts, "neutral_text", lambda: TEXT)
    name, chosen = texts.default_text(plain, 20)
    assert (name, chosen) == ("neutral", TEXT)
    got = collect(plain, [0], vectors=90)
    assert got[0].identity["text"] == "neutral + own samples"
    assert got[0].count == 90
    again = collect(plain, [0], vectors=90)
    np.testing.assert_array_equal(got[0].matrix, again[0].matrix)
    assert got[0].identity == again[0].identity


def test_the_lab_model_reads_its_own_world():
    lm = jaxneurons.load("lab")
    name, chosen = texts.default_text(lm, 100)
    assert name == "lab"
    unknown = lm.tokenizer.unk_token_id
    assert all(unknown not in lm.tokenizer(text)["input_ids"] for text in chosen[:50])
    assert len(chosen) == len(jaxneurons.edit.lab_text(2000))
    assert chosen == jaxneurons.edit.lab_text() != jaxneurons.edit.lab_text(seed=1)
    told = {(fact.subject, fact.answer) for fact in jaxneurons.lab.facts() if fact.told}
    sentence = next(text for text in chosen[::2] if text.startswith("The "))
    assert any(s in sentence.split() and a in sentence.split() for s, a in told)


def test_samples_are_the_models(plain):
    samples = sample_text(plain, 3, 12)
    assert len(samples) == 3
    assert samples == sample_text(plain, 3, 12) != sample_text(plain, 3, 12, seed=1)
