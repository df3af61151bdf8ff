"""Figures of a study of relation-specific neurons, drawn from its tables alone."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxneurons.matching import ERRORS
from jaxneurons.plots import PALETTE, draw_tables, entitle, heat_map, new_figure

Row = dict[str, Any]
Rows = Sequence[Row]
OWN, OTHERS, RANDOM, MATCHED = PALETTE[0], PALETTE[1], PALETTE[6], "#444444"
BEFORE = "#CFE3F0"


def draw(tables: dict[str, list[Row]], directory: Path, *, source: str = "") -> list[Path]:
    """Every figure whose table is there, as PNG, by the names of `FIGURES`."""
    return draw_tables(FIGURES, tables, directory, source=source)


def _names(rows: Rows, key: str = "relation") -> list[str]:
    return list(dict.fromkeys(row[key] for row in rows))


def _label(name: str) -> str:
    return name.replace("_", " ")


def _controls(rows: Rows, relation: str, off: str, value: str = "drop") -> list[float]:
    return [
        row[value]
        for row in rows
        if row["relation"] == relation and row["off"] == off and row[value] is not None
    ]


def inter_relation(rows: Rows, source: str, evaluation: str = "eva") -> Any:
    """Relation x relation: the share of right answers lost, with a column for random neurons."""
    rows = [row for row in rows if row["evaluation"] == evaluation and row["counted"]]
    offs = [name for name in _names(rows, "off") if name not in ("random", "matched")]
    asked = [name for name in _names(rows) if name in offs]
    if not asked:
        return None
    values = np.full((len(asked), len(offs) + 1), np.nan)
    for row in rows:
        if row["off"] in offs and row["drop"] is not None:
            values[asked.index(row["relation"]), offs.index(row["off"])] = row["drop"]
    for i, name in enumerate(asked):
        random = _controls(rows, name, "random")
        values[i, -1] = np.mean(random) if random else np.nan
    right = {row["relation"]: f"{row['right_before']}/{row['prompts']}" for row in rows}
    kind = "held-out facts" if evaluation == "eva" else "validated detection facts"
    return heat_map(
        100 * values,
        rows=[f"{_label(name)}  {right[name]}" for name in asked],
        columns=[*map(_label, offs), "random"],
        title=f"Right answers lost (%), {kind}, {source}",
        xlabel=f"relation whose {_k(rows)} neurons are off",
        ylabel="relation asked, with answers right before",
        limits=(-100.0, 100.0),
        colours="RdBu_r",
        boxed=[(i, offs.index(name)) for i, name in enumerate(asked)],
    )


def _k(rows: Rows) -> str:
    return f"{max(row['k'] for row in rows):,}"


def intra_relation(rows: Rows, source: str) -> Any:
    """Accuracy of each relation: untouched, own neurons off, random ones off."""
    rows = [row for row in rows if row["evaluation"] == "eva"]
    names = [name for name in _names(rows) if any(row["off"] == name for row in rows)]
    if not names:
        return None
    figure, axes = new_figure(9.6, 4.6)
    x = np.arange(len(names))
    own = {row["relation"]: row for row in rows if row["off"] == row["relation"]}
    bars: list[tuple[str, list[Any], list[Any] | None, str]] = [
        ("untouched", [own[n]["accuracy_before"] for n in names], None, BEFORE),
        ("own neurons off", [own[n]["accuracy"] for n in names], None, OWN),
    ]
    for off, text, colour in (
        ("random", "random neurons off", RANDOM),
        ("matched", "random, same layers and sites", MATCHED),
    ):
        found = [_controls(rows, n, off, "accuracy") for n in names]
        if all(found):
            spread = [np.std(one, ddof=1) if len(one) > 1 else 0 for one in found]
            bars.append((text, [np.mean(one) for one in found], spread, colour))
    width = 0.84 / len(bars)
    for i, (text, heights, spread, colour) in enumerate(bars):
        axes.bar(
            x + (i - (len(bars) - 1) / 2) * width,
            heights,
            width,
            yerr=spread,
            color=colour,
            label=text,
            error_kw={"lw": 1},
        )
    axes.set_xticks(x, [_label(n) for n in names], rotation=40, ha="right")
    axes.set(ylabel="accuracy on held-out facts", ylim=(0, 1))
    entitle(axes, f"{_k(rows)} neurons off, {source} (whiskers: s.d. over seeds)")
    axes.legend(frameon=False, ncols=2)
    return figure


def sizes(rows: Rows, source: str) -> Any:
    """Loss against the number of neurons: own, others', random."""
    steps = sorted({row["k"] for row in rows})
    used = [row for row in rows if row["counted"]]
    if not used:
        return None
    figure, axes = new_figure(7.2, 4.6)
    for name in _names(used):
        line = {r["k"]: 100 * r["drop"] for r in used if r["off"] == r["relation"] == name}
        axes.plot(list(line), list(line.values()), color=OWN, alpha=0.18, lw=1)
    for text, colour, keep in (
        ("own neurons", OWN, lambda r: r["off"] == r["relation"]),
        ("other relations' neurons", OTHERS, lambda r: r["off"] not in ("random", r["relation"])),
        ("random neurons", RANDOM, lambda r: r["off"] == "random"),
    ):
        means, spreads = [], []
        for k in steps:
            groups: dict[Any, list[float]] = {}
            for row in used:
                if row["k"] == k and keep(row):
                    key = row["seed"] if row["off"] == "random" else row["relation"]
                    groups.setdefault(key, []).append(100 * row["drop"])
            each = [np.mean(one) for one in groups.values()]
            means.append(np.mean(each))
            over = np.std(each, ddof=1) if len(each) > 1 else 0.0
            spreads.append(over if text.startswith("random") else over / np.sqrt(len(each)))
        low, high = np.subtract(means, spreads), np.add(means, spreads)
        axes.fill_between(steps, low, high, color=colour, alpha=0.15, lw=0)
        axes.plot(steps, means, "o-", color=colour, ms=4, label=text)
    axes.axhline(0, color="black", lw=0.6)
    axes.set(xscale="log", xlabel="neurons off", ylabel="right answers lost (%)")
    lowest = min(-10.0, min(100 * r["drop"] for r in used if r["off"] == r["relation"]))
    axes.set_ylim(max(lowest, -60) - 5, 105)
    entitle(axes, f"Number of neurons, {source} (bands: s.e. over relations; random: s.d.)")
    axes.legend(frameon=False, loc="upper left")
    return figure


