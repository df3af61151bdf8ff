"""The real programs compiled for TPU pods that are not there, beside what `plan` predicts of them.

    python benchmarks/ahead_of_time.py [--only SETTING ...] [--out FILE] [--write docs/pod.md]

needs the extra `tpu-plan` (libtpu) and, for each setting, some minutes and a few GiB. Each
is compiled in a process of its own; a line of the file is what came of it, and settings that the
file has are not compiled again. Without `--only` all of them, the smallest first.

Bytes are of one device: the compiler's analysis of the program against `plan`'s prediction.
`--write` puts a table of all lines of the file in the place of that of a page.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from results_page import replace_table

SETTINGS: dict[str, tuple[Any, ...]] = {
    # model, target, mesh, preset, job, rule, prompts at once, program
    "7B-v5e-2x4-right": ("7B", "v5e:2x4", (1, 8), "tensor", "locate", "right", 8, ""),
    "70B-v5p-4x4x4-right": ("70B", "v5p:4x4x4", (8, 8), "fsdp-tensor", "locate", "right", 32, ""),
    "70B-v5e-16x16-right": ("70B", "v5e:16x16", (32, 8), "fsdp-tensor", "locate", "right", 32, ""),
    "70B-v6e-8x8-right": ("70B", "v6e:8x8", (8, 8), "tensor", "locate", "right", 32, ""),
    "70B-v5p-4x4x4-responses": (
        *("70B", "v5p:4x4x4", (8, 8), "tensor"),
        *("responses", "right", 64, "mean_responses"),
    ),
    "70B-v5p-4x4x4-ablated": (
        *("70B", "v5p:4x4x4", (8, 8), "tensor"),
        *("sweep", "right", 64, "generate_ablated"),
    ),
    "70B-v5p-4x4x4-memit": (
        *("70B", "v5p:4x4x4", (8, 8), "tensor"),
        *("edit", "right", 8, "optimise_values"),
    ),
    "70B-v5p-4x4x4-adaptive": (
        *("70B", "v5p:4x4x4", (8, 8), "fsdp-tensor"),
        *("locate", "adaptive", 32, ""),
    ),
    "70B-v5e-16x16-adaptive": (
        *("70B", "v5e:16x16", (32, 8), "fsdp-tensor"),
        *("locate", "adaptive", 32, ""),
    ),
}
TOKENS = 128


def compile_one(name):
    """A line of the results: what the compiler says of a setting, and the prediction."""
    import jaxneurons as jn

    model, target, mesh, preset, job, rule, prompts, only = SETTINGS[name]
    placement = jn.scale.Placement(mesh[0], mesh[1], preset)
    row = {
        "setting": name,
        "model": model,
        "target": target,
        "mesh": placement.mesh,
        "sharding": preset,
        "job": job,
        "rule": rule if job == "locate" else "",
        "prompts": prompts,
        "memory": jn.scale.parse_target(target).device.memory,
    }
    programs = jn.scale.compile_ahead(
        model,
        placement,
        job=job,
        target=target,
        prompts=prompts,
        work=jn.scale.Work(tokens=TOKENS, rule=rule, sets=8),
        only=(only,) if only else (),
    )
    for each, predicted in programs:
        row |= {
            "program": each.name,
            "peak": each.peak,
            "arguments": each.arguments,
            "temporaries": each.temporaries,
            "predicted_peak": predicted.peak - predicted.unread,
            "predicted_temporaries": predicted.temporaries,
            "collectives": dict(each.collectives),
            "seconds": round(each.seconds, 1),
        }
    return row


def table(rows):
    """Lines of a table in Markdown: what fits, and how near the prediction is."""
    lines = [
        "| model, target | mesh, sharding | program | on a device, of | predicted | collectives |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        rule = f", `{row['rule']}`" if row["rule"] else ""
        kinds = ", ".join(f"{count} {kind}" for kind, count in row["collectives"].items())
        lines.append(
            f"| {row['model']}, {row['target']} | {row['mesh']}, {row['sharding']} | "
            f"`{row['program']}`{rule}, {row['prompts']} prompts | {row['peak'] / 1e9:.2f} of "
            f"{row['memory'] / 1e9:.1f} GB | {row['predicted_peak'] / 1e9:.2f} GB | "
            f"{kinds or 'not printed'} |"
        )
    return lines


def main():
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", nargs="*", default=list(SETTINGS), choices=list(SETTINGS))
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("ahead_of_time.jsonl"))
    parser.add_argument("--write", type=Path, help="a page with such a table")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        print(json.dumps(compile_one(arguments.one)))
        return
    lines = arguments.out.read_text().splitlines() if arguments.out.exists() else []
    there = {json.loads(line)["setting"] for line in lines}
    for name in arguments.only:
        if name in there:
            continue
        start = time.time()
        done = subprocess.run(
            [sys.executable, __file__, "--one", name],
            capture_output=True,
            text=True,
            env={**os.environ, "JAX_PLATFORMS": "cpu"},
        )
        if done.returncode:
            row = {"setting": name, "error": " ".join(done.stderr.split())[-600:]}
        else:
            row = json.loads(done.stdout.splitlines()[-1])
        print(f"{name}: {time.time() - start:.0f} s: {row}", flush=True)
        if not done.returncode:
            with arguments.out.open("a") as file:
                file.write(json.dumps(row) + "\n")
    if arguments.write:
        rows = [json.loads(line) for line in arguments.out.read_text().splitlines()]
        replace_table(arguments.write, table(rows))


if __name__ == "__main__":
    main()
