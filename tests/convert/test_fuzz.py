"""Damaged files: every one is an error of ours, soon and in little memory, or it is read right."""

import json
import random
import resource
import struct
import time
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
import pytest
from support.checkpoints import (
    byte_level_vocabulary,
    gguf_fields,
    gguf_tensors,
    hf_tensors,
    tiny,
    write_gguf,
    write_hf,
)

from jaxneurons.convert.gguf import open_gguf, read_gguf
from jaxneurons.convert.hf import read_hf
from jaxneurons.convert.safetensors_file import open_safetensors
from jaxneurons.convert.tokenizer import tokenizer_from_gguf
from jaxneurons.errors import JaxneuronsError
from jaxneurons.prompts.relations import read_relation

ROUNDS = 1500
SECONDS = 5.0  # for one input
MEMORY = 1 << 29  # bytes that all inputs together may add


def flip(rng: random.Random, data: bytes) -> bytes:
    out = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 8))):
        out[rng.randrange(len(out))] ^= 1 << rng.randrange(8)
    return bytes(out)


def cut(rng: random.Random, data: bytes) -> bytes:
    return data[: rng.randrange(len(data))]


def number(rng: random.Random, data: bytes) -> bytes:
    """Somewhere, a length or count becomes absurd."""
    at = rng.randrange(max(1, len(data) - 8))
    value = rng.choice((0, 1, 2**31, 2**32 - 1, 2**40, 2**63 - 1, 2**63, 2**64 - 1))
    return data[:at] + struct.pack("<Q", value) + data[at + 8 :]


def drop(rng: random.Random, data: bytes) -> bytes:
    at = rng.randrange(len(data))
    return data[:at] + data[at + rng.randrange(1, 64) :]


def double(rng: random.Random, data: bytes) -> bytes:
    at = rng.randrange(len(data))
    return data[:at] + data[at : at + rng.randrange(1, 256)] + data[at:]


def refusal(read: Callable[[], object]) -> str | None:
    """Our error's message, or None where the file was read; anything else is raised."""
    start = time.monotonic()
    message = None
    try:
        read()
    except JaxneuronsError as error:
        message = str(error)
    assert time.monotonic() - start < SECONDS
    if message is not None:
        assert message
        assert "\n" not in message
    return message


def assert_survives(
    original: bytes, put: Callable[[bytes], object], read: Callable[[], object], header: int
) -> None:
    """Mutate the first `header` bytes (and sometimes all) and read; ours or nothing is raised."""
    rng = random.Random(0)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    outcomes = {"read": 0, "refused": 0}
    for round_ in range(ROUNDS):
        mutate = rng.choice((flip, flip, cut, number, number, drop, double))
        size = len(original) if round_ % 5 == 0 else header
        mutated = mutate(rng, original[:size])
        put(mutated if mutate is cut else mutated + original[size:])
        refused = refusal(read)
        outcomes["read" if refused is None else "refused"] += 1
    assert outcomes["refused"] > ROUNDS // 3, outcomes
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown * 1024 < MEMORY


@pytest.fixture
def directory(tmp_path):
    return write_hf(tmp_path, tiny(), hf_tensors(tiny()))


def test_safetensors_headers(directory):
    path = directory / "model.safetensors"
    original = path.read_bytes()
    (length,) = struct.unpack("<Q", original[:8])
    _, good = read_hf(directory)

    def read() -> None:
        _, params = read_hf(directory)
        # What is not refused has kept its shapes (a flipped bit of a weight is a weight).
        assert jax.tree.map(lambda x: x.shape, params) == jax.tree.map(lambda x: x.shape, good)

    assert_survives(original, path.write_bytes, read, 8 + length)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors.index.json"])
def test_json_files(tmp_path, name):
    directory = write_hf(tmp_path, tiny(), hf_tensors(tiny()), shards=2)
    path = directory / name
    original = path.read_bytes()
    assert_survives(original, path.write_bytes, lambda: read_hf(directory), len(original))


ODD = [None, True, -1, 0, 1.5, 1e300, float("nan"), 2**70, "x", "", [], {}, [1], {"a": 1}, "llama"]


def test_every_configuration_value_replaced(directory):
    path = directory / "config.json"
    config = tiny(rope_scaling={"rope_type": "yarn", "factor": 2.0, "beta_fast": 3.0})
    for key in [*config, "layer_types", "use_sliding_window", "sliding_window", "attention_bias"]:
        for value in ODD:
            for model_type in ("llama", "mistral", "qwen2"):
                path.write_text(json.dumps({**config, "model_type": model_type, key: value}))
                message = refusal(lambda: read_hf(directory))
                assert message is None or str(directory) in message
    for key in config["rope_scaling"]:
        for value in ODD:
            scaling = {**config["rope_scaling"], key: value}
            path.write_text(json.dumps({**config, "rope_scaling": scaling}))
            message = refusal(lambda: read_hf(directory))
            assert message is None or "rope" in message


@pytest.mark.slow
def test_gguf_files(tmp_path):
    path = tmp_path / "m.gguf"
    vocabulary = byte_level_vocabulary()
    config = tiny(vocab_size=len(vocabulary["tokenizer.ggml.tokens"]))
    fields = {**gguf_fields(config), **vocabulary}
    write_gguf(path, fields, gguf_tensors(config, hf_tensors(config)))
    original = path.read_bytes()
    header = min(tensor.offset for tensor in open_gguf(path).tensors.values())

    def read() -> None:
        file = open_gguf(path)
        read_gguf(file)
        tokenizer_from_gguf(file.metadata, where=str(path))

    assert_survives(original, path.write_bytes, read, header)


