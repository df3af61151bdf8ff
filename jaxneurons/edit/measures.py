"""What an edit did: efficacy, generalisation, locality, portability, fluency, perplexity.

Several edits are measured at once: programs are vmapped over them, so that all parameters that an
edit does not touch are read once for all of them.
"""

import functools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxneurons.checkpoints.loading import LM
from jaxneurons.edit.cases import (
    Case,
    MeasureSettings,
    Question,
    answer_width,
    encode_case,
    prompt_rows,
    scored_rows,
    text_rows,
)
from jaxneurons.edit.changes import Change, apply
from jaxneurons.edit.low_rank_terms import low_rank_terms, stacked_terms
from jaxneurons.edit.outcomes import Outcome, measured_row
from jaxneurons.edit.requests import EditRequest
from jaxneurons.engine.likelihood import sentence_loss
from jaxneurons.engine.logits import logits_at_once
from jaxneurons.engine.out_of_memory import ChunkSize
from jaxneurons.engine.texts import continuation
from jaxneurons.errors import ConfigError
from jaxneurons.model.axis_types import any_axes
from jaxneurons.model.config import ModelConfig
from jaxneurons.model.generation import NO_TOKEN, greedy
from jaxneurons.model.transformer import LowRankTerms, Params, forward
from jaxneurons.processes.sharing import fetch
from jaxneurons.storage.tables import Row

_MOST_BYTES, _MOST_EDITS = 1 << 30, 8
"""Of edited kernels, and of edits, that are measured at once."""


Edits = tuple[Change, ...] | LowRankTerms
"""Several edits: changes, or their terms beside the kernels, with arrays stacked on a first axis.

() for none, which is one."""


class Scores(NamedTuple):
    """Answers after their prompts by teacher forcing.

    Attributes:
      log_probability: of each whole answer, natural logarithm.
      choices: the model's first choice at each of its tokens.
      following: log-probabilities of the token after each prompt.
    """

    log_probability: Float[Array, "edit row"]
    choices: Int[Array, "edit row answer"]
    following: Float[Array, "edit row vocab"]


@functools.partial(jax.jit, static_argnames=("config",))
def score_answers(
    params: Params,
    edits: Edits,
    tokens: Int[Array, "edit row seq"],
    lengths: Int[Array, "edit row"],
    starts: Int[Array, "edit row"],
    answers: Int[Array, "edit row answer"],
    *,
    config: ModelConfig,
) -> Scores:
    """Score answers under several edits at once, each on rows of its own. Pure.

    Args:
      params: the parameters before the edits.
      edits: one entry an edit.
      tokens: prompts with their answers, right-padded.
      lengths: tokens of each row.
      starts: the position before each answer.
      answers: right-padded with -1.
      config: the model's shape.
    """

    count, rows, width = answers.shape
    together = logits_at_once(config, rows, each=count * width)

    def of_edit(edit: Edits, *of_rows: Array) -> Scores:
        edited, low_rank = _edited(params, edit, config)

        def of_some(tokens: Array, lengths: Array, starts: Array, answers: Array) -> Scores:
            at = jnp.minimum(starts[:, None] + jnp.arange(width), tokens.shape[1] - 1)
            out = forward(edited, tokens, config=config, lengths=lengths, at=at, low_rank=low_rank)
            log_p = jax.nn.log_softmax(out.logits, axis=-1)
            real = answers >= 0
            chosen = jnp.take_along_axis(log_p, jnp.where(real, answers, 0)[..., None], axis=-1)
            total = jnp.sum(jnp.where(real, chosen[..., 0], 0), axis=-1)
            return Scores(total, log_p.argmax(-1).astype(answers.dtype), log_p[:, 0])

        if together >= rows:
            return of_some(*of_rows)
        # Of a large vocabulary, all rows' logits would not fit.
        return jax.lax.map(
            lambda row: jax.tree.map(lambda leaf: leaf[0], of_some(*(leaf[None] for leaf in row))),
            of_rows,
            batch_size=together,
        )

    return jax.vmap(of_edit)(edits, tokens, lengths, starts, answers)


@functools.partial(jax.jit, static_argnames=("config", "steps"))
def generate_edited(
    params: Params,
    edits: Edits,
    tokens: Int[Array, "edit row seq"],
    lengths: Int[Array, "edit row"],
    *,
    config: ModelConfig,
    steps: int,
) -> Int[Array, "edit row step"]:
    """Greedy continuations under several edits at once; arguments as `score_answers`. Pure."""

    def of_edit(edit: Edits, tokens: Any, lengths: Any) -> Array:
        edited, low_rank = _edited(params, edit, config)
        rows = {"lengths": lengths, "steps": steps}
        return greedy(edited, tokens, config=config, low_rank=low_rank, **rows)

    return jax.vmap(of_edit)(edits, tokens, lengths)


