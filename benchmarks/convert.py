"""Converting a large synthetic checkpoint, against a plain copy of the file and an fsync.

    python benchmarks/convert.py [--gib 2] [--dtype bfloat16] [--out convert.json]

One run on one machine, in turns: copy, to native, to Hugging Face. Prints seconds (medians), ratios
to the copy, and the peak memory of a fresh process beside the bound (parameters, the largest
stacked tensor, 1 GiB).
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from jaxneurons.convert import ToWrite, config_from_hf, stored_names, write_safetensors
from jaxneurons.model import list_parameters

HIDDEN, INNER, VOCAB = 2048, 5632, 32000


def synthetic(directory: Path, gib: float, dtype: str) -> Path:
    """A random Llama of TinyLlama's widths with as many layers as fill `gib`."""
    values = {
        "model_type": "llama",
        "vocab_size": VOCAB,
        "hidden_size": HIDDEN,
        "intermediate_size": INNER,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-5,
    }
    kind = np.dtype(jnp.dtype(dtype))
    per_layer = HIDDEN * (2 * HIDDEN + 2 * 256 + 3 * INNER)
    layers = math.ceil((gib * 2**30 / kind.itemsize - 2 * VOCAB * HIDDEN) / per_layer)
    values["num_hidden_layers"] = layers
    directory.mkdir(parents=True)
    (directory / "config.json").write_text(json.dumps(values))
    config = config_from_hf(values, where="synthetic")
    rng = np.random.default_rng(0)
    noise = (0.02 * rng.standard_normal(1 << 22, np.float32)).astype(kind)

    def tensor(shape: tuple[int, ...]) -> ToWrite:
        def pieces():
            left = math.prod(shape)
            while left:
                piece = noise[: min(left, len(noise))]
                yield piece
                left -= len(piece)

        return ToWrite(kind, shape, pieces)

    tensors = {
        name: tensor(rule.stored_shape) for name, (rule, _) in stored_names(config, "hf").items()
    }
    write_safetensors(directory / "model.safetensors", tensors)
    _tokenizer(directory)
    return directory


def _tokenizer(directory: Path) -> None:
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE(vocab={"a": 0, "b": 1}, merges=[]))
    PreTrainedTokenizerFast(tokenizer_object=backend).save_pretrained(str(directory))


def copy(source: Path, target: Path) -> float:
    start = time.perf_counter()
    shutil.copyfile(source, target)
    handle = os.open(target, os.O_RDONLY)
    os.fsync(handle)
    os.close(handle)
    return time.perf_counter() - start


CHILD = """
import json, resource, sys, time
import jaxneurons, jax
jax.numpy.zeros(1).block_until_ready()
source, target, to = sys.argv[1:]
base = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
start = time.perf_counter()
lm = jaxneurons.load(source, dtype=None)
read = time.perf_counter() - start
jaxneurons.save(lm, target, to=to)
spent = time.perf_counter() - start
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(json.dumps({"seconds": spent, "read": read, "peak_kib": peak, "base_kib": base}))
"""


def convert(source: Path, target: Path, to: str) -> dict[str, float]:
    done = subprocess.run(
        [sys.executable, "-c", CHILD, str(source), str(target), to],
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description="Conversion speed and memory.")
    parser.add_argument("--gib", type=float, default=2.0)
    parser.add_argument("--dtype", default="bfloat16", choices=["float32", "float16", "bfloat16"])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--directory", type=Path, help="where to work; default: a temporary one")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.directory) as temporary:
        work = Path(temporary)
        source = synthetic(work / "source", options.gib, options.dtype)
        weights = source / "model.safetensors"
        size = weights.stat().st_size
        values = json.loads((source / "config.json").read_text())
        config = config_from_hf(values, where="synthetic")
        width = 4 if options.dtype == "float32" else 2
        sizes = [parameter.size for parameter in list_parameters(config)]
        params, largest = width * sum(sizes), width * max(sizes)
        copies: list[float] = []
        runs: dict[str, list[dict[str, float]]] = {"native": [], "hf": []}
        for _ in range(options.repeats):
            copies.append(copy(weights, work / "copy"))
            (work / "copy").unlink()
            for to, own in runs.items():
                own.append(convert(source, work / to, to))
                shutil.rmtree(work / to)
    plain = statistics.median(copies)
    bound = (params + largest) / 2**30 + 1
    print(f"{size / 2**30:.2f} GiB, {config.num_layers} layers, {options.dtype}")
    print(f"copy and fsync: {plain:.2f} s ({size / plain / 2**30:.2f} GiB/s)")
    found = {"bytes": size, "copy": copies, "bound_gib": bound}
    for to, own in runs.items():
        spent = statistics.median(run["seconds"] for run in own)
        read = statistics.median(run["read"] for run in own)
        peak = max(run["peak_kib"] for run in own) / 2**20
        base = max(run["base_kib"] for run in own) / 2**20
        print(
            f"to {to}: {spent:.2f} s ({read:.2f} s of it reading), {spent / plain:.2f} times the "
            f"copy; peak memory {peak:.2f} GiB, {peak - base:.2f} above the imports' "
            f"{base:.2f} (bound {bound:.2f})"
        )
        found[to] = {"seconds": spent, "ratio": spent / plain, "peak_gib": peak, "base_gib": base}
    if options.out:
        options.out.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
