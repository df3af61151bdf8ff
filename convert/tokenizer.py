"""Tokenizers rebuilt from the metadata of a GGUF file, as their authors published them.

Byte-level BPE ("gpt2") and SentencePiece-style BPE with scores ("llama"). transformers reads GGUF
tokenizers too, but leaves out SmolLM's digit splitting, so runs of white space before a digit come
out differently there: "\\n\\n1" is [newline-newline, 1] as published, [newline, newline, 1] there.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from jaxneurons.convert.split_patterns import SPLITS
from jaxneurons.errors import SourceError

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

_UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = 2, 3, 4, 5, 6
_SPACE = "\N{LOWER ONE EIGHTH BLOCK}"

_ABSENT = (2**32 - 1, -1)  # what some writers put for a token that there is not
_SENTENCEPIECE_BOS = 1  # where a file with such a vocabulary does not name its BOS


def tokenizer_from_gguf(
    metadata: Mapping[str, Any], *, where: str = "GGUF file"
) -> "PreTrainedTokenizerFast":
    """Build the tokenizer that a GGUF file describes.

    Control tokens become special tokens, user-defined ones plain added tokens; BOS and EOS are
    added once, by the post-processor, if the file says so; the chat template is kept.

    Args:
      metadata: of the file (`open_gguf(path).metadata`).
      where: the file, for messages.

    Raises:
      SourceError: no tokenizer, or one of a kind that cannot be rebuilt faithfully.
    """
    # Heavy (a second): only who asks for a tokenizer pays.
    from tokenizers import AddedToken, processors
    from transformers import PreTrainedTokenizerFast

    kind = metadata.get("tokenizer.ggml.model")
    tokens = _array(metadata, "tokens", str, where)
    types = _array(metadata, "token_type", int, where, length=len(tokens), optional=True)
    types = types if types is not None else [1] * len(tokens)
    if len(set(tokens)) != len(tokens):
        raise SourceError(f"{where}: tokenizer.ggml.tokens holds a token twice")
    builders: dict[Any, Callable[..., Tokenizer]] = {"gpt2": _byte_level, "llama": _sentencepiece}
    if not isinstance(kind, str) or kind not in builders:
        raise SourceError(
            f"{where}: tokenizer model {kind!r} is not supported (supported: 'gpt2', 'llama')"
        )
    escaped: set[str] = set()
    if kind == "llama" and not _space_first(metadata):
        written, tokens = tokens, _spaces_escaped(tokens, types)
        escaped = {token for token in tokens if _SPACE in token} - set(written)
    backend = builders[kind](metadata, tokens, types, where)
    for token_type, special in ((_CONTROL, True), (_USER_DEFINED, False)):
        added = [
            # Escaped spaces are looked for where those of the text are escaped too.
            AddedToken(token, special=special, normalized=not special and token in escaped)
            for token, type_ in zip(tokens, types, strict=True)
            if type_ == token_type
        ]
        (backend.add_special_tokens if special else backend.add_tokens)(added)
    if backend.get_vocab_size() != len(tokens):
        raise SourceError(f"{where}: the added tokens do not fit into the vocabulary")

    named = _named(metadata, tokens, types, kind, where)
    around = _around(metadata, kind, named, where)
    first = [named["bos_token"]] if around["bos"] else []
    last = [named["eos_token"]] if around["eos"] else []
    backend.post_processor = processors.TemplateProcessing(
        single=[*first, "$A", *last],
        pair=[*first, "$A", *last, *(f"{t}:1" for t in first), "$B:1", *(f"{t}:1" for t in last)],
        special_tokens=[(token, tokens.index(token)) for token in {*first, *last}],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        clean_up_tokenization_spaces=False,
        add_bos_token=around["bos"],
        add_eos_token=around["eos"],
        **named,
        **_template(metadata),
        **_length(metadata),
    )


def _around(
    metadata: Mapping[str, Any], kind: str, named: Mapping[str, str], where: str
) -> dict[str, bool]:
    """Whether BOS is put before a text, and EOS after it."""
    split = SPLITS.get(str(metadata.get("tokenizer.ggml.pre")))
    default = kind == "llama" or (split is not None and split.bos)
    default = default and metadata.get("tokenizer.ggml.bos_token_id") not in _ABSENT
    around = {
        "bos": bool(metadata.get("tokenizer.ggml.add_bos_token", default)),
        "eos": bool(metadata.get("tokenizer.ggml.add_eos_token", False)),
    }
    for name, added in around.items():
        if added and f"{name}_token" not in named:
            raise SourceError(f"{where}: add_{name}_token is set, but there is no {name} token")
    return around


def _named(
    metadata: Mapping[str, Any], tokens: list[str], types: list[int], kind: str, where: str
) -> dict[str, str]:
    """The tokens that the file names: {"bos_token": "<s>", ...}."""
    named: dict[str, str] = {}
    for name, key in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding")):
        index = metadata.get(f"tokenizer.ggml.{key}_token_id")
        if index is None and kind == "llama" and name == "bos":
            usual = types[_SENTENCEPIECE_BOS : _SENTENCEPIECE_BOS + 1]
            index = _SENTENCEPIECE_BOS if usual == [_CONTROL] else None
        if index is None or index in _ABSENT:
            continue
        if not (isinstance(index, int) and 0 <= index < len(tokens)):
            raise SourceError(f"{where}: tokenizer.ggml.{key}_token_id = {index!r} is no token")
        named[f"{name}_token"] = tokens[index]
    return named


def _array(
    metadata: Mapping[str, Any],
    key: str,
    kind: type | tuple[type, ...],
    where: str,
    *,
    length: int | None = None,
    optional: bool = False,
) -> Any:
    """`tokenizer.ggml.KEY`, checked to be a list of `kind` of the right length."""
    values = metadata.get(f"tokenizer.ggml.{key}")
    if values is None and optional:
        return None
    if not isinstance(values, list) or not values or not all(isinstance(v, kind) for v in values):
        raise SourceError(f"{where}: no tokenizer: tokenizer.ggml.{key} is missing or malformed")
    if length is not None and len(values) != length:
        raise SourceError(f"{where}: tokenizer.ggml.{key} has {len(values)} of {length} values")
    return values


def _template(metadata: Mapping[str, Any]) -> dict[str, Any]:
    template = metadata.get("tokenizer.chat_template")
    return {"chat_template": template} if isinstance(template, str) else {}


def _length(metadata: Mapping[str, Any]) -> dict[str, int]:
    length = metadata.get(f"{metadata.get('general.architecture')}.context_length")
    return {"model_max_length": length} if isinstance(length, int) else {}


def _merges(merges: list[str], vocab: Mapping[str, int], where: str) -> list[tuple[str, str]]:
    pairs: list[tuple[str, str]] = []
    for merge in merges:
        left, space, right = merge.partition(" ")
        if not space or left not in vocab or right not in vocab or left + right not in vocab:
            raise SourceError(f"{where}: tokenizer.ggml.merges: {merge!r} does not fit the tokens")
        pairs.append((left, right))
    return pairs


def _byte_level(
    metadata: Mapping[str, Any], tokens: list[str], types: list[int], where: str
) -> "Tokenizer":
    """GPT-2's byte-level BPE, with the pre-tokenizer that `tokenizer.ggml.pre` names."""
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

    pre = str(metadata.get("tokenizer.ggml.pre", "default"))
    if pre == "default":
        raise SourceError(
            f"{where}: the file does not say how its tokenizer splits text (tokenizer.ggml.pre); "
            "convert the model again with a current llama.cpp, or load the original directory"
        )
    if pre not in SPLITS:
        raise SourceError(
            f"{where}: the file names the pre-tokenizer {pre!r} (tokenizer.ggml.pre), which is not "
            "supported; load the directory that it was converted from"
        )
    split = SPLITS[pre]
    steps: list[Any] = []
    if split.pattern is not None:
        steps = [pre_tokenizers.Split(Regex(split.pattern), behavior="isolated")]
    elif split.digits:
        steps = [pre_tokenizers.Digits(individual_digits=True)]
    plain = split.pattern is None
    steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=plain))
    vocab = {token: index for index, token in enumerate(tokens)}
    merges = _merges(_array(metadata, "merges", str, where), vocab, where)
    backend = Tokenizer(models.BPE(vocab=vocab, merges=merges, ignore_merges=split.ignore_merges))
    if split.nfc:
        backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = pre_tokenizers.Sequence(steps)
    backend.decoder = decoders.ByteLevel()
    return backend


