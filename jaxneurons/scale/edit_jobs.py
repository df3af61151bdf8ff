"""The main programs of editing: values of facts, moments of keys, measures.

Values are those of MEMIT (arXiv 2210.07229) at the last edited layer. What is solved from them is
float64 on the host (`edit.solving`): the covariance of a layer, width by width.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from jaxneurons.edit.cases import MeasureSettings
from jaxneurons.edit.changes import LowRank
from jaxneurons.edit.contexts import Contexts, batch_size
from jaxneurons.edit.covariance import add_keys
from jaxneurons.edit.experts import check_one_kernel
from jaxneurons.edit.measures import edits_at_once, generate_edited, score_answers
from jaxneurons.edit.method import MEMIT, default_layers
from jaxneurons.edit.optimising import Weights, optimise_values
from jaxneurons.edit.passes import Split
from jaxneurons.model.config import ModelConfig
from jaxneurons.scale.programs import Argument, Chunks, Program, Work

AFTER = 8
"""Tokens from the subject's last one on, without the answer."""
QUESTIONS = 10
"""Questions that a request is measured on: paraphrases, neighbours, portability."""
TEXT_ROWS, TEXT_TOKENS, TEXTS = 8, 128, 2000
"""Rows and tokens of a batch that moments of keys are taken of, and rows in all."""


def requests_at_once(config: ModelConfig, work: Work, platform: str) -> int:
    """Requests whose values are optimised together by default."""
    contexts = Contexts(
        (((0,), 0),) * (MEMIT().optimisation.prefixes + 1), (0,) * work.answers, ((0,), 0)
    )
    return batch_size([contexts], config, platform=platform)


def edit_programs(
    config: ModelConfig, work: Work, chunks: Chunks, dtype: DTypeLike
) -> tuple[Program, ...]:
    """Values of a batch of requests, moments of a layer's keys, and measures of an edit.

    Raises:
      ConfigError: a model with experts, whose down kernels are not edited so.
    """
    check_one_kernel(config, "MEMIT")
    return (
        _values(config, work, chunks),
        _moments(config, work),
        *_measures(config, work),
    )


def _values(config: ModelConfig, work: Work, chunks: Chunks) -> Program:
    settings = MEMIT().optimisation
    each, requests = settings.prefixes + 2, chunks.prompts
    rows, after = requests * each, AFTER + work.answers - 1
    before = 1 << (max(32, work.tokens) - 1).bit_length()
    layer = default_layers(config)[-1]
    split = Split(
        before=Argument((rows, before), jnp.int32),  # pyright: ignore[reportArgumentType]
        after=Argument((rows, after), jnp.int32),  # pyright: ignore[reportArgumentType]
        last=Argument((rows,), jnp.int32),  # pyright: ignore[reportArgumentType]
        length=Argument((rows,), jnp.int32),  # pyright: ignore[reportArgumentType]
    )
    weights = Weights(*(Argument((), jnp.float32),) * 5)  # pyright: ignore[reportArgumentType]

    def program(params: Any, split: Split, ends: Any, targets: Any, weights: Weights) -> Any:
        return optimise_values(
            params,
            split,
            ends,
            targets,
            weights,
            config=config,
            layer=layer,
            place="residual",
            steps=settings.steps,
        )

    above = (config.num_layers - layer - 1) / config.num_layers
    turns = settings.steps + 1
    return Program(
        "optimise_values",
        program,
        (
            split,
            Argument((requests, each), jnp.int32),
            Argument((requests, work.answers), jnp.int32),
            weights,
        ),
        calls=-(-work.prompts // requests),
        loops=turns,
        positions=rows * (before + after + turns * above * after),
        gradients=rows * turns * above * after,
        passes=2 + 2 * turns * above,
    )


def _moments(config: ModelConfig, work: Work) -> Program:
    width, layers = config.intermediate_size, default_layers(config)[: work.layers]
    layers = layers or (0,)

    def program(params: Any, sums: Any, tokens: Any, lengths: Any) -> Any:
        return add_keys(sums, params, tokens, lengths, config=config, layers=layers)

    return Program(
        "add_keys",
        program,
        (
            Argument((len(layers), width, width), jnp.float32),
            Argument((TEXT_ROWS, TEXT_TOKENS), jnp.int32),
            Argument((TEXT_ROWS,), jnp.int32),
        ),
        calls=TEXTS // TEXT_ROWS,
        positions=TEXT_ROWS * TEXT_TOKENS,
    )


def _measures(config: ModelConfig, work: Work) -> tuple[Program, Program]:
    edits, settings = edits_at_once(config), MeasureSettings()
    rows, length = 2 * QUESTIONS, -(-(work.tokens + work.answers) // 16) * 16
    change = _change(config, edits)
    tokens = Argument((edits, rows, length), jnp.int32)
    per_row = Argument((edits, rows), jnp.int32)
    score = Program(
        "score_answers",
        functools.partial(score_answers, config=config),
        ((change,), tokens, per_row, per_row, Argument((edits, rows, work.answers), jnp.int32)),
        calls=-(-work.prompts // edits),
        positions=math.prod(tokens.shape),
    )
    steps = max(settings.fluency_tokens, settings.steps)
    first = Argument((edits, 1, length), jnp.int32)
    generate = Program(
        "generate_edited",
        functools.partial(generate_edited, config=config, steps=steps),
        ((change,), first, Argument((edits, 1), jnp.int32)),
        calls=-(-work.prompts // edits),
        positions=edits * (length + steps - 1),
        passes=steps,
    )
    return score, generate


def _change(config: ModelConfig, edits: int) -> LowRank:
    """A fact's change of one layer, of several edits, with `Argument` for its arrays."""
    nothing = np.zeros((1, 1), np.float32)
    layer = default_layers(config)[-1]
    _, tree = jax.tree.flatten(LowRank("ffn.down", layer, nothing, nothing))
    left = Argument((edits, config.intermediate_size, 1), jnp.float32)
    right = Argument((edits, 1, config.hidden_size), jnp.float32)
    return jax.tree.unflatten(tree, [left, right])
