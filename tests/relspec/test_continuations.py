"""How many tokens answers are judged on: perfect ones are right, in every script and tokenizer."""

import dataclasses
import hashlib
import json

import numpy as np
import pytest
from support.fixtures import TEXT, write_lm
from support.known import write_relations
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

import jaxneurons
from jaxneurons.errors import ConfigError, DataError
from jaxneurons.neurons.sets import NeuronSet
from jaxneurons.prompts.relations import Relation, Triple, bundled_relations, read_relations
from jaxneurons.relspec.continuations import NO_STEP, Continuations
from jaxneurons.relspec.method import Prompt, RelSpecConfig, relation_prompts
from jaxneurons.relspec.study import Study
from jaxneurons.storage.store import Memory, RunDirectory

LANGUAGES = ("de", "es", "fr", "zh", "ja")


@pytest.fixture(scope="module")
def lm(tmp_path_factory):
    return jaxneurons.load(write_lm(tmp_path_factory.mktemp("lm") / "model"))


def splits_digits():
    """Byte-level, each digit a token, as SmolLM2's: a space before a number stays alone."""
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["</s>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXT, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>")


def continuations(lm, path=None, tokenizer=None, **settings):
    lm = dataclasses.replace(lm, tokenizer=tokenizer or lm.tokenizer)
    parts = Memory() if path is None else RunDirectory(path, {})
    return Continuations(lm, parts, RelSpecConfig(**settings))


def of_language(language):
    """Prompts of every bundled fact in a language, in each of its templates."""
    found = []
    for relation in bundled_relations():
        if language and language not in relation.translations:
            continue
        one = relation.translations[language] if language else relation
        for template in dict.fromkeys(t for some in one.templates.values() for t in some):
            found += relation_prompts(
                relation, relation.triples, template, evaluation="det", language=language
            )
    return found


def perfect(tokenizer, prompt, answer, separator):
    """Ids of an answer after its prompt by the tokenizer alone, and a full stop."""
    before = tokenizer(prompt.text)["input_ids"]
    whole = tokenizer(f"{prompt.text}{separator}{answer}.")["input_ids"]
    assert whole[: len(before)] == before, (prompt.text, answer)
    return whole[len(before) :]


def share_right(asks, prompts, separators):
    """How many answers, one for each prompt and object, are judged right on the steps generated."""
    right = total = 0
    for one, steps in zip(prompts, asks.steps(prompts), strict=True):
        separator = separators(one)
        for answer in one.objects:
            ids = perfect(asks.lm.tokenizer, one, answer, separator)[:steps]
            said = np.array(ids + [NO_STEP] * (steps + 3 - len(ids)), np.int32)
            right += int(asks.judge(said[None], [one])[0])
            total += 1
    return right, total


def space(prompt):
    """A space, but in Chinese and Japanese."""
    return "" if prompt.language in ("zh", "ja") or prompt.text.endswith(('"', "'")) else " "


@pytest.mark.smollm2
@pytest.mark.parametrize("language", ["", *LANGUAGES])
def test_perfect_answers_are_right_with_smollm2(smollm2, tmp_path, language):
    prompts = of_language(language)
    right, total = share_right(continuations(smollm2, tmp_path / "run"), prompts, space)
    assert right == total >= 370
    # The paper's two tokens: why the number is not fixed.
    two, _ = share_right(continuations(smollm2, tmp_path / "two", steps=2), prompts, space)
    assert two < total
    assert two / total < {"zh": 0.8, "ja": 0.4}.get(language, 1)


@pytest.mark.smollm2
@pytest.mark.parametrize(
    ("said", "wanted"),
    [("Algeria", "Algerian"), ("Bolivia", "Bolivian"), ("crisis", "crises")],
)
def test_what_begins_like_the_object_is_seen_to_end_otherwise(smollm2, tmp_path, said, wanted):
    """Two tokens, or as many as the object has, would not tell: SmolLM2 says each of these."""
    prompt = Prompt("r", "det", "", "s", (wanted,), 'The word for it is "')
    for steps, right in ((None, False), (2, True)):
        asks = continuations(smollm2, tmp_path / str(steps), steps=steps)
        ids = perfect(smollm2.tokenizer, prompt, said, "")
        ids = ids[: asks.steps([prompt])[0]]
        assert asks.judge(np.array([ids], np.int32), [prompt])[0] == right, asks.decode(
            np.array(ids)
        )


@pytest.mark.parametrize("language", LANGUAGES)
def test_perfect_answers_are_right_with_digits_and_bytes(lm, tmp_path, language):
    asks = continuations(lm, tmp_path / "run", splits_digits())
    prompts = of_language(language)[::3]
    right, total = share_right(asks, prompts, space)
    assert right == total > 100


