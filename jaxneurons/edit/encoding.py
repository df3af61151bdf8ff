"""A request as tokens: its prompt, where its subject ends, its answers as the model would say them.

ROME, MEMIT and AlphaEdit take keys and values at the subject's last token (arXiv 2202.05262,
section 3.1), so that token is found by the tokenizer's own offsets, and a subject that shares it
with the text after it is refused: an edit there would be about another word.
"""

import dataclasses
import itertools
import unicodedata
from typing import TYPE_CHECKING, Any

from jaxneurons.edit.requests import EditRequest
from jaxneurons.errors import DataError
from jaxneurons.model.config import ModelConfig
from jaxneurons.model.token_ids import check_ids
from jaxneurons.prompts.answers import encode_answer, encode_prompt
from jaxneurons.storage.settings import check_argument

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclasses.dataclass(frozen=True)
class EncodedRequest:
    """A request as token ids.

    Attributes:
      prompt: ids, with the beginning-of-sequence token once if the tokenizer has one.
      subject_last: index in `prompt` of the subject's last token.
      target: ids of the new answer as it follows the prompt.
      ground_truth: ids of the old one; () if it is not known.
      essence: ids of "{subject} is a", after which an edit is to change nothing; without its end
        where the tokenizer does not know these words.
      essence_last: index in `essence` of the subject's last token.
    """

    prompt: tuple[int, ...]
    subject_last: int
    target: tuple[int, ...]
    ground_truth: tuple[int, ...]
    essence: tuple[int, ...]
    essence_last: int


def encode_request(
    tokenizer: "PreTrainedTokenizerBase", request: EditRequest, *, config: ModelConfig
) -> EncodedRequest:
    """A request as token ids.

    A subject that the prompt names several times is taken where it is named last (as a word of its
    own, where it is one somewhere): only there has the model read all of the prompt before it.

    Args:
      tokenizer: the model's.
      request: what is to be edited.
      config: the model's shape.

    Raises:
      DataError: the subject shares a token with the text around it or holds text that the tokenizer
        does not know, an answer cannot follow the prompt, or prompt and answer are longer than the
        model's context; names the request.
    """
    check_argument("request", EditRequest, request)
    check_argument("config", ModelConfig, config)
    try:
        return _encode_request(tokenizer, request, config)
    except DataError as error:
        raise _named(request, error) from None


def encode_prefixed(
    tokenizer: "PreTrainedTokenizerBase", request: EditRequest, prefix: str, *, config: ModelConfig
) -> tuple[tuple[int, ...], int]:
    """The prompt after another text, as ids, and the index of the subject's last token in them.

    The text is closed with a full stop, if no mark closes it, and a space. The ids of the answer
    are those of `encode_request`: the prompt ends as it did.

    Args:
      tokenizer: the model's.
      request: what is to be edited.
      prefix: the other text; "" for the prompt alone.
      config: the model's shape.

    Raises:
      DataError: as `encode_request`.
    """
    check_argument("request", EditRequest, request)
    check_argument("prefix", str, prefix)
    check_argument("config", ModelConfig, config)
    before = _closed(prefix)
    text, end = before + request.prompt, len(before) + _subject_end(request)
    try:
        ids, last = _located(tokenizer, text, end - len(request.subject), end)
        _check_room(ids, (), config)
        check_ids(ids, config.vocab_size, tokenizer)
    except DataError as error:
        raise _named(request, error) from None
    return ids, last


def _named(request: EditRequest, error: DataError) -> DataError:
    name = f"request {request.id!r}" if request.id else f"request {request.prompt[:60]!r}"
    return DataError(f"{name}: {error}")


def _encode_request(
    tokenizer: "PreTrainedTokenizerBase", request: EditRequest, config: ModelConfig
) -> EncodedRequest:
    subject, end = request.subject, _subject_end(request)
    prompt, last = _located(tokenizer, request.prompt, end - len(subject), end)
    target = encode_answer(tokenizer, request.prompt, request.target)
    truth: tuple[int, ...] = ()
    if request.ground_truth:
        truth = encode_answer(tokenizer, request.prompt, request.ground_truth)
    essence, essence_last = _located(tokenizer, f"{subject} is a", 0, len(subject))
    known = itertools.takewhile(
        lambda i: essence[i] != tokenizer.unk_token_id, range(essence_last + 1, len(essence))
    )
    essence = essence[: essence_last + 1 + len(list(known))]
    _check_room(prompt, max(target, truth, key=len), config)
    for ids in (prompt, target, truth, essence):
        check_ids(ids, config.vocab_size, tokenizer)
    return EncodedRequest(prompt, last, target, truth, essence, essence_last)