def layers(rows: Rows, source: str, key: str = "relation") -> Any:
    """Relation x layer: where the neurons are."""
    names, last = _names(rows, key), max(row["layer"] for row in rows)
    values = np.zeros((len(names), last + 1))
    for row in rows:
        values[names.index(row[key]), row["layer"]] += row["neurons"]
    shares = 100 * values / values.sum(1, keepdims=True)
    return heat_map(
        shares,
        rows=[_label(name) for name in names],
        columns=[str(layer) for layer in range(last + 1)],
        title=f"Share of a relation's neurons in each layer (%), {source}",
        xlabel="layer",
        ylabel="",
        limits=(0.0, float(shares.max())),
        colours="Blues",
        rotation=0,
    )


def type_layers(rows: Rows, source: str) -> Any:
    """Layer distribution of the neurons of each kind, over all relations."""
    figure, axes = new_figure(7.2, 4.0)
    last = max(row["layer"] for row in rows)
    for number, kind in enumerate(_names(rows, "type")):
        counts = np.zeros(last + 1)
        for row in rows:
            if row["type"] == kind:
                counts[row["layer"]] += row["neurons"]
        colour = PALETTE[number % len(PALETTE)]
        axes.plot(100 * counts / counts.sum(), "o-", ms=3, color=colour, label=kind)
    axes.set(xlabel="layer", ylabel="share of the neurons (%)")
    entitle(axes, f"Where neurons of each kind are, {source}")
    axes.legend(frameon=False, ncols=3)
    return figure


def overlap(rows: Rows, source: str) -> Any:
    """Relation x relation: shared neurons."""
    names = _names(rows)
    values = np.zeros((len(names), len(names)))
    for row in rows:
        values[names.index(row["relation"]), names.index(row["other"])] = row["shared"]
    others = values[~np.eye(len(names), dtype=bool)]
    k, chance = rows[0]["k"], rows[0]["by_chance"]
    return heat_map(
        values,
        rows=[_label(name) for name in names],
        columns=[_label(name) for name in names],
        title=f"Shared neurons of {k:,} ({chance:.1f} by chance), {source}",
        limits=(0.0, float(others.max()) if len(others) else 1.0),
        colours="Blues",
    )


def cumulativity(rows: Rows, source: str) -> Any:
    """Answers broken by each step in size, and how many of them by the additions alone."""
    figure, axes = new_figure(7.2, 4.0)
    steps = list(dict.fromkeys((row["a"], row["b"]) for row in rows))
    x = np.arange(len(steps))
    sums = {
        name: [sum(r[name] for r in rows if (r["a"], r["b"]) == step) for step in steps]
        for name in ("total", "affected")
    }
    axes.bar(x, sums["total"], 0.7, color=BEFORE, label="broken by the larger set")
    axes.bar(x, sums["affected"], 0.7, color=OWN, label="of those, by the additions alone")
    for i, (total, affected) in enumerate(zip(*sums.values(), strict=True)):
        if total:
            axes.annotate(f"{1 - affected / total:.2f}", (i, total), ha="center", va="bottom")
    axes.set_xticks(x, [f"{a:,} to {b:,}" for a, b in steps], rotation=25, ha="right")
    axes.set(ylabel="held-out answers, all relations")
    entitle(axes, f"Cumulativity (above the bars), {source}")
    axes.set_ylim(0, 1.35 * max(1, *sums["total"]))
    axes.legend(frameon=False, loc="upper left", ncols=2)
    return figure