def _sentencepiece(
    metadata: Mapping[str, Any], tokens: list[str], types: list[int], where: str
) -> "Tokenizer":
    """SentencePiece's BPE: merges ordered by score, unknown characters as bytes.

    A space is put before the text, and before the text after every special token, whether or not
    one is there already, as SentencePiece does.
    """
    from tokenizers import Tokenizer, decoders, models, normalizers

    if metadata.get("tokenizer.ggml.precompiled_charsmap"):
        raise SourceError(f"{where}: tokenizer.ggml.precompiled_charsmap is not supported")
    vocab = {token: index for index, token in enumerate(tokens)}
    listed = _array(metadata, "merges", str, where, optional=True)
    if listed is not None:
        merges = _merges(listed, vocab, where)
    else:
        scores = _array(metadata, "scores", (float, int), where, length=len(tokens), optional=True)
        scores = None if scores is None else [float(score) for score in scores]
        merges = _merges_by_score(tokens, scores, types)
    unknown = metadata.get("tokenizer.ggml.unknown_token_id")
    if not (isinstance(unknown, int) and 0 <= unknown < len(tokens)):
        unknown = None
    backend = Tokenizer(
        models.BPE(
            vocab=vocab,
            merges=merges,
            unk_token=None if unknown is None else tokens[unknown],
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    prefix = _space_first(metadata)
    steps: list[Any] = [normalizers.Prepend(_SPACE)] if prefix else []
    backend.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", _SPACE)])
    undo = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence(
        [*undo, decoders.Strip(" ", 1, 0)] if prefix else undo  # the space that was put there
    )
    return backend


def _space_first(metadata: Mapping[str, Any]) -> bool:
    """Whether a space is put before the text."""
    return bool(metadata.get("tokenizer.ggml.add_space_prefix", True))


def _spaces_escaped(tokens: list[str], types: list[int]) -> list[str]:
    """The tokens as SentencePiece has them: llama.cpp writes user-defined ones with real spaces.

    Runs of spaces, in Gemma's vocabulary; any space of a text is escaped before they are matched.
    """
    known = set(tokens)
    escaped = [
        token.replace(" ", _SPACE) if kind == _USER_DEFINED else token
        for token, kind in zip(tokens, types, strict=True)
    ]
    return [b if b not in known else a for a, b in zip(tokens, escaped, strict=True)]


def _merges_by_score(
    tokens: list[str], scores: Sequence[float] | None, types: list[int]
) -> list[tuple[str, str]]:
    """Every way to make a token of two others, best token first.

    Tokens that text never merges into (special, user-defined, unused, bytes) take no part. Where
    scores are missing, or the same for all, the order of the tokens is theirs: SentencePiece
    writes the pieces of a BPE vocabulary from the best to the worst.
    """
    apart = {_UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE}
    rank = {
        token: index
        for index, (token, kind) in enumerate(zip(tokens, types, strict=True))
        if kind not in apart
    }
    if scores is None or len({scores[index] for index in rank.values()}) == 1:
        scores = [-float(index) for index in range(len(tokens))]
    ranked: list[tuple[float, int, int, int, str, str]] = []
    for token, index in rank.items():
        for cut in range(1, len(token)):
            left, right = token[:cut], token[cut:]
            if left in rank and right in rank:
                # Ties as transformers' converter breaks them: longer left part, longer right part.
                ranked.append((-scores[index], -cut, cut - len(token), index, left, right))
    ranked.sort()
    return [(left, right) for *_, left, right in ranked]
