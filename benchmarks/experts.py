"""Time per attributed prompt of a mixture of experts against a dense model of the same active size.

    python benchmarks/experts.py [--small] [--repeats 5]

Random parameters in float32. The dense model's feed-forward is as wide as the experts that a token
runs together, so that both compute as much for each row. The two alternate in one process, and the
ratio of each pair of runs counts: what else the machine does meets both.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import statistics
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jaxneurons as jn
from jaxneurons.model import Transformer

MIXTURE = jn.ModelConfig(
    vocab_size=8_192,
    hidden_size=512,
    intermediate_size=512,
    num_layers=12,
    num_heads=8,
    num_kv_heads=4,
    head_dim=64,
    max_position=1_024,
    tied=True,
    experts=16,
    experts_per_token=2,
)
SMALL = dataclasses.replace(
    MIXTURE, vocab_size=512, hidden_size=128, intermediate_size=128, num_layers=4, head_dim=16
)


def dense_of(config: jn.ModelConfig) -> jn.ModelConfig:
    """The model without experts that computes as much for each token."""
    width = config.intermediate_size * config.experts_per_token
    return dataclasses.replace(config, experts=0, experts_per_token=0, intermediate_size=width)


def random_params(config: jn.ModelConfig) -> Any:
    """Parameters as the model starts with, float32, made on the device."""
    tokens = jnp.zeros((1, 2), jnp.int32)
    return jax.jit(lambda key: Transformer(config).init(key, tokens))(jax.random.key(0))["params"]


def main() -> None:
    """Measure and print one line of JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--prompts", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--nodes", type=int, default=8)
    given = parser.parse_args()
    mixture = SMALL if given.small else MIXTURE
    rng = np.random.default_rng(0)
    ids = rng.integers(0, mixture.vocab_size, (given.prompts, given.tokens + 1))
    tokens, targets = jnp.asarray(ids[:, :-1], jnp.int32), jnp.asarray(ids[:, -1], jnp.int32)
    runs = {}
    for name, config in (("experts", mixture), ("dense", dense_of(mixture))):
        run = jax.jit(
            functools.partial(
                jn.integrated_gradients,
                config=config,
                quadrature=jn.Quadrature("gauss", steps=given.nodes),
            )
        )
        params = random_params(config)
        runs[name] = (run.lower(params, tokens, targets).compile(), params)
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for repeat in range(given.repeats + 1):
        for name, (program, params) in runs.items():
            start = time.perf_counter()
            jax.block_until_ready(program(params, tokens, targets))
            if repeat:  # the first is not counted
                seconds[name].append((time.perf_counter() - start) / given.prompts)
    ratios = [a / b for a, b in zip(seconds["experts"], seconds["dense"], strict=True)]
    memory = {n: p.memory_analysis().temp_size_in_bytes / 2**20 for n, (p, _) in runs.items()}
    print(
        json.dumps(
            {
                "device": jax.devices()[0].device_kind,
                "experts": [mixture.experts, mixture.experts_per_token],
                "seconds_per_prompt": {n: statistics.median(s) for n, s in seconds.items()},
                "ratio": round(statistics.median(ratios), 2),
                "ratios": [round(min(ratios), 2), round(max(ratios), 2)],
                "temporaries_mib": {name: round(size, 1) for name, size in memory.items()},
            }
        )
    )


if __name__ == "__main__":
    main()
