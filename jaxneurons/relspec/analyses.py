"""The analyses of arXiv 2502.17355, section 5, as tidy tables of one study.

Each function takes a `Study` and returns tables by name, one row per thing measured. Tables of
drops share their columns (`measure`), so that they can be read, joined and drawn alike. A relation
that the model does not know is in no table but `relations`; `summary` averages over the known ones.
`jaxneurons.relspec.concepts` and `jaxneurons.relspec.perplexity` hold two analyses more.
"""

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jaxneurons.errors import DataError
from jaxneurons.neurons.controls import layer_matched_sets
from jaxneurons.neurons.sets import ATTENTION, FFN, NeuronSet, neuron_count
from jaxneurons.prompts.matching import ERRORS, error_class, words
from jaxneurons.prompts.relations import Triple, objects, wordings
from jaxneurons.relspec import method as relspec
from jaxneurons.relspec.method import Prompt
from jaxneurons.relspec.study import Study

Row = dict[str, Any]
Tables = dict[str, list[Row]]
Label = dict[str, Any]
Counts = Mapping[tuple[str, Triple], float]

TYPES = {
    "all": (*FFN, *ATTENTION),
    "ffn": FFN,
    "attention": ATTENTION,
    "up": ("up",),
    "gate": ("gate",),
    "down": ("down",),
}


def relations(study: Study) -> Tables:
    """What was asked, what the model knows, and how often it answers each template.

    `steps`: the most tokens generated after a detection prompt.
    """
    rows, templates = [], []
    validated = sum(len(asked.validated) for asked in study.asked.values())
    for name, asked in study.asked.items():
        relation = study.relations[name]
        found = relation.wordings(study.settings.templates)
        rows.append(
            {
                "relation": name,
                "subject_type": relation.subject_type,
                "facts": len(relation.triples),
                "subjects": len(objects(relation.triples)),
                "template": found[asked.template],
                "steps": max(study.steps(asked.detection)),
                "detection": len(asked.detection),
                "validated": len(asked.validated),
                "detection_accuracy": len(asked.validated) / len(asked.detection),
                "evaluation": len(asked.evaluation),
                "negatives": min(
                    study.settings.negatives * len(asked.validated),
                    validated - len(asked.validated),
                ),
                "known": not asked.unknown,
                "reason": asked.unknown,
            }
        )
        templates += [
            {
                "relation": name,
                "template": wording,
                "asked": len(asked.detection),
                "answered": round(accuracy * len(asked.detection)),
                "accuracy": accuracy,
                "chosen": number == asked.template,
            }
            for number, (wording, accuracy) in enumerate(zip(found, asked.accuracies, strict=True))
        ]
    return {"relations": rows, "templates": templates}


def measure(
    study: Study,
    analysis: str,
    sets: Sequence[tuple[Label, NeuronSet]],
    prompts: Sequence[Prompt],
) -> list[Row]:
    """Accuracy with each set off, for each relation, evaluation and language among the prompts.

    Labels: `off` (a relation, "random" or "matched") and whatever tells sets apart. Rows: also
    `prompts`, `right_before`, `right`, `accuracy_before`, `accuracy`, `drop` (relative; None if
    nothing was right before) and `counted`: enough was right before for the drop to be averaged.
    """
    said = study.said(analysis, [NeuronSet(), *(one for _, one in sets)], prompts)
    right = study.right(said, prompts)
    groups: dict[tuple[str, str, str], list[int]] = {}
    for i, one in enumerate(prompts):
        groups.setdefault((one.evaluation, one.language, one.relation), []).append(i)
    rows = []
    for (label, members), after in zip(sets, right[1:], strict=True):
        for (evaluation, language, relation), index in groups.items():
            before, now = right[0][index], after[index]
            loss = relspec.drop(float(before.mean()), float(now.mean()))
            rows.append(
                {
                    "analysis": analysis,
                    "off": label["off"],
                    "seed": label.get("seed"),
                    "type": label.get("type", ""),
                    "k": len(members),
                    "evaluation": evaluation,
                    "language": language,
                    "relation": relation,
                    "prompts": len(index),
                    "right_before": int(before.sum()),
                    "right": int(now.sum()),
                    "accuracy_before": float(before.mean()),
                    "accuracy": float(now.mean()),
                    "drop": None if math.isnan(loss) else loss,
                    "counted": int(before.sum()) >= study.settings.minimum_right,
                }
            )
    return rows


def own_sets(neurons: Mapping[str, NeuronSet], **label: Any) -> list[tuple[Label, NeuronSet]]:
    """Each relation's neurons, labelled for `measure`."""
    return [({"off": name, **label}, one) for name, one in neurons.items()]


