"""QRNCA: query-relevant neurons by attribution and inverse cluster attribution.

Chen, Dejl, Toni, "Identifying Query-Relevant Neurons in Large Language Models for Long-Form
Texts", arXiv 2406.10868 (earlier: NA-ICA). From top to bottom:

1. `attribute_batch`: neuron attribution of every prompt (section "neuron attribution").
2. `coarse`: the neurons above a share of a prompt's largest score.
3. `merge`: a query's prompts together: its coarse cluster and `na`.
4. `rank`: inverse cluster attribution `ica`, `naica`, common neurons, and the top of each query.
"""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxneurons.engine.attribution import Attribution, attribute
from jaxneurons.engine.device_memory import ROW_BYTES
from jaxneurons.engine.last_position import last_position, scaled_answers, unchanged
from jaxneurons.engine.quadrature import Quadrature
from jaxneurons.engine.rows import Prefill, prefill
from jaxneurons.errors import ConfigError, DataError
from jaxneurons.model.config import ModelConfig
from jaxneurons.model.device_share import spread_batch
from jaxneurons.model.finite import NotFiniteError, explain
from jaxneurons.model.parameters import Params
from jaxneurons.neurons.sets import Neuron, NeuronSet, Site
from jaxneurons.processes.sharing import fetch
from jaxneurons.prompts.answers import TargetForm
from jaxneurons.prompts.batches import Batch
from jaxneurons.storage.settings import check_fields


