"""Causal tracing: which states of a run carry a fact to the answer?

Meng et al. 2022 (arXiv 2202.05262), section 2. The subject of a prompt is noised until the model no
longer knows the answer; then one state is restored to what it was, and the answer's probability
comes back as far as that state carries the fact (the indirect effect). Averages over facts, by
layer and by what the token is to the subject, say where facts are.

What differs from the paper: the answer is read whole, by teacher forcing, where it has several
tokens; windows of restored layers are as deep for the model as 10 layers are for one of 48; tokens
before the subject, where nothing can come back, are left out.
"""

import dataclasses
import functools
import math
import os
import time
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int

from jaxneurons.checkpoints.loading import LM
from jaxneurons.edit.requests import KnownFact
from jaxneurons.edit.restoring import (
    KINDS,
    Kind,
    restored_probabilities,
    window_of,
)
from jaxneurons.edit.traced_facts import POSITIONS, TracedFact, encode_fact, noised_prompts, plan
from jaxneurons.engine import bootstrap
from jaxneurons.engine.out_of_memory import ChunkSize
from jaxneurons.engine.rows import prefill
from jaxneurons.errors import ConfigError, DataError
from jaxneurons.model import layers
from jaxneurons.model.axis_types import any_axes
from jaxneurons.model.config import ModelConfig
from jaxneurons.model.parameters import Params
from jaxneurons.processes import sharing as processes
from jaxneurons.processes.sharing import fetch
from jaxneurons.prompts import batches
from jaxneurons.prompts.answers import TokenPrompt
from jaxneurons.storage.progress import Progress
from jaxneurons.storage.settings import as_path, check_argument, check_number
from jaxneurons.storage.store import digest, write_json
from jaxneurons.storage.tables import Row, Tables, write_table

FORMAT = 1
"""Changes when the parts of a run mean something else."""


@dataclasses.dataclass(frozen=True)
class _Settings:
    """What the numbers depend on, beside model and facts."""

    noise: float
    samples: int
    window: int
    kinds: tuple[Kind, ...]
    seed: int


@any_axes
def trace(
    lm: LM,
    facts: Sequence[KnownFact],
    *,
    noise: float = 3.0,
    samples: int = 10,
    window: int | None = None,
    kinds: Sequence[Kind] = KINDS,
    seed: int = 0,
    batch_size: int | None = None,
    out: str | os.PathLike[str] | None = None,
    progress: Progress | None = None,
) -> Tables:
    """Trace facts through a model: the indirect effect of every layer and kind of token.

    Only facts are traced that the model answers right: each token of the attribute is the likeliest
    one after those before it. Noise of a fact depends on the seed and on its place among `facts`.

    Args:
      lm: the model.
      facts: see `read_known`.
      noise: standard deviation of the noise, in those of the embeddings of all facts' subjects.
      samples: of the noise; effects are means over them.
      window: layers that are restored together of kinds `down` and `o`; default: as many for the
        model's depth as 10 are for 48.
      kinds: of restored states: `residual`, `down`, `o`.
      seed: of noise and bootstrap.
      batch_size: facts that run together; default: what suits the platform.
      out: a directory for `tables` and `figures`; a stopped run goes on there. Default: none.
      progress: called with how many facts are done, of how many.

    Returns:
      Tables `effects` (fact, kind, layer, position, effect), `summary` (means over facts with 95 %
      bootstrap intervals) and `facts` (probabilities `clean` and `noised`, or `left_out`: why).
      Effects are in probability; those at `middle subject` and `further` are means over tokens.

    Raises:
      ConfigError: arguments of the wrong kind.
      DataError: no fact that can be traced, or a directory with another run.
    """
    check_argument("facts", Sequence[KnownFact], facts)
    check_argument("kinds", Sequence[Kind], kinds)
    check_argument("noise", float, noise)
    if not (math.isfinite(noise) and noise >= 0):
        raise ConfigError(f"noise must be a finite number of at least 0, got {noise!r}")
    check_argument("seed", int, seed)
    for name, number in (("samples", samples), ("window", window), ("batch size", batch_size)):
        if number is not None:
            check_number(name, number, least=1)
    depth = window_of(lm.config) if window is None else window
    settings = _Settings(float(noise), samples, depth, tuple(dict.fromkeys(kinds)), seed)
    size = batch_size or batches.default_batch_size()
    path = None if out is None else as_path("out", out)
    store = processes.open_parts(path, _identity(lm, facts, settings, size))
    began = time.perf_counter()
    encoded, left_out = _encoded(lm, facts)
    spread = _spread(lm.params, encoded, lm.config) if encoded else 0.0
    _leave_out_wrong(lm, encoded, left_out)
    if not encoded:
        raise DataError(
            f"none of {len(facts)} facts can be traced; the first: {left_out[min(left_out)]}"
            if facts
            else "no facts; read some with jaxneurons.edit.read_known"
        )
    planned = plan(encoded, size)
    done, rows, numbers = 0, [], {}
    chunk = ChunkSize(size, what="facts")
    jobs = {
        number: functools.partial(_batch, lm, encoded, members, spread, settings, chunk)
        for number, members in enumerate(planned)
    }
    together = processes.spread(lm.params)
    processes.share_parts(
        store, jobs, together=together, sizes=[*map(len, planned)], progress=progress
    )
    for (number, work), members in zip(jobs.items(), planned, strict=True):
        part = store.part(number, work)
        for row, i in enumerate(members):
            numbers[i] = float(part["clean"][row]), float(part["noised"][row])
            rows += _effects(facts, i, encoded[i], part, row, settings.kinds)
        done += len(members)
        if progress is not None:
            progress(done, len(encoded))
    rows.sort(key=lambda row: row["number"])
    about = [_about(facts[i], i, numbers.get(i), left_out.get(i)) for i in range(len(facts))]
    record = {
        "model": lm.facts(),
        "settings": dataclasses.asdict(settings),
        "embedding_spread": spread,
        "facts": {"given": len(facts), "traced": len(encoded), "left_out": len(left_out)},
        "seconds": time.perf_counter() - began,
    }
    tables = {"summary": summarise(rows, seed=seed), "effects": rows, "facts": about}
    return _written(Tables(tables, facts=record, path=path))


