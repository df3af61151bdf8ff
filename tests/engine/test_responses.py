"""Responses: against PyTorch, and a store that survives stops and refuses what is not its own."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
from support.fixtures import room, write_lm
from support.models import tiny_config, tiny_params

import jaxneurons
from jaxneurons.engine import responses
from jaxneurons.engine.responses import ResponseStore, mean_responses
from jaxneurons.errors import ConfigError, DataError, WriteError
from jaxneurons.neurons.sets import SITES, site_width

CONFIG = tiny_config()
RNG = np.random.default_rng(0)
PROMPTS = [tuple(RNG.integers(0, CONFIG.vocab_size, n).tolist()) for n in (3, 9, 5, 1, 5, 14, 4)]


@pytest.fixture(scope="module")
def params():
    return tiny_params(CONFIG)


@pytest.fixture(autouse=True)
def small_batches(monkeypatch):
    monkeypatch.setattr(responses, "ROWS", 2)


def store(path, prompts=PROMPTS, **changes):
    options = {"config": CONFIG, "identity": {"model": "one"}, **changes}
    return ResponseStore(path, prompts, **options)


def expected(params, prompt):
    tokens = np.array([prompt], np.int32)
    return mean_responses(params, tokens, np.array([len(prompt)]), config=CONFIG, sites=SITES)


def check(found, params, sites, tolerance=1e-5):
    for number, prompt in enumerate(PROMPTS):
        wanted = expected(params, prompt)
        for site in sites:
            for layer in range(CONFIG.num_layers):
                np.testing.assert_allclose(
                    found.read(site, layer)[number],
                    wanted[site][layer, 0],
                    rtol=tolerance,
                    atol=tolerance,
                )


def test_means_against_pytorch(tmp_path):
    """Mean over the real tokens of what each projection puts out; padding changes nothing."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    path = write_lm(tmp_path / "lm")
    lm = jaxneurons.load(path)
    model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    seen = {}

    def keep(name):
        return lambda module, inputs, output: seen.__setitem__(name, output[0].mean(0).numpy())

    names = {site: ("mlp" if site in ("up", "gate", "down") else "self_attn") for site in SITES}
    del names["act"]
    for number, layer in enumerate(model.model.layers):
        for site, part in names.items():
            module = getattr(getattr(layer, part), f"{site}_proj")
            module.register_forward_hook(keep((site, number)))
    texts = ["The capital of France is Paris", "one two", "People who live in Rome speak Italian"]
    prompts = [lm.tokenizer(text)["input_ids"] for text in texts]
    longest = max(map(len, prompts)) + 3
    tokens = np.array([p + [7] * (longest - len(p)) for p in prompts], np.int32)
    lengths = np.array([len(p) for p in prompts])
    found = mean_responses(lm.params, tokens, lengths, config=lm.config, sites=tuple(names))
    for row, prompt in enumerate(prompts):
        with torch.no_grad():
            model(torch.tensor([prompt]))
        for (site, layer), values in seen.items():
            loudest = np.abs(values).max()  # these models' weights are loud
            assert np.abs(found[site][layer, row] - values).max() < 1e-4 * loudest


def test_rows_come_back_in_the_order_of_the_prompts(params, tmp_path):
    found = store(tmp_path / "r")
    told = []
    found.fill(params, ("up", "down"), progress=lambda done, total: told.append((done, total)))
    assert told[-1] == (len(PROMPTS), len(PROMPTS))
    check(found, params, ("up", "down"))
    with pytest.raises(DataError, match="'gate' are not complete"):
        found.read("gate", 0)


def test_a_stopped_run_goes_on(params, tmp_path, monkeypatch):
    whole = store(tmp_path / "whole")
    whole.fill(params, ("up", "gate"))

    def stop(done, total):
        if done >= 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        store(tmp_path / "r").fill(params, ("up", "gate"), progress=stop)
    with pytest.raises(DataError, match="not complete"):
        store(tmp_path / "r").read("up", 0)
    calls = []
    true = responses.mean_responses
    monkeypatch.setattr(
        responses, "mean_responses", lambda *a, **k: (calls.append(1), true(*a, **k))[1]
    )
    again = store(tmp_path / "r")
    again.fill(params, ("up", "gate"))
    assert len(calls) == 2  # of four batches
    for site in ("up", "gate"):
        for layer in range(CONFIG.num_layers):
            np.testing.assert_array_equal(again.read(site, layer), whole.read(site, layer))
    again.fill(params, ("up", "gate"))
    assert len(calls) == 2