@functools.partial(jax.jit, static_argnames=("config",))
def text_loss(
    params: Params,
    edits: Edits,
    tokens: Int[Array, "text seq"],
    lengths: Int[Array, " text"],
    *,
    config: ModelConfig,
) -> Float[Array, " edit"]:
    """Mean -log p of a token of some texts under several edits at once; [1] without. Pure."""

    def of_edit(edit: Edits) -> Array:
        edited, low_rank = _edited(params, edit, config)
        losses = sentence_loss(edited, tokens, lengths, config=config, low_rank=low_rank)
        return losses.sum() / (lengths - 1).sum().astype(losses.dtype)

    return jax.vmap(of_edit)(edits) if edits else of_edit(edits)[None]


def _edited(params: Params, edit: Edits, config: ModelConfig) -> tuple[Params, LowRankTerms | None]:
    """Parameters of one of several edits, and what stands beside their kernels."""
    if isinstance(edit, tuple):
        return apply(params, edit, config=config), None
    return params, edit


def run_cases(
    lm: LM,
    cases: Sequence[Case],
    changes: Sequence[Sequence[Change]] | None = None,
    *,
    settings: MeasureSettings,
    texts: Sequence[str] = (),
    width: int | None = None,
) -> list[Outcome]:
    """What the model makes of each case, with its changes or as it is.

    Args:
      lm: the model before the changes.
      cases: from `encode_case`.
      changes: of each case; None: none.
      settings: what is measured.
      texts: neutral ones for perplexity; () for none.
      width: of answers, in tokens; None: of these cases. Free generation is that much longer.
    """
    width = answer_width(cases) if width is None else width
    neutral = text_rows(lm, texts, settings=settings) if texts else None
    neutral = neutral if settings.perplexity_tokens else None
    most = settings.batch or edits_at_once(lm.config)
    outcomes: dict[int, Outcome] = {}
    loss = None
    if changes is None and neutral is not None:
        loss = float(fetch(text_loss(lm.params, (), *neutral, config=lm.config))[0])
    chunk = ChunkSize(most, what="edits")

    def some(index: list[int], stacked: Edits) -> list[Outcome]:
        losses = None if loss is None else np.full(len(index), loss)
        if losses is None and neutral is not None:
            losses = fetch(text_loss(lm.params, stacked, *neutral, config=lm.config))
        return _run_batch(lm, [cases[i] for i in index], stacked, settings, width, losses)

    def in_parts(size: int, index: list[int], stacked: Edits) -> list[Outcome]:
        return [
            outcome
            for start in range(0, len(index), size)
            for outcome in some(
                index[start : start + size],
                jax.tree.map(lambda leaf, at=start: leaf[at : at + size], stacked),
            )
        ]

    for index, stacked in _stacks(lm, len(cases), changes, most):
        made = chunk.run(functools.partial(in_parts, index=index, stacked=stacked))
        outcomes.update(zip(index, made, strict=False))
    return [outcomes[i] for i in range(len(cases))]


