"""What people see of a command: tables on standard output, progress on standard error.

Names come from files and people: they are shown as they are, on one line, in characters that the
terminal has (see `Plain`).
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

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
from rich.text import Text

from jaxneurons.processes.team import current
from jaxneurons.storage import progress as reports
from jaxneurons.storage.printable import encodable, printable, shortened
from jaxneurons.terminal.options import placement

if TYPE_CHECKING:
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


def warn(text: str) -> None:
    """Say on standard error what may be wrong: a terminal's lines end at words, a file has one."""
    if not current().first:  # of several processes that do the same, one says so
        return
    errors.print(f"warning: {text}", style="yellow", soft_wrap=not errors.is_terminal)


@contextmanager
def counting(what: str, unit: str = "prompts") -> Iterator[reports.Progress]:
    """A bar over things that are counted: call what it gives with (done, of)."""
    columns = (MofNCompleteColumn(), TextColumn(unit), TimeRemainingColumn())
    with _progress(*columns) as progress:
        task = progress.add_task(errors.shown(what), total=None)
        yield lambda done, total: progress.update(task, completed=done, total=total)


@contextmanager
def counting_bytes(what: str) -> Iterator[reports.Advance]:
    """A bar over bytes: call what it gives with those that have just passed."""
    with _progress(DownloadColumn(binary_units=True), TransferSpeedColumn()) as progress:
        task = progress.add_task(errors.shown(what), total=None)
        yield lambda count: progress.update(task, advance=count)


@contextmanager
def stages() -> Iterator[reports.StageProgress]:
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
    from jaxneurons.checkpoints.fetch import LAB
    from jaxneurons.checkpoints.loading import load

    here = source == LAB or Path(source).expanduser().exists()
    with errors.busy(f"Loading {source}{'' if here else ' (fetched once, then cached)'} ..."):
        lm = load(source, ignore_keys=ignore_keys or (), **placement())
    config = lm.config
    console.print(
        f"{lm.source}: {config.num_layers} layers, {config.neurons_per_layer} neurons each, "
        f"{config.vocab_size} tokens."
    )
    return lm


def _progress(*columns: ProgressColumn) -> Progress:
    # A log file needs no bar.
    shown = (TextColumn("{task.description}", markup=False), BarColumn(), *columns)
    return Progress(*shown, console=errors, disable=not errors.is_terminal or not current().first)


def gib(count: int) -> str:
    """A size for people."""
    return f"{count / 2**30:.2f} GiB" if count >= 2**28 else f"{count / 2**20:.1f} MiB"


def shown_name(text: str) -> str:
    """A name of at most `NAME` columns as the terminal shows it: escapes are wider than letters."""
    return shortened(console.shown(text), NAME)


def formatted(value: float | None, form: str) -> str:
    """A number, or nothing where it is missing."""
    return "" if value is None else format(value, form)
