"""Byte-level vocabularies as tiktoken keeps them: Llama 3's tokenizer.model and tekken.json.

Such a file ranks byte strings; the merges are implied. Each token is given the one merge by which
lower ranks build it, so the merges come in the order of the ranks, as tiktoken takes them: two
symbols that are joined within a text stand where lower ranks alone would have left them.
"""

import base64
import binascii
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from jaxneurons.convert.hf import read_json
from jaxneurons.convert.split_patterns import LLAMA3
from jaxneurons.errors import SourceError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

LLAMA3_TOKENS = 128_000  # ranked ones in Llama 3's file; 256 special tokens follow
_LLAMA3_NAMED = {
    0: "begin_of_text", 1: "end_of_text", 4: "finetune_right_pad_id", 6: "start_header_id",
    7: "end_header_id", 8: "eom_id", 9: "eot_id", 10: "python_tag",
}  # fmt: skip
# The first special tokens of a tekken.json that does not list any (up to version 7).
_TEKKEN_SPECIAL = [
    "<unk>", "<s>", "</s>", "[INST]", "[/INST]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]",
    "[TOOL_RESULTS]", "[/TOOL_RESULTS]", "[TOOL_CALLS]", "[IMG]", "<pad>", "[IMG_BREAK]",
    "[IMG_END]", "[PREFIX]", "[MIDDLE]", "[SUFFIX]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]",
    "[TOOL_CONTENT]",
]  # fmt: skip


class Ranked(NamedTuple):
    """A tokenizer and the tokens that begin and end its texts.

    Attributes:
      backend: without BOS or EOS put by itself.
      named: "bos_token" and the like to the token.
    """

    backend: "Tokenizer"
    named: dict[str, str]


def is_ranked(path: Path) -> bool:
    """Whether a `tokenizer.model` is tiktoken's: lines of base64 and a rank."""
    with path.open("rb") as file:
        first = file.readline(1000).split()
    return len(first) == 2 and first[1].isdigit()


def read_llama3(path: Path, names: Mapping[int, str] = {}) -> Ranked:
    """Llama 3's `tokenizer.model`, with the special tokens that follow its ranks.

    Args:
      path: the file.
      names: of special tokens, by id, where they differ from Llama 3.1's.

    Raises:
      SourceError: damaged, or another model's, whose rule for splitting is not known.
    """
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
        if not line.strip():
            continue
        try:
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except ValueError:
            raise SourceError(f"{path}: line {number}: not a base64 token and its rank") from None
    if len(ranks) != LLAMA3_TOKENS:
        raise SourceError(
            f"{path}: a tiktoken file of {len(ranks)} tokens; only Llama 3's ({LLAMA3_TOKENS}) is "
            "known to be split in which way; add the model's tokenizer.json"
        )
    special = _renamed(llama3_special_tokens(), names, len(ranks))
    backend = ranked_backend(ranks, LLAMA3, special, first=len(ranks), where=str(path))
    return Ranked(backend, {"bos_token": special[0], "eos_token": special[1]})


def llama3_special_tokens() -> list[str]:
    """The 256 special tokens of Llama 3.1 and later; Llama 3 calls some of them reserved."""
    names: list[str] = []
    reserved = 0
    for index in range(256):
        if index in _LLAMA3_NAMED:
            names.append(f"<|{_LLAMA3_NAMED[index]}|>")
        else:
            names.append(f"<|reserved_special_token_{reserved}|>")
            reserved += 1
    return names


def _renamed(special: Sequence[str], names: Mapping[int, str], first: int) -> list[str]:
    return [names.get(first + index, token) for index, token in enumerate(special)]


