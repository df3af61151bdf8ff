"""config.json of further families: as published, by transformers 4 and 5, and what is refused."""

import json

import numpy as np
import pytest

from jaxneurons import ConfigError
from jaxneurons.convert.config import config_from_hf
from jaxneurons.convert.export import config_to_hf
from jaxneurons.convert.families import FAMILIES, MODEL_TYPES
from jaxneurons.model.config import RopeConfig
from jaxneurons.model.families import FIXED, fixed_fields

FULL, SLIDING = "full_attention", "sliding_attention"
SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}
FIVE_TO_ONE = tuple((layer + 1) % 6 != 0 for layer in range(18))


def read(model_type, **keys):
    values = {**SIZES, "model_type": model_type, **keys}
    return config_from_hf({k: v for k, v in values.items() if v != "absent"}, where="c.json")


# As their repositories have them, shortened where lists are long.
PUBLISHED = {
    "gemma-2b": (
        {
            "model_type": "gemma",
            "attention_bias": False,
            "head_dim": 256,
            "hidden_act": "gelu",
            "hidden_activation": None,
            "hidden_size": 2048,
            "intermediate_size": 16384,
            "num_attention_heads": 8,
            "num_hidden_layers": 18,
            "num_key_value_heads": 1,
            "rms_norm_eps": 1e-06,
            "rope_scaling": None,
            "rope_theta": 10000.0,
            "vocab_size": 256000,
        },
        {"embed_scale": 2048**0.5, "norm_offset": 1.0, "tied": True, "activation": "gelu_tanh"},
    ),
    "gemma-2-27b": (
        {
            "model_type": "gemma2",
            "attn_logit_softcapping": 50.0,
            "cache_implementation": "hybrid",
            "final_logit_softcapping": 30.0,
            "head_dim": 128,
            "hidden_act": "gelu_pytorch_tanh",
            "hidden_activation": "gelu_pytorch_tanh",
            "hidden_size": 4608,
            "intermediate_size": 36864,
            "num_attention_heads": 32,
            "num_hidden_layers": 46,
            "num_key_value_heads": 16,
            "query_pre_attn_scalar": 144,
            "sliding_window": 4096,
            "sliding_window_size": None,
        },
        {
            "query_scale": 1 / 12,
            "attention_softcap": 50.0,
            "final_softcap": 30.0,
            "sliding_layers": (True, False) * 23,
        },
    ),
    "gemma-3-270m": (
        {
            "model_type": "gemma3_text",
            "_sliding_window_pattern": 6,
            "attn_logit_softcapping": None,
            "final_logit_softcapping": None,
            "head_dim": 256,
            "hidden_activation": "gelu_pytorch_tanh",
            "hidden_size": 640,
            "intermediate_size": 2048,
            "layer_types": [SLIDING if slides else FULL for slides in FIVE_TO_ONE],
            "max_position_embeddings": 32768,
            "num_attention_heads": 4,
            "num_hidden_layers": 18,
            "num_key_value_heads": 1,
            "query_pre_attn_scalar": 256,
            "rope_local_base_freq": 10000.0,
            "rope_scaling": None,
            "rope_theta": 1000000.0,
            "sliding_window": 512,
            "use_bidirectional_attention": False,
            "vocab_size": 262144,
        },
        {
            "sliding_layers": FIVE_TO_ONE,
            "rope": RopeConfig(1e6),
            "sliding_rope": RopeConfig(1e4),
            "query_scale": None,
            "qk_norm": "head",
        },
    ),
    "gemma-3-4b": (
        {
            "model_type": "gemma3",
            "boi_token_index": 255999,
            "eoi_token_index": 256000,
            "image_token_index": 262144,
            "mm_tokens_per_image": 256,
            "text_config": {
                "hidden_size": 2560,
                "intermediate_size": 10240,
                "model_type": "gemma3_text",
                "num_hidden_layers": 34,
                "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
                "sliding_window": 1024,
            },
            "vision_config": {"model_type": "siglip_vision_model", "hidden_size": 1152},
        },
        {
            "vocab_size": 262208,
            "num_heads": 8,
            "rope": RopeConfig(1e6, "linear", 8.0),
            "sliding_rope": RopeConfig(1e4),
            "tied": True,
        },
    ),
    "Qwen3-8B": (
        {
            "model_type": "qwen3",
            "attention_bias": False,
            "head_dim": 128,
            "hidden_size": 4096,
            "max_window_layers": 36,
            "num_hidden_layers": 36,
            "num_key_value_heads": 8,
            "rope_scaling": None,
            "rope_theta": 1000000,
            "sliding_window": None,
            "use_sliding_window": False,
        },
        {"qk_norm": "head", "biases": (), "sliding_window": None, "rope": RopeConfig(1e6)},
    ),
    "SmolLM3-3B": (
        {
            "model_type": "smollm3",
            "layer_types": [FULL] * 36,
            "max_window_layers": 28,
            "mlp_bias": False,
            "no_rope_layer_interval": 4,
            "no_rope_layers": [1, 1, 1, 0] * 9,
            "pretraining_tp": 2,
            "rope_theta": 5000000.0,
            "sliding_window": None,
            "use_sliding_window": False,
        },
        {"rotary_layers": (True, True, True, False) * 9, "rope": RopeConfig(5e6), "tied": True},
    ),
    "OLMo-2-7B": (
        {"model_type": "olmo2", "rope_scaling": None, "rope_theta": 500000, "vocab_size": 100352},
        {"qk_norm": "width", "pre_norms": False, "post_norms": True, "num_kv_heads": 32},
    ),
    "Phi-3-mini-4k": (
        {
            "model_type": "phi3",
            "attention_bias": False,
            "auto_map": {
                "AutoConfig": "configuration_phi3.Phi3Config",
                "AutoModelForCausalLM": "modeling_phi3.Phi3ForCausalLM",
            },
            "embd_pdrop": 0.0,
            "num_key_value_heads": 32,
            "original_max_position_embeddings": 4096,
            "rope_scaling": None,
            "sliding_window": 2047,
        },
        {"sliding_window": 2047, "sliding_layers": None, "rope": RopeConfig()},
    ),
    "Phi-4-mini": (
        {
            "model_type": "phi3",
            "full_attn_mod": 1,
            "hidden_size": 3072,
            "interpolate_factor": 1,
            "lm_head_bias": False,
            "max_position_embeddings": 131072,
            "mlp_bias": False,
            "num_attention_heads": 24,
            "num_key_value_heads": 8,
            "original_max_position_embeddings": 4096,
            "partial_rotary_factor": 0.75,
            "rope_scaling": {
                "long_factor": [1.0 + i for i in range(48)],
                "short_factor": [1.0] * 48,
                "type": "longrope",
            },
            "rope_theta": 10000.0,
            "sliding_window": 262144,
            "tie_word_embeddings": True,
        },
        {
            "tied": True,
            "rope": RopeConfig(
                rope_type="longrope",
                original_max_position=4096,
                attention_factor=(1 + 5 / 12) ** 0.5,  # 32 = 2^5 times 4,096 = 2^12
                short_divisors=(1.0,) * 48,
                long_divisors=tuple(1.0 + i for i in range(48)),
                dim=96,
            ),
        },
    ),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_configurations(name):
    values, expected = PUBLISHED[name]
    values = {**values, "architectures": ["x"], "torch_dtype": "bfloat16", "use_cache": True}
    config = config_from_hf(values, where=name)
    assert {key: getattr(config, key) for key in expected} == expected

    again = json.loads(json.dumps(config_to_hf(config, dtype=np.dtype("float32"))))
    assert config_from_hf(again, where=name) == config
    if values["model_type"] in ("phi3", "olmo2") and again["rope_scaling"]:
        assert "rope_type" not in again["rope_scaling"]  # transformers 4 wants "type"


@pytest.mark.parametrize("name", PUBLISHED)
def test_transformers_reads_what_is_written(name):
    transformers = pytest.importorskip("transformers")
    config = config_from_hf(PUBLISHED[name][0], where=name)
    written = json.loads(json.dumps(config_to_hf(config, dtype=np.dtype("float32"))))
    if written["model_type"] not in transformers.CONFIG_MAPPING:
        pytest.skip(f"transformers {transformers.__version__} has no {written['model_type']}")
    theirs = transformers.CONFIG_MAPPING[written["model_type"]].from_dict(written)
    assert config_from_hf(json.loads(theirs.to_json_string()), where=name) == config


@pytest.mark.parametrize("model_type", [m for m in MODEL_TYPES if m != "gemma3"])
def test_absent_keys_mean_what_transformers_means(model_type):
    transformers = pytest.importorskip("transformers")
    if model_type not in transformers.CONFIG_MAPPING:
        pytest.skip(f"transformers {transformers.__version__} has no {model_type}")
    reference = transformers.CONFIG_MAPPING[model_type]()
    mine = config_from_hf({"model_type": model_type}, where="x")
    assert mine == config_from_hf(reference.to_dict(), where="x")
    assert (mine.vocab_size, mine.num_layers) == (reference.vocab_size, reference.num_hidden_layers)
    assert mine.norm_eps == reference.rms_norm_eps
    assert mine.tied == reference.tie_word_embeddings


def test_every_family_fixes_fields():
    assert FIXED.keys() == FAMILIES.keys()
    for name in FIXED:
        fields = fixed_fields(name, hidden_size=64)
        assert ("embed_scale" in fields) == name.startswith("gemma")
    assert fixed_fields("gemma", hidden_size=64)["embed_scale"] == 8.0


def test_spellings_of_gemma3():
    four = read(
        "gemma3_text",
        rope_theta=5e5,
        rope_local_base_freq=100.0,
        rope_scaling={"rope_type": "linear", "factor": 8.0},
        sliding_window_pattern=2,
    )
    five = read(
        "gemma3_text",
        layer_types=[SLIDING, FULL] * 2,
        rope_parameters={
            FULL: {"rope_type": "linear", "factor": 8.0, "rope_theta": 5e5},
            SLIDING: {"rope_type": "default", "rope_theta": 100.0},
        },
    )
    assert four == five
    assert four.rope == RopeConfig(5e5, "linear", 8.0)
    assert read("gemma3_text").sliding_window == 4096  # all four slide
    assert read("gemma3_text").rope == RopeConfig(1e4)
    everywhere = {FULL: {"rope_theta": 7.0}, SLIDING: {"rope_theta": 7.0}}
    assert read("gemma3_text", rope_parameters=everywhere).sliding_rope is None


def test_smollm3():
    assert read("smollm3").rotary_layers == (True, True, True, False)
    assert read("smollm3").rope == RopeConfig(2e6)
    assert read("smollm3", no_rope_layer_interval=5).rotary_layers is None
    assert read("smollm3", no_rope_layers=[0, 1, 1, 1, 1, 1]).rotary_layers == (
        False,
        True,
        True,
        True,
    )
    windowed = read("smollm3", use_sliding_window=True, sliding_window=8)
    assert windowed.sliding_layers == (False, False, False, True)


def test_phi3_of_its_first_spelling():
    factors = {"short_factor": [1.0] * 4, "long_factor": [2.0] * 4}
    keys = {"original_max_position_embeddings": 64}
    rope = read("phi3", rope_scaling={"type": "su", **factors}, **keys).rope
    assert rope == read("phi3", rope_scaling={"type": "longrope", **factors}, **keys).rope
    assert rope.attention_factor == (1 + 1 / 6) ** 0.5


LONG = {"type": "longrope", "short_factor": [1.0] * 4, "long_factor": [2.0] * 4}
TEXT = {"model_type": "gemma3_text"}


@pytest.mark.parametrize(
    ("model_type", "keys", "message"),
    [
        ("gemma", {"use_bidirectional_attention": True}, "use_bidirectional_attention = True"),
        ("gemma2", {"use_bidirectional_attention": True}, "use_bidirectional_attention = True"),
        ("gemma3_text", {"use_bidirectional_attention": True}, "use_bidirectional_attention"),
        ("gemma", {"hidden_act": "silu"}, "hidden_act = 'silu': only 'gelu_pytorch_tanh'"),
        ("gemma", {"hidden_activation": "gelu"}, "hidden_activation = 'gelu'"),
        ("gemma2", {"hidden_activation": None}, "hidden_activation = None"),
        ("gemma", {"sliding_window": 8}, "sliding_window = 8: model_type 'gemma' has no"),
        ("gemma", {"mlp_bias": True}, "'gemma' has no such biases"),
        ("gemma", {"head_dim": None}, "head_dim = None: an integer"),
        ("gemma2", {"sliding_window": None}, "layer_types says that layers have a window"),
        ("gemma2", {"layer_types": ["chunked_attention"] * 4}, "'chunked_attention'"),
        ("gemma2", {"query_pre_attn_scalar": 0}, "query_pre_attn_scalar = 0.0"),
        ("gemma2", {"query_pre_attn_scalar": None}, "query_pre_attn_scalar is missing"),
        ("gemma2", {"attn_logit_softcapping": -1.0}, "attention_softcap must be a positive"),
        ("gemma3_text", {"attn_logit_softcapping": 50.0}, "Gemma 3 has no such cap"),
        ("gemma3_text", {"sliding_window_pattern": 0}, "sliding_window_pattern = 0"),
        ("gemma3_text", {"_sliding_window_pattern": 2}, "_sliding_window_pattern = 2: without"),
        (
            "gemma3_text",
            {"sliding_window_pattern": 3, "layer_types": [FULL] * 4},
            "sliding_window_pattern = 3: contradicts layer_types",
        ),
        ("gemma3_text", {"rope_parameters": {"rope_theta": 1.0}}, "one for each layer type"),
        (
            "gemma3_text",
            {"rope_parameters": {FULL: {"rope_theta": 7.0}}, "rope_theta": 8.0},
            r"rope_parameters\.full_attention\.rope_theta = 7\.0: contradicts rope_theta = 8\.0",
        ),
        (
            "gemma3_text",
            {
                "rope_parameters": {FULL: {"rope_theta": 7.0}},
                "rope_scaling": {"rope_type": "linear", "factor": 8.0},
            },
            "contradict each other",
        ),
        ("gemma3", {}, "text_config = None: the configuration of the text part is needed"),
        ("gemma3", {"text_config": {"model_type": "llama"}}, "text_config.model_type = 'llama'"),
        ("gemma3", {"text_config": {"odd": 1}}, r"text_config\.odd = 1: this key is not known"),
        ("gemma3", {"text_config": TEXT, "odd": 1}, "c.json: odd = 1: this key is not known"),
        (
            "gemma3",
            {
                "text_config": {**TEXT, "tie_word_embeddings": False},
                "tie_word_embeddings": True,
            },
            "contradicts the one in text_config",
        ),
        ("qwen3", {"use_sliding_window": None}, "use_sliding_window = None: true or false"),
        ("qwen3", {"max_window_layers": None, "use_sliding_window": True}, "max_window_layers is"),
        ("qwen3", {"layer_types": [SLIDING] * 4}, "goes with 'full_attention' in every layer"),
        ("smollm3", {"no_rope_layers": [1, 1, 1]}, "a list of 4 entries is needed"),
        ("smollm3", {"no_rope_layers": [1, 1, 1, 2]}, "entries must be 0 or 1"),
        ("smollm3", {"no_rope_layer_interval": 0}, "no_rope_layer_interval = 0"),
        ("smollm3", {"layer_types": [SLIDING] * 4}, "goes with 'full_attention' in every layer"),
        ("olmo2", {"clip_qkv": 8.0}, "clip_qkv = 8.0"),
        ("olmo2", {"sliding_window": 8}, "'olmo2' has no sliding window"),
        ("phi3", {"auto_map": {"AutoModelForCausalLM": "evil.Model"}}, "Python code of its own"),
        ("phi3", {"lm_head_bias": True}, "lm_head_bias = True"),
        ("phi3", {"full_attn_mod": 2}, "full_attn_mod = 2"),
        ("phi3", {"attention_bias": True}, "'phi3' has no such biases"),
        ("phi3", {"partial_rotary_factor": 0.4}, "an even number of the 8 dimensions"),
        ("phi3", {"partial_rotary_factor": 1.5}, "partial_rotary_factor = 1.5"),
        ("phi3", {"rope_scaling": {"type": "yarn", "factor": 2.0}}, "rope type 'yarn'"),
        ("phi3", {"rope_scaling": {"type": "longrope"}}, "rope_scaling.short_factor is missing"),
        ("phi3", {"rope_scaling": {**LONG, "short_factor": "x"}}, "a list of numbers is needed"),
        ("phi3", {"rope_scaling": {**LONG, "long_factor": [1, 2, 3, None]}}, r"long_factor\[3\]"),
        ("phi3", {"rope_scaling": {**LONG, "long_factor": [1.0]}}, "rope long_divisors has 1"),
        ("phi3", {"rope_scaling": {**LONG, "factor": 3.0}}, "readers of 'longrope' disagree"),
        (
            "phi3",
            {"rope_scaling": {**LONG, "original_max_position_embeddings": 8}},
            "original_max_position_embeddings = 8: contradicts 4096 beside it",
        ),
        ("qwen3", {"rope_scaling": LONG}, "rope type 'longrope' is not supported"),
    ],
)
def test_what_is_not_handled_is_named(model_type, keys, message):
    values = keys if model_type == "gemma3" else {**SIZES, **keys}
    with pytest.raises(ConfigError, match=message) as caught:
        config_from_hf({**values, "model_type": model_type}, where="c.json")
    assert str(caught.value).startswith("c.json")
    assert "\n" not in str(caught.value)
