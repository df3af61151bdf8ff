"""From text to tokens, on byte-level and SentencePiece-like tokenizers."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.fixtures import transformers_tokenizer

from jaxneurons.errors import DataError
from jaxneurons.prompts.answers import (
    TokenPrompt,
    encode_answer,
    encode_prompt,
    encode_query,
    option_letters,
    past_shared_tokens,
    separators,
)


@pytest.fixture(params=["bytes", "bytes+bos", "bytes+bos+eos", "sentencepiece"])
def tokenizer(request):
    return transformers_tokenizer(request.param)


def pieces(tokenizer, ids):
    return tokenizer.convert_ids_to_tokens(list(ids))


def text(tokenizer, ids):
    return tokenizer.decode(list(ids), clean_up_tokenization_spaces=False)


def spaced(tokenizer):
    return "▁A" if "▁" in tokenizer.get_vocab() else "ĠA"


def published_prompts(path):
    for record in json.loads(path.read_text(encoding="utf-8")).values():
        yield from zip(record["sentences"], record["obj_label"], strict=True)


# --- the answer in its place ----------------------------------------------------------------------


def test_after_a_colon_the_answer_has_a_space(tokenizer):
    ids = encode_answer(tokenizer, "Response:", "A")
    assert pieces(tokenizer, ids) == [spaced(tokenizer)]
    assert ids != encode_answer(tokenizer, "Response:", "A", form="bare")


@pytest.mark.parametrize("end", ["\n", "\n\n", "\t", ' "', " (", "“", "：", "答", "「"])
def test_after_white_space_open_brackets_and_wide_text_it_has_none(tokenizer, end):
    prompt = "Response" + end
    before, ids = encode_prompt(tokenizer, prompt), encode_answer(tokenizer, prompt, "A")
    assert pieces(tokenizer, ids) == ["A"]
    assert text(tokenizer, before + ids).endswith(prompt + "A")


@pytest.mark.parametrize(
    "end", [".", "?", "a", "7", ")", "”", 's "x"', "« x »", "서울은", "é", "ل", *"؟،؛۔।॥·։׃።"]
)
def test_after_words_and_closing_marks_it_has_a_space(end):
    assert separators("text" + end, "A") == (" ",)


@pytest.mark.parametrize("end", [*"-/_@$\\#&=+*~^|€", "l'", "l’", "user@", "“x” –", "สวัสดี"])
def test_after_other_marks_either_form_may_be_meant(end):
    """ "second-" goes on with "hand", " -" with " no": no rule on characters can tell."""
    assert set(separators("text" + end, "A")) == {"", " "}


@pytest.mark.parametrize(
    ("prompt", "answer", "either"),
    [
        ("pi is 3.", "14", True),
        ("It is 12:", "30", True),
        ("In 19", "45", True),
        ("The end.", "14", False),
        ("In 1945", "they", False),
        ("it cost 50", "%", True),
        ("it cost", "$5", True),
        ("He said", '"no"', False),
        ("He said", "(no)", False),
        ("The Chinese word for water is", "水", True),
        ("水的英文是", "water", True),
        ("水的英文是：", "water", False),
        ("น้ำคือ", "น้ำ", False),
    ],
)
def test_what_an_answer_begins_with_counts(prompt, answer, either):
    assert (len(separators(prompt, answer)) == 2) == either


@pytest.mark.parametrize(
    ("end", "forms"),
    [
        ('print("', {"", " "}),
        ('<a href="', {"", " "}),
        ('f("x", "', {""}),
        ('f("x"', {" "}),
        ('"One.\nTwo."', {"", " "}),  # which of its marks opened it is on another line
        ("„Wort“", {"", " "}),
        ("»ord«", {"", " "}),
        ("sade ”", {"", " "}),
        ("他说“", {""}),
        ("he said “", {""}),
        ("“No”", {" "}),
    ],
)
def test_quotation_marks_that_open_or_close(end, forms):
    assert set(separators(end, "A")) == forms


def test_a_stated_separator_is_taken(tokenizer):
    before = encode_prompt(tokenizer, "a second-")
    for between in ("", " "):
        ids = encode_answer(tokenizer, "a second-", "hand", separator=between)
        assert text(tokenizer, before + ids) == text(tokenizer, before) + between + "hand"


def test_trailing_space_is_refused_or_continued_exactly(tokenizer):
    """Never a second space, which the text does not have."""
    with pytest.raises(DataError, match=r"no token boundary .*without trailing space"):
        encode_answer(tokenizer, "The answer is ", "A")


def test_newlines_that_are_one_token_at_the_end():
    """As in published byte-level vocabularies, where "\\n\\n" is a token only before the end."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {piece: i for i, piece in enumerate([*alphabet, "ĊĊ", "ĠA"])}
    raw = Tokenizer(models.BPE(vocab=vocab, merges=[("Ċ", "Ċ"), ("Ġ", "A")]))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw)
    assert pieces(tokenizer, encode_prompt(tokenizer, "x:\n\n"))[-1] == "ĊĊ"
    assert pieces(tokenizer, encode_prompt(tokenizer, "x:\n\nA"))[-3:] == ["Ċ", "Ċ", "A"]
    assert pieces(tokenizer, encode_answer(tokenizer, "x:\n\n", "A")) == ["A"]


