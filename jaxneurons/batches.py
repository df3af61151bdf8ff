"""Prompts of mixed lengths in batches of few shapes, so that few programs are compiled."""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import numpy as np

from jaxneurons.answers import TokenPrompt
from jaxneurons.errors import ConfigError


class Batch(NamedTuple):
    """Prompts padded to one shape.

    Attributes:
      index: which prompt of the plan each row is, [batch]; -1 for a row that only fills the shape.
      tokens: right-padded ids, [batch, seq].
      lengths: real tokens, [batch].
      targets: right-padded answers, [batch, answer].
      answer_lengths: real tokens of the answers, [batch].
      options: right-padded tokens of the options, [batch, option, token]; -1 where there is none.
    """

    index: np.ndarray  # pyright: ignore[reportIncompatibleMethodOverride]
    tokens: np.ndarray
    lengths: np.ndarray
    targets: np.ndarray
    answer_lengths: np.ndarray
    options: np.ndarray

    @property
    def answers_by_option(self) -> np.ndarray:
        """Whether each option is the answer, [batch, option]."""
        longest = max(self.options.shape[2], self.targets.shape[1])
        wide = [(0, 0), (0, longest - self.targets.shape[1])]
        targets = np.pad(self.targets, wide, constant_values=-1)
        wide = [(0, 0), (0, 0), (0, longest - self.options.shape[2])]
        options = np.pad(self.options, wide, constant_values=-1)
        return (options == targets[:, None]).all(-1)


class PromptBatch(NamedTuple):
    """Prompts alone, padded to one shape.

    Attributes:
      index: which prompts the first rows are; the rows after them only fill the shape.
      tokens: right-padded ids, [batch, seq].
      lengths: real tokens, [batch].
    """

    index: np.ndarray  # pyright: ignore[reportIncompatibleMethodOverride]
    tokens: np.ndarray
    lengths: np.ndarray


def by_length(prompts: Sequence[Sequence[int]], rows: int) -> list[PromptBatch]:
    """Prompts sorted by length, `rows` at a time: little padding, and one shape to a length.

    Raises:
      ConfigError: fewer than one row.
    """
    if rows < 1:
        raise ConfigError(f"batch size must be at least 1, got {rows!r}")
    lengths = np.array([len(prompt) for prompt in prompts], np.int32)
    order = np.argsort(lengths, kind="stable")
    batches = []
    for start in range(0, len(prompts), rows):
        index = order[start : start + rows]
        padded = np.concatenate([index, np.repeat(index[:1], rows - len(index))])
        tokens = np.zeros((rows, bucket(int(lengths[index].max()), step=4)), np.int32)
        for row, i in enumerate(padded):
            tokens[row, : lengths[i]] = prompts[i]
        batches.append(PromptBatch(index, tokens, lengths[padded]))
    return batches


def bucket(length: int, step: int = 32) -> int:
    """The padded length: two sizes to every doubling, multiples of `step` up to four of them."""
    while step * 4 < length:
        step *= 2
    return -(-length // step) * step


def default_batch_size() -> int:
    """Prompts per batch that keep the platform busy."""
    return 8 if jax.default_backend() == "cpu" else 32


def plan(prompts: Sequence[TokenPrompt], batch_size: int | None = None) -> list[Batch]:
    """Group prompts into batches of equal padded shape; the same prompts give the same batches.

    Within a shape, batches are full but for the last, which is filled up: a few rows more cost less
    than another program.

    Raises:
      ConfigError: a batch size below 1.
    """
    if batch_size is not None and batch_size < 1:
        raise ConfigError(f"batch size must be at least 1, got {batch_size!r}")
    size = batch_size or default_batch_size()
    shapes: dict[tuple[int, int, int, int], list[int]] = {}
    for i, prompt in enumerate(prompts):
        longest = max(map(len, prompt.options), default=1)
        key = (bucket(len(prompt.prompt)), len(prompt.answer), len(prompt.options), longest)
        shapes.setdefault(key, []).append(i)
    return [
        _pad(prompts, members[start : start + size], key, rows=min(size, len(members)))
        for key, members in sorted(shapes.items())
        for start in range(0, len(members), size)
    ]


def _pad(
    prompts: Sequence[TokenPrompt],
    members: list[int],
    shape: tuple[int, int, int, int],
    *,
    rows: int,
) -> Batch:
    length, answers, options, longest = shape
    rows = 1 << (rows - 1).bit_length()
    padded = members + [members[0]] * (rows - len(members))
    tokens = np.zeros((rows, length), np.int32)
    for row, i in enumerate(padded):
        tokens[row, : len(prompts[i].prompt)] = prompts[i].prompt
    chosen = np.full((rows, options, longest), -1, np.int32)
    for row, i in enumerate(padded):
        for option, ids in enumerate(prompts[i].options):
            chosen[row, option, : len(ids)] = ids
    return Batch(
        index=np.array(members + [-1] * (rows - len(members))),
        tokens=tokens,
        lengths=np.array([len(prompts[i].prompt) for i in padded], np.int32),
        targets=np.array([prompts[i].answer for i in padded], np.int32).reshape(rows, answers),
        answer_lengths=np.full(rows, answers, np.int32),
        options=chosen,
    )
