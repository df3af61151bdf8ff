"""Prompts of mixed lengths in batches of few shapes, so that few programs are compiled.

A batch holds a number of prompts, or of tokens where they are long, so that its memory does not
follow the longest prompt; then no row of it only fills the shape.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import numpy as np

from jaxneurons.prompts.answers import TokenPrompt
from jaxneurons.storage.settings import check_argument, check_number

PLAN_TOKENS = 512
"""Tokens that each row of a batch of prompts with answers stands for: longer prompts take more."""

ANSWER_TOKENS = 128
"""Tokens that each token of an answer counts as: it is attributed by rows of its own."""

LENGTH_TOKENS = 128
"""Tokens that each row of a batch of prompts alone stands for."""


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

    Prompts of more than `LENGTH_TOKENS` tokens have batches of their own: of at most
    `rows * LENGTH_TOKENS` tokens, a power of two of prompts, without rows that only fill the shape.

    Raises:
      ConfigError: fewer than one row.
    """
    check_number("batch size", rows, least=1)
    lengths = np.array([len(prompt) for prompt in prompts], np.int32)
    order = np.argsort(lengths, kind="stable")
    batches, start = [], 0
    while start < len(prompts):
        index, filled = order[start : start + rows], rows
        short = index[lengths[index] <= LENGTH_TOKENS]
        if len(short):
            index = short
        else:
            filled = _power_of_two(len(index))
            while filled > 1 and filled * _padded(lengths, index[:filled]) > rows * LENGTH_TOKENS:
                filled //= 2
            index = index[:filled]
        padded = np.concatenate([index, np.repeat(index[:1], filled - len(index))])
        tokens = np.zeros((filled, _padded(lengths, index)), np.int32)
        for row, i in enumerate(padded):
            tokens[row, : lengths[i]] = prompts[i]
        batches.append(PromptBatch(index, tokens, lengths[padded]))
        start += len(index)
    return batches


def _padded(lengths: np.ndarray, index: np.ndarray) -> int:
    """The padded length of prompts sorted by length."""
    return bucket(int(lengths[index[-1]]), step=4)


def _power_of_two(count: int) -> int:
    """The largest one that is not above `count`."""
    return 1 << (count.bit_length() - 1)


def bucket(length: int, step: int = 32) -> int:
    """The padded length: two sizes to every doubling, multiples of `step` up to four of them.

    Above 2,048 four sizes to every doubling: there, padding takes more time than compiling.
    """
    while step * (8 if step >= 256 and length > 2048 else 4) < length:
        step *= 2
    return -(-length // step) * step


def default_batch_size(platform: str | None = None) -> int:
    """Prompts per batch that keep a platform (cpu, gpu, tpu; None: this one) busy."""
    return 8 if (platform or jax.default_backend()) == "cpu" else 32


def plan(prompts: Sequence[TokenPrompt], batch_size: int | None = None) -> list[Batch]:
    """Group prompts into batches of equal padded shape; the same prompts give the same batches.

    Within a shape, batches are full but for the last, which is filled up: a few rows more cost less
    than another program. A batch of `batch_size` prompts holds at most `batch_size * PLAN_TOKENS`
    tokens: where prompts or answers are longer it has fewer prompts, and (nearly) no rows that only
    fill the shape.

    Raises:
      ConfigError: a batch size below 1.
    """
    check_argument("prompts", Sequence[TokenPrompt], prompts)
    if batch_size is not None:
        check_number("batch size", batch_size, least=1)
    size = batch_size or default_batch_size()
    shapes: dict[tuple[int, int, int, int], list[int]] = {}
    for i, prompt in enumerate(prompts):
        longest = max(map(len, prompt.options), default=1)
        key = (bucket(len(prompt.prompt)), len(prompt.answer), len(prompt.options), longest)
        shapes.setdefault(key, []).append(i)
    batches = []
    for key, members in sorted(shapes.items()):
        rows = _rows(len(members), size, tokens=max(key[0], ANSWER_TOKENS * key[1]))
        batches += [
            _pad(prompts, members[start : start + rows], key, rows=min(rows, len(members)))
            for start in range(0, len(members), rows)
        ]
    return batches


def some(batch: Batch, first: int, end: int) -> Batch:
    """Some rows of a batch, from the first to the one before `end`."""
    return Batch(*(array[first:end] for array in batch))


def counts(batches: Sequence[Batch]) -> list[int]:
    """Prompts of each batch, without the rows that fill its shape."""
    return [int((batch.index >= 0).sum()) for batch in batches]


def _rows(count: int, size: int, *, tokens: int) -> int:
    """Prompts of a batch, of `count` that count as `tokens` each."""
    if tokens <= PLAN_TOKENS:
        return size
    rows = _power_of_two(min(count, max(1, size * PLAN_TOKENS // tokens)))
    # One row in 16 may be left over: less costs less than another program would.
    while -count % rows > count // 16:
        rows //= 2
    return rows


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