def test_answer_that_would_merge_with_the_end_of_the_prompt(tokenizer):
    """`Pari` + `s`: a token boundary is found with a space, or there is an error; never a merge."""
    before = encode_prompt(tokenizer, "in Pari")
    ids = encode_answer(tokenizer, "in Pari", "s")
    assert text(tokenizer, before + ids).endswith("in Pari s")


def test_answers_of_several_tokens_and_outer_space(tokenizer):
    ids = encode_answer(tokenizer, "The answer is", "one two three")
    assert len(ids) > 1
    assert ids == encode_answer(tokenizer, "The answer is", "  one two three ")
    before = encode_prompt(tokenizer, "The answer is")
    assert text(tokenizer, before + ids).endswith("The answer is one two three")


def test_bare_form_is_the_vocabulary_lookup(tokenizer):
    assert encode_answer(tokenizer, "Response:", "A", form="bare") == (
        tokenizer.convert_tokens_to_ids("A"),
    )
    several = encode_answer(tokenizer, "Response:", "xyzzy", form="bare")
    assert several == tuple(tokenizer("xyzzy", add_special_tokens=False)["input_ids"])


@given(
    prompt=st.text(st.characters(codec="utf-8"), min_size=1, max_size=20),
    answer=st.text(st.characters(codec="utf-8"), min_size=1, max_size=8),
)
@settings(max_examples=200, deadline=None)
def test_prompt_and_answer_decode_to_the_text(prompt, answer):
    tokenizer = transformers_tokenizer("bytes")
    try:
        before = encode_prompt(tokenizer, prompt)
        ids = encode_answer(tokenizer, prompt, answer)
    except DataError:
        return
    whole = [prompt + between + answer.strip() for between in (" ", "")]
    assert text(tokenizer, before + ids) in whole
    if prompt[-1].isspace():
        assert text(tokenizer, before + ids) == whole[1]


# --- prompts --------------------------------------------------------------------------------------


def test_beginning_token_is_there_once(tokenizer):
    adds = tokenizer("x")["input_ids"][0] == tokenizer.bos_token_id
    plain = encode_prompt(tokenizer, "Response:")
    assert plain.count(tokenizer.bos_token_id) == adds
    written = encode_prompt(tokenizer, "<s>Response:")
    assert written.count(tokenizer.bos_token_id) == 1
    assert written[0] == tokenizer.bos_token_id
    if adds:
        assert written == plain
    again = encode_prompt(tokenizer, "<s><s>Response:")
    assert again == written  # written twice, or by a template and by hand


def test_prompt_stays_open(tokenizer):
    """A tokenizer that closes every text does not close a prompt, unless the prompt says so."""
    assert encode_prompt(tokenizer, "Response:")[-1] != tokenizer.eos_token_id
    assert encode_prompt(tokenizer, "Response:</s>")[-1] == tokenizer.eos_token_id


@pytest.mark.parametrize("empty", ["", " ", "\n\t"])
def test_empty_texts(tokenizer, empty):
    with pytest.raises(DataError, match="the prompt is empty"):
        encode_query(tokenizer, empty, "A")
    with pytest.raises(DataError, match="the prompt is empty"):
        encode_answer(tokenizer, empty, "A")
    for form in ("context", "bare"):
        with pytest.raises(DataError, match="the answer is empty"):
            encode_query(tokenizer, "Response:", empty, form=form)


def test_too_long_names_both_numbers(tokenizer):
    both = encode_query(tokenizer, "Response:", "A")
    length = len(both.prompt) + len(both.answer)
    assert encode_query(tokenizer, "Response:", "A", max_length=length) == both
    with pytest.raises(DataError, match=rf"{length} tokens.*holds {length - 1}; shorten"):
        encode_query(tokenizer, "Response:", "A", max_length=length - 1)


def test_options_are_tokens_in_the_same_place(tokenizer):
    query = encode_query(tokenizer, "Response:", "B", options="ABCD")
    assert query.options[1] == query.answer
    assert len(set(query.options)) == 4
    assert pieces(tokenizer, query.options[0]) == [spaced(tokenizer)]
    bare = encode_query(tokenizer, "Response:", "B", options="ABCD", form="bare")
    assert [pieces(tokenizer, option) for option in bare.options] == [[x] for x in "ABCD"]


def test_options_that_begin_alike_are_kept_whole(tokenizer):
    query = encode_query(tokenizer, "Response:", "xq", options=("xq", "xz", "xqq"))
    before = text(tokenizer, query.prompt)
    for option, want in zip(query.options, ("xq", "xz", "xqq"), strict=True):
        assert text(tokenizer, query.prompt + option) == f"{before} {want}"
    assert query.options[0] == query.answer
    with pytest.raises(DataError, match="not told apart by this tokenizer"):
        encode_query(tokenizer, "Response:", "xq", options=("xq", " xq"))


