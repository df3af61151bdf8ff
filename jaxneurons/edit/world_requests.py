"""Requests about the lab's invented world, where all that is true is known.

A fact of the world is to get another answer of the same relation. The world's other wordings are
the paraphrases, the same relation of other subjects the neighbours; and what should follow from the
edit can be asked: as a question with options, backwards, and in the other language.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np

from jaxneurons.edit.requests import EditRequest
from jaxneurons.errors import DataError
from jaxneurons.lab.world import (
    HELD_OUT_WORDING,
    QUESTIONS,
    VALDIC,
    WORDINGS,
    Fact,
    answer,
    choice,
    facts,
    say,
)
from jaxneurons.neurons.controls import generator
from jaxneurons.storage.settings import check_number

PORTABILITY = ("options", "backwards", "language")
"""What the entries of `EditRequest.portability` are, in order; facts told in one language lack the
last. "backwards" asks for the subject: of the others with that answer too, any would be right."""
NEIGHBOURS = 5
"""Other subjects of a request's relation whose answers are to stay."""
OPTIONS = 4
"""Of a question: the new answer, the old one and two others."""
BACKWARDS = "{a} is the {r} of"


def lab_requests(count: int | None = None, seed: int = 0) -> list[EditRequest]:
    """Requests to change facts that the lab model was told and asked in training.

    Args:
      count: how many; None: one for each such fact.
      seed: of which facts, of their new answers and of the neighbours; a larger count begins with
        the requests of a smaller one.

    Raises:
      DataError: there are fewer such facts.
      ConfigError: a number that is too small.
    """
    if count is not None:
        check_number("count", count, least=1)
    world = facts()
    rng = generator(seed, "lab requests")
    asked = [world[i] for i in rng.permutation(len(world)) if world[i].asked]
    if count is not None and count > len(asked):
        raise DataError(f"{count} requests: the lab model was asked {len(asked)} facts")
    return [
        _request(fact, world, generator(seed, "lab request", fact.id)) for fact in asked[:count]
    ]


def _request(fact: Fact, world: Sequence[Fact], rng: np.random.Generator) -> EditRequest:
    relation = [f for f in world if (f.domain, f.relation) == (fact.domain, fact.relation)]
    others = sorted({f.answer for f in relation} - {fact.answer})
    target = others[int(rng.integers(len(others)))]
    translation = next(f.translation for f in relation if f.answer == target)
    edited = dataclasses.replace(fact, answer=target, translation=translation)
    told = [f for f in relation if f.told and f.id != fact.id and f.answer != target]
    near = [told[i] for i in rng.choice(len(told), NEIGHBOURS, replace=False)]
    prompt, *wordings = WORDINGS["en"]
    return EditRequest(
        prompt=say(prompt, fact),
        subject=fact.subject,
        target=target,
        ground_truth=fact.answer,
        paraphrases=tuple(
            say(wording, fact)
            for wording in (*wordings, HELD_OUT_WORDING["en"], QUESTIONS["en"][0])
        ),
        neighbours=tuple((say(prompt, other), other.answer) for other in near),
        portability=_portability(edited, fact, relation, int(rng.integers(2**31))),
        id=fact.id,
    )


def _portability(
    edited: Fact, before: Fact, relation: Sequence[Fact], seed: int
) -> tuple[tuple[str, str], ...]:
    """What follows from an edited fact, in the order of `PORTABILITY`.

    The answer `before` is always among the options: one that says it still must not be right for
    want of it.
    """
    rng = generator(seed, "options")
    rest = sorted({fact.answer for fact in relation} - {edited.answer, before.answer})
    wrong = [before.answer, *rng.choice(rest, OPTIONS - 2, replace=False).tolist()]
    others = [
        dataclasses.replace(before, id=f"{before.id}/{n}", answer=answer)
        for n, answer in enumerate(wrong)
    ]
    record = choice([edited], every=[edited, *others], seed=seed)[edited.id]
    sentences, labels = record["sentences"], record["obj_label"]
    assert isinstance(sentences, list)
    assert isinstance(labels, list)
    backwards = BACKWARDS.format(a=edited.answer, r=edited.relation)
    entries = [(str(sentences[0]), str(labels[0])), (backwards, edited.subject)]
    if edited.translation:
        entries.append((say(WORDINGS[VALDIC][0], edited, VALDIC), answer(edited, VALDIC)))
    return tuple(entries)
