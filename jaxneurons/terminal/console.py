"""What people see of a command: tables on standard output, progress on standard error.

Names come from files and people: they are shown as they are, on one line, in characters that the
terminal has (see `Plain`).
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from rich.segment import Segment
from rich.status import Status
from rich.table import Table
from rich.text import Text

from jaxneurons.storage.printable import encodable, printable, shortened

if TYPE_CHECKING:
    from jaxneurons.checkpoints.description import Description
    from jaxneurons.checkpoints.loading import LM

LEAST = 40
"""Columns of a table where there is room for fewer: a terminal breaks its lines then."""


class Plain(Console):
    """A console to which text is text: no markup, no emoji codes, no control characters.

    What its encoding lacks is written in ASCII: tables with `-`, "\u00b1" as "+/-", a
    letter of another script as an escape.
    """

    def __init__(self, **how: Any):
        super().__init__(markup=False, emoji=False, **how)
        if not self.stderr and self.width < LEAST:
            self.width = LEAST

    def render_str(self, text: str, **how: Any) -> Text:
        """Every text that is printed, and every cell and title of a table, comes through here."""
        return super().render_str(self.shown(text), **how)

    def render(self, renderable: Any, options: Any = None) -> Iterator[Segment]:
        """What cells that were cut off end in takes one column in every encoding."""
        for segment in super().render(renderable, options):
            cut = "\u2026" in segment.text and encodable("\u2026", self.encoding) != "\u2026"
            yield segment._replace(text=segment.text.replace("\u2026", "~")) if cut else segment

    def on_broken_pipe(self) -> None:
        """Nobody reads on: `stopping` ends the command."""
        self.quiet = True
        raise BrokenPipeError

    def shown(self, text: str) -> str:
        """A text as this console can show it."""
        return encodable(printable(text), self.encoding)

    def busy(self, what: str) -> Status:
        """A sign of life while something is done that says nothing itself."""
        spinner = "dots" if self.encoding.startswith("utf") else "line"
        return self.status(Text(self.shown(what)), spinner=spinner)


console = Plain()
errors = Plain(stderr=True)

NAME = 32
"""Columns of a name in a table, at most."""


@contextmanager
def counting(what: str, unit: str = "prompts") -> Iterator[Callable[[int, int], None]]:
    """A bar over things that are counted: call what it gives with (done, of)."""
    columns = (MofNCompleteColumn(), TextColumn(unit), TimeRemainingColumn())
    with _progress(*columns) as progress:
        task = progress.add_task(errors.shown(what), total=None)
        yield lambda done, total: progress.update(task, completed=done, total=total)


@contextmanager
def counting_bytes(what: str) -> Iterator[Callable[[int], None]]:
    """A bar over bytes: call what it gives with those that have just passed."""
    with _progress(DownloadColumn(binary_units=True), TransferSpeedColumn()) as progress:
        task = progress.add_task(errors.shown(what), total=None)
        yield lambda count: progress.update(task, advance=count)


@contextmanager
def stages() -> Iterator[Callable[[str, int, int], None]]:
    """A bar for each stage of a long run: call what it gives with (stage, done, of)."""
    with _progress(*_COUNT) as progress:
        tasks: dict[str, Any] = {}
        last: dict[str, int] = {}

        def tell(stage: str, done: int, total: int) -> None:
            if stage not in tasks or done < last[stage]:  # the same stage once more
                tasks[stage] = progress.add_task(errors.shown(stage), total=total)
            last[stage] = done
            progress.update(tasks[stage], completed=done, total=total)

        yield tell


_COUNT = (MofNCompleteColumn(), TimeRemainingColumn())


def load_and_say(source: str, *, ignore_keys: Sequence[str] | None = None) -> "LM":
    """Load a model and say what it is."""
    from jaxneurons.checkpoints.loading import load

    with errors.busy(f"Loading {source} (fetched once, then cached) ..."):
        lm = load(source, ignore_keys=ignore_keys or ())
    config = lm.config
    console.print(
        f"{lm.source}: {config.num_layers} layers, {config.intermediate_size} neurons each, "
        f"{config.vocab_size} tokens."
    )
    return lm


def _progress(*columns: ProgressColumn) -> Progress:
    # A log file needs no bar.
    shown = (TextColumn("{task.description}", markup=False), BarColumn(), *columns)
    return Progress(*shown, console=errors, disable=not errors.is_terminal)


def gib(count: int) -> str:
    """A size for people."""
    return f"{count / 2**30:.2f} GiB" if count >= 2**28 else f"{count / 2**20:.1f} MiB"


def show_certificate(found: dict[str, Any]) -> None:
    """What `verify` found."""
    table = Table(
        title="Largest difference from PyTorch, in standard deviations (FFN sites: worst layer)",
        title_justify="left",
        box=box.SIMPLE_HEAD,
    )
    for name in ("sequence", "logits", "gate", "up", "act", "down"):
        table.add_column(name, justify="left" if name == "sequence" else "right")
    for result in found["sequences"]:
        sites = (f"{result[site]['relative']:.1e}" for site in ("gate", "up", "act", "down"))
        table.add_row(result["sequence"], f"{result['logits']['relative']:.1e}", *sites)
    console.print(table)
    console.print(
        f"Greedy continuations equal: {found['continuations_equal']}. Weights that differ: "
        f"{len(found['weights']['differ'])} of {found['weights']['tensors']} tensors. "
        f"{'Passed' if found['passed'] else 'FAILED'} ({found['dtype']} weights; logits may differ "
        f"by {found['tolerance']['largest']:g}, and by {found['tolerance']['mean']:g} on average)."
    )
    own = [r["own_arithmetic"]["mean"] for r in found["sequences"] if "own_arithmetic" in r]
    if own:
        console.print(
            f"Computed in {found['dtype']} itself, logits differ by {max(own):.1e} on average."
        )


def show_description(found: "Description") -> None:
    """What `inspect` found."""
    config, rope = found.config, found.config.rope
    window = f"{config.sliding_window} positions" if config.sliding_window else "none"
    if config.sliding_layers:
        window += f", {sum(config.sliding_layers)} of {config.num_layers} layers"
    kind = rope.rope_type + (f" x {rope.factor:g}" if rope.factor != 1 else "")
    tokens = found.tokenizer
    table = Table(box=None, show_header=False, title=found.source, title_justify="left")
    rows = [
        ("family", f"{config.family}, {found.kind}"),
        ("layers", f"{config.num_layers}"),
        ("hidden size", f"{config.hidden_size}"),
        (
            "attention",
            f"{config.num_heads} heads of {config.head_dim}, {config.num_kv_heads} key/value heads",
        ),
        ("sliding window", window),
        ("rotary embedding", f"{kind}, theta {rope.theta:g}"),
        ("context", f"{config.max_position} tokens"),
        ("biases", ", ".join(config.biases) or "none"),
        ("unembedding", "tied to the embedding" if config.tied else "its own"),
        ("parameters", f"{found.parameters:,}"),
        (
            "neurons per layer",
            ", ".join(f"{site} {width:,}" for site, width in found.neurons.items()),
        ),
        ("FFN neurons", f"{config.num_layers * config.intermediate_size:,}"),
        (
            "on disk",
            ", ".join(f"{name} {gib(size)}" for name, size in found.stored.items()) or "not here",
        ),
        ("in memory", ", ".join(f"{name} {gib(size)}" for name, size in found.memory.items())),
        (
            "tokenizer",
            f"{tokens['tokens']:,} tokens, BOS {tokens['bos']!r} "
            f"({'put first' if tokens['bos put first'] else 'not put first'}), "
            f"EOS {tokens['eos']!r}, {'a' if tokens['chat template'] else 'no'} chat template",
        ),
    ]
    for row in rows:
        table.add_row(*row)
    console.print(table)


def show_study(out: Path) -> None:
    """What a study of relation-specific neurons has found so far, from its tables."""
    from jaxneurons.storage.tables import read_tables

    tables = read_tables(out / "tables")
    known = [row for row in tables["relations"] if row["known"]]
    unknown = [row["relation"] for row in tables["relations"] if not row["known"]]
    own = {r["relation"]: r for r in tables.get("ablation", []) if _is_own(r)}
    table = Table(
        title="Answers right, and the share of those held out that is lost",
        title_justify="left",
        box=box.SIMPLE_HEAD,
    )
    table.add_column("relation", no_wrap=True)
    for name in ("detection", "held out", "own off", "others off", "random off"):
        table.add_column(name, justify="right")
    for row in known:
        name = row["relation"]
        cells = [f"{row['validated']}/{row['detection']}"]
        if name in own:
            cells += [f"{own[name]['right_before']}/{own[name]['prompts']}"]
            cells += _drops(tables["ablation"], name)
        table.add_row(shown_name(name), *cells)
    summary = [
        row
        for row in tables.get("summary", [])
        if (row["analysis"], row["evaluation"]) == ("ablation", "eva")
    ]
    for row in summary:
        table.add_section()
        spread = f" ± {row['random_spread']:.0%}" if row["random_spread"] is not None else ""
        table.add_row(
            f"mean of {row['relations']}",
            "",
            f"{row['right_before']} right",
            f"{row['diagonal']:.0%}",
            "" if row["off_diagonal"] is None else f"{row['off_diagonal']:.0%}",
            f"{row['random']:.0%}{spread}",
        )
    console.print(table)
    if own:
        console.print("Negative: more answers are right than before.")
    few = [name for name, row in own.items() if not row["counted"]]
    if few:
        console.print(f"Too few right answers to be averaged: {', '.join(few)}.")
    if unknown:
        console.print(f"Unknown to the model, left out: {', '.join(unknown)}.")
    made = sorted(name for name in ("neurons", "tables", "figures") if (out / name).is_dir())
    console.print(f"Written: {out}/{{{','.join(made)}}}, {len(tables)} tables")


def show_comparison(rows: list[dict[str, Any]]) -> None:
    """Neurons that relations share in two runs."""
    table = Table(
        title="Neurons of relations of one name in two runs",
        title_justify="left",
        box=box.SIMPLE_HEAD,
    )
    table.add_column("relation", no_wrap=True)
    for name in ("neurons", "shared", "with other relations", "wording"):
        table.add_column(name, justify="right")
    for row in sorted(rows, key=lambda row: (-row["same_wording"], -row["shared"])):
        table.add_row(
            shown_name(row["relation"]),
            f"{row['neurons']}, {row['other_neurons']}",
            str(row["shared"]),
            formatted(row["shared_others"], ".0f"),
            "the same" if row["same_wording"] else "other",
        )
    console.print(table)


def _is_own(row: dict[str, Any]) -> bool:
    return row["off"] == row["relation"] and row["evaluation"] == "eva"


def _drops(rows: list[dict[str, Any]], relation: str) -> list[str]:
    """Own, others' and random: mean drops of one relation's held-out answers."""
    here = [r for r in rows if r["relation"] == relation and r["evaluation"] == "eva"]
    groups = (
        [r["drop"] for r in here if r["off"] == relation],
        [r["drop"] for r in here if r["off"] not in ("random", "matched", relation)],
        [r["drop"] for r in here if r["off"] == "random"],
    )
    found = [[value for value in group if value is not None] for group in groups]
    return [f"{sum(group) / len(group):.0%}" if group else "" for group in found]


def shown_name(text: str) -> str:
    """A name of at most `NAME` columns as the terminal shows it: escapes are wider than letters."""
    return shortened(console.shown(text), NAME)


def formatted(value: float | None, form: str) -> str:
    """A number, or nothing where it is missing."""
    return "" if value is None else format(value, form)
