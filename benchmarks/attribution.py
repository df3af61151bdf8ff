"""What attribution costs, and what it is worth: jaxneurons against the published procedure.

    python benchmarks/attribution.py --cold --out attribution.json

SmolLM2-135M in float32, one prompt of about 95 tokens, everything in one run on one machine:
seconds per prompt of the published procedure in PyTorch (`published.py`) and of the engine, the
share of the machine's matmul rate that the engine achieves, batches, memory, and the error of each
quadrature rule. PyTorch is needed for the baseline only (`--skip-torch` does without).
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import importlib.metadata
import io
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jaxneurons
from jaxneurons import Quadrature
from jaxneurons.checkpoints import fetch_smollm2
from jaxneurons.prompts import Batch, TokenPrompt, bucket, encode_query, plan

DATA = Path(__file__).resolve().parents[2] / "shared" / "data" / "qrneuron" / "subject_qa.json"
SMOLLM2 = "smollm2-135m"
LENGTH = 95  # tokens of the prompt that is timed
STEPS = 16
BASELINE_LAYERS = "1,8,15,22,29"
BATCH = 32  # prompts of mixed lengths
LONGEST = 160  # tokens of a prompt in the batch

RULES = {
    "adaptive": Quadrature(),
    "reference": Quadrature("reference", STEPS),
    "right": Quadrature("right", STEPS),
    "gauss": Quadrature("gauss", STEPS),
}
TIMED = ("adaptive", "reference", "right")
CONVERGED = Quadrature("gauss", 256)

# Prompts for a checkout without the data.
_PREAMBLES = (
    "Answer with the letter.",
    "Here is a multiple-choice question. Answer with the letter of the right option.",
    "You will be asked a multiple-choice question. Reply with the letter of the correct answer, "
    "followed by a period, and with nothing else.",
    "You will be asked a multiple-choice question about the world. Read the question and all of "
    "its options before you decide. Exactly one of the four options is right. Reply with the "
    "letter of the correct answer, followed by a period. Do not explain your choice.",
)
_QUESTIONS = (
    ("Which planet is the largest of the solar system?", "Mars Jupiter Venus Saturn", "B"),
    ("Which gas do plants take from the air to build sugar?", "oxygen neon helium CO2", "D"),
    ("What is the capital of Japan?", "Tokyo Kyoto Osaka Nagoya", "A"),
    ("Which metal is liquid at room temperature?", "iron gold mercury zinc", "C"),
    ("Which organ pumps the blood through the human body?", "liver heart lung kidney", "B"),
    ("How many sides does a hexagon have?", "four five six eight", "C"),
    ("Which ocean lies between Europe and America?", "Atlantic Pacific Indian Arctic", "A"),
    ("Who wrote the play Romeo and Juliet?", "Goethe Dante Cervantes Shakespeare", "D"),
)


# Prompts


def read_prompts(data: Path) -> tuple[list[tuple[str, str, str]], str]:
    """(subject, prompt, answer letter) of each query, one phrasing each; and where from."""
    if data.is_file():
        queries = json.loads(data.read_text(encoding="utf-8")).values()
        found = []
        for i, query in enumerate(queries):
            phrasing = i % len(query["sentences"])
            letter = query["obj_label"][phrasing]
            found.append((query["relation_name"], query["sentences"][phrasing], letter))
        return found, data.name
    return list(builtin_prompts()), "built-in prompts"


def builtin_prompts() -> Iterator[tuple[str, str, str]]:
    for question, options, answer in _QUESTIONS:
        lines = "\n".join(f" {x}. {o}" for x, o in zip("ABCD", options.split(), strict=True))
        for preamble in _PREAMBLES:
            text = f"{preamble}\nThe question is:\n{question}\n{lines}\n\nResponse:"
            yield question, text, answer


def choose(
    texts: Sequence[tuple[str, str, str]], tokenizer: Any, accuracy: int
) -> tuple[list[TokenPrompt], list[TokenPrompt]]:
    """Prompts near `LENGTH` tokens (the first is the timed one), and a batch of mixed lengths."""
    sized = [(len(tokenizer(text)["input_ids"]), *rest, text) for rest, text in _split(texts)]
    near = sorted(sized, key=lambda item: abs(item[0] - LENGTH))
    padded = bucket(near[0][0])
    near = [item for item in near if bucket(item[0]) == padded]
    single, subjects = [near[0]], {near[0][1]}
    for item in near[1:]:
        if len(single) < accuracy and item[1] not in subjects:
            single.append(item)
            subjects.add(item[1])
    rest = [item for item in near[1:] if item not in single]
    single += rest[: max(accuracy - len(single), 0)]
    short = [item for item in sized if item[0] <= LONGEST]
    places = np.linspace(0, len(short) - 1, BATCH).round().astype(int)

    def encode(item: tuple[int, str, str, str]) -> TokenPrompt:
        return encode_query(tokenizer, item[3], item[2])

    return [encode(item) for item in single], [encode(short[i]) for i in places]


def _split(texts: Sequence[tuple[str, str, str]]) -> Iterator[tuple[tuple[str, str], str]]:
    for subject, text, answer in texts:
        yield (subject, answer), text


# The engine


@functools.partial(jax.jit, static_argnames=("config", "quadrature"))
def _engine(params, tokens, targets, lengths, *, config, quadrature):
    return jaxneurons.integrated_gradients(
        params, tokens, targets, config=config, lengths=lengths, quadrature=quadrature
    )


def run(lm: jaxneurons.LM, batch: Batch, quadrature: Quadrature) -> jaxneurons.Attribution:
    out = _engine(
        lm.params,
        jnp.asarray(batch.tokens),
        jnp.asarray(batch.targets),
        jnp.asarray(batch.lengths),
        config=lm.config,
        quadrature=quadrature,
    )
    return jax.block_until_ready(out)


def seconds(function: Callable[[], Any]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def alternate(functions: Mapping[str, Callable[[], Any]], repeats: int) -> dict[str, list[float]]:
    """Seconds of each function, in turns, so that a busy moment of the machine hits all."""
    times: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(repeats):
        for name, function in functions.items():
            times[name].append(seconds(function))
    return times


# Sections. Each returns what goes into the JSON file and prints its table.


def machine() -> dict[str, Any]:
    cpu = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        cpu = next((x.split(":", 1)[1].strip() for x in lines if x.startswith("model name")), cpu)
    names = ("jaxneurons", "jax", "jaxlib", "flax", "numpy", "torch", "transformers")
    found = {
        "cpu": cpu,
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 0,
        "devices": [f"{d.platform}: {d.device_kind}" for d in jax.devices()],
        "load_average": list(os.getloadavg()),
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in names},
    }
    versions = ", ".join(f"{name} {v}" for name, v in found["versions"].items() if v)
    say(f"{cpu}, {found['cores']} cores; {', '.join(found['devices'])}")
    say(f"Python {found['python']}, {versions}")
    say(f"load average at the start: {found['load_average'][0]:.2f}")
    return found


def cpu_ticks() -> tuple[float, float] | None:
    """Seconds of CPU that the whole machine spent busy, and had, so far (Linux)."""
    stat = Path("/proc/stat")
    if not stat.exists():
        return None
    ticks = [
        int(x) / os.sysconf("SC_CLK_TCK") for x in stat.read_text().split("\n")[0].split()[1:9]
    ]
    return sum(ticks) - ticks[3] - ticks[4], sum(ticks)


def others(since: tuple[float, float] | None, own: float) -> float | None:
    """Share of the machine's CPU time that other processes (and hypervisor) took since then."""
    now = cpu_ticks()
    if since is None or now is None:
        return None
    share = max(now[0] - since[0] - own, 0.0) / (now[1] - since[1])
    say(f"CPU time that other processes took meanwhile: {share:.0%}")
    return share


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def matmul_shapes(config: jaxneurons.ModelConfig) -> list[tuple[int, int, int]]:
    hidden, inner, rows = config.hidden_size, config.intermediate_size, config.num_layers * STEPS
    return [
        (2048, 2048, 2048),
        (LENGTH, hidden, inner),
        (rows, hidden, config.query_width),
        (rows, hidden, inner),
        (rows, inner, hidden),
        (rows, hidden, config.vocab_size),
    ]


