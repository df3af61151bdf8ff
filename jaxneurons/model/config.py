"""The shape of a Llama-family model: one frozen, validated dataclass."""

import dataclasses
import math

from jaxneurons.errors import ConfigError, near_matches
from jaxneurons.storage.settings import check_fields

ROPE_TYPES = ("default", "linear", "dynamic", "yarn", "llama3")
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
        `llama3` (the same idea with another ramp, Llama 3.1 and later).
      factor: context extension factor (all but `default`).
      low_freq_factor: `llama3`: wavelengths above original/low are fully scaled.
      high_freq_factor: `llama3`: wavelengths below original/high are untouched.
      original_max_position: `llama3`, `yarn`, `dynamic`: tokens of the context before extension.
      beta_fast: `yarn`: wavelengths with more turns than this in the original context are kept.
      beta_slow: `yarn`: wavelengths with fewer turns than this are fully scaled.
      truncate: `yarn`: the ramp's ends are rounded outwards to whole dimensions.
      attention_factor: `yarn`: cosines and sines are multiplied by it.
      inv_freq_divisors: a divisor for each of the head_dim / 2 inverse frequencies, as GGUF files
        carry it (`rope_freqs.weight`); replaces the three `llama3` values when given.
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
        if any(not (math.isfinite(d) and d > 0) for d in self.inv_freq_divisors or ()):
            raise ConfigError("rope inv_freq_divisors must be positive numbers")
        if self.rope_type == "llama3" and not self.low_freq_factor < self.high_freq_factor:
            raise ConfigError("rope low_freq_factor must be below high_freq_factor")
        if self.rope_type == "yarn" and not self.beta_slow < self.beta_fast:
            raise ConfigError("rope beta_slow must be below beta_fast")
        if self.rope_type == "dynamic" and self.factor < 1:
            raise ConfigError(f"rope factor must be at least 1 for 'dynamic', got {self.factor!r}")


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """A decoder-only transformer of the Llama family: Llama, Mistral, Qwen2 and their kin.

    Attributes:
      vocab_size: rows of the embedding, in tokens.
      hidden_size: width of the residual stream.
      intermediate_size: width of the gated feed-forward, the sites `up`, `gate` and `act`.
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
    family: str = "llama"

    def __post_init__(self) -> None:
        check_fields(self)
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.type is int and value <= 0:
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
        divisors = self.rope.inv_freq_divisors
        if divisors is not None and len(divisors) != self.head_dim // 2:
            raise ConfigError(
                f"rope inv_freq_divisors has {len(divisors)} values, "
                f"head_dim / 2 = {self.head_dim // 2} are needed"
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
    def every_window(self) -> tuple[int, ...]:
        """Positions that the queries of each layer see, where layers differ in it or not."""
        return self.layer_windows or (self.sliding_window or EVERYTHING,) * self.num_layers

    @property
    def query_width(self) -> int:
        """Outputs of the query projection: heads times head_dim."""
        return self.num_heads * self.head_dim

    @property
    def kv_width(self) -> int:
        """Outputs of the key and of the value projection."""
        return self.num_kv_heads * self.head_dim
