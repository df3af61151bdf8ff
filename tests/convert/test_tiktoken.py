"""Llama 3's tokenizer.model, and tekken.json, alone: ids as a plain loop of tiktoken's rule."""

import base64
import itertools
import json
import random

import pytest

from jaxneurons.convert import tiktoken_file
from jaxneurons.convert.split_patterns import LLAMA3, TEKKEN
from jaxneurons.convert.tiktoken_file import ranked_backend
from jaxneurons.convert.tokenizer_directory import tokenizer_from_directory
from jaxneurons.errors import SourceError

regex = pytest.importorskip("regex")  # transformers needs it

CORPUS = (
    "the cat sat on the mat with 12 cats in 2024, don't I'll we've naïve Größe 日本語 中文 한국어 "
    "🙂 def f(x): return x[1] + 10 ... --- aaaa aaaaaaa    b\n\n c\r\n\t d CamelCase McDonald"
)
BITS = [
    *CORPUS.split(" "),
    " ",
    "  ",
    "   ",
    "\n",
    "\n\n",
    "a",
    "aa",
    "-",
    "..",
    "<s>",
    "\x00",
    "é",
]


def trained(pattern, count, seed=0):
    """Byte pairs learnt from the corpus, as tiktoken trains: rank by rank, until `count`."""
    rng = random.Random(seed)
    ranks = {bytes([byte]): byte for byte in range(256)}
    text = " ".join(rng.choices(BITS, k=900))
    words = [[bytes([b]) for b in part.encode()] for part in regex.findall(pattern, text)]
    while len(ranks) < count:
        pairs = {}
        for word in words:
            for pair in itertools.pairwise(word):
                pairs[pair] = pairs.get(pair, 0) + 1
        if not pairs:
            break
        left, right = max(pairs, key=lambda pair: (pairs[pair], pair))
        ranks.setdefault(left + right, len(ranks))
        for word in words:
            at = 0
            while at < len(word) - 1:
                if (word[at], word[at + 1]) == (left, right):
                    word[at : at + 2] = [left + right]
                at += 1
    return ranks


def plain_ids(text, ranks, pattern):
    """What tiktoken does: a part that is a token, or the lowest-ranked join, leftmost first."""
    found = []
    for part in regex.findall(pattern, text):
        data = part.encode()
        symbols = [data] if data in ranks else [bytes([byte]) for byte in data]
        while True:
            joins = [ranks.get(a + b) for a, b in itertools.pairwise(symbols)]
            known = [rank for rank in joins if rank is not None]
            if not known:
                break
            at = joins.index(min(known))
            symbols[at : at + 2] = [symbols[at] + symbols[at + 1]]
        found += [ranks[symbol] for symbol in symbols]
    return found


def texts(count=300, seed=5):
    rng = random.Random(seed)
    made = ["", " ", "a" * 41, " " * 29, "-" * 17 + "." * 9, CORPUS]
    while len(made) < count:
        bits = [rng.choice(BITS) + rng.choice(["", " "]) for _ in range(rng.randint(1, 14))]
        made.append("".join(bits))
    return made


@pytest.fixture(scope="module")
def ranks():
    return {name: trained(pattern, 370) for name, pattern in PATTERNS.items()}


PATTERNS = {"Llama 3": LLAMA3, "Tekken": TEKKEN}


@pytest.mark.parametrize("name", PATTERNS)
def test_ids_are_those_of_a_plain_loop(name, ranks):
    own = ranks[name]
    assert len(own) == 370
    special = ["<one>", "<two>"]
    for first, shift in ((0, 2), (len(own), 0)):
        backend = ranked_backend(own, PATTERNS[name], special, first=first, where="here")
        for text in texts():
            ids = [index + shift for index in plain_ids(text, own, PATTERNS[name])]
            assert backend.encode(text).ids == ids, text
            assert backend.decode(ids) == text
        assert backend.encode("<two>").ids == [first + 1]
        assert backend.get_vocab_size() == len(own) + 2


def write_llama3(directory, ranks, config=None):
    lines = [f"{base64.b64encode(token).decode()} {rank}\n" for token, rank in ranks.items()]
    (directory / "tokenizer.model").write_text("".join(lines))
    if config is not None:
        (directory / "tokenizer_config.json").write_text(json.dumps(config))
    return directory


