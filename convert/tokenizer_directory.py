"""The tokenizer of a directory, whatever class its `tokenizer_config.json` names.

`tokenizer.json` decides where there is one: how a text is split, and back. transformers 5 rebuilds
parts of it for classes such as GPT2Tokenizer and LlamaTokenizer, transformers 4 the space before a
text; so it is read by the `tokenizers` library, and wrapped without a change. Without it, the file
of SentencePiece, tiktoken (Llama 3) or Mistral is read. What the other files may say is which
tokens begin and end a text, its chat template and length, and tokens added after the others.
"""

import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from jaxneurons.convert.hf import CONFIG, read_json
from jaxneurons.convert.sentencepiece_model import CONTROL, SPACE, UNKNOWN, read_sentencepiece
from jaxneurons.convert.tiktoken_file import Ranked, is_ranked, read_llama3, read_tekken
from jaxneurons.errors import SourceError
from jaxneurons.storage.settings import as_path

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

_VOCABULARIES = ("tokenizer.json", "tokenizer.model", "tekken.json")
_NAMES = ("bos", "eos", "unk", "pad", "sep", "cls", "mask")
# The names a class gives where no file does; `tokenizer_class` is compared without "Fast".
_LLAMA_NAMES = {"bos": "<s>", "eos": "</s>", "unk": "<unk>"}
_END_OF_TEXT = "<|endoftext|>"
_CLASS_NAMES: dict[str | None, dict[str, str]] = {
    "LlamaTokenizer": _LLAMA_NAMES,
    "CodeLlamaTokenizer": _LLAMA_NAMES,
    "GPT2Tokenizer": dict.fromkeys(("bos", "eos", "unk"), _END_OF_TEXT),
    "Qwen2Tokenizer": dict.fromkeys(("eos", "unk", "pad"), _END_OF_TEXT),
}
# Classes that, in every release of transformers, put BOS and EOS as tokenizer_config.json says.
_PUT_AS_CONFIGURED = (
    *("LlamaTokenizer", "CodeLlamaTokenizer", "GemmaTokenizer", "CohereTokenizer"),
    "GPTNeoXTokenizer",
)
# Classes whose vocabulary is SentencePiece's as it stands; others (XLM-R, T5, ...) shift its ids.
_SENTENCEPIECE_CLASSES = (
    *(None, "LlamaTokenizer", "CodeLlamaTokenizer", "PreTrainedTokenizer", "TokenizersBackend"),
    *("PreTrainedTokenizerFast", "MistralTokenizer", "GemmaTokenizer", "SentencePieceBackend"),
)


class _Settings(NamedTuple):
    """What the files beside the vocabulary say."""

    config: dict[str, Any]  # tokenizer_config.json
    listed: dict[str, Any]  # special_tokens_map.json
    added: dict[int, dict[str, Any]]  # id to the token and its flags
    template: Any
    ids: dict[str, Any]  # config.json's bos_token_id and the like

    @property
    def kind(self) -> str | None:
        """The class named, without "Fast"."""
        name = self.config.get("tokenizer_class")
        return name.removesuffix("Fast") if isinstance(name, str) and name else None


def tokenizer_from_directory(path: str | os.PathLike[str]) -> "PreTrainedTokenizerBase":
    """The tokenizer of a Hugging Face directory; nothing in it is run.

    Args:
      path: holds `tokenizer.json`, `tokenizer.model`, `tekken.json`, or `vocab.json` with
        `merges.txt`; `tokenizer_config.json` and the like are read if there.

    Raises:
      SourceError: there is none; it is damaged; it needs code of its own (`auto_map`), or a class
        that reads its vocabulary in a way that is not known.
    """
    path = as_path("path", path)
    settings = _settings(path)
    _refuse_auto_map(path, settings.config)
    if (path / "tokenizer.json").is_file():
        return _from_json(path, settings)
    if (path / "tokenizer.model").is_file():
        if is_ranked(path / "tokenizer.model"):
            return _from_ranked(read_llama3, path / "tokenizer.model", settings)
        return _from_sentencepiece(path, settings)
    if (path / "tekken.json").is_file():
        return _from_ranked(read_tekken, path / "tekken.json", settings)
    if (path / "vocab.json").is_file() and (path / "merges.txt").is_file():
        return _from_merges(path)
    present = [name for name in ("tokenizer_config.json", "vocab.json") if (path / name).is_file()]
    beside = f" beside {' and '.join(present)}" if present else ""
    raise SourceError(
        f"{path}: no tokenizer ({', '.join(_VOCABULARIES)}, or vocab.json with merges.txt)"
        f"{beside}; add the model's tokenizer.json"
    )


