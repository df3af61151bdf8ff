"""Hugging Face configurations -> `ModelConfig`, strictly: no value is ever silently ignored.

Every key of a `config.json` is read, or is listed in `keys.py` as irrelevant with the reason, or is
an error that names it. What differs between families is in `families/`. (GGUF metadata:
`gguf_config.py`.)
"""

from collections.abc import Sequence
from typing import Any

from jaxneurons.convert.families import MODEL_TYPES
from jaxneurons.convert.family import Family, Shape
from jaxneurons.convert.keys import FIXED, IRRELEVANT, MOST, Keys, without_keys
from jaxneurons.errors import ConfigError
from jaxneurons.model.config import ModelConfig
from jaxneurons.model.families import fixed_fields
from jaxneurons.storage.settings import check_argument


def _biases(keys: Keys, family: Family, model_type: str, fixed: Sequence[str]) -> dict[str, Any]:
    """The field of projections with a bias."""
    names = list(fixed)
    for key in ("attention_bias", "mlp_bias"):
        value = keys.left.pop(key, None)
        if value is not None and not isinstance(value, bool):
            raise keys.error(key, value, "true or false is needed")
        if key == "attention_bias" and fixed:
            continue  # whatever it says: weights without them are refused
        if value and key not in family.biases:
            raise keys.error(key, value, f"model_type {model_type!r} has no such biases")
        if value:
            names += family.biases[key]
    return {"biases": tuple(names)}


def _refuse_quantised(keys: Keys) -> None:
    method = keys.left.pop("quantization_config", None)
    if method is None:
        return
    method = method.get("quant_method", method) if isinstance(method, dict) else method
    raise ConfigError(
        f"{keys.where}: quantization_config ({method}): quantised Hugging Face weights are not "
        "read; use the unquantised repository, or a GGUF file"
    )


def _check_fixed(keys: Keys, family: Family) -> None:
    """Consume the keys that this library has in one form only."""
    for key, allowed in {**FIXED, **family.activations}.items():
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


def _head_dim(keys: Keys, *, hidden: int, heads: int, default: int | None) -> int:
    head_dim = keys.integer("head_dim", default)
    if head_dim is None:
        if default is not None:
            raise keys.error("head_dim", head_dim, "an integer is needed")
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
    model_type = keys.left.pop("model_type", None)
    if not isinstance(model_type, str) or model_type not in MODEL_TYPES:
        raise ConfigError(
            f"{where}: model_type = {model_type!r} is not supported "
            f"(supported: {', '.join(MODEL_TYPES)})"
        )
    family = MODEL_TYPES[model_type]
    _refuse_quantised(keys)
    if family.unwrap is not None:
        keys = family.unwrap(model_type, keys)
        _refuse_quantised(keys)
    try:
        return _read(keys, family, model_type)
    except ConfigError as error:
        raise at(error, where) from None


def _read(keys: Keys, family: Family, model_type: str) -> ModelConfig:
    """Consume every key of a family's configuration."""
    defaults = family.defaults
    sizes = {key: _size(keys, key, defaults[key]) for key in _SIZES}
    heads, hidden = sizes["num_attention_heads"], sizes["hidden_size"]
    kv_heads = keys.integer("num_key_value_heads", defaults["num_key_value_heads"])
    head_dim = _head_dim(keys, hidden=hidden, heads=heads, default=defaults.get("head_dim"))
    tied = keys.boolean("tie_word_embeddings", defaults["tie_word_embeddings"])
    eps = keys.number("rms_norm_eps", defaults["rms_norm_eps"])
    fields = fixed_fields(family.name, hidden_size=hidden)
    fields |= _biases(keys, family, model_type, fields.get("biases", ()))
    max_position = sizes["max_position_embeddings"]
    shape = Shape(sizes["num_hidden_layers"], hidden, heads, head_dim, max_position)
    fields |= family.read(keys, shape)
    _check_fixed(keys, family)
    for key in IRRELEVANT:
        keys.left.pop(key, None)
    keys.done()
    return ModelConfig(
        vocab_size=sizes["vocab_size"],
        hidden_size=hidden,
        intermediate_size=sizes["intermediate_size"],
        num_layers=shape.layers,
        num_heads=heads,
        num_kv_heads=heads if kv_heads is None else kv_heads,
        head_dim=head_dim,
        max_position=max_position,
        norm_eps=keys.need("rms_norm_eps", eps),
        tied=tied,
        family=family.name,
        **fields,
    )


def at(error: ConfigError, where: str) -> ConfigError:
    """The same error with its place in front, unless it is there."""
    text = str(error)
    return error if text.startswith(where) else ConfigError(f"{where}: {text}")
