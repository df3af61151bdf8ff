"""Answering new questions from the activity of a domain's neurons alone.

Section "applications" of arXiv 2406.10868, whose protocol is not in the paper's text; this is ours:

1. The queries of each group are dealt into two halves. QRNCA's scores of one half (clusters, ica,
   common neurons) give the group's pool of neurons; the other half is read, and the reverse.
2. Each option is read off the pool, and the highest is the answer:

   - `presented`: the option's letter is put after the prompt; the pool's mean activation there.
   - `signed`: the same, each neuron counted with the sign that it had for right answers in the half
     it was located in (mean at the right letter less mean at the others).
   - `direct`: the letter is not put; what the pool adds to the letter's logit at the last prompt
     position through the norms that it passes (weights, and the post norm's divisor there, where
     there is one) and the unembedding.

   A letter that the tokenizer splits (a space, then the letter) is read at its own token, the space
   belonging to the prompt.

3. Beside it: the pool of another group, random neurons of the same layers, what the whole model
   answers (`prompting`), and chance.
"""

import functools
import itertools
import operator
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxneurons.engine import bootstrap
from jaxneurons.engine.readout import INNER
from jaxneurons.engine.rows import prefill
from jaxneurons.errors import DataError
from jaxneurons.model import layers
from jaxneurons.model.config import ModelConfig
from jaxneurons.model.transformer import Params, forward
from jaxneurons.neurons.controls import generator, layer_matched_at_most
from jaxneurons.neurons.sets import NeuronSet, Site
from jaxneurons.processes.sharing import fetch, share_parts, spread
from jaxneurons.prompts import batches
from jaxneurons.prompts.answers import past_shared_tokens
from jaxneurons.qrnca import method as qrnca
from jaxneurons.qrnca.encoding import NO_GROUP
from jaxneurons.qrnca.run import Run
from jaxneurons.storage.progress import Progress
from jaxneurons.storage.store import digest
from jaxneurons.storage.tables import Row

Chosen = dict[tuple[str, int], dict[str, NeuronSet]]
"""By group and half of its queries, the pools that their answers are read off."""
READOUTS = ("presented", "signed", "direct")
HALVES = 2
FORMAT = 2
"""Of the parts; counts up when what is in them, or how it is computed, changes."""


