"""A request as the prompts that its edit is measured on, in few shapes."""

import dataclasses
from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np

from jaxneurons.checkpoints.loading import LM
from jaxneurons.edit.requests import EditRequest
from jaxneurons.errors import DataError
from jaxneurons.model.token_ids import check_ids
from jaxneurons.prompts.answers import encode_answer, encode_prompt
from jaxneurons.prompts.batches import bucket
from jaxneurons.storage.settings import check_fields, check_number
from jaxneurons.storage.tables import Row

Kind = Literal["prompt", "paraphrase", "neighbour", "portability"]
ANSWERS = 4
"""Answers are padded to a multiple of so many tokens."""
PROMPTS = 16
"""Prompts with answers are padded to this many tokens, or to a larger size of `bucket`."""


@dataclasses.dataclass(frozen=True)
class MeasureSettings:
    """What an edit is measured on.

    Attributes:
      steps: tokens of free generation, beyond those of the longest answer of all requests.
      fluency_tokens: length of the continuation of the prompt that fluency is taken of, the dear
        part; 0: no fluency.
      perplexity_tokens: about so many tokens of neutral text; 0: no perplexity.
      text_tokens: of each neutral text, at most.
      batch: edits measured at once; None: as many as the platform's memory suggests. Results
        do not depend on it beyond rounding.
    """

    steps: int = 16
    fluency_tokens: int = 100
    perplexity_tokens: int = 128
    text_tokens: int = 64
    batch: int | None = None

    def __post_init__(self) -> None:
        check_fields(self)
        check_number("MeasureSettings.steps", self.steps, least=1)
        check_number("MeasureSettings.text_tokens", self.text_tokens, least=2)
        for name in ("fluency_tokens", "perplexity_tokens"):
            check_number(f"MeasureSettings.{name}", getattr(self, name), least=0)
        if self.batch is not None:
            check_number("MeasureSettings.batch", self.batch, least=1)


class Question(NamedTuple):
    """A prompt, and what may follow it.

    Attributes:
      kind: what the prompt is to the edit.
      text: the prompt.
      answer: what is to follow: the new answer, or a neighbour's own; "" if it is not known.
      prompt: ids.
      wanted: ids of `answer`; one that only fills the shape if it is not known.
      other: ids of what competes: the old answer, or the new one after a neighbour; () if nothing.
    """

    kind: Kind
    text: str
    answer: str
    prompt: tuple[int, ...]
    wanted: tuple[int, ...]
    other: tuple[int, ...]


class Case(NamedTuple):
    """A request and its questions: the prompt first, then each kind in the request's order."""

    request: EditRequest
    questions: tuple[Question, ...]


class Rows(NamedTuple):
    """Questions of some cases as arrays; a case has two rows a question: wanted, other.

    Attributes:
      tokens: [case, row, seq], prompt and answer, right-padded.
      lengths: [case, row].
      starts: [case, row], position whose logits are the answer's first.
      answers: [case, row, token]; -1 where there is none.
    """

    tokens: np.ndarray
    lengths: np.ndarray
    starts: np.ndarray
    answers: np.ndarray


def encode_case(lm: LM, request: EditRequest, *, settings: MeasureSettings) -> Case:
    """A request as token ids.

    Raises:
      DataError: an empty prompt or target, an answer that cannot be tokenised in its place, a
        prompt that leaves no room for what is generated after it.
    """
    new, old = request.target, request.ground_truth
    asked: list[tuple[Kind, str, str, str]] = [
        ("prompt", request.prompt, new, old),
        *(("paraphrase", text, new, old) for text in request.paraphrases),
        *(("neighbour", text, answer, new) for text, answer in request.neighbours),
        *(("portability", text, answer, "") for text, answer in request.portability),
    ]
    questions = []
    for kind, text, answer, other in asked:
        try:
            questions.append(_question(lm, kind, text, answer, other, settings))
        except DataError as error:
            raise DataError(f"{kind}: {error}") from None
    return Case(request, tuple(questions))


def askable(
    lm: LM, requests: Sequence[EditRequest], measures: MeasureSettings
) -> tuple[list[Case], list[int], list[Row]]:
    """Requests that can be asked, their numbers, and the others with the reason.

    Raises:
      DataError: there is none that can be asked.
    """
    cases, numbers, left_out = [], [], []
    labels = labels_of(requests)
    for number, request in enumerate(requests):
        try:
            cases.append(encode_case(lm, request, settings=measures))
            numbers.append(number)
        except DataError as error:
            left_out.append({"request": labels[number], "method": "", "reason": str(error)})
    if not cases:
        reason = f"; the first: {left_out[0]['reason']}" if left_out else ""
        raise DataError(f"none of {len(requests)} requests can be asked{reason}")
    return cases, numbers, left_out


