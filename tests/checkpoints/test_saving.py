"""Out and back in: native and Hugging Face directories, bit for bit."""

import errno
import gc
import hashlib
import importlib
import inspect
import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import warnings

import chex
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from support.checkpoints import (
    byte_level_vocabulary,
    gguf_fields,
    gguf_tensors,
    tiny,
    write_gguf,
    write_hf,
)
from support.checkpoints import hf_tensors as random_tensors
from support.fixtures import room

import jaxneurons
from jaxneurons import ConfigError, ShardingRules, SourceError
from jaxneurons.convert.config import config_from_hf
from jaxneurons.convert.export import config_to_hf
from jaxneurons.convert.native import MARKER

save = jaxneurons.save
module = importlib.import_module(
    "jaxneurons.checkpoints.saving"
)  # the name in the package is the function


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    """A small tokenizer, as a GGUF file describes it."""
    path = write_tiny_gguf(tmp_path_factory.mktemp("gguf") / "m.gguf")
    return jaxneurons.load(path).tokenizer


def write_tiny_gguf(path, **changes):
    vocabulary = byte_level_vocabulary()
    config = tiny(vocab_size=len(vocabulary["tokenizer.ggml.tokens"]), **changes)
    fields = {**gguf_fields(config), **vocabulary}
    return write_gguf(path, fields, gguf_tensors(config, random_tensors(config)))


def write_checkpoint(directory, tokenizer, *, cast=None, shards=1, **changes):
    config = tiny(vocab_size=len(tokenizer), **changes)
    tensors = random_tensors(config)
    if cast:
        tensors = {
            name: values.astype(cast[n % len(cast)])
            for n, (name, values) in enumerate(tensors.items())
        }
    write_hf(directory, config, tensors, shards)
    tokenizer.save_pretrained(directory)
    (directory / "generation_config.json").write_text('{"temperature": 0.6, "do_sample": true}')
    return tensors


def stored(directory):
    found = {}
    for path in sorted(directory.glob("*.safetensors")):
        found |= load_file(path)
    return found


def assert_bits(ours, theirs):
    assert set(ours) == set(theirs)
    for name, values in theirs.items():
        assert ours[name].dtype == values.dtype, name
        assert ours[name].tobytes() == values.tobytes(), name


BF16 = ml_dtypes.bfloat16


@pytest.mark.parametrize(
    ("cast", "shards"),
    [((np.float32,), 1), ((BF16,), 2), ((np.float16,), 1), ((BF16, np.float32, np.float16), 2)],
    ids=["float32", "bfloat16", "float16", "mixed"],
)
@pytest.mark.parametrize("tied", [True, False])
def test_hf_to_native_to_hf_is_bit_exact(tmp_path, tokenizer, cast, shards, tied):
    source, native, back = tmp_path / "source", tmp_path / "native", tmp_path / "back"
    tensors = write_checkpoint(
        source, tokenizer, cast=cast, shards=shards, tie_word_embeddings=tied
    )
    save(jaxneurons.load(source, dtype=None), native)
    save(jaxneurons.load(native, dtype=None), back, to="hf")
    assert_bits(stored(back), tensors)
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (back / name).read_bytes() == (source / name).read_bytes()
    where = "config.json"
    assert config_from_hf(json.loads((back / where).read_text()), where=where) == (
        jaxneurons.load(source).config
    )


@pytest.mark.parametrize("to", ["native", "hf"])
def test_a_full_disk(tmp_path, tokenizer, monkeypatch, capfd, caplog, to):
    """One error, nothing beside it from anybody's threads, and the same call goes on."""
    write_checkpoint(tmp_path / "source", tokenizer)
    lm = jaxneurons.load(tmp_path / "source")
    with monkeypatch.context() as patch:
        patch.setattr(module, "_write_tokenizer", lambda *_: None)
        said = rf"^{tmp_path}/out: cannot be written: File too large; make room, and the same"
        with room(6000), pytest.raises(SourceError, match=said):
            save(lm, tmp_path / "out", to=to)
    gc.collect()
    assert capfd.readouterr() == ("", "")
    assert not caplog.records
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source"]
    save(lm, tmp_path / "out", to=to)
    again = jaxneurons.load(tmp_path / "out")
    chex.assert_trees_all_equal(again.params, lm.params)


