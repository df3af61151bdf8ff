"""Relations vs concepts: neurons of the subjects' types (arXiv 2502.17355, section 5)."""

from collections.abc import Mapping, Sequence

import numpy as np

from jaxneurons import relspec
from jaxneurons.analyses import Tables, measure, own_sets
from jaxneurons.expertise import Examples
from jaxneurons.neurons import NeuronSet, neuron_count, random_neurons
from jaxneurons.relspec import Prompt
from jaxneurons.study import Study

WORDS = ("can", "has a", "is often", "may be")
"""Novel relation words: they name no relation of a run."""

CONCEPT_PROMPTS = 200
VALIDATION_PROMPTS = 100


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
    kinds = [kind for kind in seen if kind and len(seen[kind]) >= 2 * len(WORDS)]
    if len(kinds) < 2:
        return {}
    seed, each = study.settings.seed, VALIDATION_PROMPTS // 2
    detection = _concept_prompts("detection", {kind: list(seen[kind]) for kind in kinds}, seed)
    fresh = {k: [s for s in held.get(k, ()) if s not in seen[k]] for k in kinds}
    validation = _concept_prompts("validation", fresh, seed)
    ratio = study.settings.negatives
    found = study.expertise(
        "concepts", detection, _told_apart(detection, kinds, ratio, seed), study.settings.sites
    )
    sets = {
        kind: one.top(study.settings.sites, study.k, study.lm.config) for kind, one in found.items()
    }
    checked = [kind for kind in kinds if sum(p.relation == kind for p in validation) >= 1]
    held_out = study.expertise(
        "validation",
        validation,
        _told_apart(validation, checked, 1, seed, most=each),
        study.settings.sites,
    )
    chosen = random_neurons(
        study.lm.config, study.settings.sites, study.k, np.random.default_rng([seed, 4])
    )
    validated = [
        {
            "concept": kind,
            "prompts": 2 * min(each, sum(p.relation == kind for p in validation)),
            "average_precision": _mean_score(one.scores, sets[kind]),
            "random_neurons": _mean_score(one.scores, chosen),
        }
        for kind, one in held_out.items()
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


def _concept_prompts(part: str, subjects: dict[str, list[str]], seed: int) -> list[Prompt]:
    made = relspec.concept_prompts(subjects, words=WORDS, each=CONCEPT_PROMPTS, seed=seed)
    return [Prompt(k, part, "", s, (), text) for k, some in made.items() for s, text in some]


def _told_apart(
    prompts: Sequence[Prompt], kinds: Sequence[str], ratio: int, seed: int, most: int | None = None
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
            if most is not None:
                own = own[: max(most // len(WORDS), 1)]
            count = min(ratio * len(own), len(others))
            positives.append(own)
            negatives.append(rng.choice(others, count, replace=False))
        found[kind] = Examples(
            np.sort(np.concatenate(positives)), np.sort(np.concatenate(negatives))
        )
    return found


def _mean_score(scores: Mapping[str, np.ndarray], neurons: NeuronSet) -> float:
    return float(np.mean([scores[site][one.layer, one.index] for site, one in neurons]))