def _settings(path: Path) -> _Settings:
    def read(name: str) -> dict[str, Any]:
        return read_json(path / name) if (path / name).is_file() else {}

    config, listed = read("tokenizer_config.json"), read("special_tokens_map.json")
    added: dict[int, dict[str, Any]] = {}
    for token, index in read("added_tokens.json").items():
        added[_index(index, path / "added_tokens.json")] = {"content": token}
    decoder = config.get("added_tokens_decoder") or {}
    if not isinstance(decoder, dict):
        raise SourceError(f"{path / 'tokenizer_config.json'}: added_tokens_decoder is no table")
    for index, flags in decoder.items():
        if not (isinstance(flags, dict) and isinstance(flags.get("content"), str)):
            raise SourceError(
                f"{path / 'tokenizer_config.json'}: added_tokens_decoder: {index!r} has no content"
            )
        added[_index(index, path / "tokenizer_config.json")] = flags
    template = config.get("chat_template")
    template_file = path / "chat_template.jinja"
    if template_file.is_file():
        template = template_file.read_text(encoding="utf-8")
    return _Settings(config, listed, added, _template(template, path), read(CONFIG))


def _template(value: Any, path: Path) -> Any:
    """A chat template: a text, or a list of named ones."""
    named = isinstance(value, list) and all(
        isinstance(entry, dict) and {"name", "template"} <= entry.keys() for entry in value
    )
    if value is None or isinstance(value, str) or named:
        return value or None
    raise SourceError(f"{path / 'tokenizer_config.json'}: chat_template is neither text nor list")


def _index(value: Any, where: Path) -> int:
    try:
        index = int(value)
    except (TypeError, ValueError):
        index = -1
    if index < 0:
        raise SourceError(f"{where}: {value!r} is no token id")
    return index


def _refuse_auto_map(path: Path, config: dict[str, Any]) -> None:
    code = config.get("auto_map")
    if isinstance(code, dict):
        code = code.get("AutoTokenizer")
    if code:
        raise SourceError(
            f"{path / 'tokenizer_config.json'}: auto_map names a tokenizer class that is code in "
            "the directory; such code is never run here, and what it does to a text cannot be "
            "known. If tokenizer.json describes the tokenizer in full, take auto_map out of a copy "
            "of the directory"
        )


def _from_json(path: Path, settings: _Settings) -> "PreTrainedTokenizerFast":
    from tokenizers import Tokenizer, __version__

    where = path / "tokenizer.json"
    try:
        backend = Tokenizer.from_file(str(where))
        backend.no_padding()
        backend.no_truncation()
        backend.encode("a b")  # what fails only in use
        _add_listed(backend, settings, path)
        return _wrapped(backend, settings, _around(settings), path)
    except (SourceError, KeyboardInterrupt, SystemExit):
        raise
    except BaseException:  # of the library's parser, in words about its own types; or its panic
        if not isinstance(read_json(where).get("model"), dict):
            raise SourceError(
                f"{where}: no tokenizer: the key model is missing or no table"
            ) from None
        raise SourceError(
            f"{where}: the tokenizer cannot be read: JSON, but not what tokenizers {__version__} "
            "knows as a tokenizer; it is damaged, or written by a newer release: fetch it again, "
            "or upgrade tokenizers"
        ) from None


def _add_listed(backend: "Tokenizer", settings: _Settings, path: Path) -> None:
    """Append tokens that only the other files list, at the ids that they give.

    Raises:
      SourceError: an id is not the next one.
    """
    from tokenizers import AddedToken

    for index, flags in sorted(settings.added.items()):
        token = flags["content"]
        if backend.token_to_id(token) is not None or not token:
            continue  # the vocabulary's own file decides
        size = backend.get_vocab_size()
        if index != size:
            raise SourceError(
                f"{path}: the added token {token!r} has the id {index}, but the vocabulary ends "
                f"before {size}; the tokenizer's files do not belong together: fetch them again"
            )
        matching = {key: bool(flags.get(key)) for key in ("single_word", "lstrip", "rstrip")}
        special = bool(flags.get("special", token in _named_tokens(settings)))
        added_token = AddedToken(
            token, special=special, normalized=bool(flags.get("normalized")), **matching
        )
        (backend.add_special_tokens if special else backend.add_tokens)([added_token])