def read_tekken(path: Path, names: Mapping[int, str] = {}) -> Ranked:
    """Mistral's `tekken.json`: special tokens first, then the ranked ones.

    Args:
      path: the file.
      names: of special tokens, by id, where they differ from the file's.

    Raises:
      SourceError: damaged, or not such a file.
    """
    values = read_json(path)
    try:
        config = values["config"]
        size, reserved = config["default_vocab_size"], config["default_num_special_tokens"]
        pattern = config["pattern"]
        listed = values.get("special_tokens")
        special = list(_TEKKEN_SPECIAL)
        if listed is not None:
            special = [entry["token_str"] for entry in sorted(listed, key=lambda e: e["rank"])]
            if [entry["rank"] for entry in listed] != list(range(len(listed))):
                raise SourceError(f"{path}: the ranks of special_tokens have gaps")
        special += [f"<SPECIAL_{index}>" for index in range(len(special), reserved)]
        ranks = {
            base64.b64decode(entry["token_bytes"], validate=True): int(entry["rank"])
            for entry in values["vocab"][: size - reserved]
        }
    except (KeyError, TypeError, ValueError, AttributeError, binascii.Error):
        raise SourceError(
            f"{path}: not a tekken.json with config, vocab and special tokens; fetch it again, or "
            "add the model's tokenizer.json"
        ) from None
    if len(special) != reserved or len(ranks) != size - reserved:
        raise SourceError(
            f"{path}: {len(special)} special and {len(ranks)} other tokens where config says "
            f"{reserved} and {size - reserved}"
        )
    special = _renamed(special, names, 0)
    backend = ranked_backend(ranks, pattern, special, first=0, where=str(path))
    named = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}
    return Ranked(backend, {name: token for name, token in named.items() if token in special})


def ranked_backend(
    ranks: Mapping[bytes, int], pattern: str, special: Sequence[str], *, first: int, where: str
) -> "Tokenizer":
    """A byte-level BPE of ranked byte strings.

    Args:
      ranks: 0, 1, ... without gaps; every single byte among them.
      pattern: whose matches are merged within.
      special: tokens that are matched whole.
      first: id of the first special token: 0, before the ranked ones, or their number, after them.
      where: the file, for messages.

    Raises:
      SourceError: ranks with gaps, bytes that are missing, a special token that is there twice.
    """
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers

    if sorted(ranks.values()) != list(range(len(ranks))):
        raise SourceError(f"{where}: the ranks of the tokens have gaps or repeat")
    if any(bytes([byte]) not in ranks for byte in range(256)):
        raise SourceError(f"{where}: the vocabulary lacks some of the 256 bytes")
    if len(set(special)) != len(special):
        raise SourceError(f"{where}: a special token is there twice")
    letters = _byte_letters()
    shift = 0 if first else len(special)
    vocab = {_spell(token, letters): rank + shift for token, rank in ranks.items()}
    clashes = sorted(set(special) & vocab.keys())
    if clashes:
        raise SourceError(f"{where}: {clashes[0]!r} is a special token and an ordinary one")
    merges = [(_spell(left, letters), _spell(right, letters)) for left, right in _merges(ranks)]
    vocab |= {token: first + index for index, token in enumerate(special)}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=merges, ignore_merges=True))
    try:
        split = pre_tokenizers.Split(Regex(pattern), behavior="isolated")
    except Exception:  # the binding raises its own class's words for a bad expression
        raise SourceError(f"{where}: its pattern is not a regular expression") from None
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([split, level])
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in special])
    return backend


def _merges(ranks: Mapping[bytes, int]) -> list[tuple[bytes, bytes]]:
    """For each token of two bytes or more, the two parts that lower ranks leave of it."""
    merges: list[tuple[bytes, bytes]] = []
    for token, rank in sorted(ranks.items(), key=lambda item: item[1]):
        if len(token) > 1:
            parts = _parts(token, ranks, rank)
            if len(parts) == 2:
                merges.append((parts[0], parts[1]))
    return merges


def _parts(token: bytes, ranks: Mapping[bytes, int], below: int) -> list[bytes]:
    parts = [token[n : n + 1] for n in range(len(token))]
    while len(parts) > 2:
        joins = [ranks.get(parts[n] + parts[n + 1], below) for n in range(len(parts) - 1)]
        best = min(joins)
        if best >= below:
            break
        at = joins.index(best)
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    return parts


def _byte_letters() -> list[str]:
    """The letter that stands for each byte in a byte-level vocabulary."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in plain]
    letters = {byte: chr(byte) for byte in plain}
    letters |= {byte: chr(0x100 + index) for index, byte in enumerate(others)}
    return [letters[byte] for byte in range(256)]


def _spell(token: bytes, letters: Sequence[str]) -> str:
    return "".join(letters[byte] for byte in token)
