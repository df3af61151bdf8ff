"""Time and memory of attribution against prompts, layers, nodes, prompt length and width.

    python benchmarks/scaling.py [--write docs/scaling.md --figure docs/scaling.png]

One factor at a time on shapes like SmolLM2-135M's, random parameters in float32. *Memory* is the
compiler's own analysis of the whole program: temporaries above arguments. *Exponent* is the slope
of a line through the logarithms of the upper half of the values, where constants have faded.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jaxneurons as jn
from jaxneurons.model import Transformer

BASE = jn.ModelConfig(
    vocab_size=49_152,
    hidden_size=576,
    intermediate_size=1_536,
    num_layers=30,
    num_heads=9,
    num_kv_heads=3,
    head_dim=64,
    max_position=8_192,
    tied=True,
    rope=jn.RopeConfig(),
)
SMALL = dataclasses.replace(
    BASE, vocab_size=512, hidden_size=64, intermediate_size=128, num_layers=4, head_dim=8
)


@dataclasses.dataclass(frozen=True)
class Setting:
    """One point: what is attributed, and with how many nodes.

    Attributes:
      prompts: in the batch.
      layers: of the model.
      nodes: of Gauss's rule.
      tokens: of each prompt.
      width: hidden size as a multiple of the base's.
    """

    prompts: int = 1
    layers: int = 30
    nodes: int = 8
    tokens: int = 96
    width: float = 1.0


FACTORS: dict[str, Sequence[float]] = {
    "prompts": (1, 2, 4, 8, 16),
    "layers": (8, 15, 30, 60),
    "nodes": (4, 8, 16, 32, 64),
    "tokens": (64, 128, 256, 512, 1_024),
    "width": (0.5, 1.0, 2.0, 4.0),
}
SMALL_FACTORS: dict[str, Sequence[float]] = {
    "prompts": (1, 2),
    "layers": (2, 4),
    "nodes": (2, 4),
    "tokens": (8, 16),
    "width": (1.0, 2.0),
}


def shape_of(base: jn.ModelConfig, setting: Setting) -> jn.ModelConfig:
    """The base model with other layers, and more heads of the same size."""
    heads = max(base.num_kv_heads, round(base.num_heads * setting.width))
    heads -= heads % base.num_kv_heads
    return dataclasses.replace(
        base,
        num_layers=setting.layers,
        hidden_size=round(base.hidden_size * setting.width),
        intermediate_size=round(base.intermediate_size * setting.width),
        num_heads=heads,
    )


def random_params(config: jn.ModelConfig) -> Any:
    """Parameters as the model starts with, float32, made on the device."""
    tokens = jnp.zeros((1, 2), jnp.int32)
    return jax.jit(lambda key: Transformer(config).init(key, tokens))(jax.random.key(0))["params"]


def measure(base: jn.ModelConfig, setting: Setting, *, rule: str, repeats: int) -> dict[str, float]:
    """Seconds of one call (median) and bytes of temporaries."""
    config = shape_of(base, setting)
    quadrature = (
        jn.Quadrature() if rule == "adaptive" else jn.Quadrature("gauss", steps=setting.nodes)
    )
    run = jax.jit(functools.partial(jn.integrated_gradients, config=config, quadrature=quadrature))
    params = random_params(config)
    tokens = np.random.default_rng(0).integers(
        0, config.vocab_size, (setting.prompts, setting.tokens)
    )
    arguments = params, jnp.asarray(tokens, jnp.int32), jnp.zeros(setting.prompts, jnp.int32)
    program = run.lower(*arguments).compile()
    memory: Any = program.memory_analysis()
    jax.block_until_ready(program(*arguments))
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(program(*arguments))
        seconds.append(time.perf_counter() - start)
    return {
        "seconds": statistics.median(seconds),
        "temporaries": float(memory.temp_size_in_bytes),
        "outputs": float(memory.output_size_in_bytes),
    }


def exponent(x: Sequence[float], y: Sequence[float]) -> float:
    """Slope of log y over log x, of the upper half of the values (two at least)."""
    count = max(2, (len(x) + 1) // 2)
    slope, _ = np.polyfit(np.log(x[-count:]), np.log(np.maximum(y[-count:], 1e-12)), 1)
    return float(slope)


def table(rows: Sequence[dict[str, Any]]) -> list[str]:
    lines = [
        "| factor | values | seconds | exponent | temporaries, MiB | exponent |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        seconds = ", ".join(f"{point['seconds']:.3g}" for point in row["points"])
        mebibytes = ", ".join(f"{point['temporaries'] / 2**20:.0f}" for point in row["points"])
        lines.append(
            f"| {row['factor']} | {', '.join(f'{value:g}' for value in row['values'])} | {seconds} "
            f"| {row['time exponent']:.2f} | {mebibytes} | {row['memory exponent']:.2f} |"
        )
    return lines


def figure(rows: Sequence[dict[str, Any]], path: Path) -> None:
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    drawn, axes = plt.subplots(2, len(rows), figsize=(3 * len(rows), 5), squeeze=False)
    for column, row in enumerate(rows):
        for line, (name, unit, scale) in enumerate(
            (("seconds", "s", 1.0), ("temporaries", "MiB", 1 / 2**20))
        ):
            ax, values = axes[line][column], [scale * point[name] for point in row["points"]]
            slope = row["time exponent" if line == 0 else "memory exponent"]
            ax.loglog(row["values"], values, "o-")
            ax.set_title(f"exponent {slope:.2f}")
            ax.set_xlabel(row["factor"])
            ax.set_xticks(row["values"], [f"{value:g}" for value in row["values"]], minor=False)
            ax.set_xticks([], minor=True)
            ends = [min(values), max(values)]
            ax.set_yticks(
                ends,
                [f"{value:.0f}" if value >= 10 else f"{value:.2g}" for value in ends],
                minor=False,
            )
            ax.set_yticks([], minor=True)
            ax.spines[["top", "right"]].set_visible(False)
            if column == 0:
                ax.set_ylabel(f"{name}, {unit}")
    drawn.tight_layout()
    drawn.savefig(path, dpi=100)
    plt.close(drawn)


def main() -> None:
    parser = argparse.ArgumentParser(description="How attribution scales.")
    parser.add_argument("--rule", choices=("gauss", "adaptive"), default="gauss")
    parser.add_argument("--factors", nargs="+", choices=FACTORS, default=list(FACTORS))
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--small", action="store_true", help="tiny shapes: to see that it works")
    parser.add_argument("--write", type=Path, help="a Markdown file; default: the terminal")
    parser.add_argument("--figure", type=Path, help="a PNG file")
    parser.add_argument("--out", type=Path, help="a JSON file")
    options = parser.parse_args()
    base, factors = (SMALL, SMALL_FACTORS) if options.small else (BASE, FACTORS)
    start = Setting(layers=4, nodes=2, tokens=8) if options.small else Setting()
    rows = []
    for factor in options.factors:
        if factor == "nodes" and options.rule == "adaptive":
            continue
        values = factors[factor]
        points = []
        for value in values:
            setting = dataclasses.replace(
                start, **{factor: value if factor == "width" else int(value)}
            )
            points.append(measure(base, setting, rule=options.rule, repeats=options.repeats))
        rows.append(
            {
                "factor": factor,
                "values": list(values),
                "points": points,
                "time exponent": exponent(values, [p["seconds"] for p in points]),
                "memory exponent": exponent(values, [p["temporaries"] for p in points]),
            }
        )
        print(table(rows)[-1], flush=True)
    if options.figure:
        figure(rows, options.figure)
    if options.out:
        options.out.write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")
    device = jax.devices()[0]
    text = "\n".join([f"{device.device_kind}, rule {options.rule}\n", *table(rows), ""])
    if options.write:
        options.write.write_text(text, encoding="utf-8")
    else:
        print(text)


if __name__ == "__main__":
    main()
