"""What makes located neurons doubtful: answers the model would not say, paths not resolved."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np

from jaxneurons.engine.quadrature import Quadrature
from jaxneurons.prompts.answers import LOW_ODDS, LOW_OPTION_MASS
from jaxneurons.prompts.queries import Query
from jaxneurons.qrnca.method import PromptScores

LARGE_GAP = 0.01
"""Completeness gap, in probability, from which scores of the adaptive rule are in doubt."""

Prompts = Mapping[str, Sequence[PromptScores]]
"""By query id, the scores of each of its prompts."""


class CaveatWarning(UserWarning):
    """Something makes located neurons doubtful."""


class LowOptionMassWarning(CaveatWarning):
    """The options hold little probability: the model would rather say something else."""


class UnlikelyAnswerWarning(CaveatWarning):
    """An answer is far from the model's first choice, so its neurons may be another word's."""


class UnresolvedWarning(CaveatWarning):
    """The adaptive rule stopped at `Quadrature.max_nodes` before a layer's path was resolved."""


def caveats(
    queries: Sequence[Query],
    prompts: Prompts,
    *,
    quadrature: Quadrature,
    decode: Callable[[list[int]], object],
) -> Iterator[tuple[type[CaveatWarning], str]]:
    """Warnings about a run, by category.

    Args:
      queries: of the run.
      prompts: the scores of each of their prompts.
      quadrature: the rule that they were attributed by.
      decode: token ids to text.
    """
    masses = [prompt.option_mass for scores in prompts.values() for prompt in scores]
    masses = [mass for mass in masses if not math.isnan(mass)]
    if masses and np.mean(masses) < LOW_OPTION_MASS:
        yield (
            LowOptionMassWarning,
            f"the options hold only {np.mean(masses):.1%} of the probability on average: the model "
            "would rather say something else, so these neurons may not be about the answer",
        )
    if text := _unresolved(queries, prompts, quadrature):
        yield UnresolvedWarning, text
    if text := _unlikely(queries, prompts, decode):
        yield UnlikelyAnswerWarning, text


def _unresolved(queries: Sequence[Query], prompts: Prompts, quadrature: Quadrature) -> str | None:
    if quadrature.rule != "adaptive":
        return None
    gaps = [
        (float(prompt.gap.max()), query.id, i, int(prompt.gap.argmax()))
        for query in queries
        for i, prompt in enumerate(prompts[query.id])
    ]
    far = [place for place in gaps if place[0] > LARGE_GAP]
    if not far:
        return None
    gap, query, i, layer = max(far)
    more = 4 * quadrature.max_nodes
    return (
        f"{len(far)} of {len(gaps)} prompts have a completeness gap above {LARGE_GAP:g}, so their "
        f"scores are not converged (largest: {gap:.2g} in layer {layer}, query {query!r}, prompt "
        f"{i + 1}): more nodes resolve them, --max-nodes {more} or Quadrature(max_nodes={more})"
    )


def _unlikely(
    queries: Sequence[Query], prompts: Prompts, decode: Callable[[list[int]], object]
) -> str | None:
    far = [
        (prompt.odds, query, i, prompt.choice)
        for query in queries
        for i, prompt in enumerate(prompts[query.id])
        if math.isnan(prompt.option_mass) and prompt.odds < LOW_ODDS
    ]
    if not far:
        return None
    odds, query, i, choice = min(far, key=lambda place: place[0])
    return (
        f"{len(far)} of {sum(map(len, prompts.values()))} prompts have an answer that is less than "
        f"{LOW_ODDS:g} times as probable as the model's first choice: their neurons may be about "
        f"something else (furthest: query {query.id!r}, prompt {i + 1}: {query.answers[i]!r} is "
        f"{odds:.1g} times as probable as {decode([choice])!r}; state its `separator` if it is to "
        "be joined otherwise)"
    )