def multilingual(rows: Rows, source: str) -> Any:
    """Detection facts answered in each language; grey where that is too few to go on."""
    names, languages = _names(rows), _names(rows, "language")
    values = np.full((len(names), len(languages)), np.nan)
    for row in rows:
        share = 100 * row["validated"] / max(row["detection"], 1)
        values[names.index(row["relation"]), languages.index(row["language"])] = share
    unknown = sum(not row["known"] for row in rows)
    return heat_map(
        values,
        rows=[_label(name) for name in names],
        columns=languages,
        title=f"Answered in other languages (%), {unknown} of {len(rows)} unknown, {source}",
        limits=(0.0, 100.0),
        colours="Blues",
        rotation=0,
    )


def multilingual_drops(rows: Rows, source: str) -> Any:
    """Right answers lost in other languages: own neurons off, random ones off."""
    cells = [
        (row["relation"], row["language"])
        for row in rows
        if row["off"] == row["relation"] and row["counted"]
    ]
    found = []
    for relation, language in cells:
        here = [r for r in rows if r["language"] == language and r["relation"] == relation]
        own = next(r["drop"] for r in here if r["off"] == relation)
        found.append((f"{_label(relation)}, {language}", own, _controls(here, relation, "random")))
    return _paired_bars(found, f"Other languages, {source}") if found else None


def robustness(rows: Rows, source: str) -> Any:
    """Right answers lost in other wordings: own neurons off, random ones off."""
    own = {r["relation"]: r["drop"] for r in rows if r["off"] == r["relation"] and r["counted"]}
    found = [(_label(name), value, _controls(rows, name, "random")) for name, value in own.items()]
    if not found:
        return None
    return _paired_bars(found, f"The held-out facts in another wording, {source}")


def _paired_bars(found: Sequence[tuple[str, float, Sequence[float]]], title: str) -> Any:
    figure, axes = new_figure(max(5.0, 2.0 + 0.55 * len(found)), 4.4)
    x = np.arange(len(found))
    axes.bar(x - 0.2, [100 * own for _, own, _ in found], 0.4, color=OWN, label="own neurons off")
    axes.bar(
        x + 0.2,
        [100 * np.mean(one) if one else 0 for *_, one in found],
        0.4,
        yerr=[100 * np.std(one, ddof=1) if len(one) > 1 else 0 for *_, one in found],
        color=RANDOM,
        label="random neurons off",
        error_kw={"lw": 1},
    )
    axes.axhline(0, color="black", lw=0.6)
    axes.set_xticks(x, [name for name, *_ in found], rotation=40, ha="right")
    axes.set(ylabel="right answers lost (%)")
    entitle(axes, title)
    figure.legend(loc="outside lower center", ncols=2, frameon=False)
    return figure


def concepts(rows: Rows, source: str) -> Any:
    """Concept x relation: shared neurons."""
    kinds, names = _names(rows, "concept"), _names(rows)
    values = np.zeros((len(kinds), len(names)))
    own = []
    for row in rows:
        cell = kinds.index(row["concept"]), names.index(row["relation"])
        values[cell] = row["shared"]
        own += [cell] if row["own_type"] else []
    return heat_map(
        values,
        rows=[_label(kind) for kind in kinds],
        columns=[_label(name) for name in names],
        title=f"Neurons shared with concepts ({rows[0]['by_chance']:.1f} by chance), {source}",
        xlabel="relation (boxed: its subjects are of the type)",
        ylabel="concept",
        limits=(0.0, float(max(values.max(), 1))),
        colours="Blues",
        boxed=own,
    )


def perplexity(rows: Rows, source: str) -> Any:
    """Perplexity of neutral sentences against the untouched model."""
    figure, axes = new_figure(8.4, 4.4)
    names = _names(rows)
    x = np.arange(len(names))
    own = [next(r["ratio"] for r in rows if r["relation"] == r["off"] == n) for n in names]
    random = [_controls(rows, n, "random", "ratio") for n in names]
    means = np.array([np.mean(one) for one in random])
    ends = np.array([[np.min(one), np.max(one)] for one in random]).T
    axes.axhline(1, color="black", lw=0.6)
    axes.errorbar(
        x + 0.12,
        means,
        yerr=np.abs(ends - means),
        fmt="s",
        color=RANDOM,
        label="random neurons off (mean, range over seeds)",
        elinewidth=1,
    )
    axes.plot(x - 0.12, own, "o", color=OWN, label="own neurons off")
    axes.set_xticks(x, [_label(n) for n in names], rotation=40, ha="right")
    axes.set(ylabel="perplexity, times the untouched model's")
    entitle(axes, f"Sentences that say nothing of the relation, {source}")
    figure.legend(loc="outside lower center", ncols=2, frameon=False)
    return figure


