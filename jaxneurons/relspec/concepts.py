"""Relations vs concepts: neurons of the subjects' types (arXiv 2502.17355, section 5)."""

from collections.abc import Mapping, Sequence

import numpy as np

from jaxneurons.engine.experts import Examples
from jaxneurons.neurons.controls import CONCEPTS, generator, random_neurons
from jaxneurons.neurons.sets import NeuronSet, neuron_count
from jaxneurons.relspec import method
from jaxneurons.relspec.collection import Collection
from jaxneurons.relspec.drops import TableRows, measure, relation_sets
from jaxneurons.relspec.method import Prompt
from jaxneurons.storage.tables import Row

WORDS = ("can", "has a", "is often", "may be", "was")
"""Novel relation words: they name no relation of a run."""

CONCEPT_PROMPTS = 200
VALIDATION_PROMPTS = 100
FEWEST = 8
"""Subjects that make a type."""

Subjects = Mapping[str, Mapping[str, None]]
"""Each once, by type, in their order."""


def concepts(study: Collection) -> TableRows:
    """Relations vs concepts: neurons of the subjects' types, and what relations share with them.

    Concept neurons tell prompts about subjects of a type from prompts about others, with words that
    name no relation, each as often in both. `concept_validation`: their mean average precision on
    prompts of held-out subjects, beside that of random neurons.
    """
    detection, evaluation = _subjects(study)
    kinds = [kind for kind in detection if kind and len(detection[kind]) >= FEWEST]
    if len(kinds) < 2:
        return {}
    seed, sites = study.settings.seed, study.settings.sites
    prompts = _concept_prompts("detection", detection, kinds, CONCEPT_PROMPTS, seed)
    examples = _examples(prompts, kinds, study.settings.negatives, seed)
    experts = study.expertise("concepts", prompts, examples, sites)
    sets = {kind: scores.top(sites, study.k, study.lm.config) for kind, scores in experts.items()}
    fresh = {
        kind: dict.fromkeys(s for s in evaluation.get(kind, ()) if s not in detection[kind])
        for kind in kinds
    }
    chance = study.k**2 / neuron_count(study.lm.config, study.settings.sites)
    shared = [
        {
            "concept": kind,
            "relation": name,
            "own_type": study.relations[name].subject_type == kind,
            "shared": len(of_kind & neurons),
            "k": study.k,
            "by_chance": chance,
        }
        for kind, of_kind in sets.items()
        for name, neurons in study.neurons().items()
    ]
    validation = _validation(study, fresh, sets)
    rows = measure(study, "concepts", relation_sets(sets), study.evaluation)
    return {"concepts": shared, "concept_validation": validation, "concept_ablation": rows}


def _subjects(study: Collection) -> tuple[Subjects, Subjects]:
    """Subjects of the detection facts and of the held-out ones, by type."""
    detection: dict[str, dict[str, None]] = {}
    evaluation: dict[str, dict[str, None]] = {}
    for name, prompts in study.prompts.items():
        kind = study.relations[name].subject_type
        for triples, subjects in (
            (prompts.split.detection, detection),
            (prompts.split.evaluation, evaluation),
        ):
            subjects.setdefault(kind, {}).update(dict.fromkeys(t.subject for t in triples))
    return detection, evaluation


def _validation(study: Collection, fresh: Subjects, sets: Mapping[str, NeuronSet]) -> list[Row]:
    """Average precision of concept neurons on subjects that they were not detected with."""
    seed, sites = study.settings.seed, study.settings.sites
    kinds = [kind for kind in fresh if fresh[kind]]
    if len(kinds) < 2:
        return []
    prompts = _concept_prompts("validation", fresh, kinds, VALIDATION_PROMPTS // 2, seed)
    examples = _examples(prompts, kinds, 1, seed)
    random = random_neurons(study.lm.config, sites, study.k, generator(seed, CONCEPTS))
    return [
        {
            "concept": kind,
            "prompts": sum(map(len, examples[kind])),
            "average_precision": _mean_score(experts.scores, sets[kind]),
            "random_neurons": _mean_score(experts.scores, random),
        }
        for kind, experts in study.expertise("validation", prompts, examples, sites).items()
    ]


def _concept_prompts(
    part: str, subjects: Subjects, kinds: Sequence[str], count: int, seed: int
) -> list[Prompt]:
    names = {kind: list(subjects[kind]) for kind in kinds}
    prompts = method.concept_prompts(names, words=WORDS, count=count, seed=seed)
    return [
        Prompt(kind, part, "", subject, (), text)
        for kind, of_kind in prompts.items()
        for subject, text in of_kind
    ]


def _examples(
    prompts: Sequence[Prompt], kinds: Sequence[str], ratio: int, seed: int
) -> dict[str, Examples]:
    """Positives and negatives of each type, every word as often in both as its share allows."""
    endings = np.array([prompt.text[len(prompt.subject) :] for prompt in prompts])
    kind_of = np.array([prompt.relation for prompt in prompts])
    examples = {}
    for kind in kinds:
        rng = np.random.default_rng([seed, 5, *kind.encode()])
        positives, negatives = [], []
        for ending in np.unique(endings):
            of_kind = np.flatnonzero((endings == ending) & (kind_of == kind))
            others = np.flatnonzero((endings == ending) & (kind_of != kind))
            count = min(ratio * len(of_kind), len(others))
            positives.append(of_kind)
            negatives.append(rng.choice(others, count, replace=False))
        examples[kind] = Examples(
            np.sort(np.concatenate(positives)), np.sort(np.concatenate(negatives))
        )
    return examples


def _mean_score(scores: Mapping[str, np.ndarray], neurons: NeuronSet) -> float:
    return float(np.mean([scores[site][neuron.layer, neuron.index] for site, neuron in neurons]))
