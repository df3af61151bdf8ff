"""Relations vs concepts: neurons of the subjects' types (arXiv 2502.17355, section 5)."""

from collections.abc import Mapping, Sequence

import numpy as np

from jaxneurons.engine.experts import Examples
from jaxneurons.neurons.controls import CONCEPTS, generator, random_neurons
from jaxneurons.neurons.sets import NeuronSet, neuron_count
from jaxneurons.relspec import method as relspec
from jaxneurons.relspec.analyses import Tables, measure, own_sets
from jaxneurons.relspec.method import Prompt
from jaxneurons.relspec.study import Study

WORDS = ("can", "has a", "is often", "may be", "was")
"""Novel relation words: they name no relation of a run."""

CONCEPT_PROMPTS = 200
VALIDATION_PROMPTS = 100
FEWEST = 8
"""Subjects that make a type."""


def concepts(study: Study) -> Tables:
    """Relations vs concepts: neurons of the subjects' types, and what relations share with them.

    Concept neurons tell prompts about subjects of a type from prompts about others, with words that
    name no relation, each as often in both. `concept_validation`: their mean average precision on
    prompts of held-out subjects, beside that of random neurons.
    """
    seen: dict[str, dict[str, None]] = {}
    held: dict[str, dict[str, None]] = {}
    for name, asked in study.asked.items():
        kind = study.relations[name].subject_type
        for triples, found in ((asked.split.detection, seen), (asked.split.evaluation, held)):
            found.setdefault(kind, {}).update(dict.fromkeys(t.subject for t in triples))
    kinds = [kind for kind in seen if kind and len(seen[kind]) >= FEWEST]
    if len(kinds) < 2:
        return {}
    seed, sites = study.settings.seed, study.settings.sites
    detection = _concept_prompts("detection", seen, kinds, CONCEPT_PROMPTS, seed)
    told = _told_apart(detection, kinds, study.settings.negatives, seed)
    found = study.expertise("concepts", detection, told, sites)
    sets = {kind: one.top(sites, study.k, study.lm.config) for kind, one in found.items()}
    fresh = {k: dict.fromkeys(s for s in held.get(k, ()) if s not in seen[k]) for k in kinds}
    checked = [kind for kind in kinds if fresh[kind]]
    validated = []
    if len(checked) > 1:
        prompts = _concept_prompts("validation", fresh, checked, VALIDATION_PROMPTS // 2, seed)
        told = _told_apart(prompts, checked, 1, seed)
        chosen = random_neurons(study.lm.config, sites, study.k, generator(seed, CONCEPTS))
        validated = [
            {
                "concept": kind,
                "prompts": sum(map(len, told[kind])),
                "average_precision": _mean_score(one.scores, sets[kind]),
                "random_neurons": _mean_score(one.scores, chosen),
            }
            for kind, one in study.expertise("validation", prompts, told, sites).items()
        ]
    chance = study.k**2 / neuron_count(study.lm.config, study.settings.sites)
    shared = [
        {
            "concept": kind,
            "relation": name,
            "own_type": study.relations[name].subject_type == kind,
            "shared": len(one & neurons),
            "k": study.k,
            "by_chance": chance,
        }
        for kind, one in sets.items()
        for name, neurons in study.neurons().items()
    ]
    rows = measure(study, "concepts", own_sets(sets), study.evaluation)
    return {"concepts": shared, "concept_validation": validated, "concept_ablation": rows}


def _concept_prompts(
    part: str,
    subjects: Mapping[str, Mapping[str, None]],
    kinds: Sequence[str],
    each: int,
    seed: int,
) -> list[Prompt]:
    some = {kind: list(subjects[kind]) for kind in kinds}
    made = relspec.concept_prompts(some, words=WORDS, each=each, seed=seed)
    return [Prompt(k, part, "", s, (), text) for k, found in made.items() for s, text in found]


def _told_apart(
    prompts: Sequence[Prompt], kinds: Sequence[str], ratio: int, seed: int
) -> dict[str, Examples]:
    """Positives and negatives of each type, every word as often in both as its share allows."""
    endings = np.array([one.text[len(one.subject) :] for one in prompts])
    owner = np.array([one.relation for one in prompts])
    found = {}
    for kind in kinds:
        rng = np.random.default_rng([seed, 5, *kind.encode()])
        positives, negatives = [], []
        for ending in np.unique(endings):
            own = np.flatnonzero((endings == ending) & (owner == kind))
            others = np.flatnonzero((endings == ending) & (owner != kind))
            count = min(ratio * len(own), len(others))
            positives.append(own)
            negatives.append(rng.choice(others, count, replace=False))
        found[kind] = Examples(
            np.sort(np.concatenate(positives)), np.sort(np.concatenate(negatives))
        )
    return found


def _mean_score(scores: Mapping[str, np.ndarray], neurons: NeuronSet) -> float:
    return float(np.mean([scores[site][one.layer, one.index] for site, one in neurons]))
