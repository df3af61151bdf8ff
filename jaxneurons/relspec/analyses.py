"""The analyses of arXiv 2502.17355, sections 4 and 5, as tidy tables of one study.

Each function takes a study's `Collection` and gives rows of tables by name, one row per thing
measured. A relation that the model does not know is in no table but `relations`.
`wordings`, `concepts` and `perplexity` hold the others.
"""

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool

from jaxneurons.errors import DataError
from jaxneurons.neurons.controls import layer_matched_sets
from jaxneurons.neurons.sets import ATTENTION, FFN, NeuronSet, neuron_count
from jaxneurons.prompts.matching import ERRORS, error_class, words
from jaxneurons.prompts.relations import Triple
from jaxneurons.relspec import method
from jaxneurons.relspec.collection import Collection
from jaxneurons.relspec.drops import TableRows, control_sets, measure, relation_sets
from jaxneurons.relspec.method import Prompt
from jaxneurons.storage.tables import Row

Counts = Mapping[tuple[str, Triple], float]
"""How often each fact occurs, by (relation, triple)."""

TYPES = {
    "all": (*FFN, *ATTENTION),
    "ffn": FFN,
    "attention": ATTENTION,
    "up": ("up",),
    "gate": ("gate",),
    "down": ("down",),
}


def ablation(study: Collection) -> TableRows:
    """Controlled generation (section 4): intra- and inter-relation, held-out and detection facts.

    Beside the paper's k random neurons, random neurons of the same layers and sites ("matched"),
    unless a relation's neurons are more than half of a layer's.
    """
    neurons = study.neurons()
    sets = relation_sets(neurons) + control_sets(study.random(study.settings.seeds))
    rows = measure(study, "ablation", sets, [*study.evaluation, *study.detection])
    for name, of_relation in neurons.items():
        try:
            matched = layer_matched_sets(
                of_relation,
                study.lm.config,
                seed=study.settings.seed,
                name=name,
                count=study.settings.sweep_seeds,
            )
        except DataError:  # more than half of a layer: no such control
            continue
        evaluation = study.prompts[name].evaluation
        rows += measure(study, "ablation", control_sets(matched, "matched"), evaluation)
    return {"ablation": rows}


def layers(study: Collection) -> TableRows:
    """How a relation's neurons spread over layers and sites."""
    return {
        "layers": [
            {"relation": name, **row}
            for name, neurons in study.neurons().items()
            for row in _spread(study, neurons)
        ]
    }


def _spread(study: Collection, neurons: NeuronSet) -> list[Row]:
    counts = neurons.layer_counts(study.lm.config.num_layers)
    return [
        {"site": site, "layer": layer, "neurons": int(count)}
        for site, of_site in counts.items()
        for layer, count in enumerate(of_site)
    ]


def overlap(study: Collection) -> TableRows:
    """Neurons that two relations share, and how many two random sets would."""
    neurons = study.neurons()
    chance = study.k**2 / neuron_count(study.lm.config, study.settings.sites)
    rows = [
        {"relation": a, "other": b, "shared": len(x & y), "k": study.k, "by_chance": chance}
        for a, x in neurons.items()
        for b, y in neurons.items()
    ]
    return {"overlap": rows}


def _sizes(study: Collection) -> tuple[int, ...]:
    return method.sweep_sizes(neuron_count(study.lm.config, study.settings.sites))


def sizes(study: Collection) -> TableRows:
    """Every relation's neurons off, from ten to a tenth of all; every relation asked."""
    rows = []
    for k in _sizes(study):
        random = study.random(study.settings.sweep_seeds, k)
        sets = relation_sets(study.neurons(k)) + control_sets(random)
        rows += measure(study, "sizes", sets, study.evaluation)
    return {"sizes": rows}


def cumulativity(study: Collection) -> TableRows:
    """Do more neurons break answers that the additions alone do not?"""
    by_size = {k: study.neurons(k) for k in _sizes(study)}
    steps = list(by_size)
    rows = []
    for name in study.known:
        prompts = study.prompts[name].evaluation
        sets = [by_size[k][name] for k in steps]
        additions = [larger - smaller for smaller, larger in itertools.pairwise(sets)]
        # All held-out prompts, so that the sweep's generations are found.
        evaluation = study.evaluation
        index = [i for i, prompt in enumerate(evaluation) if prompt.relation == name]
        correct = study.judge(study.generate("cumulativity", sets, evaluation)[:, index], prompts)
        alone = study.judge(study.generate("cumulativity", additions, prompts), prompts)
        for i, (a, b) in enumerate(itertools.pairwise(steps)):
            counts = method.cumulativity(correct[i], correct[i + 1], alone[i])
            rows.append({"relation": name, "a": a, "b": b, **finite(counts._asdict())})
    return {"cumulativity": rows, "cumulativity_mean": cumulativity_means(rows)}


def cumulativity_means(rows: Sequence[Row]) -> list[Row]:
    """By step, and over all steps (a and b None): macro over relations, micro over prompts.

    Over all steps, macro averages within a relation first.
    """
    steps = [*dict.fromkeys((row["a"], row["b"]) for row in rows), (None, None)]
    means = []
    for a, b in steps:
        of_step = [r for r in rows if r["total"] and (a is None or (r["a"], r["b"]) == (a, b))]
        by_relation: dict[str, list[float]] = {}
        for row in of_step:
            by_relation.setdefault(row["relation"], []).append(row["cumulativity"])
        total = sum(row["total"] for row in of_step)
        if total:
            means.append(
                {
                    "a": a,
                    "b": b,
                    "relations": len(by_relation),
                    "total": total,
                    "macro": float(np.mean([np.mean(values) for values in by_relation.values()])),
                    "micro": 1 - sum(row["affected"] for row in of_step) / total,
                }
            )
    return means


