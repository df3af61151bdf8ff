"""config.json and GGUF metadata -> ModelConfig: nothing is ignored."""

import numpy as np
import pytest
from support.checkpoints import gguf_fields, tiny

from jaxneurons.convert.config import config_from_hf
from jaxneurons.convert.gguf_config import RopeTensors, config_from_gguf
from jaxneurons.convert.keys import IRRELEVANT
from jaxneurons.errors import ConfigError, SourceError
from jaxneurons.model.config import RopeConfig


def read(**changes):
    config = {k: v for k, v in tiny(**changes).items() if v != "absent"}
    return config_from_hf(config, where="here/config.json")


def read_gguf(**changes):
    fields = gguf_fields(tiny()) | {f"llama.{k.replace('__', '.')}": v for k, v in changes.items()}
    return config_from_gguf({k: v for k, v in fields.items() if v != "absent"}, where="m.gguf")


def test_reads_every_size():
    config = read(tie_word_embeddings=False)
    assert (config.vocab_size, config.hidden_size, config.intermediate_size) == (40, 32, 64)
    assert (config.num_layers, config.num_heads, config.num_kv_heads) == (2, 4, 2)
    assert (config.head_dim, config.max_position, config.norm_eps) == (8, 128, 1e-5)
    assert config.tied is False
    assert config.sliding_window is None
    assert config.family == "llama"


@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_absent_keys_mean_what_transformers_means(family):
    transformers = pytest.importorskip("transformers")
    reference = {
        "llama": transformers.LlamaConfig,
        "mistral": transformers.MistralConfig,
    }[family]().to_dict()
    mine = config_from_hf({"model_type": family}, where="x")
    assert mine.vocab_size == reference["vocab_size"]
    assert mine.hidden_size == reference["hidden_size"]
    assert mine.intermediate_size == reference["intermediate_size"]
    assert mine.num_layers == reference["num_hidden_layers"]
    assert mine.num_heads == reference["num_attention_heads"]
    assert mine.num_kv_heads == reference["num_key_value_heads"]
    assert mine.head_dim == reference["hidden_size"] // reference["num_attention_heads"]
    assert mine.max_position == reference["max_position_embeddings"]
    assert mine.norm_eps == reference["rms_norm_eps"]
    assert mine.tied == reference["tie_word_embeddings"]
    assert mine.sliding_window == reference.get("sliding_window")
    assert mine.rope == RopeConfig()


@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_reads_back_what_transformers_writes(family):
    transformers = pytest.importorskip("transformers")
    cls = {"llama": transformers.LlamaConfig, "mistral": transformers.MistralConfig}[family]
    values = {
        k: v for k, v in tiny(rope_theta="x").items() if k not in ("rope_theta", "model_type")
    }
    rope = {"rope_type": "linear", "factor": 2.0, "rope_theta": 5e5}
    written = cls(**values, rope_parameters=rope).to_dict()
    mine = config_from_hf(written, where="x")
    assert mine.rope == RopeConfig(theta=5e5, rope_type="linear", factor=2.0)


def test_head_dim_null_absent_or_explicit():
    assert read(head_dim=None).head_dim == 8
    assert read(head_dim="absent").head_dim == 8
    assert read(head_dim=16).head_dim == 16
    with pytest.raises(ConfigError, match="not a multiple of num_attention_heads = 5"):
        read(head_dim=None, num_attention_heads=5, num_key_value_heads=5)


def test_kv_heads_absent_or_null_is_mha_for_llama():
    assert read(num_key_value_heads="absent").num_kv_heads == 4
    assert read(num_key_value_heads=None).num_kv_heads == 4


LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA3_ROPE = RopeConfig(5e5, "llama3", 8.0, 1.0, 4.0, 64)


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ({"rope_scaling": None}, RopeConfig(5e5)),
        ({"rope_scaling": {"type": "linear", "factor": 2}}, RopeConfig(5e5, "linear", 2.0)),
        ({"rope_scaling": {"rope_type": "default"}}, RopeConfig(5e5)),
        (
            {
                "rope_scaling": {
                    "rope_type": "llama3",
                    "original_max_position_embeddings": 64,
                    **LLAMA3,
                }
            },
            LLAMA3_ROPE,
        ),
        (
            {"rope_scaling": {"rope_type": "llama3", **LLAMA3}},
            RopeConfig(5e5, "llama3", 8.0, 1.0, 4.0, 128),
        ),
        (
            {
                "rope_scaling": {"type": "llama3", "rope_type": "llama3", **LLAMA3},
                "original_max_position_embeddings": 64,
            },
            LLAMA3_ROPE,
        ),
        (
            {
                "rope_theta": "absent",
                "rope_parameters": {"rope_type": "default", "rope_theta": 5e5},
            },
            RopeConfig(5e5),
        ),
        (
            {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 5e5}},
            RopeConfig(5e5, "linear", 4.0),
        ),
    ],
)
def test_rope_in_both_spellings(keys, expected):
    assert read(**{"rope_theta": 5e5, **keys}).rope == expected


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"rope_scaling": {"type": "su", "factor": 2.0}}, "rope type 'su' is not supported"),
        ({"rope_parameters": {"rope_type": "longrope"}}, "rope type 'longrope'"),
        ({"rope_parameters": {"rope_type": "dynamic"}}, "rope_parameters.factor is missing"),
        (
            {
                "rope_scaling": {
                    "type": "dynamic",
                    "factor": 2.0,
                    "original_max_position_embeddings": 32,
                }
            },
            "original_max_position_embeddings = 32: readers of 'dynamic' disagree",
        ),
        (
            {"rope_scaling": {"type": "yarn", "factor": 2.0, "low_freq_factor": 1.0}},
            "low_freq_factor = 1.0: not a key of rope type 'yarn'",
        ),
        ({"rope_scaling": {"type": "yarn", "factor": 2.0, "truncate": 1}}, "truncate = 1"),
        ({"rope_theta": float("inf")}, "rope_theta = inf: a finite number"),
        ({"rope_scaling": {"type": "linear"}}, "rope_scaling.factor is missing"),
        ({"rope_scaling": {"type": "linear", "rope_type": "llama3"}}, "several rope types"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0, "beta": 1}}, r"rope_scaling.beta = 1"),
        ({"rope_scaling": [1]}, "a dictionary is needed"),
        ({"rope_parameters": {"rope_theta": 7.0}}, "contradicts rope_theta = 10000.0"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor = 0.5"),
        (
            {
                "rope_parameters": {"rope_type": "default"},
                "rope_scaling": {"type": "linear", "factor": 2.0},
            },
            "contradict each other",
        ),
        ({"rope_scaling": {"type": "linear", "factor": -2.0}}, "rope factor must be"),
        ({"rope_parameters": {"full_attention": {"rope_type": "default"}}}, "full_attention"),
    ],
)
def test_rope_that_is_refused(keys, message):
    with pytest.raises(ConfigError, match=message) as caught:
        read(**keys)
    assert str(caught.value).startswith("here/config.json")


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"attention_bias": 1}, "attention_bias = 1: true or false"),
        ({"model_type": "mistral", "attention_bias": True}, "'mistral' has no such biases"),
        ({"model_type": "qwen2", "mlp_bias": True}, "'qwen2' has no such biases"),
        ({"model_type": "qwen2", "use_sliding_window": "no"}, "use_sliding_window = 'no'"),
        ({"use_sliding_window": True}, "use_sliding_window = True: this key is not known"),
        ({"hidden_act": "gelu"}, "hidden_act = 'gelu'"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor = 0.5"),
        ({"clever_new_trick": 3}, "clever_new_trick = 3: this key is not known"),
        ({"model_type": "falcon"}, "model_type = 'falcon' is not supported"),
        ({"model_type": "absent"}, "model_type = None"),
        ({"quantization_config": {"quant_method": "gptq"}}, r"quantization_config \(gptq\)"),
        ({"hidden_size": "32"}, "hidden_size = '32': an integer"),
        ({"hidden_size": True}, "hidden_size = True"),
        ({"hidden_size": 0}, "hidden_size = 0"),
        ({"vocab_size": None}, "vocab_size = None"),
        ({"rms_norm_eps": None}, "rms_norm_eps is missing"),
        ({"rms_norm_eps": "small"}, "rms_norm_eps = 'small'"),
        ({"tie_word_embeddings": 1}, "tie_word_embeddings = 1"),
        ({"num_key_value_heads": 3}, "multiple"),
        ({"num_key_value_heads": 0}, "num_kv_heads must be a positive integer"),
        ({"sliding_window": 64}, "sliding_window = 64"),
    ],
)
def test_what_is_not_handled_is_named(keys, message):
    with pytest.raises(ConfigError, match=message) as caught:
        read(**keys)
    assert str(caught.value).startswith("here/config.json")
    assert "\n" not in str(caught.value)