def _written(tables: Tables) -> Tables:
    path = tables.path
    if path is None:
        return tables

    def write() -> None:
        from jaxneurons.edit.tracing_figures import draw_tracing

        for name in tables:
            write_table(path / "tables", name, tables.rows(name))
        write_json(path / "tracing.json", tables.facts)
        draw_tracing(tables, path / "figures")

    processes.write_once("tables", write)
    return tables


def _identity(lm: LM, facts: Sequence[KnownFact], settings: _Settings, size: int) -> dict[str, Any]:
    return {
        **lm.identity(),
        **known_identity(facts),
        "settings": dataclasses.asdict(settings),
        "batch size": size,
    }


def known_identity(facts: Sequence[KnownFact]) -> dict[str, Any]:
    """What is known of a run without its model and settings."""
    return {"format": FORMAT, "facts": digest([dataclasses.astuple(fact) for fact in facts])}


def _encoded(lm: LM, facts: Sequence[KnownFact]) -> tuple[dict[int, TracedFact], dict[int, str]]:
    """Facts as token ids by their place, and why others cannot be."""
    encoded, left_out = {}, {}
    for i, fact in enumerate(facts):
        try:
            encoded[i] = encode_fact(lm.tokenizer, fact, config=lm.config)
        except DataError as error:
            left_out[i] = str(error)
    return encoded, left_out


@any_axes
def answered(lm: LM, facts: Sequence[KnownFact]) -> list[KnownFact]:
    """The facts that `trace` would trace: each token of the answer is the model's first choice.

    Args:
      lm: the model.
      facts: see `read_known`.
    """
    encoded, left_out = _encoded(lm, facts)
    _leave_out_wrong(lm, encoded, left_out)
    return [facts[i] for i in sorted(encoded)]


def _leave_out_wrong(lm: LM, encoded: dict[int, TracedFact], left_out: dict[int, str]) -> None:
    """Move facts that the model does not answer right from the one to the other."""
    places = list(encoded)
    prompts = [TokenPrompt(encoded[i].prompt, encoded[i].answer) for i in places]
    for batch in batches.plan(prompts):
        right = fetch(
            _answers_right(lm.params, batch.tokens, batch.lengths, batch.targets, config=lm.config)
        )
        for row, member in enumerate(batch.index.tolist()):
            if member >= 0 and not right[row]:
                left_out[places[member]] = "the model answers otherwise"
                del encoded[places[member]]


