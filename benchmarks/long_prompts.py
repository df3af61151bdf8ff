"""Time and peak memory of locating one prompt of 100 to 8,000 tokens, beside the stated bound.

    python benchmarks/long_prompts.py [--write docs/long_prompts.md] [--tokens 100 1000]

A process for each length: it loads the model, locates the prompt's neurons (rule `adaptive`), and
once more for the time without compiling. Resident memory is sampled from when the model is loaded.
"""

import argparse
import contextlib
import ctypes
import json
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil

LENGTHS = (100, 1_000, 4_000, 8_000)
GIB = 1 << 30
COMPILING = GIB

INTRODUCTION = """# Long prompts

Written by `python benchmarks/long_prompts.py --write docs/long_prompts.md`: facts one after the
other, the last one to be completed, located with rule `adaptive`; model `{model}`, float32, two
cores of an AMD EPYC server, a process for each length.

*Peak*: resident memory above that of the process with the model loaded, compiling included.
*Bound*: `jaxneurons.engine.memory_bound`, which is of arrays (keys and values twice, what a layer
computes of every token, the scores of a block of queries, and 1 GiB for the rows), and 1 GiB for
compiling. It grows with the number of tokens, not with its square.
"""


@contextmanager
def peak_memory(found: dict[str, float]) -> Iterator[None]:
    """Sets `found["peak"]`: bytes of resident memory above those at the start.

    What was freed before is given back to the system first (glibc), or it would not be seen again.
    """
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
    process, done = psutil.Process(), threading.Event()
    before = most = process.memory_info().rss

    def sample() -> None:
        nonlocal most
        while not done.wait(0.01):
            most = max(most, process.memory_info().rss)

    thread = threading.Thread(target=sample)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
    found["peak"] = max(most, process.memory_info().rss) - before


def prompt_of(lm: Any, count: int) -> Any:
    """`count` tokens of facts, the last of which the answer completes."""
    from jaxneurons.lab import bundled_queries
    from jaxneurons.prompts import TokenPrompt, encode_query

    facts = [
        encode_query(lm.tokenizer, q.prompts[0], q.answers[0]) for q in bundled_queries("facts")
    ]
    asked, *others = facts
    text: list[int] = []
    while len(text) < count:
        for fact in others:
            text += [*fact.prompt, *fact.answer, *lm.tokenizer(".\n")["input_ids"]]
    return TokenPrompt(tuple(text[: count - len(asked.prompt)]) + asked.prompt, asked.answer, ())


def measure(model: str, count: int) -> dict[str, float]:
    """One length, in this process."""
    import jax

    import jaxneurons as jn
    from jaxneurons.engine import memory_bound
    from jaxneurons.prompts import plan

    lm = jn.load(model)
    attribute = jax.jit(
        lambda params, tokens, targets, lengths: jn.integrated_gradients(
            params, tokens, targets, config=lm.config, lengths=lengths
        )
    )
    (batch,) = plan([prompt_of(lm, count)])
    prompts, padded = batch.tokens.shape
    found: dict[str, float] = {
        "tokens": count,
        "padded": padded,
        "bound": memory_bound(lm.config, padded, prompts=prompts) + COMPILING,
    }

    def locate() -> float:
        start = time.perf_counter()
        arrays = map(jax.numpy.asarray, (batch.tokens, batch.targets, batch.lengths))
        found["gap"] = float(attribute(lm.params, *arrays).gap.max())
        return time.perf_counter() - start

    with peak_memory(found):
        found["first"] = locate()
        found["again"] = locate()
    return found


def table(rows: list[dict[str, float]]) -> list[str]:
    lines = [
        "| tokens | padded to | first (with compiling) | again | peak | bound | largest gap |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    return lines + [
        f"| {row['tokens']:,} | {row['padded']:,} | {row['first']:.1f} s | {row['again']:.1f} s | "
        f"{row['peak'] / GIB:.2f} GiB | {row['bound'] / GIB:.2f} GiB | {row['gap']:.1e} |"
        for row in rows
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description="Locating in long prompts.")
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--tokens", type=int, nargs="+", default=LENGTHS)
    parser.add_argument("--write", type=Path, help="a file to write; default: the terminal")
    parser.add_argument("--one", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(measure(options.model, options.one)))
        return
    rows = []
    for count in options.tokens:
        command = [sys.executable, __file__, "--model", options.model, "--one", str(count)]
        done = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True)
        rows.append(json.loads(done.stdout.splitlines()[-1]))
        print(table(rows)[-1], file=sys.stderr, flush=True)
    text = "\n".join([INTRODUCTION.format(model=options.model), *table(rows), ""])
    if options.write:
        options.write.write_text(text, encoding="utf-8")
    else:
        print(text)


if __name__ == "__main__":
    main()