def matmul_rates(
    config: jaxneurons.ModelConfig, multiply: Callable[[Any, Any], Any], array: Callable[..., Any]
) -> dict[str, float]:
    """GFLOP/s of float32 matmuls, the best of several runs."""
    rates = {}
    for m, k, n in matmul_shapes(config):
        rng = np.random.default_rng(0)
        a = array(rng.standard_normal((m, k), np.float32))
        b = array(rng.standard_normal((k, n), np.float32))
        multiply(a, b)
        flops = 2 * m * k * n
        inner = max(1, int(2e10 / flops))
        best = min(
            seconds(lambda a=a, b=b, inner=inner: [multiply(a, b) for _ in range(inner)])
            for _ in range(5)
        )
        rates[f"{m} x {k} x {n}"] = flops * inner / best / 1e9
    return rates


def jax_rates(config: jaxneurons.ModelConfig) -> dict[str, float]:
    product = jax.jit(jnp.matmul)
    return matmul_rates(config, lambda a, b: product(a, b).block_until_ready(), jnp.asarray)


def torch_rates(config: jaxneurons.ModelConfig) -> dict[str, float]:
    import torch  # pyright: ignore[reportMissingImports]

    return matmul_rates(config, torch.matmul, torch.from_numpy)


def engine(lm: jaxneurons.LM, batch: Batch, repeats: int) -> dict[str, Any]:
    first, outputs = {}, {}
    for name in TIMED:
        start = time.perf_counter()
        outputs[name] = run(lm, batch, RULES[name])
        first[name] = time.perf_counter() - start
    calls = {n: functools.partial(run, lm, batch, RULES[n]) for n in TIMED}
    times = alternate(calls, repeats)
    found = {}
    for name in TIMED:
        out = outputs[name]
        gap, nodes = np.asarray(out.gap[0]), np.asarray(out.nodes[0])
        found[name] = {
            "seconds": statistics.median(times[name]),
            "runs": times[name],
            "first_call": first[name],
            "nodes": int(nodes.sum()),
            "most_nodes": int(nodes.max()),
            "gap_median": float(np.median(gap)),
            "gap_max": float(gap.max()),
            "probability": float(out.probability[0]),
            "scores": np.asarray(out.scores[0]),
        }
    table(
        f"Engine, seconds per prompt (median of {repeats} runs in turns)",
        "rule|seconds|fastest|slowest|first call|nodes|most in a layer|median gap|max gap",
        [
            (
                *(n, f["seconds"], min(f["runs"]), max(f["runs"])),
                *(f[k] for k in ("first_call", "nodes", "most_nodes", "gap_median", "gap_max")),
            )
            for n, f in found.items()
        ],
    )
    return found


