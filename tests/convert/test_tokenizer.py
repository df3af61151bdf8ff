"""Tokenizers rebuilt from GGUF metadata agree with the published ones, and decode back."""

import random
import re
import unicodedata
from itertools import pairwise

import pytest
from support.checkpoints import byte_level_vocabulary
from support.sentencepiece_files import model, number, part, piece

from jaxneurons.convert.gguf import open_gguf
from jaxneurons.convert.tokenizer import tokenizer_from_gguf
from jaxneurons.errors import SourceError

PIECES = {
    "words": ["the", "of", "and", "Paris", "don't", "I'll", "we've", "CAPITAL", "naïve", "Größe"],
    "code": ["def f(x):", "\n    return", "a[i]+=1", "//", "==", "{}", "</p>", "$x", "\\n", "_"],
    "digits": ["0", "7", "12", "2024", "3.14", "1,000", "1e-5", "0x1F", "10%"],
    "spaces": [" ", "  ", "   ", "      ", "\n", "\n\n", "\t", "\t\t", "\r\n", " \n ", "\u00a0"],
    "cjk": ["日本語", "中文字符", "한국어", "テスト", "。", "一二三"],
    "arabic": ["مرحبا", "العربية", "שלום", "हिन्दी", "ไทย"],
    "emoji": ["🙂", "👩‍👩‍👧", "🇩🇪", "❤️", "𝔘", "e\u0301", "\u200b"],
    "numerals": ["²", "½", "٣٤", "Ⅳ", "①", "०१"],
    "special": ["<|im_start|>", "<|im_end|>", "<|endoftext|>", "<empty_output>", "<|im_", "|>"],
    "marks": [*".,;:!?'\"()[]-–—…«»", "'s", "'LL"],
    "control": ["\x00", "\x07", "\x7f", "\ufeff", "\ufffd", "\u2028"],
}  # fmt: skip


def strings(count=2500, seed=0):
    rng = random.Random(seed)
    kinds = list(PIECES)
    made = ["", *(piece for pieces in PIECES.values() for piece in pieces)]
    while len(made) < count:
        chosen = rng.sample(kinds, k=rng.randint(1, 5))
        made.append(
            "".join(
                rng.choice(PIECES[rng.choice(chosen)]) + rng.choice(["", " "])
                for _ in range(rng.randint(1, 14))
            )
        )
    return made


def splits_before_digits(text):
    """The kind of string on which transformers' GGUF reading leaves the published tokenizer.

    Two white-space characters before a number, or a number that is not an ASCII digit.
    """
    return bool(re.search(r"\s\s[0-9]", text)) or any(
        unicodedata.category(c).startswith("N") and not c.isascii() for c in text
    )


@pytest.fixture(scope="module")
def metadata(smollm2_path):
    return open_gguf(smollm2_path).metadata


@pytest.fixture(scope="module")
def mine(metadata):
    return tokenizer_from_gguf(metadata)


@pytest.fixture(scope="module")
def published(smollm2_path):
    """HuggingFaceTB/SmolLM2's tokenizer.json, built of transformers' classes and gguf's reader."""
    import gguf
    from tokenizers import pre_tokenizers
    from transformers import GPT2Tokenizer

    fields = gguf.GGUFReader(smollm2_path).fields
    tokens = fields["tokenizer.ggml.tokens"].contents()
    merges = [tuple(m.split(" ")) for m in fields["tokenizer.ggml.merges"].contents()]
    tokenizer = GPT2Tokenizer(
        vocab={token: index for index, token in enumerate(tokens)},
        merges=merges,
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        unk_token="<|endoftext|>",
        pad_token="<|im_end|>",
        extra_special_tokens=tokens[:17],
    )
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    return tokenizer


@pytest.mark.smollm2
def test_agrees_with_the_published_tokenizer_everywhere(mine, published):
    texts = strings()
    assert len(texts) >= 2000
    assert sum(map(splits_before_digits, texts)) > 200
    assert mine(texts)["input_ids"] == published(texts)["input_ids"]


