"""What a model made of a request's questions, and the measures that are read off it.

Every answer is judged twice: by teacher forcing, whole answers, as most papers do, and by free
greedy generation, whose text is cut at the end of its first sentence and never at the answer's
length (Yang et al. 2025, arXiv 2502.11177). Both stand side by side in every row. `judging.gives`
says when a text gives an answer.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxneurons.edit import judging
from jaxneurons.edit.cases import Case
from jaxneurons.storage.tables import Row

SHARES = (
    *(f"efficacy_{how}" for how in ("probability", "forced", "free")),
    *(f"generalisation_{how}" for how in ("probability", "forced", "free")),
    *(f"locality_{how}" for how in ("probability", "forced", "free", "known")),
    *(f"portability_{how}" for how in ("forced", "free")),
)
"""Measures from 0 to 1, the more the better."""
MEASURES = (*SHARES, "locality_kl", "fluency", "perplexity", "perplexity_ratio")
"""All measures of a row, in the order of its columns; see `measure`."""


class Outcome(NamedTuple):
    """What a model makes of the questions of a case.

    Attributes:
      log_probability: [question, 2] of the wanted answer and of the other one.
      choices: [question, token] first choices at the tokens of the wanted answer.
      following: [neighbour, vocab] log-probabilities of the token after each neighbour's prompt.
      texts: free generation after each question.
      continuation: the long one after the prompt; "" without fluency.
      loss: mean -log p of a token of neutral texts; NaN without perplexity.
      finite: whether all of it is.
    """

    log_probability: np.ndarray
    choices: np.ndarray
    following: np.ndarray
    texts: tuple[str, ...]
    continuation: str
    loss: float
    finite: bool


def measured_row(case: Case, outcome: Outcome, unedited: Outcome) -> Row:
    """The measures of a case, as `measure` says them.

    Args:
      case: the request's.
      outcome: with the edit.
      unedited: without.
    """
    row: Row = dict.fromkeys(MEASURES)
    row |= {"probability_new": None, "probability_old": None}
    row |= {"generated": outcome.texts[0], "failed": ""}
    prompts, paraphrases, neighbours, portability = (
        [i for i, q in enumerate(case.questions) if q.kind == kind]
        for kind in ("prompt", "paraphrase", "neighbour", "portability")
    )
    row |= _answered("efficacy", case, outcome, prompts)
    row |= _answered("generalisation", case, outcome, paraphrases)
    ported = _answered("portability", case, outcome, portability)
    row |= {name: value for name, value in ported.items() if name in row}
    row |= _kept(case, outcome, unedited, neighbours)
    if not outcome.finite:
        # A model that says nothing has not been edited well: its shares are 0, and not left out.
        row |= {name: 0.0 for name in SHARES if row[name] is not None}
        return row | {"locality_kl": None, "failed": "numbers that are not finite"}
    new, old = np.exp(outcome.log_probability[0])
    row["probability_new"] = float(new)
    row["probability_old"] = float(old) if case.questions[0].other else None
    if outcome.continuation or unedited.continuation:
        row["fluency"] = judging.fluency(outcome.continuation)
    if np.isfinite(outcome.loss):
        with np.errstate(over="ignore"):
            row["perplexity"] = float(np.exp(outcome.loss))
            row["perplexity_ratio"] = float(np.exp(outcome.loss - unedited.loss))
    return row


def _answered(name: str, case: Case, outcome: Outcome, index: Sequence[int]) -> Row:
    """Mean over questions of whether they get the wanted answer, in each of three ways."""
    forced, free, likelier = [], [], []
    for i in index:
        question = case.questions[i]
        choices = outcome.choices[i, : len(question.wanted)]
        forced.append(tuple(choices.tolist()) == question.wanted)
        free.append(judging.gives(outcome.texts[i], question.answer))
        if question.other:
            likelier.append(outcome.log_probability[i, 0] > outcome.log_probability[i, 1])
    return {
        f"{name}_probability": _mean(likelier),
        f"{name}_forced": _mean(forced),
        f"{name}_free": _mean(free),
    }


def _kept(case: Case, outcome: Outcome, unedited: Outcome, index: Sequence[int]) -> Row:
    """Mean over neighbours of whether they are as they were."""
    forced, free, known, likelier, divergence = [], [], [], [], []
    for number, i in enumerate(index):
        question, count = case.questions[i], len(case.questions[i].wanted)
        forced.append((outcome.choices[i, :count] == unedited.choices[i, :count]).all())
        free.append(judging.same_sentence(outcome.texts[i], unedited.texts[i]))
        if judging.gives(unedited.texts[i], question.answer):
            known.append(judging.gives(outcome.texts[i], question.answer))
        if question.answer:
            likelier.append(outcome.log_probability[i, 0] > outcome.log_probability[i, 1])
        before, after = (o.following[number].astype(np.float64) for o in (unedited, outcome))
        divergence.append((np.exp(before) * (before - after)).sum())
    return {
        "locality_probability": _mean(likelier),
        "locality_forced": _mean(forced),
        "locality_free": _mean(free),
        "locality_known": _mean(known),
        "locality_kl": _mean(divergence),
    }


def answer_rows(case: Case, outcome: Outcome) -> list[Row]:
    """A row for each question of a case: what was to follow, and whether and what did.

    `number` counts the questions of a kind; `forced` and `free` are None after a neighbour whose
    answer is not known.
    """
    rows: list[Row] = []
    for i, question in enumerate(case.questions):
        known = bool(question.answer)
        choices = tuple(outcome.choices[i, : len(question.wanted)].tolist())
        rows.append(
            {
                "kind": question.kind,
                "number": sum(row["kind"] == question.kind for row in rows),
                "prompt": question.text,
                "answer": question.answer,
                "forced": choices == question.wanted if known else None,
                "free": judging.gives(outcome.texts[i], question.answer) if known else None,
                "generated": outcome.texts[i],
            }
        )
    return rows


def _mean(values: Sequence[Any]) -> float | None:
    return float(np.mean(values)) if values else None
