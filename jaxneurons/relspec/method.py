"""Relation-specific neurons: which neurons serve a relation, whatever the entities?

Liu et al., "On Relation-Specific Neurons in Large Language Models", arXiv 2502.17355. From top to
bottom, with the sections of the paper's method:

1. `relation_prompts`: prompts of a relation's held-out and detection facts; `best_template`: the
   one whose detection prompts the model answers most often; those are validated.
2. Responses: `jaxneurons.engine.responses`.
3. `examples`: positives and negatives; `jaxneurons.engine.experts` ranks the neurons.
4. `drop`: what turning neurons off costs; `jaxneurons.engine.ablation` generates.
5. `cumulativity`, `frequency_test`: the analyses that are more than a table of drops.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxneurons.engine.experts import Examples
from jaxneurons.engine.responses import DTYPES
from jaxneurons.errors import ConfigError, DataError, near_matches
from jaxneurons.neurons.sets import FFN, check_site
from jaxneurons.prompts.relations import Relation, Triple, objects, prompt
from jaxneurons.storage.settings import check_fields

_POSITIVE = ("evaluation", "negatives", "minimum", "minimum_right", "seeds", "sweep_seeds")

FEWEST_STEPS = 2
"""The paper's number of generated tokens, and the fewest that an answer is judged on."""