def baseline(
    config: jaxneurons.ModelConfig,
    prompt: TokenPrompt,
    layers: Sequence[int],
    repeats: int,
    ours: np.ndarray,
) -> dict[str, Any]:
    import torch  # pyright: ignore[reportMissingImports]
    from published import lean_attribution, load_torch, published_attribution

    with contextlib.redirect_stderr(io.StringIO()):  # progress bars
        model, _ = load_torch(fetch_smollm2())
    call = {"input_ids": [list(prompt.prompt)], "target_id": prompt.answer[0]}
    for function in (published_attribution, lean_attribution):  # first use of every kernel
        function(model, **call, layers=layers[-1:], steps=8)
    rows = []
    for layer in layers:
        scores = published_attribution(model, **call, layers=[layer], steps=STEPS)[0]
        one = functools.partial(published_attribution, model, **call, layers=[layer], steps=STEPS)
        spent = min(seconds(one) for _ in range(repeats))
        off = ours[layer] - scores
        error = float(np.linalg.norm(off) / np.linalg.norm(scores))
        rows.append((layer, spent, error, float(np.abs(off).max()), float(scores.max())))
    # All layers in one call, since they share the baseline pass.
    lean = functools.partial(lean_attribution, model, **call, layers=list(layers), steps=STEPS)
    scale = config.num_layers / len(layers)
    found = {
        "layers": list(layers),
        "threads": torch.get_num_threads(),
        "published_per_layer": [row[1] for row in rows],
        "relative_l2": [row[2] for row in rows],
        "published": scale * sum(row[1] for row in rows),
        "lean": scale * min(seconds(lean) for _ in range(repeats)),
    }
    table(
        f"Published procedure in PyTorch, {found['threads']} threads, {STEPS} nodes in batches of "
        f"8, fastest of {repeats} runs; the engine's `reference` against it",
        "layer|seconds|relative L2 difference|largest difference|largest score",
        rows,
    )
    how = "all timed" if scale == 1 else f"scaled from {len(layers)} layers"
    say(f"published, {config.num_layers} layers: {found['published']:.1f} s ({how})")
    say(f"lean (one baseline pass, last logits): {found['lean']:.1f} s ({how})")
    if scale != 1:
        say(
            f"The lower the layer, the longer its backward pass: the timed layers' mean is "
            f"{statistics.mean(layers):.1f}, the middle of the model {(config.num_layers - 1) / 2}."
        )
    slowest = max(found["published_per_layer"]) / min(found["published_per_layer"])
    if slowest > 3:
        say(f"NOT A QUIET MACHINE: one layer took {slowest:.1f} times as long as another.")
    return found


