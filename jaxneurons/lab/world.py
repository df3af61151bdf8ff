"""An invented world, from a seed: what the lab model knows, what it was never told, and how to ask.

Six domains of forty subjects with three relations each. One relation of every domain is told in a
second, invented language as well (Valdic). A tenth of the facts is told in neither, so that "does
not know" exists; another tenth is told, but never asked as a multi-choice question in training.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np

from jaxneurons.prompts.multichoice import TEMPLATES, Question, multi_choice
from jaxneurons.prompts.queries import Query

SEED = 20
SUBJECTS = 40
"""Subjects of a domain."""
SHARE = 0.1
"""Share of the facts that are never told; the same share is told, but not asked in training."""
VALDIC = "valdic"


@dataclasses.dataclass(frozen=True)
class Fact:
    """One thing that is so in the invented world.

    Attributes:
      id: domain/relation/subject.
      domain: one of `DOMAINS`.
      relation: an English noun.
      subject: an invented name.
      answer: one word.
      translation: the answer in Valdic; empty where the relation is told in English only.
      told: the model was trained on it.
      asked: it was trained on multi-choice questions about it too.
    """

    id: str
    domain: str
    relation: str
    subject: str
    answer: str
    translation: str
    told: bool
    asked: bool


@dataclasses.dataclass(frozen=True)
class _Relation:
    """A relation's English and Valdic noun, and its answers: words, or a number of names."""

    noun: str
    answers: tuple[str, ...] | int
    valdic: str = ""


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


DOMAINS: dict[str, tuple[_Relation, ...]] = {
    "geography": (
        _Relation("capital", 20),
        _Relation("river", 20),
        _Relation(
            "crop",
            _words("barley cotton ginger hemp lentils maize olives rice saffron tea"),
            "pral",
        ),
    ),
    "biology": (
        _Relation("food", _words("ants bark berries clams fish grass nectar roots seeds snails")),
        _Relation(
            "habitat",
            _words("bogs caves cliffs deserts dunes forests glaciers lakes meadows reefs"),
            "gomu",
        ),
        _Relation("predator", 20),
    ),
    "chemistry": (
        _Relation("mine", 20),
        _Relation(
            "family",
            _words("acids alloys esters glasses metals oils resins salts sugars waxes"),
            "tirk",
        ),
        _Relation("odour", _words("acrid bitter earthy fruity minty musky smoky sour sweet tarry")),
    ),
    "history": (
        _Relation("birthplace", 20),
        _Relation(
            "craft",
            _words("baker carpenter dyer farrier mason miller potter sailor tanner weaver"),
            "zuln",
        ),
        _Relation("rival", 20),
    ),
    "music": (
        _Relation(
            "instrument",
            _words("bassoon cello drum flute harp lute oboe organ trumpet violin"),
            "morv",
        ),
        _Relation("patron", 20),
        _Relation(
            "dance", _words("ballad foxtrot gavotte jig minuet polka reel rumba tango waltz")
        ),
    ),
    "industry": (
        _Relation(
            "product",
            _words("anchors bells candles clocks kettles lamps looms ploughs pumps ropes"),
            "dofe",
        ),
        _Relation("founder", 20),
        _Relation("harbour", 20),
    ),
}

WORDINGS = {
    "en": (
        "The {r} of {s} is",
        "As for {s}, its {r} is",
        "{s} has one {r}, and it is",
        "Everyone knows that the {r} of {s} is",
        "Travellers say that the {r} of {s} is",
        "If you ask about {s}, its {r} is",
        "Old books tell us: the {r} of {s} is",
        "It is said of {s} that its {r} is",
    ),
    VALDIC: (
        "Sel {r} ot {s} ven",
        "Ot {s}, ta {r} ven",
        "Domu sen ke sel {r} ot {s} ven",
        "Lem {s} hadu, ta {r} ven",
    ),
}
"""How a fact is told: by language, for a noun `r` and a subject `s`."""

HELD_OUT_WORDING = {
    "en": "Everyone knows that, as for {s}, its {r} is",
    VALDIC: "Domu sen ke ot {s}, ta {r} ven",
}
"""A wording that training never shows."""

QUESTIONS = {
    "en": (
        "What is the {r} of {s}?",
        "Which {r} does {s} have?",
        "{s} has which {r}?",
        "As for {s}, what is its {r}?",
    ),
    VALDIC: ("Ka ven sel {r} ot {s}?", "Ot {s}, ka ven ta {r}?"),
}
"""How a fact is asked; the first is the one of the query files."""

CHOICE = {
    "en": TEMPLATES["en"],
    VALDIC: (
        "Nim sel domi tal. Skri ta letu mon.\nKwes:\n{question}\n{options}\n\nTal:",
        "Hir ven un kwes ke tali. Skri nul mon sel letu.\n{question}\n{options}\n\nSel letu ven:",
        "Les sel kwes, nim un tal, ke skri letu.\n\n{question}\n{options}\n\nTa tal:",
    ),
}
"""Multi-choice wordings of the query files: training never shows them."""


