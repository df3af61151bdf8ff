"""Which layers to edit, and whether causal tracing or attribution says so beforehand.

    python benchmarks/edit_layers.py --model smollm2-135m --requests counterfact_3000.json
    python benchmarks/edit_layers.py --model lab --requests lab

Takes requests whose old answer the model gives (only those can be traced), edits each alone at each
candidate layer, and holds the measures by layer against what is located by layer: indirect effects
at the subject's last token, and the sum of the neurons' absolute attributions at the prompt's end.
Prints tables in Markdown; what is finished in `--out` is not computed again.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

import jaxneurons as jn

Row = dict[str, Any]
MEASURES = ("efficacy_free", "generalisation_free", "locality_free", "probability_new")
METHODS = {
    "rome": jn.edit.ROME(),
    "rome-identity": jn.edit.ROME(covariance="identity"),
    "finetune": jn.edit.FineTune(),
}


def main() -> None:
    parser = argparse.ArgumentParser(description="Which layers to edit, and what predicts it.")
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--requests", default="lab", help="a file of requests, or `lab`")
    parser.add_argument("--method", choices=METHODS, default="rome-identity")
    parser.add_argument(
        "--count", type=int, default=10, help="requests, of those that can be traced"
    )
    parser.add_argument("--among", type=int, default=300, help="requests that are looked through")
    parser.add_argument("--samples", type=int, default=4, help="of the noise")
    parser.add_argument("--candidates", type=int, nargs="*", help="layers; default: about ten")
    parser.add_argument("--out", type=Path, required=True, help="run directories")
    options = parser.parse_args()

    lm = jn.load(options.model)
    requests = known(lm, read(options.requests, options.among))[: options.count]
    facts = [
        jn.edit.KnownFact(each.prompt, each.subject, each.ground_truth, id=each.id)
        for each in requests
    ]
    name = f"{Path(options.model).name}-{options.method}"
    traced = jn.edit.trace(lm, facts, samples=options.samples, out=options.out / f"{name}-traced")
    chosen = jn.edit.choose_layers(
        lm,
        requests,
        METHODS[options.method],
        candidates=options.candidates,
        out=options.out / f"{name}-layers",
    )
    layers = [int(row["layers"]) for row in chosen.tables.rows("layers")]
    predicted = {
        **by_kind(traced.rows("effects"), len(facts), layers),
        **{
            f"attribution, {site}": jn.edit.attribution_by_layer(lm, facts, site=site)[:, layers]
            for site in ("act", "up")
        },
    }
    rows = jn.edit.agreement_table(
        predicted, measures(chosen.tables.rows("requests"), len(facts), layers), layers=layers
    )
    print(f"## `{options.model}`, {options.method}: {len(facts)} requests\n")
    print(f"Layers that serve best: {', '.join(map(str, chosen.layers))}.\n")
    columns = ("layers", "score", "low", "high", *MEASURES, "reached", "as_good")
    print(markdown(chosen.tables.rows("layers"), columns))
    print(markdown(rows, tuple(rows[0]) if rows else ()))


def read(source: str, count: int) -> list[jn.edit.EditRequest]:
    if source == "lab":
        return jn.edit.lab_requests(count)
    return jn.edit.read_requests(source, limit=count)


def known(lm: Any, requests: Sequence[jn.edit.EditRequest]) -> list[jn.edit.EditRequest]:
    """Requests whose old answer is what the model says, word for word."""
    rows = [each for each in requests if each.ground_truth]
    facts = [
        jn.edit.KnownFact(each.prompt, each.subject, each.ground_truth, id=str(i))
        for i, each in enumerate(rows)
    ]
    return [rows[int(fact.id)] for fact in jn.edit.answered(lm, facts)]


def by_kind(rows: Sequence[Row], count: int, layers: Sequence[int]) -> dict[str, np.ndarray]:
    """Indirect effects at the subject's last token, [fact, layer], by kind of restored state."""
    kinds = list(dict.fromkeys(row["kind"] for row in rows))
    values = {f"tracing, {kind}": np.full((count, len(layers)), np.nan) for kind in kinds}
    for row in rows:
        if row["position"] == "last subject" and row["layer"] in layers:
            column = layers.index(row["layer"])
            values[f"tracing, {row['kind']}"][row["number"], column] = row["effect"]
    return values


def measures(rows: Sequence[Row], count: int, layers: Sequence[int]) -> dict[str, np.ndarray]:
    """Measures of edits, [fact, layer]; `score`: the mean of the three that choose."""
    values = {name: np.full((count, len(layers)), np.nan) for name in MEASURES}
    for row in rows:
        for name in MEASURES:
            if row[name] is not None:
                values[name][row["number"], layers.index(int(row["layers"]))] = row[name]
    three = np.stack([values[name] for name in MEASURES[:3]])
    return {"score": three.mean(0), **values}


def markdown(rows: Sequence[Row], columns: Sequence[str]) -> str:
    """Rows as a table in Markdown."""
    lines = [" | ".join(columns), " | ".join("---" for _ in columns)]
    lines += [" | ".join(cell(row[name]) for name in columns) for row in rows]
    return "\n".join(f"| {line} |" for line in lines) + "\n"


def cell(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.2f}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    main()
