"""The keys of configuration files: which matter, which do not, and why; reading them one by one."""

import math
import re
from collections.abc import Iterable, Mapping
from typing import Any

from jaxneurons.errors import ConfigError, near_matches

# Keys that select behaviour this library has in one form only; any other value is an error.
FIXED: dict[str, tuple[Any, ...]] = {
    "use_bidirectional_attention": (False, None),
    "rope_interleaved": (False, None),
    "partial_rotary_factor": (1.0, None),
    "is_causal": (True,),  # null too means False to transformers
    "is_encoder_decoder": (False, None),
    "add_cross_attention": (False, None),
    "cross_attention_hidden_size": (None,),
    "tie_encoder_decoder": (False, None),
    "pruned_heads": ({}, None),
    "per_layer_config": ({}, None),
}


def _because(reason: str, names: str) -> dict[str, str]:
    return dict.fromkeys(names.split(), reason)


# Keys that cannot change the logits, and why.
IRRELEVANT: dict[str, str] = {
    **_because(
        "provenance",
        "_name_or_path name_or_path _commit_hash transformers_version transformers.js_config "
        "is_llama_config unsloth_fixed unsloth_version internal_version internval_version",
    ),
    **_because("names a Python class; model_type decides", "architectures tokenizer_class"),
    **_because(
        "each stored tensor says its own dtype",
        "torch_dtype dtype use_bfloat16 _pre_quantization_dtype",
    ),
    **_because(
        "training only",
        "initializer_range attention_dropout hidden_dropout resid_pdrop embd_pdrop attn_pdrop "
        "hidden_dropout_prob attention_probs_dropout_prob neftune_noise_alpha "
        "gradient_checkpointing sequence_parallel_enabled selective_checkpoint_enabled",
    ),
    **_because(
        "how a computation is carried out, not what it computes",
        "pretraining_tp use_cache chunk_size_feed_forward attn_implementation torchscript "
        "_attn_implementation _attn_implementation_autoset _attn_implementation_internal "
        "_flash_attn_2_enabled use_xformers use_flash_attn use_flash_attention "
        "use_flash_attention_2 linear_impl_type max_cache_length mask_value",
    ),
    **_because(
        "max_position_embeddings says how long the context is",
        "max_sequence_length model_max_length",
    ),
    **_because(
        "the tokenizer's business",
        "bos_token_id eos_token_id pad_token_id unk_token_id sep_token_id decoder_start_token_id "
        "tokenizer",
    ),
    **_because(
        "which outputs transformers returns, and in what container",
        "output_attentions output_hidden_states output_scores return_dict return_dict_in_generate",
    ),
    **_because(
        "heads of other tasks",
        "id2label label2id num_labels problem_type finetuning_task task_specific_params prefix "
        "tf_legacy_loss is_decoder",
    ),
    **_because(
        "decoding strategy",
        "max_length min_length do_sample early_stopping num_beams num_beam_groups "
        "diversity_penalty temperature top_k top_p typical_p repetition_penalty length_penalty "
        "no_repeat_ngram_size encoder_no_repeat_ngram_size bad_words_ids num_return_sequences "
        "forced_bos_token_id forced_eos_token_id remove_invalid_values suppress_tokens "
        "exponential_decay_length_penalty begin_suppress_tokens cache_implementation",
    ),
}

# A `use_...` that is false switches off what is not known here, and so changes nothing: unless it
# is a part that every model of these families has.
_PARTS = re.compile(
    r"use_(rope|rotary|rotary_emb|rotary_embeddings?|rotary_position_embeddings?|"
    r"rms_?norm|layer_?norm|pre_norm|post_attention_norm|final_norm|norm|causal|causal_mask|"
    r"attention|attention_mask|mlp|swiglu|glu|gated_mlp|silu|residual|residuals|softmax|"
    r"qkv_bias|attention_bias|bias|position_embeddings?)"
)