def edits_at_once(config: ModelConfig) -> int:
    """Edits whose kernels take about a GiB together; eight at most, one at least."""
    kernel = 4 * config.num_layers * config.neurons_per_layer * config.hidden_size
    return max(1, min(_MOST_EDITS, _MOST_BYTES // kernel))


def _stacks(
    lm: LM, count: int, changes: Sequence[Sequence[Change]] | None, most: int
) -> Iterator[tuple[list[int], Edits]]:
    """Cases that are run together, with their edits stacked: those of equal structure."""
    edits: list[Edits] = [()] * count
    for i, of_case in enumerate(changes or ()):
        edits[i] = low_rank_terms(lm.params, of_case, config=lm.config) or tuple(of_case)
    groups: dict[Any, list[int]] = {}
    for i, edit in enumerate(edits):
        leaves, tree = jax.tree.flatten(edit)
        shapes = tuple(map(np.shape, leaves)) if isinstance(edit, tuple) else ()
        groups.setdefault((tree, shapes), []).append(i)
    for members in groups.values():
        for start in range(0, len(members), most):
            index = members[start : start + most]
            # A last batch that is not full is filled up: no program of its own.
            filled = (index + index[:1] * most)[: most if len(members) > most else len(index)]
            terms = [edit for i in filled if not isinstance(edit := edits[i], tuple)]
            if terms:
                yield filled, stacked_terms(terms)
            else:
                trees = [edits[i] for i in filled]
                yield filled, jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)


def _run_batch(
    lm: LM,
    cases: Sequence[Case],
    edits: Edits,
    settings: MeasureSettings,
    width: int,
    losses: np.ndarray | None,
) -> list[Outcome]:
    config, params = lm.config, lm.params
    scores = fetch(score_answers(params, edits, *scored_rows(cases, width=width), config=config))
    steps = settings.steps + width
    long = max(settings.fluency_tokens, steps)
    rows = prompt_rows([[case.questions[0].prompt] for case in cases])
    first = fetch(generate_edited(params, edits, *rows, config=config, steps=long))
    others = [[q.prompt for q in case.questions[1:]] for case in cases]
    rest = None
    if any(others):
        filled = [prompts or [cases[i].questions[0].prompt] for i, prompts in enumerate(others)]
        rows = prompt_rows(filled)
        rest = fetch(generate_edited(params, edits, *rows, config=config, steps=steps))
    made = []
    for number, case in enumerate(cases):
        count = len(case.questions)
        near = [i for i, q in enumerate(case.questions) if q.kind == "neighbour"]
        ids = [first[number, 0, :steps]]
        ids += [] if rest is None else [*rest[number, : count - 1]]
        log_p = scores.log_probability[number, : 2 * count].reshape(count, 2)
        loss = float("nan") if losses is None else float(losses[number])
        whole = first[number, 0, : max(settings.fluency_tokens, 1)]
        finite = bool(np.isfinite(log_p).all()) and all((i != NO_TOKEN).all() for i in ids)
        finite = finite and (whole != NO_TOKEN).all() and (losses is None or np.isfinite(loss))
        made.append(
            Outcome(
                log_p.astype(np.float64),
                scores.choices[number, : 2 * count : 2],
                scores.following[number, : 2 * count : 2][near],
                tuple(
                    _text(lm, question, of_question)
                    for question, of_question in zip(case.questions, ids, strict=True)
                ),
                _text(lm, case.questions[0], whole) if settings.fluency_tokens else "",
                loss,
                bool(finite),
            )
        )
    return made


def _text(lm: LM, question: Question, ids: np.ndarray) -> str:
    kept = ids.tolist()
    kept = kept[: kept.index(NO_TOKEN)] if NO_TOKEN in kept else kept
    return continuation(lm, question.prompt, kept)


@any_axes
def measure(
    lm: LM,
    requests: Sequence[EditRequest],
    changes: Sequence[Sequence[Change]] | None = None,
    *,
    settings: MeasureSettings | None = None,
    unedited: LM | None = None,
    texts: Sequence[str] = (),
) -> list[Row]:
    """What edits did, a row for each request. Nothing is changed.

    Args:
      lm: the model.
      requests: each with questions of its own.
      changes: of each request, made alone on `lm` (`Edit.changes`); None: `lm` is measured as it
        is, edited already or not.
      settings: what is measured.
      unedited: what locality is measured against; default: `lm` without the changes.
      texts: neutral ones, for perplexity; () for none.

    Returns:
      For each request, shares from 0 to 1 (None where it has no such prompts):
      `efficacy_probability` (whether the new answer is likelier than the old one, both whole),
      `efficacy_forced` (whether each token of it is the first choice, given those before it),
      `efficacy_free` (whether free generation gives it, see `judging.gives`), the same of
      `generalisation` (paraphrases) and `portability`; of neighbours `locality_probability` (their
      own answer is likelier than the new one), `locality_forced` (first choices at the answer's
      tokens are those of the unedited model), `locality_free` (the first sentence generated is the
      unedited model's, word for word) and `locality_known` (of the answers that the unedited model
      gives, those still given). Then `locality_kl` (of the next token's distribution, unedited
      from edited, nats), `fluency` (`judging.fluency` of the prompt's continuation, bits),
      `perplexity`, `perplexity_ratio` to the unedited; `probability_new`, `probability_old`,
      `generated`, and `failed`, why nothing could be measured: then all shares are 0.

    Raises:
      ConfigError: changes of another number than requests.
      DataError: a request that cannot be asked; see `encode_case`.
    """
    if changes is not None and len(changes) != len(requests):
        raise ConfigError(f"{len(changes)} changes for {len(requests)} requests; one each")
    if not requests:
        return []
    settings = settings or MeasureSettings()
    cases = [encode_case(lm, request, settings=settings) for request in requests]
    base = unedited or lm
    before = run_cases(base, cases, settings=settings, texts=texts)
    after = before
    if changes is not None or base is not lm:
        after = run_cases(lm, cases, changes, settings=settings, texts=texts)
    return [
        {"request": case.request.id, **measured_row(case, *pair)}
        for case, *pair in zip(cases, after, before, strict=True)
    ]
