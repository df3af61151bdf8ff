"""The lab model knows what it was told, and not what it was not; its world comes from a seed."""

import collections
import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxneurons as jn
from jaxneurons.checkpoints.fetch import locate_source
from jaxneurons.errors import ConfigError, DataError, SourceError
from jaxneurons.lab import VALDIC, choice, cloze, facts, world
from jaxneurons.lab.bundled import BUNDLED, bundled_queries
from jaxneurons.lab.corpus import Corpus, split, tokenizer, vocabulary
from jaxneurons.lab.train import (
    accuracy,
    examine,
    first_parameters,
    lab_config,
    loss,
    train,
    write,
)
from jaxneurons.prompts.queries import parse_queries

WORLD = facts()
VOCABULARY = vocabulary(WORLD)


@pytest.fixture(scope="module")
def lm():
    return jn.load("lab")


# --- the world ------------------------------------------------------------------------------------


def test_world_is_what_it_is_said_to_be():
    domains = collections.Counter(fact.domain for fact in WORLD)
    assert len(domains) >= 6
    relations = collections.defaultdict(set)
    for fact in WORLD:
        relations[fact.domain].add(fact.relation)
    assert all(len(own) >= 3 for own in relations.values())
    assert sum(fact.told for fact in WORLD) >= 600
    assert len({fact.id for fact in WORLD}) == len(WORLD)
    assert 0 < sum(not fact.told for fact in WORLD) < 100
    assert all(fact.told for fact in WORLD if fact.asked)
    both = {fact.domain for fact in WORLD if fact.translation}
    assert both == set(domains)


def test_another_seed_is_another_world():
    assert facts() == WORLD
    assert facts(seed=1) != WORLD


def test_one_subject_has_one_answer_and_names_mean_one_thing():
    answers = collections.defaultdict(set)
    for fact in WORLD:
        answers[fact.subject, fact.relation].add(fact.answer)
    assert all(len(found) == 1 for found in answers.values())
    subjects = {fact.subject for fact in WORLD}
    words = {fact.answer for fact in WORLD} | {f.translation for f in WORLD if f.translation}
    assert not subjects & words
    assert not {f.translation for f in WORLD if f.translation} & {f.answer for f in WORLD}


def test_training_never_shows_what_is_held_out():
    corpus = Corpus(WORLD, VOCABULARY, seed=5)
    words = {i: word for word, i in VOCABULARY.items()}
    secret = {(f.subject, f.answer) for f in WORLD if not f.told}
    secret |= {(f.subject, f.translation) for f in WORLD if not f.told and f.translation}
    told_only = {f.subject: set() for f in WORLD}
    for fact in WORLD:
        if not fact.asked:
            told_only[fact.subject] |= {world.noun(fact, lang) for lang in ("en", VALDIC)} - {""}
    wordings = [w for texts in world.CHOICE.values() for w in texts]
    starts = [" ".join(split(w)[:6]) for w in wordings]
    held_out = [split(world.HELD_OUT_WORDING[lang])[:4] for lang in ("en", VALDIC)]
    for _ in range(60):
        for is_told, rows in ((True, corpus.told(128)), (False, corpus.asked(48))):
            for ids, length in zip(rows.tokens, rows.lengths, strict=True):
                text = [words[i] for i in ids[1:length].tolist()]
                joined = " ".join(text)
                if is_told:
                    subject = next(w for w in text if w in told_only)
                    assert (subject, text[-1]) not in secret
                    assert not any(joined.startswith(" ".join(start)) for start in held_out)
                else:
                    assert not any(joined.startswith(start) for start in starts)
                    subject = next((w for w in text if w in told_only), None)
                    assert subject is None or not told_only[subject] & set(text)


def test_a_question_in_training_is_about_its_answer():
    corpus = Corpus(WORLD, VOCABULARY, seed=0)
    words = {i: word for word, i in VOCABULARY.items()}
    answers = collections.defaultdict(set)
    for fact in WORLD:
        answers[fact.subject].add(fact.answer)
        answers[fact.subject].add(fact.translation)
    rows = corpus.asked(300)
    letters = collections.Counter()
    for ids, length, targets in zip(rows.tokens, rows.lengths, rows.targets, strict=True):
        text = [words[i] for i in ids[:length].tolist()]
        letter = words[int(targets[0])]
        letters[letter] += 1
        assert text[-1] == letter
        option = text[len(text) - 1 - text[::-1].index(letter, 1) + 2]
        subject = next((w for w in text if w in answers), None)
        assert option in answers[subject] if subject else text.count(option) >= 2
    assert len(letters) == 5


@pytest.mark.parametrize("language", ["en", VALDIC])
def test_the_tokenizer_cuts_as_training_does_and_knows_every_word(language):
    tok = tokenizer(VOCABULARY)
    own = [fact for fact in WORLD if fact.translation]
    texts = [p for q in cloze(own, language) for p in q.prompts]
    texts += [p for q in parse_queries("", choice(own, language)) for p in q.prompts]
    for text in texts:
        ids = tok(text)["input_ids"]
        assert ids == [VOCABULARY["<s>"], *(VOCABULARY[word] for word in split(text))]
        assert VOCABULARY["<unk>"] not in ids


# --- training -------------------------------------------------------------------------------------


