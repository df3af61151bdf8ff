"""Hugging Face configurations -> `ModelConfig`, strictly: no value is ever silently ignored.

Every key of a `config.json` is read, or is listed in `keys.py` as irrelevant with the reason, or is
an error that names it. (GGUF metadata: `gguf_config.py`.)
"""

import math
from collections.abc import Sequence
from typing import Any

from jaxneurons.convert.keys import FIXED, IRRELEVANT, MOST, Keys, without_keys
from jaxneurons.errors import ConfigError
from jaxneurons.model.config import ROPE_TYPES, ModelConfig, RopeConfig
from jaxneurons.storage.settings import check_argument

# What transformers' LlamaConfig, MistralConfig and Qwen2Config fill in for an absent key.
DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": {
        "vocab_size": 32000,
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": None,
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": False,
        "rope_theta": 10000.0,
        "sliding_window": None,
    },
    "mistral": {
        "vocab_size": 32000,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": False,
        "rope_theta": 10000.0,
        "sliding_window": 4096,
    },
    "qwen2": {
        "vocab_size": 151936,
        "hidden_size": 4096,
        "intermediate_size": 22016,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": False,
        "rope_theta": 10000.0,
        "sliding_window": 4096,
        "use_sliding_window": False,
        "max_window_layers": 28,
    },
}


def _rope_dict(
    values: Any, key: str, *, theta: float | None, keys: Keys, max_position: int, default: float
) -> RopeConfig:
    """Read one `rope_parameters` or `rope_scaling` dictionary."""
    if not isinstance(values, dict):
        raise keys.error(key, values, "a dictionary is needed")
    rope = Keys(values, keys.where, prefix=f"{key}.")
    kind = _rope_kind(rope, key)
    inner = rope.number("rope_theta")
    if inner is not None and theta is not None and inner != theta:
        raise rope.error("rope_theta", inner, f"contradicts rope_theta = {theta} beside it")
    base = inner if inner is not None else theta if theta is not None else default
    partial = rope.number("partial_rotary_factor", 1.0)
    if partial not in (1.0, None):
        raise rope.error("partial_rotary_factor", partial, "only full rotary heads are supported")
    outer = keys.integer("original_max_position_embeddings")
    rope.left.pop("finetuned", None)  # whether the model has been trained so
    if kind == "default":
        parsed = _default_rope(rope, base)
    elif kind == "linear":
        parsed = _linear_rope(rope, base)
    elif kind == "dynamic":
        parsed = _dynamic_rope(rope, base, max_position)
    else:
        original = _original_context(rope, outer, max_position)
        if kind == "yarn":
            parsed = _yarn_rope(rope, base, original, max_position)
        else:
            parsed = _llama3_rope(rope, base, original)
    rope.done(f"not a key of rope type {kind!r} that this library handles")
    return parsed


def _rope_kind(rope: Keys, key: str) -> str:
    kinds = [rope.left.pop(name) for name in ("rope_type", "type") if name in rope.left]
    if any(kind != kinds[0] for kind in kinds):
        raise ConfigError(
            f"{rope.where}: {key} names several rope types: {sorted(map(str, kinds))}"
        )
    kind = kinds[0] if kinds else "default"
    if kind not in ROPE_TYPES:
        raise ConfigError(
            f"{rope.where}: {key}: rope type {kind!r} is not supported "
            f"(supported: {', '.join(ROPE_TYPES)})"
        )
    return str(kind)


def _original_context(rope: Keys, outer: int | None, max_position: int) -> int:
    """Tokens of the context before it was extended, as stated inside, beside it, or not at all."""
    inner = rope.integer("original_max_position_embeddings")
    if None not in (inner, outer) and inner != outer:
        raise rope.error(
            "original_max_position_embeddings", inner, f"contradicts {outer} beside it"
        )
    length = inner if inner is not None else outer if outer is not None else max_position
    if length <= 0:
        raise rope.error("original_max_position_embeddings", length, "must be positive")
    return length


def _default_rope(rope: Keys, theta: float) -> RopeConfig:
    rope.integer("original_max_position_embeddings")  # not looked at
    factor = rope.number("factor", 1.0)
    if factor not in (1.0, None):
        raise rope.error("factor", factor, "the rope type 'default' has no factor")
    return RopeConfig(theta=theta)


def _linear_rope(rope: Keys, theta: float) -> RopeConfig:
    rope.integer("original_max_position_embeddings")  # not looked at
    factor = rope.need("factor", rope.number("factor"))
    return RopeConfig(theta=theta, rope_type="linear", factor=factor)


