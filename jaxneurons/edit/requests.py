"""What is to be edited: requests, and what is odd about them among each other."""

import dataclasses
from collections.abc import Sequence

from jaxneurons.errors import DataError
from jaxneurons.storage.settings import check_argument, check_fields


@dataclasses.dataclass(frozen=True)
class EditRequest:
    """After this prompt the model is to say something else.

    Attributes:
      prompt: the text that the answer follows; holds the subject.
      subject: whose fact is edited, as it stands in the prompt.
      target: the new answer.
      ground_truth: the old one; "" if it is not known.
      paraphrases: other prompts that are to get the new answer.
      neighbours: prompts whose answers are to stay, with the answer (or "").
      portability: prompts that follow from the edit, with the answer that they should get.
      id: unique in its file.

    Raises:
      DataError: an empty text, or a subject that is not in the prompt.
      ConfigError: a field of another type.
    """

    prompt: str
    subject: str
    target: str
    ground_truth: str = ""
    paraphrases: tuple[str, ...] = ()
    neighbours: tuple[tuple[str, str], ...] = ()
    portability: tuple[tuple[str, str], ...] = ()
    id: str = ""

    def __post_init__(self) -> None:
        check_fields(self)
        for name in ("prompt", "subject", "target"):
            if not getattr(self, name).strip():
                raise DataError(f"{name} is empty; say {_NEEDED[name]}")
        if any(not text.strip() for text in self.paraphrases):
            raise DataError("paraphrases holds an empty text; leave it out")
        for name in ("neighbours", "portability"):
            if any(not text.strip() for text, _ in getattr(self, name)):
                raise DataError(f"{name} holds an empty prompt; leave it out")
        if any(not answer.strip() for _, answer in self.portability):
            raise DataError("portability holds a prompt without the answer that it should get")
        check_subject(self.prompt, self.subject)


_NEEDED = {
    "prompt": "the text that the answer is to follow",
    "subject": "whose fact is edited, as it stands in the prompt",
    "target": "what the model is to answer",
}


def check_subject(prompt: str, subject: str) -> None:
    """Raise `DataError` unless the subject stands in the prompt."""
    if subject in prompt:
        return
    at = prompt.casefold().find(subject.casefold())
    there = prompt[at : at + len(subject)] if at >= 0 else ""
    hint = (
        f"it stands there as {there!r}: write it so"
        if there.casefold() == subject.casefold()
        else "write it as it stands there"
    )
    raise DataError(f"the subject {subject!r} is not in the prompt {prompt!r}; {hint}")


@dataclasses.dataclass(frozen=True)
class KnownFact:
    """A fact that a model may know, for tracing where.

    Attributes:
      prompt: the text that the attribute follows; holds the subject.
      subject: as it stands in the prompt.
      attribute: the answer.
      id: unique in its file.

    Raises:
      DataError: an empty text, or a subject that is not in the prompt.
      ConfigError: a field of another type.
    """

    prompt: str
    subject: str
    attribute: str
    id: str = ""

    def __post_init__(self) -> None:
        check_fields(self)
        for name in ("prompt", "subject", "attribute"):
            if not getattr(self, name).strip():
                raise DataError(f"{name} is empty")
        check_subject(self.prompt, self.subject)


def check_requests(requests: Sequence[EditRequest]) -> list[str]:
    """What is odd about requests among each other, one sentence each; empty if nothing is.

    Duplicates (same prompt, subject and answer), contradictions (same prompt and subject, other
    answer), ids that are there twice, and requests for the answer that is the old one.
    """
    check_argument("requests", Sequence[EditRequest], requests)
    remarks: list[str] = []
    ids: dict[str, int] = {}
    answers: dict[tuple[str, str], dict[str, int]] = {}
    for n, request in enumerate(requests):
        if request.id and ids.setdefault(request.id, n) != n:
            remarks.append(f"requests {ids[request.id] + 1} and {n + 1} have the id {request.id!r}")
        known = answers.setdefault((_plain(request.prompt), _plain(request.subject)), {})
        target = _plain(request.target)
        where = f"after {request.prompt!r}"
        if target in known:
            first = _name(requests, known[target])
            remarks.append(f"{_name(requests, n)} is {first} once more: {request.target!r} {where}")
        elif known:
            other = next(iter(known.values()))
            remarks.append(
                f"{_name(requests, n)} contradicts {_name(requests, other)}: {request.target!r} "
                f"and {requests[other].target!r} {where}"
            )
        known.setdefault(target, n)
        if request.ground_truth and _plain(request.ground_truth) == target:
            remarks.append(
                f"{_name(requests, n)} asks for the old answer: {request.target!r} {where}"
            )
    return remarks


def _name(requests: Sequence[EditRequest], n: int) -> str:
    return f"request {requests[n].id!r}" if requests[n].id else f"request {n + 1}"


def _plain(text: str) -> str:
    return " ".join(text.split())
