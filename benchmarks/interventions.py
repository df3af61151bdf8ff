"""Many candidate interventions: one vmapped call over multipliers, against edited parameters.

    python benchmarks/interventions.py [--model lab] [--candidates 256] [--neurons 16]

Each candidate turns random neurons off; wanted are the logits after a prompt.

- *multipliers*: `jax.vmap` over `forward(..., scales=...)`, one call.
- *trees, in turn*: for each candidate one program that edits the parameters and runs the model.
- *trees, kept*: the model, run over parameters that were edited before and are all in memory;
  editing is not timed. Trees share the arrays that no candidate changes. Left out where they need
  more than `--most` GiB.

Times: one process, compiled, in turns, medians. Memory: a process for each way, peak of resident
memory while it runs, above that with the model loaded and all compiled (for kept trees also while
they are made). At last what XLA plans for 1, 16 and all candidates in one call: the parameters are
there once, multipliers and activations for each.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from long_prompts import peak_memory

import jaxneurons as jn
from jaxneurons.edit import scale
from jaxneurons.neurons import random_neurons, stack_scales

MIB, GIB = 1 << 20, 1 << 30
WAYS = ("multipliers", "trees, in turn", "trees, kept")


class Candidates:
    """The model, the prompt and the multipliers, and the ways of running them."""

    def __init__(self, options: argparse.Namespace):
        lm = jn.load(options.model)
        self.config, self.params = lm.config, lm.params
        self.tokens = jnp.asarray(lm.tokenizer(options.prompt, return_tensors="np").input_ids)
        rng = np.random.default_rng(0)
        sets = [
            random_neurons(self.config, [options.site], options.neurons, rng)
            for _ in range(options.candidates)
        ]
        self.scales = stack_scales(sets, self.config, 0.0)
        self.site = options.site
        first = self.table(0)
        self.run_edited = self.compile(
            lambda p, s: self.logits(scale(p, s, config=self.config)), self.params, first
        )
        self.run = self.compile(self.logits, self.params)
        self.run_all = self.compile_all(options.candidates)

    @staticmethod
    def compile(function: Callable[..., Any], *arguments: Any) -> Any:
        return jax.jit(function).lower(*arguments).compile()

    def compile_all(self, count: int) -> Any:
        """The program over so many candidates."""
        shapes = {
            site: jax.ShapeDtypeStruct((count, *table.shape[1:]), jnp.float32)
            for site, table in self.scales.items()
        }
        batched = jax.vmap(self.logits, in_axes=(None, 0))
        return self.compile(batched, self.params, shapes)

    def logits(self, params: Any, scales: Any = None) -> jax.Array:
        out = jn.forward(params, self.tokens, config=self.config, scales=scales)
        return out.logits[:, 0]

    def table(self, number: int) -> dict[str, np.ndarray]:
        """Multipliers of one candidate."""
        return {site: table[number] for site, table in self.scales.items()}

    def edited(self, number: int) -> Any:
        """Parameters of one candidate, outside of jit: they share all that is not changed."""
        return scale(self.params, self.table(number), config=self.config)

    @property
    def count(self) -> int:
        return len(self.scales[self.site])

    def multipliers(self) -> np.ndarray:
        return np.asarray(self.run_all(self.params, self.scales))

    def in_turn(self) -> np.ndarray:
        return np.stack(
            [np.asarray(self.run_edited(self.params, self.table(n))) for n in range(self.count)]
        )

    def keep(self) -> list[Any]:
        return jax.block_until_ready([self.edited(n) for n in range(self.count)])

    def over(self, trees: list[Any]) -> np.ndarray:
        return np.stack([np.asarray(self.run(tree)) for tree in trees])

    def kept_bytes(self) -> int:
        """Of the arrays that the trees do not share."""
        mine = {id(leaf) for leaf in jax.tree.leaves(self.params)}
        made = [leaf for leaf in jax.tree.leaves(self.edited(0)) if id(leaf) not in mine]
        return self.count * sum(leaf.nbytes for leaf in made)


def memory_of(way: str, options: argparse.Namespace) -> float:
    """Bytes at the peak, in this process."""
    candidates, peak = Candidates(options), {}
    with peak_memory(peak):
        if way == "multipliers":
            candidates.multipliers()
        elif way == "trees, in turn":
            candidates.in_turn()
        else:
            candidates.over(candidates.keep())
    return peak["peak"]


def peaks(ways: list[str], repeats: int) -> dict[str, float]:
    """Medians over fresh processes, in turns."""
    found: dict[str, list[float]] = {way: [] for way in ways}
    for _ in range(repeats):
        for way in ways:
            command = [sys.executable, __file__, *sys.argv[1:], "--way", way]
            out = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            found[way].append(float(out.splitlines()[-1]))
    return {way: statistics.median(values) for way, values in found.items()}


def times(candidates: Candidates, ways: list[str], repeats: int) -> dict[str, float]:
    """Median seconds for all candidates, in turns; and checks that all give the same logits."""
    trees = candidates.keep() if "trees, kept" in ways else []
    functions: dict[str, Callable[[], np.ndarray]] = {
        "multipliers": candidates.multipliers,
        "trees, in turn": candidates.in_turn,
        "trees, kept": lambda: candidates.over(trees),
    }
    expected = functions["multipliers"]()
    found: dict[str, list[float]] = {way: [] for way in ways}
    for _ in range(repeats):
        for way in ways:
            start = time.perf_counter()
            logits = functions[way]()
            found[way].append(time.perf_counter() - start)
            difference = np.linalg.norm(logits - expected) / np.linalg.norm(expected)
            assert difference < 1e-5, (way, difference)
    return {way: statistics.median(values) for way, values in found.items()}


def plan(candidates: Candidates, count: int) -> dict[str, float]:
    """What XLA plans for one call over so many candidates, in bytes."""
    memory = candidates.compile_all(count).memory_analysis()
    params = sum(leaf.nbytes for leaf in jax.tree.leaves(candidates.params))
    return {
        "candidates": count,
        "multipliers": sum(table[0].nbytes for table in candidates.scales.values()) * count,
        "activations": memory.temp_size_in_bytes + memory.output_size_in_bytes,
        "arguments": memory.argument_size_in_bytes,
        "parameters": params,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="Many candidate interventions.")
    parser.add_argument("--model", default="lab")
    parser.add_argument("--prompt", default="The capital of Wenmonia is")
    parser.add_argument("--candidates", type=int, default=256)
    parser.add_argument("--neurons", type=int, default=16, help="that a candidate turns off")
    parser.add_argument("--site", default="up", choices=jn.SITES)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--most", type=float, default=4.0, help="GiB that kept trees may need")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--way", choices=WAYS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.way:
        print(memory_of(options.way, options))
        return

    candidates = Candidates(options)
    kept = candidates.kept_bytes()
    ways = [way for way in WAYS if way != "trees, kept" or kept < options.most * GIB]
    seconds, peak = times(candidates, ways, options.repeats), peaks(ways, options.repeats)
    print(
        f"{options.model}: {options.candidates} candidates of {options.neurons} {options.site!r} "
        f"neurons, {candidates.tokens.shape[1]} tokens; parameters "
        f"{sum(x.nbytes for x in jax.tree.leaves(candidates.params)) / MIB:.0f} MiB, "
        f"trees of their own {kept / GIB:.2f} GiB together"
    )
    for way in ways:
        print(
            f"{way}: {seconds[way]:.3f} s ({seconds[way] / seconds['multipliers']:.1f}), peak "
            f"{peak[way] / MIB:.0f} MiB ({peak[way] / peak['multipliers']:.2f})"
        )
    plans = [plan(candidates, n) for n in sorted({1, 16, options.candidates})]
    for row in plans:
        print(
            f"{row['candidates']:.0f} in one call: parameters {row['parameters'] / MIB:.1f} MiB, "
            f"multipliers {row['multipliers'] / MIB:.2f}, activations and logits "
            f"{row['activations'] / MIB:.2f}"
        )
    if options.out:
        result = {"seconds": seconds, "peak": peak, "plans": plans}
        options.out.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
