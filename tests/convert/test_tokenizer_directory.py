"""tokenizer.json decides, whatever class is named: ids and text as the tokenizers library gives."""

import json

import pytest
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

from jaxneurons.convert.tokenizer_directory import tokenizer_from_directory
from jaxneurons.errors import SourceError

SPACE = "▁"
CORPUS = [
    "List:\n\n1. one\n2. two, and  three", "the cat sat on the mat with 12 cats in 2024",
    "Hello world, hello  world;   don't I'll we've", "def f(x):\n    return x[1] + 10",
    "naïve Größe 日本語 中文 e\u0301 é 🙂", "a leading space and a trailing one ", "\t\tx\r\n y",
]  # fmt: skip
TEXTS = [
    "", " ", "  ", "Hello world", " leading space", "  two", "trailing ", "List:\n\n1. one",
    "\n\n1", "a  1", "x 2024", "3.14", "\n", "\t\tx", "don't I'LL", "e\u0301 é", "日本語 中文",
    "🙂", "▁", "<s>", "<s>Hello", "Hello</s> world", "Hello</s>world", " <s> Hello", "<unk>",
    "a<|pad|>b", "the cat, hello . Hello ?", "\u00a0x", "\x00", "<0x0A>", "X" * 40,
]  # fmt: skip
CLASSES = [
    None, "", "NoSuchTokenizer", "PreTrainedTokenizerFast", "TokenizersBackend", "GPT2Tokenizer",
    "GPT2TokenizerFast", "LlamaTokenizer", "LlamaTokenizerFast", "CodeLlamaTokenizer",
    "CodeLlamaTokenizerFast", "Qwen2Tokenizer", "Qwen2TokenizerFast", "GemmaTokenizerFast",
    "GPTNeoXTokenizerFast",
]  # fmt: skip
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
NAMED = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}


def byte_level(*steps, normalizer=None, regex=False, prefix=False, whole=False):
    tokenizer = Tokenizer(models.BPE(ignore_merges=whole))
    level = pre_tokenizers.ByteLevel(add_prefix_space=prefix, use_regex=regex)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*steps, level]) if steps else level
    if normalizer:
        tokenizer.normalizer = normalizer
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<unk>", "<s>", "</s>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS * 3, trainer)
    return tokenizer