def test_irrelevant_keys_are_accepted_and_have_a_reason():
    assert read(**dict.fromkeys(IRRELEVANT, "anything")) == read()
    assert all(IRRELEVANT.values())
    assert read(attention_bias=False, mlp_bias=False, quantization_config=None) == read()


def test_sliding_window_of_mistral():
    assert read(model_type="mistral", sliding_window=16).sliding_window == 16
    assert read(model_type="mistral", sliding_window=None).sliding_window is None
    assert read(model_type="mistral").sliding_window == 4096


def test_layer_types_must_agree_with_the_window():
    full, sliding = ["full_attention"] * 2, ["sliding_attention"] * 2
    assert read(layer_types=full).sliding_window is None
    mistral = {"model_type": "mistral", "sliding_window": 16}
    assert read(**mistral, layer_types=sliding).sliding_window == 16
    for bad in ({**mistral, "layer_types": full}, {"layer_types": sliding}):
        with pytest.raises(ConfigError, match="layer_types"):
            read(**bad)
    mixed = ["full_attention", "sliding_attention"]
    with pytest.raises(ConfigError, match="goes with 'sliding_attention' in every layer"):
        read(**mistral, layer_types=mixed)
    with pytest.raises(ConfigError, match="layer_types"):
        read(model_type="qwen2", use_sliding_window=True, layer_types=["full_attention", "x"])
    with pytest.raises(ConfigError, match="a list of 2 entries"):
        read(layer_types=["full_attention"])


def test_windows_of_qwen2():
    def windows(**keys):
        config = read(model_type="qwen2", sliding_window=16, **keys)
        return config.sliding_window, config.sliding_layers

    used = {"use_sliding_window": True}
    assert windows() == (None, None)
    assert windows(max_window_layers=0) == (None, None)
    assert windows(**used) == (None, None)  # all of its layers are below 28
    assert windows(**used, max_window_layers=0) == (16, None)
    assert windows(**used, max_window_layers=1) == (16, (False, True))
    sliding_first = ["sliding_attention", "full_attention"]
    assert windows(**used, layer_types=sliding_first) == (16, (True, False))
    assert read(model_type="qwen2").biases == ("q", "k", "v")


def test_biases_of_llama():
    assert read().biases == ()
    assert read(attention_bias=True).biases == ("q", "k", "v", "o")
    assert read(attention_bias=True, mlp_bias=True).biases == (*"qkvo", "gate", "up", "down")


def test_yarn_in_both_spellings():
    values = {"factor": 4.0, "original_max_position_embeddings": 32}
    four = read(rope_theta=5e5, rope_scaling={"type": "yarn", **values}).rope
    inside = {"rope_type": "yarn", "rope_theta": 5e5, **values}
    five = read(rope_theta=5e5, rope_parameters=inside).rope
    assert four == five
    assert (four.beta_fast, four.beta_slow, four.original_max_position) == (32, 1, 32)
    assert four.attention_factor == pytest.approx(0.1 * np.log(4) + 1)
    stated = {**values, "attention_factor": 1.5, "beta_fast": 16, "beta_slow": 2}
    assert read(rope_scaling={"type": "yarn", **stated}).rope.attention_factor == 1.5
    scaled = {**values, "mscale": 2.0, "mscale_all_dim": 1.0}
    assert read(rope_scaling={"type": "yarn", **scaled}).rope.attention_factor == pytest.approx(
        (0.2 * np.log(4) + 1) / (0.1 * np.log(4) + 1)
    )
    del values["factor"]  # the ratio of the two contexts
    assert read(rope_scaling={"type": "yarn", **values}).rope.factor == 4.0


