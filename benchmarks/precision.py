"""What bfloat16 costs in exactness, layer by layer, against float32.

    python benchmarks/precision.py [--model smollm2-135m] [--prompts 3] [--write FILE.md]

The same model with its parameters (and so its matmuls, which accumulate in float32) in both dtypes:
attribution of facts (relative L2 error, overlap of the 20 best neurons of a layer, completeness
gap; rule `adaptive` in float32, and in both dtypes with the nodes that it asks for), average
precision of neurons for a relation, and one rank-one edit.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from results_page import markdown

import jaxneurons as jn
from jaxneurons.engine import average_precision, mean_responses
from jaxneurons.prompts import encode_prompt, encode_query

TOP = 20
DTYPES = ("float32", "bfloat16")


def relative(ours: np.ndarray, theirs: np.ndarray) -> np.ndarray:
    """L2 difference of every layer over the norm of the second."""
    return np.linalg.norm(ours - theirs, axis=-1) / np.linalg.norm(theirs, axis=-1)


def overlap(ours: np.ndarray, theirs: np.ndarray) -> np.ndarray:
    """Share of the `TOP` largest of every layer that both have."""
    best = [np.argsort(-values, axis=-1)[:, :TOP] for values in (ours, theirs)]
    return np.array([len(set(a) & set(b)) / TOP for a, b in zip(*best, strict=True)])


def attributions(lm: jn.LM, count: int) -> list[jn.Attribution]:
    """Of the first facts that ship with the package, one at a time, padded to one shape."""
    found = []
    for query in jn.qrnca.bundled_queries("facts")[:count]:
        encoded = encode_query(lm.tokenizer, query.prompts[0], query.answers[0])
        ids = np.zeros((1, 32), np.int32)
        ids[0, : len(encoded.prompt)] = encoded.prompt
        out = jn.integrated_gradients(
            lm.params,
            jnp.asarray(ids),
            jnp.array([encoded.answer[0]]),
            config=lm.config,
            lengths=jnp.array([len(encoded.prompt)]),
        )
        found.append(jax.tree.map(lambda x: np.asarray(x)[0], out))
    return found


def precisions(lm: jn.LM, examples: int) -> np.ndarray:
    """[layer, width] average precision of `up` neurons for one relation against another."""
    groups = []
    for relation in jn.prompts.bundled_relations()[:2]:
        template = relation.templates["plain"][0]
        texts = [jn.prompts.prompt(template, t.subject) for t in relation.triples[:examples]]
        prompts = [encode_prompt(lm.tokenizer, text) for text in texts]
        tokens = np.zeros((len(prompts), 32), np.int32)
        for row, ids in zip(tokens, prompts, strict=True):
            row[: len(ids)] = ids
        out = mean_responses(
            lm.params,
            jnp.asarray(tokens),
            jnp.array([len(ids) for ids in prompts]),
            config=lm.config,
            sites=("up",),
        )
        groups.append(np.asarray(out["up"], np.float32))
    return np.stack([np.asarray(average_precision(a, b)) for a, b in zip(*groups, strict=True)])


def edited(lm: jn.LM, layer: int) -> tuple[np.ndarray, list[float]]:
    """What a rank-one edit writes, and the new answer's probability before and after."""
    relation = jn.prompts.bundled_relations()[0]
    triple, other = relation.triples[:2]
    text = jn.prompts.prompt(relation.templates["plain"][0], triple.subject)
    request = jn.edit.EditRequest(text, triple.subject, other.object)
    settings = jn.edit.ROME(layer=layer, covariance="identity")
    edit = jn.edit.edit(
        lm.params, [request], config=lm.config, tokenizer=lm.tokenizer, settings=settings
    )
    after = jn.edit.apply(lm.params, edit.changes, config=lm.config)
    kernels = [
        np.asarray(p["layers"]["ffn"]["down"]["kernel"][layer], np.float32)
        for p in (lm.params, after)
    ]
    encoded = encode_query(lm.tokenizer, text, other.object)
    ids = jnp.asarray(encoded.prompt, jnp.int32)[None]
    said = [
        float(jax.nn.softmax(jn.forward(p, ids, config=lm.config).logits[0, 0])[encoded.answer[0]])
        for p in (lm.params, after)
    ]
    return kernels[1] - kernels[0], said


