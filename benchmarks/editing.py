"""What every editing method does, as a results file: published facts in SmolLM2, and the lab model.

    python benchmarks/editing.py --out runs/editing --data counterfact_3000.json \\
        --write docs/editing_results.md

Runs what `jaxneurons edit evaluate`, `edit sequential`, `edit layers` and `edit trace` run, in
directories below `--out`, where what is finished is not computed again; and takes one edited fact
out to PyTorch transformers (oracle extra). Without `--data`: the lab model alone.
"""

import argparse
import json
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import edit_layers
from results_page import markdown, spread

import jaxneurons as jn

Row = dict[str, Any]
CASES = 100
SIZES = (1, 10, 100, 1000)
SEQUENTIAL = ("memit", "accumulate", "alphaedit", "finetune")
PORTABILITY = ("a question with options", "backwards", "in the other language")
"""What follows from an edited fact of the lab's world, in the order of its requests."""

INTRODUCTION = """# What edits did, in full

Written by `python benchmarks/editing.py --out DIR --data counterfact_3000.json{only} --write
docs/editing_results.md`; without `--data`, the sections of the lab model alone. Two cores of an AMD
EPYC server, float32. The file is counterfact-edit, 3,000 cases of the CounterFact set (Apache 2.0).

Exact match of the whole new answer, in per cent, with 95 % bootstrap intervals over requests.
*Forced*: by teacher forcing, as most papers count. *Free*: the first sentence that the model writes
by itself begins with it. *Kept*: neighbours whose first sentence is the unedited model's, word for
word. *Random*: a change of the same size in random directions, or random neurons of the same
layers. KL: of the next token after neighbours, nats. Perplexity: of neutral text, times that of the
unedited model.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description="What every editing method does.")
    parser.add_argument("--out", type=Path, required=True, help="run directories")
    parser.add_argument("--data", type=Path, help="requests about real facts, as counterfact-edit")
    parser.add_argument("--write", type=Path, help="results file; default: standard output")
    parser.add_argument(
        "--only", nargs="*", help="sections: evaluate sequential layers prediction export"
    )
    options = parser.parse_args()
    models = [("smollm2-135m", options.data)] if options.data else []
    only = f" --only {' '.join(options.only)}" if options.only else ""
    text = [INTRODUCTION.format(only=only)]
    for model, data in [*models, ("lab", None)]:
        lm = jn.load(model)
        for name, section in SECTIONS.items():
            if not options.only or name in options.only:
                text += section(lm, model, data, options.out)
    done = "\n".join(text)
    if options.write:
        options.write.write_text(done, encoding="utf-8")
    else:
        print(done)


def requests_of(data: Path | None, count: int | None) -> list[jn.edit.EditRequest]:
    return jn.edit.read_requests(data, limit=count) if data else jn.edit.lab_requests(count)


def collect(lm: Any, methods: Iterable[Any], path: Path) -> dict[int, Any]:
    """Covariances that some methods need, kept where the command line keeps them."""
    layers = sorted({layer for each in methods for layer in jn.edit.layers_of(each, lm.config)})
    if not layers:
        return {}
    return jn.edit.collect_covariance(lm, layers, out=path.with_name(f"{path.name}-covariance"))


def evaluated(lm: Any, model: str, data: Path | None, out: Path) -> list[str]:
    """Every method, each request alone."""
    requests, path = requests_of(data, CASES), out / model
    methods = jn.edit.named_methods(lm, requests)
    tables = jn.edit.evaluate(
        lm, requests, methods, covariance=collect(lm, methods.values(), path), out=path
    )
    summary = tables.rows("summary")
    what = f"{CASES} {'published requests' if data else 'facts of its world'}"
    text = [f"## `{model}`: {what}, each edited alone\n"]
    text += markdown(
        "**The new answer**: exact match, %",
        ("", "forced", "free", "paraphrases, forced", "paraphrases, free", "reached"),
        (
            (
                label(row),
                *(
                    spread(row, f"{kind}_{how}", percent)
                    for kind in ("efficacy", "generalisation")
                    for how in ("forced", "free")
                ),
                "" if row["control"] else reached(tables.rows("edits"), row["method"]),
            )
            for row in summary
        ),
    )
    text += markdown(
        "**What else changed**",
        ("", "kept, forced", "kept, free", "KL", "fluency, bits", "perplexity", "norm", "failed"),
        (
            (
                label(row),
                spread(row, "locality_forced", percent),
                spread(row, "locality_free", percent),
                spread(row, "locality_kl", lambda x: f"{x:.3f}"),
                spread(row, "fluency", lambda x: f"{x:.2f}"),
                spread(row, "perplexity_ratio", ratio),
                norm(tables.rows("edits"), row),
                str(row["failed"] or ""),
            )
            for row in summary
        ),
    )
    text += markdown(
        "**Beyond random**: paired difference to the control, percentage points",
        ("", "free", "paraphrases, free", "kept, free"),
        differences(tables.rows("differences")),
    )
    if not data:
        text += portability(tables.rows("answers"))
    for entry in tables.facts["left_out"]:
        text.append(f"Left out: {entry['request']} {entry['method']}: {entry['reason']}\n")
    return text


def reached(rows: Sequence[Row], method: str) -> str:
    values = [row["reached"] for row in rows if (row["method"], row["control"]) == (method, "")]
    known = [value for value in values if value is not None]
    return percent(sum(known) / len(known)) if known else ""


def norm(rows: Sequence[Row], of: Row) -> str:
    key = (of["method"], of["control"])
    values = [row["norm"] for row in rows if (row["method"], row["control"]) == key]
    return f"{sum(values) / len(values):.2f}" if any(values) else ""


def differences(rows: Sequence[Row]) -> Iterable[tuple[str, ...]]:
    measures = ("efficacy_free", "generalisation_free", "locality_free")
    against = [row for row in rows if row["against"] == "random" and row["measure"] in measures]
    for method in dict.fromkeys(row["method"] for row in against):
        of_method = {row["measure"]: row for row in against if row["method"] == method}
        yield method, *(spread(of_method.get(m, {}), "difference", points) for m in measures)


def portability(rows: Sequence[Row]) -> list[str]:
    """What follows from an edit, one kind of question after the other, in free generation."""
    rows = [row for row in rows if row["kind"] == "portability"]
    table = []
    for key in dict.fromkeys((row["method"], row["control"]) for row in rows):
        cells = []
        for number in range(len(PORTABILITY)):
            free = [
                row["free"]
                for row in rows
                if (row["method"], row["control"], row["number"]) == (*key, number)
            ]
            cells.append(f"{sum(free)} of {len(free)}" if free else "")
        table.append((label({"method": key[0], "control": key[1]}), *cells))
    return markdown(
        "**Is what follows from the edit right too?** In free generation", ("", *PORTABILITY), table
    )


def sequential(lm: Any, model: str, data: Path | None, out: Path) -> list[str]:
    """One model, edited request after request."""
    path = out / f"{model}-sequential"
    # A few more than are needed: some may be left out.
    requests = requests_of(data, SIZES[-1] + 10 if data else None)
    methods = jn.edit.named_methods(lm, requests, SEQUENTIAL, prefixes=2)
    tables = jn.edit.evaluate_sequential(
        lm,
        requests,
        methods,
        sizes=SIZES,
        batch=10,
        sample=40,
        measures=jn.edit.MeasureSettings(fluency_tokens=0),
        covariance=collect(lm, methods.values(), path),
        out=path,
    )
    rows = tables.rows("sequential")
    names = ("method", "control", "edits")
    by_key = {(*(row[name] for name in names), row["group"]): row for row in rows}
    table = []
    for key in dict.fromkeys(tuple(row[name] for name in names) for row in rows):
        first, last, every = (by_key[*key, group] for group in ("first", "last", "all"))
        table.append(
            (
                label(every),
                f"{every['edits']:,}",
                spread(first, "efficacy_free", percent),
                spread(last, "efficacy_free", percent),
                spread(every, "efficacy_forced", percent),
                spread(every, "efficacy_free", percent),
                spread(every, "generalisation_free", percent),
                spread(every, "locality_free", percent),
                spread(every, "perplexity_ratio", lambda x: f"{x:,.3g}"),
            )
        )
    return [
        f"## `{model}`: one model, edited again and again\n",
        "Ten requests at a time, values optimised after two prefixes beside the prompt; measured "
        "on the first ten, the last ten and forty of all edits so far. Random: all that was "
        "changed so far, turned at random.\n",
        *markdown(
            "**After so many edits**, %",
            (
                *("", "edits", "first: free", "last: free", "all: forced", "all: free"),
                *("paraphrases, free", "kept, free", "perplexity"),
            ),
            table,
        ),
    ]


def layers(lm: Any, model: str, data: Path | None, out: Path) -> list[str]:
    """ROME and MEMIT at layers from low to high."""
    text = [f"## `{model}`: which layers?\n"]
    requests = requests_of(data, 10)
    methods: dict[str, Any] = {"rome": jn.edit.ROME(), "memit": jn.edit.MEMIT()}
    for name, method in methods.items():
        path = out / f"{model}-layers-{name}"
        choice = jn.edit.choose_layers(lm, requests, method, out=path)
        default = jn.edit.layers_of(method, lm.config)
        text += markdown(
            f"**{name}**, ten requests; default layers {shown(default)}, chosen "
            f"{shown(choice.layers)}",
            ("layers", "score", "free", "paraphrases, free", "kept, free", "KL", "as good"),
            (
                (
                    row["layers"],
                    f"{row['score']:.2f} ({row['low']:.2f} to {row['high']:.2f})",
                    percent(row["efficacy_free"]),
                    percent(row["generalisation_free"]),
                    percent(row["locality_free"]),
                    "" if row["locality_kl"] is None else f"{row['locality_kl']:.3f}",
                    "yes" if row["as_good"] else "",
                )
                for row in choice.tables.rows("layers")
            ),
        )
    return text


def shown(numbers: Sequence[int]) -> str:
    return f"{numbers[0]} to {numbers[-1]}" if len(numbers) > 1 else str(numbers[0])


def export(lm: Any, model: str, data: Path | None, out: Path) -> list[str]:
    """The first fact whose new answer ROME also brings to paraphrases, asked in PyTorch."""
    if not data:
        return []
    import torch
    import transformers

    edits = json.loads((out / model / "evaluation.json").read_text("utf-8"))["edits"]
    requests = requests_of(data, CASES)
    chosen = next(
        row["request"]
        for row in edits
        if (row["method"], row["control"]) == ("rome", "")
        and row["efficacy_free"] == row["generalisation_free"] == 1
    )
    request = next(each for each in requests if each.id == chosen)
    method = jn.edit.ROME()
    edit = jn.edit.edit(
        lm.params,
        [request],
        config=lm.config,
        tokenizer=lm.tokenizer,
        settings=method,
        covariance=collect(lm, [method], out / model),
    )
    patch = jn.edit.make_patch(lm, edit)
    edited = jn.edit.apply_patches(lm, [patch])
    prompts = [request.prompt, *request.paraphrases, *(text for text, _ in request.neighbours)]
    ours = jn.generate(edited, prompts, steps=8)
    before = jn.generate(lm, prompts, steps=8)
    with tempfile.TemporaryDirectory() as place:
        directory = Path(place)
        jn.edit.write_patch(patch, directory / "fact.safetensors")
        size = (directory / "fact.safetensors").stat().st_size
        jn.save(edited, directory / "hf", to="hf")
        whole = sum(path.stat().st_size for path in (directory / "hf").glob("*.safetensors"))
        tokenizer = transformers.AutoTokenizer.from_pretrained(directory / "hf")
        loaded = transformers.AutoModelForCausalLM.from_pretrained(directory / "hf")
        theirs = []
        for prompt in prompts:
            # Ids as this library makes them: the exported tokenizer is not what is tested here.
            ids = torch.tensor([list(jn.prompts.encode_prompt(lm.tokenizer, prompt))])
            with torch.no_grad():
                for _ in range(8):
                    step = loaded(ids).logits[:, -1].argmax(-1, keepdim=True)
                    ids = torch.cat([ids, step], 1)
            theirs.append(tokenizer.decode(ids[0, -8:]))
    return [
        f"## `{model}`: out of the building\n",
        f"Request {request.id}, {request.subject}: {request.ground_truth} to {request.target}, by "
        f"ROME. The patch has {size:,} bytes, {size / whole:.4%} of the exported model's "
        f"{whole:,}. Greedy continuations of eight tokens:\n",
        *markdown(
            "**Asked in PyTorch transformers**, from the exported directory",
            ("prompt", "before", "edited, here", "edited, transformers", "the same"),
            (
                (*(cell(x) for x in line), "yes" if line[2] == line[3] else "no")
                for line in zip(prompts, before, ours, theirs, strict=True)
            ),
        ),
    ]


def cell(text: str) -> str:
    return " ".join(text.replace("|", "\\|").split())


def label(row: Row) -> str:
    return f"{row['method']}, random" if row["control"] else row["method"]


def percent(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.0f}"


def ratio(value: float) -> str:
    return f"{value:.3f}" if value < 1000 else f"{value:.1e}"


def points(value: float) -> str:
    return f"{100 * value:+.0f}"


def prediction(lm: Any, model: str, data: Path | None, out: Path) -> list[str]:
    """Do causal tracing and attribution say beforehand where edits work?"""
    requests = requests_of(data, 600 if data else None)
    return edit_layers.section(lm, model, requests, out / "edit-layers")


SECTIONS = {
    "evaluate": evaluated,
    "sequential": sequential,
    "layers": layers,
    "prediction": prediction,
    "export": export,
}


if __name__ == "__main__":
    main()