def _dynamic_rope(rope: Keys, theta: float, max_position: int) -> RopeConfig:
    """It starts to stretch at max_position_embeddings, whatever the original context was."""
    factor = rope.need("factor", rope.number("factor"))
    stated = rope.integer("original_max_position_embeddings", max_position)
    if stated not in (None, max_position):
        raise rope.error(
            "original_max_position_embeddings",
            stated,
            f"readers of 'dynamic' disagree unless it is max_position_embeddings = {max_position}",
        )
    return RopeConfig(
        theta=theta, rope_type="dynamic", factor=factor, original_max_position=max_position
    )


def _llama3_rope(rope: Keys, theta: float, original: int) -> RopeConfig:
    return RopeConfig(
        theta=theta,
        rope_type="llama3",
        factor=rope.need("factor", rope.number("factor")),
        low_freq_factor=rope.need("low_freq_factor", rope.number("low_freq_factor")),
        high_freq_factor=rope.need("high_freq_factor", rope.number("high_freq_factor")),
        original_max_position=original,
    )


def _yarn_rope(rope: Keys, theta: float, original: int, max_position: int) -> RopeConfig:
    factor = rope.number("factor")
    if factor is None:
        factor = max_position / original
    attention = rope.number("attention_factor")
    scale, scale_all = rope.number("mscale"), rope.number("mscale_all_dim")
    if attention is None:
        attention = yarn_attention_factor(factor)
        if scale and scale_all:
            attention = yarn_attention_factor(factor, scale)
            attention /= yarn_attention_factor(factor, scale_all)
    truncate = rope.left.pop("truncate", True)
    if not isinstance(truncate, bool):
        raise rope.error("truncate", truncate, "true or false is needed")
    return RopeConfig(
        theta=theta,
        rope_type="yarn",
        factor=factor,
        original_max_position=original,
        beta_fast=rope.number("beta_fast") or 32.0,
        beta_slow=rope.number("beta_slow") or 1.0,
        truncate=truncate,
        attention_factor=attention,
    )


def yarn_attention_factor(factor: float, scale: float = 1.0) -> float:
    """What YaRN multiplies cosines and sines by (arXiv 2309.00071, section 3.4)."""
    return 1.0 if factor <= 1 else 0.1 * scale * math.log(factor) + 1.0


def _hf_rope(keys: Keys, max_position: int, default: float) -> RopeConfig:
    """Rotary embedding in the spelling of transformers 4 or 5, or both if they agree."""
    theta = keys.number("rope_theta")
    outer = keys.left.get("original_max_position_embeddings")
    parsed: dict[str, RopeConfig] = {}
    for key in ("rope_parameters", "rope_scaling"):
        values = keys.left.pop(key, None)
        if values is None or values == {}:
            continue
        if outer is not None:
            keys.left["original_max_position_embeddings"] = outer
        parsed[key] = _rope_dict(
            values, key, theta=theta, keys=keys, max_position=max_position, default=default
        )
    keys.left.pop("original_max_position_embeddings", None)
    if len(set(parsed.values())) > 1:
        raise ConfigError(f"{keys.where}: rope_parameters and rope_scaling contradict each other")
    if parsed:
        return next(iter(parsed.values()))
    return RopeConfig(theta=default if theta is None else theta)


def _hf_window(keys: Keys, family: str, layers: int) -> tuple[int | None, tuple[bool, ...] | None]:
    """Sliding window in positions, and which layers have it (None: all alike)."""
    window = keys.integer("sliding_window", DEFAULTS[family]["sliding_window"])
    if family != "qwen2":
        keys.integer("max_window_layers")  # of layers without a window: only qwen2 has them
    if family == "llama" and window is not None:
        if keys.left.get("use_sliding_window") is not False:
            raise keys.error("sliding_window", window, "model_type 'llama' has no sliding window")
        window = None
    types = keys.left.pop("layer_types", None)
    if types is not None and (not isinstance(types, list) or len(types) != layers):
        raise keys.error("layer_types", types, f"a list of {layers} entries is needed")
    full, sliding = "full_attention", "sliding_attention"
    expected = [full if window is None else sliding] * layers
    if family == "qwen2":
        used = keys.left.pop("use_sliding_window", DEFAULTS[family]["use_sliding_window"])
        if not isinstance(used, bool):
            raise keys.error("use_sliding_window", used, "true or false is needed")
        first = keys.integer("max_window_layers", DEFAULTS[family]["max_window_layers"])
        first = keys.need("max_window_layers", first)
        window = window if used else None
        # The list decides where there is one: max_window_layers only fills it in.
        expected = [full if window is None or i < first else sliding for i in range(layers)]
        if window is not None and all(kind in (full, sliding) for kind in types or [None]):
            expected = types or expected
    if types is not None and types != expected:
        raise keys.error(
            "layer_types",
            sorted(set(map(str, types))),
            f"sliding_window = {window} of model_type {family!r} goes with {expected[0]!r}"
            + ("" if len(set(expected)) > 1 else " in every layer"),
        )
    windowed = tuple(kind == sliding for kind in expected)
    if not any(windowed):
        return None, None
    return window, None if all(windowed) else windowed


