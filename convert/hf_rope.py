"""Rotary embeddings of Hugging Face configurations, as transformers 4 and 5 spell them."""

import dataclasses
import math
from typing import Any

from jaxneurons.convert.keys import Keys
from jaxneurons.convert.windows import FULL, SLIDING
from jaxneurons.errors import ConfigError
from jaxneurons.model.config import RopeConfig

ROPE_KINDS = ("default", "linear", "dynamic", "yarn", "llama3")
"""Rope types that configurations of most families may name."""


@dataclasses.dataclass(frozen=True)
class RopeRules:
    """What holds for the rotary embeddings of a family.

    Attributes:
      theta: base of the wavelengths, where it is not stated.
      kinds: rope types that it may have; what they are also called -> how they are known here.
      original: tokens of the original context where they are not stated; None: max_position.
      head_dim: width of a head, where it may rotate in part; None: it rotates whole.
    """

    theta: float = 10000.0
    kinds: tuple[str, ...] = ROPE_KINDS
    also_called: tuple[tuple[str, str], ...] = ()
    original: int | None = None
    head_dim: int | None = None


def read_rope(keys: Keys, max_position: int, rules: RopeRules = RopeRules()) -> RopeConfig:
    """The rotary embedding, in the spelling of transformers 4 or 5, or both if they agree.

    Args:
      keys: of the configuration.
      max_position: longest context, in tokens.
      rules: what holds for the family.
    """
    theta = keys.number("rope_theta")
    outer = keys.integer("original_max_position_embeddings", rules.original)
    part = keys.number("partial_rotary_factor") if rules.head_dim is not None else None
    parsed: dict[str, RopeConfig] = {}
    for key in ("rope_parameters", "rope_scaling"):
        values = keys.left.pop(key, None)
        if values is None or values == {}:
            continue
        beside = _Beside(keys, theta, outer, part, max_position, rules)
        parsed[key] = _read_dictionary(values, key, beside)
    if len(set(parsed.values())) > 1:
        raise ConfigError(f"{keys.where}: rope_parameters and rope_scaling contradict each other")
    if parsed:
        return next(iter(parsed.values()))
    base = rules.theta if theta is None else theta
    return RopeConfig(theta=base, dim=_rotary_dim(keys, part, rules))


def read_ropes_by_type(
    keys: Keys, max_position: int, *, full: float, sliding: float
) -> tuple[RopeConfig, RopeConfig]:
    """Rotary embeddings of full and of sliding layers (Gemma 3).

    transformers 5 states `rope_parameters` by layer type, transformers 4 `rope_theta` and
    `rope_scaling` of full layers and `rope_local_base_freq` of sliding ones; both if they agree.

    Args:
      keys: of the configuration.
      max_position: longest context, in tokens.
      full: base of the wavelengths of full layers, where it is not stated.
      sliding: the same of sliding layers.
    """
    thetas = {FULL: keys.number("rope_theta"), SLIDING: keys.number("rope_local_base_freq")}
    defaults = {FULL: RopeRules(full), SLIDING: RopeRules(sliding)}
    nested = keys.left.pop("rope_parameters", None)
    if nested is not None and not (isinstance(nested, dict) and set(nested) <= set(thetas)):
        why = f"a dictionary with {FULL!r} and {SLIDING!r}, one for each layer type, is needed"
        raise keys.error("rope_parameters", nested, why)
    scaling = keys.left.pop("rope_scaling", None)
    ropes = []
    for kind, theta in thetas.items():
        beside = _Beside(keys, theta, None, None, max_position, defaults[kind])
        stated = [
            _read_dictionary(values, key, beside)
            for key, values in (
                (f"rope_parameters.{kind}", (nested or {}).get(kind)),
                ("rope_scaling", scaling if kind == FULL else None),
            )
            if values is not None and values != {}
        ]
        if len(set(stated)) > 1:
            raise ConfigError(
                f"{keys.where}: rope_parameters and rope_scaling contradict each other"
            )
        base = defaults[kind].theta if theta is None else theta
        ropes.append(stated[0] if stated else RopeConfig(theta=base))
    return ropes[0], ropes[1]


@dataclasses.dataclass(frozen=True)
class _Beside:
    """What stands beside a dictionary that states a rotary embedding."""

    keys: Keys
    theta: float | None
    original: int | None
    part: float | None
    max_position: int
    rules: RopeRules


def _read_dictionary(values: Any, key: str, beside: _Beside) -> RopeConfig:
    """Read one `rope_parameters` or `rope_scaling` dictionary."""
    keys, theta, rules = beside.keys, beside.theta, beside.rules
    if not isinstance(values, dict):
        raise keys.error(key, values, "a dictionary is needed")
    rope = Keys(values, keys.where, prefix=f"{keys.prefix}{key}.")
    kind = _rope_kind(rope, f"{keys.prefix}{key}", rules)
    inner = rope.number("rope_theta")
    if inner is not None and theta is not None and inner != theta:
        raise rope.error("rope_theta", inner, f"contradicts rope_theta = {theta} beside it")
    base = inner if inner is not None else theta if theta is not None else rules.theta
    part = rope.number("partial_rotary_factor")
    if None not in (part, beside.part) and part != beside.part:
        raise rope.error("partial_rotary_factor", part, f"contradicts {beside.part} beside it")
    part = beside.part if part is None else part
    if rules.head_dim is None and part not in (1.0, None):
        raise rope.error("partial_rotary_factor", part, "only full rotary heads are supported")
    rope.left.pop("finetuned", None)  # whether the model has been trained so
    parsed = _READERS[kind](rope, base, beside)
    rope.done(f"not a key of rope type {kind!r} that this library handles")
    return dataclasses.replace(parsed, dim=_rotary_dim(rope, part, rules))