def floor(config: jaxneurons.ModelConfig, tokens: int, rows: int) -> dict[str, float]:
    """Floating-point operations of a prompt: 2 N T + 4 N rows / 2, N parameters in matmuls."""
    hidden = config.hidden_size
    attention = 2 * hidden * (config.query_width + config.kv_width)
    body = config.num_layers * (attention + 3 * hidden * config.intermediate_size)
    sizes = {"without": body, "with": body + hidden * config.vocab_size}
    return {name: 2 * n * tokens + 2 * n * rows for name, n in sizes.items()}


def shares(
    config: jaxneurons.ModelConfig, tokens: int, timed: dict[str, Any], rate: float
) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, result in timed.items():
        flops = floor(config, tokens, result["nodes"])
        found[name] = {k: {"gflop": f / 1e9, "seconds": f / rate / 1e9} for k, f in flops.items()}
        for least in found[name].values():
            least["share"] = least["seconds"] / result["seconds"]
    sizes = {k: v / 2 / 1e6 for k, v in floor(config, 1, 0).items()}
    table(
        "Share of the machine's matmul rate: floor 2 N T + 2 N rows over seconds, N = "
        f"{sizes['without']:.1f} M parameters in matmuls, {sizes['with']:.1f} M with unembedding",
        "rule|floor GFLOP|floor s|share|with unembedding: GFLOP|s|share",
        [
            (
                n,
                *(
                    f[k][what]
                    for k in ("without", "with")
                    for what in ("gflop", "seconds", "share")
                ),
            )
            for n, f in found.items()
        ],
    )
    say(f"rate: {rate:.0f} GFLOP/s, the fastest 2048 x 2048 x 2048 in float32 measured here")
    return found


def in_batches(
    lm: jaxneurons.LM, prompts: Sequence[TokenPrompt], repeats: int = 3
) -> dict[str, Any]:
    lengths = [len(p.prompt) for p in prompts]
    together, alone = plan(prompts), plan(prompts, 1)
    calls = {
        "batches": lambda: [run(lm, batch, RULES["adaptive"]) for batch in together],
        "single": lambda: [run(lm, batch, RULES["adaptive"]) for batch in alone],
    }
    first = {name: seconds(call) for name, call in calls.items()}
    times = alternate(calls, repeats)
    found: dict[str, Any] = {
        name: {
            "seconds_per_prompt": statistics.median(times[name]) / len(prompts),
            "runs": times[name],
            "first_call": first[name],
            "batches": len(group),
            "programs": len({batch.tokens.shape for batch in group}),
        }
        for name, group in (("batches", together), ("single", alone))
    }
    table(
        f"{len(prompts)} prompts of {min(lengths)} to {max(lengths)} tokens (median "
        f"{statistics.median(lengths):.0f}), adaptive, median of {repeats} runs in turns",
        "how|seconds per prompt|first call|calls|programs",
        [
            (n, *(f[k] for k in ("seconds_per_prompt", "first_call", "batches", "programs")))
            for n, f in found.items()
        ],
    )
    shapes = [list(batch.tokens.shape) for batch in together]
    say(f"shapes of the batches: {', '.join(f'{b} x {t}' for b, t in shapes)}")
    return {**found, "lengths": lengths, "shapes": shapes}