def report(model: str, prompts: int, examples: int, layer: int | None) -> dict[str, Any]:
    """All measures, by layer, as JSON knows them."""
    found: dict[str, Any] = {"model": model, "prompts": prompts, "examples": examples}
    scores, gaps, precision, edits = {}, {}, {}, {}
    for dtype in DTYPES:
        lm = jn.load(model, dtype=dtype)
        out = attributions(lm, prompts)
        scores[dtype] = [np.asarray(one.scores, np.float32) for one in out]
        gaps[dtype] = np.mean([one.gap for one in out], axis=0)
        found[f"nodes {dtype}"] = float(np.mean([one.nodes.sum() for one in out]))
        precision[dtype] = precisions(lm, examples)
        at = lm.config.num_layers // 3 if layer is None else layer
        edits[dtype] = edited(lm, at)
        found["edited layer"] = at
    pairs = list(zip(scores["bfloat16"], scores["float32"], strict=True))
    change = edits["bfloat16"][0], edits["float32"][0]
    off = np.abs(precision["bfloat16"] - precision["float32"])
    found["layers"] = {
        "L2": np.mean([relative(*pair) for pair in pairs], axis=0).tolist(),
        "overlap": np.mean([overlap(*pair) for pair in pairs], axis=0).tolist(),
        "gap float32": gaps["float32"].tolist(),
        "gap bfloat16": gaps["bfloat16"].tolist(),
        "AP": off.mean(-1).tolist(),
        "AP overlap": overlap(precision["bfloat16"], precision["float32"]).tolist(),
    }
    found["edit"] = {
        "L2": float(np.linalg.norm(change[0] - change[1]) / np.linalg.norm(change[1])),
        "cosine": float(np.vdot(*change) / np.linalg.norm(change[0]) / np.linalg.norm(change[1])),
        **{f"probability {dtype}": edits[dtype][1] for dtype in DTYPES},
    }
    return found


def page(found: dict[str, Any]) -> list[str]:
    """The report in Markdown."""
    columns = found["layers"]
    rows = [
        [
            str(layer),
            f"{columns['L2'][layer]:.3f}",
            f"{columns['overlap'][layer]:.0%}",
            f"{columns['gap float32'][layer]:.1e}",
            f"{columns['gap bfloat16'][layer]:.1e}",
            f"{columns['AP'][layer]:.4f}",
            f"{columns['AP overlap'][layer]:.0%}",
        ]
        for layer in range(len(columns["L2"]))
    ]
    medians = {name: float(np.median(values)) for name, values in columns.items()}
    rows.append(
        [
            "median",
            f"{medians['L2']:.3f}",
            f"{medians['overlap']:.0%}",
            f"{medians['gap float32']:.1e}",
            f"{medians['gap bfloat16']:.1e}",
            f"{medians['AP']:.4f}",
            f"{medians['AP overlap']:.0%}",
        ]
    )
    edit = found["edit"]
    before, after = zip(*(edit[f"probability {dtype}"] for dtype in DTYPES), strict=True)
    return [
        *markdown(
            f"bfloat16 against float32, {found['model']}, {found['prompts']} prompts, average "
            f"precision of `up` neurons over {found['examples']} examples each",
            ("layer", "L2", "top 20", "gap, float32", "bfloat16", "AP, mean off", "AP top 20"),
            rows,
        ),
        f"Nodes of `adaptive` a prompt: {found['nodes float32']:.0f} in float32, "
        f"{found['nodes bfloat16']:.0f} in bfloat16.",
        "",
        f"A rank-one edit of layer {found['edited layer']}: L2 difference of what it writes "
        f"{edit['L2']:.3f}, cosine {edit['cosine']:.4f}; probability of the new answer "
        f"{before[0]:.3f} -> {after[0]:.3f} in float32, {before[1]:.3f} -> {after[1]:.3f} in "
        "bfloat16.",
        "",
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description="What bfloat16 costs in exactness.")
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--prompts", type=int, default=10)
    parser.add_argument("--examples", type=int, default=40, help="of each of two relations")
    parser.add_argument("--layer", type=int, help="that is edited; default: at a third")
    parser.add_argument("--write", type=Path, help="a Markdown file; default: the terminal")
    parser.add_argument("--out", type=Path, help="a JSON file")
    options = parser.parse_args()
    found = report(options.model, options.prompts, options.examples, options.layer)
    text = "\n".join(page(found))
    if options.write:
        options.write.write_text(text, encoding="utf-8")
    else:
        print(text)
    if options.out:
        options.out.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