def pieces(normalizer, pre_tokenizer, *, strip=True):
    """SentencePiece-style BPE with bytes; `strip` undoes the space before the text."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=420, special_tokens=special, show_progress=False)
    tokenizer.train_from_iterator(CORPUS * 3, trainer)
    state = json.loads(tokenizer.to_str())
    state["added_tokens"] = state["added_tokens"][:3]
    tokenizer = Tokenizer.from_str(json.dumps(state))
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizer, pre_tokenizer
    undo = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*undo, decoders.Strip(" ", 1, 0)] if strip else undo)
    return begins(tokenizer)


def begins(tokenizer):
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s>:1 $B:1", special_tokens=[("<s>", 1)]
    )
    return tokenizer


def replaced(*steps):
    return normalizers.Sequence([*steps, normalizers.Replace(" ", SPACE)])


def unigram():
    scores = [("<unk>", 0.0), ("<s>", 0.0), ("</s>", 0.0), (SPACE, -2.0), (SPACE + "Hello", -3.0)]
    letters = sorted(set("".join(CORPUS)) - {" "})
    tokenizer = Tokenizer(models.Unigram([*scores, *((x, -5.0) for x in letters)], unk_id=0))
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="always")
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    return tokenizer


def split(pattern):
    return pre_tokenizers.Split(Regex(pattern), behavior="isolated")


def metaspace(scheme):
    return pieces(None, pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False))


FORMS = {
    "SmolLM2": lambda: byte_level(pre_tokenizers.Digits(individual_digits=True), regex=True),
    "GPT-2": lambda: byte_level(regex=True),
    "GPT-2 with a space put first": lambda: byte_level(regex=True, prefix=True),
    "Llama 3": lambda: begins(byte_level(split(LLAMA3), whole=True)),
    "Qwen2": lambda: byte_level(
        split(LLAMA3.replace("{1,3}", "")), normalizer=normalizers.NFC()
    ),
    "Llama 2": lambda: pieces(replaced(normalizers.Prepend(SPACE)), None),
    "no space first": lambda: pieces(replaced(), None, strip=False),
    "Metaspace first": lambda: metaspace("first"),
    "Metaspace always": lambda: metaspace("always"),
    "Metaspace never": lambda: metaspace("never"),
    "unigram": unigram,
}  # fmt: skip


@pytest.fixture(scope="module")
def built():
    return {name: form().to_str() for name, form in FORMS.items()}


def write(directory, tokenizer, settings=None, **files):
    """A directory as published: tokenizer.json and what the named class makes of it."""
    directory.mkdir(exist_ok=True)
    (directory / "tokenizer.json").write_text(tokenizer)
    if settings is not None:
        (directory / "tokenizer_config.json").write_text(json.dumps(settings))
    for name, value in files.items():
        (directory / f"{name}.json").write_text(json.dumps(value))
    return directory


def assert_as_library(tokenizer, state, texts=TEXTS):
    theirs = Tokenizer.from_str(state)
    inner, whole = json.loads(tokenizer.backend_tokenizer.to_str()), json.loads(theirs.to_str())
    assert {key: inner[key] for key in inner if key != "model"} == {
        key: whole[key] for key in whole if key not in ("model", "padding", "truncation")
    } | {"padding": None, "truncation": None}
    for text in texts:
        for special in (True, False):
            ids = theirs.encode(text, add_special_tokens=special).ids
            assert tokenizer(text, add_special_tokens=special)["input_ids"] == ids, text
            for skip in (True, False):
                said = theirs.decode(ids, skip_special_tokens=skip)
                assert tokenizer.decode(ids, skip_special_tokens=skip) == said, text
    ids = [one.ids for one in theirs.encode_batch(texts)]
    assert tokenizer(texts)["input_ids"] == ids
    assert tokenizer.get_vocab() == theirs.get_vocab()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", CLASSES)
def test_tokenizer_json_decides_whatever_class_is_named(form, kind, built, tmp_path):
    config = NAMED | ({} if kind is None else {"tokenizer_class": kind})
    tokenizer = tokenizer_from_directory(write(tmp_path, built[form], config))
    assert_as_library(tokenizer, built[form])
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id) == (1, 2, 0)
    assert sorted(tokenizer("Hello")) == ["attention_mask", "input_ids"]


def test_the_differences_that_a_class_would_make(built, tmp_path):
    """What users of published models see, written out."""

    def pieces_of(form, text):
        read = tokenizer_from_directory(
            write(tmp_path, built[form], {"tokenizer_class": "LlamaTokenizer"})
        )
        return read.tokenize(text)

    assert pieces_of("SmolLM2", "\n\n1")[-2:] == ["ĊĊ", "1"]
    assert pieces_of("Llama 2", " the") == [SPACE, SPACE + "the"]
    assert "".join(pieces_of("no space first", "Hello world")) == f"Hello{SPACE}world"
    assert pieces_of("Metaspace first", "a</s>a") == [SPACE + "a", "</s>", "a"]
    assert pieces_of("Metaspace always", "a</s>a") == [SPACE + "a", "</s>", SPACE + "a"]


@pytest.mark.parametrize(
    "settings",
    [
        {"add_prefix_space": True},
        {"add_prefix_space": False, "legacy": False},
        {"legacy": True, "from_slow": True},
        {"clean_up_tokenization_spaces": True},
        {"split_special_tokens": True},
        {"use_default_system_prompt": False, "sp_model_kwargs": {}},
        {"bos_token": {"__type": "AddedToken", "content": "<s>", "normalized": True}},
        {"bos_token": None, "pad_token": "[PAD]"},
        {"additional_special_tokens": ["</s>", "[EXTRA]", "Hello"]},
        {"extra_special_tokens": {"image_token": "<image>"}},
    ],
)
@pytest.mark.parametrize("kind", ["LlamaTokenizer", "GPT2TokenizerFast", "TokenizersBackend"])
@pytest.mark.parametrize("form", ["SmolLM2", "Llama 2"])
def test_no_setting_changes_how_text_is_split(form, kind, settings, built, tmp_path):
    config = NAMED | {"tokenizer_class": kind} | settings
    tokenizer = tokenizer_from_directory(write(tmp_path, built[form], config))
    assert_as_library(tokenizer, built[form])
    assert tokenizer.pad_token is None


def test_stored_padding_and_truncation_are_off(built, tmp_path):
    stored = Tokenizer.from_str(built["Llama 2"])
    stored.enable_padding(length=9, pad_id=0, pad_token="<unk>")
    stored.enable_truncation(3)
    for kind in (None, "LlamaTokenizerFast", "PreTrainedTokenizerFast"):
        config = NAMED | {"tokenizer_class": kind}
        tokenizer = tokenizer_from_directory(write(tmp_path, stored.to_str(), config))
        assert_as_library(tokenizer, built["Llama 2"])
        assert tokenizer.pad_token is None


@pytest.mark.parametrize("form", ["SmolLM2", "Llama 2"])
@pytest.mark.parametrize(
    ("kind", "listens"),
    [("LlamaTokenizerFast", True), ("LlamaTokenizer", True), ("PreTrainedTokenizerFast", False),
     ("GPT2Tokenizer", False), (None, False)],
)  # fmt: skip
@pytest.mark.parametrize(("bos", "eos"), [(True, False), (False, True), (False, None)])
def test_bos_and_eos_as_configured_where_the_class_listens(
    form, kind, listens, bos, eos, built, tmp_path
):
    """DeepSeek's tokenizer.json puts no BOS; its other file, of LlamaTokenizerFast, does."""
    config = NAMED | {"tokenizer_class": kind, "add_bos_token": bos}
    if eos is not None:
        config["add_eos_token"] = eos
    tokenizer = tokenizer_from_directory(write(tmp_path, built[form], config))
    library = Tokenizer.from_str(built[form])
    if not listens:
        assert_as_library(tokenizer, built[form])
        return
    for text in TEXTS:
        bare = library.encode(text, add_special_tokens=False).ids
        assert tokenizer(text)["input_ids"] == [1] * bos + bare + [2] * bool(eos), text
        assert tokenizer(text, add_special_tokens=False)["input_ids"] == bare