def test_writes_that_never_began(tmp_path, capfd):
    """After a failure asyncio drops other writes, some of them later: not another report."""
    from jaxneurons.convert.native import _one_report

    def async_serialize_from_host():
        async def write_fragment():
            pass

        return write_fragment()

    before = sys.unraisablehook
    raised = []
    loggers = [logging.getLogger(name) for name in ("absl", "asyncio")]
    try:
        sys.unraisablehook = raised.append
        with pytest.raises(OSError, match="No space"), _one_report(tmp_path):
            raise OSError(errno.ENOSPC, "No space left on device")
        async_serialize_from_host()  # dropped at once
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # as when the filters have been set anew since
            async_serialize_from_host()
        assert not raised
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            _another()
        assert len(raised) == 1
    finally:
        sys.unraisablehook = before
        for logger in loggers:
            logger.removeFilter(logger.filters[-1])


async def _another():
    """Somebody else's."""


@pytest.mark.parametrize("where", ["orbax/checkpoint/_src/futures/future.py", "others/future.py"])
def test_errors_of_the_writers_threads_that_name_no_file(tmp_path, caplog, where):
    """Those of Orbax's are raised anyway; those of others are not hidden."""
    from jaxneurons.convert.native import _one_report

    loggers = [logging.getLogger(name) for name in ("absl", "asyncio")]
    before = sys.unraisablehook
    try:
        with pytest.raises(OSError, match="No space"), _one_report(tmp_path):
            raise OSError(errno.ENOSPC, "No space left on device")
        error = OSError(errno.ENOSPC, "No space left on device")
        about = (logging.ERROR, f"/site-packages/{where}", 378, "raised an exception")
        for logger in loggers:
            logger.handle(logging.LogRecord(logger.name, *about, (), (OSError, error, None)))
        assert len(caplog.records) == (0 if where.startswith("orbax") else 2)
    finally:
        sys.unraisablehook = before
        for logger in loggers:
            logger.removeFilter(logger.filters[-1])


def test_transformers_loads_what_was_written_without_a_warning(tmp_path, tokenizer, caplog):
    transformers = pytest.importorskip("transformers")
    torch = pytest.importorskip("torch")
    source, out = tmp_path / "source", tmp_path / "out"
    tensors = write_checkpoint(source, tokenizer, cast=(BF16,), tie_word_embeddings=False)
    save(jaxneurons.load(source, dtype=None), out, to="hf")
    transformers.utils.logging.enable_propagation()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            model, report = transformers.AutoModelForCausalLM.from_pretrained(
                out, output_loading_info=True
            )
            again = transformers.AutoTokenizer.from_pretrained(out)
    finally:
        transformers.utils.logging.disable_propagation()
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert not [r for r in caplog.records if r.levelname in ("WARNING", "ERROR")], caplog.text
    assert model.dtype == torch.bfloat16
    assert model.generation_config.temperature == 0.6
    assert again("hello 12")["input_ids"] == tokenizer("hello 12")["input_ids"]
    state = model.state_dict()
    for name, values in tensors.items():
        assert (state[name].float().numpy() == values.astype(np.float32)).all()


def test_large_checkpoints_are_sharded_with_an_index(tmp_path, tokenizer):
    from jaxneurons.convert.export import write_hf as export
    from jaxneurons.convert.hf import read_hf

    source = tmp_path / "source"
    tensors = write_checkpoint(source, tokenizer)
    lm = jaxneurons.load(source)
    out = tmp_path / "out"
    out.mkdir()
    told = []
    export(out, lm.params, config=lm.config, shard_bytes=30_000, progress=told.append)
    assert len(list(out.glob("model-*-of-*.safetensors"))) > 2
    assert sum(told) == sum(values.nbytes for values in tensors.values())
    assert json.loads((out / "model.safetensors.index.json").read_text())["metadata"] == {
        "total_size": sum(told)
    }
    assert_bits(stored(out), tensors)
    _, params = read_hf(out)
    chex.assert_trees_all_equal(params, lm.params)