def _check_room(prompt: tuple[int, ...], answer: tuple[int, ...], config: ModelConfig) -> None:
    if (length := len(prompt) + len(answer)) > config.max_position:
        what = "the prompt and its answer have" if answer else "the prompt with its prefix has"
        raise DataError(
            f"{what} {length} tokens, the model's context holds {config.max_position}; shorten it"
        )


_CLOSED = (".", "!", "?", "…", "。", "！", "？", "।")


def _closed(prefix: str) -> str:
    """A prefix with what joins it to a prompt."""
    text = prefix.rstrip()
    if not text:
        return ""
    return f"{text} " if text.endswith(_CLOSED) else f"{text}. "


def _subject_end(request: EditRequest) -> int:
    """Where in the prompt the subject ends, in characters: see `encode_request`."""
    prompt, subject = request.prompt, request.subject
    last = first = prompt.rfind(subject)
    while first >= 0:
        end = first + len(subject)
        before, after = prompt[max(first - 1, 0) : first], prompt[end : end + 1]
        if not (
            (_is_word(before) and _is_word(subject[0]))
            or (_is_word(after) and _is_word(subject[-1]))
        ):
            return end
        first = prompt.rfind(subject, 0, end - 1)
    return last + len(subject)  # a script without spaces, or within a longer word


def _is_word(character: str) -> bool:
    return character != "" and unicodedata.category(character)[0] in "LMN"


def _located(
    tokenizer: "PreTrainedTokenizerBase", text: str, start: int, end: int
) -> tuple[tuple[int, ...], int]:
    """Ids of a text, and the index of the last token of the subject at `text[start:end]`."""
    ids, subject = encode_prompt(tokenizer, text), text[start:end]
    spans = _spans(tokenizer, text, ids)
    if spans is None:
        tokens, last = _by_prefix(tokenizer, text, start, end, ids)
    else:
        tokens = [i for i, (a, b) in enumerate(spans) if a < b and a < end and b > start]
        last = tokens[-1] if tokens else -1
        if last < 0:
            raise DataError(f"the tokenizer leaves the subject {subject!r} out of its prompt")
        if spans[last][1] > end and text[end : spans[last][1]].strip():
            _refuse(text, start, end, text[slice(*spans[last])])
        if any(map(_is_word, text[spans[last][0] : start])):
            _refuse(text, start, end, text[slice(*spans[last])])
    unknown = tokenizer.unk_token_id
    if unknown is not None and any(ids[i] == unknown for i in tokens):
        raise DataError(
            f"the subject {subject!r} holds text that this tokenizer does not know (it becomes "
            f"{tokenizer.unk_token!r}), so that the model cannot tell it from others"
        )
    return ids, last


def _refuse(text: str, start: int, end: int, token: str) -> None:
    raise DataError(
        f"the subject {text[start:end]!r} shares the token {token!r} with the text around it in "
        f"{text[max(start - 20, 0) : end + 20]!r}; give the whole word as subject, or a prompt in "
        "which it stands apart"
    )


def _spans(
    tokenizer: "PreTrainedTokenizerBase", text: str, ids: tuple[int, ...]
) -> list[tuple[int, int]] | None:
    """First and last character of each token; None for a tokenizer that does not say."""
    if not tokenizer.is_fast:
        return None
    encoded: Any = tokenizer(text, add_special_tokens=True, return_offsets_mapping=True)
    every, spans = tuple(encoded["input_ids"]), encoded["offset_mapping"]
    # `encode_prompt` leaves out beginning tokens after the first, and a closing one.
    for skipped in range(len(every) - len(ids) + 1):
        if every[skipped : skipped + len(ids)] == ids:
            return [tuple(span) for span in spans[skipped : skipped + len(ids)]]
    return None


def _by_prefix(
    tokenizer: "PreTrainedTokenizerBase", text: str, start: int, end: int, ids: tuple[int, ...]
) -> tuple[list[int], int]:
    """Indices of the subject's tokens and of the last of them, by tokens of what comes before."""
    until = encode_prompt(tokenizer, text[:end])
    if ids[: len(until)] != until:
        whole = str(tokenizer.decode(list(ids[len(until) - 1 : len(until)])))
        _refuse(text, start, end, whole)
    before = encode_prompt(tokenizer, text[:start].rstrip()) if text[:start].strip() else ()
    shared = sum(
        1
        for _ in itertools.takewhile(
            lambda both: both[0] == both[1], zip(before, ids, strict=False)
        )
    )
    return list(range(min(shared, len(until) - 1), len(until))), len(until) - 1
