"""How published byte-level tokenizers split a text before its pieces are merged.

GGUF files name the way in `tokenizer.ggml.pre`; the names are llama.cpp's, which gives several
models one pattern. tiktoken's files of Llama 3 do not name theirs, `tekken.json` writes it out.
"""

from typing import NamedTuple

LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN2 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


class Split(NamedTuple):
    """One way to split.

    Attributes:
      pattern: a regular expression whose matches are the parts; None: GPT-2's rule.
      digits: digits stand alone, before GPT-2's rule.
      ignore_merges: a part that is a token as a whole is taken whole, whatever the merges say.
      bos: a text begins with BOS where the file does not say.
      nfc: the text is put into Unicode's normal form C first.
    """

    pattern: str | None = None
    digits: bool = False
    ignore_merges: bool = False
    bos: bool = False
    nfc: bool = False


_GPT2 = Split()
_DIGITS = Split(digits=True)
_LLAMA3 = Split(LLAMA3, ignore_merges=True, bos=True)
_LLAMA3_MERGES = Split(LLAMA3)
_QWEN2 = Split(QWEN2)
_QWEN2_NFC = Split(QWEN2, nfc=True)

_NAMES = {
    _GPT2: "gpt-2 gpt2 phi-2 jina-es jina-de jina-v2-es jina-v2-de gigachat a.x-4.0 mellum "
    "modern-bert mpt olmo jais trillion granite-docling exaone4",
    _DIGITS: "smollm starcoder refact command-r codeshell exaone minerva-7b mellum2",
    _LLAMA3: "llama-bpe llama3 llama-v3 falcon3 falcon-h1 pixtral midm-2.0 lfm2 jina-v5-nano",
    _LLAMA3_MERGES: "smaug-bpe dbrx glm4 chatglm-bpe",
    _QWEN2_NFC: "qwen2 deepseek-r1-qwen kormo f2llmv2",
    _QWEN2: "megrez stablelm2 hunyuan solar-open grok-2",
    Split(TEKKEN, ignore_merges=True, bos=True): "tekken",
}
SPLITS = {name: split for split, names in _NAMES.items() for name in names.split()}
"""`tokenizer.ggml.pre` -> how the text is split. Encoders that end a text with a separator token
(jina-v1-en, jina-v2-code, roberta-bpe) are left out: no model of this library's families is one."""
