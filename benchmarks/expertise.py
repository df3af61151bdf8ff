"""Average precision of every FFN neuron, against one scikit-learn call per neuron on all cores.

    python benchmarks/expertise.py [--neurons 109440] [--positives 300] [--negatives 1200]

One run on one machine, in turns. scikit-learn is timed on a subset of the neurons in a process pool
and scaled up (said so); both are compared on that subset.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import statistics
import time
from pathlib import Path

import numpy as np


def one(column: np.ndarray) -> float:
    from sklearn.metrics import average_precision_score

    positives = int(column[0])
    labels = np.zeros(len(column) - 1)
    labels[:positives] = 1
    return float(average_precision_score(labels, column[1:]))


def main() -> None:
    parser = argparse.ArgumentParser(description="Average precision of every neuron.")
    parser.add_argument("--neurons", type=int, default=109_440, help="SmolLM2's FFN neurons")
    parser.add_argument("--positives", type=int, default=300)
    parser.add_argument("--negatives", type=int, default=1200)
    parser.add_argument("--subset", type=int, default=2_000, help="neurons scikit-learn is given")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()

    # Before JAX starts its threads: the pool's processes are forked without them.
    cores = len(os.sched_getaffinity(0))
    pool = multiprocessing.get_context("forkserver").Pool(cores)
    pool.map(one, [np.r_[1.0, np.arange(4.0)]] * cores * 4)  # imports

    import jax

    from jaxneurons.engine import average_precision

    rng = np.random.default_rng(0)
    shift = rng.normal(scale=0.5, size=options.neurons).astype(np.float32)
    positives = rng.standard_normal((options.positives, options.neurons), np.float32) + shift
    negatives = rng.standard_normal((options.negatives, options.neurons), np.float32)
    device = jax.device_put(positives), jax.device_put(negatives)
    columns = np.concatenate([positives, negatives])[:, : options.subset].T
    columns = np.concatenate(
        [np.full((len(columns), 1), float(options.positives)), columns], axis=1
    )

    ours = np.asarray(average_precision(*device))
    times: dict[str, list[float]] = {"ours": [], "scikit-learn": []}
    theirs: list[float] = []
    for _ in range(options.repeats):
        start = time.perf_counter()
        average_precision(*device).block_until_ready()
        times["ours"].append(time.perf_counter() - start)
        start = time.perf_counter()
        theirs = pool.map(one, list(columns), chunksize=100)
        times["scikit-learn"].append(time.perf_counter() - start)
    pool.close()
    apart = float(np.abs(ours[: options.subset] - theirs).max())
    mine = statistics.median(times["ours"])
    scale = options.neurons / options.subset
    pooled = statistics.median(times["scikit-learn"]) * scale
    examples = options.positives + options.negatives
    print(f"{options.neurons} neurons x {examples} examples, {cores} cores")
    print(f"jaxneurons: {mine:.2f} s")
    print(
        f"scikit-learn, one call per neuron, pool of {cores}: {pooled:.1f} s "
        f"(scaled from {options.subset} neurons)"
    )
    print(f"{pooled / mine:.0f} times faster; largest difference {apart:.1e}")
    if options.out:
        found = {"seconds": mine, "scikit_learn": pooled, "ratio": pooled / mine, "apart": apart}
        options.out.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