@pytest.mark.smollm2
def test_agrees_with_transformers_gguf_reading_but_for_its_known_defect(mine, smollm2_path):
    pytest.importorskip("torch")  # AutoTokenizer's GGUF path wants it in transformers 4
    from transformers import AutoTokenizer

    theirs = AutoTokenizer.from_pretrained(smollm2_path.parent, gguf_file=smollm2_path.name)
    texts = [text for text in strings(4000, seed=1) if not splits_before_digits(text)]
    assert len(texts) >= 2000
    assert mine(texts)["input_ids"] == theirs(texts)["input_ids"]
    for text, pieces in {
        "\n\n1": ["ĊĊ", "1"],
        "  2024": ["ĠĠ", "2", "0", "2", "4"],
        "a  1": ["a", "ĠĠ", "1"],
        "\t\t7": ["ĉĉ", "7"],
        "x ½": ["x", "Ġ", "Â½"],
    }.items():
        assert mine.tokenize(text) == pieces
        assert theirs.tokenize(text) != pieces  # when this fails, transformers has caught up


@pytest.mark.smollm2
def test_decoding_gives_the_text_back(mine):
    texts = strings()
    encoded = mine(texts)["input_ids"]
    assert mine.batch_decode(encoded) == texts


@pytest.mark.smollm2
def test_special_tokens_template_and_limits(mine, metadata):
    assert (mine.bos_token, mine.eos_token) == ("<|im_start|>", "<|im_end|>")
    assert (mine.unk_token, mine.pad_token) == ("<|endoftext|>", "<|im_end|>")
    assert len(mine) == 49152
    assert mine.model_max_length == 8192
    assert mine("Hi")["input_ids"] == mine("Hi", add_special_tokens=False)["input_ids"]
    assert mine.decode(mine("a<|im_end|>b")["input_ids"], skip_special_tokens=True) == "ab"
    pytest.importorskip("jinja2")
    chat = mine.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False)
    assert chat.endswith("<|im_start|>user\nHi<|im_end|>\n")


def test_small_byte_level_vocabulary():
    tokenizer = tokenizer_from_gguf(byte_level_vocabulary())
    assert tokenizer.tokenize("hello hello12<|end|>") == [
        *["hello", "Ġhello", "1", "2", "<|end|>"]  # digits stand alone, whatever the merges say
    ]
    assert tokenizer.decode(tokenizer("héllo\x00🙂")["input_ids"]) == "héllo\x00🙂"


@pytest.mark.parametrize(
    ("pre", "pieces"),
    [
        ("gpt-2", ["12", "3"]),
        ("llama-bpe", ["12", "3"]),
        ("qwen2", ["1", "2", "3"]),
        ("tekken", ["1", "2", "3"]),
        ("smollm", ["1", "2", "3"]),
        ("deepseek-r1-qwen", ["1", "2", "3"]),
        ("megrez", ["1", "2", "3"]),
        ("smaug-bpe", ["12", "3"]),
        ("falcon3", ["12", "3"]),
        ("refact", ["1", "2", "3"]),
        ("mellum", ["12", "3"]),
    ],
)
def test_each_pre_tokenizer_splits_numbers_its_way(pre, pieces):
    values = byte_level_vocabulary() | {
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.add_bos_token": False,
    }
    assert tokenizer_from_gguf(values).tokenize("123") == pieces


@pytest.mark.parametrize(
    ("names", "same"),
    [
        ("deepseek-r1-qwen kormo f2llmv2", "qwen2"),
        ("falcon3 falcon-h1 pixtral midm-2.0 lfm2 jina-v5-nano llama3 llama-v3", "llama-bpe"),
        ("refact command-r codeshell exaone minerva-7b mellum2 starcoder", "smollm"),
        ("phi-2 gigachat a.x-4.0 mellum mpt olmo jais trillion granite-docling exaone4", "gpt-2"),
    ],
)
def test_names_that_llama_cpp_gives_one_pattern_split_alike(names, same):
    texts = strings(300, seed=3)

    def ids(pre):
        values = byte_level_vocabulary() | {"tokenizer.ggml.pre": pre}
        return tokenizer_from_gguf(values)(texts)["input_ids"]

    wanted = ids(same)
    assert all(ids(name) == wanted for name in names.split())


def test_llama_3s_pattern_without_its_ways():
    """smaug-bpe and dbrx: no BOS unless the file says so, and merges are never passed over."""
    values = byte_level_vocabulary()
    values["tokenizer.ggml.tokens"].append("cab")  # no merge leads to it
    values["tokenizer.ggml.token_type"].append(1)
    for pre, pieces in (("llama-bpe", ["cab"]), ("smaug-bpe", ["c", "a", "b"])):
        tokenizer = tokenizer_from_gguf(values | {"tokenizer.ggml.pre": pre})
        assert tokenizer.tokenize("cab") == pieces
        assert (tokenizer("cab")["input_ids"][0] == 0) is (pre == "llama-bpe")
    for pre, whole in (("qwen2", True), ("deepseek-r1-qwen", True), ("megrez", False)):
        tokenizer = tokenizer_from_gguf(values | {"tokenizer.ggml.pre": pre})
        assert (tokenizer("e\u0301") == tokenizer("é")) is whole


