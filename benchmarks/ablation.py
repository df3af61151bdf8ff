"""Generation under ablation, against PyTorch hooks: one prompt at a time, and 32 at a time.

    python benchmarks/ablation.py [--sets 4] [--prompts 64]

Two greedy tokens after each prompt with each set of 394 random FFN neurons at zero, SmolLM2-135M in
float32. *One at a time*: hooks on the projections and `generate` for each prompt, as the published
code does. *Batched*: the same with 32 left-padded prompts. One run on one machine, in turns,
medians; the one-at-a-time loop is given fewer prompts. All are compared token by token.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np
import published

from jaxneurons import load
from jaxneurons.checkpoints import fetch_smollm2
from jaxneurons.engine import ablated
from jaxneurons.neurons import FFN, NeuronSet, random_neurons
from jaxneurons.prompts import bundled_relations, encode_prompt, prompt


def zero_hooks(model: Any, neurons: NeuronSet) -> list[Any]:
    import torch

    hooks = []
    for site in FFN:
        pairs = neurons.pairs(site)
        for layer in np.unique(pairs[:, 0]):
            index = torch.as_tensor(pairs[pairs[:, 0] == layer, 1])

            def zero(module: Any, inputs: Any, output: Any, index: Any = index) -> Any:
                output[..., index] = 0
                return output

            projection = getattr(model.model.layers[int(layer)].mlp, f"{site}_proj")
            hooks.append(projection.register_forward_hook(zero))
    return hooks


def hooked(
    model: Any, sets: list[NeuronSet], prompts: list[tuple[int, ...]], batch: int, pad: int
) -> np.ndarray:
    """[set, prompt, 2], `batch` prompts to a call, padded on the left."""
    import torch

    found = np.zeros((len(sets), len(prompts), 2), np.int64)
    with torch.no_grad():
        for number, one in enumerate(sets):
            hooks = zero_hooks(model, one)
            for start in range(0, len(prompts), batch):
                some = prompts[start : start + batch]
                longest = max(map(len, some))
                ids = torch.tensor([[pad] * (longest - len(p)) + list(p) for p in some])
                mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in some])
                out = model.generate(
                    ids,
                    attention_mask=mask,
                    max_new_tokens=2,
                    min_new_tokens=2,
                    do_sample=False,
                    pad_token_id=pad,
                )
                found[number, start : start + len(some)] = out[:, longest:].numpy()
            for hook in hooks:
                hook.remove()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description="Generation under ablation.")
    parser.add_argument("--sets", type=int, default=4)
    parser.add_argument("--prompts", type=int, default=256)
    parser.add_argument("--singly", type=int, default=32, help="prompts of the one-at-a-time loop")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()

    lm = load("smollm2-135m")
    rng = np.random.default_rng(0)
    texts = [
        prompt(template, triple.subject)
        for relation in bundled_relations()
        for template in relation.templates["plain"][:1]
        for triple in relation.triples
    ]
    chosen = rng.choice(len(texts), options.prompts, replace=False)
    prompts = [encode_prompt(lm.tokenizer, texts[i]) for i in chosen]
    sets = [random_neurons(lm.config, FFN, 394, rng) for _ in range(options.sets)]
    model, _ = published.load_torch(fetch_smollm2())
    model.generation_config.eos_token_id = None
    some = prompts[: options.singly]

    def ours() -> np.ndarray:
        return np.stack([said for _, said in ablated(lm.params, sets, prompts, config=lm.config)])

    runs = {
        "ours": (ours, len(prompts)),
        "PyTorch, 32 at a time": (lambda: hooked(model, sets, prompts, 32, 0), len(prompts)),
        "PyTorch, one at a time": (lambda: hooked(model, sets, some, 1, 0), len(some)),
    }
    said = {name: function() for name, (function, _) in runs.items()}
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(options.repeats):
        for name, (function, count) in runs.items():
            start = time.perf_counter()
            function()
            times[name].append((time.perf_counter() - start) / count / len(sets))
    each = {name: statistics.median(values) for name, values in times.items()}
    print(f"{options.sets} sets x {options.prompts} prompts, {len(os.sched_getaffinity(0))} cores")
    for name, seconds in each.items():
        ratio = seconds / each["ours"]
        same = float(np.mean(said[name] == said["ours"][:, : said[name].shape[1]]))
        print(f"{name}: {1e3 * seconds:.1f} ms a generation, {ratio:.1f}; same tokens: {same:.2%}")
    if options.out:
        options.out.write_text(json.dumps(each, indent=2) + "\n")


if __name__ == "__main__":
    main()
