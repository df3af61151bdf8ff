"""Edits one after the other on one model: what is left of the first, the last and all of them.

Published methods are mostly shown with one edit at a time; after hundreds, many models say nothing
any more. Measured after 1, 10, 100 and 1,000 edits, say, against the model before the first.
"""

import dataclasses
import functools
import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from jaxneurons.checkpoints.loading import LM
from jaxneurons.edit.cases import Case, MeasureSettings, answer_width, askable, labels_of
from jaxneurons.edit.changes import apply
from jaxneurons.edit.controls import turned_at_random
from jaxneurons.edit.evaluation import (
    check_methods,
    checked_out,
    covariance_identity,
    neutral_texts,
    opened,
    request_identity,
    require_covariance,
    write_results,
)
from jaxneurons.edit.measures import edits_at_once, run_cases
from jaxneurons.edit.method import Edit, Settings
from jaxneurons.edit.outcomes import Outcome, measured_row
from jaxneurons.edit.requests import EditRequest
from jaxneurons.edit.sequential_state import EditedModel, done_in, from_arrays, to_arrays
from jaxneurons.edit.summaries import RANDOM, UNEDITED, summary_rows
from jaxneurons.edit.trials import described, for_requests
from jaxneurons.engine.bootstrap import DRAWS
from jaxneurons.errors import DataError
from jaxneurons.model.axis_types import any_axes
from jaxneurons.model.parameters import Params
from jaxneurons.neurons.controls import generator
from jaxneurons.processes.sharing import Unit, share_units, spread
from jaxneurons.storage.printable import counted
from jaxneurons.storage.progress import Progress
from jaxneurons.storage.settings import check_argument, check_number
from jaxneurons.storage.store import Parts, digest
from jaxneurons.storage.tables import Row, Tables

SIZES = (1, 10, 100, 1000)
GROUPS = ("first", "last", "all")
CONTROLS = ("", RANDOM)
COLUMNS = ("method", "control", "edits", "group")
KEEP = 10.0
"""Seconds of editing after which the edited model is kept; it is also kept at every size."""
FORMAT, KIND = 2, "sequential"