def accuracy(lm: jaxneurons.LM, prompts: Sequence[TokenPrompt]) -> list[dict[str, Any]]:
    found, rows = [], []
    for i, batch in enumerate(plan(prompts, 1)):
        truth = np.asarray(run(lm, batch, CONVERGED).scores[0])
        norm = np.linalg.norm(truth, axis=-1)
        for name, rule in RULES.items():
            out = run(lm, batch, rule)
            gap = np.asarray(out.gap[0])
            error = np.linalg.norm(np.asarray(out.scores[0]) - truth, axis=-1) / norm
            result = {
                "prompt": i,
                "rule": name,
                "probability": float(out.probability[0]),
                "nodes": int(out.nodes[0].sum()),
                "gap_median": float(np.median(gap)),
                "gap_worst": float(gap.max()),
                "error_median": float(np.median(error)),
                "error_worst": float(error.max()),
                "worst_layer": int(error.argmax()),
            }
            found.append(result)
            rows.append(tuple(result.values()))
    table(
        f"Accuracy: completeness gap, and relative L2 error of a layer against Gauss-"
        f"{CONVERGED.steps}",
        "prompt|rule|P(answer)|nodes|gap: median layer|worst layer|error: median layer|worst layer"
        "|which layer",
        rows,
    )
    return found


# Fresh processes


