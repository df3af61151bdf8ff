"""Requests about the invented world: true to it, and what follows from them."""

import collections
import re

import pytest

import jaxneurons
from jaxneurons.edit import check_requests, encode_request, lab_requests
from jaxneurons.edit.world_requests import PORTABILITY
from jaxneurons.errors import ConfigError, DataError
from jaxneurons.lab.world import DOMAINS

WORLD = {fact.id: fact for fact in jaxneurons.lab.facts()}


@pytest.fixture(scope="module")
def requests():
    return lab_requests()


def test_every_asked_fact_gets_another_answer_of_its_kind(requests):
    assert {r.id for r in requests} == {fact.id for fact in WORLD.values() if fact.asked}
    answers = collections.defaultdict(set)
    for fact in WORLD.values():
        answers[fact.domain, fact.relation].add(fact.answer)
    for request in requests:
        fact = WORLD[request.id]
        assert (request.subject, request.ground_truth) == (fact.subject, fact.answer)
        assert request.target in answers[fact.domain, fact.relation] - {fact.answer}
        assert request.prompt == f"The {fact.relation} of {fact.subject} is"
    assert check_requests(requests) == []


def test_paraphrases_say_the_same_and_neighbours_another_subject(requests):
    true = {(f.domain, f.relation, f.subject): f.answer for f in WORLD.values() if f.told}
    for request in requests:
        fact = WORLD[request.id]
        assert len({request.prompt, *request.paraphrases}) == 10
        for text in request.paraphrases:
            assert fact.subject in text
            assert fact.relation in text
        assert len({*request.neighbours}) == 5
        for prompt, answer in request.neighbours:
            subject = prompt.removeprefix(f"The {fact.relation} of ").removesuffix(" is")
            assert true[fact.domain, fact.relation, subject] == answer != request.target
            assert subject != fact.subject


def test_what_follows_from_an_edit(requests):
    translations = {
        (f.domain, f.relation, f.answer): f.translation for f in WORLD.values() if f.translation
    }
    two_languages = {r.noun for relations in DOMAINS.values() for r in relations if r.valdic}
    answers = collections.defaultdict(set)
    for fact in WORLD.values():
        answers[fact.domain, fact.relation].add(fact.answer)
    counts, letters = collections.Counter(), collections.Counter()
    for request in requests:
        fact = WORLD[request.id]
        follows = dict(zip(PORTABILITY, request.portability, strict=False))
        counts.update(follows.keys())
        prompt, letter = follows["options"]
        assert f" {letter}. {request.target}\n" in prompt
        options = re.findall(r"^ ([A-Z])\. (.*)$", prompt, re.MULTILINE)
        assert [name for name, _ in options] == ["A", "B", "C", "D"]
        given = {answer for _, answer in options}
        assert {request.target, request.ground_truth} < given
        assert len(given) == 4
        assert given <= answers[fact.domain, fact.relation]
        letters[letter] += 1
        assert f"What is the {fact.relation} of {fact.subject}?" in prompt
        assert follows["backwards"] == (f"{request.target} is the {fact.relation} of", fact.subject)
        assert ("language" in follows) == (fact.relation in two_languages)
        if "language" in follows:
            prompt, word = follows["language"]
            assert fact.subject in prompt
            assert word == translations[fact.domain, fact.relation, request.target]
    assert min(letters.values()) > len(requests) / 6
    assert 0 < counts["language"] < counts["options"] == counts["backwards"] == len(requests)


def test_seeds_and_counts(requests):
    assert lab_requests(7) == requests[:7]
    other = lab_requests(seed=1)
    assert [r.id for r in other] != [r.id for r in requests]
    assert {r.id: r.target for r in other} != {r.id: r.target for r in requests}
    with pytest.raises(DataError, match=r"577 requests: the lab model was asked 576 facts"):
        lab_requests(577)
    with pytest.raises(ConfigError, match="count must be at least 1"):
        lab_requests(0)


def test_the_model_can_be_asked_all_of_it(requests):
    lm = jaxneurons.load("lab")
    for request in requests[::9]:
        encoded = encode_request(lm.tokenizer, request, config=lm.config)
        assert len(encoded.target) == len(encoded.ground_truth) == 1
        for text in (*request.paraphrases, *(text for text, _ in request.portability)):
            assert lm.tokenizer.unk_token_id not in lm.tokenizer(text)["input_ids"]