HEADER = {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]}


@pytest.mark.parametrize(
    "change",
    [
        {"shape": [2**40, 2**40]},
        {"shape": [-2, -2]},
        {"shape": [2, 2, 0]},
        {"shape": [True, 4]},
        {"shape": "22"},
        {"shape": [2.0, 2.0]},
        {"data_offsets": [0, 2**63]},
        {"data_offsets": [16, 0]},
        {"data_offsets": [4, 20]},
        {"data_offsets": [0]},
        {"dtype": "F99"},
        {"dtype": ["F32"]},
        {"extra": 1},
    ],
)
def test_absurd_safetensors_entries(tmp_path, change):
    path = tmp_path / "x.safetensors"
    raw = json.dumps({"a": {**HEADER, **change}}).encode()
    path.write_bytes(struct.pack("<Q", len(raw)) + raw + bytes(16))
    with pytest.raises(JaxneuronsError, match=r"x\.safetensors"):
        open_safetensors(path)


@pytest.mark.parametrize(
    "raw",
    [
        b"[]",
        b"{",
        b"[" * 100_000,
        b'{"a": 1}',
        b'{"a": {}}',
        b"\xff\xfe{}",
        json.dumps({"a": HEADER})[:-1].encode() + b', "a": ' + json.dumps(HEADER).encode() + b"}",
        json.dumps({"a": HEADER, "b": HEADER}).encode(),  # two tensors in one place
        json.dumps({"a": {**HEADER, "data_offsets": [0, 16]}, "b": {**HEADER}}).encode(),
    ],
)
def test_absurd_safetensors_headers(tmp_path, raw):
    path = tmp_path / "x.safetensors"
    path.write_bytes(struct.pack("<Q", len(raw)) + raw + bytes(16))
    with pytest.raises(JaxneuronsError, match=r"x\.safetensors: damaged"):
        open_safetensors(path)


def test_the_reader_agrees_with_the_safetensors_package(tmp_path):
    from safetensors.numpy import save_file

    from jaxneurons.convert.safetensors_file import (
        ToWrite,
        open_safetensors,
        read_rows,
        write_safetensors,
    )

    rng = np.random.default_rng(0)
    kinds = [np.float32, np.float16, np.int64, np.uint8, np.bool_, np.float64]
    tensors = {
        f"t{n}.{i}": np.asarray(rng.normal(size=shape) * 9, kind)
        for n, kind in enumerate(kinds)
        for i, shape in enumerate([(3, 4), (5,), (), (2, 0, 3), (2, 3, 2)])
    }
    theirs, ours = tmp_path / "theirs.safetensors", tmp_path / "ours.safetensors"
    save_file(tensors, theirs)
    to_write = {
        name: ToWrite(values.dtype, values.shape, lambda values=values: [values])
        for name, values in tensors.items()
    }
    write_safetensors(ours, to_write)
    from safetensors.numpy import load_file

    for found in (load_file(ours), {n: read_rows(theirs, n, e).reshape(e.shape) for n, e in
                                    open_safetensors(theirs).items()}):  # fmt: skip
        assert set(found) == set(tensors)
        for name, values in tensors.items():
            assert found[name].dtype == values.dtype
            np.testing.assert_array_equal(found[name], values)
    entry = open_safetensors(theirs)["t0.0"]
    part = read_rows(Path(theirs), "t0.0", entry, slice(1, 3))
    np.testing.assert_array_equal(part, tensors["t0.0"][1:3])
    if part.ndim > 1:
        part = read_rows(Path(theirs), "t0.0", entry, slice(1, 3), slice(1, 2))
        np.testing.assert_array_equal(part, tensors["t0.0"][1:3, 1:2])


def test_relation_files(tmp_path):
    """Whatever stands in place of a value, the reader says what is wrong or reads it."""
    good = {
        "name": "in",
        "prompt_templates": ["{} is in"],
        "prompt_templates_zs": ["Where is {}? In"],
        "templates": {"mine": ["{}, in"]},
        "neutral_template": "So much for {}",
        "properties": {"domain_name": "city"},
        "translations": {"de": {"prompt_templates": ["{} liegt in"]}},
        "samples": [
            {"subject": "a", "object": "b", "translations": {"de": {"subject": "c", "object": "d"}}}
        ],
    }
    rng = random.Random(0)
    values = [None, 3, -1.5, "", "x", "{}", "{} {}", [], {}, [[]], [None], {"a": []}, True, ["{}"]]
    path = tmp_path / "r.json"

    def places(value):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        for key, inner in list(items):
            yield value, key
            if isinstance(inner, dict | list):
                yield from places(inner)

    read, messages = 0, []
    for _ in range(ROUNDS):
        changed = json.loads(json.dumps(good))
        for _ in range(rng.choice((1, 1, 2))):
            where, key = rng.choice(list(places(changed)))
            where[key] = rng.choice(values)
        data = json.dumps(changed).encode()
        path.write_bytes(rng.choice((lambda r, d: d, flip, cut, drop, double))(rng, data))
        try:
            relation = read_relation(path)
        except JaxneuronsError as error:
            messages.append(str(error))
        else:
            read += 1
            assert relation.triples
            assert all(t.count("{}") == 1 for s in relation.templates.values() for t in s)
    assert all("r.json" in message for message in messages)
    assert min(read, len(messages)) > ROUNDS // 20
