"""How many rows of logits are made at once: of a large vocabulary each takes a MiB."""

from jaxneurons.model.config import ModelConfig

LOGIT_BYTES = 1 << 28
"""Bytes that the logits may take which are made at once, where work can be cut."""


def logits_at_once(config: ModelConfig, most: int, *, each: int = 1) -> int:
    """Of `most` things with `each` rows of float32 logits: how many at once; at least one."""
    return max(1, min(most, LOGIT_BYTES // (4 * config.vocab_size * each)))
