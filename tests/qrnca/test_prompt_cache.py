"""Kept prompts: as they were, within the limit, and never in the way."""

import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.fixtures import (
    assert_same_outcomes,
    cloze,
    located_run,
    multi_choice,
    write_lm,
    write_queries,
)

import jaxneurons
from jaxneurons.engine.last_position import LastPosition
from jaxneurons.engine.quadrature import Quadrature
from jaxneurons.prompts import batches
from jaxneurons.prompts.answers import TokenPrompt
from jaxneurons.prompts.queries import read_queries
from jaxneurons.qrnca import method as qrnca
from jaxneurons.qrnca import prompt_cache as caches
from jaxneurons.qrnca import trials as trials_module
from jaxneurons.qrnca.method import QRNCAConfig
from jaxneurons.qrnca.opening import open_run
from jaxneurons.qrnca.prompt_cache import Caches, Prompts, default_limit
from jaxneurons.qrnca.trials import run_trials

# A random model says anything rather than the answer.
pytestmark = pytest.mark.filterwarnings("ignore::jaxneurons.qrnca.caveats.UnlikelyAnswerWarning")

SETTINGS = QRNCAConfig(quadrature=Quadrature("gauss", 2), common=0.6)


def prompts(dtype=jnp.float32):
    rng = np.random.default_rng(0)

    def made(*shape):
        return jnp.asarray(rng.normal(size=shape), dtype)

    counts = jnp.arange(2, dtype=jnp.int32)
    last = LastPosition(
        made(3, 2, 5, 2, 4), made(3, 2, 5, 2, 4), made(2, 8), counts, counts, counts[:, None]
    )
    return Prompts(last, made(3, 2, 16))


def batch(seed=0):
    return batches.plan([TokenPrompt((1, 2, 3 + seed), (4,), ()), TokenPrompt((5, 6), (7,), ())])[0]


def same(a, b):
    pairs = list(zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))
    return all(x.dtype == y.dtype and (np.asarray(x) == np.asarray(y)).all() for x, y in pairs)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_round_trip(tmp_path, dtype):
    kept = Caches(tmp_path, 1 << 20)
    assert kept.load(3, batch()) is None
    assert kept.keep(3, batch(), prompts(dtype))
    assert same(kept.load(3, batch()), prompts(dtype))
    assert kept.load(3, batch(seed=1)) is None  # other prompts
    assert kept.size() == sum(file.stat().st_size for file in (tmp_path / "caches").iterdir()) > 0


@pytest.mark.parametrize("where", [0, 40, 200, -3])
def test_a_damaged_file_is_as_none(tmp_path, where):
    kept = Caches(tmp_path, 1 << 20)
    kept.keep(0, batch(), prompts())
    file = tmp_path / "caches" / "00000.bin"
    content = bytearray(file.read_bytes())
    content[where] ^= 1
    file.write_bytes(content)
    assert kept.load(0, batch()) is None
    for length in (0, 10, 300, len(content) - 1):
        file.write_bytes(content[:length])
        assert kept.load(0, batch()) is None


def test_no_more_than_the_limit(tmp_path):
    one = sum(leaf.nbytes for leaf in jax.tree.leaves(prompts()))
    kept = Caches(tmp_path, int(3.5 * one))
    assert [kept.keep(n, batch(), prompts()) for n in range(5)] == [True, True, True, False, False]
    assert kept.size() <= 3.5 * one
    assert kept.load(2, batch()) is not None
    assert kept.load(3, batch()) is None
    assert not Caches(tmp_path / "none", 0).keep(0, batch(), prompts())
    assert not (tmp_path / "none").exists()


def test_a_full_disk_is_no_error(tmp_path, monkeypatch):
    kept = Caches(tmp_path, 1 << 20)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(caches.Path, "replace", full)
    assert not kept.keep(0, batch(), prompts())
    assert list((tmp_path / "caches").iterdir()) == []


def test_default_limit(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(0, 0, 10 << 30))
    assert default_limit(tmp_path) == 2 << 30
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(0, 0, 1 << 40))
    assert default_limit(tmp_path) == 16 << 30
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert default_limit(tmp_path) == 0


@pytest.mark.slow
@pytest.mark.parametrize("form", ["options", "free answers of several tokens"])
def test_trials_are_the_same_with_and_without(tmp_path, monkeypatch, form):
    lm = jaxneurons.load(write_lm(tmp_path / "model"))
    records = multi_choice(8) if form == "options" else cloze(8)
    if form != "options":
        for n, record in enumerate(records):
            record["group"] = "ab"[n % 2]
            record["answer"] = f"{record['answer']} and more"
    queries = read_queries(write_queries(tmp_path / "queries.json", records))
    run = located_run(
        lm, queries, out=tmp_path / "run", settings=SETTINGS, batch_size=4, cache_bytes=1 << 28
    )
    shutil.copytree(run.path, tmp_path / "without")
    shutil.rmtree(tmp_path / "without" / "caches")
    ran, real = [], qrnca.run_prompts

    def counted(*args, **options):
        ran.append(1)
        return real(*args, **options)

    monkeypatch.setattr(trials_module, "run_prompts", counted)
    found = run_trials(run)
    assert not ran
    again = run_trials(open_run(tmp_path / "without", lm))
    assert ran
    assert_same_outcomes(found, again)