def _rotary_dim(keys: Keys, part: float | None, rules: RopeRules) -> int | None:
    """Dimensions of a head that rotate; None: all."""
    if part is None or part == 1 or rules.head_dim is None:
        return None
    dim = int(rules.head_dim * part)
    if not 0 < dim < rules.head_dim or dim % 2:
        why = f"an even number of the {rules.head_dim} dimensions of a head must rotate"
        raise keys.error("partial_rotary_factor", part, why)
    return dim


def _rope_kind(rope: Keys, key: str, rules: RopeRules) -> str:
    kinds = [rope.left.pop(name) for name in ("rope_type", "type") if name in rope.left]
    if any(kind != kinds[0] for kind in kinds):
        raise ConfigError(
            f"{rope.where}: {key} names several rope types: {sorted(map(str, kinds))}"
        )
    kind = kinds[0] if kinds else "default"
    if not isinstance(kind, str) or (kind := dict(rules.also_called).get(kind, kind)) not in (
        rules.kinds
    ):
        raise ConfigError(
            f"{rope.where}: {key}: rope type {kind!r} is not supported "
            f"(supported: {', '.join(rules.kinds)})"
        )
    return kind


def _original_context(rope: Keys, beside: _Beside) -> int:
    """Tokens of the context before it was extended, as stated inside, beside it, or not at all."""
    inner, outer = rope.integer("original_max_position_embeddings"), beside.original
    if None not in (inner, outer) and inner != outer:
        raise rope.error(
            "original_max_position_embeddings", inner, f"contradicts {outer} beside it"
        )
    length = inner if inner is not None else outer if outer is not None else beside.max_position
    if length <= 0:
        raise rope.error("original_max_position_embeddings", length, "must be positive")
    return length


def _default_rope(rope: Keys, theta: float, beside: _Beside) -> RopeConfig:
    rope.integer("original_max_position_embeddings")  # not looked at
    factor = rope.number("factor", 1.0)
    if factor not in (1.0, None):
        raise rope.error("factor", factor, "the rope type 'default' has no factor")
    return RopeConfig(theta=theta)


def _linear_rope(rope: Keys, theta: float, beside: _Beside) -> RopeConfig:
    rope.integer("original_max_position_embeddings")  # not looked at
    factor = rope.need("factor", rope.number("factor"))
    return RopeConfig(theta=theta, rope_type="linear", factor=factor)


def _dynamic_rope(rope: Keys, theta: float, beside: _Beside) -> RopeConfig:
    """It starts to stretch at max_position_embeddings, whatever the original context was."""
    factor, max_position = rope.need("factor", rope.number("factor")), beside.max_position
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


def _llama3_rope(rope: Keys, theta: float, beside: _Beside) -> RopeConfig:
    return RopeConfig(
        theta=theta,
        rope_type="llama3",
        factor=rope.need("factor", rope.number("factor")),
        low_freq_factor=rope.need("low_freq_factor", rope.number("low_freq_factor")),
        high_freq_factor=rope.need("high_freq_factor", rope.number("high_freq_factor")),
        original_max_position=_original_context(rope, beside),
    )


def _yarn_rope(rope: Keys, theta: float, beside: _Beside) -> RopeConfig:
    original = _original_context(rope, beside)
    factor = rope.number("factor")
    if factor is None:
        factor = beside.max_position / original
    attention = rope.number("attention_factor")
    scale, scale_all = rope.number("mscale"), rope.number("mscale_all_dim")
    if attention is None:
        attention = yarn_attention_factor(factor)
        if scale and scale_all:
            attention = yarn_attention_factor(factor, scale)
            attention /= yarn_attention_factor(factor, scale_all)
    return RopeConfig(
        theta=theta,
        rope_type="yarn",
        factor=factor,
        original_max_position=original,
        beta_fast=rope.number("beta_fast") or 32.0,
        beta_slow=rope.number("beta_slow") or 1.0,
        truncate=rope.boolean("truncate", True),
        attention_factor=attention,
    )


def _longrope(rope: Keys, theta: float, beside: _Beside) -> RopeConfig:
    original = _original_context(rope, beside)
    short, long = (rope.numbers(f"{length}_factor") for length in ("short", "long"))
    attention, factor = rope.number("attention_factor"), rope.number("factor")
    ratio = beside.max_position / original
    if attention is None and factor not in (None, ratio):
        raise rope.error(
            "factor",
            factor,
            "readers of 'longrope' disagree unless it is max_position_embeddings / "
            f"original_max_position_embeddings = {ratio}",
        )
    if attention is None:
        attention = longrope_attention_factor(beside.max_position, original)
    return RopeConfig(
        theta=theta,
        rope_type="longrope",
        original_max_position=original,
        attention_factor=attention,
        short_divisors=short,
        long_divisors=long,
    )


_READERS = {
    "default": _default_rope,
    "linear": _linear_rope,
    "dynamic": _dynamic_rope,
    "yarn": _yarn_rope,
    "llama3": _llama3_rope,
    "longrope": _longrope,
}


def yarn_attention_factor(factor: float, scale: float = 1.0) -> float:
    """What YaRN multiplies cosines and sines by (arXiv 2309.00071, section 3.4)."""
    return 1.0 if factor <= 1 else 0.1 * scale * math.log(factor) + 1.0


def longrope_attention_factor(max_position: int, original: int) -> float:
    """What LongRoPE multiplies cosines and sines by (arXiv 2402.13753, section 3.3)."""
    ratio = max_position / original
    return 1.0 if ratio <= 1 else math.sqrt(1 + math.log(ratio) / math.log(original))