def random_sets(sets: Sequence[NeuronSet], **label: Any) -> list[tuple[Label, NeuronSet]]:
    """Random sets, labelled for `measure`."""
    return [({"off": "random", "seed": seed, **label}, one) for seed, one in enumerate(sets)]


def ablation(study: Study) -> Tables:
    """Controlled generation (section 4): intra- and inter-relation, held-out and detection facts.

    Beside the paper's k random neurons, random neurons of the same layers and sites ("matched"),
    unless a relation's neurons are more than half of a layer's.
    """
    neurons = study.neurons()
    sets = own_sets(neurons) + random_sets(study.random(study.settings.seeds))
    rows = measure(study, "ablation", sets, [*study.evaluation, *study.detection])
    for name, one in neurons.items():
        settings = study.settings
        try:
            matched = layer_matched_sets(
                one, study.lm.config, seed=settings.seed, name=name, count=settings.sweep_seeds
            )
        except DataError:  # more than half of a layer: no such control
            continue
        labels = [({"off": "matched", "seed": seed}, each) for seed, each in enumerate(matched)]
        own = study.asked[name].evaluation
        rows += measure(study, "ablation", labels, own)
    return {"ablation": rows}


def layers(study: Study) -> Tables:
    """How a relation's neurons spread over layers and sites."""
    rows = []
    for name, one in study.neurons().items():
        for site, counts in one.layer_counts(study.lm.config.num_layers).items():
            rows += [
                {"relation": name, "site": site, "layer": layer, "neurons": int(count)}
                for layer, count in enumerate(counts)
            ]
    return {"layers": rows}


def overlap(study: Study) -> Tables:
    """Neurons that two relations share, and how many two random sets would."""
    neurons = study.neurons()
    chance = study.k**2 / neuron_count(study.lm.config, study.settings.sites)
    rows = [
        {"relation": a, "other": b, "shared": len(x & y), "k": study.k, "by_chance": chance}
        for a, x in neurons.items()
        for b, y in neurons.items()
    ]
    return {"overlap": rows}


def _sizes(study: Study) -> tuple[int, ...]:
    return relspec.sweep_sizes(neuron_count(study.lm.config, study.settings.sites))


def sizes(study: Study) -> Tables:
    """Every relation's neurons off, from ten to a tenth of all; every relation asked."""
    rows = []
    for k in _sizes(study):
        sets = own_sets(study.neurons(k)) + random_sets(study.random(study.settings.sweep_seeds, k))
        rows += measure(study, "sizes", sets, study.evaluation)
    return {"sizes": rows}


def cumulativity(study: Study) -> Tables:
    """Do more neurons break answers that the additions alone do not?"""
    ranks = {k: study.neurons(k) for k in _sizes(study)}
    rows = []
    for name in study.known:
        prompts = study.asked[name].evaluation
        steps = list(ranks)
        sets = [ranks[k][name] for k in steps]
        sets += [b - a for a, b in itertools.pairwise(sets)]
        # All held-out prompts, so that the sweep's generations are found.
        everything = study.evaluation
        mine = [i for i, one in enumerate(everything) if one.relation == name]
        said = study.said("cumulativity", sets[: len(steps)], everything)[:, mine]
        right = study.right(said, prompts)
        alone = study.right(study.said("cumulativity", sets[len(steps) :], prompts), prompts)
        for i, (a, b) in enumerate(itertools.pairwise(steps)):
            found = relspec.cumulativity(right[i], right[i + 1], alone[i])
            rows.append({"relation": name, "a": a, "b": b, **finite(found._asdict())})
    return {"cumulativity": rows, "cumulativity_mean": cumulativity_means(rows)}


def cumulativity_means(rows: Sequence[Row]) -> list[Row]:
    """By step, and over all steps (a and b None): macro over relations, micro over prompts.

    Over all steps, macro averages within a relation first.
    """
    steps = [*dict.fromkeys((row["a"], row["b"]) for row in rows), (None, None)]
    found = []
    for a, b in steps:
        here = [r for r in rows if r["total"] and (a is None or (r["a"], r["b"]) == (a, b))]
        each: dict[str, list[float]] = {}
        for row in here:
            each.setdefault(row["relation"], []).append(row["cumulativity"])
        total = sum(row["total"] for row in here)
        if total:
            found.append(
                {
                    "a": a,
                    "b": b,
                    "relations": len(each),
                    "total": total,
                    "macro": float(np.mean([np.mean(one) for one in each.values()])),
                    "micro": 1 - sum(row["affected"] for row in here) / total,
                }
            )
    return found