def test_names_come_from_the_files_then_the_configuration(built, tmp_path):
    def names(settings=None, **files):
        for old in tmp_path.iterdir():
            old.unlink()
        read = tokenizer_from_directory(write(tmp_path, built["Llama 2"], settings, **files))
        return read.bos_token, read.eos_token, read.pad_token

    assert names() == ("<s>", "</s>", None)
    assert names({"tokenizer_class": "PreTrainedTokenizerFast"}) == (None, None, None)
    ids = {"bos_token_id": 2, "eos_token_id": [1, 2], "pad_token_id": -1}
    assert names({"tokenizer_class": "TokenizersBackend"}, config=ids) == ("</s>", "<s>", None)
    mapped = {"bos_token": {"content": "</s>"}, "pad_token": "<unk>"}
    assert names({"bos_token": None}, special_tokens_map=mapped) == ("</s>", "</s>", "<unk>")
    assert names(NAMED | {"bos_token": None}) == (None, "</s>", None)


def test_tokens_that_only_the_other_files_list_are_appended(built, tmp_path):
    size = Tokenizer.from_str(built["Llama 2"]).get_vocab_size()
    config = NAMED | {"added_tokens_decoder": {
        "1": {"content": "<s>", "normalized": True, "special": True},
        str(size + 1): {"content": "<|im_end|>", "special": True},
    }}  # fmt: skip
    directory = write(tmp_path, built["Llama 2"], config, added_tokens={"<|pad|>": size})
    tokenizer = tokenizer_from_directory(directory)
    assert tokenizer("a<|pad|><|im_end|>")["input_ids"][-2:] == [size, size + 1]
    assert tokenizer.decode([size + 1, 1], skip_special_tokens=True) == ""
    plain = [text for text in TEXTS if "<|pad|>" not in text]
    library = Tokenizer.from_str(built["Llama 2"])
    assert tokenizer(plain)["input_ids"] == [one.ids for one in library.encode_batch(plain)]
    write(tmp_path, built["Llama 2"], config, added_tokens={"<|pad|>": size + 7})
    with pytest.raises(SourceError, match=rf"'<\|im_end\|>' has the id {size + 1}.*before {size};"):
        tokenizer_from_directory(tmp_path)


def test_template_length_and_side_are_kept(built, tmp_path):
    pytest.importorskip("jinja2")
    template = "{% for m in messages %}<{{ m.content }}>{% endfor %}"
    config = {"chat_template": "old", "model_max_length": 77, "padding_side": "left"}
    (tmp_path / "chat_template.jinja").write_text(template)
    tokenizer = tokenizer_from_directory(write(tmp_path, built["Qwen2"], config))
    assert (tokenizer.model_max_length, tokenizer.padding_side) == (77, "left")
    said = tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False)
    assert said == "<Hi>"