def child(task: str, data: Path, **environment: str) -> dict[str, Any]:
    """Run a task below in a process of its own."""
    done = subprocess.run(
        [sys.executable, __file__, "--child", task, "--data", str(data)],
        env={**os.environ, **environment, "JAXNEURONS_START": repr(time.time())},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return json.loads(done.stdout.splitlines()[-1])


def child_cold(_: Path) -> dict[str, float]:
    start = float(os.environ["JAXNEURONS_START"])
    found = {"imported": time.time() - start}
    lm = jaxneurons.load(SMOLLM2)
    found["loaded"] = time.time() - start
    text, answer = list(builtin_prompts())[2][1:]
    (batch,) = plan([encode_query(lm.tokenizer, text, answer)])
    out = run(lm, batch, RULES["adaptive"])
    np.argsort(np.asarray(out.scores[0]).reshape(-1))[-20:]
    found["neurons"] = time.time() - start
    return found


def child_single(data: Path) -> dict[str, float]:
    lm = jaxneurons.load(SMOLLM2)
    found = {"loaded": peak_gib()}
    prompts, _ = choose(read_prompts(data)[0], lm.tokenizer, 1)
    (batch,) = plan(prompts)
    for name in ("adaptive", "reference"):
        run(lm, batch, RULES[name])
        found[f"{name}, one prompt"] = peak_gib()
    return found


def child_batch(data: Path) -> dict[str, float]:
    lm = jaxneurons.load(SMOLLM2)
    _, prompts = choose(read_prompts(data)[0], lm.tokenizer, 1)
    for batch in plan(prompts):
        run(lm, batch, RULES["adaptive"])
    return {f"adaptive, {len(prompts)} prompts in batches": peak_gib()}


CHILDREN = {"cold": child_cold, "single": child_single, "batch": child_batch}


def peak_gib() -> float:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (1 << 30 if sys.platform == "darwin" else 1 << 20)


def memory(data: Path) -> dict[str, float]:
    found = child("single", data) | child("batch", data)
    table(
        "Peak resident memory of a fresh process so far, compilation included",
        "after|GiB",
        [(name, round(gib, 2)) for name, gib in found.items()],
    )
    return found


def cold(data: Path) -> dict[str, dict[str, float]]:
    with tempfile.TemporaryDirectory() as cache:
        found = {
            name: child("cold", data, JAX_COMPILATION_CACHE_DIR=cache)
            for name in ("empty", "filled by the first")
        }
    table(
        "Seconds from process start (files in the page cache)",
        "JAX compilation cache|imported|model loaded|first neurons",
        [(name, f["imported"], f["loaded"], f["neurons"]) for name, f in found.items()],
    )
    return found


# Printing

_printed: list[str] = []


def say(line: str = "") -> None:
    print(line, flush=True)
    _printed.append(line)


def table(title: str, columns: str, rows: Sequence[Sequence[Any]]) -> None:
    cells = [columns.split("|")] + [[_cell(value) for value in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = [
        "| " + " | ".join(c.ljust(w) for c, w in zip(r, widths, strict=True)) + " |" for r in cells
    ]
    lines.insert(1, "|" + "|".join("-" * (w + 2) for w in widths) + "|")
    for line in ("", f"**{title}**", "", *lines, ""):
        say(line)


def _cell(value: Any) -> str:
    if not isinstance(value, float):
        return str(value)
    if abs(value) >= 100:
        return f"{value:.0f}"
    return f"{value:.1e}" if 0 < abs(value) < 1e-2 else f"{value:.3g}"


def write(out: Path, results: dict[str, Any]) -> None:
    out.with_suffix(".json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    out.with_suffix(".md").write_text("\n".join(_printed) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    add = parser.add_argument
    add(
        "--layers",
        default=BASELINE_LAYERS,
        help="layers of the baseline that are timed; spread "
        "them evenly (default: %(default)s, scaled up to all)",
    )
    add("--full", action="store_true", help="time all layers of the baseline")
    add("--skip-torch", action="store_true", help="leave the baseline out")
    add("--skip-memory", action="store_true", help="leave the memory of fresh processes out")
    add("--skip-batch", action="store_true", help="leave the batch of prompts out")
    add("--accuracy", type=int, default=3, metavar="N", help="prompts of the accuracy table")
    add("--cold", action="store_true", help="time a fresh process, from start to first neurons")
    add("--repeats", type=int, default=7, metavar="N", help="runs of each timing (default: 7)")
    add(
        "--baseline-repeats",
        type=int,
        default=2,
        metavar="N",
        help="runs of each layer of the baseline, the fastest counts (default: 2)",
    )
    add("--data", type=Path, default=DATA, help="multi-choice prompts (default: %(default)s)")
    add("--out", type=Path, metavar="FILE", help="write FILE.json and FILE.md")
    add("--child", choices=CHILDREN, help=argparse.SUPPRESS)
    args = parser.parse_args()
    jax.config.update("jax_default_matmul_precision", "highest")
    if args.child:
        print(json.dumps(CHILDREN[args.child](args.data)))
        return
    if not args.skip_torch and not (_version("torch") and _version("accelerate")):
        parser.error("the baseline needs PyTorch: pip install -e '.[oracle]', or --skip-torch")

    results: dict[str, Any] = {"machine": machine()}

    def save() -> None:  # after every long section: a time limit then costs only the rest
        if args.out:
            write(args.out, results)

    fetch_smollm2()
    # First, while this process is small: a child's peak starts at its parent's.
    if not args.skip_memory:
        results["memory_gib"] = memory(args.data)
    if args.cold:
        results["cold"] = cold(args.data)

    save()

    lm = jaxneurons.load(SMOLLM2)
    count = lm.config.num_layers
    layers = list(range(count)) if args.full else [int(x) for x in args.layers.split(",")]
    if not layers or not all(0 <= x < count for x in layers):
        parser.error(f"--layers: layers of {SMOLLM2} are 0 to {count - 1}")
    texts, source = read_prompts(args.data)
    prompts, mixed = choose(texts, lm.tokenizer, args.accuracy)
    tokens = len(prompts[0].prompt)
    (batch,) = plan(prompts[:1])
    say(f"prompt: {tokens} tokens from {source}, padded to {batch.tokens.shape[1]} for the engine")
    results["prompt_tokens"] = tokens

    ticks, own = cpu_ticks(), time.process_time()
    results["engine"] = engine(lm, batch, args.repeats)
    ours = {name: found.pop("scores") for name, found in results["engine"].items()}
    rates = {"jax": jax_rates(lm.config)}
    if not args.skip_torch:
        results["baseline"] = baseline(
            lm.config, prompts[0], layers, args.baseline_repeats, ours["reference"]
        )
        rates["torch"] = torch_rates(lm.config)
        table(
            "Times faster than PyTorch"
            + ("" if args.full else f" (baseline scaled from {len(layers)} layers)"),
            "rule|than the published procedure|than the lean one",
            [
                (n, *(results["baseline"][b] / f["seconds"] for b in ("published", "lean")))
                for n, f in results["engine"].items()
            ],
        )
    results["matmul_gflops"] = rates
    table(
        "float32 matmul, GFLOP/s",
        "|".join(("shape", *rates)),
        [(shape, *(of[shape] for of in rates.values())) for shape in rates["jax"]],
    )
    rate = max(next(iter(of.values())) for of in rates.values())
    results["shares"] = shares(lm.config, tokens, results["engine"], rate)
    save()
    if args.accuracy > 0:
        results["accuracy"] = accuracy(lm, prompts)
        save()
    if not args.skip_batch:
        results["batch"] = in_batches(lm, mixed)
    say()
    results["others"] = others(ticks, time.process_time() - own)
    save()


if __name__ == "__main__":
    main()
