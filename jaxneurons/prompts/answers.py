"""From text to tokens: prompts, and the answer as the model would say it right after them.

A model that reads "Response:" says " A", not "A": on a byte-level tokenizer these are different
tokens, and attributing the one it would never say is a silent error (QRNCA's public code does).
What stands between the two is therefore stated by the query, or follows from where the prompt ends
(`separators`), or, where that leaves two forms, is the one that the model gives the higher
probability (`jaxneurons.qrnca.joining`). The tokens are the tokenizer's in that context; how likely
they are beside what the model would rather say is told by `option_mass` and `odds` of the results.
"""

import itertools
import re
import unicodedata
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal, NamedTuple, cast

from jaxneurons.errors import DataError
from jaxneurons.model.token_ids import check_ids
from jaxneurons.prompts.matching import SPACELESS
from jaxneurons.storage.settings import check_argument

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TargetForm = Literal["context", "bare"]

LOW_OPTION_MASS = 0.5
"""Below this, the options hold less probability than everything else: the answer is in doubt."""

LOW_ODDS = 0.01
"""Below this share of the first choice's probability the model would say something else."""


class TokenPrompt(NamedTuple):
    """A prompt and its answer as token ids.

    Attributes:
      prompt: ids, with the beginning-of-sequence token once if the tokenizer has one.
      answer: ids of the answer as it follows the prompt.
      options: ids of each option, the answer's included; empty for a free answer.
    """

    prompt: tuple[int, ...]
    answer: tuple[int, ...]
    options: tuple[tuple[int, ...], ...] = ()


def encode_prompt(tokenizer: "PreTrainedTokenizerBase", text: str) -> tuple[int, ...]:
    """Ids of a prompt, with the tokenizer's beginning-of-sequence token once.

    Once also where the text has it, as texts made by a chat template do, or has it several times.

    Raises:
      DataError: the prompt is empty.
    """
    check_argument("the prompt", str, text)
    if not text.strip():
        raise DataError("the prompt is empty; write the text that the answer is to follow")
    ids = _ids(tokenizer, text, special=True)
    eos, bos = tokenizer.eos_token_id, tokenizer.bos_token_id
    if len(ids) > 1 and ids[-1] == eos and not _ends_with(text, tokenizer.eos_token):
        ids = ids[:-1]  # some tokenizers close every text; a prompt stays open
    while len(ids) > 1 and bos is not None and ids[0] == ids[1] == bos:
        ids = ids[1:]  # written in the text and added by the tokenizer
    return ids


def _ends_with(text: str, token: object) -> bool:
    return isinstance(token, str) and bool(token) and text.rstrip().endswith(token)


_UNSPACED = (*SPACELESS, "TIBETAN", "CHAM")
"""How the names of letters begin whose scripts put no space between a prompt and what follows."""
_CLOSING = '.,;:?!…%"”»›)]}。؟،؛۔।॥·։׃።'
"""After these a space follows, unless a number goes on."""


def _unspaced(letter: str) -> bool:
    """Whether a letter is of a script without spaces, full-width punctuation included."""
    name = unicodedata.name(letter, "")
    if name.startswith("HANGUL"):
        return False  # wide, but Korean writes spaces
    return unicodedata.east_asian_width(letter) in ("W", "F") or name.startswith(_UNSPACED)


def _may_open_or_close(line: str) -> bool:
    """Whether the last mark of a line is a quotation mark that might be either.

    Opening where none is before it that it could close (`print("`, Swedish "sade ”"), closing where
    one is that opens (German and Danish: „Wort“, »ord«).
    """
    before, last = line[:-1], line[-1:]
    if last == '"':
        return before.count('"') % 2 == 0 and not before[-1:].isspace()
    if last and last in "“«‘":
        return {"“": "„", "«": "»", "‘": "‚"}[last] in before
    if last and last in "”»":
        return before[-1:].isspace() and not {"“", "„", "«"} & {*before}
    return False