@any_axes
def evaluate_sequential(
    lm: LM,
    requests: Sequence[EditRequest],
    methods: Mapping[str, Settings] | Settings,
    *,
    sizes: Sequence[int] = SIZES,
    batch: int = 1,
    ends: int = 10,
    sample: int = 50,
    covariance: Mapping[int, Any] | None = None,
    measures: MeasureSettings | None = None,
    texts: Sequence[str] | None = None,
    seed: int = 0,
    out: str | os.PathLike[str] | None = None,
    progress: Progress | None = None,
) -> Tables:
    """Edit one model request after request, and measure it at some sizes.

    Beside every method stands its control: all that its edits changed so far, turned at random.

    Args:
      lm: the model; each method begins with it as it is.
      requests: in the order in which they are edited.
      methods: settings by a name of yours, or those of one method.
      sizes: numbers of edits after which the model is measured; those that are more than there are
        requests are left out, and said.
      batch: requests that are edited together; fewer where a size comes before.
      ends: how many of the first and of the last edits are measured.
      sample: how many of all edits so far are, drawn at random.
      covariance: of keys by layer, of the model before the first edit.
      measures: what is measured.
      texts: neutral ones for perplexity; default: held-out texts that ship with the package.
      seed: of the sample, of controls and of resamples.
      out: a directory to write to and to go on in; default: none.
      progress: called with how many edits are done, of how many.

    Returns:
      `sequential`: for each method, `control` ("" or "random"), number of `edits` and group of
      requests ("first", "last", "all"), means of all measures with 95 % intervals (bootstrap over
      the group's requests), all against the unedited model; 0 edits are that model. `edits`: a row
      for each request measured.
      `facts` says which requests were left out, and why.

    Raises:
      ConfigError: arguments of the wrong kind.
      DataError: fewer requests than the smallest size; a directory of another evaluation.
      WriteError: `out` cannot be written to.
    """
    measures = measures or MeasureSettings()
    if isinstance(methods, Settings):
        methods = {type(methods).__name__: methods}
    check_methods(lm, requests, methods, seed, progress)
    require_covariance(lm, methods, covariance)
    for name, number in (("batch", batch), ("ends", ends), ("sample", sample)):
        check_number(name, number, least=1)
    check_argument("sizes", Sequence[int], sizes)
    if texts is None:
        texts = neutral_texts(lm) if measures.perplexity_tokens else ()
    cases, numbers, left_out = askable(lm, requests, measures)
    kept, left_out_sizes = fitting_sizes(sizes, len(cases))
    path = checked_out(out)
    identity = {
        **lm.identity(),
        **request_identity(requests, measures),
        "texts": digest(list(texts)),
        "covariance": covariance_identity(covariance),
        **{"sizes": kept, "batch": batch, "ends": ends, "sample": sample, "seed": seed},
        **{"format": FORMAT, "kind": KIND},
    }
    plan = _Plan(
        lm=lm,
        cases=cases,
        numbers=numbers,
        labels=[labels_of(requests)[number] for number in numbers],
        sizes=tuple(kept),
        batch=batch,
        ends=ends,
        sample=sample,
        covariance=covariance,
        measures=measures,
        texts=tuple(texts) if measures.perplexity_tokens else (),
        seed=seed,
        store=opened(path, identity),
        unedited={},
    )
    _share(plan, methods, progress)
    seconds: dict[str, dict[str, float]] = {}
    rows: list[Row] = []
    for position, (name, settings) in enumerate(methods.items()):
        started = time.perf_counter()
        report = _reporting(progress, position, len(methods), kept[-1])
        of_method, refused = _Method(plan, name, settings).run(report)
        rows += of_method
        left_out += [{**entry, "method": name} for entry in refused]
        seconds[name] = {"all": round(time.perf_counter() - started, 3)}
    results = {
        "identity": identity,
        "methods": {name: described(settings) for name, settings in methods.items()},
        "sizes_left_out": left_out_sizes,
        "left_out": left_out,
        "bootstrap_draws": DRAWS,
    }
    rows = [*plan.unedited_rows(), *rows]
    tables = {"sequential": summary_rows(rows, COLUMNS, seed=seed), "edits": rows}
    return write_results(lm, tables, results, seconds, path, name="sequential")


def _share(plan: "_Plan", methods: Mapping[str, Settings], progress: Progress | None) -> None:
    """Leave to each of several processes some of the methods."""
    runs = [_Method(plan, name, settings) for name, settings in methods.items()]
    report = _reporting(progress, 0, len(runs), plan.sizes[-1])
    units = [Unit(run.names, functools.partial(run.run, report)) for run in runs]
    share_units(plan.store, units, together=spread(plan.lm.params))


def fitting_sizes(sizes: Sequence[int], count: int) -> tuple[list[int], list[int]]:
    """Sizes that so many requests reach, ascending, and those that are left out.

    Raises:
      DataError: they reach none.
    """
    kept = sorted({size for size in sizes if 0 < size <= count})
    if not kept:
        raise DataError(
            f"{counted(count, 'request')}, fewer than the smallest of the sizes {list(sizes)}; "
            "give more requests or smaller sizes"
        )
    return kept, sorted(set(sizes) - set(kept))


def _reporting(
    progress: Progress | None, position: int, methods: int, most: int
) -> Callable[[int], None]:
    def report(done: int) -> None:
        if progress is not None:
            progress(position * most + done, methods * most)

    return report


