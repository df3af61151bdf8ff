"""Every query with its neurons changed, and another query with them: by each method, and controls.

The whole answer for each trial and prompt, on the keys and values of the prompt: those that
locating kept, else it is run once more. Finished batches are kept in the run directory.
"""

import dataclasses
import functools
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from jaxneurons.engine.device_memory import prompts_here
from jaxneurons.engine.last_position import (
    Answers,
    Changes,
    changes,
    last_rows,
    scaled_answers,
)
from jaxneurons.engine.out_of_memory import ChunkSize
from jaxneurons.errors import ConfigError, DataError, near_matches
from jaxneurons.neurons.controls import activation_matched, generator
from jaxneurons.neurons.sets import NeuronSet, Ranking
from jaxneurons.processes.sharing import fetch, share_parts, spread
from jaxneurons.prompts import batches
from jaxneurons.qrnca.baselines import MATCHED, METHODS, method_sets
from jaxneurons.qrnca.method import run_prompts
from jaxneurons.qrnca.pcr import FACTORS, unrelated_queries
from jaxneurons.qrnca.prompt_cache import Caches, Prompts, joined, prompts_of
from jaxneurons.qrnca.run import Run
from jaxneurons.storage.progress import Progress
from jaxneurons.storage.store import digest

OWN = "QRNCA"
SMALLEST = float(np.finfo(np.float32).tiny)
UNTOUCHED = (NeuronSet(), 1.0)
"""No neurons, and their factor."""
FORMAT = 5
"""Of the parts; counts up when what is in them, or how it is computed, changes."""
Sets = Mapping[str, Mapping[str, NeuronSet]]
"""By method and query, neurons."""


class Trial(NamedTuple):
    """What is changed on a prompt.

    Attributes:
      method: whose neurons.
      change: how, of the factors.
      source: 0: those of the prompt's own query; 1, 2, ...: of the first, second, ... query that
        has the prompt's as its unrelated one.
      matched: not these neurons, but random ones matched in layer and activation on this prompt.
    """

    method: str
    change: str
    source: int
    matched: bool


class Outcome(NamedTuple):
    """What some prompts came to, as `Answers` has it.

    Attributes:
      before: probability of the whole answer, model untouched, [prompt].
      right_before: the answer is the most probable option; for a free answer, every token of it is
        the most probable one, [prompt].
      after: its probability, [prompt].
      right_after: whether it still is, [prompt].
    """

    before: np.ndarray
    right_before: np.ndarray
    after: np.ndarray
    right_after: np.ndarray

    @property
    def change(self) -> float:
        """Relative change of the probability, mean over the prompts.

        A probability that is 0 in float32 counts as its smallest number.
        """
        return float((self.after / np.maximum(self.before, SMALLEST) - 1).mean())


class Outcomes(NamedTuple):
    """All trials of a run.

    Attributes:
      related: by method, change and query: its own prompts with its neurons changed.
      unrelated: the prompts of its unrelated query with its neurons changed.
      matched: its own prompts with random neurons changed, matched to its own.
      sets: by method and query, the neurons.
      other: the unrelated query of each query.
      seconds: that the trials took, with prompts that were run again.
    """

    related: dict[tuple[str, str, str], Outcome]
    unrelated: dict[tuple[str, str, str], Outcome]
    matched: dict[tuple[str, str, str], Outcome]
    sets: dict[str, dict[str, NeuronSet]]
    other: dict[str, str]
    seconds: float


@dataclasses.dataclass(frozen=True)
class Plan:
    """What is changed on the prompts of each query.

    Attributes:
      rankings: by method and query, the neurons, in the order in which controls are drawn for them.
      factors: by change, what the neurons' activations are multiplied by.
      sources: by query, itself and the queries that have it as their unrelated one.
      seed: of the controls.
    """

    rankings: Mapping[str, Mapping[str, Ranking]]
    factors: Mapping[str, float]
    sources: Mapping[str, Sequence[str]]
    seed: int

    @functools.cached_property
    def trials(self) -> dict[str, list[Trial]]:
        """The trials on each query's prompts, in the order of the rows of a part."""
        return {
            query: [
                Trial(method, change, source, matched)
                for method in self.rankings
                for change in self.factors
                for source in range(len(sources))
                for matched in (False, True)
                # One control for each set on its own query; on unrelated ones that of QRNCA's
                # alone.
                if not matched or (method != "random" and source == 0) or method == OWN
            ]
            for query, sources in self.sources.items()
        }

    @functools.cached_property
    def key(self) -> str:
        """Names the parts. Everything in order: it decides which row is whose, and the controls."""
        named = [
            [method, {query: list(map(list, order.ranking)) for query, order in by_query.items()}]
            for method, by_query in self.rankings.items()
        ]
        sources = {query: list(names) for query, names in self.sources.items()}
        return digest([named, list(self.factors.items()), self.seed, sources, FORMAT])[:16]

    def changes(
        self, query: str, prompt: int, active: Mapping[str, np.ndarray]
    ) -> list[tuple[NeuronSet, float]]:
        """Neurons and factor of each trial on a prompt of a query; the first is no change.

        Args:
          query: whose prompt it is.
          prompt: its number in the run: the controls are drawn for it.
          active: |activation| there of every neuron, [layer, width] by site.
        """
        rng = generator(self.seed, prompt)
        controls: dict[tuple[str, int], NeuronSet] = {}
        by_trial = [UNTOUCHED]
        for method, change, source, matched in self.trials[query]:
            ranking = self.rankings[method][self.sources[query][source]]
            if not matched:
                neurons = ranking.neurons
            else:
                if (method, source) not in controls:  # the same ones for every change
                    controls[method, source] = activation_matched(ranking, active, rng)
                neurons = controls[method, source]
            by_trial.append((neurons, self.factors[change]))
        return by_trial


