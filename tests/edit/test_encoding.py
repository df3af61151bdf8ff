"""Requests as tokens: where the subject ends, on tokenizers of every kind."""

import dataclasses

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from support.fixtures import transformers_tokenizer
from support.models import tiny_config

import jaxneurons
from jaxneurons.edit import EditRequest, encode_prefixed, encode_request, encoding
from jaxneurons.errors import DataError

KINDS = ("bytes", "bytes+bos", "bytes+bos+eos", "sentencepiece", "single bytes")
CONFIG = tiny_config(vocab_size=600, max_position=128)


def text(tokenizer, ids):
    return tokenizer.decode(list(ids), clean_up_tokenization_spaces=False, skip_special_tokens=True)


def request(prompt="The capital of France is", subject="France", target="Rome", **others):
    return EditRequest(prompt, subject, target, **others)


def words_to_offset(tokenizer, ids, end):
    """By decoding alone: how many tokens it takes until the text has `end` characters."""
    return next(n for n in range(1, len(ids) + 1) if len(text(tokenizer, ids[:n])) >= end)


@pytest.mark.parametrize("kind", KINDS)
def test_the_subject_ends_where_decoding_says(kind):
    tokenizer = transformers_tokenizer(kind)
    got = encode_request(tokenizer, request(ground_truth="Paris"), config=CONFIG)
    end = len("The capital of France")
    assert got.subject_last == words_to_offset(tokenizer, got.prompt, end) - 1
    assert text(tokenizer, got.prompt[: got.subject_last + 1]) == "The capital of France"
    assert text(tokenizer, got.prompt + got.target) == "The capital of France is Rome"
    assert text(tokenizer, got.prompt + got.ground_truth) == "The capital of France is Paris"
    assert text(tokenizer, got.essence) == "France is a"
    assert text(tokenizer, got.essence[: got.essence_last + 1]) == "France"
    begins = got.prompt[0] == tokenizer.bos_token_id
    assert begins == ("bos" in kind or kind == "sentencepiece")
    assert begins == (got.essence[0] == tokenizer.bos_token_id)
    assert got.prompt[-1] != tokenizer.eos_token_id


# Without what special tokens are spelt with, and without what a decoder of SentencePiece strips.
WORDS = st.text(st.characters(categories=("Lu", "Ll", "Lo", "Nd", "So")), min_size=1, max_size=6)
PHRASES = st.lists(WORDS, min_size=1, max_size=3).map(" ".join)


@pytest.mark.parametrize("kind", KINDS)
@given(before=PHRASES | st.just(""), subject=PHRASES, after=PHRASES)
@settings(max_examples=60, deadline=None)
def test_any_subject_is_found_by_both_ways(kind, before, subject, after):
    tokenizer = transformers_tokenizer(kind)
    prompt = f"{before} {subject} {after}".strip()
    assume("▁" not in prompt and len(prompt.encode()) < 110)
    asked = request(prompt, subject, "A")
    end = prompt.rfind(subject) + len(subject)
    assume(end == len(f"{before} {subject}".strip()))
    got = encode_request(tokenizer, asked, config=dataclasses.replace(CONFIG, max_position=400))
    assert text(tokenizer, got.prompt[: got.subject_last + 1]) == prompt[:end]
    assert text(tokenizer, got.prompt[: got.subject_last]) != prompt[:end]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(encoding, "_spans", lambda *_: None)
        config = dataclasses.replace(CONFIG, max_position=400)
        assert encode_request(tokenizer, asked, config=config) == got


@pytest.mark.parametrize("kind", KINDS)
@given(
    prefix=st.lists(
        st.sampled_from(["It", "was late.", "The", "cat sat!", "Who", "?"]), max_size=8
    ).map(" ".join)
)
@settings(max_examples=30, deadline=None)
def test_a_prefix_stands_before_the_prompt(kind, prefix):
    tokenizer = transformers_tokenizer(kind)
    ids, last = encode_prefixed(tokenizer, request(), prefix, config=CONFIG)
    joined = text(tokenizer, ids)
    assert joined.endswith("The capital of France is")
    assert joined.startswith(prefix)
    between = joined.removeprefix(prefix).removesuffix("The capital of France is")
    closed = not prefix or prefix[-1] in ".!?"
    assert between == ("" if not prefix else " " if closed else ". ")
    assert text(tokenizer, ids[: last + 1]).endswith("The capital of France")
    alone = encode_request(tokenizer, request(), config=CONFIG)
    if not prefix:
        assert (ids, last) == (alone.prompt, alone.subject_last)
    assert len(ids) - last == len(alone.prompt) - alone.subject_last


