"""Which layers to edit, and whether causal tracing or attribution says so beforehand.

    python benchmarks/edit_layers.py --model smollm2-135m --requests counterfact_3000.json
    python benchmarks/edit_layers.py --model lab --requests lab

Takes requests whose old answer the model gives (only those can be traced), edits each alone at each
candidate layer, and holds the measures by layer against what is located by layer: indirect effects
at the subject's last token, and the sum of the neurons' absolute attributions at the prompt's end.
Prints tables in Markdown, which are a section of docs/editing_results.md too
(`benchmarks/editing.py`); what is finished in `--out` is not computed again.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from results_page import markdown

import jaxneurons as jn

Row = dict[str, Any]
MEASURES = ("efficacy_free", "generalisation_free", "locality_free", "probability_new")
SHOWN = {"score": "mean of three", "efficacy_free": "free", "probability_new": "p(new)"}
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
        "--count", type=int, default=20, help="requests, of those that can be traced"
    )
    parser.add_argument("--among", type=int, default=600, help="requests that are looked through")
    parser.add_argument("--samples", type=int, default=4, help="of the noise")
    parser.add_argument("--candidates", type=int, nargs="*", help="layers; default: about ten")
    parser.add_argument("--out", type=Path, required=True, help="run directories")
    options = parser.parse_args()
    lines = section(
        jn.load(options.model),
        options.model,
        read(options.requests, options.among),
        options.out,
        count=options.count,
        method=options.method,
        samples=options.samples,
        candidates=options.candidates,
    )
    print("\n".join(lines))


def section(
    lm: Any,
    model: str,
    requests: Sequence[jn.edit.EditRequest],
    out: Path,
    *,
    count: int = 20,
    method: str = "rome-identity",
    samples: int = 4,
    candidates: Sequence[int] | None = None,
) -> list[str]:
    """Both tables, in Markdown; what is finished in `out` is not computed again."""
    requests = known(lm, requests)[:count]
    facts = [
        jn.edit.KnownFact(each.prompt, each.subject, each.ground_truth, id=each.id)
        for each in requests
    ]
    name = f"{Path(model).name}-{method}"
    traced = jn.edit.trace(lm, facts, samples=samples, out=out / f"{name}-traced")
    chosen = jn.edit.choose_layers(
        lm, requests, METHODS[method], candidates=candidates, out=out / f"{name}-layers"
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
    return [
        f"## `{model}`: does what is located predict where to edit?\n",
        f"{len(facts)} requests whose old answer the model gives, each edited alone by {method} at "
        "each of some layers. Tracing: indirect effect of a restored state at the subject's last "
        "token. Attribution: sum of a layer's absolute scores at the end of the prompt. Mean of "
        "three: of the new answer, of paraphrases and of neighbours kept, in free generation.\n",
        *markdown(
            f"**Edits by layer**; best: {', '.join(map(str, chosen.layers))}",
            ("layer", "score", "free", "paraphrases, free", "kept, free", "p(new)"),
            (
                (
                    row["layers"],
                    f"{row['score']:.2f} ({row['low']:.2f} to {row['high']:.2f})",
                    *(cell(row[name]) for name in MEASURES),
                )
                for row in chosen.tables.rows("layers")
            ),
        ),
        *markdown(
            "**Rank correlation over layers** of what is located with what edits do there; and the "
            "measure at the layer that it names, at the best and at the average layer",
            ("located by", "measure", "of facts", "of means", "names", "there", "best", "average"),
            (
                (
                    row["predictor"],
                    SHOWN[row["measure"]],
                    interval(row["of_facts"], row["low"], row["high"]),
                    interval(row["of_means"], row["means_low"], row["means_high"]),
                    str(row["layer"]),
                    *(cell(row[name]) for name in ("at_predicted", "best", "at_random")),
                )
                for row in rows
                if row["measure"] in SHOWN
            ),
        ),
    ]


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


def cell(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def interval(value: float, low: float, high: float) -> str:
    return f"{value:+.2f} ({low:+.2f} to {high:+.2f})"


if __name__ == "__main__":
    main()