@pytest.mark.parametrize("absent", [2**32 - 1, -1])
def test_an_absent_token_has_the_largest_id(absent):
    values = byte_level_vocabulary() | {
        f"tokenizer.ggml.{name}_token_id": absent for name in ("bos", "padding", "unknown")
    }
    for pre in ("smollm", "llama-bpe"):
        tokenizer = tokenizer_from_gguf(values | {"tokenizer.ggml.pre": pre})
        assert (tokenizer.bos_token, tokenizer.pad_token, tokenizer.unk_token) == (None,) * 3
        assert tokenizer.eos_token == "<|end|>"
        assert (
            tokenizer("hello")["input_ids"]
            == tokenizer("hello", add_special_tokens=False)["input_ids"]
        )
    with pytest.raises(SourceError, match="add_bos_token is set, but there is no bos token"):
        tokenizer_from_gguf(values | {"tokenizer.ggml.add_bos_token": True})


@pytest.mark.parametrize("add", [True, False])
def test_bos_and_eos_are_added_once(add):
    values = byte_level_vocabulary() | {
        "tokenizer.ggml.add_bos_token": add,
        "tokenizer.ggml.add_eos_token": add,
    }
    tokenizer = tokenizer_from_gguf(values)
    end = [0] if add else []
    bare = tokenizer("hello", add_special_tokens=False)["input_ids"]
    assert tokenizer("hello")["input_ids"] == [*end, *bare, *end]
    assert tokenizer("hello", "hello")["input_ids"] == [*end, *bare, *end, *end, *bare, *end]


def test_llama3_files_begin_with_bos_unless_they_say_otherwise():
    values = byte_level_vocabulary() | {"tokenizer.ggml.pre": "llama-bpe"}
    assert tokenizer_from_gguf(values)("h")["input_ids"][0] == 0
    values["tokenizer.ggml.add_bos_token"] = False
    assert tokenizer_from_gguf(values)("h")["input_ids"][0] != 0


def test_user_defined_tokens_are_matched_whole_but_not_special():
    values = byte_level_vocabulary()
    values["tokenizer.ggml.tokens"].append("<think>")
    values["tokenizer.ggml.token_type"].append(4)
    tokenizer = tokenizer_from_gguf(values)
    assert tokenizer.tokenize("h<think>h") == ["h", "<think>", "h"]
    assert (
        tokenizer.decode(tokenizer("<think>")["input_ids"], skip_special_tokens=True) == "<think>"
    )


def sentencepiece_vocabulary(**changes):
    """`▁`-style pieces with scores: 3 special, 256 bytes, pieces from best to worst, letters."""
    pieces = ["▁the", "▁t", "he", "▁th", "ing", "in", "▁", "▁▁", "ca", "at", "cat", "▁cat"]
    letters = sorted(set("thecatsing"))
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256)), *pieces, *letters]
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [2, 3, 3, *[6] * 256, *[1] * (len(pieces) + len(letters))],
        "tokenizer.ggml.scores": [0.0] * 259 + [-float(n) for n in range(len(tokens) - 259)],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
    } | {f"tokenizer.ggml.{key}": value for key, value in changes.items()}


def sentencepiece(text, values):
    """SentencePiece's BPE, naively: join the best-scoring adjacent pair until none is left."""
    tokens = values["tokenizer.ggml.tokens"]
    scores = dict(zip(tokens, values["tokenizer.ggml.scores"], strict=True))
    symbols = list(("▁" + text).replace(" ", "▁"))
    while True:
        joins = [(n, scores.get(a + b)) for n, (a, b) in enumerate(pairwise(symbols))]
        best = max(
            ((score, -n) for n, score in joins if score is not None),
            default=None,
        )
        if best is None:
            break
        n = -best[1]
        symbols[n : n + 2] = [symbols[n] + symbols[n + 1]]
    out = []
    for symbol in symbols:
        out += [symbol] if symbol in scores else [f"<0x{b:02X}>" for b in symbol.encode()]
    return out


