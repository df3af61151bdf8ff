"""Rotary position embedding: frequencies, angles at positions, and the rotation itself."""

import math
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxneurons.model.config import ModelConfig, RopeConfig


def rope_frequencies(rope: RopeConfig, head_dim: int) -> np.ndarray:
    """Inverse frequencies of the rotary embedding, float32 [dimensions / 2], in radians per token.

    For `dynamic` and `longrope`: those of sequences within the original context.
    """
    head_dim = rope.dim or head_dim
    exponents = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    inv_freq = (1.0 / np.float32(rope.theta) ** exponents).astype(np.float32)
    if rope.inv_freq_divisors is not None:
        return (inv_freq / np.asarray(rope.inv_freq_divisors, np.float32)).astype(np.float32)
    if rope.short_divisors is not None:
        return (inv_freq / np.asarray(rope.short_divisors, np.float32)).astype(np.float32)
    if rope.rope_type == "linear":
        return (inv_freq / np.float32(rope.factor)).astype(np.float32)
    if rope.rope_type in ("llama3", "yarn"):
        keep = _kept(rope, head_dim, inv_freq)
        return ((1 - keep) * inv_freq / rope.factor + keep * inv_freq).astype(np.float32)
    return inv_freq


def _kept(rope: RopeConfig, head_dim: int, inv_freq: np.ndarray) -> np.ndarray:
    """How far each frequency is left alone (1) rather than divided by the factor (0)."""
    if rope.rope_type == "llama3":
        # Linear in the number of turns that fit into the original context.
        turns = rope.original_max_position * inv_freq / (2 * math.pi)
        low, high = rope.low_freq_factor, rope.high_freq_factor
        return np.clip((turns - low) / (high - low), 0.0, 1.0)

    def dimension(turns: float) -> float:
        """The (fractional) pair of dimensions that turns so often in the original context."""
        length = rope.original_max_position / (turns * 2 * math.pi)
        return head_dim * math.log(length) / (2 * math.log(rope.theta))

    # Linear in the dimension's number.
    low, high = dimension(rope.beta_fast), dimension(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    if low == high:
        high += 0.001
    ramp = (np.arange(head_dim // 2, dtype=np.float32) - np.float32(low)) / np.float32(high - low)
    return 1 - np.clip(ramp, 0.0, 1.0)


class Angles(NamedTuple):
    """Cosines and sines of rotary angles at some positions, float32, for each of `config.ropes`.

    Attributes:
      cos: for each pair of dimensions that rotates.
      sin: the same.
    """

    cos: Float[Array, "rope batch seq pair"]
    sin: Float[Array, "rope batch seq pair"]


def rope_angles(
    positions: Int[Array, "batch seq"],
    config: ModelConfig,
    lengths: Int[Array, " batch"],
) -> Angles:
    """Cosines and sines of the rotary angles at `positions`.

    Args:
      positions: of the tokens.
      config: the model's shape.
      lengths: tokens of each whole sequence, which `dynamic` and `longrope` depend on.
    """
    every = [_angles(positions, rope, config.head_dim, lengths) for rope in config.ropes]
    return Angles(*(jnp.stack(values) for values in zip(*every, strict=True)))


def _angles(
    positions: Array, rope: RopeConfig, head_dim: int, lengths: Array
) -> tuple[Float[Array, "batch seq pair"], Float[Array, "batch seq pair"]]:
    dim = rope.dim or head_dim
    frequencies: Array = jnp.asarray(rope_frequencies(rope, head_dim))
    context = rope.original_max_position
    if rope.rope_type == "dynamic":
        longest = jnp.maximum(lengths, context).astype(jnp.float32)
        stretch = rope.factor * longest / context - (rope.factor - 1)
        theta = rope.theta * stretch ** (dim / (dim - 2))
        exponents = jnp.arange(0, dim, 2, dtype=jnp.float32) / dim
        scaled = 1.0 / theta[:, None] ** exponents
        frequencies = jnp.where(lengths[:, None] > context, scaled, frequencies)[:, None]
    if rope.long_divisors is not None:
        short, long = np.asarray(rope.short_divisors), np.asarray(rope.long_divisors)
        stretched = frequencies * jnp.asarray(short / long, jnp.float32)
        frequencies = jnp.where(lengths[:, None] > context, stretched, frequencies)[:, None]
    angles = positions[..., None].astype(jnp.float32) * frequencies
    return jnp.cos(angles) * rope.attention_factor, jnp.sin(angles) * rope.attention_factor


def rotate(
    x: Float[Array, "batch seq heads dim"], angles: Angles, rope: int | Array = 0
) -> Float[Array, "batch seq heads dim"]:
    """Rotate each head's (i, i + pairs) pairs of dimensions; the dimensions behind them stay.

    Args:
      x: queries or keys.
      angles: at their positions.
      rope: which of the angles' embeddings, as `LayerKind.rope`; it may be traced.
    """
    if isinstance(rope, int):
        if rope < 0:
            return x
        cos, sin = angles.cos[rope], angles.sin[rope]
    else:  # the last entry, -1, leaves all as it is
        cos = jnp.concatenate([angles.cos, jnp.ones_like(angles.cos[:1])])[rope]
        sin = jnp.concatenate([angles.sin, jnp.zeros_like(angles.sin[:1])])[rope]
    cos, sin = cos[..., None, :].astype(x.dtype), sin[..., None, :].astype(x.dtype)
    pairs = cos.shape[-1]
    first, second, rest = jnp.split(x, (pairs, 2 * pairs), axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin, rest], axis=-1)