def test_gguf_reads_what_config_json_says():
    assert read_gguf() == config_from_hf(tiny(tie_word_embeddings=False), where="x")


def test_gguf_epsilon_is_the_shortest_decimal():
    config = read_gguf(attention__layer_norm_rms_epsilon=float(np.float32(1e-5)))
    assert config.norm_eps == 1e-5
    assert read_gguf(attention__layer_norm_rms_epsilon=float(np.float32(1e-6))).norm_eps == 1e-6


def test_gguf_optional_keys():
    assert read_gguf(attention__head_count_kv="absent").num_kv_heads == 4
    assert read_gguf(attention__head_count_kv=[2, 2]).num_kv_heads == 2
    wide = {
        "attention__key_length": 16,
        "attention__value_length": 16,
        "rope__dimension_count": 16,
    }
    assert read_gguf(**wide).head_dim == 16
    assert read_gguf(rope__scaling__type="none").rope == RopeConfig()
    linear = read_gguf(rope__scaling__type="linear", rope__scaling__factor=4.0).rope
    assert linear == RopeConfig(10000.0, "linear", 4.0)
    assert read_gguf(rope__scale_linear=4.0).rope == linear
    assert read_gguf(attention__sliding_window=16).sliding_window == 16
    assert read_gguf(expert_count=0).num_layers == 2
    fields = gguf_fields(tiny()) | {"llama.vocab_size": 40, "tokenizer.ggml.tokens": ["a"] * 40}
    del fields["llama.vocab_size"]
    assert config_from_gguf(fields, where="m.gguf").vocab_size == 40


def test_gguf_rope_freqs_become_divisors():
    divisors = (1.0, 1.0, 2.0, 8.0)
    config = config_from_gguf(gguf_fields(tiny()), where="m", rope_tensors=RopeTensors(divisors))
    assert config.rope.inv_freq_divisors == divisors
    assert config.rope.rope_type == "llama3"
    with pytest.raises(ConfigError, match="has 3 values"):
        config_from_gguf(gguf_fields(tiny()), where="m", rope_tensors=RopeTensors((1.0, 1.0, 2.0)))


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"block_count": "absent"}, "llama.block_count is missing"),
        ({"expert_count": 8}, "llama.expert_count = 8"),
        ({"rope__scaling__type": "longrope"}, "llama.rope.scaling.type = 'longrope'"),
        ({"rope__scaling__type": "yarn"}, "llama.rope.scaling.factor is missing"),
        ({"rope__scaling__attn_factor": 2.0}, "attn_factor = 2.0: only yarn has one"),
        ({"rope__scaling__yarn_log_multiplier": 0.1}, "yarn_log_multiplier = 0.1"),
        (
            {
                "rope__scaling__type": "yarn",
                "rope__scaling__factor": 4.0,
                "rope__scaling__yarn_ext_factor": 0.5,
            },
            "yarn_ext_factor = 0.5: only 1 with yarn",
        ),
        (
            {
                "rope__scaling__type": "linear",
                "rope__scaling__factor": 4.0,
                "rope__scaling__yarn_ext_factor": 1.0,
            },
            "yarn_ext_factor = 1.0: only 1 with yarn",
        ),
        ({"rope__scaling__type": "linear"}, "llama.rope.scaling.factor is missing"),
        ({"rope__dimension_count": 4}, "llama.rope.dimension_count = 4: must equal head_dim = 8"),
        ({"attention__value_length": 4}, "llama.attention.value_length = 4"),
        ({"attention__head_count_kv": [2, 4]}, "layers that differ"),
        ({"attention__causal": False}, "llama.attention.causal = False"),
        ({"attention__scale": 1.0}, "llama.attention.scale = 1.0"),
        ({"residual_scale": 0.22}, "llama.residual_scale = 0.22"),
        ({"clever_new_trick": 3}, "llama.clever_new_trick = 3"),
    ],
)
def test_gguf_keys_that_are_refused(keys, message):
    with pytest.raises(ConfigError, match=message) as caught:
        read_gguf(**keys)
    assert str(caught.value).startswith("m.gguf")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"general.architecture": "falcon"}, "architecture 'falcon'"),
        ({"general.architecture": ["llama"]}, "architecture"),
        ({"general.type": "adapter"}, "type 'adapter'"),
        ({"split.count": 3, "split.no": 1}, "part 2 of 3 parts of a split GGUF"),
        # Parts but the first hold their number and tensors, an importance matrix no architecture.
        ({"split.count": 3, "split.no": 2, "general.architecture": "absent"}, "part 3 of 3 parts"),
        ({"split.count": 3}, "one of 3 parts"),
        (
            {"general.type": "imatrix", "general.architecture": "absent"},
            "an importance matrix for quantising, not a model",
        ),
        ({"general.architecture": "absent"}, "not a model: it names no architecture"),
    ],
)
def test_gguf_files_of_another_kind(fields, message):
    fields = {k: v for k, v in (gguf_fields(tiny()) | fields).items() if v != "absent"}
    with pytest.raises(SourceError, match=message):
        config_from_gguf(fields, where="m.gguf")


