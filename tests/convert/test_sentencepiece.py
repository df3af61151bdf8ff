"""tokenizer.model alone: ids and text as the sentencepiece library gives, and damaged files."""

import io
import json
import random

import pytest
from support.sentencepiece_files import model, number, part, piece

from jaxneurons.convert.sentencepiece_model import read_sentencepiece
from jaxneurons.convert.tokenizer_directory import tokenizer_from_directory
from jaxneurons.errors import SourceError

WORDS = [
    "the", "cat", "sat", "on", "a", "mat", "and", "then", "the", "cats", "were", "singing", "of",
    "naïve", "Größe", "日本語", "中文", "한국어", "हिन्दी", "ไทย", "12", "2024", "3.14", "don't",
    "I'll", "...", "---", "aaaa", "aaaaaa",
]  # fmt: skip
ODD = [
    *(" ", "  ", "   ", "\n", "\t", "\u3000", "ﬁ", "①", "Ａ", "e\u0301", "é", "🙂", "<sep>"),
    *("<0x0A>", "▁", "▁▁", "a", "aa", "--", "..", "zzz", "\u200b", "½", "\x00", "\x07", "ｶﾞ"),
]
KINDS = {
    "Llama 2": {"model_type": "bpe", "byte_fallback": True},
    "no space first": {"model_type": "bpe", "byte_fallback": True, "add_dummy_prefix": False},
    "space last": {"model_type": "bpe", "treat_whitespace_as_suffix": True},
    "unknown characters": {"model_type": "bpe"},
    "own pieces": {"model_type": "bpe", "user_defined_symbols": ["<sep>", "▁▁", "aa"]},
    "normalised": {"model_type": "bpe", "normalization_rule_name": "nmt_nfkc"},
    "spaces removed": {
        "model_type": "bpe", "normalization_rule_name": "nmt_nfkc_cf",
        "remove_extra_whitespaces": True, "byte_fallback": True,
    },
    "unigram": {"model_type": "unigram", "normalization_rule_name": "nfkc"},
    "unigram with bytes": {
        "model_type": "unigram", "byte_fallback": True, "remove_extra_whitespaces": True,
        "user_defined_symbols": ["<sep>", "▁▁"],
    },
}  # fmt: skip


def texts(count=120, seed=0):
    rng = random.Random(seed)
    made = ["", " ", "  ", *WORDS, *ODD, "a" * 37, " " * 23, "- " * 11, "the cat\nsat  "]
    while len(made) < count:
        parts = [rng.choice(WORDS + ODD) + rng.choice(["", " "]) for _ in range(rng.randint(1, 12))]
        made.append("".join(parts))
    return made


@pytest.fixture(scope="module")
def trained():
    """Kind of model -> the file that the library writes for it."""
    library = pytest.importorskip("sentencepiece")
    rng = random.Random(1)
    corpus = [" ".join(rng.choices(WORDS, k=12)) for _ in range(400)]

    def train(normalization_rule_name="identity", remove_extra_whitespaces=False, **settings):
        file = io.BytesIO()
        library.SentencePieceTrainer.train(
            sentence_iterator=iter(corpus),
            model_writer=file,
            vocab_size=340 if settings.get("byte_fallback") else 90,
            normalization_rule_name=normalization_rule_name,
            remove_extra_whitespaces=remove_extra_whitespaces,
            character_coverage=0.98,
            hard_vocab_limit=False,
            minloglevel=2,
            **settings,
        )
        return file.getvalue()

    return {name: train(**settings) for name, settings in KINDS.items()}


def library_of(data):
    import sentencepiece

    return sentencepiece.SentencePieceProcessor(model_proto=data)


def directory(path, data, config=None):
    (path / "tokenizer.model").write_bytes(data)
    if config is not None:
        (path / "tokenizer_config.json").write_text(json.dumps(config))
    return path


@pytest.mark.parametrize("kind", KINDS)
def test_ids_and_text_are_the_librarys(kind, trained, tmp_path):
    library = library_of(trained[kind])
    tokenizer = tokenizer_from_directory(directory(tmp_path, trained[kind]))
    assert len(tokenizer) == library.get_piece_size()
    assert (tokenizer.bos_token, tokenizer.eos_token) == ("<s>", "</s>")
    assert sum(library.unk_id() in library.encode(text) for text in texts()) > 10 or (
        KINDS[kind].get("byte_fallback")
    )
    for text in texts():
        ids = library.encode(text)
        assert tokenizer(text)["input_ids"] == [library.bos_id(), *ids], text
        assert tokenizer(text, add_special_tokens=False)["input_ids"] == ids, text
        if library.unk_id() not in ids and not KINDS[kind].get("remove_extra_whitespaces"):
            said = tokenizer.decode([1, *ids], skip_special_tokens=True)
            assert said == library.decode(ids), text
    batch = texts(40)
    assert tokenizer(batch)["input_ids"] == [[1, *ids] for ids in library.encode(batch)]


def test_special_tokens_part_a_text(trained, tmp_path):
    data = trained["Llama 2"]
    library = library_of(data)
    text, cut = "the cat</s> sat</s>on", ["the cat", " sat", "on"]
    tokenizer = tokenizer_from_directory(directory(tmp_path, data))
    first, second, third = (library.encode(part) for part in cut)
    assert tokenizer(text)["input_ids"] == [1, *first, 2, *second, 2, *third]
    tokenizer = tokenizer_from_directory(directory(tmp_path, data, {"legacy": False}))
    second, third = (library.encode(f"a{part}")[1:] for part in cut[1:])
    assert tokenizer.convert_ids_to_tokens(library.encode("a")) == ["▁a"]
    assert tokenizer(text)["input_ids"] == [1, *first, 2, *second, 2, *third]


