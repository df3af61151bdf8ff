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
    from jaxneurons.checkpoints.loading import LM
    from jaxneurons.qrnca.demo import Demo
    from jaxneurons.qrnca.locating import Located

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
GROUPS = 6
"""Groups beside each other in a table, at most; more of them are its rows."""


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

        def update(stage: str, done: int, total: int) -> None:
            if stage not in tasks or done < last[stage]:  # the same stage once more
                tasks[stage] = progress.add_task(errors.shown(stage), total=total)
            last[stage] = done
            progress.update(tasks[stage], completed=done, total=total)

        yield update


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


def show_located(located: "Located", out: Path) -> None:
    """What `qrnca locate` found and where it is."""
    run = located.run
    answers, exact, counts = run["answers"], run["completeness"], run["neurons_per_query"]
    table = Table(
        title=f"{run['queries']} queries, {run['prompts']} prompts",
        title_justify="left",
        box=box.SIMPLE_HEAD,
    )
    table.add_column("what")
    table.add_column("found", justify="right")
    rows = [
        (
            "neurons per query (mean, min, max)",
            f"{counts['mean']:.1f}  {counts['min']}  {counts['max']}",
        ),
        ("common neurons left out", f"{len(located.common)}"),
        ("answers right", f"{answers['accuracy']:.1%}"),
        ("answer probability, mean", f"{answers['probability_mean']:.4f}"),
    ]
    if answers["option_mass_mean"] is not None:
        rows.append(("probability of all options, mean", f"{answers['option_mass_mean']:.4f}"))
    rows += [
        (
            "completeness gap (median, largest)",
            f"{exact['gap_median']:.1e}  {exact['gap_max']:.1e} (layer {exact['gap_max_layer']})",
        ),
        ("quadrature nodes per prompt", f"{exact['nodes_mean']:.0f}"),
        (
            "seconds of attribution (per prompt)",
            f"{run['seconds']['attribution']:.1f} ({run['seconds']['per_prompt']:.2f})",
        ),
    ]
    for row in rows:
        table.add_row(*row)
    console.print(table)
    empty = sum(not found.neurons for found in located.neurons.values())
    if empty:
        console.print(f"{empty} queries have no neurons of their own: all of theirs are common.")
    console.print(f"Written: {out}/neurons.jsonl, common_neurons.json, run.json")
    from jaxneurons.qrnca.prompt_cache import Caches

    kept = Caches(out).size()
    if kept:
        console.print(
            f"Kept for evaluate and edit: {kept / 2**30:.2f} GiB in {out}/caches; "
            "without it they run every prompt again.",
            soft_wrap=True,
        )


def show_demo(result: "Demo", out: Path) -> None:
    """What the demo found and where it is."""
    if result.unknown:
        console.print(f"Not known in every wording, left out: {', '.join(result.unknown)}.")
    table = Table(
        title="The answer's probability, with neurons turned off at the last prompt position",
        title_justify="left",
        caption="lost: share of prompts whose answer is no longer the model's first choice",
        caption_justify="left",
        box=box.SIMPLE_HEAD,
    )
    table.add_column("facts")
    for name in ("n", "neurons", "before", "own off", "lost", "random off", "lost"):
        table.add_column(name, justify="right", no_wrap=True)
    for effect in result.effects:
        if effect.group == "all":
            table.add_section()
        table.add_row(
            shown_name(effect.group),
            f"{effect.facts}",
            f"{effect.neurons:.1f}",
            f"{effect.before:.3f}",
            f"{effect.suppressed:.3f}",
            f"{effect.lost:.0%}",
            f"{effect.random:.3f} ± {effect.random_spread:.3f}",
            f"{effect.random_lost:.0%}",
        )
    console.print(table)
    exact, seconds = result.located.run["completeness"], result.located.run["seconds"]
    console.print(
        f"Attribution: {seconds['attribution']:.1f} s, {exact['nodes_mean']:.0f} nodes per prompt; "
        f"completeness gap {exact['gap_median']:.1e} median, {exact['gap_max']:.1e} largest."
    )
    console.print(f"Written: {out}/neurons.jsonl, effects.json, run.json and {result.figure}")


