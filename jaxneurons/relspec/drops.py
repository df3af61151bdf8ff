"""Tables of drops: accuracy with sets of neurons off, and its means over relations.

They share their columns (`measure`), so that they can be read, joined and drawn alike.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from jaxneurons.neurons.sets import NeuronSet
from jaxneurons.relspec import method
from jaxneurons.relspec.collection import Collection
from jaxneurons.relspec.method import Prompt
from jaxneurons.storage.tables import Row

TableRows = dict[str, list[Row]]
"""Rows of tidy tables, by name."""
Label = dict[str, Any]
LabelledSet = tuple[Label, NeuronSet]

CONTROLS = ("random", "matched")


def measure(
    study: Collection,
    analysis: str,
    sets: Sequence[LabelledSet],
    prompts: Sequence[Prompt],
) -> list[Row]:
    """Accuracy with each set off, for each relation, evaluation and language among the prompts.

    Labels: `off` (a relation, "random" or "matched") and whatever tells sets apart. Rows: also
    `prompts`, `right_before`, `right`, `accuracy_before`, `accuracy`, `drop` (relative; None if
    nothing was right before) and `counted`: enough was right before for the drop to be averaged.
    """
    every_set = [NeuronSet(), *(neurons for _, neurons in sets)]
    correct = study.judge(study.generate(analysis, every_set, prompts), prompts)
    groups: dict[tuple[str, str, str], list[int]] = {}
    for i, prompt in enumerate(prompts):
        groups.setdefault((prompt.evaluation, prompt.language, prompt.relation), []).append(i)
    rows = []
    for (label, neurons), with_set_off in zip(sets, correct[1:], strict=True):
        for (evaluation, language, relation), index in groups.items():
            before, after = correct[0][index], with_set_off[index]
            drop = method.drop(float(before.mean()), float(after.mean()))
            rows.append(
                {
                    "analysis": analysis,
                    "off": label["off"],
                    "seed": label.get("seed"),
                    "type": label.get("type", ""),
                    "k": len(neurons),
                    "evaluation": evaluation,
                    "language": language,
                    "relation": relation,
                    "prompts": len(index),
                    "right_before": int(before.sum()),
                    "right": int(after.sum()),
                    "accuracy_before": float(before.mean()),
                    "accuracy": float(after.mean()),
                    "drop": None if math.isnan(drop) else drop,
                    "counted": int(before.sum()) >= study.settings.minimum_right,
                }
            )
    return rows


def relation_sets(neurons: Mapping[str, NeuronSet], **label: Any) -> list[LabelledSet]:
    """Each relation's neurons, labelled for `measure`."""
    return [({"off": name, **label}, of_relation) for name, of_relation in neurons.items()]


def control_sets(
    sets: Sequence[NeuronSet], control: str = "random", **label: Any
) -> list[LabelledSet]:
    """Random sets, labelled for `measure`."""
    return [({"off": control, "seed": seed, **label}, neurons) for seed, neurons in enumerate(sets)]


def mean_drops(rows: Iterable[Row]) -> list[Row]:
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
    lines = []
    for (analysis, kind, k, evaluation, language), members in groups.items():
        counted = [row for row in members if row["counted"]]
        diagonal = {
            row["relation"]: row["drop"] for row in counted if row["off"] == row["relation"]
        }
        if not diagonal:
            continue
        off_diagonal = [
            row["drop"] for row in counted if row["off"] not in (*CONTROLS, row["relation"])
        ]
        line = {
            "analysis": analysis,
            "type": kind,
            "k": k,
            "evaluation": evaluation,
            "language": language,
            "relations": len(diagonal),
            "right_before": sum(r["right_before"] for r in counted if r["off"] == r["relation"]),
            "diagonal": float(np.mean(list(diagonal.values()))),
            "off_diagonal": float(np.mean(off_diagonal)) if off_diagonal else None,
        }
        for control in CONTROLS:
            by_seed: dict[Any, list[float]] = {}
            for row in counted:
                if row["off"] == control:
                    by_seed.setdefault(row["seed"], []).append(row["drop"])
            means = [float(np.mean(drops)) for drops in by_seed.values()]
            line[control] = float(np.mean(means)) if means else None
            line[f"{control}_spread"] = float(np.std(means, ddof=1)) if len(means) > 1 else None
        lines.append(line)
    return lines
