"""GGUF files of further families, written from tiny models as llama.cpp's converter does."""

import dataclasses

import numpy as np
import pytest

from jaxneurons import ConfigError, SourceError
from jaxneurons.convert.gguf import read_gguf
from jaxneurons.convert.gguf_config import RopeTensors, config_from_gguf
from jaxneurons.convert.hf import read_hf
from jaxneurons.model.config import ModelConfig, RopeConfig
from jaxneurons.model.parameters import get, list_parameters

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from safetensors.torch import save_file  # noqa: E402
from support import gguf_families  # noqa: E402
from support.checkpoints import write_gguf  # noqa: E402
from support.families import (  # noqa: E402
    IDS,
    IN_GGUF,
    our_logits,
    torch_logits,
    variant,
)

CASES = [pytest.param(name, marks=[pytest.mark.slow] if "," in name else []) for name in IN_GGUF]
READ_BY_TRANSFORMERS = ("gemma2", "gemma3", "qwen3", "phi3, window, tied")


def without_ropes(config: ModelConfig) -> ModelConfig:
    return dataclasses.replace(config, rope=RopeConfig(), sliding_rope=None)


def assert_same(ours, theirs, config, shift=0.0):
    """Parameters; of norms that files hold with something added, what is left of their digits."""
    for parameter in list_parameters(config):
        mine, other = get(ours, parameter.path), np.asarray(get(theirs, parameter.path))
        if parameter.path[-1] == "scale":
            other = (other + np.float32(shift)) - np.float32(shift)
        np.testing.assert_array_equal(mine, other, err_msg=str(parameter.path))


@pytest.mark.parametrize("name", CASES)
def test_a_file_is_the_model_that_it_was_written_from(tmp_path, name):
    model = variant(name, IN_GGUF)
    model.save_pretrained(tmp_path / "hf")
    theirs, from_hf = read_hf(tmp_path / "hf")
    config, params = read_gguf(gguf_families.write(tmp_path / "m.gguf", model))
    assert without_ropes(config) == without_ropes(theirs)
    for ours, other in zip(config.ropes, theirs.ropes, strict=True):
        # Files hold numbers as float32.
        assert ours.attention_factor == pytest.approx(other.attention_factor, rel=1e-6)
        for length in ("short_divisors", "long_divisors"):
            mine = getattr(ours, length) or ()
            assert mine == pytest.approx(getattr(other, length) or (), rel=1e-6)
        plain = {"attention_factor": 1.0, "short_divisors": None, "long_divisors": None}
        kind = {"rope_type": "default"} if ours.rope_type == "longrope" else {}
        assert ours.rope_type == other.rope_type
        assert dataclasses.replace(ours, **plain, **kind) == dataclasses.replace(
            other, **plain, **kind
        )
    assert_same(params, from_hf, config, shift=config.norm_offset)
    ours, logits = our_logits(params, IDS, config), torch_logits(model, IDS)
    assert np.abs(ours - logits).max() < 1e-5 * np.abs(logits).max()


@pytest.mark.parametrize("name", READ_BY_TRANSFORMERS)
def test_transformers_reads_the_same_parameters(tmp_path, name):
    model = variant(name, IN_GGUF)
    fields = gguf_families.fields(model) | {"tokenizer.ggml.padding_token_id": 0}
    path = write_gguf(tmp_path / "m.gguf", fields, gguf_families.tensors(model))
    config, params = read_gguf(path)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file=path.name, dtype=torch.float32
    )
    model.save_pretrained(tmp_path / "theirs")
    tensors = {key: values.clone() for key, values in theirs.state_dict().items()}
    save_file(tensors, tmp_path / "theirs" / "model.safetensors")
    _, from_theirs = read_hf(tmp_path / "theirs")
    assert_same(params, from_theirs, config)