def show_evaluation(rows: list[dict[str, Any]]) -> None:
    """The probability change ratio of every method, all groups together."""
    for change in dict.fromkeys(row["change"] for row in rows):
        table = _narrow(f"{change.capitalize()}: relative change of the answer's probability, in %")
        for name in ("related", "unrelated", "PCR", "95 %", "abs.", "share", "beyond"):
            table.add_column(name, justify="right", no_wrap=True)
        for row in rows:
            if row["group"] == "all" and row["change"] == change:
                table.add_row(
                    row["method"],
                    _percent(row["related"]),
                    _percent(row["unrelated"]),
                    _ratio(row["pcr"]),
                    f"{_ratio(row['pcr_low'])} to {_ratio(row['pcr_high'])}",
                    _ratio(row["absolute_pcr"]),
                    formatted(row["share"], ".0%"),
                    _percent(row["beyond"]),
                )
        console.print(table)
    console.print(
        "Probability: of the whole answer. PCR: |related| / |unrelated|; abs.: of "
        "absolute changes, which cannot cancel. Share: what the "
        "neurons hold of the sum of all attributions (negative ones count, so it can exceed 100 %; "
        "scores below the run's threshold count 0). Beyond: related change less that of random "
        "neurons matched in layer and activation."
    )


def show_editing(rows: list[dict[str, Any]]) -> None:
    """Answers turned by every method, all groups together."""
    for turns in dict.fromkeys(row["turns"] for row in rows):
        here = [row for row in rows if row["turns"] == turns and row["group"] == "all"]
        if not here[0]["prompts"]:
            console.print(f"Answers turned {turns}: none could be.")
            continue
        title = f"Answers turned {turns} ({here[0]['change']}, of {here[0]['prompts']} prompts)"
        table = _narrow(title)
        for name in ("turned", "95 %", "by an unrelated query's"):
            table.add_column(name, justify="right", no_wrap=True)
        for row in here:
            table.add_row(
                row["method"],
                formatted(row["rate"], ".1%"),
                f"{formatted(row['rate_low'], '.1%')} to {formatted(row['rate_high'], '.1%')}",
                formatted(row["unrelated"], ".1%"),
            )
        console.print(table)


def _percent(value: float | None) -> str:
    return "" if value is None else f"{100 * value:+,.{2 if abs(value) < 0.01 else 1}f}"


def _ratio(value: float | None) -> str:
    return "" if value is None else f"{value:,.0f}" if value >= 10 else f"{value:.1f}"


def _narrow(title: str) -> Table:
    """A table of methods that fits 80 columns."""
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("method", no_wrap=True)
    return table


def show_prediction(rows: list[dict[str, Any]]) -> None:
    """Accuracy of reading answers off neurons, by group."""
    groups = list(dict.fromkeys(row["group"] for row in rows))
    kinds = list(dict.fromkeys((row["readout"], row["pool"]) for row in rows))
    across = [f"{readout}, {pool}" if pool else readout for readout, pool in kinds]
    cells = [
        [f"{r['accuracy']:.0%}" for r in rows if (r["readout"], r["pool"]) == kind]
        for kind in kinds
    ]
    down, corner = [shown_name(group) for group in groups], "group"
    if len(groups) <= GROUPS:
        across, down, corner = down, across, "readout, neurons"
    else:
        cells = list(zip(*cells, strict=True))
    table = Table(
        title="Right answers read off a group's neurons", title_justify="left", box=box.SIMPLE_HEAD
    )
    table.add_column(corner, no_wrap=True)
    for name in across:
        table.add_column(name, justify="right")
    for name, values in zip(down, cells, strict=True):
        table.add_row(name, *values)
    console.print(table)


def shown_name(text: str) -> str:
    """A name of at most `NAME` columns as the terminal shows it: escapes are wider than letters."""
    return shortened(console.shown(text), NAME)


def formatted(value: float | None, form: str) -> str:
    """A number, or nothing where it is missing."""
    return "" if value is None else format(value, form)
