"""Sharded parameters are read in parts: what this process's devices hold, once, and nothing else.

Bytes are counted by the kernel: `rchar` of /proc/self/io.
"""

import functools
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import chex
import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding
from support.checkpoints import gguf_fields, gguf_tensors, hf_tensors, tiny, write_gguf, write_hf

from jaxneurons.convert.gguf import read_gguf
from jaxneurons.convert.hf import read_hf
from jaxneurons.convert.native import read_native, write_marker, write_params
from jaxneurons.errors import SourceError
from jaxneurons.model.sharding import PRESETS, make_mesh, param_shardings

COUNTER = Path("/proc/self/io")
counted = pytest.mark.skipif(not COUNTER.exists(), reason="the kernel counts bytes on Linux only")
CONFIG = tiny(
    vocab_size=512, hidden_size=64, intermediate_size=128, head_dim=16, tie_word_embeddings=False
)
MESHES = ("2x1", "1x2")
HEADERS = 16_000
"""Bytes of headers and configurations: more than these files have, with what is buffered."""


def bytes_read():
    return int(dict(line.split(": ") for line in COUNTER.read_text().splitlines())["rchar"])


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """The same parameters in every format, as functions of where they go."""
    directory = tmp_path_factory.mktemp("parts")
    tensors = hf_tensors(CONFIG)
    hf = write_hf(directory / "hf", CONFIG, tensors, shards=2)
    gguf = write_gguf(directory / "m.gguf", gguf_fields(CONFIG), gguf_tensors(CONFIG, tensors))
    config, params = read_hf(hf)
    native = directory / "native"
    native.mkdir()
    write_params(native, params)
    write_marker(native, config=config, facts={"dtype": "float32", "stored_dtypes": {}})
    return {
        "hf": functools.partial(read_hf, hf),
        "gguf": functools.partial(read_gguf, gguf),
        "native": functools.partial(read_native, native),
        "directory": directory,
    }


class OfFirstDevice(NamedSharding):
    """What a process sees that has the first device of a mesh only."""

    def addressable_devices_indices_map(self, shape):
        indices = super().addressable_devices_indices_map(shape)
        first = self.mesh.devices.flat[0]
        return {first: indices[first]}


def held(params, shardings):
    """Bytes of the different parts of parameters that the first device holds."""
    shapes = jax.tree.map(lambda x, s: s.shard_shape(x.shape), params, shardings)
    sizes = jax.tree.leaves(shapes, is_leaf=lambda x: isinstance(x, tuple))
    return sum(4 * int(np.prod(shape)) for shape in sizes)


def _index(sharding, shape):
    (index,) = sharding.addressable_devices_indices_map(shape).values()
    return index


@counted
@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("format_", ["hf", "gguf", "native"])
def test_a_process_reads_its_own_parts_and_no_more(sources, monkeypatch, format_, preset):
    read = sources[format_]
    config, whole = read()
    for module in ("fill", "zarr_chunks"):
        monkeypatch.setattr(
            f"jaxneurons.convert.{module}.to_devices",
            lambda blocks, *_: jax.device_put(blocks[0].host),
        )
    for mesh in MESHES:
        shardings = param_shardings(config, make_mesh(mesh), PRESETS[preset])
        first = jax.tree.map(lambda s: OfFirstDevice(s.mesh, s.spec), shardings)
        before = bytes_read()
        _, parts = read(place=lambda _, first=first: first)
        share, total = held(whole, shardings), sum(x.nbytes for x in jax.tree.leaves(whole))
        assert 0 <= bytes_read() - before - share <= HEADERS
        split = preset.startswith("fsdp") if mesh == "2x1" else preset != "data"
        assert (share < 0.52 * total) == split
        chex.assert_trees_all_equal(
            parts,
            jax.tree.map(
                lambda x, s: np.asarray(x)[_index(s, x.shape)],
                whole,
                first,
            ),
        )