@pytest.mark.parametrize("name", ["gemma", "gemma2", "gemma3"])
def test_norms_without_the_1_are_noticed(tmp_path, name):
    model = variant(name, IN_GGUF)
    tensors = {
        key: values - np.float32(1) if key.endswith("norm.weight") else values
        for key, values in gguf_families.tensors(model).items()
    }
    path = write_gguf(tmp_path / "m.gguf", gguf_families.fields(model), tensors)
    with pytest.raises(SourceError, match=r"m\.gguf: .*output_norm\.weight are not above zero: "):
        read_gguf(path)


def fields_of(name, **changes):
    values = gguf_families.fields(variant(name, IN_GGUF))
    arch = values["general.architecture"]
    return values | {f"{arch}.{key.replace('__', '.')}": v for key, v in changes.items()}


def read(name, tensors=RopeTensors(), **changes):
    return config_from_gguf(fields_of(name, **changes), where="m.gguf", rope_tensors=tensors)


def test_the_largest_gemmas_scale_by_width():
    """llama.cpp knows them by their layers: no key states `query_pre_attn_scalar`."""
    assert read("gemma2", block_count=46).query_scale == pytest.approx(8**-0.5)  # hidden / heads
    assert read("gemma3", block_count=62).query_scale == pytest.approx(8**-0.5)
    assert read("gemma2", block_count=62).query_scale is None
    assert read("gemma2", attention__scale=0.25).query_scale == 0.25
    assert read("gemma2", attention__scale=float(np.float32(12**-0.5))).query_scale is None


def test_windows_of_gemma():
    assert read("gemma3").sliding_layers == (*(True,) * 5, False, True)
    assert read("gemma3", attention__sliding_window=0).sliding_window is None
    listed = read("gemma3", attention__sliding_window_pattern=[True, False] * 3 + [True])
    assert listed.sliding_layers == (True, False) * 3 + (True,)
    assert read("gemma2", attention__sliding_window_pattern=3).sliding_layers == (True, True, False)
    every = read("gemma3", attention__sliding_window_pattern=0)
    assert (every.sliding_layers, every.sliding_window) == (None, 7)
    assert (every.rope, every.sliding_rope) == (RopeConfig(10000.0), None)
    assert read("gemma3", rope__freq_base_swa=30.0).sliding_rope == RopeConfig(30.0)
    assert read("gemma3", rope__freq_base_swa=500.0).sliding_rope is None  # the others' too
    assert read("gemma3", mm__tokens_per_image=256, vision__block_count=27) == read("gemma3")


def test_phi3_without_a_window_key():
    fields = fields_of("phi3, window, tied", block_count=32, context_length=4096)
    del fields["phi3.attention.sliding_window"]
    assert config_from_gguf(fields, where="x").sliding_window == 2047
    fields |= {"phi3.context_length": 131072}
    assert config_from_gguf(fields, where="x").sliding_window is None


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("gemma", {"attention__sliding_window": 8}, "gemma.attention.sliding_window = 8"),
        ("qwen3", {"attention__sliding_window": 8}, "qwen3.attention.sliding_window = 8"),
        ("smollm3", {"attention__sliding_window": 8}, "smollm3.attention.sliding_window = 8"),
        ("olmo2", {"attention__sliding_window": 8}, "sliding_window = 8: only OLMo 3 has a window"),
        ("gemma2", {"attention__sliding_window_pattern": [1, 0]}, "3 entries are needed"),
        ("gemma2", {"attention__sliding_window_pattern": -1}, "sliding_window_pattern = -1"),
        ("gemma2", {"attn_logit_softcapping": 0.0}, "attention_softcap must be a positive"),
        ("gemma3", {"attn_logit_softcapping": 50.0}, "gemma3.attn_logit_softcapping = 50.0"),
        ("qwen3", {"rope__dimension_count": 4}, "rope.dimension_count = 4: must equal head_dim"),
        ("phi3", {"rope__dimension_count": 10}, "rope.dimension_count = 10: must equal head_dim"),
        ("phi3, window, tied", {"rope__dimension_count": 5}, "rope dim must be positive and even"),
        ("qwen3", {"final_logit_softcapping": 3.0}, "qwen3.final_logit_softcapping = 3.0"),
        ("qwen3", {"expert_count": 4}, "qwen3.expert_count = 4"),
    ],
)
def test_what_a_family_does_not_have_is_named(name, changes, message):
    with pytest.raises(ConfigError, match=message) as caught:
        read(name, **changes)
    assert str(caught.value).startswith("m.gguf: ")