def test_settings_of_the_other_files(trained, tmp_path):
    data = trained["Llama 2"]
    library = library_of(data)
    size = library.get_piece_size()
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<pad>": size}))
    config = {
        "tokenizer_class": "LlamaTokenizer", "add_bos_token": False, "add_eos_token": True,
        "pad_token": "<pad>", "bos_token": {"content": "<s>", "normalized": True},
        "added_tokens_decoder": {"0": {"content": "<unk>"}, "1": {"content": "<s>"}},
        "model_max_length": 99,
    }  # fmt: skip
    tokenizer = tokenizer_from_directory(directory(tmp_path, data, config))
    assert tokenizer("the cat<pad>")["input_ids"] == [*library.encode("the cat"), size, 2]
    assert (tokenizer.pad_token_id, tokenizer.model_max_length) == (size, 99)
    config["tokenizer_class"] = "XLMRobertaTokenizer"
    with pytest.raises(SourceError, match=r"class XLMRobertaTokenizer .* number the pieces"):
        tokenizer_from_directory(directory(tmp_path, data, config))


# --- files made here ---

SPECIAL = [piece("<unk>", 0, 2), piece("<s>", 0, 3), piece("</s>", 0, 3)]
LETTERS = [piece(letter, -50.0) for letter in "▁abcxyz"]


def test_equal_scores_go_from_the_left_and_unused_pieces_fall_apart(tmp_path):
    """What merges in an order of their own cannot say; Chinese-LLaMA's added pieces score 0."""
    own = [piece(text, 0.0) for text in ("ab", "bc", "ca", "abc", "aa", "aaa")]
    unused = [piece("xy", -1.0, 5), piece("xyz", -2.0)]
    path = tmp_path / "tokenizer.model"
    path.write_bytes(model(SPECIAL + LETTERS + own + unused))
    mine = read_sentencepiece(path)
    assert mine.cut("abca", prefix=False) == ["abc", "a"]
    assert mine.cut("bcab", prefix=False) == ["bc", "ab"]
    assert mine.cut("aaaaa", prefix=False) == ["aaa", "aa"]
    assert mine.cut("xy", prefix=False) == ["x", "y"]
    assert mine.cut("xyz", prefix=False) == ["xyz"]
    library = pytest.importorskip("sentencepiece").SentencePieceProcessor(
        model_proto=path.read_bytes()
    )
    rng = random.Random(0)
    for _ in range(300):
        text = "".join(rng.choices("abcxyz ", k=rng.randint(1, 14)))
        assert mine.cut(text) == library.encode(text, out_type=str), text


@pytest.mark.parametrize("more", [0.05, 0.15, 0.25])
def test_an_own_piece_is_worth_its_bytes_in_a_unigram_model(more, tmp_path):
    """ "aé" and "c", or "a" and a better "éc": the piece of three bytes counts 0.2."""
    own = [piece("aé", 0.0, 4), piece("a", -10), piece("éc", -10 + more), piece("c", -20)]
    path = tmp_path / "tokenizer.model"
    path.write_bytes(model(SPECIAL + own + [piece("▁", -40)], kind=1))
    cut = read_sentencepiece(path).cut("aéc", prefix=False)
    assert cut == (["aé", "c"] if more < 0.2 else ["a", "éc"])
    library = pytest.importorskip("sentencepiece")
    processor = library.SentencePieceProcessor(model_proto=path.read_bytes())
    assert read_sentencepiece(path).cut("aéc") == processor.encode("aéc", out_type=str)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "not a SentencePiece model"),
        (b"\x00\x01\x02", "not a SentencePiece model"),
        (b"version https://git-lfs.github.com/spec/v1\n", "not a SentencePiece model"),
        (model(SPECIAL + LETTERS)[:-3], "not a SentencePiece model"),
        (model(SPECIAL + LETTERS, kind=3), r"a SentencePiece model \(word\)"),
        (model(SPECIAL + LETTERS, kind=9), r"a SentencePiece model \(kind 9\)"),
        (model([*SPECIAL, *LETTERS, piece("a", 0)]), "holds a piece twice"),
        (model(LETTERS), "holds 0 unknown pieces"),
        (model(SPECIAL, extra=part(2, number(35 << 3) + number(1))), "256 byte pieces"),
        (model(SPECIAL, extra=part(3, part(2, b"\xff\xff\0\0"))), "normaliser that is cut short"),
        (model(SPECIAL, extra=part(5, part(2, b"x"))), "with a rule for decoding"),
        (model(SPECIAL, extra=part(3, number(5 << 3) + number(0))), "escape_whitespaces"),
    ],
)
def test_what_cannot_be_read_is_refused(data, message, tmp_path):
    with pytest.raises(SourceError, match=message):
        tokenizer_from_directory(directory(tmp_path, data))


def test_damaged_files_never_end_in_a_traceback(tmp_path):
    whole = model(SPECIAL + LETTERS)
    rng = random.Random(0)
    messages = []
    for _ in range(300):
        data = bytearray(whole)
        for _ in range(rng.randint(1, 3)):
            data[rng.randrange(len(data))] = rng.randrange(256)
        (tmp_path / "tokenizer.model").write_bytes(data[: rng.randint(1, len(data))])
        try:
            pieces = read_sentencepiece(tmp_path / "tokenizer.model").cut("abc xyz")
        except SourceError as error:
            messages.append(str(error))
        else:
            assert pieces
    assert 30 < len(messages) < 300
    assert all("tokenizer.model" in message for message in messages)