@counted
@pytest.mark.parametrize("format_", ["hf", "gguf", "native"])
def test_every_byte_is_read_once_whatever_the_devices_share(sources, format_):
    read = sources[format_]
    config, whole = read()
    total = sum(x.nbytes for x in jax.tree.leaves(whole))
    for mesh, preset in (("2x1", "data"), ("1x2", "tensor"), ("2x1", "fsdp")):
        shardings = param_shardings(config, make_mesh(mesh), PRESETS[preset])
        before = bytes_read()
        _, params = read(place=lambda _, shardings=shardings: shardings)
        assert 0 <= bytes_read() - before - total <= HEADERS
        chex.assert_trees_all_equal(params, whole)
        assert jax.tree.all(jax.tree.map(lambda x, s: x.sharding == s, params, shardings))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_checkpoint_of_one_mesh_restores_under_another(sources, tmp_path, dtype):
    config, params = sources["hf"](
        place=lambda c: param_shardings(c, make_mesh("2x1"), PRESETS["fsdp"]), dtype=dtype
    )
    write_params(tmp_path, params)
    write_marker(tmp_path, config=config, facts={"dtype": dtype, "stored_dtypes": {}})
    shardings = param_shardings(config, make_mesh("1x2"), PRESETS["tensor"])
    _, again = read_native(tmp_path, place=lambda _: shardings)
    chex.assert_trees_all_equal(again, params)
    assert again["layers"]["ffn"]["up"]["kernel"].sharding.spec[2] == "model"
    assert again["embed"]["embedding"].dtype == dtype
    _, alone = read_native(tmp_path, dtype="float32")
    chex.assert_trees_all_equal(alone, jax.tree.map(lambda x: x.astype("float32"), params))


def test_many_chunks_and_missing_ones(sources, tmp_path, monkeypatch):
    monkeypatch.setattr("jaxneurons.convert.native._CHUNK_BYTES", 3_000)
    config, params = sources["hf"]()
    write_params(tmp_path, params)
    write_marker(tmp_path, config=config, facts={"dtype": "float32", "stored_dtypes": {}})
    chunks = [
        p for p in (tmp_path / "params" / "layers.ffn.up.kernel").iterdir() if p.name[0] != "."
    ]
    assert len(chunks) > 10
    for mesh, preset in (("2x1", "fsdp"), ("1x2", "tensor")):
        shardings = param_shardings(config, make_mesh(mesh), PRESETS[preset])
        _, again = read_native(tmp_path, place=lambda _, shardings=shardings: shardings)
        chex.assert_trees_all_equal(again, params)
    chunks[3].unlink()
    with pytest.raises(SourceError, match=r"cannot be restored: .*No such file"):
        read_native(tmp_path, place=lambda _: shardings)


def test_what_is_stored_otherwise_is_restored_by_orbax(sources, tmp_path, monkeypatch):
    config, params = sources["hf"]()
    monkeypatch.setattr("jaxneurons.convert.native.open_array", lambda path: None)
    shardings = param_shardings(config, make_mesh("1x2"))
    _, again = sources["native"](place=lambda _: shardings)
    chex.assert_trees_all_equal(again, params)


def test_values_that_float16_cannot_hold(sources, tmp_path):
    config, params = sources["hf"]()
    params["layers"]["ffn"]["up"]["kernel"] = (
        params["layers"]["ffn"]["up"]["kernel"].at[0, 1, 2].set(1e6)
    )
    write_params(tmp_path, params)
    write_marker(tmp_path, config=config, facts={"dtype": "float32", "stored_dtypes": {}})
    shardings = param_shardings(config, make_mesh("1x2"))
    with pytest.raises(SourceError, match=r"layers.ffn.up.kernel .* in float16; load with"):
        read_native(tmp_path, place=lambda _: shardings, dtype="float16")


@counted
@pytest.mark.slow
def test_two_processes_read_their_shares(sources):
    """Eight devices in two processes, every preset: measured bytes, and the values that arrived."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    script = Path(__file__).parents[1] / "support" / "read_shares.py"
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    processes = [
        subprocess.Popen(
            [sys.executable, script, str(port), str(number), sources["directory"]],
            stdout=subprocess.PIPE,
            env=environment,
        )
        for number in range(2)
    ]
    lines = [process.communicate(timeout=240)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    for output in lines:
        for key, (read, share, total, equal) in json.loads(output).items():
            assert equal, key
            assert share <= read <= share + HEADERS <= 1.1 * share, key
            _, mesh, preset = key.split()
            if preset.startswith("fsdp") or (preset == "tensor" and mesh == "1x8"):
                assert share < 0.6 * total, key  # four heads are not cut in eight
