"""Which findings are SmolLM2's own: the same questions of it and of Gemma 3 270M.

    python benchmarks/second_model.py [--write TABLES.md]      # the tables of docs/second_model.md

Every model in a process of its own, one after the other. Needs `psutil` (the oracle extra).
"""

import argparse
import functools
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from long_prompts import peak_memory
from results_page import markdown

MODELS = ("smollm2-135m", "gemma3-270m")
BATCH, TIMES, CONTROLS = 8, 3, 3
TEXT = "The capital of France is"
MIB = 2**20


def measure(model: str) -> dict[str, Any]:
    """Everything of one model, in this process."""
    import jaxneurons as jn

    start = time.perf_counter()
    lm = jn.load(model)
    loading = time.perf_counter() - start
    facts = jn.qrnca.bundled_queries("facts")
    return {
        "model": model,
        "load": loading,
        "parameters": sum(leaf.size for leaf in _leaves(lm.params)),
        **attribution(lm, facts),
        **massive(lm, facts),
        "known": sum(jn.qrnca.known(lm, facts)),
        "facts": len(facts),
    }


def _leaves(params: Any) -> list[Any]:
    import jax

    return jax.tree.leaves(params)


def attribution(lm: Any, facts: list[Any]) -> dict[str, Any]:
    """Seconds and memory of a batch of prompts, and the nodes that each layer's path takes."""
    import jax

    import jaxneurons as jn
    from jaxneurons.engine import memory_bound
    from jaxneurons.prompts import encode_query, plan

    prompts = [encode_query(lm.tokenizer, q.prompts[0], q.answers[0]) for q in facts]
    batch = max(plan(prompts, BATCH), key=lambda batch: (batch.index >= 0).sum())
    run = jax.jit(
        lambda params, tokens, targets, lengths: jn.integrated_gradients(
            params, tokens, targets, config=lm.config, lengths=lengths
        )
    )
    arrays = tuple(map(jax.numpy.asarray, (batch.tokens, batch.targets, batch.lengths)))

    start = time.perf_counter()
    compiling: dict[str, float] = {}
    with peak_memory(compiling):
        program = run.lower(lm.params, *arrays).compile()
    out: dict[str, Any] = {"compiling": compiling["peak"], "compile": time.perf_counter() - start}

    def seconds() -> float:
        start = time.perf_counter()
        jax.block_until_ready(program(lm.params, *arrays))
        return time.perf_counter() - start

    with peak_memory(out):
        _, *others = [seconds() for _ in range(1 + TIMES)]
    out["again"] = statistics.median(others)
    found = program(lm.params, *arrays)
    count, padded = batch.tokens.shape
    return out | {
        "prompts": count,
        "padded": padded,
        "bound": memory_bound(lm.config, padded, prompts=count),
        "nodes": np.asarray(found.nodes).mean(0).tolist(),
        "gap": float(found.gap.max()),
        "by layer": np.abs(np.asarray(found.probability)[:, None] - found.ablated).mean(0).tolist(),
    }


def massive(lm: Any, facts: list[Any]) -> dict[str, Any]:
    """The residual stream's largest value, and what the `down` neuron that writes it most does."""
    import jax
    import jax.numpy as jnp

    import jaxneurons as jn
    from jaxneurons.prompts import encode_query, plan

    tokens = jnp.asarray([lm.tokenizer(TEXT)["input_ids"]])
    out = jax.jit(
        functools.partial(jn.forward, config=lm.config, at="all", capture=("residual", "down"))
    )(lm.params, tokens)
    stream = np.abs(np.concatenate([out.activations["residual"], out.final[None]])[:, 0])
    ratio = stream.max((1, 2)) / np.median(stream, (1, 2))
    place = np.unravel_index(stream[ratio.argmax()].argmax(), stream.shape[1:])
    position, dimension = map(int, place)
    signed = np.concatenate([out.activations["residual"], out.final[None]])[:, 0]
    before = signed[: max(2, int(ratio.argmax()) + 1), position, dimension]
    layer = int(np.abs(np.diff(before)).argmax())

    prompts = [
        encode_query(lm.tokenizer, prompt, answer)
        for query in facts
        for prompt, answer in zip(query.prompts, query.answers, strict=True)
    ]
    run = jax.jit(functools.partial(jn.forward, config=lm.config))

    def right(neuron: int | None) -> int:
        scales = np.ones((lm.config.num_layers, lm.config.hidden_size), np.float32)
        if neuron is not None:
            scales[layer, neuron] = 0
        total = 0
        for batch in plan(prompts, 2 * BATCH):
            logits = run(
                lm.params, jnp.asarray(batch.tokens), lengths=batch.lengths, scales={"down": scales}
            ).logits
            hits = np.asarray(logits[:, 0].argmax(-1)) == batch.targets[:, 0]
            total += int(hits[batch.index >= 0].sum())
        return total

    others = np.random.default_rng(0).choice(lm.config.hidden_size, CONTROLS, replace=False)
    return {
        "ratio": float(ratio.max()),
        "value": float(signed[ratio.argmax(), position, dimension]),
        "enters": int(ratio.argmax()),
        "position": position,
        "dimension": dimension,
        "writes": layer,
        "asked": len(prompts),
        "right": right(None),
        "without": right(dimension),
        "controls": [right(int(other)) for other in others],
    }