def finite(values: Mapping[str, Any]) -> Row:
    """A row with None for NaN."""
    return {
        name: None if isinstance(value, float) and math.isnan(value) else value
        for name, value in values.items()
    }


def multilingual(study: Study) -> Tables:
    """The held-out facts in other languages, the same neurons off.

    As in the relation's own language, the template is the one answered most often on the detection
    facts, and a language in which too few of them are answered is unknown.
    """
    languages = []
    detection: dict[tuple[str, str, int], list[Prompt]] = {}
    for name in study.known:
        relation, asked = study.relations[name], study.asked[name]
        for language, translation in relation.translations.items():
            found = wordings(translation.templates, study.settings.templates)
            for number, wording in enumerate(found):
                detection[name, language, number] = relspec.asked(
                    relation, asked.split.detection, wording, evaluation="det", language=language
                )
    if not detection:
        return {"languages": [], "multilingual": []}
    right = study.untouched("multilingual", detection)
    prompts: list[Prompt] = []
    for name, language in dict.fromkeys(key[:2] for key in detection):
        relation, asked = study.relations[name], study.asked[name]
        each = [one for key, one in right.items() if key[:2] == (name, language)]
        best = relspec.best_template(each)
        count = int(each[best].sum())
        known = not relspec.too_few(count, len(each[best]), study.settings)
        translation = relation.translations[language]
        wording = wordings(translation.templates, study.settings.templates)[best]
        languages.append(
            {
                "relation": name,
                "language": language,
                "template": wording,
                "steps": max(study.steps(detection[name, language, best]), default=0),
                "detection": len(each[best]),
                "validated": count,
                "known": known,
            }
        )
        if known:
            prompts += relspec.asked(
                relation, asked.split.evaluation, wording, evaluation="eva", language=language
            )
    rows = []
    if prompts:
        sets = own_sets(study.neurons()) + random_sets(study.random(study.settings.seeds))
        rows = measure(study, "multilingual", sets, prompts)
    return {"languages": languages, "multilingual": rows}


def templates(study: Study) -> Tables:
    """Template robustness: the held-out facts in another wording, the same neurons off.

    The wording of another set, or else of the same, that is answered most often on some of the
    detection facts.
    """
    detection = {}
    for name in study.known:
        relation, asked = study.relations[name], study.asked[name]
        main = relation.wordings(study.settings.templates)[asked.template]
        own = {name for name, found in relation.templates.items() if main in found}
        every = wordings(relation.templates, relation.templates)
        others = wordings(relation.templates, [s for s in relation.templates if s not in own])
        some = asked.split.detection[: study.settings.evaluation]
        for wording in [one for one in others or every if one != main]:
            detection[name, wording] = relspec.asked(relation, some, wording, evaluation="det")
    right = study.untouched("templates", detection)
    prompts = []
    for name in dict.fromkeys(name for name, _ in detection):
        each = {wording: found for (own, wording), found in right.items() if own == name}
        best = list(each)[relspec.best_template(list(each.values()))]
        evaluation = study.asked[name].split.evaluation
        prompts += relspec.asked(study.relations[name], evaluation, best, evaluation="eva-2")
    sets = own_sets(study.neurons()) + random_sets(study.random(study.settings.sweep_seeds))
    return {"robustness": measure(study, "templates", sets, prompts)} if prompts else {}