def test_gguf_to_hf(tmp_path):
    lm = jaxneurons.load(write_tiny_gguf(tmp_path / "m.gguf"))
    back = jaxneurons.load(save(lm, tmp_path / "out", to="hf"))
    assert back.config == lm.config
    chex.assert_trees_all_equal(back.params, lm.params)
    text = "hello 12, hello"
    assert back.tokenizer(text)["input_ids"] == lm.tokenizer(text)["input_ids"]


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32, None])
def test_dtype_is_chosen_at_restore(tmp_path, tokenizer, dtype):
    write_checkpoint(tmp_path / "source", tokenizer, cast=(np.float16,))
    lm = jaxneurons.load(tmp_path / "source", dtype=None)
    native = save(lm, tmp_path / "native")
    again = jaxneurons.load(native, dtype=dtype)
    wanted = jnp.float16 if dtype is None else dtype
    for mine, theirs in zip(jax.tree.leaves(again.params), jax.tree.leaves(lm.params), strict=True):
        assert mine.dtype == wanted
        np.testing.assert_array_equal(mine, theirs.astype(wanted))
    assert again.config == lm.config
    assert len(again.hash) == 64


@pytest.mark.filterwarnings("ignore:vocab .* cannot be divided")
@pytest.mark.parametrize("kind", ["hf", "native", "gguf"])
def test_parameters_arrive_sharded(tmp_path, tokenizer, kind):
    mesh = jax.make_mesh((2,), ("model",))
    rules = ShardingRules(batch=None)
    source = tmp_path / "source"
    if kind == "gguf":
        source = write_tiny_gguf(tmp_path / "m.gguf")
    else:
        write_checkpoint(source, tokenizer)
    if kind == "native":
        source = save(jaxneurons.load(source), tmp_path / "native")
    whole, split = jaxneurons.load(source), jaxneurons.load(source, mesh=mesh, rules=rules)
    up = split.params["layers"]["ffn"]["up"]["kernel"]
    assert {shard.data.shape for shard in up.addressable_shards} == {(2, 32, 32)}
    chex.assert_trees_all_equal(whole.params, split.params)


def test_a_destination_that_is_taken(tmp_path, tokenizer):
    write_checkpoint(tmp_path / "source", tokenizer)
    lm = jaxneurons.load(tmp_path / "source")
    (tmp_path / "file").write_text("mine")
    for name in ("source", "file"):
        with pytest.raises(SourceError, match="exists already"):
            save(lm, tmp_path / name)
    assert (tmp_path / "file").read_text() == "mine"
    (tmp_path / "empty").mkdir()
    save(lm, tmp_path / "empty")
    with pytest.raises(ConfigError, match="unknown format 'nativ'; did you mean 'native'"):
        inspect.unwrap(save)(lm, tmp_path / "x", to="nativ")  # before the types are checked


def test_a_failure_leaves_nothing(tmp_path, tokenizer, monkeypatch):
    write_checkpoint(tmp_path / "source", tokenizer)
    lm = jaxneurons.load(tmp_path / "source")

    def fail(*args, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module, "write_hf", fail)
    with pytest.raises(SourceError, match=r"out: cannot be written: No space left"):
        save(lm, tmp_path / "out", to="hf")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source"]


@pytest.mark.parametrize("to", ["native", "hf"])
def test_a_killed_conversion_completes_the_next_time(tmp_path, tokenizer, to):
    write_checkpoint(tmp_path / "source", tokenizer)
    script = (
        "import importlib, sys, time, jaxneurons\n"
        "s = importlib.import_module('jaxneurons.checkpoints.saving')\n"
        "lm = jaxneurons.load(sys.argv[1])\n"
        "s.sync = lambda path: (print('here', flush=True), time.sleep(60))\n"
        "s.save(lm, sys.argv[2], to=sys.argv[3])\n"
    )
    command = [sys.executable, "-c", script, str(tmp_path / "source"), str(tmp_path / "out"), to]
    child = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    assert child.stdout.readline().strip() == "here"
    os.kill(child.pid, signal.SIGKILL)
    child.wait()
    child.stdout.close()
    assert not (tmp_path / "out").exists()
    assert (tmp_path / ".out.partial").exists()
    lm = jaxneurons.load(tmp_path / "source")
    save(lm, tmp_path / "out", to=to)
    assert not (tmp_path / ".out.partial").exists()
    assert jaxneurons.load(tmp_path / "out").config == lm.config


