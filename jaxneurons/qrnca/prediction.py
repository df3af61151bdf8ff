"""Answering new questions from the activity of a domain's neurons alone.

Section "applications" of arXiv 2406.10868, whose protocol is not in the paper's text; this is ours:

1. The queries of each group are dealt into two halves. QRNCA's scores of one half (clusters, ica,
   common neurons) give the group's pool of neurons; the other half is asked, and the reverse.
2. Each option is read off the pool, and the highest is the answer:

   - `presented`: the option's letter is put after the prompt; the pool's mean activation there.
   - `signed`: the same, each neuron counted with the sign that it had for right answers in the half
     it was located in (mean at the right letter less mean at the others).
   - `direct`: the letter is not put; what the pool adds to the letter's logit at the last prompt
     position through the unembedding.

   A letter that the tokenizer splits (a space, then the letter) is read at its own token, the space
   belonging to the prompt.

3. Beside it: the pool of another group, random neurons of the same layers, what the whole model
   answers (`prompting`), and chance.
"""

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxneurons.engine.rows import prefill
from jaxneurons.errors import DataError
from jaxneurons.model.config import ModelConfig
from jaxneurons.model.transformer import forward
from jaxneurons.neurons.sets import Neuron
from jaxneurons.prompts import batches
from jaxneurons.prompts.answers import past_shared_tokens
from jaxneurons.qrnca import method as qrnca
from jaxneurons.qrnca import pcr
from jaxneurons.qrnca.analyses import KINDS
from jaxneurons.qrnca.run import Progress, Run
from jaxneurons.storage.store import digest

Row = dict[str, Any]
READOUTS = ("presented", "signed", "direct")
POOLS = ("own", "another group's", "random")
HALVES = 2
FORMAT = 2
"""Of the parts; counts up when what is in them, or how it is computed, changes."""


