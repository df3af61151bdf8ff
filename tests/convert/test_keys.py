"""Keys of config.json: those that change nothing for PyTorch transformers are read, others refused.

Every key is put into the configuration of a tiny random model, which transformers loads with it and
without it.
"""

import json
from typing import Any

import numpy as np
import pytest

from jaxneurons import ConfigError, SourceError, load
from jaxneurons.convert.config import config_from_hf
from jaxneurons.convert.hf import read_hf
from jaxneurons.convert.keys import IRRELEVANT

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from support.families import IDS, make, our_logits  # noqa: E402


def words(text: str) -> list[str]:
    return text.split()


# A value for every key that is said to be irrelevant, other than what transformers fills in.
VALUES: dict[str, Any] = {
    **dict.fromkeys(
        words(
            "_name_or_path name_or_path _commit_hash transformers.js_config unsloth_version "
            "internal_version internval_version linear_impl_type tokenizer tokenizer_class"
        ),
        "x",
    ),
    **dict.fromkeys(
        words(
            "is_llama_config unsloth_fixed use_bfloat16 sequence_parallel_enabled "
            "selective_checkpoint_enabled gradient_checkpointing use_xformers use_flash_attn "
            "use_flash_attention use_flash_attention_2 _flash_attn_2_enabled torchscript "
            "_attn_implementation_autoset tf_legacy_loss is_decoder early_stopping do_sample "
            "remove_invalid_values output_hidden_states output_scores return_dict_in_generate"
        ),
        True,
    ),
    **dict.fromkeys(words("use_cache output_attentions"), False),
    **dict.fromkeys(
        words(
            "resid_pdrop embd_pdrop attn_pdrop hidden_dropout hidden_dropout_prob "
            "attention_probs_dropout_prob attention_dropout"
        ),
        0.5,
    ),
    **dict.fromkeys(
        words(
            "max_length min_length num_beams num_beam_groups top_k no_repeat_ngram_size "
            "encoder_no_repeat_ngram_size max_cache_length "
            "max_sequence_length model_max_length pretraining_tp chunk_size_feed_forward "
            "bos_token_id eos_token_id pad_token_id unk_token_id sep_token_id "
            "decoder_start_token_id forced_bos_token_id forced_eos_token_id"
        ),
        2,
    ),
    **dict.fromkeys(
        words("diversity_penalty temperature top_p typical_p repetition_penalty length_penalty"),
        0.7,
    ),
    "suppress_tokens": [3, 4],
    "begin_suppress_tokens": [3, 4],
    **dict.fromkeys(
        words("_attn_implementation attn_implementation _attn_implementation_internal"), "eager"
    ),
    **dict.fromkeys(words("torch_dtype dtype _pre_quantization_dtype"), "float32"),
    "return_dict": True,  # transformers itself cannot run with false
    "transformers_version": "4.31.0",
    "architectures": ["LLaMAForCausalLM"],
    "initializer_range": 0.5,
    "neftune_noise_alpha": 5.0,
    "mask_value": -1e4,
    "num_return_sequences": 1,
    "id2label": {"0": "a", "1": "b", "2": "c"},
    "label2id": {"a": 0, "b": 1, "c": 2},
    "num_labels": 3,
    "problem_type": "regression",
    "finetuning_task": "x",
    "task_specific_params": {"x": {"y": 1}},
    "prefix": "x",
    "bad_words_ids": [[1]],
    "exponential_decay_length_penalty": [2, 1.5],
    "cache_implementation": "static",
}
FAMILIES = ("llama", "mistral-window", "qwen2-mixed")
EVERYWHERE = {
    "hidden_act": "swish",
    "is_causal": True,
    "attn_logit_softcapping": None,
    "quantization_config": None,
    "use_qk_norm": False,
    "use_mup": False,
}
# Keys in the wild of which one value changes nothing, in one of the families.
HARMLESS: list[tuple[str, str, dict[str, Any]]] = [
    *((family, "default", EVERYWHERE) for family in FAMILIES),
    ("llama", "default", {"use_sliding_window": False}),
    ("llama", "default", {"use_sliding_window": False, "sliding_window": 7}),
    ("llama", "default", {"max_window_layers": 1}),
    ("mistral", "default", {"use_sliding_window": False}),
    ("mistral-window", "default", {"use_sliding_window": False, "max_window_layers": 1}),
    ("qwen2", "default", {"use_mrope": False}),
    ("qwen2", "default", {"attention_bias": False}),
    ("qwen2", "default", {"dual_chunk_attention_config": None}),
]
ROPES: list[tuple[str, dict[str, Any]]] = [
    ("yarn", {"finetuned": True}),
    ("linear", {"original_max_position_embeddings": 8}),
    ("linear", {"finetuned": False, "original_max_position_embeddings": 8}),
    ("default", {"original_max_position_embeddings": 8}),
]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Directories of models, and their logits in transformers, each made once."""
    found: dict[tuple[str, str], tuple[Any, np.ndarray]] = {}

    def get(family: str, rope: str):
        if (family, rope) not in found:
            directory = tmp_path_factory.mktemp(f"{family}-{rope}")
            make(family, rope, "gqa", tied=False).save_pretrained(directory)
            found[family, rope] = directory, read_in_torch(directory)
        return found[family, rope]

    return get


def read_in_torch(directory: Any) -> np.ndarray:
    model = transformers.AutoModelForCausalLM.from_pretrained(
        directory, attn_implementation="eager", dtype=torch.float32
    )
    with torch.no_grad():
        return model.eval()(torch.tensor(IDS)).logits.numpy()


def with_keys(directory: Any, target: Any, **keys: Any) -> dict[str, Any]:
    """The same weights, with more keys in config.json; null of `model_type` and the like stays."""
    values = {**json.loads((directory / "config.json").read_text()), **keys}
    (target / "config.json").write_text(json.dumps(values))
    weights = target / "model.safetensors"
    weights.unlink(missing_ok=True)
    weights.hardlink_to(directory / "model.safetensors")
    return values


def assert_nothing_changes(saved: Any, target: Any, family: str, rope: str, **keys: Any) -> None:
    directory, plain = saved(family, rope)
    values = with_keys(directory, target, **keys)
    np.testing.assert_array_equal(read_in_torch(target), plain)
    before = json.loads((directory / "config.json").read_text())
    assert config_from_hf(values, where="x") == config_from_hf(before, where="x")


def test_every_irrelevant_key_has_a_value_here():
    assert VALUES.keys() == IRRELEVANT.keys()


@pytest.mark.parametrize("start", range(0, len(VALUES), 12))
def test_irrelevant_keys_change_nothing(saved, tmp_path, start):
    keys = dict(list(VALUES.items())[start : start + 12])
    family = FAMILIES[start // 12 % len(FAMILIES)]
    assert_nothing_changes(saved, tmp_path, family, "default", **keys)


@pytest.mark.parametrize(("family", "rope", "keys"), HARMLESS)
def test_harmless_values_change_nothing(saved, tmp_path, family, rope, keys):
    assert_nothing_changes(saved, tmp_path, family, rope, **keys)


@pytest.mark.parametrize(("rope", "keys"), ROPES)
def test_harmless_keys_of_rope_change_nothing(saved, tmp_path, rope, keys):
    directory, _ = saved("llama", rope)
    before = json.loads((directory / "config.json").read_text())["rope_parameters"]
    assert_nothing_changes(saved, tmp_path, "llama", rope, rope_parameters={**before, **keys})


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_with_all_of_them_equal_pytorch(saved, tmp_path, family):
    directory, plain = saved(family, "default")
    with_keys(directory, tmp_path, **VALUES, hidden_act="swish", use_mrope=False, strange=None)
    config, params = read_hf(tmp_path)
    np.testing.assert_allclose(our_logits(params, IDS, config), plain, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    "keys", [{"is_causal": False}, {"is_causal": None}, {"hidden_act": "gelu"}]
)
def test_what_changes_a_logit_is_refused(saved, tmp_path, family, keys):
    directory, plain = saved(family, "default")
    values = with_keys(directory, tmp_path, **keys)
    assert np.abs(read_in_torch(tmp_path) - plain).max() > 1e-3
    with pytest.raises(ConfigError, match=next(iter(keys))):
        config_from_hf(values, where="x")


@pytest.mark.parametrize(
    ("family", "keys", "message"),
    [
        ("llama", {"auto_map": {"AutoModel": "m.M"}}, "auto_map = .*Python code of its own"),
        ("llama", {"use_sliding_window": True}, "use_sliding_window = True"),
        ("llama", {"sliding_window": 7}, "'llama' has no sliding window"),
        ("mistral", {"attention_bias": True}, "has no such biases"),
        ("qwen2", {"use_mrope": True}, "use_mrope = True"),
        ("qwen2", {"dual_chunk_attention_config": {"chunk_size": 4}}, "dual_chunk_attention"),
        ("qwen2", {"hidden_act": "gelu"}, "hidden_act = 'gelu'"),
        ("llama", {"use_rope": False}, "use_rope = False"),
        ("llama", {"use_rms_norm": False}, "use_rms_norm = False"),
        ("llama", {"use_causal_mask": False}, "use_causal_mask = False"),
        ("llama", {"strange": False}, "strange = False"),
        ("llama", {"strange": 0}, "strange = 0"),
        ("llama", {"logits_scaling": 2.0}, "logits_scaling = 2.0"),
    ],
)
def test_what_is_not_known_to_be_harmless_is_refused(saved, family, keys, message):
    directory, _ = saved(family, "default")
    values = json.loads((directory / "config.json").read_text())
    with pytest.raises(ConfigError, match=message) as caught:
        config_from_hf({**values, **keys}, where="x")
    if "is not known" in str(caught.value) or "Python code" in str(caught.value):
        name = next(iter(keys))
        assert f"ignore_keys=('{name}',)" in str(caught.value)
        assert f"--ignore-key {name}" in str(caught.value)


def test_weights_decide_whether_there_are_biases(saved, tmp_path):
    directory, _ = saved("llama", "default")
    with_keys(directory, tmp_path, attention_bias=True)
    with pytest.raises(SourceError, match=r"tensors are missing: .*self_attn"):
        read_hf(tmp_path)
    with_keys(directory, tmp_path, intermediate_size=96)
    with pytest.raises(SourceError, match="has shape"):
        read_hf(tmp_path)


def test_keys_that_the_user_says_are_to_be_ignored(saved, tmp_path):
    directory, plain = saved("llama", "default")
    values = with_keys(directory, tmp_path, strange=3)
    values["rope_parameters"] = {**values["rope_parameters"], "odd": 1}
    (tmp_path / "config.json").write_text(json.dumps(values))
    names = ("strange", "rope_parameters.odd")
    with pytest.raises(ConfigError, match=r"rope_parameters\.odd"):
        read_hf(tmp_path, ignore_keys=("strange",))
    config, params = read_hf(tmp_path, ignore_keys=names)
    np.testing.assert_allclose(our_logits(params, IDS, config), plain, atol=1e-5, rtol=1e-5)
    with pytest.raises(ConfigError, match="no key 'strang' to ignore; did you mean 'strange'"):
        read_hf(tmp_path, ignore_keys=("strang",))
    with pytest.raises(ConfigError, match="model_type = None is not supported"):
        read_hf(tmp_path, ignore_keys=("model_type",))
    with pytest.raises(ConfigError, match="a sequence of names"):
        load.__wrapped__(tmp_path, ignore_keys="strange")