def finite(values: Mapping[str, Any]) -> Row:
    """A row with None for NaN."""
    return {
        name: None if isinstance(value, float) and math.isnan(value) else value
        for name, value in values.items()
    }


def types(study: Collection) -> TableRows:
    """Which outputs: all, attention only, up, gate, down; spread and inter-relation drops."""
    rows, spread = [], []
    for kind, sites in TYPES.items():
        k = min(study.k, neuron_count(study.lm.config, sites) // 2)
        neurons = study.neurons(k, sites)
        random = study.random(study.settings.sweep_seeds, k, sites)
        sets = relation_sets(neurons, type=kind) + control_sets(random, type=kind)
        rows += measure(study, "types", sets, study.evaluation)
        for name, of_relation in neurons.items():
            spread += [
                {"type": kind, "relation": name, **row} for row in _spread(study, of_relation)
            ]
    return {"types": rows, "type_layers": spread}


def errors(study: Collection) -> TableRows:
    """What wrong answers look like: with no neuron off, with the relation's, with random ones.

    The kind of an error is told from two tokens, as in the paper, whatever its objects need; from
    all, where two are no word yet (a character of many bytes).
    """
    prompts = [*study.evaluation, *study.detection]  # as in `ablation`, whose generations these are
    sets = relation_sets(study.neurons()) + control_sets(study.random(study.settings.seeds))
    every_set = [NeuronSet(), *(neurons for _, neurons in sets)]
    generations = study.generate("errors", every_set, prompts)
    correct = study.judge(generations, prompts)
    offs = ["none", *(label["off"] for label, _ in sets)]
    counts: dict[tuple[str, str], dict[str, int]] = {}
    answers = []
    for off, of_set, right_of_set in zip(offs, generations, correct, strict=True):
        for prompt, tokens, is_right in zip(prompts, of_set, right_of_set, strict=True):
            if prompt.evaluation != "eva" or off not in ("none", "random", prompt.relation):
                continue
            condition = "own" if off == prompt.relation else off
            classes = counts.setdefault((prompt.relation, condition), dict.fromkeys(ERRORS, 0))
            if not is_right:
                classes[_error_class(study, tokens, prompt)] += 1
            if condition != "random":
                answers.append(
                    {
                        "relation": prompt.relation,
                        "off": condition,
                        "subject": prompt.subject,
                        "object": " | ".join(prompt.objects),
                        "said": study.decode(tokens),
                        "right": bool(is_right),
                    }
                )
    rows = [
        {
            "relation": relation,
            "off": condition,
            "error": error,
            "answers": count,
            "share": count / max(sum(classes.values()), 1),
        }
        for (relation, condition), classes in counts.items()
        for error, count in classes.items()
    ]
    return {"errors": rows, "answers": answers}


def _error_class(study: Collection, tokens: np.ndarray, prompt: Prompt) -> str:
    brief = study.decode(tokens[: method.FEWEST_STEPS])
    return error_class(brief if words(brief) else study.decode(tokens), prompt.text)


def frequency(study: Collection, counts: Counts) -> TableRows:
    """Are facts that survive their relation's neurons more frequent than those that are lost?

    Args:
      study: what the study has collected.
      counts: how often each fact occurs, by (relation, triple): the user's.

    Raises:
      DataError: no held-out fact has a count.
    """
    prompts = [*study.evaluation, *study.detection]  # as in `ablation`
    neurons = study.neurons()
    sets = [NeuronSet(), *neurons.values()]
    correct = study.judge(study.generate("frequency", sets, prompts), prompts)
    facts, pairs = [], []
    for name, with_relation_off in zip(neurons, correct[1:], strict=True):
        rows = _survivals(name, prompts, correct[0], with_relation_off, counts)
        facts += rows
        logs = {
            kind: [math.log10(1 + row["count"]) for row in rows if row["kind"] == kind]
            for kind in ("resilient", "sensitive")
        }
        if all(logs.values()):
            pairs.append(tuple(float(np.mean(values)) for values in logs.values()))
    if not facts:
        raise DataError("none of the held-out facts that the model answers has a count")
    return {
        "frequency": facts,
        "frequency_test": [finite(method.frequency_test(pairs)._asdict())],
    }


def _survivals(
    relation: str,
    prompts: Sequence[Prompt],
    before: Bool[np.ndarray, " prompt"],
    after: Bool[np.ndarray, " prompt"],
    counts: Counts,
) -> list[Row]:
    """The held-out facts of a relation that are right before and have a count."""
    rows = []
    for prompt, was_right, is_right in zip(prompts, before, after, strict=True):
        if prompt.relation != relation or prompt.evaluation != "eva" or not was_right:
            continue
        keys = [(relation, Triple(prompt.subject, answer)) for answer in prompt.objects]
        known = [counts[key] for key in keys if key in counts]
        if known:
            rows.append(
                {
                    "relation": relation,
                    "subject": prompt.subject,
                    "count": sum(known),
                    "kind": "resilient" if is_right else "sensitive",
                }
            )
    return rows
