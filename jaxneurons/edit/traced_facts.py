"""Facts as token ids, as causal tracing takes them: where the subject is, batches of few shapes."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from jaxneurons.edit.encoding import encode_request
from jaxneurons.edit.requests import EditRequest, KnownFact
from jaxneurons.edit.restoring import NoisedPrompts
from jaxneurons.errors import DataError
from jaxneurons.model.config import ModelConfig
from jaxneurons.prompts import batches

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

POSITIONS = (
    "first subject",
    "middle subject",
    "last subject",
    "first after",
    "further",
    "last",
)
"""What a token is to the subject. One of a subject of one token is its last; the last token of the
prompt is `last` also where it is the first after the subject, and `last subject` where it is that.
"""


class TracedFact(NamedTuple):
    """A fact as token ids.

    Attributes:
      prompt: ids.
      answer: ids of the attribute as it follows the prompt.
      subject: index in `prompt` of the subject's first token, and of the one after its last.
    """

    prompt: tuple[int, ...]
    answer: tuple[int, ...]
    subject: tuple[int, int]

    @property
    def positions(self) -> range:
        """Where states are restored: from the subject on."""
        return range(self.subject[0], len(self.prompt))

    def position_class(self, position: int) -> str:
        """What the token at a position is to the subject: one of `POSITIONS`."""
        start, end = self.subject
        if position < end:
            if position == end - 1:
                return "last subject"
            return "first subject" if position == start else "middle subject"
        if position == len(self.prompt) - 1:
            return "last"
        return "first after" if position == end else "further"


def encode_fact(
    tokenizer: "PreTrainedTokenizerBase", fact: KnownFact, *, config: ModelConfig
) -> TracedFact:
    """A fact as token ids.

    Args:
      tokenizer: the model's.
      fact: with a subject that its prompt holds.
      config: the model's shape.

    Raises:
      DataError: as `encode_request`, or a subject whose first token cannot be told.
    """
    request = EditRequest(fact.prompt, fact.subject, fact.attribute, id=fact.id)
    encoded = encode_request(tokenizer, request, config=config)
    end = encoded.subject_last + 1
    for start in reversed(range(end)):
        if fact.subject.strip() in str(tokenizer.decode(list(encoded.prompt[start:end]))):
            return TracedFact(encoded.prompt, encoded.target, (start, end))
    raise DataError(
        f"this tokenizer writes the subject {fact.subject!r} in another way, so that its first "
        f"token in {fact.prompt!r} cannot be told; leave this fact out"
    )


def plan(encoded: Mapping[int, TracedFact], size: int) -> list[list[int]]:
    """Places of facts in batches of equal padded shape; the same facts give the same batches.

    Batches hold a power of two of facts, at most `size`, and no rows that only fill a shape: a run
    is so much dearer than another program.
    """
    shapes: dict[tuple[int, int, int], list[int]] = {}
    for i, fact in encoded.items():
        shapes.setdefault(_shape(fact), []).append(i)
    planned = []
    for _, members in sorted(shapes.items()):
        while members:
            count = 1 << (min(len(members), size).bit_length() - 1)
            planned.append(members[:count])
            members = members[count:]
    return planned


def _shape(fact: TracedFact) -> tuple[int, int, int]:
    """Padded tokens, padded positions and answer tokens."""
    tokens = len(fact.prompt) + len(fact.answer) - 1
    return batches.bucket(tokens, 2), batches.bucket(len(fact.positions), 2), len(fact.answer)


def noised_prompts(encoded: Sequence[TracedFact], noise: Sequence[np.ndarray]) -> NoisedPrompts:
    """Facts of one padded shape, as `restored_probabilities` takes them.

    Args:
      encoded: the facts.
      noise: of each fact, [sample, token of the subject, hidden].
    """
    seq, room, _ = map(max, zip(*map(_shape, encoded), strict=True))
    tokens = np.zeros((len(encoded), seq), np.int32)
    positions = np.full((len(encoded), room), -1, np.int32)
    samples, _, hidden = noise[0].shape
    added = np.zeros((samples, len(encoded), seq, hidden), np.float32)
    lengths = []
    for row, (fact, of_fact) in enumerate(zip(encoded, noise, strict=True)):
        ids = fact.prompt + fact.answer[:-1]
        lengths.append(len(ids))
        tokens[row, : len(ids)] = ids
        positions[row, : len(fact.positions)] = fact.positions
        added[:, row, slice(*fact.subject)] = of_fact
    targets = np.array([fact.answer for fact in encoded], np.int32)
    return NoisedPrompts(tokens, np.array(lengths, np.int32), targets, added, positions)
