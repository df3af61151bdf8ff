"""From text to tokens: prompts, and the answer as the model would say it right after them.

A model that reads "Response:" says " A", not "A": on a byte-level tokenizer these are different
tokens, and attributing the one it would never say is a silent error (QRNCA's public code does).
The separator is therefore decided by where the prompt ends, the tokens by the tokenizer in that
context, and `option_mass` tells how much probability the options hold.
"""

import re
import unicodedata
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal, NamedTuple

from jaxneurons.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TargetForm = Literal["context", "bare"]

LOW_OPTION_MASS = 0.5
"""Below this, the options hold less probability than everything else: the answer is in doubt."""


class TokenPrompt(NamedTuple):
    """A prompt and its answer as token ids.

    Attributes:
      prompt: ids, with the beginning-of-sequence token once if the tokenizer has one.
      answer: ids of the answer as it follows the prompt.
      options: first token of each option, the answer's included; empty for a free answer.
    """

    prompt: tuple[int, ...]
    answer: tuple[int, ...]
    options: tuple[int, ...] = ()


def encode_prompt(tokenizer: "PreTrainedTokenizerBase", text: str) -> tuple[int, ...]:
    """Ids of a prompt, with the tokenizer's beginning-of-sequence token once.

    Raises:
      DataError: the prompt is empty.
    """
    if not text.strip():
        raise DataError("the prompt is empty; write the text that the answer is to follow")
    ids = tuple(tokenizer(text)["input_ids"])  # type: ignore[arg-type]
    eos, bos = tokenizer.eos_token_id, tokenizer.bos_token_id
    if len(ids) > 1 and ids[-1] == eos and not _ends_with(text, tokenizer.eos_token):
        ids = ids[:-1]  # some tokenizers close every text; a prompt stays open
    if len(ids) > 1 and bos is not None and ids[0] == ids[1] == bos:
        ids = ids[1:]  # written in the text and added by the tokenizer
    return ids


def _ends_with(text: str, token: object) -> bool:
    return isinstance(token, str) and bool(token) and text.rstrip().endswith(token)


def separator(prompt: str) -> str:
    """What stands between a prompt and its answer: a space, or nothing.

    Nothing after white space, an opening bracket or quote, or a script that writes no spaces
    (CJK, full-width punctuation).
    """
    last = prompt[-1]
    if last.isspace() or unicodedata.category(last) in ("Ps", "Pi"):
        return ""
    if last in "\"'`" and prompt[-2:-1].isspace():
        return ""
    if unicodedata.name(last, "").startswith("HANGUL"):
        return " "  # wide, but Korean writes spaces
    return "" if unicodedata.east_asian_width(last) in ("W", "F") else " "


def encode_answer(
    tokenizer: "PreTrainedTokenizerBase", prompt: str, answer: str, *, form: TargetForm = "context"
) -> tuple[int, ...]:
    """Ids of `answer` as it follows `prompt`.

    Args:
      tokenizer: the model's.
      prompt: the text before it.
      answer: a letter, a word or a longer text, without leading space.
      form: "context" for the tokens that continue the prompt; "bare" for the text looked up by
        itself, as the public code of QRNCA does with option letters.

    Raises:
      DataError: the answer is empty, has no token of its own, or its first token would swallow the
        end of the prompt.
    """
    if not answer.strip():
        raise DataError("the answer is empty")
    if form == "bare":
        single = tokenizer.convert_tokens_to_ids(answer)
        if isinstance(single, int) and single >= 0 and single != tokenizer.unk_token_id:
            return (single,)
        return tuple(tokenizer(answer, add_special_tokens=False)["input_ids"])  # type: ignore[arg-type]
    before = encode_prompt(tokenizer, prompt)
    for between in dict.fromkeys((separator(prompt), " ", "")):
        if between and prompt[-1].isspace():
            continue  # a second space
        whole = encode_prompt(tokenizer, prompt + between + answer.strip())
        if len(whole) > len(before) and whole[: len(before)] == before:
            return whole[len(before) :]
    if prompt.endswith("\n"):  # "\n\n" may be one token at the end and two before a word
        own = tuple(tokenizer(answer.strip(), add_special_tokens=False)["input_ids"])  # type: ignore[arg-type]
        if _text(tokenizer, before + own) == _text(tokenizer, before) + answer.strip():
            return own
    raise DataError(
        f"the answer {answer!r} has no token boundary with the end of its prompt "
        f"{prompt[-20:]!r}; end the prompt at a word, without trailing space"
    )


def _text(tokenizer: "PreTrainedTokenizerBase", ids: tuple[int, ...]) -> str:
    return str(tokenizer.decode(list(ids), clean_up_tokenization_spaces=False))


def encode_query(
    tokenizer: "PreTrainedTokenizerBase",
    prompt: str,
    answer: str,
    *,
    options: Sequence[str] = (),
    form: TargetForm = "context",
    max_length: int | None = None,
) -> TokenPrompt:
    """A prompt, its answer and its options as token ids.

    Raises:
      DataError: an empty text, an answer that cannot be tokenised in its place, options that
        begin with the same token, or more tokens than `max_length`.
    """
    ids = encode_prompt(tokenizer, prompt)
    target = encode_answer(tokenizer, prompt, answer, form=form)
    if max_length is not None and len(ids) + len(target) > max_length:
        raise DataError(
            f"the prompt and its answer have {len(ids) + len(target)} tokens, the model's context "
            f"holds {max_length}; shorten the prompt"
        )
    firsts = [encode_answer(tokenizer, prompt, option, form=form)[0] for option in options]
    if len(set(firsts)) < len(firsts):
        raise DataError(
            f"the options {', '.join(options)} do not differ in their first token: this tokenizer "
            "cannot tell them apart there; ask with a free answer instead"
        )
    return TokenPrompt(ids, target, tuple(firsts))


_OPTION = re.compile(r"^\s*([A-Z])[^\S\n]*[.):](?=\s*\S)", re.MULTILINE)


def option_letters(prompt: str) -> tuple[str, ...]:
    """Option letters of a multi-choice prompt: the last run of lines that start "A.", "B.", ..."""
    letters: list[str] = []
    found: list[str] = []
    for letter in _OPTION.findall(prompt):
        if letter == "A":
            letters = ["A"]
        elif letters and ord(letter) == ord(letters[-1]) + 1:
            letters.append(letter)
        if len(letters) > 1 or not found:  # a lone "A:" after the options is no run
            found = letters
    return tuple(found)


def option_lines(prompt: str) -> tuple[str, ...]:
    """Letters of all lines that look like options, but for a lone "A:" that asks for the answer."""
    found = tuple(_OPTION.findall(prompt))
    return found[:-1] if len(found) > 1 and found[-1] == "A" else found
