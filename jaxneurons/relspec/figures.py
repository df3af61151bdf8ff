"""Figures of a study of relation-specific neurons, drawn from its tables alone."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxneurons.plots.figures import DISTINCT, PALETTE, draw_tables, heat_map, new_figure
from jaxneurons.plots.lettering import describe_axes, entitle, legend, name_x, name_y, note
from jaxneurons.prompts.matching import ERRORS

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


def _places(names: Sequence[str]) -> dict[str, int]:
    return {name: place for place, name in enumerate(names)}


def _controls(rows: Rows, off: str, value: str = "drop") -> dict[str, list[float]]:
    """By relation, what a control has in a column; [] for relations without it."""
    found: dict[str, list[float]] = {name: [] for name in _names(rows)}
    for row in rows:
        if row["off"] == off and row[value] is not None:
            found[row["relation"]].append(row[value])
    return found


def inter_relation(rows: Rows, source: str, evaluation: str = "eva") -> Any:
    """Relation x relation: the share of right answers lost, with a column for random neurons."""
    rows = [row for row in rows if row["evaluation"] == evaluation and row["counted"]]
    offs = [name for name in _names(rows, "off") if name not in ("random", "matched")]
    switched = set(offs)
    asked = [name for name in _names(rows) if name in switched]
    if not asked:
        return None
    values = np.full((len(asked), len(offs) + 1), np.nan)
    down, across = _places(asked), _places(offs)
    for row in rows:
        if row["relation"] in down and row["off"] in across and row["drop"] is not None:
            values[down[row["relation"]], across[row["off"]]] = row["drop"]
    random = _controls(rows, "random")
    for i, name in enumerate(asked):
        values[i, -1] = np.mean(random[name]) if random[name] else np.nan
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
        boxed=[(i, across[name]) for i, name in enumerate(asked)],
    )


def _k(rows: Rows) -> str:
    return f"{max(row['k'] for row in rows):,}"


def intra_relation(rows: Rows, source: str) -> Any:
    """Accuracy of each relation: untouched, own neurons off, random ones off."""
    rows = [row for row in rows if row["evaluation"] == "eva"]
    switched = {row["off"] for row in rows}
    names = [name for name in _names(rows) if name in switched]
    if not names:
        return None
    figure, axes = new_figure(max(9.6, 2.0 + 0.27 * len(names)), 4.6)
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
        controls = _controls(rows, off, "accuracy")
        found = [controls[name] for name in names]
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
    name_x(axes, [_label(n) for n in names], rotation=40)
    axes.set_ylim(0, 1)
    describe_axes(axes, y="accuracy on held-out facts")
    entitle(axes, f"{_k(rows)} neurons off, {source} (whiskers: s.d. over seeds)")
    legend(axes, ncols=2)
    return figure


def sizes(rows: Rows, source: str) -> Any:
    """Loss against the number of neurons: own, others', random."""
    steps = sorted({row["k"] for row in rows})
    used = [row for row in rows if row["counted"]]
    if not used:
        return None
    figure, axes = new_figure(7.2, 4.6)
    lines: dict[str, dict[int, float]] = {}
    for row in used:
        if row["off"] == row["relation"]:
            lines.setdefault(row["relation"], {})[row["k"]] = 100 * row["drop"]
    for line in lines.values():
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
    axes.set_xscale("log")
    describe_axes(axes, x="neurons off", y="right answers lost (%)")
    lowest = min(-10.0, min(100 * r["drop"] for r in used if r["off"] == r["relation"]))
    axes.set_ylim(max(lowest, -60) - 5, 105)
    entitle(axes, f"Number of neurons, {source} (bands: s.e. over relations; random: s.d.)")
    legend(axes, loc="upper left")
    return figure


def layers(rows: Rows, source: str, key: str = "relation") -> Any:
    """Relation x layer: where the neurons are."""
    names, last = _names(rows, key), max(row["layer"] for row in rows)
    values, place = np.zeros((len(names), last + 1)), _places(names)
    for row in rows:
        values[place[row[key]], row["layer"]] += row["neurons"]
    shares = 100 * values / values.sum(1, keepdims=True)
    return heat_map(
        shares,
        rows=[_label(name) for name in names],
        columns=[str(layer) for layer in range(last + 1)],
        title=f"Share of the neurons of each {key} in each layer (%), {source}",
        xlabel="layer",
        ylabel="",
        limits=(0.0, float(shares.max())),
        colours="Blues",
        rotation=0,
    )


def type_layers(rows: Rows, source: str) -> Any:
    """Layer distribution of the neurons of each kind, over all relations."""
    kinds = _names(rows, "type")
    if len(kinds) > DISTINCT:
        return layers(rows, source, "type")
    figure, axes = new_figure(7.2, 4.0)
    last = max(row["layer"] for row in rows)
    entries = []
    for number, kind in enumerate(kinds):
        counts = np.zeros(last + 1)
        for row in rows:
            if row["type"] == kind:
                counts[row["layer"]] += row["neurons"]
        colour = PALETTE[number % len(PALETTE)]
        style = "o-" if number < len(PALETTE) else "o--"
        (line,) = axes.plot(100 * counts / counts.sum(), style, ms=3, color=colour)
        entries.append((line, _label(kind)))
    describe_axes(axes, x="layer", y="share of the neurons (%)")
    entitle(axes, f"Where neurons of each kind are, {source}")
    legend(axes, entries, ncols=3)
    return figure