FACTORS = (1.0, 1.5, 2.0)


@pytest.mark.parametrize(
    ("name", "tensors", "changes", "message"),
    [
        ("phi3", RopeTensors(None, FACTORS, None), {}, "which needs both"),
        ("phi3", RopeTensors(None, FACTORS[:2], FACTORS[:2]), {}, "has 2 values"),
        (
            "phi3",
            RopeTensors(None, FACTORS, FACTORS),
            {"rope__scaling__type": "yarn"},
            "contradicts rope_factors",
        ),
        (
            "phi3",
            RopeTensors(None, FACTORS, FACTORS),
            {"rope__scaling__factor": 2.0},
            "cannot be combined with rope_factors",
        ),
    ],
)
def test_divisors_that_do_not_fit_are_refused(name, tensors, changes, message):
    with pytest.raises(ConfigError, match=message):
        read(name, tensors, **changes)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("blk.1.attn_qkv.weight"), r"1 tensors are missing: blk\.1\.attn_qkv"),
        (
            lambda t: t.update({"blk.0.ffn_up.weight": t["blk.0.ffn_up.weight"][:48]}),
            r"tensor blk\.0\.ffn_up\.weight has shape \(48, 32\), the configuration says \(96, 32",
        ),
        (
            lambda t: t.update({"blk.0.attn_q.weight": t["blk.0.attn_output.weight"]}),
            r"tensor blk\.0\.attn_q\w*\.weight is stored twice",
        ),
        (
            lambda t: t["blk.0.attn_qkv.weight"].__setitem__((0, 0), np.nan),
            r"tensor blk\.0\.attn_qkv\.weight holds NaN",
        ),
    ],
)
def test_fused_tensors_that_do_not_fit(tmp_path, change, message):
    model = variant("phi3", IN_GGUF)
    tensors = {name: values.copy() for name, values in gguf_families.tensors(model).items()}
    change(tensors)
    path = write_gguf(tmp_path / "m.gguf", gguf_families.fields(model), tensors)
    with pytest.raises(SourceError, match=message):
        read_gguf(path)


def test_divisors_of_longrope_have_no_place_elsewhere(tmp_path):
    model = variant("olmo2", IN_GGUF)
    odd = {"rope_factors_long.weight": np.ones(4, np.float32)}
    tensors = gguf_families.tensors(model) | odd
    path = write_gguf(tmp_path / "m.gguf", gguf_families.fields(model), tensors)
    with pytest.raises(SourceError, match=r"no place: rope_factors_long\.weight"):
        read_gguf(path)


def test_projections_of_phi3_that_are_stored_apart(tmp_path):
    model = variant("phi3", IN_GGUF)
    tensors = gguf_families.tensors(model)
    for layer in range(3):
        qkv = tensors.pop(f"blk.{layer}.attn_qkv.weight")
        parts = np.split(qkv, (32, 48))
        for name, rows in zip("qkv", parts, strict=True):
            tensors[f"blk.{layer}.attn_{name}.weight"] = rows
    path = write_gguf(tmp_path / "apart.gguf", gguf_families.fields(model), tensors)
    whole = read_gguf(gguf_families.write(tmp_path / "m.gguf", model))
    config, params = read_gguf(path)
    assert config == whole[0]
    assert_same(params, whole[1], config)