@pytest.mark.parametrize("name", ["tokenizer_config.json", "special_tokens_map.json", "vocab.json"])
def test_files_without_a_vocabulary_are_no_tokenizer(name, tmp_path):
    (tmp_path / name).write_text(json.dumps(NAMED | {"tokenizer_class": "LlamaTokenizerFast"}))
    with pytest.raises(SourceError, match=r"no tokenizer \(tokenizer.json, tokenizer.model, .*add"):
        tokenizer_from_directory(tmp_path)


@pytest.mark.parametrize("there", [True, False])
@pytest.mark.parametrize("own", [{"AutoTokenizer": ["own.Own", None]}, ["own.Own", None]])
def test_code_of_the_directory_is_refused_and_nothing_is_asked(
    there, own, built, tmp_path, monkeypatch
):
    def ask(*_):
        raise AssertionError("a question on the terminal")

    monkeypatch.setattr("builtins.input", ask)
    write(tmp_path, built["Llama 2"], {"tokenizer_class": "Own", "auto_map": own})
    ran = tmp_path / "ran"
    (tmp_path / "own.py").write_text(f"open({str(ran)!r}, 'w')\nclass Own: pass\n")
    if not there:
        (tmp_path / "tokenizer.json").unlink()
        (tmp_path / "vocab.json").write_text("{}")
        (tmp_path / "merges.txt").write_text("")
    with pytest.raises(
        SourceError, match=r"auto_map names a tokenizer class that is code .* never"
    ):
        tokenizer_from_directory(tmp_path)
    assert not ran.exists()


def test_auto_map_of_other_classes_is_no_matter(built, tmp_path):
    for own in (None, {}, {"AutoProcessor": "own.Own"}):
        config = NAMED | {"auto_map": own}
        tokenizer = tokenizer_from_directory(write(tmp_path, built["Llama 2"], config))
        assert tokenizer("Hello")["input_ids"][0] == 1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", r"tokenizer\.json:1: not valid JSON"),
        ("[]", r"tokenizer\.json"),
        ("{}", "key model is missing"),
        ('{"model": {"type": "NoSuch"}}', "damaged, or written by a newer release"),
    ],
)
def test_what_cannot_be_read_is_named_in_our_words(text, message, tmp_path):
    write(tmp_path, text)
    with pytest.raises(SourceError, match=message) as caught:
        tokenizer_from_directory(tmp_path)
    assert "enum" not in str(caught.value)
    assert "variant" not in str(caught.value)


def test_a_file_that_fails_only_in_use_is_named(built, tmp_path):
    """The library panics, which is no Exception, when BOS is put and its id is missing."""
    values = json.loads(built["Llama 2"])
    del values["post_processor"]["special_tokens"]["<s>"]
    with pytest.raises(SourceError, match=r"tokenizer\.json: the tokenizer cannot be read"):
        tokenizer_from_directory(write(tmp_path, json.dumps(values)))
    write(tmp_path, built["Llama 2"], {"chat_template": 5})
    with pytest.raises(SourceError, match="chat_template is neither text nor list"):
        tokenizer_from_directory(tmp_path)


def test_vocabulary_and_merges_without_tokenizer_json(built, tmp_path):
    Tokenizer.from_str(built["GPT-2"]).model.save(str(tmp_path))
    config = {"tokenizer_class": "GPT2Tokenizer"} | dict.fromkeys(NAMED, "<unk>")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = tokenizer_from_directory(tmp_path)
    library = Tokenizer.from_str(built["GPT-2"])
    for text in ("Hello world", " leading", "\n\n1", "日本語"):
        assert tokenizer(text)["input_ids"] == library.encode(text).ids
    (tmp_path / "merges.txt").write_text("#version: 0.2\nno such\n")
    with pytest.raises(SourceError, match=r"vocab\.json and merges\.txt; they are damaged"):
        tokenizer_from_directory(tmp_path)


def test_a_normalised_added_token_is_matched_as_the_library_does(tmp_path):
    tokenizer = pieces(replaced(normalizers.Prepend(SPACE)), None)
    tokenizer.add_tokens([AddedToken("cat sat", normalized=True, lstrip=True)])
    tokenizer.add_special_tokens([AddedToken("<|pad|>", rstrip=True, normalized=False)])
    state = tokenizer.to_str()
    read = tokenizer_from_directory(write(tmp_path, state, NAMED))
    assert_as_library(read, state, [*TEXTS, "the cat sat", "x<|pad|>  y"])
