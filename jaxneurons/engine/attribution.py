"""Integrated gradients of every neuron of a site, exactly, for the price of a few tokens.

The activation of one layer's site at the *last* position is scaled by alpha from 0 to 1 while
everything else is left alone, and each neuron is credited with its share of the change of the
answer's probability (QRNCA, arXiv 2406.10868, section 2 of the method). `jax.grad` of the rows'
answer probabilities with respect to their scales (see `jaxneurons.engine.rows`) gives f * dP/df for
every neuron; its weighted sum over alpha is the attribution.

`integrated_gradients` is pure and composes with the caller's `jit`, `vmap` and sharding.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Float, Int

from jaxneurons.engine.adaptive import adaptive
from jaxneurons.engine.parametrisation import panels_at_first
from jaxneurons.engine.quadrature import Quadrature, nodes_and_weights
from jaxneurons.engine.row_memory import logits_are_most, rows_in_budget
from jaxneurons.engine.rows import Prefill, prefill, sweep
from jaxneurons.errors import ConfigError
from jaxneurons.model.axis_types import any_axes
from jaxneurons.model.config import ModelConfig
from jaxneurons.model.finite import NotFiniteError, explain
from jaxneurons.model.parameters import Params
from jaxneurons.model.token_ids import check_ids
from jaxneurons.neurons.sets import Site, check_site

MANY_ANSWERS = 32
"""Answer tokens of a batch that are attributed together, whatever the memory budget.