@dataclasses.dataclass(frozen=True, eq=False)
class _Plan:
    """What is measured of every method; arguments as of `evaluate_sequential`."""

    lm: LM
    cases: list[Case]
    numbers: list[int]
    labels: list[str]
    sizes: tuple[int, ...]
    batch: int
    ends: int
    sample: int
    covariance: Mapping[int, Any] | None
    measures: MeasureSettings
    texts: tuple[str, ...]
    seed: int
    store: Parts
    unedited: dict[int, Outcome]

    @property
    def stops(self) -> list[int]:
        """Numbers of edits after each batch: none goes beyond a size."""
        stops, done = [], 0
        for size in self.sizes:
            while done < size:
                done = min(done + self.batch, size)
                stops.append(done)
        return stops

    def groups(self, edited: Sequence[int]) -> dict[str, list[int]]:
        """Which of the edits so far are measured, by group."""
        count = len(edited)
        rng = generator(self.seed, "sequential", count)
        drawn = rng.choice(count, size=min(self.sample, count), replace=False)
        chosen = [edited[i] for i in sorted(drawn.tolist())]
        return {"first": [*edited[: self.ends]], "last": [*edited[-self.ends :]], "all": chosen}

    def run_cases(self, lm: LM, index: Sequence[int]) -> list[Outcome]:
        """What a model makes of some cases."""
        width = answer_width(self.cases)
        cases = [self.cases[i] for i in index]
        return run_cases(lm, cases, settings=self.measures, texts=self.texts, width=width)

    def before(self, index: Sequence[int]) -> list[Outcome]:
        """What the unedited model makes of some cases: once, for all methods and sizes.

        In batches that do not depend on what has been asked before: rounding would.
        """
        planned = sorted(
            {
                i
                for size in self.sizes
                for members in self.groups(range(size)).values()
                for i in members
            }
        )
        most = self.measures.batch or edits_at_once(self.lm.config)
        batches = [planned[start : start + most] for start in range(0, len(planned), most)]
        others = [[i] for i in index if i not in planned]  # in place of those that were refused
        for batch in (*batches, *others):
            if not self.unedited.keys() >= set(batch) and set(batch) & set(index):
                self.unedited.update(zip(batch, self.run_cases(self.lm, batch), strict=True))
        return [self.unedited[i] for i in index]

    def rows(
        self, name: str, control: str, edits: int, edited: Sequence[int], params: Params
    ) -> list[Row]:
        """A row for each group's requests with these parameters."""
        if not edited:
            return []
        groups = self.groups(edited)
        index = sorted({i for members in groups.values() for i in members})
        before = self.before(index)
        untouched = params is self.lm.params
        lm = dataclasses.replace(self.lm, params=params)
        after = before if untouched else self.run_cases(lm, index)
        measured = {
            i: measured_row(self.cases[i], *pair)
            for i, *pair in zip(index, after, before, strict=True)
        }
        return [
            {"method": name, "control": control, "edits": edits, "group": group}
            | {"request": self.labels[i], **measured[i]}
            for group, members in groups.items()
            for i in members
        ]

    def unedited_rows(self) -> list[Row]:
        """The model before the first edit, on the requests of the largest size."""
        return self.rows(UNEDITED, "", 0, range(self.sizes[-1]), self.lm.params)