def separators(prompt: str, answer: str) -> tuple[str, ...]:
    """What may stand between a prompt and its answer, the likeliest first: a space, or nothing.

    One where the texts leave no doubt. Nothing: after white space, an opening bracket or quote, or
    within a script that writes no spaces. A space: after a word or a closing mark. Both, for the
    model to decide: after any other mark or symbol ("second-", "$", "user@"), after a quotation
    mark that opens or closes (`print("`, German “), between digits or
    what may be one number ("3." and "14"), before an answer that begins with a mark, and where a
    script with spaces and one without meet.
    """
    last, first = prompt[-1], answer.lstrip()[:1]
    category = unicodedata.category(last)
    if _may_open_or_close(prompt.rpartition("\n")[2]):
        return ("", " ")
    if last.isspace() or category in ("Ps", "Pi") or (last in "\"'`" and prompt[-2:-1].isspace()):
        return ("",)
    if _unspaced(last):
        return ("",) if not first or _unspaced(first) or category[0] not in "LM" else ("", " ")
    digits = last.isdigit() or (last in ".,:" and prompt[-2:-1].isdigit())
    if digits and first.isdigit():
        return (" ", "")
    if first and (_unspaced(first) or unicodedata.category(first)[0] in "PS"):
        opening = unicodedata.category(first) in ("Ps", "Pi") or first in "\"'`"
        return (" ",) if opening and (last.isalnum() or last in _CLOSING) else (" ", "")
    if last.isalnum() or category[0] == "M" or last in _CLOSING or category in ("Pe", "Pf"):
        return (" ", "") if last == "’" else (" ",)
    dash = prompt[-2:-1].isspace() and category in ("Pd", "Sm")  # " -", " ="
    return (" ", "") if dash else ("", " ")


def encode_answer(
    tokenizer: "PreTrainedTokenizerBase",
    prompt: str,
    answer: str,
    *,
    form: TargetForm = "context",
    separator: str | None = None,
) -> tuple[int, ...]:
    """Ids of `answer` as it follows `prompt`.

    Args:
      tokenizer: the model's.
      prompt: the text before it.
      answer: a letter, a word or a longer text, without leading space.
      form: "context" for the tokens that continue the prompt; "bare" for the text looked up by
        itself, as the public code of QRNCA does with option letters.
      separator: what stands between the two; None: the likeliest that gives tokens of the answer's
        own, see `separators`.

    Raises:
      DataError: the answer is empty, has no token of its own, its first token would swallow the end
        of the prompt, or the tokenizer does not know it.
    """
    check_argument("the answer", str, answer)
    check_argument("form", TargetForm, form)
    if not answer.strip():
        raise DataError("the answer is empty")
    if form == "bare":
        single = tokenizer.convert_tokens_to_ids(answer)
        if isinstance(single, int) and single >= 0 and single != tokenizer.unk_token_id:
            return (single,)
        return _known(tokenizer, answer, _ids(tokenizer, answer))
    before = encode_prompt(tokenizer, prompt)
    likeliest = separators(prompt, answer) if separator is None else (separator,)
    for between in likeliest:
        if (ids := _continuing(tokenizer, prompt, before, between, answer.strip())) is not None:
            return _known(tokenizer, answer, ids)
    if separator is None and not prompt[-1].isspace():  # never a second space
        for between in {" ", ""} - {*likeliest}:
            ids = _continuing(tokenizer, prompt, before, between, answer.strip())
            if ids is not None:
                return _known(tokenizer, answer, ids)
    raise DataError(
        f"the answer {answer!r} has no token boundary with the end of its prompt "
        f"{prompt[-20:]!r}; end the prompt at a word, without trailing space"
    )


def _continuing(
    tokenizer: "PreTrainedTokenizerBase",
    prompt: str,
    before: tuple[int, ...],
    between: str,
    answer: str,
) -> tuple[int, ...] | None:
    """Ids that follow those of the prompt, or None where the two texts share a token."""
    whole = encode_prompt(tokenizer, prompt + between + answer)
    if len(whole) > len(before) and whole[: len(before)] == before:
        return whole[len(before) :]
    if prompt[-1].isspace() and prompt[-1] != "\n":
        return None  # a model goes on with a token that holds the space
    # The end of the prompt may be one token there and two before the answer ("\n\n", "-" + "-x"):
    # the model has read it as the prompt's, and goes on with the answer's own.
    alone = _ids(tokenizer, between + answer)
    text = _text(tokenizer, before) + between + answer
    return alone if alone and _text(tokenizer, before + alone) == text else None


def _ids(
    tokenizer: "PreTrainedTokenizerBase", text: str, *, special: bool = False
) -> tuple[int, ...]:
    """Ids of a text by itself, with or without the tokens that the tokenizer puts around it."""
    return tuple(cast("list[int]", tokenizer(text, add_special_tokens=special)["input_ids"]))


