"""What one accelerator does: query neurons, responses, ablated generations, one edit, memory.

    python benchmarks/accelerator.py [--models llama-2-7b smollm2-135m] [--out FILE]
    python benchmarks/accelerator.py --small      # tiny shapes, on any machine

Random parameters in bfloat16 at the shapes of Llama-2-7B, and SmolLM2-135M. A QRNCA query is three
prompts of 128 tokens, attributed together, by the paper's rule and by `adaptive`. *Share* is that
of the device's measured matmul rate (a square product), by the floor of operations: 2 N a token of
a prompt and 4 N a row over half the layers, unembedding included. Memory is the device's own peak,
beside what `jaxneurons.scale.plan` predicts, where both are there to ask.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import importlib
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jaxneurons as jn
from jaxneurons.engine import ablated, mean_responses
from jaxneurons.model import count_parameters, param_shapes
from jaxneurons.neurons import FFN, random_neurons

LLAMA_2_7B = jn.scale.read_shape("7B").config
TINY = dataclasses.replace(
    LLAMA_2_7B,
    vocab_size=8_192,  # the tokenizer's of the lab model at least
    hidden_size=64,
    intermediate_size=96,
    num_layers=3,
    num_heads=4,
    num_kv_heads=4,
    head_dim=16,
)
RULES = {"right": jn.Quadrature("right", steps=16), "adaptive": jn.Quadrature()}


@dataclasses.dataclass(frozen=True)
class Sizes:
    """How much is measured.

    Attributes:
      tokens: of each prompt.
      prompts: of responses and generations.
      sets: of neurons that are off.
      matmul: rows and columns of the product that the rate is measured on.
      repeats: of every timing.
    """

    tokens: int = 128
    prompts: int = 64
    sets: int = 8
    matmul: int = 8_192
    repeats: int = 5


SMALL = Sizes(tokens=16, prompts=4, sets=2, matmul=128, repeats=1)


def random_params(config: jn.ModelConfig, dtype: Any) -> Any:
    """Parameters of a plausible size, made on the device in their dtype."""
    leaves, tree = jax.tree.flatten(
        param_shapes(config), is_leaf=lambda shape: isinstance(shape, tuple)
    )
    draw = jax.jit(
        lambda key, shape: (0.02 * jax.random.normal(key, shape)).astype(dtype), static_argnums=1
    )
    keys = jax.random.split(jax.random.key(0), len(leaves))
    return jax.tree.unflatten(tree, [draw(k, s) for k, s in zip(keys, leaves, strict=True)])


def seconds(function: Callable[[], Any], repeats: int) -> float:
    """Median of some calls, after one that compiles."""
    jax.block_until_ready(function())
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(function())
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def matmul_rate(size: int, dtype: Any, repeats: int) -> float:
    """Operations a second of a square product."""
    a = jnp.ones((size, size), dtype)
    product = jax.jit(jnp.matmul)
    return 2 * size**3 / seconds(lambda: product(a, a), repeats)


def peak_memory() -> int | None:
    """Bytes that the device has held at most so far; None where it does not say."""
    stats = jax.devices()[0].memory_stats() or {}
    return stats.get("peak_bytes_in_use")


def predicted_memory(config: jn.ModelConfig, dtype: str) -> str | None:
    """What `jaxneurons.scale.plan` says of locating here; None without it."""
    try:
        scale = importlib.import_module("jaxneurons.scale")
        return repr(scale.plan(config, job="locate", dtype=dtype))
    except ImportError:
        return None
    except jn.ConfigError as error:
        return str(error)


def floor(config: jn.ModelConfig, tokens: int, rows: float) -> float:
    """Operations of a prompt and its rows at least."""
    unembedding = config.vocab_size * config.hidden_size
    embeddings = unembedding * (1 if config.tied else 2)
    body = count_parameters(config) - embeddings
    return 2 * body * tokens + 2 * body * rows + 4 * unembedding * rows


def queries(params: Any, config: jn.ModelConfig, sizes: Sizes, rate: float) -> dict[str, Any]:
    """Seconds of a query by rule, and the share of the matmul rate."""
    rng = np.random.default_rng(0)
    tokens = jnp.asarray(rng.integers(0, config.vocab_size, (3, sizes.tokens)), jnp.int32)
    targets = jnp.asarray(rng.integers(0, config.vocab_size, 3), jnp.int32)
    found = {}
    for name, quadrature in RULES.items():
        run = jax.jit(
            functools.partial(jn.integrated_gradients, config=config, quadrature=quadrature)
        )
        spent = seconds(lambda run=run: run(params, tokens, targets), sizes.repeats)
        rows = float(np.asarray(run(params, tokens, targets).nodes).sum())
        least = floor(config, 3 * sizes.tokens, rows) / rate
        found[name] = {"seconds": spent, "rows": rows, "share": least / spent}
    return found


def responses(params: Any, config: jn.ModelConfig, sizes: Sizes) -> float:
    """Prompts a second."""
    rng = np.random.default_rng(1)
    shape = (sizes.prompts, sizes.tokens)
    tokens = jnp.asarray(rng.integers(0, config.vocab_size, shape), jnp.int32)
    lengths = jnp.full(sizes.prompts, sizes.tokens)
    run = functools.partial(mean_responses, params, tokens, lengths, config=config, sites=FFN)
    return sizes.prompts / seconds(run, sizes.repeats)


def generations(params: Any, config: jn.ModelConfig, sizes: Sizes) -> float:
    """Prompts with a set off, two tokens each, a second."""
    rng = np.random.default_rng(2)
    sets = [random_neurons(config, FFN, 300, rng) for _ in range(sizes.sets)]
    short = max(8, sizes.tokens // 8)
    prompts = [
        tuple(row) for row in rng.integers(0, config.vocab_size, (sizes.prompts, short)).tolist()
    ]
    run = lambda: [said for _, said in ablated(params, sets, prompts, config=config)]  # noqa: E731
    return sizes.sets * sizes.prompts / seconds(run, sizes.repeats)


def edit_seconds(params: Any, config: jn.ModelConfig) -> float:
    """One rank-one edit, compilation included: the second of two."""
    tokenizer = jn.load("lab").tokenizer
    (request,) = jn.edit.lab_requests(1)
    settings = jn.edit.ROME(layer=config.num_layers // 3, covariance="identity")
    times = []
    for _ in range(2):
        start = time.perf_counter()
        edit = jn.edit.edit(
            params, [request], config=config, tokenizer=tokenizer, settings=settings
        )
        jn.edit.apply(params, edit.changes, config=config)
        times.append(time.perf_counter() - start)
    return times[-1]


def measure(name: str, sizes: Sizes) -> dict[str, Any]:
    """Everything about one model."""
    if name == "smollm2-135m":
        lm = jn.load(name, dtype="bfloat16")
        params, config = lm.params, lm.config
    else:
        config = {"llama-2-7b": LLAMA_2_7B, "tiny": TINY}[name]
        params = random_params(config, jnp.bfloat16)
    rate = matmul_rate(sizes.matmul, jnp.bfloat16, sizes.repeats)
    found: dict[str, Any] = {"model": name, "matmul": rate}
    found["query"] = queries(params, config, sizes, rate)
    found["peak"] = peak_memory()
    found["predicted"] = predicted_memory(config, "bfloat16")
    found["responses"] = responses(params, config, sizes)
    found["generations"] = generations(params, config, sizes)
    found["edit"] = edit_seconds(params, config)
    found["peak of all"] = peak_memory()
    return found


def page(results: list[dict[str, Any]]) -> list[str]:
    device = jax.devices()[0]
    lines = [
        f"{device.device_kind} ({device.platform}), bfloat16",
        "",
        "| model | matmul, TFLOP/s | query, `right`: s, share | `adaptive`: s, share | "
        "responses/s | "
        "ablated generations/s | edit, s | peak, GiB |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in results:
        rules = [f"{one['seconds']:.3g}, {one['share']:.0%}" for one in row["query"].values()]
        peak = "not told" if row["peak"] is None else f"{row['peak'] / 2**30:.2f}"
        lines.append(
            f"| {row['model']} | {row['matmul'] / 1e12:.3g} | {' | '.join(rules)} | "
            f"{row['responses']:.3g} | {row['generations']:.3g} | {row['edit']:.3g} | {peak} |"
        )
    for row in results:
        if row["predicted"]:
            lines += ["", f"Predicted for {row['model']}: {row['predicted']}"]
    return [*lines, ""]


def main() -> None:
    parser = argparse.ArgumentParser(description="What one accelerator does.")
    parser.add_argument(
        "--models",
        nargs="+",
        default=["llama-2-7b", "smollm2-135m"],
        choices=("llama-2-7b", "smollm2-135m", "tiny"),
    )
    parser.add_argument("--small", action="store_true", help="tiny shapes, on any machine")
    parser.add_argument("--write", type=Path, help="a Markdown file")
    parser.add_argument("--out", type=Path, help="a JSON file")
    options = parser.parse_args()
    sizes, models = (SMALL, ["tiny"]) if options.small else (Sizes(), options.models)
    results = []
    for name in models:
        results.append(measure(name, sizes))
        if options.out:
            options.out.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    text = "\n".join(page(results))
    print(text)
    if options.write:
        options.write.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