def _named_tokens(settings: _Settings) -> set[str]:
    named = {_content(part.get(f"{n}_token")) for part in settings[:2] for n in _NAMES}
    extra = {_content(t) for part in settings[:2] for t in _extra(part)}
    return {token for token in named | extra if token}


def _extra(part: dict[str, Any]) -> Iterable[Any]:
    for key in ("additional_special_tokens", "extra_special_tokens"):
        if isinstance(part.get(key), list):
            yield from part[key]


def _content(value: Any) -> str | None:
    """The text of a special token, which files write bare or as a table."""
    if isinstance(value, dict):
        value = value.get("content")
    return value if isinstance(value, str) else None


def _around(settings: _Settings) -> dict[str, bool]:
    """Whether BOS and EOS are put, where a file says so and the named class listens."""
    if settings.kind not in _PUT_AS_CONFIGURED:
        return {}
    stated = {name: settings.config.get(f"add_{name}_token") for name in ("bos", "eos")}
    return {name: value for name, value in stated.items() if isinstance(value, bool)}


def _names(backend: "Tokenizer", settings: _Settings) -> dict[str, str | None]:
    """{"bos": "<s>", ...}: from the files of the tokenizer, config.json's ids, or the class."""
    first, second = settings.config, settings.listed
    if "added_tokens_decoder" not in first:  # older files: the map is the later word
        first, second = second, first
    defaults = _CLASS_NAMES.get(settings.kind, _LLAMA_NAMES if settings.kind is None else {})
    names: dict[str, str | None] = {}
    for name in _NAMES:
        key = f"{name}_token"
        token = _content(first.get(key)) or _content(second.get(key))
        if token is None and key not in first and key not in second:
            index = settings.ids.get(f"{key}_id")
            index = index[0] if isinstance(index, list) and index else index
            if isinstance(index, int) and 0 <= index < 2**31:
                token = backend.id_to_token(index)
            token = token or defaults.get(name)
        names[name] = token if token and backend.token_to_id(token) is not None else None
    return names


def _wrapped(
    backend: "Tokenizer", settings: _Settings, around: dict[str, bool], path: Path
) -> "PreTrainedTokenizerFast":
    """The tokenizer in transformers' clothes, with the backend as it is.

    The class's constructor may exchange parts of the backend and add tokens to it, so the parts
    are put back, and the tokens are named afterwards.
    """
    from transformers import PreTrainedTokenizerFast

    names = _names(backend, settings)
    _put_around(backend, names, around)
    length = settings.config.get("model_max_length")
    fits = isinstance(length, (int, float)) and length >= 1 and length is not True
    sides = {
        key: settings.config[key]
        for key in ("padding_side", "truncation_side")
        if settings.config.get(key) in ("left", "right")
    }
    added = backend.get_added_tokens_decoder().values()
    known = {token.content for token in added if token.special}
    extra = {_content(t): None for part in (settings.config, settings.listed) for t in _extra(part)}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        clean_up_tokenization_spaces=False,
        model_input_names=["input_ids", "attention_mask"],
        additional_special_tokens=[token for token in extra if token in known],
        **({"model_max_length": length} if fits else {}),
        **({"chat_template": settings.template} if settings.template else {}),
        **sides,
    )
    inner = tokenizer.backend_tokenizer
    inner.normalizer, inner.pre_tokenizer = backend.normalizer, backend.pre_tokenizer
    inner.post_processor, inner.decoder = backend.post_processor, backend.decoder
    for name, token in names.items():
        if token is not None:
            setattr(tokenizer, f"{name}_token", token)
    tokenizer.name_or_path = str(path)
    return tokenizer