def test_a_stop_before_the_first_batch(params, tmp_path, monkeypatch):
    def stop(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(responses, "mean_responses", stop)
        with pytest.raises(KeyboardInterrupt):
            store(tmp_path / "r").fill(params, ("up",))
    (tmp_path / "r" / ".responses.json.abc").write_text("{")
    found = store(tmp_path / "r")
    found.fill(params, ("up",))
    check(found, params, ("up",))


def test_in_memory_it_is_the_same(params, tmp_path, monkeypatch):
    """Whole, stopped and gone on with, in both dtypes; nothing is written anywhere."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(responses, "write_json", None)
    monkeypatch.setattr(responses, "make_directory", None)

    def stop(done, total):
        if done >= 4:
            raise KeyboardInterrupt

    for dtype, tolerance in (("float32", 1e-5), ("bfloat16", 1e-2)):
        memory = ResponseStore(None, PROMPTS, config=CONFIG, dtype=dtype)
        with pytest.raises(DataError, match="in memory: the responses at 'up' are not complete"):
            memory.read("up", 0)
        with pytest.raises(KeyboardInterrupt):
            memory.fill(params, ("up", "o"), progress=stop)
        with pytest.raises(DataError, match="'o' are not complete"):
            memory.read("o", 0)
        memory.fill(params, ("up", "o"))
        check(memory, params, ("up", "o"), tolerance)
        assert memory.read("up", 0).dtype == np.float32
    assert not list(tmp_path.iterdir())


def test_on_disk_and_in_memory_are_equal(params, tmp_path):
    disk, memory = store(tmp_path / "r", dtype="bfloat16"), store(None, dtype="bfloat16")
    for responses_ in (disk, memory):
        responses_.fill(params, ("down",))
    for layer in range(CONFIG.num_layers):
        np.testing.assert_array_equal(disk.read("down", layer), memory.read("down", layer))


def test_sites_may_be_added_later(params, tmp_path):
    store(tmp_path / "r").fill(params, ("up",))
    found = store(tmp_path / "r")
    found.fill(params, ("up", "q", "o"))
    check(found, params, ("up", "q", "o"))


def test_bfloat16(params, tmp_path):
    found = store(tmp_path / "r", dtype="bfloat16")
    found.fill(params, ("up",))
    check(found, params, ("up",), tolerance=1e-2)
    size = sum(path.stat().st_size for path in (tmp_path / "r" / "up").rglob("c/*/*/*"))
    assert size < 8 * CONFIG.num_layers * (CONFIG.intermediate_size * 2 + 8)


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"identity": {"model": "two"}}, "model"),
        ({"prompts": PROMPTS[1:]}, "prompts"),
        ({"dtype": "bfloat16"}, "stored_as"),
        ({"identity": {"model": "one", "dtype": "bfloat16"}}, "dtype"),
        ({"config": tiny_config(num_layers=2)}, "shape"),
    ],
)
def test_responses_of_something_else(params, tmp_path, changes, what):
    store(tmp_path / "r").fill(params, ("up",))
    with pytest.raises(DataError, match=f"holds responses with another {what}; delete it"):
        store(tmp_path / "r", **changes)


def test_damage_is_noticed(params, tmp_path):
    found = store(tmp_path / "r")
    found.fill(params, ("up",))
    chunk = sorted((tmp_path / "r" / "up" / "c").rglob("*"))[-1]
    content = bytearray(chunk.read_bytes())
    content[5] ^= 4
    chunk.write_bytes(bytes(content))
    with pytest.raises(DataError, match=r"damaged at layer 2 .*; delete .* and run again"):
        found.read("up", 2)


def test_a_full_disk(tmp_path, monkeypatch):
    """Names site and cause; what was written stays, and the same goes on when there is room."""
    monkeypatch.setattr(responses, "ROWS", 14)
    prompts, rng = PROMPTS * 4, np.random.default_rng(1)
    made = [
        {
            site: jnp.asarray(rng.normal(size=(CONFIG.num_layers, 14, site_width(CONFIG, site))))
            for site in ("up", "down")
        }
        for _ in range(2)
    ]
    path = tmp_path / "r" / "s"
    # The list of what is done, the array's description, its values.
    for most, where in ((100, r"s/responses\.json"), (400, "s/(up|down)"), (1000, "s/(up|down)")):
        with room(most), pytest.raises(WriteError, match=f"{where}: cannot be written: File too"):
            store(path, prompts).write(0, made[0])
    store(path, prompts).write(0, made[0])
    with room(1000), pytest.raises(WriteError, match=r"s/(up|down): .*make room, and the same"):
        store(path, prompts).write(1, made[1])
    store(path, prompts).write(1, made[1])
    other = store(tmp_path / "other", prompts)
    for number, batch in enumerate(made):
        other.write(number, batch)
    for site in ("up", "down"):
        for layer in range(CONFIG.num_layers):
            again = store(path, prompts).read(site, layer)
            np.testing.assert_array_equal(again, other.read(site, layer))


def test_bad_directories(tmp_path):
    (tmp_path / "x").write_text("x")
    with pytest.raises(DataError, match="holds files but no responses"):
        store(tmp_path)
    (tmp_path / "r").mkdir()
    for text in ("{", "[]", "[" * 10**5, json.dumps({"identity": {}, "done": 3})):
        (tmp_path / "r" / "responses.json").write_text(text)
        with pytest.raises(DataError, match=r"responses\.json: .*unreadable; delete"):
            store(tmp_path / "r")
    ones = {"up": jnp.ones((CONFIG.num_layers, 2, CONFIG.intermediate_size))}
    store(tmp_path / "q").write(0, ones)
    about = tmp_path / "q" / "responses.json"
    written = json.loads(about.read_text())
    for count in (5, -1, 1.5, None, True, "1"):
        about.write_text(json.dumps({**written, "done": {"up": count}}))
        with pytest.raises(DataError, match=r"responses\.json: up: .*unreadable; delete"):
            store(tmp_path / "q")
    with pytest.raises(ConfigError, match="unknown response dtype 'float8'"):
        store(tmp_path / "s", dtype="float8")
    with pytest.raises(DataError, match="no prompts"):
        store(tmp_path / "s", prompts=[])