def test_llama3s_file_alone(ranks, tmp_path, monkeypatch):
    own = ranks["Llama 3"]
    with pytest.raises(SourceError, match=r"a tiktoken file of 370 tokens; only Llama 3's"):
        tokenizer_from_directory(write_llama3(tmp_path, own))
    assert tiktoken_file.LLAMA3_TOKENS == 128_000
    monkeypatch.setattr(tiktoken_file, "LLAMA3_TOKENS", 370)
    tokenizer = tokenizer_from_directory(write_llama3(tmp_path, own))
    assert len(tokenizer) == 370 + 256
    for text in texts(60):
        ids = plain_ids(text, own, LLAMA3)
        assert tokenizer(text)["input_ids"] == [370, *ids]
        assert tokenizer.decode([370, *ids], skip_special_tokens=True) == text
    named = {
        "<|begin_of_text|>": 0, "<|end_of_text|>": 1, "<|reserved_special_token_0|>": 2,
        "<|finetune_right_pad_id|>": 4, "<|reserved_special_token_2|>": 5,
        "<|start_header_id|>": 6, "<|end_header_id|>": 7, "<|eom_id|>": 8, "<|eot_id|>": 9,
        "<|python_tag|>": 10, "<|reserved_special_token_3|>": 11,
        "<|reserved_special_token_247|>": 255,
    }  # fmt: skip
    for token, index in named.items():
        assert tokenizer(f"a{token}")["input_ids"][2:] == [370 + index], token
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (370, 371)


def test_llama3s_first_release_names_other_special_tokens(ranks, tmp_path, monkeypatch):
    monkeypatch.setattr(tiktoken_file, "LLAMA3_TOKENS", 370)
    names = tiktoken_file.llama3_special_tokens()
    swapped = {4: "<|reserved_special_token_2|>", 5: "<|reserved_special_token_3|>"}
    names = [swapped.get(n, name.replace("3|>", "9999|>")) for n, name in enumerate(names)]
    decoder = {str(370 + n): {"content": name, "special": True} for n, name in enumerate(names)}
    config = {"added_tokens_decoder": decoder, "eos_token": "<|eot_id|>", "add_bos_token": False}
    tokenizer = tokenizer_from_directory(write_llama3(tmp_path, ranks["Llama 3"], config))
    assert tokenizer("<|reserved_special_token_2|>")["input_ids"] == [374]
    assert tokenizer.eos_token_id == 379


def tekken(ranks, special=None, **changes):
    """A tekken.json: more ranked tokens than are used, as published."""
    config = {"pattern": TEKKEN, "default_vocab_size": 390, "default_num_special_tokens": 30}
    vocab = [
        {"rank": rank, "token_bytes": base64.b64encode(token).decode(), "token_str": None}
        for token, rank in ranks.items()
    ]
    values = {"config": config | {"version": "v3"}, "vocab": vocab} | changes
    if special is not None:
        values["special_tokens"] = [
            {"rank": rank, "token_str": token, "is_control": True}
            for rank, token in enumerate(special)
        ]
    return values


def test_tekken_json_alone(ranks, tmp_path):
    used = {token: rank for token, rank in ranks["Tekken"].items() if rank < 360}
    (tmp_path / "tekken.json").write_text(json.dumps(tekken(ranks["Tekken"])))
    tokenizer = tokenizer_from_directory(tmp_path)
    assert len(tokenizer) == 390
    for text in texts(60):
        if "<s>" not in text:
            ids = [rank + 30 for rank in plain_ids(text, used, TEKKEN)]
            assert tokenizer(text)["input_ids"] == [1, *ids]
            assert tokenizer.decode([1, *ids], skip_special_tokens=True) == text
    assert tokenizer("[INST]")["input_ids"] == [1, 3]
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == (
        "<s>",
        "</s>",
        "<pad>",
    )
    listed = tekken(ranks["Tekken"], ["<unk>", "<s>", "</s>", "[THINK]"])
    (tmp_path / "tekken.json").write_text(json.dumps(listed))
    tokenizer = tokenizer_from_directory(tmp_path)
    assert tokenizer("[THINK]<SPECIAL_29>")["input_ids"] == [1, 3, 29]


def test_damaged_files_are_named(ranks, tmp_path, monkeypatch):
    own = ranks["Tekken"]
    for values, message in [
        ({}, "not a tekken.json"),
        (tekken(own) | {"vocab": None}, "not a tekken.json"),
        (tekken(dict(list(own.items())[:300])), "300 other tokens where config says 30 and 360"),
        (tekken(own, ["<s>", "<s>"]), "a special token is there twice"),
        (
            tekken(own) | {"config": tekken(own)["config"] | {"pattern": "("}},
            "not a regular expression",
        ),
        (tekken({b"zzz": 0} | {t: r for t, r in own.items() if r}), "lacks some of the 256 bytes"),
    ]:
        (tmp_path / "tekken.json").write_text(json.dumps(values))
        with pytest.raises(SourceError, match=message) as caught:
            tokenizer_from_directory(tmp_path)
        assert "tekken.json" in str(caught.value)
    (tmp_path / "tekken.json").unlink()
    (tmp_path / "tokenizer.model").write_text("YQ== 0\nno base64 at all\n")
    with pytest.raises(SourceError, match=r"tokenizer\.model: line 2: not a base64 token"):
        tokenizer_from_directory(tmp_path)