def test_what_all_options_begin_with_can_be_asked_past():
    query = TokenPrompt((1, 2), (7, 4), ((7, 3), (7, 4)))
    assert past_shared_tokens(query) == TokenPrompt((1, 2, 7), (4,), ((3,), (4,)))
    plain = TokenPrompt((1, 2), (4,), ((3,), (4,)))
    assert past_shared_tokens(plain) == plain
    with pytest.raises(DataError, match="2 tokens after the 1 that all begin with"):
        past_shared_tokens(TokenPrompt((1,), (7, 4), ((7, 3, 3), (7, 4))))


def test_answers_that_the_tokenizer_does_not_know():
    """Whatever text is meant, its neurons would be those of "unknown"."""
    tokenizer = unknowing_tokenizer()
    assert pieces(tokenizer, encode_answer(tokenizer, "a b", "b")) == ["b"]
    with pytest.raises(DataError, match="'été' holds text that this tokenizer does not know"):
        encode_answer(tokenizer, "a b", "été")
    assert pieces(tokenizer, encode_answer(tokenizer, "a b", "<unk>")) == ["<unk>"]


def unknowing_tokenizer():
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    raw = Tokenizer(models.WordLevel({"<unk>": 0, "a": 1, "b": 2}, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=raw, unk_token="<unk>")


# --- option letters -------------------------------------------------------------------------------


def test_option_letters_of_the_published_prompts(query_file):
    prompts = list(published_prompts(query_file.path))
    assert len(prompts) >= 18
    for prompt, label in prompts:
        assert option_letters(prompt) == ("A", "B", "C", "D")
        assert label in option_letters(prompt)


@pytest.mark.parametrize(
    ("prompt", "letters"),
    [
        ("no options here", ""),
        ("Is it A. or B. that holds?", ""),
        ("Which?\nA. x\nB. y", "AB"),
        ("Which?\n A) x\n B) y\n C) z\n", "ABC"),
        ("Which?\nA: x\nB: y\nAnswer:", "AB"),
        ("A. Smith wrote this.\nWhich?\n A. x\n B. y\n C. z\n\nResponse:", "ABC"),
        ("A. Smith and\nB. Jones wrote this.\n A. x\n B. y\n C. z\n\nResponse:", "ABC"),
        ("\n".join(f" {letter}. x" for letter in "ABCDEFG"), "ABCDEFG"),
        ("Q: 1?\nA. x\nB. y\nC. z\nAnswer: A\n\nQ: 2?\nA. x\nB. y\n\nAnswer:", "AB"),
        ("Q: which?\nA. x\nB. y\nC. z\n\nA:", "ABC"),
        ("Q: which?\nA. x\nB. y\nC. z\n\nA: The answer is", "ABC"),
        ("Which?\n A.\n B. y\n C. z\n", "ABC"),
        ("Which?\n A. x\n C. y\n", "A"),
        ("Which?\r\n A. x\r\n B. y\r\n\r\nResponse:", "AB"),
    ],
)
def test_option_letters_of_tricky_prompts(prompt, letters):
    assert option_letters(prompt) == tuple(letters)


@given(st.text())
def test_option_letters_of_anything(prompt):
    letters = option_letters(prompt)
    assert "".join(letters) == "ABCDEFGHIJKLMNOPQRSTUVWXYZ"[: len(letters)]


# --- the real tokenizer ---------------------------------------------------------------------------


@pytest.mark.smollm2
def test_smollm2_says_space_letter(smollm2):
    tokenizer = smollm2.tokenizer
    for letter, number in zip("ABCD", (330, 389, 340, 422), strict=True):
        ids = encode_answer(tokenizer, "Response:", letter)
        assert (ids, pieces(tokenizer, ids)) == ((number,), [f"Ġ{letter}"])
        bare = encode_answer(tokenizer, "Response:", letter, form="bare")
        assert pieces(tokenizer, bare) == [letter]
    assert pieces(tokenizer, encode_answer(tokenizer, "Response:\n\n", "A")) == ["A"]


@pytest.mark.smollm2
def test_smollm2_on_the_published_prompts(smollm2, query_file):
    """One token for every letter, with a space but after a full-width colon."""
    tokenizer = smollm2.tokenizer
    every = 7 if query_file.genuine else 1
    for prompt, label in list(published_prompts(query_file.path))[::every]:
        query = encode_query(tokenizer, prompt, label, options="ABCD")
        space = "" if prompt.endswith("：") else "Ġ"
        assert pieces(tokenizer, query.answer) == [space + label]
        found = [piece for option in query.options for piece in pieces(tokenizer, option)]
        assert found == [space + letter for letter in "ABCD"]
