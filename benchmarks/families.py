"""The table of `docs/families.md`: every family against PyTorch, from the tests' own comparison.

    python benchmarks/families.py [FAMILY ...] [--write docs/families.md]

Tiny random models in float32, made by transformers: logits at 40 positions, beyond windows and
original contexts (and at 23, where the length decides), a greedy continuation of 8 tokens. The
difference is the largest of any logit, as a share of the largest logit. A few seconds each.
"""

import argparse
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

import jax
import transformers
from results_page import replace_table
from support import experts  # pyright: ignore[reportMissingImports]
from support.families import (  # pyright: ignore[reportMissingImports]
    FAMILIES,
    IN_GGUF,
    ROPES,
    VARIANTS,
    make,
    variant,
)
from support.family_comparisons import (  # pyright: ignore[reportMissingImports]
    BOUND,
    STEPS,
    Comparison,
    compare_directory,
    compare_gguf,
)

Case = tuple[str, str, Callable[[], Any]]
"""Family, options, and what makes the model."""


def cases() -> Iterator[Case]:
    """Every combination that is compared as a Hugging Face directory."""
    for name in FAMILIES:
        family, _, option = name.replace("nemo", "mistral-head_dim").partition("-")
        for rope in ("default",) if option else ROPES:
            options = ", ".join(part for part in (option, rope) if part not in ("", "default"))
            yield family, options, lambda name=name, rope=rope: make(name, rope, "gqa", tied=False)
    for name in VARIANTS:
        family, _, options = name.partition(", ")
        yield family, options, lambda name=name: variant(name)
    for name in experts.MODELS:
        family = "mixtral" if name.startswith("mixtral") else "qwen3_moe"
        options = name.removeprefix("mixtral").removeprefix("qwen3-moe").strip("-")
        yield family, options, lambda name=name: experts.make(name)


def gguf_cases() -> Iterator[Case]:
    """Every combination that is compared as a GGUF file."""
    for name in IN_GGUF:
        family, _, options = name.partition(", ")
        yield family, options, lambda name=name: variant(name, IN_GGUF)


def worst(case: Iterator[Case], compare: Callable[[Any, Path], Comparison]) -> dict[str, Any]:
    """By family: options, and the largest difference."""
    table: dict[str, Any] = {}
    for family, options, model in case:
        with tempfile.TemporaryDirectory() as directory:
            comparison = compare(model(), Path(directory) / "model")
        if comparison.continued < STEPS or not comparison.difference < BOUND:
            raise SystemExit(f"{family}, {options}: not PyTorch's: {comparison}")
        print(f"{family}, {options}: {comparison.difference:.1e}", file=sys.stderr, flush=True)
        row = table.setdefault(family, {"options": [], "difference": 0.0})
        row["options"].append(options or "as is")
        row["difference"] = max(row["difference"], comparison.difference)
    return table


PARAMETERS_ONLY = {"mixtral": "exact parameters, as `llama`", "qwen3_moe": "exact parameters"}
"""What tests/convert/test_mixtures.py compares of files with experts."""


def main() -> None:
    parser = argparse.ArgumentParser(description="Every family against PyTorch.")
    parser.add_argument("families", nargs="*")
    parser.add_argument("--write", type=Path, help="page whose table this replaces; all families")
    options = parser.parse_args()
    chosen, page = options.families, options.write
    if chosen and page:
        parser.error("--write replaces the whole table: name no families")
    jax.config.update("jax_default_matmul_precision", "highest")

    def kept(every: Iterator[Case]) -> Iterator[Case]:
        return (case for case in every if not chosen or case[0] in chosen)

    directories = worst(kept(cases()), compare_directory)
    files = worst(kept(gguf_cases()), compare_gguf)
    print(f"transformers {transformers.__version__}; continuations: {STEPS} of {STEPS} everywhere")
    table = ["| family | options | largest difference | from GGUF |", "|---|---|---|---|"]
    for family, row in directories.items():
        gguf = PARAMETERS_ONLY.get(family, "none of its own")
        gguf = f"{files[family]['difference']:.1e}" if family in files else gguf
        options = "; ".join(row["options"])
        table.append(f"| `{family}` | {options} | {row['difference']:.1e} | {gguf} |")
    if page:
        replace_table(page, table)
    print("\n".join(table))


if __name__ == "__main__":
    main()