def overlap(rows: Rows, source: str) -> Any:
    """Relation x relation: shared neurons."""
    names = _names(rows)
    values, place = np.zeros((len(names), len(names))), _places(names)
    for row in rows:
        values[place[row["relation"]], place[row["other"]]] = row["shared"]
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
            note(axes, f"{1 - affected / total:.2f}", (i, total), ha="center", va="bottom")
    name_x(axes, [f"{a:,} to {b:,}" for a, b in steps], rotation=25)
    describe_axes(axes, y="held-out answers, all relations")
    entitle(axes, f"Cumulativity (above the bars), {source}")
    axes.set_ylim(0, 1.35 * max(1, *sums["total"]))
    legend(axes, loc="upper left", ncols=2)
    return figure


def multilingual(rows: Rows, source: str) -> Any:
    """Detection facts answered in each language; grey where that is too few to go on."""
    names, languages = _names(rows), _names(rows, "language")
    values = np.full((len(names), len(languages)), np.nan)
    down, across = _places(names), _places(languages)
    for row in rows:
        share = 100 * row["validated"] / max(row["detection"], 1)
        values[down[row["relation"]], across[row["language"]]] = share
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
    random: dict[tuple[str, str], list[float]] = {}
    for row in rows:
        if row["off"] == "random" and row["drop"] is not None:
            random.setdefault((row["relation"], row["language"]), []).append(row["drop"])
    found = [
        (
            f"{_label(row['relation'])}, {row['language']}",
            row["drop"],
            random.get((row["relation"], row["language"]), []),
        )
        for row in rows
        if row["off"] == row["relation"] and row["counted"]
    ]
    return _paired_bars(found, f"Other languages, {source}") if found else None


def robustness(rows: Rows, source: str) -> Any:
    """Right answers lost in other wordings: own neurons off, random ones off."""
    own = {r["relation"]: r["drop"] for r in rows if r["off"] == r["relation"] and r["counted"]}
    random = _controls(rows, "random")
    found = [(_label(name), value, random[name]) for name, value in own.items()]
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
    name_x(axes, [name for name, *_ in found], rotation=40)
    describe_axes(axes, y="right answers lost (%)")
    entitle(axes, title)
    legend(figure, loc="outside lower center", ncols=2)
    return figure


def concepts(rows: Rows, source: str) -> Any:
    """Concept x relation: shared neurons."""
    kinds, names = _names(rows, "concept"), _names(rows)
    values = np.zeros((len(kinds), len(names)))
    down, across = _places(kinds), _places(names)
    own = []
    for row in rows:
        cell = down[row["concept"]], across[row["relation"]]
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
    names = _names(rows)
    figure, axes = new_figure(max(8.4, 1.6 + 0.24 * len(names)), 4.4)
    x = np.arange(len(names))
    ratios = {r["relation"]: r["ratio"] for r in rows if r["relation"] == r["off"]}
    own = [ratios[name] for name in names]
    controls = _controls(rows, "random", "ratio")
    random = [controls[name] for name in names]
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
    name_x(axes, [_label(n) for n in names], rotation=40)
    describe_axes(axes, y="perplexity, times the untouched model's")
    entitle(axes, f"Sentences that say nothing of the relation, {source}")
    legend(figure, loc="outside lower center", ncols=2)
    return figure


def types(rows: Rows, source: str) -> Any:
    """Mean losses for each kind of neuron: own, others', random."""
    kinds = _names(rows, "type")
    figure, axes = new_figure(max(7.2, 1.6 + 0.4 * len(kinds)), 4.2)
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
    name_x(
        axes,
        [f"{_label(kind)}: {sizes[kind]:,}" for kind in kinds],
        label="kind of neuron, and how many are off",
        rotation=0 if len(kinds) <= 4 else 40,
    )
    describe_axes(axes, y="right answers lost (%), mean")
    entitle(axes, f"Kinds of neurons, {source}")
    legend(axes)
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
        axes.barh(range(len(conditions)), shares, left=left, color=PALETTE[number], label=error)
        for i, share in enumerate(shares):
            if share >= 4:
                note(
                    axes,
                    f"{share:.0f}",
                    (left[i] + share / 2, i),
                    ha="center",
                    va="center",
                    color="white",
                    fontsize=8,
                )
        left += shares
    axes.set_xlim(0, 100)
    describe_axes(axes, x="share of the wrong answers (%)")
    name_y(axes, list(conditions.values()))
    axes.invert_yaxis()
    entitle(axes, f"Wrong answers, {source}")
    legend(figure, loc="outside lower center", ncols=5, fontsize=8)
    return figure


def frequency(rows: Rows, source: str) -> Any:
    """How often resilient and sensitive facts occur, by relation."""
    names = _names(rows)
    figure, axes = new_figure(max(7.2, 1.6 + 0.24 * len(names)), 4.2)
    place = _places(names)
    for shift, kind, colour in ((-0.12, "resilient", OWN), (0.12, "sensitive", OTHERS)):
        points = [(place[r["relation"]] + shift, 1 + r["count"]) for r in rows if r["kind"] == kind]
        if points:
            axes.scatter(*zip(*points, strict=True), s=14, color=colour, alpha=0.6, label=kind)
    name_x(axes, [_label(n) for n in names], rotation=40)
    axes.set_yscale("log")
    describe_axes(axes, y="1 + count of the fact")
    entitle(axes, f"Fact frequency, {source}")
    legend(axes)
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