# Keys that no value makes harmless, and why.
_NEVER = {
    "auto_map": "the model comes with Python code of its own, which may compute anything",
}

UNKNOWN = "this key is not known, so it is not known whether it changes the model"
MOST = {"num_hidden_layers": 100_000}
"""Largest values that make sense, where they are far below 2^31."""


def is_idle(key: str, value: Any) -> bool:
    """Whether a key that nothing here knows says no more than "not used"."""
    return value is None or (
        value is False and key.startswith("use_") and not _PARTS.fullmatch(key)
    )


class Keys:
    """A dict that is consumed key by key, so that what nobody asked for can be reported."""

    def __init__(self, values: Mapping[str, Any], where: str, prefix: str = "") -> None:
        self.left = dict(values)
        self.where = where
        self.prefix = prefix

    def error(self, key: str, value: Any, why: str) -> ConfigError:
        """An error about a key: where, key, value and why."""
        shown = repr(value)
        if len(shown) > 80:
            shown = shown[:77] + "..."
        return ConfigError(f"{self.where}: {self.prefix}{key} = {shown}: {why}")

    def integer(self, key: str, default: Any = None) -> Any:
        """Consume an integer; None where the value is null or absent without a default."""
        value = self.left.pop(key, default)
        if value is not None and (isinstance(value, bool) or not isinstance(value, int)):
            raise self.error(key, value, "an integer is needed")
        return value

    def number(self, key: str, default: Any = None) -> Any:
        """Consume a number, as a float; None as for `integer`."""
        value = self.left.pop(key, default)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise self.error(key, value, "a number is needed")
        try:
            as_float = float(value)
        except OverflowError:
            as_float = math.inf
        if not math.isfinite(as_float):
            raise self.error(key, value, "a finite number is needed")
        return as_float

    def boolean(self, key: str, default: bool) -> bool:
        """Consume true or false."""
        value = self.left.pop(key, default)
        if not isinstance(value, bool):
            raise self.error(key, value, "true or false is needed")
        return value

    def numbers(self, key: str) -> tuple[float, ...]:
        """Consume a list of numbers, which must be there."""
        values = self.need(key, self.left.pop(key, None))
        if not isinstance(values, list):
            raise self.error(key, values, "a list of numbers is needed")
        entries = Keys({f"{key}[{i}]": v for i, v in enumerate(values)}, self.where, self.prefix)
        return tuple(entries.need(name, entries.number(name)) for name in list(entries.left))

    def need(self, key: str, value: Any) -> Any:
        """The value, which must not be None."""
        if value is None:
            raise ConfigError(f"{self.where}: {self.prefix}{key} is missing")
        return value

    def done(self, why: str = UNKNOWN) -> None:
        """Raise if any key has not been consumed, unless it says that something is not used."""
        for key, value in self.left.items():
            if is_idle(key, value):
                continue
            name = f"{self.prefix}{key}"
            raise self.error(
                key,
                value,
                f"{_NEVER.get(key, why)}; if it changes nothing, load with ignore_keys=({name!r},) "
                f"(on the command line: --ignore-key {name})",
            )


def without_keys(
    values: Mapping[str, Any], names: Iterable[str], *, where: str, prefix: str = ""
) -> dict[str, Any]:
    """The values without the named keys, which must be there.

    Args:
      values: a configuration.
      names: keys; of a dictionary in it: `rope_scaling.NAME`.
      where: the file, for messages.
      prefix: how every key begins that may be left out.

    Raises:
      ConfigError: there is no such key.
    """
    left = dict(values)
    for name in names:
        outer, _, inner = name.partition(".")
        inside = left.get(outer)
        if name in left and name.startswith(prefix):
            del left[name]
        elif isinstance(inside, Mapping) and inner in inside:
            left[outer] = {key: value for key, value in inside.items() if key != inner}
        else:
            known = [key for key in left if key.startswith(prefix)]
            raise ConfigError(f"{where}: no key {name!r} to ignore; {near_matches(name, known)}")
    return left