def test_damaged_native_directories(tmp_path, tokenizer):
    write_checkpoint(tmp_path / "source", tokenizer)
    native = save(jaxneurons.load(tmp_path / "source"), tmp_path / "native")
    marker = native / MARKER
    good = marker.read_text()
    for text, message in (
        (good.replace('"format": 1', '"format": 2'), "not of format 1"),
        (good.replace('"hidden_size": 32', '"hidden_size": -1'), "hidden_size must be positive"),
        (good.replace('"hidden_size"', '"hiden_size"'), "its config is malformed"),
        (good[: len(good) // 2], "not valid JSON"),
    ):
        marker.write_text(text)
        with pytest.raises((SourceError, ConfigError), match=message.replace("positive", ".*")):
            jaxneurons.load(native)
    marker.write_text(good.replace('"hidden_size": 32', '"hidden_size": 64'))
    with pytest.raises(SourceError, match=r"jaxneurons\.json: damaged or edited"):
        jaxneurons.load(native)
    older = without_checksums(marker, good)
    marker.write_text(older.replace('"hidden_size": 32', '"hidden_size": 64'))
    with pytest.raises(SourceError, match="cannot be restored"):
        jaxneurons.load(native)
    (kernel,) = [p for p in (native / "params").iterdir() if p.name.endswith("up.kernel")]
    shutil.rmtree(kernel)
    for text, message in ((good, "no such file, but jaxneurons.json"), (older, "be restored")):
        marker.write_text(text)
        with pytest.raises(SourceError, match=message):
            jaxneurons.load(native)


def without_checksums(marker, text):
    """The marker as versions before checksums wrote it."""
    values = json.loads(text)
    del values["sha256"], values["sha256_of_the_above"]
    return json.dumps(values, indent=2)


def test_a_flipped_bit_of_a_native_directory_is_found(tmp_path, tokenizer):
    write_checkpoint(tmp_path / "source", tokenizer)
    native = save(jaxneurons.load(tmp_path / "source"), tmp_path / "native")
    lm = jaxneurons.load(native)
    before = lm.hash
    paths = sorted(p for p in (native / "params").rglob("*") if p.is_file())
    listed = json.loads((native / MARKER).read_text())["sha256"]
    assert listed == {
        str(path.relative_to(native)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in paths
    }
    for path in (*paths, native / MARKER):
        good = path.read_bytes()
        at = len(good) // 2
        path.write_bytes(good[:at] + bytes([good[at] ^ 1]) + good[at + 1 :])
        with pytest.raises((SourceError, ConfigError), match=f"{path.name}"):
            jaxneurons.load(native)
        path.write_bytes(good)
    assert jaxneurons.load(native).hash == before
    # A directory of a version that wrote no checksums: read as ever, flipped bit or not.
    marker = native / MARKER
    marker.write_text(without_checksums(marker, marker.read_text()))
    assert jax.tree.all(
        jax.tree.map(lambda a, b: bool((a == b).all()), jaxneurons.load(native).params, lm.params)
    )


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"rope_scaling": {"rope_type": "linear", "factor": 2.0}},
        {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}},
        {"rope_scaling": {"type": "yarn", "factor": 4.0, "beta_fast": 16, "truncate": False,
                          "original_max_position_embeddings": 32}},
        {"rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0,
                          "high_freq_factor": 4.0, "original_max_position_embeddings": 64}},
        {"attention_bias": True},
        {"mlp_bias": True},
        {"model_type": "mistral", "sliding_window": 16},
        {"model_type": "mistral", "sliding_window": None},
        {"model_type": "qwen2"},
        {"model_type": "qwen2", "use_sliding_window": True, "max_window_layers": 1},
        {"model_type": "qwen2", "use_sliding_window": True, "max_window_layers": 0},
    ],
)  # fmt: skip
def test_configurations_survive_the_round_trip(changes):
    config = config_from_hf(tiny(**changes), where="x")
    written = config_to_hf(config, dtype=np.dtype(np.float32), original=tiny(bos_token_id=7))
    assert config_from_hf(written, where="y") == config
    assert written["bos_token_id"] == 7
    assert written["torch_dtype"] == "float32"