def page(found: list[dict[str, Any]]) -> list[str]:
    """All tables, the models side by side."""

    def table(title: str, rows: dict[str, Any]) -> list[str]:
        cells = [(name, *(write(one) for one in found)) for name, write in rows.items()]
        return markdown(title, ["", *(f"`{one['model']}`" for one in found)], cells)

    text = table(
        "## Cost",
        {
            "parameters": lambda one: f"{one['parameters']:,}",
            "seconds to load": lambda one: f"{one['load']:.1f}",
            "prompts attributed together, tokens": lambda one: f"{one['prompts']}, {one['padded']}",
            "seconds per attributed prompt": lambda one: f"{one['again'] / one['prompts']:.2f}",
            "seconds to compile": lambda one: f"{one['compile']:.1f}",
            "peak memory above the parameters, MiB": lambda one: f"{one['peak'] / MIB:,.0f}",
            "of the compiler, MiB": lambda one: f"{one['compiling'] / MIB:,.0f}",
            "bound of its arrays (`memory_bound`), MiB": lambda one: f"{one['bound'] / MIB:,.0f}",
            "largest completeness gap": lambda one: f"{one['gap']:.1e}",
        },
    )
    text += table(
        "## What the models know",
        {
            "first token right": lambda one: f"{one['right']} of {one['asked']}",
            "facts answered in every wording": lambda one: f"{one['known']} of {one['facts']}",
        },
    )
    text += table(
        "## Where the path bends: nodes of the adaptive rule",
        {
            "in all": lambda one: f"{sum(one['nodes']):.0f}",
            "layer 0": lambda one: f"{one['nodes'][0]:.0f}",
            "share of layer 0": lambda one: f"{one['nodes'][0] / sum(one['nodes']):.0%}",
            "most, in layer": lambda one: (
                f"{max(one['nodes']):.0f}, {int(np.argmax(one['nodes']))}"
            ),
            "median of layers": lambda one: f"{np.median(one['nodes']):.0f}",
            "layer whose loss changes P most": lambda one: f"{int(np.argmax(one['by layer']))}",
        },
    )
    text += table(
        f"## The massive activation, after `{TEXT}`",
        {
            "largest value of the residual, over its median": lambda one: f"{one['ratio']:,.0f}",
            "the value": lambda one: f"{one['value']:,.0f}",
            "token, dimension": lambda one: f"{one['position']}, {one['dimension']}",
            "written most by layer": lambda one: f"{one['writes']}",
            "right first tokens": lambda one: f"{one['right']}",
            "with that layer's `down` neuron off": lambda one: f"{one['without']}",
            "with another of the layer off": lambda one: ", ".join(map(str, one["controls"])),
        },
    )
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description="The same questions of two models.")
    parser.add_argument("--models", nargs="+", default=MODELS)
    parser.add_argument("--write", type=Path, help="a file to write; default: the terminal")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(measure(options.one)))
        return
    found = []
    for model in options.models:
        command = [sys.executable, __file__, "--one", model]
        done = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True)
        found.append(json.loads(done.stdout.splitlines()[-1]))
    text = "\n".join(page(found))
    if options.write:
        options.write.write_text(text, encoding="utf-8")
    else:
        print(text)


if __name__ == "__main__":
    main()