def _known(
    tokenizer: "PreTrainedTokenizerBase", answer: str, ids: tuple[int, ...]
) -> tuple[int, ...]:
    """The ids, none of which may stand for a text that the tokenizer does not know."""
    unknown = tokenizer.unk_token_id
    if unknown in ids and unknown is not None and str(tokenizer.unk_token) not in answer:
        raise DataError(
            f"the answer {answer!r} holds text that this tokenizer does not know (it becomes "
            f"{tokenizer.unk_token!r}); no neuron could be said to be about it"
        )
    return ids


def _text(tokenizer: "PreTrainedTokenizerBase", ids: tuple[int, ...]) -> str:
    return str(tokenizer.decode(list(ids), clean_up_tokenization_spaces=False))


def encode_query(
    tokenizer: "PreTrainedTokenizerBase",
    prompt: str,
    answer: str,
    *,
    options: Sequence[str] = (),
    form: TargetForm = "context",
    separator: str | None = None,
    max_length: int | None = None,
    vocab_size: int | None = None,
) -> TokenPrompt:
    """A prompt, its answer and its options as token ids.

    Args:
      tokenizer: the model's.
      prompt: the text before the answer.
      answer: the right one.
      options: all that may be chosen from; they may begin alike.
      form: as `encode_answer` takes it.
      separator: as `encode_answer` takes it.
      max_length: of prompt and answer together.
      vocab_size: rows of the model's embedding, which a tokenizer may be longer than.

    Raises:
      DataError: an empty text, an answer that cannot be tokenised in its place, options of the same
        tokens, more tokens than `max_length`, or a token id beyond `vocab_size`.
    """
    ids = encode_prompt(tokenizer, prompt)

    def encode(text: str) -> tuple[int, ...]:
        return encode_answer(tokenizer, prompt, text, form=form, separator=separator)

    target, choices = encode(answer), tuple(encode(option) for option in options)
    longest = max(map(len, (target, *choices)))
    if max_length is not None and len(ids) + longest > max_length:
        raise DataError(
            f"the prompt and its answer have {len(ids) + longest} tokens, the model's context "
            f"holds {max_length}; shorten the prompt"
        )
    if vocab_size is not None:
        for sequence in (ids, target, *choices):
            check_ids(sequence, vocab_size, tokenizer)
    if len(set(choices)) < len(choices):
        raise DataError(
            f"the options {', '.join(options)} are not told apart by this tokenizer; "
            "ask with a free answer instead"
        )
    return TokenPrompt(ids, target, choices)


def past_shared_tokens(prompt: TokenPrompt) -> TokenPrompt:
    """The same question, asked where its options part: what all begin with belongs to the prompt.

    A tokenizer that splits " A" into a space and a letter says nothing with the space.

    Raises:
      DataError: the options have more than one token of their own.
    """
    columns = zip(*prompt.options, strict=False)
    shared = sum(1 for _ in itertools.takewhile(lambda ids: len(set(ids)) == 1, columns))
    options = tuple(option[shared:] for option in prompt.options)
    if any(len(option) != 1 for option in options):
        raise DataError(
            f"this tokenizer gives options {max(map(len, options))} tokens after the "
            f"{shared} that all begin with; one that tells them apart is needed here"
        )
    return TokenPrompt(prompt.prompt + prompt.answer[:shared], prompt.answer[shared:], options)


_OPTION = re.compile(r"^\s*([A-Z])[^\S\n]*[.):](?=\s*\S)", re.MULTILINE)


def option_letters(prompt: str) -> tuple[str, ...]:
    """Option letters of a multi-choice prompt: the last run of lines that start "A.", "B.", ..."""
    letters: list[str] = []
    run: list[str] = []
    for letter in _OPTION.findall(prompt):
        if letter == "A":
            letters = ["A"]
        elif letters and ord(letter) == ord(letters[-1]) + 1:
            letters.append(letter)
        if len(letters) > 1 or not run:  # a lone "A:" after the options is no run
            run = letters
    return tuple(run)


def option_lines(prompt: str) -> tuple[str, ...]:
    """Letters of all lines that look like options, but for a lone "A:" that asks for the answer."""
    lines = tuple(_OPTION.findall(prompt))
    return lines[:-1] if len(lines) > 1 and lines[-1] == "A" else lines