class _Method:
    """One method's edits, one after the other."""

    def __init__(self, plan: _Plan, name: str, settings: Settings):
        self.plan, self.name, self.settings = plan, name, settings
        self.key = digest([name, described(settings)])[:16]

    def run(self, report: Callable[[int], None]) -> tuple[list[Row], list[Row]]:
        """Rows at every size, and the requests that were refused."""
        plan = self.plan
        kept = {size: self._kept(size) for size in plan.sizes}
        if any(content is None for content in kept.values()):
            state = self._resumed(min(size for size in plan.sizes if kept[size] is None))
            saved = time.monotonic()
            for number, stop in enumerate(plan.stops):
                if state.done < stop:
                    state = self._edited(state, stop)
                    if stop in plan.sizes or time.monotonic() - saved >= KEEP:
                        self._keep(state, number)
                        saved = time.monotonic()
                if stop in kept and kept[stop] is None:
                    self._measure(state, stop)
                    kept[stop] = self._kept(stop)
                report(stop)
        report(plan.sizes[-1])
        contents = [content for content in kept.values() if content is not None]
        rows = [row for content in contents for part in content for row in part["rows"]]
        return rows, contents[-1][0]["refused"]

    def _kept(self, size: int) -> list[dict[str, Any]] | None:
        """Rows of the method and of its control at a size, unless they are not all there."""
        parts = [self.plan.store.load(self._size(size, control)) for control in CONTROLS]
        if any(part is None for part in parts):
            return None
        return [json.loads(str(part["json"])) for part in parts if part is not None]

    def _measure(self, state: EditedModel, size: int) -> None:
        """Measure the edited model, and its control."""
        plan = self.plan
        for control in CONTROLS:
            params = state.params
            if control and params is not plan.lm.params:
                rng = generator(plan.seed, "sequential control", self.name, size)
                params = turned_at_random(plan.lm.params, params, rng)
            rows = plan.rows(self.name, control, size, state.edited, params)
            content = json.dumps({"rows": rows, "refused": list(state.refused)})
            plan.store.save(self._size(size, control), {"json": np.array(content)})

    @property
    def names(self) -> tuple[str, ...]:
        """The parts that hold its rows."""
        return tuple(self._size(size, control) for size in self.plan.sizes for control in CONTROLS)

    def _size(self, size: int, control: str) -> str:
        return f"{self.key}-size-{size:06d}{'-' if control else ''}{control}"

    def _edited(self, state: EditedModel, stop: int) -> EditedModel:
        """The model with the requests up to some number edited together."""
        index = list(range(state.done, stop))
        try:
            return self._written(state, index, self._edit(state, index))
        except DataError as error:
            if len(index) == 1:
                return self._skipped(state, stop, str(error))
        for i in index:  # the others without the bad one
            try:
                state = self._written(state, [i], self._edit(state, [i]))
            except DataError as error:
                state = self._skipped(state, i + 1, str(error))
        return state

    def _edit(self, state: EditedModel, index: Sequence[int]) -> Edit:
        from jaxneurons.edit import editing

        plan = self.plan
        return editing.edit(
            state.params,
            [plan.cases[i].request for i in index],
            config=plan.lm.config,
            tokenizer=plan.lm.tokenizer,
            settings=for_requests(self.settings, [plan.numbers[i] for i in index]),
            covariance=plan.covariance,
            earlier=state.keys or None,
        )

    def _written(self, state: EditedModel, index: Sequence[int], edit: Edit) -> EditedModel:
        params = apply(state.params, edit.changes, config=self.plan.lm.config)
        return dataclasses.replace(
            state,
            params=params,
            done=index[-1] + 1,
            edited=(*state.edited, *index),
            keys=edit.keys,
        )

    def _skipped(self, state: EditedModel, done: int, reason: str) -> EditedModel:
        row = {"request": self.plan.labels[done - 1], "reason": reason}
        return dataclasses.replace(state, done=done, refused=(*state.refused, row))

    def _state(self, number: int) -> str:
        return f"{self.key}-state-{number % 2}"

    def _keep(self, state: EditedModel, number: int) -> None:
        """Keep what differs from the unedited model; the state before stays until this is whole."""
        arrays = to_arrays(state, self.plan.lm.params)
        self.plan.store.save(self._state(number), arrays)

    def _resumed(self, first: int) -> EditedModel:
        """The furthest state that was kept, if it is not beyond the first size not measured."""
        base = self.plan.lm.params
        kept = [self.plan.store.load(self._state(parity)) for parity in (0, 1)]
        usable = [arrays for arrays in kept if arrays is not None and done_in(arrays) <= first]
        if not usable:
            return EditedModel(base, 0, (), (), {})
        return from_arrays(max(usable, key=done_in), base)