@functools.partial(jax.jit, static_argnames=("config",))
def _answers_right(
    params: Params,
    tokens: Int[Array | np.ndarray, "batch seq"],
    lengths: Int[Array | np.ndarray, " batch"],
    targets: Int[Array | np.ndarray, "batch answer"],
    *,
    config: ModelConfig,
) -> Bool[Array, " batch"]:
    tokens, lengths, targets = jnp.asarray(tokens), jnp.asarray(lengths), jnp.asarray(targets)
    pre = prefill(params, tokens, targets, config=config, lengths=lengths)
    return (pre.logits.argmax(-1) == targets).all(-1)


def _spread(params: Params, encoded: Mapping[int, TracedFact], config: ModelConfig) -> float:
    """Standard deviation of all entries of the embeddings of the facts' subjects, as they enter."""
    ids = [i for fact in encoded.values() for i in fact.prompt[slice(*fact.subject)]]
    embeddings = layers.embed(params, jnp.asarray(ids), config)
    return float(fetch(embeddings).astype(np.float32).std())


_restored_probabilities = jax.jit(
    restored_probabilities, static_argnames=("config", "kinds", "window")
)


def _batch(
    lm: LM,
    encoded: Mapping[int, TracedFact],
    members: Sequence[int],
    spread: float,
    settings: _Settings,
    chunk: ChunkSize,
) -> dict[str, np.ndarray]:
    """Probabilities of a batch's facts, means over samples; `restored` is [fact, kind, ...]."""

    def draw(i: int) -> np.ndarray:
        start, end = encoded[i].subject
        shape = (settings.samples, end - start, lm.config.hidden_size)
        normal = np.random.default_rng([settings.seed, i]).standard_normal(shape)
        return (settings.noise * spread * normal).astype(np.float32)

    def of_facts(first: int, end: int) -> dict[str, np.ndarray]:
        some = members[first:end]
        prompts = noised_prompts([encoded[i] for i in some], [draw(i) for i in some])
        p = _restored_probabilities(
            lm.params, prompts, config=lm.config, kinds=settings.kinds, window=settings.window
        )
        return {
            "clean": fetch(p.clean),
            "noised": fetch(p.noised).mean(0),
            "restored": np.moveaxis(fetch(p.restored).mean(0), -1, 0),
        }

    return chunk.run_rows(of_facts, len(members), axis=0)


def _effects(
    facts: Sequence[KnownFact],
    number: int,
    fact: TracedFact,
    part: Mapping[str, np.ndarray],
    row: int,
    kinds: Sequence[Kind],
) -> list[Row]:
    """Rows of one fact: its indirect effects by kind, layer and class of position."""
    effects = part["restored"][row] - part["noised"][row]  # [kind, layer, position]
    of_class: dict[str, list[int]] = {name: [] for name in POSITIONS}
    for column, position in enumerate(fact.positions):
        of_class[fact.position_class(position)].append(column)
    return [
        {
            "number": number,
            "fact": facts[number].id or str(number),
            "kind": kind,
            "layer": layer,
            "position": name,
            "effect": float(effects[k, layer, columns].mean()),
        }
        for k, kind in enumerate(kinds)
        for layer in range(effects.shape[1])
        for name, columns in of_class.items()
        if columns
    ]


def _about(
    fact: KnownFact, number: int, p: tuple[float, float] | None, left_out: str | None
) -> Row:
    return {
        "number": number,
        "fact": fact.id or str(number),
        "prompt": fact.prompt,
        "subject": fact.subject,
        "attribute": fact.attribute,
        "clean": None if p is None else p[0],
        "noised": None if p is None else p[1],
        "total_effect": None if p is None else p[0] - p[1],
        "left_out": left_out or "",
    }


def summarise(rows: Sequence[Row], *, seed: int = 0) -> list[Row]:
    """Average indirect effects: means over facts, with 95 % bootstrap intervals.

    Args:
      rows: of table `effects`.
      seed: of the bootstrap.
    """
    groups: dict[tuple[str, int, str], list[float]] = {}
    for row in rows:
        groups.setdefault((row["kind"], row["layer"], row["position"]), []).append(row["effect"])
    means = {key: bootstrap.mean(np.array(values), seed=seed) for key, values in groups.items()}
    order = {name: i for i, name in enumerate((*KINDS, *POSITIONS))}
    return [
        {
            "kind": kind,
            "layer": layer,
            "position": position,
            "facts": len(groups[kind, layer, position]),
            "effect": mean.value,
            "low": mean.low,
            "high": mean.high,
        }
        for (kind, layer, position), mean in sorted(
            means.items(), key=lambda item: (order[item[0][0]], item[0][1], order[item[0][2]])
        )
    ]