def run_trials(
    run: Run,
    *,
    methods: Sequence[str] = METHODS,
    extra: Sets | None = None,
    factors: Mapping[str, float] = FACTORS,
    seed: int = 0,
    progress: Progress | None = None,
) -> Outcomes:
    """Change the neurons that each method gives each query, on its prompts and another query's.

    Args:
      run: with its neurons.
      methods: of `METHODS`.
      extra: neurons of your own for every query, by a name of your own.
      factors: by name, what the neurons' activations are multiplied by.
      seed: of the unrelated queries and the random sets.
      progress: called with how many prompts are done, of how many.

    Raises:
      ConfigError: a method that is none.
      DataError: one group only; of neurons of your own: a query without them, neurons that the
        model does not have, or of another site than the run's.
    """
    other = unrelated_queries(run.queries, seed)
    sources: dict[str, list[str]] = {query.id: [query.id] for query in run.queries}
    for query, unrelated in other.items():
        sources[unrelated].append(query)
    plan = Plan(_rankings(run, methods, extra or {}, seed), dict(factors), sources, seed)
    planned = batches.plan(run.encoded, run.batch_size)
    parts = _parts(run, plan, planned, progress)
    sets = {
        method: {query: ranking.neurons for query, ranking in by_query.items()}
        for method, by_query in plan.rankings.items()
    }
    seconds = 0.0
    for part in parts:  # one after the other, as they were computed
        seconds += float(part["seconds"])
    outcomes = Outcomes({}, {}, {}, sets, other, seconds)
    for query, (p, right) in _by_query(run, plan, planned, parts).items():
        _assign(outcomes, plan, query, p, right)
    return outcomes


def _rankings(
    run: Run, methods: Sequence[str], extra: Sets, seed: int
) -> dict[str, dict[str, Ranking]]:
    """The neurons of each method, and of a user's sets in the order of layer and index."""
    site = run.settings.site
    common = NeuronSet.of(**{site: [neuron for neuron, _ in run.common]})
    known = method_sets(
        run.prompts,
        run,
        common,
        config=run.lm.config,
        settings=run.settings,
        seed=seed,
    )
    for method in methods:
        if method not in known:
            raise ConfigError(f"unknown method {method!r}; {near_matches(method, METHODS)}")
    rankings = {method: known[method] for method in methods}
    for name, by_query in extra.items():
        if missing := [query.id for query in run.queries if query.id not in by_query]:
            raise DataError(f"{name!r} has no neurons for query {missing[0]!r}")
        for neurons in by_query.values():
            neurons.check(run.lm.config)
            if set(neurons.codes) - {site}:
                raise DataError(
                    f"this run is of neurons at {site!r}, {name!r} has some at "
                    f"{', '.join(neurons.codes)}"
                )
        rankings[name] = {
            query: Ranking(tuple(neuron for _, neuron in neurons), site)
            for query, neurons in by_query.items()
        }
    return rankings


def _parts(
    run: Run, plan: Plan, planned: Sequence[batches.Batch], progress: Progress | None
) -> list[dict[str, np.ndarray]]:
    """The part of each batch: `p` and `right` [1 + trial, row], and `seconds`."""
    names = [f"trials-{plan.key}-{number:05d}" for number in range(len(planned))]
    caches = Caches(run.path)
    chunk = ChunkSize(max((len(batch.index) for batch in planned), default=1), what="prompts")
    share_parts(
        run.store,
        {
            name: functools.partial(
                _run_batch, run, plan, batch, caches.ahead([(number, batch)]), chunk
            )
            for number, (name, batch) in enumerate(zip(names, planned, strict=True))
        },
        together=spread(run.lm.params),
        sizes=batches.counts(planned),
        progress=progress,
    )
    # Prompts that were kept are read ahead of the batches that need them.
    missing = [
        (number, batch)
        for number, batch in enumerate(planned)
        if run.store.load(names[number]) is None
    ]
    kept = caches.ahead(missing)
    parts, done = [], 0
    for name, batch in zip(names, planned, strict=True):
        make = functools.partial(_run_batch, run, plan, batch, kept, chunk)
        parts.append(run.store.part(name, make))
        done += int((batch.index >= 0).sum())
        if progress is not None:
            progress(done, len(run.encoded))
    return parts