def test_the_last_mention_counts_as_a_word_of_its_own():
    tokenizer = transformers_tokenizer("bytes")

    def ends(prompt, subject):
        got = encode_request(tokenizer, request(prompt, subject), config=CONFIG)
        return text(tokenizer, got.prompt[: got.subject_last + 1])

    assert ends("Rome is a city, and Rome is", "Rome") == "Rome is a city, and Rome"
    # "one" also stands at the end of "Lone", which is another word.
    assert ends("one or the Lone star", "one") == "one"
    assert ends("the capital of Italy", "Italy") == "the capital of Italy"


def shared_token():
    """A tokenizer in which "(s" of a subject's end and "'s" are single tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    pieces = [*letters, "c.", "c.'", "rk", "rks"]
    merges = [("c", "."), ("c.", "'"), ("r", "k"), ("rk", "s")]
    raw = Tokenizer(models.BPE({p: i for i, p in enumerate(pieces)}, merges))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    raw.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=raw)


@pytest.mark.parametrize("offsets", [True, False])
@pytest.mark.parametrize(
    ("prompt", "subject", "token"),
    [("Ours Inc.'s home is", "Ours Inc.", "c.'"), ("The works of", "The work", "rks")],
)
def test_a_subject_that_shares_its_last_token_is_refused(
    prompt, subject, token, offsets, monkeypatch
):
    if not offsets:
        monkeypatch.setattr(encoding, "_spans", lambda *_: None)
    tokenizer = shared_token()
    with pytest.raises(DataError, match="shares the token") as error:
        encode_request(tokenizer, request(prompt, subject, id="7"), config=CONFIG)
    assert "request '7'" in str(error.value)
    assert repr(subject) in str(error.value)
    assert token in str(error.value).replace('"', "'")
    with pytest.raises(DataError, match="shares the token"):
        encode_prefixed(tokenizer, request(prompt, subject), "So", config=CONFIG)
    apart = encode_request(tokenizer, request(f"{subject} is", subject), config=CONFIG)
    assert text(tokenizer, apart.prompt[: apart.subject_last + 1]) == subject


def test_a_token_that_begins_in_the_word_before_is_refused():
    tokenizer = shared_token()
    with pytest.raises(DataError, match="shares the token 'rks'"):
        encode_request(tokenizer, request("The works of", "s"), config=CONFIG)


def test_what_cannot_be_said_or_read():
    tokenizer = transformers_tokenizer("bytes")
    small = dataclasses.replace(CONFIG, max_position=5)
    with pytest.raises(DataError, match=r"tokens, the model's context holds 5; shorten it"):
        encode_request(tokenizer, request(), config=small)
    with pytest.raises(DataError, match="context holds 5"):
        encode_prefixed(tokenizer, request(), "It was late", config=small)
    with pytest.raises(DataError, match=r"the model's vocabulary has 48 tokens"):
        encode_request(tokenizer, request(), config=tiny_config(vocab_size=48))
    with pytest.raises(DataError, match="no token boundary"):
        encode_request(tokenizer, request("The capital of France is "), config=CONFIG)


def test_the_lab_model():
    lm = jaxneurons.load("lab")
    fact = next(fact for fact in jaxneurons.lab.facts() if fact.told)
    asked = request(f"The {fact.relation} of {fact.subject} is", fact.subject, fact.answer)
    got = encode_request(lm.tokenizer, asked, config=lm.config)
    assert lm.tokenizer.decode(got.prompt[got.subject_last]) == fact.subject
    assert text(lm.tokenizer, got.essence) == f"{fact.subject} is a"
    assert text(lm.tokenizer, got.target) == fact.answer
    with pytest.raises(DataError, match="holds text that this tokenizer does not know"):
        encode_request(
            lm.tokenizer, request("The river of Atlantis is", "Atlantis", "tea"), config=lm.config
        )
    with pytest.raises(DataError, match="does not know"):
        encode_request(
            lm.tokenizer, dataclasses.replace(asked, target="Atlantis"), config=lm.config
        )


def test_the_essence_ends_before_a_word_that_the_tokenizer_does_not_know():
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    raw = Tokenizer(models.WordLevel({"<unk>": 0, "Rome": 1, "is": 2, "old": 3}, "<unk>"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, unk_token="<unk>")
    got = encode_request(tokenizer, request("Rome is", "Rome", "old"), config=CONFIG)
    assert (got.prompt, got.essence, got.essence_last) == ((1, 2), (1, 2), 0)


def test_arguments_of_other_types(as_users_call):
    tokenizer = transformers_tokenizer("bytes")
    with pytest.raises(jaxneurons.ConfigError, match="request must be an EditRequest"):
        encode_request(tokenizer, "France", config=CONFIG)
    with pytest.raises(jaxneurons.ConfigError, match="prefix must be a string"):
        encode_prefixed(tokenizer, request(), None, config=CONFIG)