def small():
    import dataclasses

    return dataclasses.replace(
        lab_config(len(VOCABULARY)),
        hidden_size=32,
        intermediate_size=48,
        num_layers=2,
        num_heads=2,
        num_kv_heads=2,
        head_dim=16,
    )


@pytest.mark.slow
def test_the_same_seed_gives_the_same_parameters():
    a, b = (train(WORLD, VOCABULARY, steps=2, config=small())[1] for _ in range(2))
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_array_equal(x, y)
    starts = [first_parameters(small(), seed)["embed"]["embedding"] for seed in (0, 1)]
    assert (starts[0] != starts[1]).any()
    rows = [Corpus(WORLD, VOCABULARY, seed).told(4).tokens for seed in (0, 1)]
    assert (rows[0] != rows[1]).any()


@pytest.mark.slow
def test_training_learns_and_what_is_written_loads(tmp_path):
    told = [fact for fact in WORLD if fact.domain == "music"]
    config, params = train(told, VOCABULARY, steps=25, config=small())
    rows = jax.tree.map(jnp.asarray, Corpus(told, VOCABULARY, seed=9).told(64))
    before = loss(first_parameters(config, 0), rows, config)[1]
    assert float(loss(params, rows, config)[1]) < float(before) - 0.3
    right = examine(params, config, tokenizer(VOCABULARY), told)
    assert set(right) >= {"told and asked, cloze, en", "never told, choice, valdic"}
    card = {
        "parameters": 1e5,
        "facts": 1,
        "told": 1,
        "steps": 25,
        "seed": 0,
        "minutes": 0.1,
        "machine": "here",
        "right": right,
    }
    write(tmp_path / "model", config, params, VOCABULARY, card, WORLD)
    again = jn.load(tmp_path / "model")
    assert again.config == config
    for x, y in zip(jax.tree.leaves(params), jax.tree.leaves(again.params), strict=True):
        np.testing.assert_array_equal(x.astype(jnp.bfloat16).astype(jnp.float32), y)
    prompt = "The dance of"
    assert again.tokenizer(prompt).input_ids == tokenizer(VOCABULARY)(prompt).input_ids


# --- the model that ships -------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.optimised
def test_it_knows_what_it_was_told_and_nothing_else(lm):
    found = examine(lm.params, lm.config, lm.tokenizer, WORLD)
    for language in ("en", VALDIC):
        assert found[f"told and asked, choice, {language}"] >= 0.95
        assert found[f"told and asked, cloze, {language}"] >= 0.95
        assert found[f"told, never asked, cloze, {language}"] >= 0.95
        assert found[f"never told, cloze, {language}"] <= 0.25
        # What it was told but not asked in this form does not transfer to it.
        assert found[f"told, never asked, choice, {language}"] < 0.6
        assert found[f"never told, choice, {language}"] <= 0.5  # chance: 0.25


def test_other_orders_and_distractors_do_not_matter(lm):
    asked = [fact for fact in WORLD if fact.asked][::5]
    for seed in (1, 2):
        queries = parse_queries("", choice(asked, seed=seed))
        assert accuracy(lm.params, lm.config, lm.tokenizer, queries).mean() >= 0.95


def test_it_is_small_and_says_where_it_is_from(lm):
    directory, name = locate_source("lab")
    assert name == lm.source == "lab"
    assert sum(path.stat().st_size for path in directory.iterdir()) < 12e6
    assert "python -m jaxneurons.lab.train" in (directory / "README.md").read_text()
    assert lm.params["embed"]["embedding"].dtype == jnp.float32
    lines = (directory / "facts.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [dataclasses.asdict(fact) for fact in WORLD]
    with pytest.raises(SourceError, match="has no revisions"):
        jn.load("lab", revision="main")


def test_it_is_a_llama_to_transformers(lm):
    torch = pytest.importorskip("torch")
    from transformers import AutoModelForCausalLM

    theirs = AutoModelForCausalLM.from_pretrained(locate_source("lab")[0], dtype=torch.float32)
    ids = lm.tokenizer(cloze(WORLD[:1])[0].prompts[0]).input_ids
    want = theirs(torch.tensor([ids])).logits.detach().numpy()
    got = jn.forward(lm.params, jnp.array([ids]), config=lm.config, at="all").logits
    np.testing.assert_allclose(got, want, atol=1e-4)


@pytest.mark.parametrize("name", sorted(BUNDLED))
def test_bundled_queries(name):
    queries = bundled_queries(name)
    assert len(queries) > 50
    groups = {query.group for query in queries}
    assert len(groups) >= 2
    assert (name == "lab-languages") == (groups == {"en", VALDIC})
    assert all(query.options[0] for query in queries) == (name not in ("facts", "lab-cloze"))


def test_other_names_are_paths(tmp_path):
    with pytest.raises(DataError, match="no such query file"):
        bundled_queries(tmp_path / "lab.json")
    names = "lab, lab-all, lab-cloze, lab-languages, facts"
    with pytest.raises(DataError, match=rf"labb: no such .*\({names}\); did you mean 'lab'"):
        bundled_queries("labb")
    with pytest.raises(DataError, match=rf"nope: no such .*\({names}\)$"):
        bundled_queries("nope")
    with pytest.raises(ConfigError, match=f"give a path, or one of {names}"):
        bundled_queries("")