@functools.partial(jax.jit, static_argnames=("config", "site"))
def _read(
    params: Params,
    batch: batches.Batch,
    where: jax.Array | np.ndarray,
    *,
    config: ModelConfig,
    site: Site,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Option log-probabilities [row, option]; activations, contributions [row, option, neuron]."""
    pre = prefill(
        params,
        jnp.pad(jnp.asarray(batch.tokens), ((0, 0), (0, 1))),  # the cache needs room for the letter
        jnp.asarray(batch.targets),
        config=config,
        lengths=jnp.asarray(batch.lengths),
        capture=("act", "down"),
    )
    cache = pre.cache._replace(length=jnp.asarray(batch.lengths))
    layer, index = where[..., 0], where[..., 1]  # [row, neuron]
    row = jnp.arange(len(where))[:, None]

    def present(token: jax.Array) -> jax.Array:
        out = forward(params, token[:, None], config=config, cache=cache, capture=(site,))
        return out.activations[site][layer, row, 0, index]

    options = jnp.asarray(batch.options[..., 0])
    seen = jax.lax.map(present, options.T).swapaxes(0, 1)
    act = pre.captured["act"][layer, row, 0, index]
    written = params["layers"]["ffn"]["down"]["kernel"][layer, index] * act[..., None]
    if config.post_norms:
        weight = layers.norm_weight(params["layers"]["ffn_post_norm"], config)
        square = jnp.square(pre.captured["down"][:, :, 0].astype(jnp.float32)).mean(-1)
        size = jnp.sqrt(square + config.norm_eps)[layer, row]
        written = written * weight[layer] / size[..., None].astype(written.dtype)
    written = written * layers.norm_weight(params["final_norm"], config)
    if config.tied:
        unembedding = params["embed"]["embedding"][options]
    else:
        unembedding = jnp.moveaxis(params["unembed"]["kernel"][:, options], 0, -1)
    added = jnp.einsum("rnh,roh->ron", written, unembedding)
    chance = jnp.take_along_axis(jax.nn.log_softmax(pre.logits[:, 0]), options, axis=-1)
    return chance, seen, added


def halves(groups: Mapping[str, Sequence[str]], seed: int = 0) -> dict[str, int]:
    """The half of each query: every group dealt out evenly, in random order.

    Raises:
      DataError: a group of one query.
    """
    rng = generator(seed)
    half = {}
    for group, members in groups.items():
        if len(members) < HALVES:
            raise DataError(
                f"group {group!r} has {len(members)} query: one half locates, the other is read"
            )
        for place, i in enumerate(rng.permutation(len(members)).tolist()):
            half[members[i]] = place % HALVES
    return half


def pools(run: Run, half: Mapping[str, int], located_in: int) -> dict[str, NeuronSet]:
    """The neurons of each group from the queries of one half alone."""
    clusters = {
        name: qrnca.merge(scores, run.settings)
        for name, scores in run.prompts.items()
        if half[name] == located_in
    }
    neurons, _ = qrnca.rank(clusters, width=run.width, settings=run.settings)
    return {
        group: _union(neurons[query].neurons for query in members if query in neurons)
        for group, members in run.groups.items()
    }


def predict(run: Run, *, seed: int = 0, progress: Progress | None = None) -> list[Row]:
    """Accuracy of reading the answer off a group's neurons, beside controls.

    A row for each group (and all), readout and pool: `neurons` in the pool, `prompts`, `accuracy`
    with its interval (bootstrap over queries). Readouts `prompting` and `chance` have no pool.

    Args:
      run: of multi-choice queries, neurons of a feed-forward site.
      seed: of halves and random neurons.
      progress: called with how many prompts are done, of how many.

    Raises:
      DataError: queries without options, one group only, or a group of one query.
    """
    if run.settings.site not in INNER:
        raise DataError(f"prediction needs neurons of {', '.join(INNER)}, not {run.settings.site}")
    free = [query.id for query in run.queries if not all(query.options)]
    if free:
        raise DataError(
            f"query {free[0]!r} has no options: prediction chooses one, so multi-choice queries "
            "are needed (`jaxneurons qrnca questions` makes them)"
        )
    if len(run.groups) < 2:
        raise DataError("one group only: prediction is compared with another group's neurons")
    half = halves(run.groups, seed)
    chosen = _pools_and_controls(run, half, seed)
    union = {
        group: _union(pool for number in range(HALVES) for pool in chosen[group, number].values())
        for group in run.groups
    }
    values = _collect(run, union, seed, progress)
    return _rows(run, _scores(run, chosen, union, values, half), seed)


def _union(sets: Iterable[NeuronSet]) -> NeuronSet:
    return functools.reduce(operator.or_, sets, NeuronSet())


def _pools_and_controls(run: Run, half: Mapping[str, int], seed: int) -> Chosen:
    """The pools of each group's queries in each half, from the other half."""
    rng = generator(seed)
    names = list(run.groups)
    chosen: Chosen = {}
    for number in range(HALVES):
        located = pools(run, half, (number + 1) % HALVES)
        for place, group in enumerate(names):
            chosen[group, number] = {
                "own": located[group],
                "another group's": located[names[(place + 1) % len(names)]],
                "random": layer_matched_at_most(located[group], run.lm.config, rng),
            }
    return chosen


def _collect(
    run: Run, union: Mapping[str, NeuronSet], seed: int, progress: Progress | None
) -> list[dict[str, np.ndarray]]:
    """For each prompt: option chances, and activations and contributions of its group's neurons."""
    prompts = [past_shared_tokens(prompt) for prompt in run.encoded]
    group_of = {query.id: query.group for query in run.queries}
    groups = [group_of[query] for query in run.owners()]
    pairs = {group: neurons.pairs(run.settings.site) for group, neurons in union.items()}
    key = digest([{group: table.tolist() for group, table in pairs.items()}, seed, FORMAT])[:16]
    values: list[dict[str, np.ndarray]] = [{} for _ in prompts]
    planned = batches.plan(prompts, run.batch_size)
    jobs = {
        f"predict-{key}-{number:05d}": functools.partial(_read_batch, run, batch, groups, pairs)
        for number, batch in enumerate(planned)
    }
    together = spread(run.lm.params)
    share_parts(
        run.store, jobs, together=together, sizes=batches.counts(planned), progress=progress
    )
    done = 0
    for (name, make), batch in zip(jobs.items(), planned, strict=True):
        part = run.store.part(name, make)
        for row, index in enumerate(batch.index.tolist()):
            if index >= 0:
                values[index] = {name: np.asarray(array[row]) for name, array in part.items()}
                done += 1
        if progress is not None:
            progress(done, len(prompts))
    return values


def _read_batch(
    run: Run, batch: batches.Batch, groups: Sequence[str], pairs: Mapping[str, np.ndarray]
) -> dict[str, np.ndarray]:
    """The part of a batch.

    Args:
      run: of the queries.
      batch: of its prompts.
      groups: of every prompt of the run.
      pairs: [neuron, 2] layer and index, by group.
    """
    size = max(1, *map(len, pairs.values()))
    rows = [groups[i if i >= 0 else int(batch.index[0])] for i in batch.index.tolist()]
    where = np.stack([np.pad(pairs[g], ((0, size - len(pairs[g])), (0, 0))) for g in rows])
    config, site = run.lm.config, run.settings.site
    at = where.astype(np.int32)
    read = fetch(_read(run.lm.params, batch, at, config=config, site=site))
    arrays = dict(zip(("chance", "presented", "direct"), read, strict=True))
    return {"right": batch.answers_by_option.argmax(1), **arrays}


class Scores(NamedTuple):
    """How each query's prompts came out.

    Attributes:
      right: by readout and pool, and by query, whether each prompt is answered right.
      sizes: by group and pool, the neurons of the pool in each half.
      uniform: by query, what choosing at random answers right on each prompt.
    """

    right: dict[tuple[str, str], dict[str, list[bool]]]
    sizes: dict[tuple[str, str], list[int]]
    uniform: dict[str, list[float]]


def _scores(
    run: Run,
    chosen: Chosen,
    union: Mapping[str, NeuronSet],
    values: Sequence[dict[str, np.ndarray]],
    half: Mapping[str, int],
) -> Scores:
    site = run.settings.site
    prompts_of: dict[str, list[int]] = {}
    for index, owner in enumerate(run.owners()):
        prompts_of.setdefault(owner, []).append(index)
    scores = Scores({}, {}, {})
    for group, members in run.groups.items():
        for query in members:
            prompts = [values[i] for i in prompts_of[query]]
            scores.uniform[query] = [1 / len(value["chance"]) for value in prompts]
            right = [bool(value["chance"].argmax() == value["right"]) for value in prompts]
            scores.right.setdefault(("prompting", ""), {})[query] = right
        for number in range(HALVES):
            located = [i for q in members if half[q] != number for i in prompts_of[q]]
            sign = np.sign(np.mean([_lean(values[i]) for i in located], axis=0))
            read = [query for query in members if half[query] == number]
            for pool, neurons in chosen[group, number].items():
                everything, codes = union[group].codes.get(site, ()), neurons.codes.get(site, ())
                at = np.flatnonzero(np.isin(everything, codes))
                scores.sizes.setdefault((group, pool), []).append(len(at))
                for query, readout in itertools.product(read, READOUTS):
                    right = [_right(values[i], readout, at, sign) for i in prompts_of[query]]
                    scores.right.setdefault((readout, pool), {})[query] = right
    return scores


def _rows(run: Run, scores: Scores, seed: int) -> list[Row]:
    rows: list[Row] = []
    for group, members in {NO_GROUP: [query.id for query in run.queries], **run.groups}.items():
        for (readout, pool), right in scores.right.items():
            accuracy = bootstrap.mean(
                np.array([np.mean(right[query]) for query in members]), seed=seed
            )
            sizes = [
                size
                for (name, other), of_halves in scores.sizes.items()
                for size in of_halves
                if other == pool and group in (NO_GROUP, name)
            ]
            rows.append(
                {
                    "group": group,
                    "readout": readout,
                    "pool": pool or None,
                    "neurons": float(np.mean(sizes)) if sizes else None,
                    "queries": len(members),
                    "accuracy": accuracy.value,
                    "accuracy_low": accuracy.low,
                    "accuracy_high": accuracy.high,
                }
            )
        rows.append(
            {
                "group": group,
                "readout": "chance",
                "pool": None,
                "neurons": None,
                "queries": len(members),
                "accuracy": float(np.mean([np.mean(scores.uniform[query]) for query in members])),
                "accuracy_low": None,
                "accuracy_high": None,
            }
        )
    return rows


def _lean(value: dict[str, np.ndarray]) -> np.ndarray:
    """Activation at the right letter less the mean at the others, [neuron]."""
    right = np.arange(len(value["presented"])) == value["right"]
    return value["presented"][right].mean(0) - value["presented"][~right].mean(0)


def _right(value: dict[str, np.ndarray], readout: str, at: np.ndarray, sign: np.ndarray) -> bool:
    if not len(at):
        return False
    table = value["direct" if readout == "direct" else "presented"][:, at]
    if readout == "signed":
        table = table * sign[at]
    return bool(table.sum(1).argmax() == value["right"])