def test_sentencepiece_vocabulary():
    values = sentencepiece_vocabulary()
    tokenizer = tokenizer_from_gguf(values)
    rng = random.Random(0)
    alphabet = ["the", "cat", "ing", " ", "  ", "s", "t", "é", "猫", "🙂", "\n", "1"]
    texts = ["the cat", "  the", "cat ", "é", *(
        "".join(rng.choices(alphabet, k=rng.randint(1, 9))) for _ in range(500)
    )]  # fmt: skip
    for text in texts:
        ids = tokenizer(text)["input_ids"]
        assert ids[0] == 1
        assert tokenizer.convert_ids_to_tokens(ids[1:]) == sentencepiece(text, values), text
        assert tokenizer.decode(ids, skip_special_tokens=True) == text
    assert tokenizer.tokenize("the</s>the") == ["▁the", "</s>", "▁the"]


def test_sentencepiece_without_prefix_or_bos():
    values = sentencepiece_vocabulary(add_space_prefix=False, add_bos_token=False)
    tokenizer = tokenizer_from_gguf(values)
    ids = tokenizer("the cat")["input_ids"]
    assert tokenizer.convert_ids_to_tokens(ids) == ["t", "he", "▁cat"]
    assert tokenizer.decode(ids) == "the cat"


@pytest.mark.parametrize("scores", [None, "equal", "whole numbers"])
def test_sentencepiece_without_scores_goes_by_the_order_of_the_pieces(scores):
    values = sentencepiece_vocabulary()
    count = len(values["tokenizer.ggml.tokens"])
    kinds = {"equal": [-1000.0] * count, "whole numbers": list(range(0, -count, -1)), None: None}
    own = values | {"tokenizer.ggml.scores": kinds[scores]}
    tokenizer, texts = tokenizer_from_gguf(own), ["the cat", "  thecatsing", "ing in at", "é\n"]
    assert tokenizer(texts)["input_ids"] == tokenizer_from_gguf(values)(texts)["input_ids"]
    for text in texts:
        ids = tokenizer(text)["input_ids"][1:]
        assert tokenizer.convert_ids_to_tokens(ids) == sentencepiece(text, values)


def test_sentencepiece_without_the_id_of_its_bos():
    values = sentencepiece_vocabulary(bos_token_id=None)
    assert tokenizer_from_gguf(values)("the")["input_ids"][0] == 1
    values["tokenizer.ggml.token_type"][1] = 1
    with pytest.raises(SourceError, match="there is no bos token"):
        tokenizer_from_gguf(values)


# --- Gemma: no space first, user-defined tokens of spaces, line ends and tags -----------------

RUNS = {
    "spaces": ["  " * n + after for n in range(1, 26) for after in ("a", "1", "\n", "▁", "")],
    "line ends": [mark * n + after for mark in "\n\t" for n in range(1, 40) for after in "a ▁"],
    "tags": ["<table>", "</td> <b>x</b>", " <h1> ", "<p>a", "[multimodal]", "[toxicity]"],
    "escaped": ["▁", "▁▁", "▁▁▁a", "▁a ▁", "a▁▁b", " ▁ ", "  ▁▁  ▁x"],
}


def library_of(values):
    """The sentencepiece library with the pieces of a file; it has no special tokens in a text."""
    library = pytest.importorskip("sentencepiece")
    user_defined, unknown = 4, values["tokenizer.ggml.unknown_token_id"]
    pieces = []
    columns = (values[f"tokenizer.ggml.{name}"] for name in ("tokens", "scores", "token_type"))
    for number_, (token, score, kind) in enumerate(zip(*columns, strict=True)):
        text = token.replace(" ", "▁") if kind == user_defined else token
        pieces.append(piece(text, score, 2 if number_ == unknown else kind))
    bytes_for_unknown = part(2, number(35 << 3) + number(1))
    no_space_first = part(3, number(3 << 3) + number(0))
    data = model(pieces, extra=bytes_for_unknown + no_space_first)
    return library.SentencePieceProcessor(model_proto=data)


def gemma_like():
    """Runs of spaces and line ends as llama.cpp writes them: user-defined, with real spaces."""
    values = sentencepiece_vocabulary(add_space_prefix=False)
    for token in ("  ", "   ", "    ", "\n", "\n\n", "<b>"):
        values["tokenizer.ggml.tokens"].append(token)
        values["tokenizer.ggml.token_type"].append(4)
        values["tokenizer.ggml.scores"].append(-1000.0)
    at = values["tokenizer.ggml.tokens"].index("▁▁")  # it is a user-defined one there
    for name in ("tokens", "token_type", "scores"):
        del values[f"tokenizer.ggml.{name}"][at]
    return values