def labels_of(requests: Sequence[EditRequest]) -> list[str]:
    """The id of each request, or its number where it has none or shares it."""
    ids = [request.id for request in requests]
    return [
        label if label and ids.count(label) == 1 else f"{label}#{number}"
        for number, label in enumerate(ids, 1)
    ]


def _question(
    lm: LM, kind: Kind, text: str, answer: str, other: str, settings: MeasureSettings
) -> Question:
    prompt = encode_prompt(lm.tokenizer, text)
    known = answer.strip() or kind != "neighbour"
    wanted = encode_answer(lm.tokenizer, text, answer) if known else prompt[-1:]
    competing = encode_answer(lm.tokenizer, text, other) if other.strip() else ()
    for ids in (prompt, wanted, competing):
        check_ids(ids, lm.config.vocab_size, lm.tokenizer)
    longest = max(len(wanted), len(competing)) + settings.steps
    longest = max(longest, settings.fluency_tokens if kind == "prompt" else 0)
    if len(prompt) + longest > lm.config.max_position:
        raise DataError(
            f"{text[:60]!r} has {len(prompt)} tokens and {longest} follow it, the model's context "
            f"holds {lm.config.max_position}; shorten it, or generate less"
        )
    return Question(kind, text, answer if known else "", prompt, wanted, competing)


def answer_width(cases: Sequence[Case]) -> int:
    """Tokens that answers are padded to."""
    longest = max(max(len(q.wanted), len(q.other)) for case in cases for q in case.questions)
    return -(-longest // ANSWERS) * ANSWERS


def scored_rows(cases: Sequence[Case], *, width: int) -> Rows:
    """Questions with their answers, for teacher forcing.

    Args:
      cases: shorter ones are filled up with their first question.
      width: of answers, as `answer_width` gives it for all cases.
    """
    count = max(len(case.questions) for case in cases)
    filled = [[*case.questions, *[case.questions[0]] * count][:count] for case in cases]
    longest = max(len(q.prompt) for questions in filled for q in questions)
    seq = _padded(longest + width)
    shape = (len(cases), 2 * count)
    rows = Rows(
        np.zeros((*shape, seq), np.int32),
        np.zeros(shape, np.int32),
        np.zeros(shape, np.int32),
        np.full((*shape, width), -1, np.int32),
    )
    for number, questions in enumerate(filled):
        for place, question in enumerate(questions):
            for which, answer in enumerate((question.wanted, question.other or question.wanted)):
                row, ids = 2 * place + which, question.prompt + answer
                rows.tokens[number, row, : len(ids)] = ids
                rows.lengths[number, row] = len(ids)
                rows.starts[number, row] = len(question.prompt) - 1
                rows.answers[number, row, : len(answer)] = answer
    return rows


def prompt_rows(prompts: Sequence[Sequence[Sequence[int]]]) -> tuple[np.ndarray, np.ndarray]:
    """Prompts of each case as [case, row, seq] right-padded ids and [case, row] lengths.

    Cases of fewer prompts are filled up with their first one.
    """
    count = max(map(len, prompts))
    filled = [[*of_case, *[of_case[0]] * count][:count] for of_case in prompts]
    seq = _padded(max(len(ids) for of_case in filled for ids in of_case))
    tokens = np.zeros((len(prompts), count, seq), np.int32)
    lengths = np.zeros((len(prompts), count), np.int32)
    for number, of_case in enumerate(filled):
        for row, ids in enumerate(of_case):
            tokens[number, row, : len(ids)], lengths[number, row] = ids, len(ids)
    return tokens, lengths


def _padded(length: int) -> int:
    return bucket(length, step=PROMPTS)


def text_rows(
    lm: LM, texts: Sequence[str], *, settings: MeasureSettings
) -> tuple[np.ndarray, np.ndarray]:
    """The first texts of about `perplexity_tokens` in all: [text, seq] ids and [text] lengths.

    Raises:
      DataError: no text of two tokens.
    """
    kept: list[tuple[int, ...]] = []
    for text in texts:
        if sum(map(len, kept)) >= settings.perplexity_tokens:
            break
        ids = encode_prompt(lm.tokenizer, text)[: min(settings.text_tokens, lm.config.max_position)]
        check_ids(ids, lm.config.vocab_size, lm.tokenizer)
        kept += [ids] if len(ids) > 1 else []
    if not kept:
        raise DataError("no neutral text of at least two tokens to take perplexity of")
    tokens, lengths = prompt_rows([kept])
    return tokens[0], lengths[0]