@dataclasses.dataclass(frozen=True)
class QRNCAConfig:
    """Hyper-parameters of the method; the defaults are the paper's.

    Attributes:
      quadrature: the paper's formula is k / m with m = 16 nodes; `Quadrature()` is the adaptive
        rule, which converges.
      threshold: a prompt keeps the neurons above this share of its largest score (t in the paper).
      prompts: prompts of a query that are used, at most (|Q|).
      common: a neuron in more than this share of the clusters is common and left out (u).
      top: neurons of a query, before the common ones are removed (v).
      normalise: what `na` is divided by (Z): "coarse", the sum over the query's cluster (the public
        code), or "all", over every neuron (the paper's text).
      form: "context": the answer token that the model would say there; "bare": the letter looked
        up in the vocabulary (the public code).
      decimals: scores are rounded to so many decimals before prompts are summed; None: not at all.
      site: the neurons: up, gate, act, down, q, k, v or o; the paper attributes to the up
        projection.
    """

    quadrature: Quadrature = Quadrature("right", 16)
    threshold: float = 0.2
    prompts: int = 3
    common: float = 0.30
    top: int = 20
    normalise: Literal["coarse", "all"] = "coarse"
    form: TargetForm = "context"
    decimals: int | None = None
    site: Site = "up"

    def __post_init__(self) -> None:
        check_fields(self)
        for name in ("threshold", "common"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"{name} must be between 0 and 1, got {getattr(self, name)!r}")
        for name in ("prompts", "top"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, got {getattr(self, name)!r}")

    @classmethod
    def reference(cls, **changes: Any) -> "QRNCAConfig":
        """What the paper's public code computes: its quadrature, bare letters and rounding.

        Its two defects in handling common neurons (nothing is removed, a file is overwritten) are
        not reproduced.
        """
        settings = {"quadrature": Quadrature("reference", 16), "form": "bare", "decimals": 6}
        return cls(**{**settings, **changes})


ACTIVE = 64
"""Neurons of highest activation that are kept of every prompt."""
SHOWN = 5
"""Neurons of a query that its `repr` shows."""


class PromptScores(NamedTuple):
    """One prompt's coarse neurons and what is known about its attribution.

    Attributes:
      neurons: flat indices (layer * width + index) above the threshold, ascending.
      scores: their attributions, not rounded.
      total: sum of all neurons' attributions.
      probability: of the answer (the mean over its tokens).
      option_mass: probability that all options hold together; NaN for a free answer.
      correct: the answer is the model's most probable option; for a free answer, each token of it
        is the most probable one.
      gap: completeness gap of each layer, in probability.
      error: estimated relative error of each layer.
      nodes: quadrature nodes spent.
      active: flat indices of the `ACTIVE` neurons of highest |activation| there, highest first.
      activation: their |activation|.
      odds: the answer's probability over that of the model's first choice, at the token of the
        answer where it is smallest; 1 where the answer is the first choice throughout.
      choice: the model's first choice there.
    """

    neurons: np.ndarray
    scores: np.ndarray
    total: float
    probability: float
    option_mass: float
    correct: bool
    gap: np.ndarray
    error: np.ndarray
    nodes: int
    active: np.ndarray = np.zeros(0, np.int32)
    activation: np.ndarray = np.zeros(0, np.float32)
    odds: float = 1.0
    choice: int = -1


@dataclasses.dataclass(frozen=True, repr=False)
class QueryNeurons:
    """The query-relevant neurons of one query.

    Attributes:
      ranking: the neurons, best first; the scores are in the same order.
      naica: na * ica of each.
      na: share of the query's attribution.
      ica: log of clusters / (clusters with the neuron + 1).
      site: that they are neurons of.
    """

    ranking: list[Neuron]
    naica: list[float]
    na: list[float]
    ica: list[float]
    site: Site

    @functools.cached_property
    def neurons(self) -> NeuronSet:
        """The neurons as a set, with their site."""
        return NeuronSet.of(**{self.site: self.ranking})

    def __repr__(self) -> str:
        best = (
            f"({n.layer}, {n.index}) {naica:.3g}"
            for n, naica in zip(self.ranking[:SHOWN], self.naica, strict=False)
        )
        more = ", ..." if len(self.ranking) > SHOWN else ""
        return f"QueryNeurons({len(self.ranking)} at {self.site!r}: {', '.join(best)}{more})"


def run_prompts(params: Params, batch: Batch, *, config: ModelConfig, site: str) -> Prefill:
    """`prefill` of a batch, with the activations of a site: the same program for every stage."""
    batch = spread_batch(params, batch, config=config)
    return _run_prompts(params, batch, config=config, site=site)


@functools.partial(jax.jit, static_argnames=("config", "site"))
def _run_prompts(params: Params, batch: Batch, *, config: ModelConfig, site: str) -> Prefill:
    return prefill(
        params,
        jnp.asarray(batch.tokens),
        jnp.asarray(batch.targets),
        config=config,
        lengths=jnp.asarray(batch.lengths),
        capture=(site,),
    )


class _Answered(NamedTuple):
    """The model's answers after prompts, untouched: see `PromptScores`."""

    options: jax.Array
    correct: jax.Array
    odds: jax.Array
    choice: jax.Array
    active: jax.Array
    activation: jax.Array


@functools.partial(jax.jit, static_argnames=("config", "settings", "memory_budget"))
def _attribute(
    params: Params,
    batch: Batch,
    pre: Prefill,
    *,
    config: ModelConfig,
    settings: QRNCAConfig,
    memory_budget: int,
) -> tuple[Attribution, _Answered]:
    attribution = attribute(
        params,
        pre,
        config=config,
        answer_lengths=jnp.asarray(batch.answer_lengths),
        site=settings.site,
        quadrature=settings.quadrature,
        memory_budget=memory_budget,
    )
    if batch.options.shape[2] == 1:
        first = jax.nn.softmax(pre.logits[:, 0], axis=-1)
        options = jnp.take_along_axis(first, batch.options[..., 0], axis=-1)
    else:  # whole: those that begin alike too
        untouched = unchanged(len(batch.tokens))
        answers = scaled_answers(
            params,
            last_position(pre),
            untouched,
            config=config,
            options=jnp.asarray(batch.options),
        )
        options = jnp.exp(answers.options[0])
    top = pre.logits.argmax(-1)
    target = jnp.take_along_axis(pre.logits, pre.targets[..., None], axis=-1)[..., 0]
    behind = target - pre.logits.max(-1)
    furthest = behind.argmin(-1)[:, None]
    strength = jnp.abs(pre.captured[settings.site][:, :, 0]).astype(jnp.float32).swapaxes(0, 1)
    strength = strength.reshape(len(batch.tokens), -1)
    activation, active = jax.lax.top_k(strength, min(ACTIVE, strength.shape[1]))
    return attribution, _Answered(
        options=options,
        correct=jnp.all(top == pre.targets, axis=-1),
        odds=jnp.exp(behind.min(-1)),
        choice=jnp.take_along_axis(top, furthest, axis=-1)[:, 0],
        active=active,
        activation=activation,
    )


def attribute_batch(
    params: Params,
    batch: Batch,
    pre: Prefill,
    *,
    config: ModelConfig,
    settings: QRNCAConfig,
    memory_budget: int = ROW_BYTES,
) -> dict[int, PromptScores]:
    """Attribution of a batch of prompts that `run_prompts` has run, by their index in the plan.

    Source: section "neuron attribution" of the paper; the coarse threshold is applied here, so
    that the scores of all neurons need not be kept. Rows take `memory_budget` bytes at most.

    Raises:
      NotFiniteError: scores of a prompt that are not finite: float16 overflows in some models.
    """
    on_device = _attribute(
        params, batch, pre, config=config, settings=settings, memory_budget=memory_budget
    )
    attribution, answered = fetch(on_device)
    results = {}
    for row, index in enumerate(batch.index.tolist()):
        if index < 0:
            continue
        scores = attribution.scores[row].reshape(-1)
        if not (np.isfinite(scores).all() and np.isfinite(attribution.probability[row])):
            ids = np.concatenate([batch.tokens[row, : batch.lengths[row]], batch.targets[row, :-1]])
            raise NotFiniteError(index, explain(params, ids, config=config))
        neurons = coarse(scores, settings.threshold)
        if answered.options.shape[1]:
            right = batch.answers_by_option[row][answered.options[row].argmax()]
            mass, correct = float(answered.options[row].sum()), bool(right)
        else:
            mass, correct = float("nan"), bool(answered.correct[row])
        results[index] = PromptScores(
            neurons=neurons,
            scores=scores[neurons],
            total=float(scores.sum(dtype=np.float64)),
            probability=float(attribution.probability[row]),
            option_mass=mass,
            correct=correct,
            gap=attribution.gap[row],
            error=attribution.error[row],
            nodes=int(attribution.nodes[row].sum()),
            active=answered.active[row],
            activation=answered.activation[row],
            odds=float(answered.odds[row]),
            choice=int(answered.choice[row]),
        )
    return results


def coarse(scores: np.ndarray, threshold: float) -> np.ndarray:
    """Indices of the scores above `threshold` times the largest one; none if none is positive."""
    top = scores.max()
    if not top > 0:
        return np.zeros(0, np.int64)
    return np.flatnonzero(scores > threshold * top)


def merge(prompts: Sequence[PromptScores], settings: QRNCAConfig) -> dict[int, float]:
    """A query's coarse cluster with `na` of each neuron, from the prompts of the query.

    Kept scores are summed over the prompts and divided by Z: section "neuron attribution".
    """
    sums: dict[int, float] = {}
    for prompt in prompts:
        scores = prompt.scores.astype(np.float64)
        if settings.decimals is not None:
            scores = np.round(scores, settings.decimals)
        for neuron, score in zip(prompt.neurons.tolist(), scores.tolist(), strict=True):
            sums[neuron] = sums.get(neuron, 0.0) + score
    if settings.normalise == "all":
        z = sum(prompt.total for prompt in prompts)
    else:
        z = sum(sums.values())
    return {neuron: score / z if z else 0.0 for neuron, score in sorted(sums.items())}


def rank(
    clusters: Mapping[str, Mapping[int, float]], *, width: int, settings: QRNCAConfig
) -> tuple[dict[str, QueryNeurons], list[tuple[Neuron, int]]]:
    """Query-relevant neurons of every query, and the common neurons with their cluster counts.

    Sections "inverse cluster attribution" and "common neurons": ica = log(|C| / (count + 1)),
    naica = na * ica; a query keeps its `top` neurons of positive naica, less the common ones,
    which are in more than int(common * |C|) clusters.

    Args:
      clusters: `merge` of each query, by query id.
      width: neurons per layer of the site.
      settings: hyper-parameters.

    Raises:
      DataError: too few queries, so that nothing is left whatever the clusters are.
    """
    check_count(len(clusters), settings.common)
    counts: dict[int, int] = {}
    for cluster in clusters.values():
        for neuron in cluster:
            counts[neuron] = counts.get(neuron, 0) + 1
    most = int(settings.common * len(clusters))
    common = {neuron for neuron, count in counts.items() if count > most}
    ica = {neuron: float(np.log(len(clusters) / (n + 1))) for neuron, n in counts.items()}

    ranked = {}
    for name, cluster in clusters.items():
        scored = sorted(((-na * ica[n], n) for n, na in cluster.items()))
        best = [n for score, n in scored[: settings.top] if score < 0 and n not in common]
        ranked[name] = QueryNeurons(
            ranking=[Neuron(*divmod(n, width)) for n in best],
            naica=[cluster[n] * ica[n] for n in best],
            na=[cluster[n] for n in best],
            ica=[ica[n] for n in best],
            site=settings.site,
        )
    shared = sorted(((counts[n], n) for n in common), key=lambda pair: (-pair[0], pair[1]))
    return ranked, [(Neuron(*divmod(n, width)), count) for count, n in shared]


def check_count(queries: int, common: float = QRNCAConfig.common) -> None:
    """Raise `DataError` if there are too few queries to compare clusters.

    With two, ica is at most log(2/2) = 0; with int(common * queries) = 0 every neuron is common.
    """
    if queries >= 3 and int(common * queries) >= 1:
        return
    if queries < 2:
        raise DataError(
            "one query only: inverse cluster attribution compares clusters of several queries "
            "(with one, ica = log(1/2) < 0 and no neuron is left); give several queries"
        )
    why = (
        "with two, ica is at most log(2/2) = 0"
        if queries < 3
        else f"a neuron of one query is already in more than {common:g} of the clusters, so common"
    )
    least = next((n for n in range(3, 1001) if int(common * n) >= 1), None)
    advice = f"give at least {least} queries" if least else f"common = {common:g} is too small"
    raise DataError(f"{queries} queries leave no neurons ({why}); {advice}")
