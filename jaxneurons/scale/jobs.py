"""What each job runs: its main programs, the same public functions, with shapes in place of arrays.

`programs_of` makes them for a model and chunks: the model and the share of a batch of one device
for a prediction, the whole of both for the compiler.
"""

import functools
import math
from typing import Any

import jax.numpy as jnp
from jax.typing import DTypeLike

from jaxneurons.engine.ablation import default_shape, generate_ablated
from jaxneurons.engine.attribution import integrated_gradients
from jaxneurons.engine.device_memory import (
    ROW_BYTES,
    prompts_for,
    prompts_that_fit,
    row_bytes_that_fit,
)
from jaxneurons.engine.last_position import Changes, last_position, scaled_answers, trials_at_once
from jaxneurons.engine.parametrisation import panels_at_first
from jaxneurons.engine.quadrature import PANEL_NODES, Quadrature
from jaxneurons.engine.responses import ROWS, mean_responses
from jaxneurons.engine.row_memory import rows_in_budget
from jaxneurons.engine.rows import prefill
from jaxneurons.model.config import ModelConfig
from jaxneurons.neurons.sets import FFN, site_width
from jaxneurons.prompts.batches import (
    ANSWER_TOKENS,
    LENGTH_TOKENS,
    PLAN_TOKENS,
    bucket,
    default_batch_size,
)
from jaxneurons.scale.edit_jobs import edit_programs, requests_at_once
from jaxneurons.scale.programs import Argument, Chunks, Job, Program, Work

ROUNDS = 2
"""Refining rounds that a batch of the adaptive rule is taken to need; SmolLM2 needs 1 to 3."""

NEURONS = 32
"""Neurons that a trial changes, at most."""


