"""Short texts that the model writes: what stands before a prompt when keys and values are taken.

ROME, section 3.1: "the mean over a small set of texts ending with the subject", each a few random
tokens of the model's before the prompt.
"""

from typing import TYPE_CHECKING, cast

import jax
import jax.numpy as jnp
import numpy as np

from jaxneurons.errors import DataError
from jaxneurons.model.axis_types import any_axes
from jaxneurons.model.config import ModelConfig
from jaxneurons.model.generation import NO_TOKEN, sample
from jaxneurons.model.parameters import Params
from jaxneurons.processes.sharing import fetch
from jaxneurons.prompts.answers import encode_prompt
from jaxneurons.storage.settings import check_argument, check_number

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

OPENINGS = ("The", "Therefore", "Because", "I", "You")
"""What texts begin with, as in MEMIT's published code; those that the tokenizer knows."""
ROWS = 16
"""Texts that are written at a time: one program, whatever the number of texts."""


@any_axes
def generate_prefixes(
    params: Params,
    tokenizer: "PreTrainedTokenizerBase",
    *,
    config: ModelConfig,
    count: int = 10,
    lengths: tuple[int, ...] = (5, 10),
    seed: int = 0,
) -> list[str]:
    """Texts drawn from the model, of no special tokens, with white space as single spaces.

    Args:
      params: the model's parameters.
      tokenizer: the model's.
      config: the model's shape.
      count: texts.
      lengths: of the texts in tokens, in turn, their opening word included.
      seed: the same gives the same texts.

    Raises:
      DataError: the model's logits are not finite.
      ConfigError: a number that is too small.
    """
    check_argument("config", ModelConfig, config)
    check_argument("lengths", tuple[int, ...], lengths)
    for name, number in (("count", count), ("lengths", min(lengths, default=0))):
        check_number(name, number, least=1)
    check_number("seed", seed, least=0)
    openings = _openings(tokenizer)
    length = max(map(len, openings))
    starts = np.zeros((len(openings), length), np.int32)
    for row, ids in enumerate(openings):
        starts[row, : len(ids)] = ids
    real = np.array([len(ids) for ids in openings], np.int32)
    allowed = jnp.asarray(_words(tokenizer, config.vocab_size))
    texts: list[str] = []
    for batch in range(-(-count // ROWS)):
        rows = np.arange(batch * ROWS, (batch + 1) * ROWS)
        # Lengths and openings take turns, so that every opening comes in every length.
        of_row = rows // len(lengths) % len(openings)
        tokens = _sample(
            params,
            jnp.asarray(starts[of_row]),
            jax.random.fold_in(jax.random.key(seed), batch),
            jnp.asarray(real[of_row]),
            allowed,
            config=config,
            steps=max(lengths),
        )
        for row, opening, drawn in zip(rows, of_row, fetch(tokens), strict=True):
            if row >= count:
                break
            ids = [*openings[opening], *map(int, drawn)]
            texts.append(_text(tokenizer, ids, lengths[row % len(lengths)]))
    return texts


_sample = jax.jit(
    lambda params, tokens, key, lengths, allowed, *, config, steps: sample(
        params, tokens, key, config=config, lengths=lengths, steps=steps, allowed=allowed
    ),
    static_argnames=("config", "steps"),
)


def _openings(tokenizer: "PreTrainedTokenizerBase") -> list[tuple[int, ...]]:
    """Ids of the opening words that the tokenizer knows, after its beginning token if it has one.

    A tokenizer that knows none of them begins with its beginning or end token.
    """
    unknown = tokenizer.unk_token_id
    openings = [encode_prompt(tokenizer, word) for word in OPENINGS]
    known = [ids for ids in openings if unknown is None or unknown not in ids]
    if known:
        return known
    special = [tokenizer.bos_token_id, tokenizer.eos_token_id]
    ids = [cast(int, i) for i in special if i is not None]
    return [(ids[0] if ids else 0,)]


def _words(tokenizer: "PreTrainedTokenizerBase", vocab_size: int) -> np.ndarray:
    """[vocab]: which tokens are text: no special one, and none that the tokenizer lacks."""
    allowed = np.arange(vocab_size) < len(tokenizer)
    special = [i for i in tokenizer.all_special_ids if i is not None and i < vocab_size]
    allowed[special] = False
    return allowed


def _text(tokenizer: "PreTrainedTokenizerBase", ids: list[int], length: int) -> str:
    special = set(tokenizer.all_special_ids)
    kept = [i for i in ids if i not in special][:length]
    if NO_TOKEN in kept:
        raise DataError(
            "the model's logits are not finite, so it writes no text; load it in float32, or check "
            "its weights with `jaxneurons verify`"
        )
    return " ".join(str(tokenizer.decode(kept, clean_up_tokenization_spaces=False)).split())