def test_gguf_keys_that_change_nothing():
    yarn = {"rope__scaling__type": "yarn", "rope__scaling__factor": 4.0}
    assert read_gguf(pooling_type=0) == read_gguf(pooling_type=3) == read_gguf()
    more = {"rope__scaling__yarn_log_multiplier": 0.0, "rope__scaling__yarn_ext_factor": 1.0}
    assert read_gguf(**yarn, **more) == read_gguf(**yarn)
    assert read_gguf(**more) == read_gguf()
    assert read_gguf(final_logit_softcapping=0.0) == read_gguf()


def test_gguf_keys_that_the_user_says_are_to_be_ignored():
    fields = gguf_fields(tiny()) | {"llama.clever_new_trick": 3}
    name = "llama.clever_new_trick"
    with pytest.raises(ConfigError, match=f"--ignore-key {name}"):
        config_from_gguf(fields, where="m.gguf")
    assert config_from_gguf(fields, where="m.gguf", ignore_keys=(name,)) == read_gguf()
    for other in ("clever_new_trick", "general.architecture", "split.count", "llama.x"):
        with pytest.raises(ConfigError, match=f"no key '{other}' to ignore"):
            config_from_gguf(fields, where="m.gguf", ignore_keys=(other,))


def test_gguf_keys_of_others_are_irrelevant():
    extra = {"general.name": "x", "quantize.imatrix.file": "y", "someone.note": 1}
    assert config_from_gguf(gguf_fields(tiny()) | extra, where="m") == read_gguf()
    with pytest.raises(ConfigError, match="the embedding has 48 rows"):
        config_from_gguf(gguf_fields(tiny()), where="m", vocab_size=48)


@pytest.mark.parametrize("divisors", [(1.0, 2.0, 3.0, 0.0), (1.0, 2.0, 3.0, float("nan"))])
def test_rope_divisors_are_positive_numbers(divisors):
    with pytest.raises(ConfigError, match="inv_freq_divisors must be positive numbers"):
        config_from_gguf(gguf_fields(tiny()), where="m.gguf", rope_tensors=RopeTensors(divisors))


def test_gguf_values_of_the_wrong_kind():
    for change in ({"attention.key_length": 0, "attention.scale": 1.0},):
        fields = gguf_fields(tiny()) | {f"llama.{key}": value for key, value in change.items()}
        with pytest.raises(ConfigError, match="key_length = 0: must be positive"):
            config_from_gguf(fields, where="m.gguf")
    config_from_gguf(gguf_fields(tiny()) | {"tokenizer.ggml.tokens": 3}, where="m.gguf")
