"""Memory of responses and expertise at the size of a 7B model, without the model.

    python benchmarks/responses.py [--examples 200]

Synthetic responses of every FFN neuron of Llama-2 7B (835,584) are written batch by batch, as the
model would give them, and read layer by layer for average precision. Reports the peak of resident
memory above what the process held before, time, and the size on disk; and, from the compiled
program alone, what the forward pass over a batch needs above its parameters.
"""

from __future__ import annotations

import argparse
import resource
import tempfile
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import psutil

from jaxneurons import ModelConfig, Transformer, scale
from jaxneurons.engine import Examples, ResponseStore, expertise, mean_responses
from jaxneurons.neurons import FFN, neuron_count, site_width

ROWS = 64  # prompts that `ResponseStore.fill` runs together
LLAMA_2_7B = scale.read_shape("7B").config


def forward_pass(config: ModelConfig, tokens: int) -> int:
    """Bytes of a batch's forward pass above the parameters: outputs and temporaries."""
    shapes: Any = jax.eval_shape(
        Transformer(config).init, jax.random.key(0), jnp.zeros((1, 2), jnp.int32)
    )
    ids = jax.ShapeDtypeStruct((ROWS, tokens), jnp.int32)
    lengths = jax.ShapeDtypeStruct((ROWS,), jnp.int32)
    lowered = mean_responses.lower(shapes["params"], ids, lengths, config=config, sites=FFN)
    memory: Any = lowered.compile().memory_analysis()
    return memory.output_size_in_bytes + memory.temp_size_in_bytes


def main() -> None:
    parser = argparse.ArgumentParser(description="Responses of a 7B model's neurons.")
    parser.add_argument("--examples", type=int, default=200)
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    options = parser.parse_args()
    config, count = LLAMA_2_7B, options.examples
    jax.block_until_ready(jax.numpy.ones(8) + 1)
    before = psutil.Process().memory_info().rss

    with tempfile.TemporaryDirectory() as directory:
        store = ResponseStore(
            directory + "/r",
            [(1, 2, 3)] * count,
            config=config,
            identity={},
            dtype=options.dtype,
        )
        start = time.perf_counter()
        for number in range(-(-count // ROWS)):
            key = jax.random.key(number)
            found = {
                site: jax.random.normal(key, (config.num_layers, ROWS, site_width(config, site)))
                for site in FFN
            }
            store.write(number, found)
            del found
        written = time.perf_counter() - start
        size = sum(p.stat().st_size for p in Path(directory).rglob("*") if p.is_file())
        examples = {"relation": Examples(np.arange(count // 5), np.arange(count // 5, count))}
        start = time.perf_counter()
        expertise(store.read, examples, config=config, sites=FFN)
        ranked = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before
    print(f"{count} examples x {neuron_count(config, FFN):,} neurons, {options.dtype}")
    print(f"on disk: {size / 2**30:.2f} GiB, written in {written:.1f} s")
    print(f"average precision: {ranked:.1f} s")
    print(f"peak memory above the start: {peak / 2**30:.2f} GiB")
    for tokens in (16, 32):
        needed = forward_pass(config, tokens) / 2**30
        print(f"the pass over {ROWS} prompts of {tokens} tokens: {needed:.2f} GiB")


if __name__ == "__main__":
    main()