def _hf_biases(keys: Keys, family: str) -> tuple[str, ...]:
    """Projections with a bias."""
    names: list[str] = []
    for key, adds in (("attention_bias", "qkvo"), ("mlp_bias", ("gate", "up", "down"))):
        value = keys.left.pop(key, None)
        if value is not None and not isinstance(value, bool):
            raise keys.error(key, value, "true or false is needed")
        if key == "attention_bias" and family == "qwen2":
            names += "qkv"  # whatever it says: weights without them are refused
        elif value and family != "llama":
            raise keys.error(key, value, f"model_type {family!r} has no such biases")
        elif value:
            names += adds
    return tuple(names)


def _refuse_quantised(keys: Keys) -> None:
    method = keys.left.pop("quantization_config", None)
    if method is None:
        return
    method = method.get("quant_method", method) if isinstance(method, dict) else method
    raise ConfigError(
        f"{keys.where}: quantization_config ({method}): quantised Hugging Face weights are not "
        "read; use the unquantised repository, or a GGUF file"
    )


def _check_fixed(keys: Keys) -> None:
    """Consume the keys that this library has in one form only."""
    for key, allowed in FIXED.items():
        value = keys.left.pop(key, allowed[0])
        if not any(value == a and isinstance(value, bool) == isinstance(a, bool) for a in allowed):
            raise keys.error(key, value, f"only {allowed[0]!r} is supported")


_SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "max_position_embeddings",
)


def _size(keys: Keys, key: str, default: int | None) -> int:
    value = keys.integer(key, default)
    if value is None or not 0 < value <= MOST.get(key, 2**31 - 1):
        raise keys.error(key, value, "a positive integer of sensible size is needed")
    return value


def _head_dim(keys: Keys, *, hidden: int, heads: int) -> int:
    head_dim = keys.integer("head_dim")
    if head_dim is None:
        if hidden % heads:
            raise ConfigError(
                f"{keys.where}: hidden_size = {hidden} is not a multiple of "
                f"num_attention_heads = {heads}, and head_dim is not given"
            )
        head_dim = hidden // heads
    return head_dim


def config_from_hf(
    config: dict[str, Any], *, where: str, ignore_keys: Sequence[str] = ()
) -> ModelConfig:
    """Read the dictionary of a `config.json`; absent keys as transformers fills them in.

    Args:
      config: as JSON has it.
      where: the file, for messages.
      ignore_keys: keys to read as if they were not there.

    Raises:
      ConfigError: a key or value that this library does not handle, with key, value and `where`.
    """
    check_argument("config", dict, config)
    keys = Keys(without_keys(config, ignore_keys, where=where), where)
    family = keys.left.pop("model_type", None)
    if not isinstance(family, str) or family not in DEFAULTS:
        raise ConfigError(
            f"{where}: model_type = {family!r} is not supported (supported: {', '.join(DEFAULTS)})"
        )
    defaults = DEFAULTS[family]
    _refuse_quantised(keys)
    _check_fixed(keys)
    sizes = {key: _size(keys, key, defaults[key]) for key in _SIZES}
    heads = sizes["num_attention_heads"]
    kv_heads = keys.integer("num_key_value_heads", defaults["num_key_value_heads"])
    head_dim = _head_dim(keys, hidden=sizes["hidden_size"], heads=heads)
    tied = keys.left.pop("tie_word_embeddings", defaults["tie_word_embeddings"])
    if not isinstance(tied, bool):
        raise keys.error("tie_word_embeddings", tied, "true or false is needed")
    eps = keys.number("rms_norm_eps", defaults["rms_norm_eps"])
    window, sliding = _hf_window(keys, family, sizes["num_hidden_layers"])
    biases = _hf_biases(keys, family)
    try:
        rope = _hf_rope(keys, sizes["max_position_embeddings"], defaults["rope_theta"])
        for key in IRRELEVANT:
            keys.left.pop(key, None)
        keys.done()
        return ModelConfig(
            vocab_size=sizes["vocab_size"],
            hidden_size=sizes["hidden_size"],
            intermediate_size=sizes["intermediate_size"],
            num_layers=sizes["num_hidden_layers"],
            num_heads=heads,
            num_kv_heads=heads if kv_heads is None else kv_heads,
            head_dim=head_dim,
            max_position=sizes["max_position_embeddings"],
            norm_eps=keys.need("rms_norm_eps", eps),
            rope=rope,
            tied=tied,
            sliding_window=window,
            sliding_layers=sliding,
            biases=biases,
            family=family,
        )
    except ConfigError as error:
        raise at(error, where) from None


def at(error: ConfigError, where: str) -> ConfigError:
    """The same error with its place in front, unless it is there."""
    text = str(error)
    return error if text.startswith(where) else ConfigError(f"{where}: {text}")
