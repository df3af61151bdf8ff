"""Batches: every prompt once, few shapes, always the same."""

import collections

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxneurons.errors import ConfigError
from jaxneurons.prompts.answers import TokenPrompt
from jaxneurons.prompts.batches import PLAN_TOKENS, bucket, by_length, default_batch_size, plan


def prompt(length, answer=1, options=0, seed=0):
    rng = np.random.default_rng([length, answer, options, seed])
    return TokenPrompt(
        tuple(rng.integers(1, 99, length).tolist()),
        tuple(rng.integers(1, 99, answer).tolist()),
        tuple(tuple(rng.integers(1, 99, n % 2 + 1).tolist()) for n in range(options)),
    )


prompts_of_any_size = st.lists(
    st.builds(
        prompt, st.integers(1, 300), st.integers(1, 3), st.sampled_from([0, 4]), st.integers(0, 9)
    ),
    max_size=30,
)


@given(prompts_of_any_size, st.integers(1, 9))
@settings(max_examples=60, deadline=None)
def test_every_prompt_is_there_once_and_whole(prompts, size):
    seen = []
    shapes = collections.defaultdict(list)
    for batch in plan(prompts, size):
        rows = len(batch.index)
        assert rows & (rows - 1) == 0
        shapes[batch.tokens.shape[1], batch.targets.shape, batch.options.shape].append(batch)
        real = batch.index[batch.index >= 0]
        assert 0 < len(real) <= size
        assert (batch.index[: len(real)] >= 0).all()  # what only fills the shape is at the end
        for row, i in enumerate(real.tolist()):
            seen.append(i)
            want, length = prompts[i], len(prompts[i].prompt)
            assert batch.tokens[row, :length].tolist() == list(want.prompt)
            assert not batch.tokens[row, length:].any()  # padded on the right
            assert batch.lengths[row] == length
            assert batch.targets[row].tolist() == list(want.answer)
            assert batch.answer_lengths[row] == len(want.answer)
            padded = [(*ids, -1)[: batch.options.shape[2]] for ids in want.options]
            assert batch.options[row].tolist() == list(map(list, padded))
            answers = [ids == want.answer for ids in want.options]
            assert batch.answers_by_option[row].tolist() == answers
    assert sorted(seen) == list(range(len(prompts)))
    for (_, (rows, answers), (_, *options)), batches in shapes.items():
        full = min(size, sum(int((batch.index >= 0).sum()) for batch in batches))
        assert rows < 2 * full  # filled up to a full batch, and no further
        assert (batches[0].index >= 0).sum() == full
        others = [key for key in shapes if key[1][1] == answers and key[2][1:] == tuple(options)]
        assert len(others) == len({key[0] for key in others})  # one program for each shape


@given(prompts_of_any_size)
@settings(max_examples=20, deadline=None)
def test_the_same_prompts_give_the_same_batches(prompts):
    for one, two in zip(plan(prompts, 4), plan(list(prompts), 4), strict=True):
        for a, b in zip(one, two, strict=True):
            np.testing.assert_array_equal(a, b)


def test_lengths_are_few_and_not_wasteful():
    sizes = [bucket(length) for length in range(1, 2049)]
    assert len(set(sizes)) <= 12
    assert sizes == sorted(sizes)
    for length, size in enumerate(sizes, 1):
        assert length <= size < max(1.5 * length, length + 32)
    longer = [bucket(length) for length in range(2049, 8193)]
    assert len(set(longer)) == 8
    assert all(size < 1.25 * length for length, size in enumerate(longer, 2049))
    assert bucket(32) == 32
    assert bucket(33) == 64


def test_few_shapes_for_prompts_of_every_length():
    batches = plan([prompt(length) for length in range(1, 2049)], 8)
    assert len({batch.tokens.shape for batch in batches}) <= 12 + 4
    for batch in batches:
        rows, tokens = batch.tokens.shape
        assert rows == 1 or rows * tokens <= 8 * PLAN_TOKENS
        assert rows == 8 or rows == 1 or 2 * rows * tokens > 8 * PLAN_TOKENS  # and no smaller


@pytest.mark.parametrize(
    ("count", "length", "answer", "rows"),
    [
        (9, 512, 1, [8, 8]),  # short: filled up, as one more program costs more
        (1, 4400, 1, [1]),
        (4, 4400, 1, [1] * 4),
        (5, 1000, 1, [1] * 5),
        (8, 1000, 1, [4, 4]),
        (6, 600, 1, [2, 2, 2]),
        (99, 600, 1, [4] * 25),  # one row in a hundred is left over
        (9, 20, 4, [8, 8]),
        (16, 20, 8, [4] * 4),
        (3, 20, 64, [1] * 3),
    ],
)
def test_long_prompts_and_answers_make_small_batches(count, length, answer, rows):
    batches = plan([prompt(length, answer, seed=i) for i in range(count)], 8)
    assert [len(batch.index) for batch in batches] == rows
    if max(length, 128 * answer) > PLAN_TOKENS:
        empty = sum(int((batch.index < 0).sum()) for batch in batches)
        assert empty <= count / 16


@given(st.lists(st.integers(1, 3000), max_size=40), st.sampled_from([1, 3, 16, 64]))
@settings(max_examples=60, deadline=None)
def test_prompts_alone_by_length(lengths, rows):
    prompts = [[1 + i % 7] * length for i, length in enumerate(lengths)]
    found = by_length(prompts, rows)
    order = [i for batch in found for i in batch.index.tolist()]
    assert order == sorted(range(len(prompts)), key=lambda i: lengths[i])
    for batch in found:
        filled, tokens = batch.tokens.shape
        for row, i in enumerate(batch.index.tolist()):
            assert batch.tokens[row, : lengths[i]].tolist() == prompts[i]
            assert batch.lengths[row] == lengths[i]
            assert not batch.tokens[row, lengths[i] :].any()
        if batch.lengths.max() <= 128:
            assert filled == rows
        else:
            assert filled == len(batch.index)
            assert filled == 1 or filled * tokens <= rows * 128


def test_the_last_batch_is_filled_up():
    batches = plan([prompt(10, seed=i) for i in range(21)], 8)
    assert [len(batch.index) for batch in batches] == [8, 8, 8]
    assert batches[-1].index.tolist() == [16, 17, 18, 19, 20, -1, -1, -1]
    assert [len(batch.index) for batch in plan([prompt(10)] * 9, 8)] == [8, 8]
    assert [len(batch.index) for batch in plan([prompt(10)] * 3, 8)] == [4]


def test_batch_size():
    prompts = [prompt(10)] * (default_batch_size() + 1)
    assert len(plan(prompts)) == 2
    assert plan([]) == []
    for size in (0, -1):
        with pytest.raises(ConfigError, match="batch size must be at least 1"):
            plan(prompts, size)