def _run_batch(
    run: Run,
    plan: Plan,
    batch: batches.Batch,
    kept: Iterator[Prompts | None],
    chunk: ChunkSize,
) -> dict[str, np.ndarray]:
    """The part of a batch, whose prompts are the next of `kept`."""
    start = time.perf_counter()
    prompts = next(kept)
    config, site = run.lm.config, run.settings.site
    count, tokens = batch.tokens.shape
    fit, parts = prompts_here(run.lm.params, config, prompts=count, tokens=tokens)
    if prompts is None:
        prompts = chunk.run(
            lambda size: joined(
                [
                    prompts_of(
                        run_prompts(
                            *(run.lm.params, batches.some(batch, first, first + size)),
                            config=config,
                            site=site,
                        ),
                        site=site,
                        seq=tokens,
                    )
                    for first in range(0, count, size)
                ]
            ),
            most=fit,
            least=parts,
        )
    active = np.abs(fetch(prompts.active).astype(np.float32)).swapaxes(0, 1)
    owners = run.owners()
    rows: list[list[tuple[NeuronSet, float]]] = [
        plan.changes(owners[index], index, {site: active[row]}) if index >= 0 else []
        for row, index in enumerate(batch.index.tolist())
    ]
    # The prompts of a batch may have different numbers of trials.
    by_trial = [
        [row[trial] if trial < len(row) else UNTOUCHED for row in rows]
        for trial in range(max(map(len, rows)))
    ]
    change = changes(by_trial, site=site)

    def of_rows(first: int, end: int) -> Answers:
        return scaled_answers(
            *(run.lm.params, last_rows(prompts.last, first, end)),
            Changes(*(array[:, first:end] for array in change)),
            config=config,
            site=site,
            options=jnp.asarray(batch.options[first:end]),
        )

    answers = fetch(chunk.run_rows(of_rows, count, axis=1, most=fit, parts=parts))
    _check_finite(run, plan, batch, answers)
    right = answers.first
    if batch.options.shape[1]:
        right = answers.options.argmax(-1) == batch.answers_by_option.argmax(1)
    return {
        "p": answers.probability,
        "right": right,
        "seconds": np.array(time.perf_counter() - start),
    }


def _check_finite(run: Run, plan: Plan, batch: batches.Batch, answers: Answers) -> None:
    """Raise `DataError` for the first prompt of a batch whose probability is not finite."""
    owners = run.owners()
    for row, index in enumerate(batch.index.tolist()):
        lost = np.flatnonzero(~np.isfinite(answers.probability[:, row]))
        if index < 0 or not len(lost):
            continue
        what = "untouched"
        if lost[0]:
            trial = plan.trials[owners[index]][int(lost[0]) - 1]
            what = f"with {trial.method}'s neurons changed ({trial.change})"
        raise DataError(
            f"query {owners[index]!r}: the answer's probability {what} is not finite in "
            f"{run.lm.params['embed']['embedding'].dtype}; load the model in bfloat16 or float32"
        )


def _by_query(
    run: Run,
    plan: Plan,
    planned: Sequence[batches.Batch],
    parts: Sequence[Mapping[str, np.ndarray]],
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """By query: probability and whether it is right, [1 + trial, prompt]."""
    owners = run.owners()
    by_prompt: dict[int, tuple[np.ndarray, np.ndarray]] = {}
    for batch, part in zip(planned, parts, strict=True):
        for row, index in enumerate(batch.index.tolist()):
            if index >= 0:
                count = 1 + len(plan.trials[owners[index]])
                by_prompt[index] = part["p"][:count, row], part["right"][:count, row]
    by_query: dict[str, list[tuple[np.ndarray, np.ndarray]]] = {}
    for index, owner in enumerate(owners):
        by_query.setdefault(owner, []).append(by_prompt[index])
    return {
        query: (
            np.stack([p for p, _ in prompts], axis=-1).astype(np.float64),
            np.stack([right for _, right in prompts], axis=-1),
        )
        for query, prompts in by_query.items()
    }


def _assign(outcomes: Outcomes, plan: Plan, query: str, p: np.ndarray, right: np.ndarray) -> None:
    """Put the trials on a query's prompts, [1 + trial, prompt], where they belong."""
    for number, trial in enumerate(plan.trials[query], 1):
        outcome = Outcome(p[0], right[0], p[number], right[number])
        key = trial.method, trial.change, plan.sources[query][trial.source]
        table = outcomes.unrelated if trial.source else outcomes.related
        if not trial.matched:
            table[key] = outcome
        elif not trial.source:
            outcomes.matched[key] = outcome
        if trial.matched and trial.method == OWN:  # the control as a method of its own
            table[MATCHED, trial.change, key[2]] = outcome
