"""Requests edited by one method after the other, each alone, and measured: what is kept of it.

A chunk of requests is edited and measured side by side. Its rows are parts of a run directory: what
is there is not made again, and a chunk that is there in part is made whole, so that a number never
depends on where a run was stopped.
"""

import dataclasses
import json
import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jaxneurons.checkpoints.loading import LM
from jaxneurons.edit.cases import Case, MeasureSettings
from jaxneurons.edit.changes import Change
from jaxneurons.edit.controls import change_norm, random_changes
from jaxneurons.edit.measures import run_cases
from jaxneurons.edit.method import (
    MEMIT,
    ROME,
    AlphaEdit,
    Edit,
    KnowledgeNeurons,
    LearnedNeurons,
    Settings,
)
from jaxneurons.edit.outcomes import Outcome, answer_rows, measured_row
from jaxneurons.edit.requests import EditRequest
from jaxneurons.edit.summaries import RANDOM, UNEDITED
from jaxneurons.errors import DataError
from jaxneurons.neurons.controls import generator
from jaxneurons.neurons.sets import NeuronSet
from jaxneurons.storage.store import Parts, digest
from jaxneurons.storage.tables import Row


@dataclasses.dataclass(frozen=True, eq=False)
class Work:
    """What an evaluation works on.

    Attributes:
      lm: the model.
      cases: of the requests that can be asked.
      numbers: of each case, which request it is.
      labels: of each request: its id, or its number.
      left_out: requests that cannot be asked, with the reason.
      covariance: as of `evaluate`.
      measures: as of `evaluate`.
      texts: neutral ones.
      seed: of the controls.
      width: of answers in tokens.
      identity: what parts depend on.
      store: finished parts.
      seconds: by method, those of editing and those of measuring, in this process.
    """

    lm: LM
    cases: list[Case]
    numbers: list[int]
    labels: list[str]
    left_out: list[Row]
    covariance: Mapping[int, Any] | None
    measures: MeasureSettings
    texts: tuple[str, ...]
    seed: int
    width: int
    identity: dict[str, Any]
    store: Parts
    seconds: dict[str, Any]

    def run_cases(
        self, cases: Sequence[Case], changes: Sequence[Sequence[Change]] | None = None
    ) -> list[Outcome]:
        """`measures.run_cases` with the settings of this evaluation."""
        return run_cases(
            self.lm,
            cases,
            changes,
            settings=self.measures,
            texts=self.texts if self.measures.perplexity_tokens else (),
            width=self.width,
        )