@functools.partial(jax.jit, static_argnames=("config", "site"))
def _read(
    params: Any, batch: batches.Batch, where: jax.Array, *, config: ModelConfig, site: str
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Option log-probabilities [row, option]; activations, contributions [row, option, neuron]."""
    pre = prefill(
        params,
        jnp.pad(jnp.asarray(batch.tokens), ((0, 0), (0, 1))),  # the cache needs room for the letter
        jnp.asarray(batch.targets),
        config=config,
        lengths=jnp.asarray(batch.lengths),
        capture=("act",),
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
    written = written * params["final_norm"]["scale"]
    if config.tied:
        said = params["embed"]["embedding"][options]
    else:
        said = jnp.moveaxis(params["unembed"]["kernel"][:, options], 0, -1)
    added = jnp.einsum("rnh,roh->ron", written, said)
    chance = jnp.take_along_axis(jax.nn.log_softmax(pre.logits[:, 0]), options, axis=-1)
    return chance, seen, added


def halves(groups: Mapping[str, Sequence[str]], seed: int = 0) -> dict[str, int]:
    """The half of each query: every group dealt out evenly, in random order.

    Raises:
      DataError: a group of one query.
    """
    rng = np.random.default_rng(seed)
    found = {}
    for group, members in groups.items():
        if len(members) < HALVES:
            raise DataError(
                f"group {group!r} has {len(members)} query: one half locates, the other is asked"
            )
        for place, i in enumerate(rng.permutation(len(members)).tolist()):
            found[members[i]] = place % HALVES
    return found


def pools(run: Run, half: Mapping[str, int], located_in: int) -> dict[str, list[Neuron]]:
    """The neurons of each group from the queries of one half alone, in order of layer and index."""
    clusters = {
        name: qrnca.merge(found, run.settings)
        for name, found in run.located.prompts.items()
        if half[name] == located_in
    }
    neurons, _ = qrnca.rank(clusters, width=run.width, settings=run.settings)
    return {
        group: sorted({n for query in members if query in neurons for n in neurons[query].neurons})
        for group, members in run.groups.items()
    }


def predict(run: Run, *, seed: int = 0, progress: Progress | None = None) -> list[Row]:
    """Accuracy of reading the answer off a group's neurons, beside controls.

    A row for each group (and all), readout and pool: `neurons` in the pool, `prompts`, `accuracy`
    with its interval (bootstrap over queries). Readouts `prompting` and `chance` have no pool.

    Args:
      run: of multi-choice queries, neurons of a feed-forward site.
      seed: of halves and random neurons.
      progress: told how many prompts are done.

    Raises:
      DataError: queries without options, one group only, or a group of one query.
    """
    if run.settings.site not in KINDS:
        raise DataError(f"prediction needs neurons of {', '.join(KINDS)}, not {run.settings.site}")
    free = [query.id for query in run.queries if not all(query.options)]
    if free:
        raise DataError(
            f"query {free[0]!r} has no options: prediction chooses one, so multi-choice queries "
            "are needed (`jaxneurons qrnca questions` makes them)"
        )
    groups = run.groups
    if len(groups) < 2:
        raise DataError("one group only: prediction is compared with another group's neurons")
    half = halves(groups, seed)
    rng = np.random.default_rng(seed)
    names = list(groups)
    chosen: dict[tuple[str, int], dict[str, list[Neuron]]] = {}  # by group and half asked
    for asked in range(HALVES):
        own = pools(run, half, (asked + 1) % HALVES)
        for number, group in enumerate(names):
            chosen[group, asked] = {
                "own": own[group],
                "another group's": own[names[(number + 1) % len(names)]],
                "random": _random_like(own[group], run.width, rng),
            }
    union = {
        group: sorted(
            {n for h in range(HALVES) for pool in chosen[group, h].values() for n in pool}
        )
        for group in names
    }
    values = _collect(run, union, seed, progress)
    return _rows(run, chosen, union, values, half, seed)


def _random_like(neurons: Sequence[Neuron], width: int, rng: np.random.Generator) -> list[Neuron]:
    """As many random neurons of the same layers, none of them in `neurons`, or all left."""
    found: list[Neuron] = []
    for layer in sorted({neuron.layer for neuron in neurons}):
        taken = [neuron.index for neuron in neurons if neuron.layer == layer]
        others = np.setdiff1d(np.arange(width), taken)
        drawn = rng.permutation(others)[: len(taken)]
        found += [Neuron(layer, index) for index in sorted(drawn.tolist())]
    return found


def _collect(
    run: Run, union: dict[str, list[Neuron]], seed: int, progress: Progress | None
) -> list[dict[str, np.ndarray]]:
    """For each prompt: option chances, and activations and contributions of its group's neurons."""
    prompts, owners = [past_shared_tokens(p) for p in run.located.encoded], run.owners()
    group_of = {query.id: query.group for query in run.queries}
    size = max(1, *(len(neurons) for neurons in union.values()))
    where = {}
    for group, neurons in union.items():
        where[group] = np.zeros((size, 2), np.int32)
        where[group][: len(neurons)] = np.array(neurons, np.int32).reshape(-1, 2)
    key = digest([union, seed, FORMAT])[:16]
    plan = batches.plan(prompts, run.batch_size)
    values: list[dict[str, np.ndarray]] = [{} for _ in prompts]
    done = 0
    for number, batch in enumerate(plan):
        name = f"predict-{key}-{number:05d}"
        part = run.store.load(name)
        if part is None:
            rows = [owners[i] if i >= 0 else owners[batch.index[0]] for i in batch.index.tolist()]
            at = jnp.asarray(np.stack([where[group_of[query]] for query in rows]))
            found = jax.device_get(
                _read(run.lm.params, batch, at, config=run.lm.config, site=run.settings.site)
            )
            part = {
                "right": batch.answers_by_option.argmax(1),
                **dict(zip(("chance", "presented", "direct"), found, strict=True)),
            }
            run.store.save(name, part)
        for row, index in enumerate(batch.index.tolist()):
            if index >= 0:
                values[index] = {name: np.asarray(array[row]) for name, array in part.items()}
                done += 1
        if progress is not None:
            progress(done, len(prompts))
    return values


def _rows(
    run: Run,
    chosen: dict[tuple[str, int], dict[str, list[Neuron]]],
    union: dict[str, list[Neuron]],
    values: list[dict[str, np.ndarray]],
    half: dict[str, int],
    seed: int,
) -> list[Row]:
    owners = run.owners()
    own_prompts: dict[str, list[int]] = {}
    for index, owner in enumerate(owners):
        own_prompts.setdefault(owner, []).append(index)
    scores: dict[tuple[str, str], dict[str, list[bool]]] = {}
    sizes: dict[tuple[str, str], list[int]] = {}
    uniform: dict[str, list[float]] = {}
    for group, members in run.groups.items():
        place = {neuron: i for i, neuron in enumerate(union[group])}
        for query in members:
            mine = own_prompts[query]
            uniform[query] = [1 / len(values[i]["chance"]) for i in mine]
            said = [bool(values[i]["chance"].argmax() == values[i]["right"]) for i in mine]
            scores.setdefault(("prompting", ""), {})[query] = said
        for asked in range(HALVES):
            located = [i for q in members if half[q] != asked for i in own_prompts[q]]
            sign = np.sign(np.mean([_lean(values[i]) for i in located], axis=0))
            for pool, neurons in chosen[group, asked].items():
                at = [place[neuron] for neuron in neurons]
                sizes.setdefault((group, pool), []).append(len(at))
                for query in (q for q in members if half[q] == asked):
                    for readout in READOUTS:
                        right = [_right(values[i], readout, at, sign) for i in own_prompts[query]]
                        scores.setdefault((readout, pool), {})[query] = right
    groups = {"all": [query.id for query in run.queries], **run.groups}
    rows = []
    for group, members in groups.items():
        for (readout, pool), found in scores.items():
            each = np.array([np.mean(found[query]) for query in members])
            own = pcr.mean(each, seed=seed)
            counts = [n for (g, p), all_ in sizes.items() for n in all_ if p == pool]
            if group != "all":
                counts = sizes.get((group, pool), [])
            rows.append(
                {
                    "group": group,
                    "readout": readout,
                    "pool": pool or None,
                    "neurons": float(np.mean(counts)) if counts else None,
                    "queries": len(members),
                    "accuracy": own.value,
                    "accuracy_low": own.low,
                    "accuracy_high": own.high,
                }
            )
        rows.append(
            {
                "group": group,
                "readout": "chance",
                "pool": None,
                "neurons": None,
                "queries": len(members),
                "accuracy": float(np.mean([np.mean(uniform[query]) for query in members])),
                "accuracy_low": None,
                "accuracy_high": None,
            }
        )
    return rows


def _lean(value: dict[str, np.ndarray]) -> np.ndarray:
    """Activation at the right letter less the mean at the others, [neuron]."""
    right = np.arange(len(value["presented"])) == value["right"]
    return value["presented"][right].mean(0) - value["presented"][~right].mean(0)


def _right(value: dict[str, np.ndarray], readout: str, at: list[int], sign: np.ndarray) -> bool:
    if not at:
        return False
    table = value["direct" if readout == "direct" else "presented"][:, at]
    if readout == "signed":
        table = table * sign[at]
    return bool(table.sum(1).argmax() == value["right"])