def types(study: Study) -> Tables:
    """Which outputs: all, attention only, up, gate, down; spread and inter-relation drops."""
    rows, spread = [], []
    for name, sites in TYPES.items():
        k = min(study.k, neuron_count(study.lm.config, sites) // 2)
        found = study.neurons(k, sites)
        sets = own_sets(found, type=name)
        sets += random_sets(study.random(study.settings.sweep_seeds, k, sites), type=name)
        rows += measure(study, "types", sets, study.evaluation)
        for relation, one in found.items():
            for site, counts in one.layer_counts(study.lm.config.num_layers).items():
                spread += [
                    {
                        "type": name,
                        "relation": relation,
                        "site": site,
                        "layer": layer,
                        "neurons": int(count),
                    }
                    for layer, count in enumerate(counts)
                ]
    return {"types": rows, "type_layers": spread}


def errors(study: Study) -> Tables:
    """What wrong answers look like: untouched, the relation's neurons off, random ones off.

    The kind of an error is told from two tokens, as in the paper, whatever its objects need; from
    all, where two are no word yet (a character of many bytes).
    """
    neurons = study.neurons()
    prompts = [*study.evaluation, *study.detection]  # as in `ablation`, whose generations these are
    conditions = own_sets(neurons) + random_sets(study.random(study.settings.seeds))
    said = study.said("errors", [NeuronSet(), *(one for _, one in conditions)], prompts)
    right = study.right(said, prompts)
    names = ["none", *(label["off"] for label, _ in conditions)]
    counts: dict[tuple[str, str], dict[str, int]] = {}
    answers = []
    for off, row, judged in zip(names, said, right, strict=True):
        for one, tokens, yes in zip(prompts, row, judged, strict=True):
            if one.evaluation != "eva" or off not in ("none", "random", one.relation):
                continue
            condition = "own" if off == one.relation else off
            text = study.text(tokens)
            found = counts.setdefault((one.relation, condition), dict.fromkeys(ERRORS, 0))
            if not yes:
                brief = study.text(tokens[: relspec.FEWEST_STEPS])
                found[error_class(brief if words(brief) else text, one.text)] += 1
            if condition != "random":
                answers.append(
                    {
                        "relation": one.relation,
                        "off": condition,
                        "subject": one.subject,
                        "object": " | ".join(one.objects),
                        "said": text,
                        "right": bool(yes),
                    }
                )
    rows = [
        {
            "relation": relation,
            "off": condition,
            "error": error,
            "answers": count,
            "share": count / max(sum(found.values()), 1),
        }
        for (relation, condition), found in counts.items()
        for error, count in found.items()
    ]
    return {"errors": rows, "answers": answers}


def frequency(study: Study, counts: Counts) -> Tables:
    """Are facts that survive their relation's neurons more frequent than those that are lost?

    Args:
      study: the study.
      counts: how often each fact occurs, by (relation, triple): the user's.

    Raises:
      DataError: no held-out fact has a count.
    """
    prompts = [*study.evaluation, *study.detection]  # as in `ablation`
    neurons = study.neurons()
    sets = [NeuronSet(), *neurons.values(), *study.random(study.settings.seeds)]
    said = study.said("frequency", sets[: len(neurons) + 1], prompts)
    right = study.right(said, prompts)
    facts, pairs = [], []
    for number, name in enumerate(neurons, 1):
        means = {}
        for i, one in enumerate(prompts):
            if one.relation != name or one.evaluation != "eva" or not right[0, i]:
                continue
            known = [
                counts[key]
                for o in one.objects
                if (key := (name, Triple(one.subject, o))) in counts
            ]
            if known:
                kind = "resilient" if right[number, i] else "sensitive"
                means.setdefault(kind, []).append(math.log10(1 + sum(known)))
                facts.append(
                    {"relation": name, "subject": one.subject, "count": sum(known), "kind": kind}
                )
        if len(means) == 2:
            pairs.append((float(np.mean(means["resilient"])), float(np.mean(means["sensitive"]))))
    if not facts:
        raise DataError("none of the held-out facts that the model answers has a count")
    return {
        "frequency": facts,
        "frequency_test": [finite(relspec.frequency_test(pairs)._asdict())],
    }


def summary(rows: Sequence[Row]) -> list[Row]:
    """Mean drops over relations: own neurons off, other relations' off, random ones off.

    One row per (analysis, type, k, evaluation, language). Over relations with enough right answers
    before (`counted`): `diagonal` is the mean drop of a relation with its own neurons off,
    `off_diagonal` with another's; `random` is the mean over relations, then over seeds,
    `random_spread` the standard deviation over seeds; `matched` the same for random neurons of the
    same layers and sites.
    """
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        key = ("analysis", "type", "k", "evaluation", "language")
        groups.setdefault(tuple(row[name] for name in key), []).append(row)
    found = []
    for (analysis, kind, k, evaluation, language), members in groups.items():
        used = [row for row in members if row["counted"]]
        own = {row["relation"]: row["drop"] for row in used if row["off"] == row["relation"]}
        if not own:
            continue
        others = [
            row["drop"] for row in used if row["off"] not in ("random", "matched", row["relation"])
        ]
        line = {
            "analysis": analysis,
            "type": kind,
            "k": k,
            "evaluation": evaluation,
            "language": language,
            "relations": len(own),
            "right_before": sum(r["right_before"] for r in used if r["off"] == r["relation"]),
            "diagonal": float(np.mean(list(own.values()))),
            "off_diagonal": float(np.mean(others)) if others else None,
        }
        for control in ("random", "matched"):
            seeds: dict[Any, list[float]] = {}
            for row in used:
                if row["off"] == control:
                    seeds.setdefault(row["seed"], []).append(row["drop"])
            means = [float(np.mean(each)) for each in seeds.values()]
            line[control] = float(np.mean(means)) if means else None
            line[f"{control}_spread"] = float(np.std(means, ddof=1)) if len(means) > 1 else None
        found.append(line)
    return found
