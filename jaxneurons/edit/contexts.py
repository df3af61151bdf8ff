"""A request in its contexts: the prompt alone, the prompt after other texts, "{subject} is a"."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from jaxneurons.edit.encoding import encode_prefixed, encode_request
from jaxneurons.edit.passes import Split
from jaxneurons.edit.requests import EditRequest
from jaxneurons.errors import DataError
from jaxneurons.model.config import ModelConfig
from jaxneurons.prompts.batches import bucket

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Located = tuple[tuple[int, ...], int]
"""Ids, and the index of the subject's last token in them."""


class Contexts(NamedTuple):
    """What the value of a request is optimised on.

    Attributes:
      prompts: the prompt alone, and after each prefix.
      target: ids of the new answer.
      essence: "{subject} is a", after which little is to change.
    """

    prompts: tuple[Located, ...]
    target: tuple[int, ...]
    essence: Located


def encode_contexts(
    tokenizer: "PreTrainedTokenizerBase",
    requests: Sequence[EditRequest],
    prefixes: Sequence[str],
    *,
    config: ModelConfig,
) -> list[Contexts]:
    """Requests in their contexts, as ids.

    Raises:
      DataError: a request that cannot be encoded, or that is too long with a prefix; says which.
    """
    contexts = []
    for request in requests:
        encoded = encode_request(tokenizer, request, config=config)
        alone = (encoded.prompt, encoded.subject_last)
        after = [encode_prefixed(tokenizer, request, text, config=config) for text in prefixes]
        longest = max(len(ids) for ids, _ in (alone, *after)) + len(encoded.target)
        if longest > config.max_position:
            raise DataError(
                f"request {name_of(request)}: with a prefix and its answer it has {longest} "
                f"tokens, the model's context holds {config.max_position}; shorten the prompt"
            )
        essence = (encoded.essence, encoded.essence_last)
        contexts.append(Contexts((alone, *after), encoded.target, essence))
    return contexts


def name_of(request: EditRequest) -> str:
    """What messages call a request."""
    return repr(request.id or request.prompt[:60])


class ContextBatch(NamedTuple):
    """Requests of similar length in their contexts.

    Attributes:
      members: index of each request in the whole list; -1 for one that only fills the shape.
      split: a request's prompts in turn, its essence last; then the next request's.
      ends: where in `split.after` the first token of the answer is predicted; of an essence the
        next token.
      targets: ids of the new answers, right-padded with -1.
    """

    members: np.ndarray
    split: Split
    ends: Int[Array | np.ndarray, "request context"]
    targets: Int[Array | np.ndarray, "request token"]

    def some(self, first: int, end: int) -> "ContextBatch":
        """The requests from the first to the one before `end`, of the same padded shape."""
        each = self.ends.shape[1]
        split = Split(*(array[first * each : end * each] for array in self.split))
        ends, targets = self.ends[first:end], self.targets[first:end]
        return ContextBatch(self.members[first:end], split, ends, targets)


def batches(contexts: Sequence[Contexts], size: int) -> list[ContextBatch]:
    """Requests sorted by shape in batches of `size`, of few padded shapes."""
    shapes = [_shape(each) for each in contexts]
    order = sorted(range(len(contexts)), key=lambda i: (shapes[i], i))
    size = min(size, _power_of_two(len(order)))
    return [
        _pad(contexts, order[start : start + size], shapes, size)
        for start in range(0, len(order), size)
    ]


def _shape(contexts: Contexts) -> tuple[int, int, int]:
    """Padded tokens before the subject's last, from that on, and of the answer: few and coarse.

    The first are run once, the second in every step.
    """
    answer = len(contexts.target)
    after = [len(ids) - last + answer - 1 for ids, last in contexts.prompts]
    after.append(len(contexts.essence[0]) - contexts.essence[1])
    before = [last for _, last in (*contexts.prompts, contexts.essence)]
    return _power_of_two(max(32, *before)), bucket(max(after), 2), _power_of_two(answer)


def _power_of_two(count: int) -> int:
    """The smallest one that is not below `count`."""
    return 1 << (count - 1).bit_length()


def _pad(
    contexts: Sequence[Contexts],
    members: list[int],
    shapes: list[tuple[int, int, int]],
    size: int,
) -> ContextBatch:
    before, after, answer = np.max([shapes[i] for i in members], axis=0)
    filled = [contexts[i] for i in members + members[:1] * (size - len(members))]
    each = len(filled[0].prompts) + 1
    rows = size * each
    tokens_before, tokens_after = np.zeros((rows, before), np.int32), np.zeros((rows, after), int)
    last, length, ends = (np.zeros(rows, np.int32) for _ in range(3))
    targets = np.full((size, answer), -1, np.int32)
    for n, context in enumerate(filled):
        targets[n, : len(context.target)] = context.target
        sequences = [(ids, at, context.target[:-1]) for ids, at in context.prompts]
        sequences.append((*context.essence, ()))
        for row, (ids, at, forced) in enumerate(sequences, start=n * each):
            whole = ids + forced
            tokens_before[row, :at] = whole[:at]
            tokens_after[row, : len(whole) - at] = whole[at:]
            last[row], length[row], ends[row] = at, len(whole), len(ids) - 1 - at
    split = Split(
        jnp.asarray(tokens_before),
        jnp.asarray(tokens_after.astype(np.int32)),
        jnp.asarray(last),
        jnp.asarray(length),
    )
    filled_up = np.array(members + [-1] * (size - len(members)))
    return ContextBatch(filled_up, split, ends.reshape(size, each), targets)


def batch_size(
    contexts: Sequence[Contexts],
    config: ModelConfig,
    budget: int = 1 << 30,
    *,
    platform: str | None = None,
) -> int:
    """Requests that are optimised together: enough to keep the platform busy, within bytes.

    Few on a CPU, since a batch goes on until its slowest request is done.
    """
    answer = max(_power_of_two(len(each.target)) for each in contexts)
    logits = 3 * 4 * config.vocab_size * (len(contexts[0].prompts) * answer + 2)
    most = 4 if (platform or jax.default_backend()) == "cpu" else 32
    return max(1, min(most, 1 << (max(1, budget // logits).bit_length() - 1)))
