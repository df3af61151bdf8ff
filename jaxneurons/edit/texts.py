"""Texts that say nothing of an edit: what keys are collected over, and what stays as it was.

Encyclopaedia-like English that ships with the package, sentences of the lab's invented world, or
samples of the model itself.
"""

from collections.abc import Sequence
from importlib import resources

import numpy as np

from jaxneurons.checkpoints.loading import LM
from jaxneurons.edit.prefixes import generate_prefixes
from jaxneurons.errors import DataError
from jaxneurons.lab.corpus import Corpus, vocabulary
from jaxneurons.lab.world import facts
from jaxneurons.model.axis_types import any_axes
from jaxneurons.prompts.answers import encode_prompt
from jaxneurons.storage.settings import check_argument, check_number

UNKNOWN = 0.05
"""Above this share of tokens that the tokenizer does not know, a text is not in its language."""
CHUNK = 128
"""Tokens of the pieces that texts are cut into: the longest context that keys are taken in."""


def neutral_text() -> list[str]:
    """Paragraphs about everything under the sun, for the second moment of keys."""
    return _paragraphs("neutral.txt")


def held_out_text() -> list[str]:
    """Paragraphs of the same kind that no covariance has seen, for measures such as perplexity."""
    return _paragraphs("neutral_held_out.txt")


def _paragraphs(name: str) -> list[str]:
    text = (resources.files("jaxneurons.data") / name).read_text(encoding="utf-8")
    return [" ".join(paragraph.split()) for paragraph in text.split("\n\n") if paragraph.strip()]


def lab_text(count: int = 2000, seed: int = 0) -> list[str]:
    """Sentences and questions of the lab's world, as its model read them in training.

    Args:
      count: texts; every second is a question with options and its letter.
      seed: the same gives the same texts.

    Raises:
      ConfigError: a number that is too small.
    """
    check_number("count", count, least=1)
    check_number("seed", seed, least=0)
    world = facts()
    vocab = vocabulary(world)
    words = {i: word for word, i in vocab.items()}
    corpus = Corpus(world, vocab, seed)
    texts: list[str] = []
    for rows in (corpus.told(-(-count // 2)), corpus.asked(-(-count // 2))):
        texts += [
            " ".join(words[i] for i in row[1:length].tolist()) + " ."
            for row, length in zip(rows.tokens, rows.lengths, strict=True)
        ]
    half = len(texts) // 2
    return [text for pair in zip(texts[:half], texts[half:], strict=True) for text in pair][:count]


@any_axes
def sample_text(lm: LM, count: int, length: int = CHUNK, seed: int = 0) -> list[str]:
    """Texts that the model writes, drawn token by token.

    Args:
      lm: the model.
      count: texts.
      length: of each in tokens.
      seed: the same gives the same texts.

    Raises:
      DataError: the model's logits are not finite.
      ConfigError: a number that is too small.
    """
    check_argument("lm", LM, lm)
    return generate_prefixes(
        lm.params, lm.tokenizer, config=lm.config, count=count, lengths=(length,), seed=seed
    )


def default_text(lm: LM, vectors: int) -> tuple[str, list[str]]:
    """What keys are collected over where no text is given, and what it is called.

    The neutral text, or sentences of the lab's world for a model that knows those words and not the
    neutral text's; then samples of the model, where that is fewer than `vectors` tokens or neither
    is in the tokenizer's language.

    Args:
      lm: the model.
      vectors: keys that are needed.
    """
    name, texts = "own samples", []
    for known, candidates in (("neutral", neutral_text()), ("lab", lab_text())):
        if _understood(lm, candidates):
            name, texts = known, candidates
            break
    length = min(CHUNK, lm.config.max_position)
    have, seed = count_vectors(lm, texts), 0
    while have < vectors and seed < 100:
        missing = -(-(vectors - have) // (length - 1))
        more = sample_text(lm, missing + missing // 8 + 1, length, seed)
        have, seed = have + count_vectors(lm, more), seed + 1
        if texts and seed == 1:
            name += " + own samples"
        texts = [*texts, *more]
    return name, texts


def _understood(lm: LM, texts: Sequence[str]) -> bool:
    """Whether the tokenizer knows (nearly) all of a text."""
    unknown = lm.tokenizer.unk_token_id
    some = [text for text in texts[:20] if text.strip()]
    known = [i != unknown for text in some for i in encode_prompt(lm.tokenizer, text)]
    return unknown is None or sum(known) >= (1 - UNKNOWN) * len(known)


def count_vectors(lm: LM, texts: Sequence[str]) -> int:
    """Keys that texts give: see `chunks`."""
    return sum(len(chunk) - 1 for chunk in chunks(lm, texts))


def chunks(lm: LM, texts: Sequence[str], *, seed: int = 0) -> list[tuple[int, ...]]:
    """Token ids of texts in pieces of at most `CHUNK` tokens, in an order drawn from a seed.

    Every piece begins with the beginning-of-sequence token, if the tokenizer puts one before a
    text. The order is drawn so that the first pieces are as good a sample as any.

    Raises:
      DataError: no text of two tokens or more.
    """
    length = min(CHUNK, lm.config.max_position)
    pieces: list[tuple[int, ...]] = []
    for text in texts:
        if not text.strip():
            continue
        ids = encode_prompt(lm.tokenizer, text)
        begin = ids[:1] if ids[0] == lm.tokenizer.bos_token_id else ()
        body, size = ids[len(begin) :], length - len(begin)
        pieces += [begin + body[start : start + size] for start in range(0, len(body), size)]
    pieces = [piece for piece in pieces if len(piece) > 1]
    if texts and not pieces:
        raise DataError("the text has no two tokens on end; give longer texts")
    order = np.random.default_rng(seed).permutation(len(pieces))
    return [pieces[i] for i in order.tolist()]