def _put_around(
    backend: "Tokenizer", names: dict[str, str | None], around: dict[str, bool]
) -> None:
    """Put BOS first and EOS last, or not, where that differs from what the backend does."""
    from tokenizers import processors

    if not around:
        return
    bare = backend.encode("x", add_special_tokens=False).ids
    encoded = backend.encode("x").ids
    at = next((n for n in range(len(encoded)) if encoded[n : n + len(bare)] == bare), 0)
    present = {"bos": encoded[:at], "eos": encoded[at + len(bare) :]}
    needed = dict(present)
    for name, put in around.items():
        token = names[name]
        index = backend.token_to_id(token) if put and token else None
        needed[name] = [] if index is None else [index]
    if needed == present:
        return
    ids = {str(backend.id_to_token(index)): index for part in needed.values() for index in part}
    first, last = ([str(backend.id_to_token(index)) for index in needed[n]] for n in present)
    second = [*(f"{t}:1" for t in first), "$B:1", *(f"{t}:1" for t in last)]
    backend.post_processor = processors.TemplateProcessing(
        single=[*first, "$A", *last],
        pair=[*first, "$A", *last, *second],
        special_tokens=list(ids.items()),
    )


def _from_ranked(
    read: Callable[[Path, Mapping[int, str]], Ranked], where: Path, settings: _Settings
) -> "PreTrainedTokenizerBase":
    """Llama 3's and Mistral's own files; both models' texts begin with BOS."""
    backend, named = read(
        where, {index: flags["content"] for index, flags in settings.added.items()}
    )
    return _wrapped(backend, *_with_named(settings, named), where.parent)


def _with_named(settings: _Settings, named: Mapping[str, str]) -> tuple[_Settings, dict[str, bool]]:
    """The settings with names from the vocabulary's own file; BOS is put unless they say no."""
    named = {key: value for key, value in named.items() if key not in settings.listed}
    settings = settings._replace(config=named | settings.config)
    bos, eos = (settings.config.get(f"add_{name}_token") for name in ("bos", "eos"))
    return settings, {"bos": bos is not False, "eos": eos is True}


class _Cut:
    """A pre-tokenizer that leaves each part of a text cut into SentencePiece's pieces."""

    def __init__(self, model: Any, every: bool) -> None:
        self.model, self.every = model, every

    def pre_tokenize(self, text: Any) -> None:
        """Called by the `tokenizers` library with a text whose special tokens are set apart."""
        from tokenizers import NormalizedString

        def cut(index: int, part: Any) -> list[Any]:
            pieces = self.model.cut(str(part), prefix=self.every or index == 0)
            return [NormalizedString(piece) for piece in pieces]

        text.split(cut)


def _from_sentencepiece(path: Path, settings: _Settings) -> "PreTrainedTokenizerBase":
    """SentencePiece's file; its control pieces and <unk> are special tokens.

    A space is put before the text and, unless `legacy` is false, after every special token, as
    LlamaTokenizer does. The tokenizer cannot be pickled, copied or saved; its files can.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    where = path / "tokenizer.model"
    if settings.kind not in _SENTENCEPIECE_CLASSES:
        raise SourceError(
            f"{where}: the class {settings.config['tokenizer_class']} (tokenizer_config.json) may "
            "number the pieces in a way of its own; add the model's tokenizer.json"
        )
    model = read_sentencepiece(where)
    prefix = settings.config.get("add_prefix_space")
    if prefix is False:
        model.settings = model.settings._replace(dummy_prefix=False)
    vocab = {piece: index for index, (piece, _, _) in enumerate(model.pieces)}
    backend = Tokenizer(models.WordLevel(vocab, unk_token=model.unknown))
    undo: list[Any] = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    rules = model.settings
    if rules.dummy_prefix or rules.remove_extra_spaces:
        undo.append(decoders.Strip(" ", 1, 0))
    backend.decoder = decoders.Sequence(undo)
    special = [piece for piece, _, kind in model.pieces if kind in (CONTROL, UNKNOWN)]
    backend.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in special])
    _add_listed(backend, settings, path)
    named = {"bos_token": rules.bos, "eos_token": rules.eos, "unk_token": model.unknown}
    tokenizer = _wrapped(backend, *_with_named(settings, named), path)
    every = settings.config.get("legacy") is not False
    inner = tokenizer.backend_tokenizer
    inner.pre_tokenizer = pre_tokenizers.PreTokenizer.custom(_Cut(model, every))
    return tokenizer


def _from_merges(path: Path) -> "PreTrainedTokenizerBase":
    """vocab.json with merges.txt, by the class that tokenizer_config.json names."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(
            str(path), local_files_only=True, trust_remote_code=False
        )
    except Exception:  # transformers raises whatever its parsers raise
        raise SourceError(
            f"{path}: the tokenizer cannot be read from vocab.json and merges.txt; they are "
            "damaged, or tokenizer_config.json names a class that does not read them: add the "
            "model's tokenizer.json"
        ) from None
