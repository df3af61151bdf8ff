"""Tables as the analyses write them, made up for any names: what figures are drawn from."""

import itertools

import numpy as np


def _interval(rng, name, low, high):
    value = float(rng.uniform(low, high))
    return {name: value, f"{name}_low": value - 0.05, f"{name}_high": value + 0.05}


def qrnca_tables(groups, *, layers=12, width=100):
    """Of query-relevant neurons: every table that has a figure."""
    rng = np.random.default_rng(0)
    changes = ("boosted", "suppressed")
    methods = ("QRNCA", "gradient", "yours")
    made = {name: [] for name in ("evaluation", "editing", "overlap", "layers", "neurons")}
    for method, change, group in itertools.product(methods, changes, (*groups, "all")):
        if method != "QRNCA" and group != "all":
            continue
        row = {"method": method, "change": change, "group": group}
        row |= _interval(rng, "related", -0.9, 0.9) | _interval(rng, "unrelated", -0.2, 0.2)
        ratio = float(rng.uniform(0.5, 20))
        made["evaluation"].append(
            {**row, "pcr": ratio, "pcr_low": ratio / 2, "pcr_high": 2 * ratio}
        )
    made["editing"] = [
        {
            "method": method,
            "turns": turns,
            "change": change,
            "group": "all",
            "prompts": 40,
            "unrelated": 0.02,
            **_interval(rng, "rate", 0.1, 0.9),
        }
        for method in methods
        for turns, change in (("wrong", "suppressed"), ("right", "boosted"))
    ]
    for i, group in enumerate(groups):
        made["overlap"] += [
            {"group": group, "other": other, "neurons": 10 + i, "overlap": float(rng.uniform())}
            for other in groups
        ]
        shares = rng.dirichlet(np.ones(layers))
        made["layers"] += [
            {"group": group, "layer": layer, "share": float(share)}
            for layer, share in enumerate(shares)
        ]
        made["neurons"] += [
            {
                "group": group,
                "layer": int(rng.integers(layers)),
                "index": int(rng.integers(width)),
                "naica": float(rng.gamma(1)),
                "num_layers": layers,
                "width": width,
            }
            for _ in range(8)
        ]
    made["prediction"] = [
        {"group": group, "readout": readout, "pool": pool, **_interval(rng, "accuracy", 0.1, 0.9)}
        for group in groups
        for readout, pool in (
            ("prompting", None),
            ("chance", None),
            ("sum", "own"),
            ("ridge", "own"),
            ("ridge", "random"),
        )
    ]
    made["kinds"] = [
        {
            "method": "QRNCA",
            "site": site,
            "change": change,
            **_interval(rng, "related", -0.9, 0.9),
            **_interval(rng, "unrelated", -0.2, 0.2),
        }
        for site in ("up", "gate")
        for change in changes
    ]
    return made


def _ablation(rng, names, evaluation, **more):
    rows = []
    for name in names:
        for off in (*names, "random", "random", "matched"):
            drop = float(rng.uniform(0.4, 0.9) if off == name else rng.uniform(-0.1, 0.2))
            rows.append(
                {
                    "relation": name,
                    "off": off,
                    "seed": len(rows),
                    "evaluation": evaluation,
                    "counted": True,
                    "drop": drop,
                    "k": 300,
                    "right_before": 20,
                    "prompts": 50,
                    "accuracy_before": 0.4,
                    "accuracy": 0.4 * (1 - drop),
                    "ratio": 1 + drop / 10,
                    **more,
                }
            )
    return rows


def relspec_tables(names, *, types=None, languages=("de", "zh"), layers=12):
    """Of relation-specific neurons: every table that has a figure."""
    rng = np.random.default_rng(0)
    kinds = list(types or names)
    few = names[:6]
    both = [_ablation(rng, names, evaluation) for evaluation in ("eva", "det")]
    return {
        "ablation": [row for rows in both for row in rows],
        "sizes": [row for k in (10, 100) for row in _ablation(rng, few, "eva", k=k)],
        "layers": [
            {"relation": name, "layer": layer, "neurons": int(rng.integers(1, 30))}
            for name in names
            for layer in range(layers)
        ],
        "overlap": [
            {"relation": a, "other": b, "shared": int(rng.integers(40)), "k": 300, "by_chance": 1.5}
            for a in names
            for b in names
        ],
        "cumulativity": [
            {"relation": name, "a": a, "b": b, "total": 9, "affected": 4}
            for name in names
            for a, b in ((10, 30), (30, 1000))
        ],
        "languages": [
            {"relation": name, "language": one, "validated": 7, "detection": 30, "known": False}
            for name in names
            for one in languages
        ],
        "multilingual": [
            row for one in languages for row in _ablation(rng, few, "eva", language=one)
        ],
        "robustness": _ablation(rng, names, "eva"),
        "concepts": [
            {
                "concept": concept,
                "relation": name,
                "shared": int(rng.integers(9)),
                "own_type": not i % 3,
                "by_chance": 1.5,
            }
            for concept in kinds
            for i, name in enumerate(names)
        ],
        "perplexity": [
            row for row in _ablation(rng, names, "eva") if row["off"] in (row["relation"], "random")
        ],
        "types": [
            {"relation": few[0], "off": off, "drop": 0.3, "counted": True, "type": kind, "k": 300}
            for kind in kinds
            for off in (few[0], few[-1] + "x", "random")
        ],
        "type_layers": [
            {"type": kind, "layer": layer, "neurons": int(rng.integers(1, 30))}
            for kind in kinds
            for layer in range(layers)
        ],
        "errors": [
            {"off": off, "error": error, "answers": 1 + i}
            for off in ("none", "own", "random")
            for i, error in enumerate(_errors())
        ],
        "frequency": [
            {"relation": name, "kind": kind, "count": int(10 ** rng.uniform(0, 5))}
            for name in names
            for kind in ("resilient", "sensitive")
            for _ in range(3)
        ],
    }


def _errors():
    from jaxneurons.prompts.matching import ERRORS

    return ERRORS