YEARS = ("1945", "1066", "7", "12", "3.14", "-40", "2024-05-01")
TEXTS = (
    "C#",
    "C++",
    "🍎",
    "दिल्ली",
    "กรุงเทพ",
    "القاهرة",
    "תֵּל אָבִיב",
    "서울",
    "Ouagadougou, Burkina Faso",
    "b",
)


@pytest.mark.parametrize("answer", [*YEARS, *TEXTS])
def test_answers_of_every_kind(lm, tmp_path, answer):
    """Years, signs, scripts of many bytes; and what is another answer is wrong."""
    asks = continuations(lm, tmp_path / "run", splits_digits())
    prompt = Prompt("r", "det", "", "s", (answer,), "The answer is")
    assert share_right(asks, [prompt], space) == (1, 1)
    longer = {"7": "73", "12": "128", "1945": "19450", "b": "bz", "C++": "C#", "-40": "40"}
    if answer in longer:
        ids = perfect(asks.lm.tokenizer, prompt, longer[answer], " ")
        (steps,) = asks.steps([prompt])
        assert not asks.judge(np.array([ids[:steps]], np.int32), [prompt])[0]


def test_steps_are_what_the_objects_need(lm, tmp_path):
    tokenizer = splits_digits()
    asks = continuations(lm, tmp_path / "run", tokenizer)
    text = "The answer is"
    for objects in (("1945",), ("7", "1945"), ("b",)):
        (found,) = asks.steps([Prompt("r", "det", "", "s", objects, text)])
        lengths = [len(tokenizer(f"{text} {o}")["input_ids"]) for o in objects]
        assert found == max(lengths) - len(tokenizer(text)["input_ids"]) + 1
    assert asks.steps([Prompt("r", "det", "", "s", (), text)]) == [0]
    # No boundary between prompt and answer: at least as many as the answer has alone.
    (odd,) = asks.steps([Prompt("r", "det", "", "s", ("1945",), "Italia")])
    assert odd >= 5
    (two,) = continuations(lm, tmp_path / "two", tokenizer, steps=2).steps(
        [Prompt("r", "det", "", "s", ("1945",), text)]
    )
    assert two == 2


def test_an_ended_answer_is_whole(lm, tmp_path):
    asks = continuations(lm, tmp_path / "run")
    tokenizer = lm.tokenizer
    prompt = Prompt("r", "det", "", "s", ("New York",), "x")
    ids = tokenizer(" New")["input_ids"]
    open_, ended = np.array([ids], np.int32), np.array([[*ids, tokenizer.eos_token_id]], np.int32)
    assert asks.judge(open_, [prompt])[0]
    assert not asks.judge(ended, [prompt])[0]
    assert asks.decode(open_[0]) == asks.decode(ended[0]) == " New"


# --- generating -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def relations(lm, tmp_path_factory):
    folder = write_relations(tmp_path_factory.mktemp("relations") / "known", lm, facts=12)
    return read_relations(folder)


def questions(relations):
    return [
        one
        for relation in relations[:2]
        for one in relation_prompts(
            relation, relation.triples, relation.templates["plain"][0], evaluation=""
        )
    ]


def test_more_steps_begin_alike_and_company_changes_nothing(lm, relations, tmp_path):
    """Each prompt gets its own number of steps, whatever it is asked with; longer is longer."""
    asks = continuations(lm, tmp_path / "run")
    prompts = questions(relations)
    steps = asks.steps(prompts)
    assert len(set(steps)) > 2
    sets = [NeuronSet(), NeuronSet.of(up=[(1, 2), (2, 5)])]
    said = asks.generate("", sets, prompts)
    assert said.shape == (2, len(prompts), max(steps))
    for row, count in zip(said[0], steps, strict=True):
        assert (row[:count] != NO_STEP).all()
        assert (row[count:] == NO_STEP).all()
    two = continuations(lm, tmp_path / "two", steps=2)
    np.testing.assert_array_equal(two.generate("", sets, prompts), said[..., :2])
    some = continuations(lm, tmp_path / "some").generate("", sets[1:], prompts[3:9])
    np.testing.assert_array_equal(some[0], said[1, 3:9, : some.shape[-1]])
    assert asks.judge(said[:1], prompts).all()  # objects are made of what it says