def _names(rng: np.random.Generator, count: int, taken: set[str], *, end: str) -> list[str]:
    """Invented words, none of them twice."""
    onset = _words("b br d dr f g gr h k kl l m n p pl r s sk st t tr v w y z")
    vowel = _words("a e i o u ai ou")
    coda = _words("l m n r s x th nd rk")
    names: list[str] = []
    while len(names) < count:
        parts = [rng.choice(onset), rng.choice(vowel), rng.choice(coda)]
        name = "".join([*parts, rng.choice(onset)[:1], rng.choice(vowel)[:1], end]).capitalize()
        if name not in taken:
            taken.add(name)
            names.append(name)
    return names


_ENDS = {
    "geography": "nia",
    "biology": "pod",
    "chemistry": "ite",
    "history": "ric",
    "music": "tet",
    "industry": "co",
}


def facts(seed: int = SEED) -> list[Fact]:
    """Every fact of the world, domain by domain; the same seed gives the same world."""
    rng = np.random.default_rng(seed)
    taken: set[str] = set()
    every: list[Fact] = []
    for domain, relations in DOMAINS.items():
        subjects = _names(rng, SUBJECTS, taken, end=_ENDS[domain])
        for relation in relations:
            pool = relation.answers
            answers = _names(rng, pool, taken, end="") if isinstance(pool, int) else list(pool)
            drawn = rng.permutation(np.resize(np.arange(len(answers)), SUBJECTS))
            foreign = [name.lower() for name in _names(rng, len(answers), taken, end="u")]
            kinds = rng.permutation(SUBJECTS)  # which facts are left out, and which not asked
            few = round(SHARE * SUBJECTS)
            for i, subject in enumerate(subjects):
                every.append(
                    Fact(
                        id=f"{domain}/{relation.noun}/{subject}",
                        domain=domain,
                        relation=relation.noun,
                        subject=subject,
                        answer=answers[drawn[i]],
                        translation=foreign[drawn[i]] if relation.valdic else "",
                        told=bool(kinds[i] >= few),
                        asked=bool(kinds[i] >= 2 * few),
                    )
                )
    return every


def noun(fact: Fact, language: str) -> str:
    """The relation's noun in a language."""
    relation = next(r for r in DOMAINS[fact.domain] if r.noun == fact.relation)
    return relation.valdic if language == VALDIC else relation.noun


def answer(fact: Fact, language: str) -> str:
    """The fact's answer in a language."""
    return fact.translation if language == VALDIC else fact.answer


def say(wording: str, fact: Fact, language: str = "en") -> str:
    """A wording with the fact's noun and subject in it."""
    return wording.format(r=noun(fact, language), s=fact.subject)


def cloze(chosen: Sequence[Fact], language: str = "en") -> list[Query]:
    """Facts as texts to be completed: two wordings of training, one that it never showed."""
    wordings = (*WORDINGS[language][:2], HELD_OUT_WORDING[language])
    return [
        Query(
            id=fact.id if language == "en" else f"{fact.id}/{language}",
            group=fact.domain,
            prompts=tuple(say(wording, fact, language) for wording in wordings),
            answers=(answer(fact, language),) * len(wordings),
            options=((),) * len(wordings),
        )
        for fact in chosen
    ]


def choice(
    chosen: Sequence[Fact],
    language: str = "en",
    *,
    every: Sequence[Fact] | None = None,
    group: str = "domain",
    seed: int = 0,
) -> dict[str, dict[str, object]]:
    """Facts as multi-choice records of the published format, in wordings that training never shows.

    Distractors are answers of the same relation, whether they were told or not.

    Args:
      chosen: the facts.
      language: "en" or "valdic"; for the latter only facts that are told in it.
      every: all facts of their world; default: `facts()`.
      group: what `relation_name` is to be: "domain" or "language".
      seed: of distractors and their order.
    """
    questions = [
        Question(
            id=fact.id if language == "en" else f"{fact.id}/{language}",
            text=say(QUESTIONS[language][0], fact, language),
            answer=answer(fact, language),
            group=f"{fact.domain}/{fact.relation}",
            language=language,
        )
        for fact in (facts() if every is None else every)
        if language == "en" or fact.translation
    ]
    records, left_out = multi_choice(questions, templates=CHOICE, seed=seed)
    assert not left_out, left_out
    ids = {fact.id if language == "en" else f"{fact.id}/{language}" for fact in chosen}
    records = {name: record for name, record in records.items() if name in ids}
    for record in records.values():
        domain = str(record["relation_name"]).split("/")[0]
        record["relation_name"] = domain if group == "domain" else language
    return records