class Chunk:
    """Requests that are edited and measured side by side; the same whatever was kept before."""

    def __init__(self, work: Work, index: Sequence[int]):
        self.work, self.index = work, list(index)
        self.cases = [work.cases[i] for i in index]
        self._unedited: list[Outcome] | None = None
        self._values: dict[Any, Any] = {}

    @property
    def unedited(self) -> list[Outcome]:
        """What the untouched model makes of the requests: once, for all methods."""
        if self._unedited is None:
            started = time.perf_counter()
            self._unedited = self.work.run_cases(self.cases)
            _add_seconds(self.work, UNEDITED, "measuring", started)
        return self._unedited

    def keep_unedited(self) -> None:
        """Keep the rows of the untouched model, unless they are there."""
        names = [part_of(self.work, UNEDITED, None, "", i) for i in self.index]
        if any(self.work.store.load(name) is None for name in names):
            self._keep(names, self.unedited, [{}] * len(names))

    def run(self, name: str, settings: Settings) -> None:
        """Edit with a method, and with its control, unless all of it is there."""
        names = {
            control: [part_of(self.work, name, settings, control, i) for i in self.index]
            for control in ("", RANDOM)
        }
        store = self.work.store
        if all(store.load(part) is not None for parts in names.values() for part in parts):
            return
        self.keep_unedited()
        started = time.perf_counter()
        edits = self._edits(settings, [self.work.numbers[i] for i in self.index])
        started = _add_seconds(self.work, name, "editing", started)
        self._measure(names[""], edits)
        started = _add_seconds(self.work, name, "measuring", started)
        self._measure(names[RANDOM], self._control(name, settings, edits))
        _add_seconds(self.work, name, "control", started)

    def _edits(self, settings: Settings, numbers: Sequence[int]) -> list[Edit | str]:
        """An edit for each request, or why there is none."""
        requests = [case.request for case in self.cases]
        try:
            return list(self._edit_each(requests, for_requests(settings, numbers)))
        except DataError:
            edits: list[Edit | str] = []
        for request, number in zip(requests, numbers, strict=True):
            try:
                edits += self._edit_each([request], for_requests(settings, [number]), alone=True)
            except DataError as error:
                edits.append(str(error))
        return edits

    def _edit_each(
        self, requests: Sequence[EditRequest], settings: Settings, *, alone: bool = False
    ) -> list[Edit]:
        from jaxneurons.edit import editing

        lm, given = self.work.lm, {}
        common = {"config": lm.config, "tokenizer": lm.tokenizer, "settings": settings}
        if isinstance(settings, ROME | MEMIT | AlphaEdit) and not alone:
            # Methods that optimise the same thing share it.
            where = settings.layer if isinstance(settings, ROME) else settings.layers
            key = (isinstance(settings, ROME), where, settings.optimisation)
            if key not in self._values:
                self._values[key] = editing.values_of(lm.params, requests, **common)
            given["values"] = self._values[key]
        return editing.edit_each(
            lm.params, requests, covariance=self.work.covariance, **common, **given
        )

    def _control(
        self, name: str, settings: Settings, edits: Sequence[Edit | str]
    ) -> list[Edit | str]:
        """The same edits in random directions, or with random neurons."""
        lm, labels = self.work.lm, [self.work.labels[self.work.numbers[i]] for i in self.index]
        draws = [generator(self.work.seed, "control", name, label) for label in labels]
        if isinstance(settings, KnowledgeNeurons | LearnedNeurons):
            numbers = [self.work.numbers[i] for i in self.index]
            sets = for_requests(settings, numbers).neurons
            sets = sets if isinstance(sets, tuple) else (sets,) * len(draws)
            try:
                random = tuple(
                    members.random_like(lm.config, rng)
                    for members, rng in zip(sets, draws, strict=True)
                )
            except DataError as error:
                return [str(error)] * len(edits)
            return self._edits(
                dataclasses.replace(settings, neurons=random), range(len(self.index))
            )
        return [
            edit
            if isinstance(edit, str)
            else dataclasses.replace(
                edit,
                changes=random_changes(lm.params, edit.changes, rng, config=lm.config),
                trace=None,
            )
            for edit, rng in zip(edits, draws, strict=True)
        ]

    def _measure(self, names: Sequence[str], edits: Sequence[Edit | str]) -> None:
        made = [n for n, edit in enumerate(edits) if isinstance(edit, Edit)]
        changes = [edit.changes for edit in edits if isinstance(edit, Edit)]
        outcomes = self.work.run_cases([self.cases[n] for n in made], changes) if made else []
        about = [
            _about(self.work.lm, edit) if isinstance(edit, Edit) else {"refused": edit}
            for edit in edits
        ]
        everything: list[Outcome | None] = [None] * len(edits)
        for n, outcome in zip(made, outcomes, strict=True):
            everything[n] = outcome
        self._keep(names, everything, about)

    def _keep(
        self, names: Sequence[str], outcomes: Sequence[Outcome | None], about: Sequence[Row]
    ) -> None:
        for n, (name, outcome) in enumerate(zip(names, outcomes, strict=True)):
            row, answers = dict(about[n]), []
            if outcome is not None:
                row |= measured_row(self.cases[n], outcome, self.unedited[n])
                answers = answer_rows(self.cases[n], outcome)
            content = {"row": json.dumps(row), "answers": json.dumps(answers)}
            self.work.store.save(name, {key: np.array(text) for key, text in content.items()})


def for_requests(settings: Settings, numbers: Sequence[int]) -> Any:
    """Settings for some requests, of whose numbers a tuple of sets of neurons keeps its own."""
    sets = getattr(settings, "neurons", None)
    if not isinstance(sets, tuple):
        return settings
    chosen: Any = {"neurons": tuple(sets[number] for number in numbers)}
    return dataclasses.replace(settings, **chosen)


def _about(lm: LM, edit: Edit) -> Row:
    """What a row says of an edit itself."""
    trace = edit.trace
    return {
        "norm": change_norm(lm.params, edit.changes),
        "reached": None if trace is None else float(np.all(trace.reached)),
        "steps": None if trace is None else int(np.max(trace.steps)),
    }


def part_of(work: Work, name: str, settings: Settings | None, control: str, index: int) -> str:
    """The name of the part that holds the row of a case."""
    what = [name, None if settings is None else described(settings), control]
    return f"{digest(what)[:16]}-{work.numbers[index]:05d}"


def _add_seconds(work: Work, name: str, what: str, started: float) -> float:
    now = time.perf_counter()
    seconds = work.seconds.setdefault(name, {})
    seconds[what] = round(seconds.get(what, 0.0) + now - started, 3)
    return now


def described(settings: Settings) -> dict[str, Any]:
    """Settings as JSON; sets of neurons by their hash."""
    fields: dict[str, Any] = {"method": type(settings).__name__}
    for field in dataclasses.fields(settings):
        value = getattr(settings, field.name)
        if isinstance(value, NeuronSet):
            value = value.digest
        elif isinstance(value, tuple) and any(isinstance(entry, NeuronSet) for entry in value):
            value = [entry.digest for entry in value]
        elif dataclasses.is_dataclass(value) and not isinstance(value, type):
            value = dataclasses.asdict(value)
        fields[field.name] = value
    return json.loads(json.dumps(fields))
