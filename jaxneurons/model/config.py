"""The shape of a Llama-family model: one frozen, validated dataclass."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from jaxneurons.errors import ConfigError, near_matches
from jaxneurons.storage.settings import check_fields

ROPE_TYPES = ("default", "linear", "dynamic", "yarn", "llama3", "longrope")
ACTIVATIONS = ("silu", "gelu_tanh")
QK_NORMS = ("head", "width")
EVERYTHING = 2**31 - 1  # a window that no context fills
PROJECTIONS = ("q", "k", "v", "o", "gate", "up", "down")


@dataclasses.dataclass(frozen=True)
class RopeConfig:
    """Rotary position embedding.

    Attributes:
      theta: base of the geometric progression of wavelengths.
      rope_type: `default`; `linear` (positions divided by `factor`); `dynamic` (theta grows with
        the sequence once it is longer than the original context, "NTK-aware"); `yarn` (long
        wavelengths divided by `factor`, short ones kept, a ramp between, arXiv 2309.00071);
        `llama3` (the same idea with another ramp, Llama 3.1 and later); `longrope` (a divisor for
        each frequency, others for sequences longer than the original context, arXiv 2402.13753).
      factor: context extension factor (all but `default`).
      low_freq_factor: `llama3`: wavelengths above original/low are fully scaled.
      high_freq_factor: `llama3`: wavelengths below original/high are untouched.
      original_max_position: `llama3`, `yarn`, `dynamic`, `longrope`: tokens of the context before
        extension.
      beta_fast: `yarn`: wavelengths with more turns than this in the original context are kept.
      beta_slow: `yarn`: wavelengths with fewer turns than this are fully scaled.
      truncate: `yarn`: the ramp's ends are rounded outwards to whole dimensions.
      attention_factor: `yarn`, `longrope`: cosines and sines are multiplied by it.
      inv_freq_divisors: a divisor for each of the head_dim / 2 inverse frequencies, as GGUF files
        carry it (`rope_freqs.weight`); replaces the three `llama3` values when given.
      short_divisors: `longrope`: a divisor for each inverse frequency.
      long_divisors: `longrope`: the same, of sequences longer than the original context.
      dim: dimensions of a head that rotate, its first ones; None: all.
    """

    theta: float = 10000.0
    rope_type: str = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position: int = 8192
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    attention_factor: float = 1.0
    inv_freq_divisors: tuple[float, ...] | None = None
    short_divisors: tuple[float, ...] | None = None
    long_divisors: tuple[float, ...] | None = None
    dim: int | None = None

    def __post_init__(self) -> None:
        check_fields(self)
        if self.rope_type not in ROPE_TYPES:
            raise ConfigError(
                f"rope type {self.rope_type!r} is not supported; "
                + near_matches(self.rope_type, ROPE_TYPES)
            )
        numbers = ("theta", "factor", "low_freq_factor", "high_freq_factor")
        for name in (*numbers, "beta_fast", "beta_slow", "attention_factor"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value > 0):
                raise ConfigError(f"rope {name} must be a positive number, got {value!r}")
        for name in ("inv_freq_divisors", "short_divisors", "long_divisors"):
            if any(not (math.isfinite(d) and d > 0) for d in getattr(self, name) or ()):
                raise ConfigError(f"rope {name} must be positive numbers")
        given = (self.short_divisors is not None, self.long_divisors is not None)
        if given != (self.rope_type == "longrope",) * 2:
            raise ConfigError(
                "rope short_divisors and long_divisors belong to rope type 'longrope', which needs "
                f"both; got rope type {self.rope_type!r}"
            )
        if self.dim is not None and (self.dim <= 0 or self.dim % 2):
            raise ConfigError(f"rope dim must be positive and even, got {self.dim!r}")
        if self.rope_type == "llama3" and not self.low_freq_factor < self.high_freq_factor:
            raise ConfigError("rope low_freq_factor must be below high_freq_factor")
        if self.rope_type == "yarn" and not self.beta_slow < self.beta_fast:
            raise ConfigError("rope beta_slow must be below beta_fast")
        if self.rope_type == "dynamic" and self.factor < 1:
            raise ConfigError(f"rope factor must be at least 1 for 'dynamic', got {self.factor!r}")


_MAY_BE_ZERO = ("experts", "experts_per_token")


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """A decoder-only transformer of the Llama family and its kin: Llama, Mistral, Qwen, Gemma, ...

    Attributes:
      vocab_size: rows of the embedding, in tokens.
      hidden_size: width of the residual stream.
      intermediate_size: width of the gated feed-forward (of one expert, where there are any).
      num_layers: blocks.
      num_heads: query heads.
      num_kv_heads: key/value heads; divides `num_heads` (1 = MQA, `num_heads` = MHA).
      head_dim: width of a head; need not be hidden_size / num_heads.
      max_position: longest context, in tokens.
      norm_eps: epsilon of RMSNorm.
      rope: rotary position embedding.
      tied: the unembedding is the embedding.
      sliding_window: a query sees this many positions, itself included; None = all before it.
      sliding_layers: which layers have the window; None = all, if there is one.
      biases: the projections that add a bias, of `PROJECTIONS`.
      activation: of the gate, of `ACTIVATIONS`: `silu`, or `gelu_tanh` (its tanh approximation).
      embed_scale: the embedding is multiplied by it, rounded to the parameters' dtype.
      norm_offset: norms multiply by this plus their weight, in float32 (Gemma: 1).
      pre_norms: a norm before attention and one before the feed-forward.
      post_norms: a norm on what attention adds to the residual, and one on what the feed-forward
        adds.
      qk_norm: queries and keys are normed before they rotate: each `head`, or over their whole
        `width`; None: they are not.
      query_scale: scores are multiplied by it; None: 1 / sqrt(head_dim).
      attention_softcap: scores s become c tanh(s / c); None: they stay.
      final_softcap: the same for logits.
      sliding_rope: rotary embedding of the layers with a window, where it is another.
      rotary_layers: which layers have a rotary embedding; None: all.
      experts: feed-forwards of a layer, of which a router chooses some for each token; 0: one
        feed-forward without a router. Neuron i of expert e is neuron e * intermediate_size + i.
      experts_per_token: how many it chooses.
      normalise_experts: the weights of the chosen ones sum to 1; else they are the probabilities
        that the router gives them among all.
      family: the published architecture's name, for messages and export.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_position: int
    norm_eps: float = 1e-5
    rope: RopeConfig = RopeConfig()
    tied: bool = False
    sliding_window: int | None = None
    sliding_layers: tuple[bool, ...] | None = None
    biases: tuple[str, ...] = ()
    activation: str = "silu"
    embed_scale: float = 1.0
    norm_offset: float = 0.0
    pre_norms: bool = True
    post_norms: bool = False
    qk_norm: str | None = None
    query_scale: float | None = None
    attention_softcap: float | None = None
    final_softcap: float | None = None
    sliding_rope: RopeConfig | None = None
    rotary_layers: tuple[bool, ...] | None = None
    experts: int = 0
    experts_per_token: int = 0
    normalise_experts: bool = True
    family: str = "llama"

    def __post_init__(self) -> None:
        check_fields(self)
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.type is int and field.name not in _MAY_BE_ZERO and value <= 0:
                raise ConfigError(f"{field.name} must be a positive integer, got {value!r}")
        if self.num_heads % self.num_kv_heads:
            raise ConfigError(
                f"num_heads ({self.num_heads}) must be a multiple of "
                f"num_kv_heads ({self.num_kv_heads})"
            )
        if self.head_dim % 2:
            raise ConfigError(f"head_dim must be even for rotary embedding, got {self.head_dim}")
        if not (math.isfinite(self.norm_eps) and self.norm_eps > 0):
            raise ConfigError(f"norm_eps must be a positive number, got {self.norm_eps!r}")
        if self.sliding_window is not None and self.sliding_window <= 0:
            raise ConfigError(f"sliding_window must be positive, got {self.sliding_window!r}")
        if self.sliding_layers is not None:
            if self.sliding_window is None or len(self.sliding_layers) != self.num_layers:
                raise ConfigError(
                    f"sliding_layers needs a sliding_window and {self.num_layers} entries, got "
                    f"{self.sliding_window!r} and {len(self.sliding_layers)}"
                )
            if len(set(self.sliding_layers)) == 1:
                raise ConfigError("sliding_layers: layers that are all the same need none")
        if unknown := [name for name in self.biases if name not in PROJECTIONS]:
            raise ConfigError(f"biases: {near_matches(unknown[0], PROJECTIONS)}")
        self._check_options()
        self._check_ropes()
        self._check_experts()

    def _check_options(self) -> None:
        if self.activation not in ACTIVATIONS:
            raise ConfigError(f"activation: {near_matches(self.activation, ACTIVATIONS)}")
        if self.qk_norm is not None and self.qk_norm not in QK_NORMS:
            raise ConfigError(f"qk_norm: {near_matches(self.qk_norm, QK_NORMS)}")
        if not math.isfinite(self.norm_offset):
            raise ConfigError(f"norm_offset must be a finite number, got {self.norm_offset!r}")
        for name in ("embed_scale", "query_scale", "attention_softcap", "final_softcap"):
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and value > 0):
                raise ConfigError(f"{name} must be a positive number, got {value!r}")
        if not (self.pre_norms or self.post_norms):
            raise ConfigError("a layer needs norms: pre_norms, post_norms or both")

    def _check_ropes(self) -> None:
        if self.sliding_rope is not None and self.sliding_layers is None:
            raise ConfigError("sliding_rope needs sliding_layers, which say where it holds")
        for rope in (self.rope, self.sliding_rope or self.rope):
            if rope.dim is not None and rope.dim > self.head_dim:
                raise ConfigError(f"rope dim is {rope.dim}, but head_dim is {self.head_dim}")
            pairs = (rope.dim or self.head_dim) // 2
            for name in ("inv_freq_divisors", "short_divisors", "long_divisors"):
                divisors = getattr(rope, name)
                if divisors is not None and len(divisors) != pairs:
                    raise ConfigError(
                        f"rope {name} has {len(divisors)} values, head_dim / 2 = {pairs} are needed"
                    )
        if self.rotary_layers is not None and len(self.rotary_layers) != self.num_layers:
            raise ConfigError(
                f"rotary_layers needs {self.num_layers} entries, got {len(self.rotary_layers)}"
            )

    def _check_experts(self) -> None:
        if self.experts < 0 or not (
            0 < self.experts_per_token <= self.experts
            if self.experts
            else not self.experts_per_token
        ):
            raise ConfigError(
                f"experts_per_token must be from 1 to experts (0 without), got "
                f"{self.experts_per_token!r} of {self.experts!r}"
            )
        if self.experts and (biases := {"gate", "up", "down"} & set(self.biases)):
            raise ConfigError(
                f"projections of experts add no bias here, but biases name {sorted(biases)}"
            )

    @property
    def layer_windows(self) -> tuple[int, ...] | None:
        """Positions that each layer's queries see, where layers differ in it."""
        if self.sliding_layers is None or self.sliding_window is None:
            return None
        return tuple(
            self.sliding_window if slides else EVERYTHING for slides in self.sliding_layers
        )

    @property
    def query_width(self) -> int:
        """Outputs of the query projection: heads times head_dim."""
        return self.num_heads * self.head_dim

    @property
    def kv_width(self) -> int:
        """Outputs of the key and of the value projection."""
        return self.num_kv_heads * self.head_dim

    def first_layers(self, count: int) -> "ModelConfig":
        """The shape of the model up to some layer."""
        changes: dict[str, Any] = {"num_layers": count}
        if self.rotary_layers is not None:
            changes["rotary_layers"] = self.rotary_layers[:count]
        if self.sliding_layers is not None:
            slides = self.sliding_layers[:count]
            if len(set(slides)) == 1:
                changes["sliding_layers"] = changes["sliding_rope"] = None
                changes["sliding_window"] = self.sliding_window if slides[0] else None
                changes["rope"] = (self.sliding_rope or self.rope) if slides[0] else self.rope
            else:
                changes["sliding_layers"] = slides
        return dataclasses.replace(self, **changes)

    @property
    def neurons_per_layer(self) -> int:
        """Neurons of a layer's feed-forward: of all of its experts, where there are any."""
        return self.intermediate_size * max(1, self.experts)

    @property
    def ropes(self) -> tuple[RopeConfig, ...]:
        """The rotary embeddings that layers have; `layer_ropes` says which layer has which."""
        return (self.rope,) if self.sliding_rope is None else (self.rope, self.sliding_rope)

    @property
    def layer_ropes(self) -> tuple[int, ...]:
        """For each layer the index of its rotary embedding in `ropes`; -1: it has none."""
        sliding = self.sliding_layers or (False,) * self.num_layers
        rotary = self.rotary_layers or (True,) * self.num_layers
        other = int(self.sliding_rope is not None)
        return tuple(
            (other if slides else 0) if rotates else -1
            for slides, rotates in zip(sliding, rotary, strict=True)
        )

    @property
    def score_scale(self) -> float:
        """What attention scores are multiplied by."""
        return 1 / math.sqrt(self.head_dim) if self.query_scale is None else self.query_scale