def test_what_no_configuration_describes(tmp_path):
    config = config_from_hf(tiny(), where="x")
    import dataclasses

    odd = dataclasses.replace(config, biases=("q",))
    with pytest.raises(ConfigError, match=r"'llama' has no place for biases on \('q',\)"):
        config_to_hf(odd, dtype=np.dtype(np.float32))
    rope = dataclasses.replace(
        config.rope, rope_type="llama3", inv_freq_divisors=(1.0, 2.0, 3.0, 5.0)
    )
    with pytest.raises(ConfigError, match="rope_freqs of this GGUF file are not those of Llama"):
        config_to_hf(dataclasses.replace(config, rope=rope), dtype=np.dtype(np.float32))


# --- what a narrower dtype cannot hold ------------------------------------------------------------


def test_overflow_is_never_silent(tmp_path, tokenizer):
    source = tmp_path / "source"
    tensors = write_checkpoint(source, tokenizer, cast=(BF16,))
    tensors["model.norm.weight"][3] = 1e5
    save_file(tensors, source / "model.safetensors")
    with pytest.raises(SourceError, match="does not fit into float16"):
        jaxneurons.load(source, dtype=jnp.float16)
    native = save(jaxneurons.load(source, dtype=None), tmp_path / "native")
    with pytest.raises(SourceError, match=r"final_norm\.scale holds NaN or infinite.*bfloat16"):
        jaxneurons.load(native, dtype=jnp.float16)
    assert float(jaxneurons.load(native).params["final_norm"]["scale"][3]) == float(BF16(1e5))
    for dtype in ("int8", "float64", "foo"):
        for where in (source, native):
            with pytest.raises(ConfigError, match="dtype"):
                jaxneurons.load(where, dtype=dtype)


def test_the_stored_dtype_is_that_of_the_parameters(tmp_path, tokenizer):
    source = tmp_path / "source"
    tensors = write_checkpoint(source, tokenizer, cast=(np.float16,))
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(4, np.float32)
    save_file(tensors, source / "model.safetensors")
    assert jaxneurons.load(source, dtype=None).params["embed"]["embedding"].dtype == jnp.float16
    tensors["model.norm.weight"] = tensors["model.norm.weight"].astype(np.float64)
    save_file(tensors, source / "model.safetensors")
    with pytest.raises(SourceError, match="float64 weights; give a dtype"):
        jaxneurons.load(source, dtype=None)


# --- one writer, whole directories ----------------------------------------------------------------


def test_two_writers_of_one_destination(tmp_path, tokenizer):
    write_checkpoint(tmp_path / "source", tokenizer)
    lm = jaxneurons.load(tmp_path / "source")
    with module.published(tmp_path / "out") as partial:
        (partial / "mine").write_text("x")
        with pytest.raises(SourceError, match="another process is writing it"):
            save(lm, tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["mine"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "source"]


def test_orbax_failures_are_ours(tmp_path, tokenizer, monkeypatch):
    import orbax.checkpoint as ocp

    write_checkpoint(tmp_path / "source", tokenizer)
    lm = jaxneurons.load(tmp_path / "source")

    def fail(*_, **__):
        raise ValueError("OUT_OF_RANGE: Error writing\nlocal file")

    monkeypatch.setattr(ocp.Checkpointer, "save", fail)
    with pytest.raises(SourceError, match="cannot be written: OUT_OF_RANGE: Error writing local"):
        save(lm, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source"]


def test_special_tokens_of_a_gguf_file_reach_config_json(tmp_path):
    out = save(jaxneurons.load(write_tiny_gguf(tmp_path / "m.gguf")), tmp_path / "out", to="hf")
    written = json.loads((out / "config.json").read_text())
    assert (written["bos_token_id"], written["eos_token_id"]) == (0, 0)
    assert written["pad_token_id"] is None


@pytest.mark.parametrize(
    "change", [{"dtype": 5}, {"dtype": "foo"}, {"stored_dtypes": []}, {"stored_dtypes": None}]
)
def test_malformed_markers(tmp_path, tokenizer, change):
    write_checkpoint(tmp_path / "source", tokenizer)
    native = save(jaxneurons.load(tmp_path / "source"), tmp_path / "native")
    marker = native / MARKER
    values = json.loads(marker.read_text())
    values.pop("sha256_of_the_above")  # as versions before checksums wrote it
    marker.write_text(json.dumps({**values, **change}))
    with pytest.raises((SourceError, ConfigError), match="dtype"):
        jaxneurons.load(native, dtype=None)