def test_user_defined_runs_of_spaces():
    values = gemma_like()
    tokenizer, library = tokenizer_from_gguf(values), library_of(values)
    rng = random.Random(0)
    alphabet = ["the", "cat", " ", "  ", "   ", "s", "é", "\n", "\n\n\n", "▁", "<b>"]
    texts = [text for texts in RUNS.values() for text in texts] + [
        "".join(rng.choices(alphabet, k=rng.randint(1, 9))) for _ in range(500)
    ]
    for text in texts:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert ids == library.encode(text), text
        assert tokenizer.decode(ids) == text.replace("▁", " ")
    assert tokenizer.tokenize("the     cat") == ["t", "he", "▁▁▁▁", "▁cat"]
    assert tokenizer.tokenize("the\n\n\n<b>") == ["t", "he", "\n\n", "\n", "<b>"]


@pytest.fixture(scope="module")
def gemma3_metadata(gemma3_path):
    return open_gguf(gemma3_path).metadata


@pytest.fixture(scope="module")
def of_gemma3(gemma3_metadata):
    return tokenizer_from_gguf(gemma3_metadata)


@pytest.mark.gemma3
@pytest.mark.slow
def test_gemma3_agrees_with_the_sentencepiece_library(of_gemma3, gemma3_metadata):
    library = library_of(gemma3_metadata)
    texts = [*strings(), *(text for texts in RUNS.values() for text in texts)]
    assert len(texts) > 2500
    ids = of_gemma3(texts)["input_ids"]
    assert ids == [[2, *library.encode(text)] for text in texts]
    plain = [text for text in texts if "▁" not in text]
    assert of_gemma3.batch_decode(of_gemma3(plain, add_special_tokens=False)["input_ids"]) == plain
    names = ("bos", "eos", "unk", "pad")
    tokens = [getattr(of_gemma3, f"{name}_token") for name in names]
    assert tokens == ["<bos>", "<eos>", "<unk>", "<pad>"]
    assert (len(of_gemma3), of_gemma3.model_max_length) == (262144, 32768)
    turn = of_gemma3("<start_of_turn>user\nHi<end_of_turn>", add_special_tokens=False)["input_ids"]
    assert of_gemma3.convert_ids_to_tokens(turn)[::3] == ["<start_of_turn>", "Hi"]
    assert of_gemma3.decode(turn, skip_special_tokens=True) == "user\nHi"


@pytest.mark.gemma3
@pytest.mark.slow
def test_gemma3_agrees_with_transformers_but_for_long_runs_of_spaces(of_gemma3, gemma3_path):
    """It joins spaces in pairs where the library takes the longest token, of 31 of them."""
    pytest.importorskip("torch")
    from transformers import AutoTokenizer

    theirs = AutoTokenizer.from_pretrained(gemma3_path.parent, gguf_file=gemma3_path.name)
    texts = [*strings(), *(text for texts in RUNS.values() for text in texts)]
    same = [text for text in texts if not re.search("[ ▁]{32}", text)]
    assert len(same) > 2500
    assert of_gemma3(same)["input_ids"] == theirs(same)["input_ids"]
    text = 32 * " " + "a"
    assert of_gemma3.tokenize(text) == ["▁" * 31, "▁a"]
    assert theirs.tokenize(text) == ["▁" * 16, "▁" * 16, "a"]  # else it has caught up


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": "t5"}, "tokenizer model 't5' is not supported"),
        ({"model": None}, "tokenizer model None"),
        ({"pre": "qwen"}, r"file names the pre-tokenizer 'qwen' .* not supported; load the dir"),
        ({"pre": "default"}, "does not say how its tokenizer splits text"),
        ({"tokens": None}, "no tokenizer: tokenizer.ggml.tokens is missing"),
        ({"merges": None}, r"tokenizer\.ggml\.merges is missing"),
        ({"merges": ["no way"]}, "'no way' does not fit the tokens"),
        ({"token_type": [1]}, r"token_type has 1 of 263 values"),
        ({"bos_token_id": 10**6}, "bos_token_id = 1000000 is no token"),
        ({"tokens": ["a", "a"], "token_type": None}, "holds a token twice"),
        ({"bos_token_id": None, "add_bos_token": True}, "there is no bos token"),
    ],
)
def test_what_cannot_be_rebuilt_is_refused(changes, message):
    values = byte_level_vocabulary() | {f"tokenizer.ggml.{k}": v for k, v in changes.items()}
    with pytest.raises(SourceError, match=message):
        tokenizer_from_gguf(values, where="m.gguf")