_LATER = {
    field.name: field.default
    for kind, after in ((ModelConfig, "biases"), (RopeConfig, "inv_freq_divisors"))
    for field in dataclasses.fields(kind)[
        1 + [field.name for field in dataclasses.fields(kind)].index(after) :
    ]
    if field.name != "family"
}
"""Options of families that came later, with what they are where they are not used."""


def config_values(config: ModelConfig) -> dict[str, Any]:
    """The fields as files state them, nested.

    Options of families that came later are left out where they are not used, so that a model's
    identity does not change when another family needs an option.
    """

    def used(values: Mapping[str, Any]) -> dict[str, Any]:
        return {
            name: used(value) if isinstance(value, Mapping) else value
            for name, value in values.items()
            if name not in _LATER or value != _LATER[name]
        }

    return used(dataclasses.asdict(config))


def config_of_values(values: Mapping[str, Any]) -> ModelConfig:
    """The configuration that `config_values` states; lists, as JSON has them, are tuples.

    Raises:
      ConfigError, TypeError: fields that there are not, or values that are not valid.
    """

    def tuples(values: Mapping[str, Any]) -> dict[str, Any]:
        return {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}

    fields = tuples(values)
    for name in ("rope", "sliding_rope"):
        if isinstance(fields.get(name), Mapping):
            fields[name] = RopeConfig(**tuples(fields[name]))
    return ModelConfig(**fields)