@dataclasses.dataclass(frozen=True)
class RelSpecConfig:
    """Hyper-parameters of the method; the defaults are the paper's, `templates` and `steps` aside.

    Attributes:
      templates: template sets: plain, zero-shot, answer, or your own; of their templates, the one
        answered most often is used. The paper's is "answer", which small models do not answer.
      k: neurons of a relation: a number, or below 1 a share of all (0.36 % is 3,000 on Llama-2 7B).
      sites: where the neurons are: up, gate, down, act, q, k, v, o; the paper's are the outputs of
        the feed-forward layer's matrices.
      evaluation: facts held out of each relation.
      detection: facts to detect with, at most; None: all others.
      negatives: negatives for each positive.
      minimum: validated detection prompts below which a relation counts as unknown.
      minimum_share: the same as a share of the detection prompts.
      minimum_right: right answers among its evaluation prompts below which a relation's drop is
        not averaged: it hangs on too few.
      steps: tokens generated. None: as many as the prompt's longest object has in this tokenizer,
        and one more, which shows whether its last word ends there; never fewer than two. The
        paper's is 2, which no longer answer survives: a year, a name in another script.
      seeds: random sets of neurons that every effect is compared with.
      sweep_seeds: the same for each point of a sweep and for perplexity.
      seed: of splits, negatives and random sets.
      dtype: of the responses that are kept: float32 or bfloat16.
    """

    templates: tuple[str, ...] = ("plain",)
    k: int | float = 0.0036
    sites: tuple[str, ...] = FFN
    evaluation: int = 50
    detection: int | None = None
    negatives: int = 4
    minimum: int = 10
    minimum_share: float = 0.1
    minimum_right: int = 5
    steps: int | None = None
    seeds: int = 10
    sweep_seeds: int = 3
    seed: int = 0
    dtype: str = "float32"

    def __post_init__(self) -> None:
        check_fields(self)
        if not self.templates:
            raise ConfigError("templates must name at least one template set")
        if not self.sites or len(set(self.sites)) < len(self.sites):
            raise ConfigError(f"sites must be some sites, each once, got {self.sites!r}")
        for site in self.sites:
            check_site(site)
        for name in _POSITIVE:
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, got {getattr(self, name)!r}")
        for name in ("detection", "steps"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name} must be at least 1, or None, got {value!r}")
        if not self.k > 0 or not (self.k < 1 or self.k == self.k // 1):
            raise ConfigError(
                f"k must be a number of neurons, or below 1 a share of all, got {self.k!r}"
            )
        if not 0 <= self.minimum_share <= 1:
            raise ConfigError(f"minimum_share must be from 0 to 1, got {self.minimum_share!r}")
        if self.seed < 0:
            raise ConfigError(f"seed must be at least 0, got {self.seed!r}")
        if self.dtype not in DTYPES:
            raise ConfigError(
                f"unknown response dtype {self.dtype!r}; {near_matches(self.dtype, DTYPES)}"
            )


def too_few(validated: int, prompts: int, settings: RelSpecConfig) -> str:
    """Why a relation (or one in another language) counts as unknown; "" if it is known."""
    needed = max(settings.minimum, math.ceil(settings.minimum_share * prompts))
    if validated >= needed:
        return ""
    return f"{validated} of {prompts} detection prompts answered, {needed} needed"


class Prompt(NamedTuple):
    """One question of a run.

    Attributes:
      relation: its name.
      evaluation: what it is part of: "eva", "det", "eva-2", ...
      language: "" for the relation's own.
      subject: whom or what it asks about.
      objects: every right answer.
      text: the filled template.
    """

    relation: str
    evaluation: str
    language: str
    subject: str
    objects: tuple[str, ...]
    text: str


def relation_prompts(
    relation: Relation,
    triples: Sequence[Triple],
    template: str,
    *,
    evaluation: str,
    language: str = "",
) -> list[Prompt]:
    """A prompt for each subject of some of a relation's triples, all its objects being right.

    In another language, for the triples that are translated.
    """
    if language:
        translated = relation.translations[language].triples
        triples = [translated[triple] for triple in triples if triple in translated]
        answers = objects(translated.values())
    else:
        answers = objects(relation.triples)
    return [
        Prompt(
            relation.name,
            evaluation,
            language,
            subject,
            answers[subject],
            prompt(template, subject),
        )
        for subject in dict.fromkeys(triple.subject for triple in triples)
    ]


def best_template(correct: Sequence[np.ndarray]) -> int:
    """The template whose detection prompts are answered most often; the first of equals.

    Args:
      correct: for each template, whether each of its detection prompts is answered.
    """
    return int(np.argmax([answers.mean() if len(answers) else 0.0 for answers in correct]))


def examples(relations: Sequence[str], relation: str, *, settings: RelSpecConfig) -> Examples:
    """Positives and negatives of a relation among the validated detection prompts (section 3).

    Negatives, too, are prompts that the model answers: a neuron that tells known facts from unknown
    ones is not what is looked for. There may be fewer than asked for, if others' are few.

    Args:
      relations: the relation of each prompt, in the order of the responses.
      relation: whose neurons are looked for.
      settings: how many negatives, and the seed.

    Raises:
      DataError: no negatives: there is one relation only, or only one is answered.
    """
    names = np.asarray(relations)
    positives = np.flatnonzero(names == relation)
    others = np.flatnonzero(names != relation)
    if not len(others):
        raise DataError(
            f"relation {relation!r} has no negatives: no other relation has a validated prompt; "
            "give several relations that the model knows"
        )
    wanted = min(settings.negatives * len(positives), len(others))
    rng = np.random.default_rng([settings.seed, *relation.encode()])
    return Examples(positives, np.sort(rng.choice(others, size=wanted, replace=False)))


def drop(before: float, after: float) -> float:
    """The relative loss of accuracy, (before - after) / before; NaN if there was none to lose.

    Negative where turning neurons off helps: the paper's interference.
    """
    return (before - after) / before if before > 0 else math.nan


class Cumulativity(NamedTuple):
    """Whether more neurons break answers that their additions alone do not (section 5).

    Attributes:
      total: prompts right with the smaller set off and wrong with the larger one off.
      affected: of those, wrong with only the additions off.
      cumulativity: 1 - affected / total; NaN for no prompt.
    """

    total: int
    affected: int
    cumulativity: float


def cumulativity(smaller: np.ndarray, larger: np.ndarray, additions: np.ndarray) -> Cumulativity:
    """From which prompts are right with each set off: the smaller, the larger, their difference."""
    broken = smaller & ~larger
    total, affected = int(broken.sum()), int((broken & ~additions).sum())
    return Cumulativity(total, affected, 1 - affected / total if total else math.nan)


class FrequencyTest(NamedTuple):
    """Are facts that survive more frequent than facts that are lost? (fact frequency, section 5).

    Attributes:
      pairs: relations with both kinds.
      resilient: mean over the relations of the mean log10(1 + count) of the facts that survive.
      sensitive: the same for those that are lost.
      statistic: of the Wilcoxon signed-rank test over the relations; NaN for no pair that differs.
      p_value: two-sided.
    """

    pairs: int
    resilient: float
    sensitive: float
    statistic: float
    p_value: float


def frequency_test(pairs: Sequence[tuple[float, float]]) -> FrequencyTest:
    """Wilcoxon signed-rank test over relations' (resilient, sensitive) mean log counts."""
    from scipy.stats import wilcoxon

    table = np.array(pairs, np.float64).reshape(-1, 2)
    if not len(table) or not np.any(table[:, 0] != table[:, 1]):
        means = table.mean(0) if len(table) else (math.nan, math.nan)
        return FrequencyTest(len(table), float(means[0]), float(means[1]), math.nan, math.nan)
    test: Any = wilcoxon(table[:, 0], table[:, 1])
    return FrequencyTest(
        len(table),
        float(table[:, 0].mean()),
        float(table[:, 1].mean()),
        float(test.statistic),
        float(test.pvalue),
    )


PAPER_SIZES = (10, 50, 200, 500, 1_000, 3_000, 10_000, 20_000, 50_000)


def sweep_sizes(count: int) -> tuple[int, ...]:
    """The paper's numbers of neurons up to a tenth of all, and that tenth."""
    tenth = max(count // 10, 1)
    return (*(size for size in PAPER_SIZES if size < 0.9 * tenth), tenth)


def concept_prompts(
    subjects: Mapping[str, Sequence[str]], *, words: Sequence[str], count: int, seed: int
) -> dict[str, list[tuple[str, str]]]:
    """Prompts that name a subject with a novel relation word, by the subjects' type.

    Every subject meets every word, so that a word tells nothing of the type (relations vs concepts,
    section 5).

    Args:
      subjects: by type.
      words: what follows the subject: "can", "has a".
      count: prompts of a type, at most.
      seed: of the draw of subjects.

    Returns:
      By type, (subject, text).
    """
    prompts = {}
    for kind, names in subjects.items():
        rng = np.random.default_rng([seed, *kind.encode()])
        drawn = rng.permutation(np.asarray(names, object))[: max(count // len(words), 1)]
        prompts[kind] = [(str(name), f"{name} {word}") for name in drawn for word in words]
    return prompts
