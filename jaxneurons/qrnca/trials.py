"""Every query with its neurons changed, and another query with them: by each method, and controls.

The whole answer for each trial and prompt, on the keys and values of the prompt: those that
locating kept, else it is run once more. Finished batches are kept in the run directory.
"""

import time
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxneurons.engine.last_position import changes, scaled_answers
from jaxneurons.errors import DataError
from jaxneurons.neurons.sets import Neuron
from jaxneurons.prompts import batches
from jaxneurons.qrnca.baselines import MATCHED, METHODS, matched_neurons, method_sets
from jaxneurons.qrnca.method import run_prompts
from jaxneurons.qrnca.pcr import FACTORS, unrelated_queries
from jaxneurons.qrnca.prompt_cache import Caches, Prompts, prompts_of
from jaxneurons.qrnca.run import Progress, Run
from jaxneurons.storage.store import digest

OWN = "QRNCA"
SMALLEST = float(np.finfo(np.float32).tiny)
Sets = Mapping[str, Mapping[str, Sequence[Neuron]]]
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
    """What some prompts came to, as `evaluate.Answers` has it.

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
    sets: dict[str, dict[str, list[Neuron]]]
    other: dict[str, str]
    seconds: float


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
      progress: told how many prompts are done.

    Raises:
      DataError: one group only.
    """
    other = unrelated_queries(run.queries, seed)
    located = run.located
    sets = method_sets(
        located.prompts,
        located.neurons,
        [neuron for neuron, _ in located.common],
        layers=run.layers,
        width=run.width,
        settings=run.settings,
        seed=seed,
    )
    sets = {method: sets[method] for method in methods}
    sets |= {
        name: {q: list(dict.fromkeys(own)) for q, own in by_query.items()}
        for name, by_query in (extra or {}).items()
    }
    sources: dict[str, list[str]] = {query.id: [query.id] for query in run.queries}
    for query, unrelated in other.items():
        sources[unrelated].append(query)
    trials = {
        query: [
            Trial(method, change, source, matched)
            for method in sets
            for change in factors
            for source in range(len(own))
            for matched in (False, True)
            # One control for each set on its own query; on unrelated ones that of QRNCA's alone.
            if not matched or (method != "random" and source == 0) or method == OWN
        ]
        for query, own in sources.items()
    }
    # In order: it decides which row is whose, and which random neurons are drawn.
    named = [[m, {q: list(map(list, own)) for q, own in by.items()}] for m, by in sets.items()]
    key = digest([named, list(factors.items()), seed, sources, FORMAT])[:16]
    prompts, owners = run.located.encoded, run.owners()
    plan = batches.plan(prompts, run.batch_size)
    parts = [run.store.load(f"trials-{key}-{number:05d}") for number in range(len(plan))]
    missing = [(n, batch) for n, batch in enumerate(plan) if parts[n] is None]
    kept = Caches(run.path).ahead(missing)
    results: dict[int, dict[str, np.ndarray]] = {}
    seconds = 0.0
    for number, batch in enumerate(plan):
        part = parts[number]
        if part is None:
            start = time.perf_counter()
            part = _run_batch(
                run, next(kept), batch, owners, trials, sets, sources, dict(factors), seed
            )
            part["seconds"] = np.array(time.perf_counter() - start)
            run.store.save(f"trials-{key}-{number:05d}", part)
        seconds += float(part["seconds"])
        for row, index in enumerate(batch.index.tolist()):
            if index >= 0:
                count = 1 + len(trials[owners[index]])
                results[index] = {name: part[name][:count, row] for name in ("p", "right")}
        if progress is not None:
            progress(len(results), len(prompts))
    by_query: dict[str, list[dict[str, np.ndarray]]] = {}
    for index, owner in enumerate(owners):
        by_query.setdefault(owner, []).append(results[index])
    found = Outcomes({}, {}, {}, sets, other, seconds)
    for query, each in by_query.items():
        p = np.stack([one["p"] for one in each], axis=-1).astype(np.float64)
        right = np.stack([one["right"] for one in each], axis=-1)
        for number, trial in enumerate(trials[query], 1):
            outcome = Outcome(p[0], right[0], p[number], right[number])
            whose = sources[query][trial.source]
            if not trial.matched:
                where = found.unrelated if trial.source else found.related
                where[trial.method, trial.change, whose] = outcome
            elif not trial.source:
                found.matched[trial.method, trial.change, whose] = outcome
            if trial.matched and trial.method == OWN:  # the control as a method of its own
                where = found.unrelated if trial.source else found.related
                where[MATCHED, trial.change, whose] = outcome
    return found


FORMAT = 5
"""Of the parts; counts up when what is in them, or how it is computed, changes."""


def _run_batch(
    run: Run,
    kept: Prompts | None,
    batch: batches.Batch,
    owners: list[str],
    trials: dict[str, list[Trial]],
    sets: dict[str, dict[str, list[Neuron]]],
    sources: dict[str, list[str]],
    factors: dict[str, float],
    seed: int,
) -> dict[str, np.ndarray]:
    config, site = run.lm.config, run.settings.site
    if kept is None:
        pre = run_prompts(run.lm.params, batch, config=config, site=site)
        kept = prompts_of(pre, site=site, seq=batch.tokens.shape[1])
    active = np.abs(np.asarray(kept.active, np.float32)).swapaxes(0, 1)
    # The prompts of a batch may have different numbers of trials; the first is the untouched model.
    most = max(len(trials[owners[index]]) for index in batch.index.tolist() if index >= 0)
    changed: list[list[tuple[list[Neuron], float]]] = [
        [([], 1.0) for _ in batch.index] for _ in range(1 + most)
    ]
    for row, index in enumerate(batch.index.tolist()):
        if index < 0:
            continue
        rng = np.random.default_rng([seed, index])
        own = sources[owners[index]]
        matched: dict[tuple[str, int], list[Neuron]] = {}
        for place, trial in enumerate(trials[owners[index]], 1):
            method, change, source, is_matched = trial
            neurons = sets[method][own[source]]
            if is_matched:
                if (method, source) not in matched:  # the same ones for every change
                    matched[method, source] = matched_neurons(neurons, active[row], rng)
                neurons = matched[method, source]
            changed[place][row] = neurons, factors[change]
    found = jax.device_get(
        scaled_answers(
            run.lm.params,
            kept.last,
            changes(changed),
            config=config,
            site=site,
            options=jnp.asarray(batch.options),
        )
    )
    for row, index in enumerate(batch.index.tolist()):
        lost = np.flatnonzero(~np.isfinite(found.probability[:, row]))
        if index >= 0 and len(lost):
            place = int(lost[0])
            trial = trials[owners[index]][place - 1] if place else None
            what = (
                f"with {trial.method}'s neurons changed ({trial.change})" if trial else "untouched"
            )
            dtype = run.lm.params["embed"]["embedding"].dtype
            raise DataError(
                f"query {owners[index]!r}: the answer's probability {what} is not finite in "
                f"{dtype}; load the model in bfloat16 or float32"
            )
    right = found.first
    if batch.options.shape[1]:
        right = found.options.argmax(-1) == batch.answers_by_option.argmax(1)
    return {"p": found.probability, "right": right}
