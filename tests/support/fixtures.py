"""A tiny random Llama with a tokenizer of its own, as a Hugging Face directory; tiny queries."""

import contextlib
import functools
import json
import string
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.checkpoints import hf_tensors, tiny, write_hf
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from tokenizers.processors import TemplateProcessing

TEXT = [
    "The capital of France is Paris and the capital of Italy is Rome.",
    "Question: which option is right?\n A. one\n B. two\n C. three\n D. four\n\nResponse: A",
    "The answer is A or B or C or D. Response: B Response: C Response: D Response: A",
    "People who live in Rome speak Italian, people who live in Paris speak French.",
]
BOS, EOS = "<s>", "</s>"


def byte_level(*, bos: bool = False, eos: bool = False) -> Tokenizer:
    """Byte-level BPE; "A" and " A" are different tokens. `bos`, `eos`: what it adds to a text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=420,
        min_frequency=1,
        special_tokens=[BOS, EOS],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator([*TEXT, *(f" {letter}" * 50 for letter in "ABCDE")], trainer)
    if bos or eos:
        _template(tokenizer, bos, eos)
    return tokenizer


def single_bytes() -> Tokenizer:
    """Byte-level without merges: " A" is a space and an "A", as " 1945" is on many tokenizers."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {piece: i for i, piece in enumerate([BOS, EOS, *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([BOS, EOS])
    return tokenizer


def sentencepiece_like() -> Tokenizer:
    """As Llama 2's: a space is "▁", one is put before the text, bytes for what is not there."""
    pieces = ["<unk>", BOS, EOS, *(f"<0x{byte:02X}>" for byte in range(256))]
    pieces += ["▁", *(c for c in string.printable if not c.isspace())]
    merges = [("▁", letter) for letter in string.ascii_letters]
    merges += [("▁P", "a"), ("▁Pa", "r"), ("▁Par", "i"), ("▁Pari", "s")]
    pieces += [a + b for a, b in merges]
    tokenizer = Tokenizer(
        models.BPE(
            vocab={piece: i for i, piece in enumerate(pieces)},
            merges=merges,
            unk_token="<unk>",
            byte_fallback=True,
            fuse_unk=True,
        )
    )
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    tokenizer.add_special_tokens([BOS, EOS])
    _template(tokenizer, bos=True, eos=False)
    return tokenizer


def _template(tokenizer: Tokenizer, bos: bool, eos: bool) -> None:
    parts = [BOS] * bos + ["$A"] + [EOS] * eos
    special = [(token, tokenizer.token_to_id(token)) for token in (BOS, EOS)]
    tokenizer.post_processor = TemplateProcessing(single=" ".join(parts), special_tokens=special)


KINDS = {
    "bytes": byte_level,
    "bytes+bos": functools.partial(byte_level, bos=True),
    "bytes+bos+eos": functools.partial(byte_level, bos=True, eos=True),
    "sentencepiece": sentencepiece_like,
    "single bytes": single_bytes,
}


@functools.cache
def transformers_tokenizer(kind: str) -> Any:
    """The tokenizer as transformers wraps it."""
    from transformers import PreTrainedTokenizerFast

    special = {"unk_token": "<unk>"} if kind == "sentencepiece" else {}
    return PreTrainedTokenizerFast(
        tokenizer_object=KINDS[kind](), bos_token=BOS, eos_token=EOS, **special
    )


def write_lm(directory: Path, kind: str = "bytes", *, seed: int = 0, **changes: Any) -> Path:
    """A directory that `jaxneurons.load` reads: weights, config.json and tokenizer.json."""
    tokenizer = transformers_tokenizer(kind)
    config = tiny(**{"vocab_size": len(tokenizer), "num_hidden_layers": 3, **changes})
    write_hf(directory, config, hf_tensors(config, seed))
    tokenizer.save_pretrained(directory)
    return directory


WORDINGS = ("Question: which option is right?", "Which?", "The capital of Italy is")


def multi_choice(count: int = 4, seed_group: str = "biology") -> dict[str, Any]:
    """Queries in the published format, three wordings each."""
    records = {}
    for n in range(count):
        labels = [chr(ord("A") + (n + i) % 4) for i in range(3)]
        prompts = [
            f"{wording} {n}\n A. one\n B. two\n C. three\n D. four\n\nResponse:"
            for wording in WORDINGS
        ]
        group = seed_group if n % 2 else "physics"
        records[f"q{n}"] = {"sentences": prompts, "obj_label": labels, "relation_name": group}
    return records


def cloze(count: int = 4) -> list[dict[str, Any]]:
    """Cloze queries, of two wordings each and answers of one and of several tokens."""
    answers = ["Paris", "Rome", "Italian", "one two"]
    return [
        {
            "id": f"fact-{n}",
            "group": "capital" if n % 2 else "language",
            "prompts": [f"The capital of {n} is", f"People who live in {n} speak"],
            "answer": answers[n % 4],
        }
        for n in range(count)
    ]


def write_queries(path: Path, records: Any) -> Path:
    path.write_text(json.dumps(records, ensure_ascii=False), encoding="utf-8")
    return path


@contextlib.contextmanager
def room(size: int) -> Iterator[None]:
    """As on a full disk: the system refuses to make a file larger than so many bytes.

    Python ignores the signal that would come with it.
    """
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def located_run(*arguments, **options):
    """`locate`, with nothing said of what makes a random model's neurons doubtful."""
    from jaxneurons.qrnca.caveats import CaveatWarning
    from jaxneurons.qrnca.locating import locate

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", CaveatWarning)
        return locate(*arguments, **options)


def assert_same_outcomes(one, other):
    """All trials of two runs, bit for bit."""
    for name in ("related", "unrelated", "matched"):
        mine, theirs = getattr(one, name), getattr(other, name)
        assert mine.keys() == theirs.keys()
        for key in mine:
            for a, b in zip(mine[key], theirs[key], strict=True):
                np.testing.assert_array_equal(a, b)