def default_chunks(
    job: Job,
    config: ModelConfig,
    work: Work,
    *,
    platform: str,
    room: int,
) -> Chunks:
    """What the library runs at once on one device if nothing else is said.

    Args:
      job: whose batches.
      config: the model's shape.
      work: how much of it.
      platform: cpu, gpu or tpu.
      room: bytes of the device beside the parameters.
    """
    shape, sets, rows_take = default_shape(platform), 1, ROW_BYTES
    if job in ("locate", "evaluate"):
        counted = max(work.tokens, ANSWER_TOKENS * work.answers)
        prompts = default_batch_size(platform)
        if counted > PLAN_TOKENS:
            prompts = _power_of_two(max(1, prompts * PLAN_TOKENS // counted))
        rows_take = row_bytes_that_fit(
            config, room, prompts=prompts, tokens=bucket(work.tokens), answers=work.answers
        )
        prompts = prompts_for(rows_take, prompts)
    elif job == "edit":
        prompts = requests_at_once(config, work, platform)
    else:
        prompts = ROWS if job == "responses" else shape.prompts
        if work.tokens > LENGTH_TOKENS:
            prompts = _power_of_two(max(1, prompts * LENGTH_TOKENS // bucket(work.tokens, 4)))
        else:
            sets = 1 if job == "responses" else shape.sets
        tokens = bucket(work.tokens, 4) + (0 if job == "responses" else work.generated)
        fit = prompts_that_fit(config, room, prompts=sets * prompts, tokens=tokens)
        prompts = max(1, fit // sets)
    keys = bucket(work.tokens) + work.answers - 1
    rows = rows_in_budget(config, keys, rows_take, platform=platform)
    trials = min(trials_at_once(config, prompts), work.sets)
    return Chunks(prompts, max(rows, 1), min(shape.sets, work.sets), trials)


def programs_of(
    job: Job, config: ModelConfig, work: Work, chunks: Chunks, dtype: DTypeLike
) -> tuple[Program, ...]:
    """The main programs of a job.

    Args:
      job: which.
      config: the model's shape, or that of what one device computes.
      work: how much of it in all.
      chunks: how much at once; for one device, its share.
      dtype: of the parameters.
    """
    if job == "locate":
        return (_locate(config, work, chunks),)
    if job == "evaluate":
        return (_evaluate(config, work, chunks),)
    if job == "edit":
        return edit_programs(config, work, chunks, dtype)
    responses, sweep = _responses(config, work, chunks), _sweep(config, work, chunks)
    return {"responses": (responses,), "sweep": (sweep,)}.get(job, (responses, sweep))


def _power_of_two(count: int) -> int:
    return 1 << (count.bit_length() - 1)


def _tokens(prompts: int, length: int) -> tuple[Argument, Argument]:
    """Prompts and their lengths."""
    return Argument((prompts, length), jnp.int32, 0), Argument((prompts,), jnp.int32, 0)


def _calls(work: Work, chunks: Chunks) -> int:
    return -(-work.prompts // chunks.prompts)


def nodes_of(config: ModelConfig, work: Work) -> tuple[int, int]:
    """Rows of a prompt's answer token in the first pass, and in all refining rounds together."""
    if work.rule == "adaptive":
        inner = PANEL_NODES - 2
        first = panels_at_first(config, "up") * (inner + 1) + 1
        return first, ROUNDS * 4 * inner
    return config.num_layers * work.steps, 0


def _row_passes(config: ModelConfig, work: Work, chunks: Chunks) -> int:
    """Passes of the rows' first nodes: each has at least a node of every layer and prompt."""
    layers, nodes = config.num_layers, work.steps
    if work.rule == "adaptive":
        layers, nodes = panels_at_first(config, "up"), PANEL_NODES - 1
    together = chunks.rows // (chunks.prompts * work.answers) // layers
    return -(-nodes // min(max(1, together), nodes))


def _locate(config: ModelConfig, work: Work, chunks: Chunks) -> Program:
    length, batch = bucket(work.tokens), chunks.prompts
    attribute = functools.partial(
        integrated_gradients,
        config=config,
        quadrature=Quadrature(work.rule, work.steps),
        chunk_rows=chunks.rows,
    )

    def program(params: Any, tokens: Any, targets: Any, lengths: Any) -> Any:
        return attribute(params, tokens, targets, lengths=lengths)

    tokens, lengths = _tokens(batch, length)
    targets = Argument((batch, work.answers), jnp.int32, 0)
    first, more = (batch * work.answers * n for n in nodes_of(config, work))
    # Rows enter at their own layer: on average they pass half of them.
    rows = (first + more) / 2
    return Program(
        "integrated_gradients",
        program,
        (tokens, targets, lengths),
        calls=_calls(work, chunks),
        loops=ROUNDS,
        positions=batch * (length + work.answers - 1) + rows,
        gradients=rows,
        passes=1 + 2 * (_row_passes(config, work, chunks) + (ROUNDS if more else 0)),
    )


def _evaluate(config: ModelConfig, work: Work, chunks: Chunks) -> Program:
    length, batch, trials = bucket(work.tokens), chunks.prompts, chunks.trials

    def program(params: Any, tokens: Any, targets: Any, lengths: Any, changes: Changes) -> Any:
        pre = prefill(params, tokens, targets, config=config, lengths=lengths)
        return scaled_answers(params, last_position(pre), changes, config=config)

    tokens, lengths = _tokens(batch, length)
    targets = Argument((batch, work.answers), jnp.int32, 0)
    index = Argument((work.sets, batch, NEURONS), jnp.int32, 1)
    factor = Argument((work.sets, batch, NEURONS), jnp.float32, 1)
    return Program(
        "scaled_answers",
        program,
        (tokens, targets, lengths, Changes(index, index, factor)),  # pyright: ignore[reportArgumentType]
        calls=_calls(work, chunks),
        positions=batch * (length + (1 + work.sets) * work.answers),
        passes=1 + math.ceil(work.sets / trials),
    )


def _responses(config: ModelConfig, work: Work, chunks: Chunks) -> Program:
    tokens, lengths = _tokens(chunks.prompts, bucket(work.tokens, 4))
    return Program(
        "mean_responses",
        functools.partial(mean_responses, config=config, sites=FFN),
        (tokens, lengths),
        calls=_calls(work, chunks),
        positions=math.prod(tokens.shape),
    )


def _sweep(config: ModelConfig, work: Work, chunks: Chunks) -> Program:
    tokens, lengths = _tokens(chunks.prompts, bucket(work.tokens, 4))
    scales = {
        site: Argument((chunks.sets, config.num_layers, site_width(config, site)), jnp.float32)
        for site in FFN
    }
    generate = functools.partial(generate_ablated, config=config, steps=work.generated)
    return Program(
        "generate_ablated",
        generate,
        (tokens, lengths, scales),
        calls=_calls(work, chunks) * -(-work.sets // chunks.sets),
        positions=chunks.sets * (math.prod(tokens.shape) + chunks.prompts * (work.generated - 1)),
        passes=work.generated,
    )
