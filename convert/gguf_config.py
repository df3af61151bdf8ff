"""GGUF metadata -> `ModelConfig`, with the strictness of `config.py`.

Every key of the architecture (`llama.*`, `qwen2.*`) is read, or is listed as irrelevant with the
reason, or is an error. What differs between families is in `families/`.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jaxneurons.convert.config import at
from jaxneurons.convert.families import ARCHITECTURES, gguf_form
from jaxneurons.convert.family import Family, Shape
from jaxneurons.convert.hf_rope import yarn_attention_factor
from jaxneurons.convert.keys import Keys, without_keys
from jaxneurons.errors import ConfigError, SourceError
from jaxneurons.model.config import PROJECTIONS, ModelConfig, RopeConfig
from jaxneurons.model.families import fixed_fields

# Keys of the architecture that this library has in one form only.
GGUF_FIXED: dict[str, tuple[Any, ...]] = {
    "attention.causal": (True,),
    "attention.clamp_kqv": (0.0,),
    "attention.max_alibi_bias": (0.0,),
    "embedding_scale": (0.0, 1.0),
    "expert_count": (0,),
    "expert_used_count": (0,),
    "expert_shared_count": (0,),
    "attn_logit_softcapping": (0.0,),
    "final_logit_softcapping": (0.0,),
    "nextn_predict_layers": (0,),
    "rope.scaling.yarn_attn_factor": (1.0,),
    "rope.scaling.yarn_log_multiplier": (0.0,),
    "logit_scale": (0.0, 1.0),
    "residual_scale": (0.0, 1.0),
    "tensor_data_layout": ("Meta AI original pth",),  # the interleaved rows that `rules` undoes
    "use_parallel_residual": (False,),
}

# Keys of the architecture that cannot change the logits, and why.
GGUF_IRRELEVANT: dict[str, str] = {
    "rope.scaling.finetuned": "provenance",
    "pooling_type": "how embeddings of whole texts are made, which is another task",
}


@dataclasses.dataclass(frozen=True)
class RopeTensors:
    """Divisors of rotary frequencies that a file has as tensors.

    Attributes:
      divisors: of `rope_freqs.weight`.
      short: of `rope_factors_short.weight`.
      long: of `rope_factors_long.weight`.
    """

    divisors: tuple[float, ...] | None = None
    short: tuple[float, ...] | None = None
    long: tuple[float, ...] | None = None


def _decimal(value: float) -> float:
    """The shortest decimal that rounds to the same float32: 9.999999747378752e-06 -> 1e-05."""
    return float(str(np.float32(value)))


def _uniform(keys: Keys, key: str) -> int | None:
    """An integer that may be stored as one value per layer, if they are all the same."""
    value = keys.left.get(key)
    if isinstance(value, list) and value:
        if any(entry != value[0] for entry in value):
            raise keys.error(key, value, "layers that differ are not supported")
        keys.left[key] = value[0]
    return keys.integer(key)


def _gguf_rope(
    keys: Keys, tensors: RopeTensors, context: int, *, longrope: bool, dim: int | None
) -> RopeConfig:
    """The rotary embedding of a file.

    Args:
      keys: of the architecture.
      tensors: what the file has of them.
      context: its longest context, in tokens.
      longrope: models of the family may have the divisors of LongRoPE.
      dim: dimensions of a head that rotate; None: all.
    """
    theta = _decimal(keys.number("rope.freq_base", 10000.0))
    kind = keys.left.pop("rope.scaling.type", None)
    factor = _decimal(keys.number("rope.scaling.factor", 0.0))
    old_factor = _decimal(keys.number("rope.scale_linear", 0.0))
    if factor and old_factor and factor != old_factor:
        raise keys.error("rope.scale_linear", old_factor, f"contradicts scaling.factor = {factor}")
    factor = factor or old_factor
    # Of other families these tensors have no place, which `fill` says.
    if longrope and (tensors.short is not None or tensors.long is not None):
        if kind not in (None, "none", "longrope"):
            raise keys.error("rope.scaling.type", kind, "contradicts rope_factors, of longrope")
        if factor not in (0.0, 1.0):
            raise keys.error("rope.scaling.factor", factor, "cannot be combined with rope_factors")
        return _longrope(keys, tensors, RopeConfig(theta=theta, dim=dim), context)
    original = keys.integer("rope.scaling.original_context_length")
    attention = keys.number("rope.scaling.attn_factor", 1.0)
    fast = _decimal(keys.number("rope.scaling.yarn_beta_fast", 32.0))
    slow = _decimal(keys.number("rope.scaling.yarn_beta_slow", 1.0))
    if kind not in (None, "none", "linear", "yarn"):
        raise keys.error("rope.scaling.type", kind, "only none, linear and yarn are supported")
    if attention != 1.0 and kind != "yarn":
        raise keys.error("rope.scaling.attn_factor", attention, "only yarn has one")
    # Without a type, a factor means linear scaling (as in llama.cpp); 0 and 1 mean none.
    scaled = kind != "none" and factor not in (0.0, 1.0)
    blend = keys.number("rope.scaling.yarn_ext_factor")
    if blend is not None and scaled and blend != (kind == "yarn"):
        raise keys.error(
            "rope.scaling.yarn_ext_factor", blend, "only 1 with yarn, and 0 without, is supported"
        )
    if kind in ("linear", "yarn") and not factor:
        raise ConfigError(f"{keys.where}: {keys.prefix}rope.scaling.factor is missing")
    if tensors.divisors is not None:
        if scaled:
            raise keys.error("rope.scaling.factor", factor, "cannot be combined with rope_freqs")
        return RopeConfig(theta=theta, rope_type="llama3", inv_freq_divisors=tensors.divisors)
    if scaled and kind == "yarn":
        return RopeConfig(
            theta=theta,
            rope_type="yarn",
            factor=factor,
            original_max_position=original or context,
            beta_fast=fast,
            beta_slow=slow,
            attention_factor=attention * yarn_attention_factor(factor),
        )
    if scaled:
        return RopeConfig(theta=theta, rope_type="linear", factor=factor, dim=dim)
    return RopeConfig(theta=theta, dim=dim)


def _longrope(keys: Keys, tensors: RopeTensors, plain: RopeConfig, context: int) -> RopeConfig:
    """The rotary embedding of a file that has the divisors of LongRoPE."""
    return dataclasses.replace(
        plain,
        rope_type="longrope",
        original_max_position=keys.integer("rope.scaling.original_context_length") or context,
        attention_factor=_decimal(keys.number("rope.scaling.attn_factor", 1.0)),
        short_divisors=tensors.short,
        long_divisors=tensors.long,
    )


def _architecture(fields: Mapping[str, Any], where: str) -> str:
    """The architecture of a file, which must be a whole model of a supported one."""
    # Parts but the first of a split file, and files of another kind, name no architecture.
    parts = fields.get("split.count", 0)
    if parts not in (0, 1):
        number = fields.get("split.no")
        which = f"part {number + 1}" if isinstance(number, int) else "one"
        raise SourceError(
            f"{where}: {which} of {parts} parts of a split GGUF; join them first with "
            "llama-gguf-split --merge"
        )
    kind = fields.get("general.type", "model")
    if kind != "model":
        other = "an importance matrix for quantising" if kind == "imatrix" else f"of type {kind!r}"
        raise SourceError(f"{where}: this GGUF is {other}, not a model")
    architecture = fields.get("general.architecture")
    if architecture is None:
        raise SourceError(
            f"{where}: this GGUF is not a model: it names no architecture (general.architecture)"
        )
    if not isinstance(architecture, str) or architecture not in ARCHITECTURES:
        raise SourceError(
            f"{where}: GGUF architecture {architecture!r} is not supported (supported: "
            f"{', '.join(map(repr, ARCHITECTURES))}; Mistral files use 'llama' too)"
        )
    return architecture


def _check_fixed(keys: Keys) -> None:
    """Consume the keys that this library has in one form only."""
    for key, allowed in GGUF_FIXED.items():
        value = keys.left.pop(key, allowed[0])
        if value not in allowed:
            raise keys.error(key, value, f"only {allowed[0]!r} is supported")


def _head_dim(keys: Keys, *, hidden: int, heads: int) -> int:
    """Width of a head, of queries and keys as of values."""
    head_dim = keys.integer("attention.key_length")
    value_dim = keys.integer("attention.value_length")
    if head_dim is None:
        if heads <= 0 or hidden % heads:
            raise ConfigError(
                f"{keys.where}: {keys.prefix}embedding_length = {hidden} is not a multiple of "
                f"{keys.prefix}attention.head_count = {heads}, and attention.key_length is not "
                "given"
            )
        head_dim = hidden // heads
    if head_dim <= 0:
        raise keys.error("attention.key_length", head_dim, "must be positive")
    if value_dim not in (None, head_dim):
        raise keys.error("attention.value_length", value_dim, f"must equal head_dim = {head_dim}")
    return head_dim


def _rotary_dim(keys: Keys, head_dim: int, *, partial: bool) -> int | None:
    """Dimensions of a head that rotate; None: all."""
    rotary = keys.integer("rope.dimension_count")
    if rotary in (None, head_dim):
        return None
    if not partial or not 0 < rotary < head_dim:
        raise keys.error("rope.dimension_count", rotary, f"must equal head_dim = {head_dim}")
    return rotary


def _check_scale(keys: Keys, head_dim: int) -> None:
    """The scale of scores, which most families have in one form only."""
    scale = keys.number("attention.scale", 0.0)
    if scale and not np.isclose(scale, head_dim**-0.5, rtol=1e-6):
        raise keys.error(
            "attention.scale", scale, f"only 1/sqrt(head_dim = {head_dim}) is supported"
        )


def _vocabulary_size(keys: Keys, tokens: Any, *, rows: int | None) -> int | None:
    """Rows of the embedding: of its tensor, else as stated, else as many as there are tokens."""
    stated = keys.integer("vocab_size")
    # Tokens that are no list are the tokenizer's reader to complain of.
    count = len(tokens) if isinstance(tokens, list) else None
    vocab = rows or stated or count
    if stated not in (None, vocab):
        raise keys.error("vocab_size", stated, f"the embedding has {vocab} rows")
    if count is not None and vocab is not None and count > vocab:
        raise ConfigError(f"{keys.where}: {count} tokens, but the embedding has {vocab} rows")
    return vocab


def config_from_gguf(
    fields: Mapping[str, Any],
    *,
    where: str,
    vocab_size: int | None = None,
    tied: bool = False,
    biases: Sequence[str] = (),
    rope_tensors: RopeTensors = RopeTensors(),
    ignore_keys: Sequence[str] = (),
) -> ModelConfig:
    """Read the metadata of a GGUF file.

    Keys outside the architecture's own belong to the file (`general.`, `quantize.`), to the
    tokenizer (`tokenizer.`) or to whoever uploaded it, and cannot change the model.

    Args:
      fields: metadata, as Python values.
      where: the file, for messages.
      vocab_size: rows of the embedding tensor; taken from the metadata when None.
      tied: the file has no `output.weight`.
      biases: projections that the file has biases for.
      rope_tensors: divisors of rotary frequencies that the file has as tensors.
      ignore_keys: keys of the architecture to read as if they were not there.

    Raises:
      SourceError: another architecture, or not a model.
      ConfigError: a key or value that this library does not handle.
    """
    architecture = _architecture(fields, where)
    family, prefix = ARCHITECTURES[architecture], f"{architecture}."
    fields = without_keys(fields, ignore_keys, where=where, prefix=prefix)
    architecture_fields = {
        key[len(prefix) :]: value for key, value in fields.items() if key.startswith(prefix)
    }
    keys = Keys(architecture_fields, where, prefix=prefix)
    vocab = _vocabulary_size(keys, fields.get("tokenizer.ggml.tokens"), rows=vocab_size)
    try:
        return _read(keys, family, rope_tensors, vocab_size=vocab, tied=tied, biases=biases)
    except ConfigError as error:
        raise at(error, where) from None


def _read(
    keys: Keys,
    family: Family,
    rope_tensors: RopeTensors,
    *,
    vocab_size: int | None,
    tied: bool,
    biases: Sequence[str],
) -> ModelConfig:
    """Consume every key of an architecture."""
    form = gguf_form(family)
    layers = keys.need("block_count", keys.integer("block_count"))
    hidden = keys.need("embedding_length", keys.integer("embedding_length"))
    inner = keys.need("feed_forward_length", _uniform(keys, "feed_forward_length"))
    heads = keys.need("attention.head_count", _uniform(keys, "attention.head_count"))
    kv_heads = _uniform(keys, "attention.head_count_kv")
    context = keys.need("context_length", keys.integer("context_length"))
    eps = keys.number("attention.layer_norm_rms_epsilon")
    eps = keys.need("attention.layer_norm_rms_epsilon", eps)
    head_dim = _head_dim(keys, hidden=hidden, heads=heads)
    dim = _rotary_dim(keys, head_dim, partial=form.longrope)
    rope = _gguf_rope(keys, rope_tensors, context, longrope=form.longrope, dim=dim)
    fields = {"rope": rope, "biases": tuple(n for n in PROJECTIONS if n in biases)}
    fields |= fixed_fields(family.name, hidden_size=hidden)
    fields |= form.read(keys, Shape(layers, hidden, heads, head_dim, context))
    if fields.get("sliding_rope") == fields["rope"]:
        fields["sliding_rope"] = None
    _check_scale(keys, head_dim)
    _check_fixed(keys)
    for key in GGUF_IRRELEVANT:
        keys.left.pop(key, None)
    keys.done()
    fields = {"intermediate_size": inner, "family": family.name, **fields}
    return ModelConfig(
        vocab_size=keys.need("vocab_size", vocab_size),
        hidden_size=hidden,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=heads if kv_heads is None else kv_heads,
        head_dim=head_dim,
        max_position=context,
        norm_eps=_decimal(eps),
        tied=tied,
        **fields,
    )