def test_what_was_said_is_read_again(lm, relations, tmp_path, monkeypatch):
    """Each group is kept as it is done; a spoilt one is made again, and no other."""
    prompts = questions(relations)
    first = continuations(lm, tmp_path / "run")
    said = first.generate("", [NeuronSet()], prompts)
    parts = sorted((tmp_path / "run" / "parts").glob("said-*.npz"))
    assert len(parts) == len({1 << (n - 1).bit_length() for n in first.steps(prompts)}) > 1
    before = {path: path.read_bytes() for path in parts}
    parts[0].write_bytes(b"x")
    told = []
    again = continuations(lm, tmp_path / "run")
    again.progress = lambda *what: told.append(what)
    np.testing.assert_array_equal(again.generate("asked", [NeuronSet()], prompts), said)
    assert {path: path.read_bytes() for path in parts} == before
    assert 0 < told[-1][1] == told[-1][2] < len(prompts)
    monkeypatch.setattr("jaxneurons.engine.ablation.generate_ablated", None)
    np.testing.assert_array_equal(again.generate("", [NeuronSet()], prompts), said)


def test_parts_keep_their_names(lm, tmp_path):
    """Directories of before are opened: names are hashes of tokens, steps and neurons."""
    prompt = Prompt("r", "det", "", "s", ("b",), "The answer is")
    neurons = NeuronSet.of(up=[(1, 2)])
    generator = continuations(lm, tmp_path / "run", steps=2)
    tokens = generator.generate("", [neurons], [prompt])

    def sha256(value):
        return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()

    ids = [list(map(int, lm.tokenizer(prompt.text)["input_ids"]))]
    codes = hashlib.sha256(b"up:1:" + (1 << 32 | 2).to_bytes(8, "little")).hexdigest()
    (part,) = (tmp_path / "run" / "parts").glob("*.npz")
    assert part.name == f"said-{sha256([codes, sha256([ids, [2]])])[:40]}.npz"
    np.testing.assert_array_equal(generator.parts.load(part.stem)["said"], tokens[0])


def test_no_room_in_the_context(lm, relations, tmp_path):
    most = lm.config.max_position
    for steps in (10**8, most):
        with pytest.raises(ConfigError, match=rf"steps {steps}: the model's context holds {most}"):
            Study(lm, relations, settings=RelSpecConfig(k=24, steps=steps), out=tmp_path / "run")
        assert not (tmp_path / "run").exists()
    long = Prompt("r", "det", "", "s", ("b",), "The answer is")
    with pytest.raises(DataError, match=f"tokens and {most - 1} are generated after it"):
        continuations(lm, tmp_path / "a", steps=most - 1).encode([long])
    wordy = Prompt("r", "det", "", "s", (" ".join("b" * most),), "The answer is")
    with pytest.raises(
        DataError, match=f"are generated after it, the model's context holds {most}"
    ):
        continuations(lm, tmp_path / "b").encode([wordy])


def test_room_for_just_the_answer(lm, tmp_path, monkeypatch):
    """Program sizes are rounded up, but never beyond the context."""
    generated = []

    def ablated(*arguments, steps, **options):
        generated.append(steps)
        return jaxneurons.engine.ablation.ablated(*arguments, steps=steps, **options)

    monkeypatch.setattr("jaxneurons.relspec.continuations.ablated", ablated)
    tokenizer = lm.tokenizer
    answer = " ".join("b" * 5)
    need = len(tokenizer(f"x {answer}")["input_ids"]) - len(tokenizer("x")["input_ids"]) + 1
    assert need & (need - 1)  # would be rounded up
    text = "x" * (lm.config.max_position - need)
    while len(tokenizer(text)["input_ids"]) > lm.config.max_position - need:
        text = text[:-1]
    prompt = Prompt("r", "det", "", "s", (answer,), text)
    assert len(tokenizer(text)["input_ids"]) + need == lm.config.max_position
    said = continuations(lm, tmp_path / "run").generate("", [NeuronSet()], [prompt])
    assert said.shape == (1, 1, need)
    assert generated == [need]


def test_runs_of_before_are_refused(lm, relations, tmp_path):
    """They were judged otherwise: their parts must not be mixed with new ones."""
    settings = RelSpecConfig(k=24, steps=2)
    Study(lm, relations, settings=settings, out=tmp_path / "run")
    path = tmp_path / "run" / "parts" / "identity.json"
    identity = json.loads(path.read_text())
    del identity["format"]
    path.write_text(json.dumps(identity))
    with pytest.raises(DataError, match="holds a run with another format"):
        Study(lm, relations, settings=settings, out=tmp_path / "run")


def test_a_translation_is_judged_in_its_own_words(lm, tmp_path):
    triple = Triple("Rom", "Italien")
    relation = Relation("r", (triple,), {"plain": ("{} ist in",)})
    (prompt,) = relation_prompts(relation, [triple], "{} ist in", evaluation="det")
    asks = continuations(lm, tmp_path / "run")
    ids = lm.tokenizer(" Italien")["input_ids"]
    assert asks.judge(np.array([ids], np.int32), [prompt])[0]