def types(rows: Rows, source: str) -> Any:
    """Mean losses for each kind of neuron: own, others', random."""
    kinds = _names(rows, "type")
    figure, axes = new_figure(7.2, 4.2)
    x = np.arange(len(kinds))
    tests: list[tuple[str, str, Callable[[Row], bool]]] = [
        ("own neurons", OWN, lambda r: r["off"] == r["relation"]),
        ("other relations' neurons", OTHERS, lambda r: r["off"] not in ("random", r["relation"])),
        ("random neurons", RANDOM, lambda r: r["off"] == "random"),
    ]
    for number, (text, colour, keep) in enumerate(tests):
        heights = []
        for kind in kinds:
            found = [r["drop"] for r in rows if r["type"] == kind and keep(r) and r["counted"]]
            heights.append(100 * np.mean(found or [np.nan]))
        axes.bar(x + 0.27 * (number - 1), heights, 0.27, color=colour, label=text)
    sizes = {row["type"]: row["k"] for row in rows}
    axes.axhline(0, color="black", lw=0.6)
    axes.set_xticks(x, [f"{kind}\n{sizes[kind]:,}" for kind in kinds])
    axes.set(ylabel="right answers lost (%), mean", xlabel="kind of neuron, and how many are off")
    entitle(axes, f"Kinds of neurons, {source}")
    axes.legend(frameon=False)
    return figure


def errors(rows: Rows, source: str) -> Any:
    """What wrong answers look like, by condition."""
    conditions = {"none": "untouched", "own": "own neurons off", "random": "random neurons off"}
    figure, axes = new_figure(7.2, 3.2)
    left = np.zeros(len(conditions))
    counts = {off: dict.fromkeys(ERRORS, 0) for off in conditions}
    for row in rows:
        counts[row["off"]][row["error"]] += row["answers"]
    totals = [max(sum(counts[off].values()), 1) for off in conditions]
    for number, error in enumerate(ERRORS):
        shares = np.array([100 * counts[o][error] / t for o, t in zip(conditions, totals)])  # noqa: B905
        axes.barh(list(conditions.values()), shares, left=left, color=PALETTE[number], label=error)
        for i, share in enumerate(shares):
            if share >= 4:
                axes.annotate(
                    f"{share:.0f}",
                    (left[i] + share / 2, i),
                    ha="center",
                    va="center",
                    color="white",
                    fontsize=8,
                )
        left += shares
    axes.set(xlabel="share of the wrong answers (%)", xlim=(0, 100))
    axes.invert_yaxis()
    entitle(axes, f"Wrong answers, {source}")
    figure.legend(loc="outside lower center", ncols=5, frameon=False, fontsize=8)
    return figure


def frequency(rows: Rows, source: str) -> Any:
    """How often resilient and sensitive facts occur, by relation."""
    figure, axes = new_figure(7.2, 4.2)
    names = _names(rows)
    for shift, kind, colour in ((-0.12, "resilient", OWN), (0.12, "sensitive", OTHERS)):
        points = [
            (names.index(r["relation"]) + shift, 1 + r["count"]) for r in rows if r["kind"] == kind
        ]
        if points:
            axes.scatter(*zip(*points, strict=True), s=14, color=colour, alpha=0.6, label=kind)
    axes.set_xticks(range(len(names)), [_label(n) for n in names], rotation=40, ha="right")
    axes.set(yscale="log", ylabel="1 + count of the fact")
    entitle(axes, f"Fact frequency, {source}")
    axes.legend(frameon=False)
    return figure


FIGURES: dict[str, tuple[str, Callable[[Rows, str], Any]]] = {
    "inter_relation": ("ablation", inter_relation),
    "inter_relation_detection": ("ablation", lambda rows, s: inter_relation(rows, s, "det")),
    "intra_relation": ("ablation", intra_relation),
    "sizes": ("sizes", sizes),
    "layers": ("layers", layers),
    "overlap": ("overlap", overlap),
    "cumulativity": ("cumulativity", cumulativity),
    "languages": ("languages", multilingual),
    "multilingual": ("multilingual", multilingual_drops),
    "robustness": ("robustness", robustness),
    "concepts": ("concepts", concepts),
    "perplexity": ("perplexity", perplexity),
    "types": ("types", types),
    "type_layers": ("type_layers", type_layers),
    "errors": ("errors", errors),
    "frequency": ("frequency", frequency),
}
"""By name of the file: the table that it is drawn from, and the function."""
