"""How much text the second moment of keys needs: where more stops helping.

    python benchmarks/covariance.py [--model smollm2-135m] [--layers 5 15] [--widths 0.5 1 2 4 5.5]

A rank-one edit moves what a layer writes along u = C^-1 k / (k C^-1 k), for the key k of a subject:
it is 1 there, and should be 0 for the keys of other text. For C over more and more keys: the cosine
of C^-1 k with that of the most keys, and the disturbance, the mean of (u k')^2 over keys k' of text
that no C has seen, as a multiple of the smallest. Beside them the identity in C's place.
"""

from __future__ import annotations

import argparse
import json
import time
import warnings
from pathlib import Path

import jax.numpy as jnp
import numpy as np

import jaxneurons as jn


def subject_keys(lm: jn.LM, layers: list[int], count: int) -> np.ndarray:
    """[layer, subject, width]: keys at the last token of some subjects, each in a prompt."""
    relations = [r for r in jn.prompts.bundled_relations() if " " not in r.triples[0].subject]
    requests = []
    for relation in relations:
        template = relation.templates["plain"][0]
        for triple in relation.triples[: -(-count // len(relations))]:
            prompt = jn.prompts.prompt(template, triple.subject)
            if prompt.count(triple.subject) == 1 and not prompt.startswith(triple.subject):
                requests.append(jn.edit.EditRequest(prompt, triple.subject, triple.object))
    keys = []
    for request in requests[:count]:
        encoded = jn.edit.encode_request(lm.tokenizer, request, config=lm.config)
        ids = np.zeros((1, 32), np.int32)
        ids[0, : len(encoded.prompt)] = encoded.prompt
        out = jn.forward(
            lm.params,
            jnp.asarray(ids),
            config=lm.config,
            at=jnp.array([[encoded.subject_last]]),
            capture=("act",),
        )
        keys.append(np.asarray(out.activations["act"])[layers, 0, 0])
    return np.stack(keys, axis=1)


def directions(keys: np.ndarray, solved: np.ndarray) -> np.ndarray:
    """u of each key: what is 1 for it."""
    return solved / np.sum(keys * solved, axis=-1, keepdims=True)


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    norms = np.linalg.norm(a, axis=-1) * np.linalg.norm(b, axis=-1)
    return float(np.median(np.sum(a * b, axis=-1) / norms))


def main() -> None:
    parser = argparse.ArgumentParser(description="How much text a covariance needs.")
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--layers", type=int, nargs="+", default=[5, 15])
    parser.add_argument("--widths", type=float, nargs="+", default=[0.5, 1, 2, 4, 5.5])
    parser.add_argument("--subjects", type=int, default=64)
    parser.add_argument("--samples", type=int, default=0, help="texts that the model writes, too")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()

    lm = jn.load(options.model)
    width = lm.config.intermediate_size
    text = jn.edit.neutral_text()
    if options.samples:
        text += jn.edit.sample_text(lm, options.samples)
    keys = subject_keys(lm, options.layers, options.subjects).astype(np.float64)
    warnings.simplefilter("ignore", jn.edit.SingularCovarianceWarning)
    unseen = jn.edit.collect_covariance(lm, options.layers, text=jn.edit.held_out_text())
    rows = []
    for widths in options.widths:
        begin = time.perf_counter()
        collected = jn.edit.collect_covariance(
            lm, options.layers, text=text, vectors=round(widths * width)
        )
        seconds = time.perf_counter() - begin
        rows.append((widths, seconds, collected))
    results = []
    for place, layer in enumerate(options.layers):
        other = unseen[layer].matrix.astype(np.float64)
        solved = {"identity": (0.0, keys[place])}
        for widths, seconds, collected in rows:
            solved[f"{widths:g}"] = (seconds, collected[layer].solve(keys[place]).astype(float))
        last = solved[f"{options.widths[-1]:g}"][1]
        disturbance = {}
        for name, (_, vectors) in solved.items():
            u = directions(keys[place], vectors)
            disturbance[name] = float(np.median(np.einsum("kw,wv,kv->k", u, other, u)))
        best = min(disturbance.values())
        for name, (seconds, vectors) in solved.items():
            results.append(
                {
                    "layer": layer,
                    "widths": name,
                    "seconds": round(seconds, 1),
                    "cosine": round(cosine(vectors, last), 4),
                    "disturbance": round(disturbance[name] / best, 3),
                }
            )
    print(f"{lm.source}, width {width}, {keys.shape[1]} subjects")
    print("layer  keys/width  seconds  cosine  disturbance")
    for row in results:
        print(
            f"{row['layer']:5d}  {row['widths']:>10}  {row['seconds']:7.1f}  {row['cosine']:6.3f}  "
            f"{row['disturbance']:11.3f}"
        )
    if options.out:
        options.out.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