Unless a large vocabulary's logits are most of what a row takes: then the budget comes first.
"""


_BY_LAYER = ("residual", "added", "squares", "captured")
_BY_PROMPT = ("positions", "targets", "probability", "logits")
"""Fields of a `Prefill`: [layer, batch, answer, ...], and [batch, answer, ...]."""


class Attribution(NamedTuple):
    """Scores of every neuron of a site, with what is known about their error.

    For an answer of several tokens everything is the mean over its steps (`nodes`: the sum).

    Attributes:
      scores: share of the answer's probability, [batch, layers, width] float32.
      probability: of the answer token, model untouched, [batch].
      ablated: the same with the layer's site scaled to 0 at the last position, [batch, layers].
      gap: |sum of the layer's scores - (probability - ablated)|, [batch, layers], in probability.
      error: estimate of the scores' L2 error relative to their L2 norm, [batch, layers]; `adaptive`
        sums the estimates of the panels it accepted, a fixed rule knows only the gap.
      nodes: quadrature nodes spent, [batch, layers] int32 (without alpha = 1 of `adaptive`, which
        is one row for all layers).
    """

    scores: Float[Array, "batch layer width"]
    probability: Float[Array, " batch"]
    ablated: Float[Array, "batch layer"]
    gap: Float[Array, "batch layer"]
    error: Float[Array, "batch layer"]
    nodes: Int[Array, "batch layer"]


@any_axes
def integrated_gradients(
    params: Params,
    tokens: Int[Array, "batch seq"],
    targets: Int[Array, "batch *answer"],
    *,
    config: ModelConfig,
    lengths: Int[Array, " batch"] | None = None,
    answer_lengths: Int[Array, " batch"] | None = None,
    site: Site = "up",
    quadrature: Quadrature = Quadrature(),
    chunk_rows: int | None = None,
    memory_budget: int = 1 << 30,
) -> Attribution:
    """Integrated gradients of the answer's probability, per layer, at the last prompt position.

    Args:
      params: the model's parameters.
      tokens: prompts, right-padded.
      targets: the answer: one token [batch], or several [batch, answer], right-padded, attributed
        by teacher forcing: one attribution at each answer step, averaged.
      config: the model's shape.
      lengths: real tokens of each prompt; default: all.
      answer_lengths: real tokens of each answer; default: all.
      site: which activation is scaled; one of `neurons.SITES`.
      quadrature: rule and tolerance.
      chunk_rows: rows evaluated together; default: what the memory budget allows, up to what
        keeps the platform busy.
      memory_budget: bytes that a chunk's activations may take.

    Returns:
      Scores and their error: see `Attribution`.

    Raises:
      ConfigError: unknown site or rule, or shapes that do not fit.
      DataError: a token id that the model's vocabulary does not have (outside of `jit`).
      NotFiniteError: scores that are not finite, outside of jit and other transformations.
    """
    check_site(site)
    if tokens.ndim != 2 or targets.ndim not in (1, 2) or len(targets) != len(tokens):
        raise ConfigError(
            f"tokens [batch, seq] and targets [batch] or [batch, answer] are needed, "
            f"got {tokens.shape} and {targets.shape}"
        )
    for ids in (tokens, targets):
        check_ids(ids, config.vocab_size)
    targets = targets if targets.ndim == 2 else targets[:, None]
    if lengths is None:
        lengths = jnp.full(tokens.shape[:1], tokens.shape[1], jnp.int32)
    attribution = _attribute_prompts(
        params,
        tokens,
        targets,
        lengths,
        answer_lengths,
        config=config,
        site=site,
        quadrature=quadrature,
        chunk_rows=chunk_rows,
        memory_budget=memory_budget,
    )
    # Of several processes none sees all scores.
    scores = attribution.scores
    if not isinstance(scores, Tracer) and scores.is_fully_addressable:
        _check_finite(params, tokens, targets, lengths, attribution, config=config)
    return attribution


@functools.partial(
    jax.jit, static_argnames=("config", "site", "quadrature", "chunk_rows", "memory_budget")
)
def _attribute_prompts(
    params: Params,
    tokens: Array,
    targets: Array,
    lengths: Array,
    answer_lengths: Array | None,
    *,
    config: ModelConfig,
    **how: Any,
) -> Attribution:
    """Compiled once for all calls of one shape, also for callers who do not compile."""
    pre = prefill(params, tokens, targets, config=config, lengths=lengths)
    return attribute(params, pre, config=config, answer_lengths=answer_lengths, **how)


def _check_finite(
    params: Params,
    tokens: Array,
    targets: Array,
    lengths: Array,
    attribution: Attribution,
    *,
    config: ModelConfig,
) -> None:
    """Raise `NotFiniteError` for the first prompt whose scores or probability are not finite."""
    finite = np.isfinite(attribution.scores).all((1, 2)) & np.isfinite(attribution.probability)
    for row in np.flatnonzero(~finite)[:1].tolist():
        ids = np.concatenate([tokens[row, : int(lengths[row])], targets[row, :-1]])
        raise NotFiniteError(row, explain(params, ids, config=config))


@any_axes
def attribute(
    params: Params,
    pre: Prefill,
    *,
    config: ModelConfig,
    answer_lengths: Int[Array, " batch"] | None = None,
    site: Site = "up",
    quadrature: Quadrature = Quadrature(),
    chunk_rows: int | None = None,
    memory_budget: int = 1 << 30,
) -> Attribution:
    """`integrated_gradients` of prompts that `prefill` has run, with the same arguments."""
    check_site(site)
    batch, answers = pre.targets.shape
    if answer_lengths is None:
        answer_lengths = jnp.full((batch,), answers, jnp.int32)
    rows = chunk_rows or rows_in_budget(config, pre.cache.k.shape[2], memory_budget)

    def integrals(pre: Prefill) -> tuple[Array, Array, Array | None, Array]:
        per_answer = max(1, rows // pre.targets.size)
        if quadrature.rule == "adaptive":
            return adaptive(
                params, pre, config=config, site=site, quadrature=quadrature, rows=per_answer
            )
        x, w = nodes_and_weights(quadrature.rule, quadrature.steps)
        return _fixed(params, pre, x, w, config=config, site=site, rows=per_answer)

    # A pass has a row for every layer of every answer token at least.
    least = panels_at_first(config, site) + 1
    large = logits_are_most(config, pre.cache.k.shape[2])

    def some_answers(pre: Prefill) -> tuple[Array, Array, Array | None, Array]:
        fitting = max(1, rows // (len(pre.targets) * least))
        if fitting < answers and (large or batch * answers > MANY_ANSWERS):
            return _some_answers_at_a_time(integrals, pre, fitting)
        return integrals(pre)

    parts = _equal_parts(batch, rows // least) if large else 1
    if parts > 1:
        scores, ablated, error, nodes = _some_prompts_at_a_time(some_answers, pre, parts)
    else:
        scores, ablated, error, nodes = some_answers(pre)
    gap = jnp.abs(scores.sum(-1) - (pre.probability[..., None] - ablated))
    error = gap if error is None else error
    error = error / jnp.maximum(jnp.linalg.norm(scores, axis=-1), jnp.finfo(jnp.float32).tiny)

    real = (jnp.arange(answers) < answer_lengths[:, None]).astype(jnp.float32)
    share = real / jnp.maximum(real.sum(-1, keepdims=True), 1)

    def mean(x: Array) -> Array:
        return jnp.einsum("ba...,ba->b...", x, share)

    return Attribution(
        scores=mean(scores),
        probability=mean(pre.probability),
        ablated=mean(ablated),
        gap=mean(gap),
        error=mean(error),
        nodes=jnp.einsum("bal,ba->bl", nodes, real.astype(jnp.int32)),
    )


def _equal_parts(count: int, most: int) -> int:
    """Parts of equal size that `count` is cut into, of at most `most` each where that can be."""
    return next(
        parts
        for parts in range(1, count + 1)
        if count % parts == 0 and (count // parts <= max(1, most))
    )


def _some_prompts_at_a_time(
    integrals: Callable[[Prefill], Any], pre: Prefill, parts: int
) -> tuple[Array, Array, Array | None, Array]:
    """`integrals` of one part of the prompts after the other; their results side by side.

    A part takes every so many-th prompt, so that of a batch that is spread over devices each has
    some.
    """

    def split(x: Array, axis: int) -> Array:
        x = x.reshape(*x.shape[:axis], x.shape[axis] // parts, parts, *x.shape[axis + 1 :])
        return jnp.moveaxis(x, axis + 1, 0)

    def split_all(values: Any, axis: int) -> Any:
        return jax.tree.map(lambda x: split(x, axis), values)

    cache = pre.cache._replace(
        k=split(pre.cache.k, 1), v=split(pre.cache.v, 1), length=split(pre.cache.length, 0)
    )
    by_layer = {name: split_all(getattr(pre, name), 1) for name in _BY_LAYER}
    by_prompt = {name: split_all(getattr(pre, name), 0) for name in _BY_PROMPT}
    results = jax.lax.map(integrals, Prefill(cache=cache, **by_layer, **by_prompt))

    def join(x: Array) -> Array:
        x = jnp.moveaxis(x, 0, 1)  # [size, part, ...]
        return x.reshape(-1, *x.shape[2:])

    return jax.tree.map(join, results)


def _some_answers_at_a_time(
    integrals: Callable[[Prefill], Any], pre: Prefill, size: int
) -> tuple[Array, Array, Array | None, Array]:
    """`integrals` of `size` answer tokens after the other; their results side by side."""
    answers = pre.targets.shape[1]
    parts = -(-answers // size)

    def split(x: Array, axis: int) -> Array:
        pad = [(0, 0)] * x.ndim
        pad[axis] = (0, parts * size - answers)
        x = jnp.pad(x, pad, mode="edge")
        return jnp.moveaxis(x.reshape(*x.shape[:axis], parts, size, *x.shape[axis + 1 :]), axis, 0)

    by_layer = {name: getattr(pre, name) for name in _BY_LAYER}
    by_prompt = {name: getattr(pre, name) for name in _BY_PROMPT}
    fields = {
        **jax.tree.map(lambda x: split(x, 2), by_layer),
        **jax.tree.map(lambda x: split(x, 1), by_prompt),
    }
    results = jax.lax.map(lambda part: integrals(pre._replace(**part)), fields)

    def join(x: Array) -> Array:
        x = jnp.moveaxis(x, 0, 1)  # [batch, part, size, ...]
        return x.reshape(len(x), parts * size, *x.shape[3:])[:, :answers]

    return jax.tree.map(join, results)


def _fixed(
    params: Params,
    pre: Prefill,
    x: np.ndarray,
    w: np.ndarray,
    *,
    config: ModelConfig,
    site: Site,
    rows: int,
) -> tuple[Array, Array, None, Array]:
    """The same nodes in every layer: scores, P(0), no error estimate, nodes."""
    # Completeness needs P(0): a node of weight 0, where the rule has none there.
    extra = np.zeros(0 if 0.0 in x else 1)
    x, w = np.concatenate([extra, x]), np.concatenate([extra, w])
    zero = int(np.flatnonzero(x == 0.0)[0])
    p, integral = sweep(params, pre, x, w, config=config, site=site, rows=rows)
    nodes = jnp.full((*pre.targets.shape, config.num_layers), len(w) - len(extra), jnp.int32)
    return integral, p[..., zero], None, nodes
