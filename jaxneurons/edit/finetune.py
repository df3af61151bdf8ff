"""Fine-tuning of one down kernel on the new answers: plain (FT-M), or within a ball (FT-L).

Adam on -log p of the new answer, the mean over all tokens of the answer, each after the prompt and
the tokens before it; nothing else is in the loss. With a norm, every entry of the change is clamped
to [-norm, norm] after each step (Zhu et al. 2020, arXiv 2012.00363, section 3.2): it is the
L-infinity ball around the unedited kernel.

Below the layer nothing changes, nor does what enters its down projection, so each prompt is run up
to there once; a step computes `act @ change` and runs the layers above.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from jaxneurons.edit.changes import LowRank
from jaxneurons.edit.descent import (
    Adam,
    Descended,
    Loss,
    alone,
    check_finite,
    descend_each,
    descend_together,
    trace,
)
from jaxneurons.edit.encoding import EncodedRequest, encode_request
from jaxneurons.edit.method import Edit, FineTune
from jaxneurons.edit.requests import EditRequest
from jaxneurons.edit.teacher_forcing import (
    Answers,
    answer_batches,
    answer_loss,
    layer_step,
    run_layers,
)
from jaxneurons.errors import ConfigError, DataError
from jaxneurons.model import layers
from jaxneurons.model.config import ModelConfig
from jaxneurons.model.parameters import Params
from jaxneurons.storage.progress import Progress

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ROWS = 8
"""Requests that are optimised side by side, at most."""

MEMORY = 1 << 30
"""Bytes that the changes of requests side by side, their moments and gradients may take."""

_COPIES = 6
"""Arrays of a change's size that a step needs: change, moments, gradient, and new ones."""


class Stream(NamedTuple):
    """Prompts with their answers, run up to a layer's down projection.

    Attributes:
      leaving: the stream as it leaves the layer, unedited.
      down: what the layer's down projection puts out, unedited.
      act: what enters the down projection.
      lengths: real tokens.
      positions: before each token of the answer.
      targets: the answer's tokens.
      real: which of them are no padding.
    """

    leaving: Float[Array, "*batch seq hidden"]
    down: Float[Array, "*batch seq hidden"]
    act: Float[Array, "*batch seq width"]
    lengths: Int[Array, "*batch"]
    positions: Int[Array, "*batch answer"]
    targets: Int[Array, "*batch answer"]
    real: Bool[Array, "*batch answer"]


@functools.partial(jax.jit, static_argnames=("config", "layer"))
def up_to_layer(params: Params, answers: Answers, *, config: ModelConfig, layer: int) -> Stream:
    """Run prompts with their answers up to a layer, once."""
    x = layers.embed(params, answers.tokens, config)
    x = run_layers(params, x, answers.lengths, config=config, end=layer)
    step = layer_step(params, x.shape[:2], answers.lengths, config=config)
    leaving, activations = step(x, layer)
    return Stream(leaving, activations["down"], activations["act"], *answers[1:])


@dataclasses.dataclass(frozen=True)
class KernelLoss:
    """-log p of a request's answer with a change of one down kernel.

    Attributes:
      config: the model's shape.
      layer: whose kernel it is.
    """

    config: ModelConfig
    layer: int

    def __call__(
        self, params: Params, variables: Float[Array, "width hidden"], data: Stream
    ) -> Loss:
        """The loss of one request, whose arrays have no batch axis."""
        change = data.act.astype(jnp.float32) @ variables
        of_layer = jax.tree.map(lambda stack: stack[self.layer], params["layers"])
        x = layers.change_down(of_layer, data.leaving, data.down, change, self.config)
        x = run_layers(
            params, x[None], data.lengths[None], config=self.config, first=self.layer + 1
        )[0]
        answer = data.positions, data.targets, data.real
        mean, total = answer_loss(params, x, *answer, config=self.config)
        return Loss(mean, mean, total)

    def project(
        self, variables: Float[Array, "width hidden"], bounds: Float[Array, ""]
    ) -> Float[Array, "width hidden"]:
        """Every entry within [-bound, bound]."""
        return jnp.clip(variables, -bounds, bounds)


def fine_tune(
    params: Params,
    requests: Sequence[EditRequest],
    *,
    config: ModelConfig,
    tokenizer: "PreTrainedTokenizerBase",
    settings: FineTune,
    progress: Progress | None = None,
) -> Edit:
    """Fine-tune one down kernel on all requests together: on the mean of their losses.

    `trace.steps` is the same for all of them; one is `reached` if its own loss is below `stop` at
    the end.

    Args:
      params: the model's parameters.
      requests: what is to be edited.
      config: the model's shape.
      tokenizer: the model's.
      settings: of the method.
      progress: called with steps done and steps at most.

    Raises:
      DataError: no requests, one that cannot be encoded, or numbers that are not finite.
      ConfigError: a layer that the model does not have.
    """
    objective, encoded = _prepare(requests, config, tokenizer, settings)
    streams = [
        (index, up_to_layer(params, answers, config=config, layer=objective.layer))
        for index, answers in _batches(encoded, ROWS)
    ]
    start = jnp.zeros((config.intermediate_size, config.hidden_size), jnp.float32)
    descended = descend_together(
        objective, params, start, streams, _bound(settings), adam=_adam(settings), progress=progress
    )
    _check(params, descended, requests, encoded, config, settings)
    return _edit(descended, objective, settings)


def fine_tune_each(
    params: Params,
    requests: Sequence[EditRequest],
    *,
    config: ModelConfig,
    tokenizer: "PreTrainedTokenizerBase",
    settings: FineTune,
    progress: Progress | None = None,
) -> list[Edit]:
    """Fine-tune one down kernel on each request alone, from the parameters as they are.

    As `fine_tune` for every request by itself, but many side by side.

    Args:
      params: the model's parameters.
      requests: what is to be edited.
      config: the model's shape.
      tokenizer: the model's.
      settings: of the method.
      progress: called with requests done and how many there are.

    Raises:
      DataError: no requests, one that cannot be encoded, or numbers that are not finite.
      ConfigError: a layer that the model does not have.
    """
    objective, encoded = _prepare(requests, config, tokenizer, settings)
    shape = (config.intermediate_size, config.hidden_size)
    rows = max(1, min(ROWS, MEMORY // (_COPIES * 4 * shape[0] * shape[1])))
    edits: dict[int, Edit] = {}
    for index, answers in _batches(encoded, 1 << (rows.bit_length() - 1)):
        stream = up_to_layer(params, answers, config=config, layer=objective.layer)
        filled = len(answers.lengths)
        descended = descend_each(
            objective,
            params,
            jnp.zeros((filled, *shape), jnp.float32),
            stream,
            jnp.broadcast_to(_bound(settings), (filled,)),
            adam=_adam(settings),
        )
        for row, i in enumerate(index.tolist()):
            single = alone(descended, row)
            _check(params, single, [requests[i]], [encoded[i]], config, settings)
            edits[i] = _edit(single, objective, settings)
        if progress is not None:
            progress(len(edits), len(requests))
    return [edits[i] for i in range(len(requests))]


def _prepare(
    requests: Sequence[EditRequest],
    config: ModelConfig,
    tokenizer: "PreTrainedTokenizerBase",
    settings: FineTune,
) -> tuple[KernelLoss, list[EncodedRequest]]:
    if not requests:
        raise DataError("no requests: give at least one fact to edit")
    layer = default_tuned_layer(config) if settings.layer is None else settings.layer
    if not 0 <= layer < config.num_layers:
        raise ConfigError(f"layer {layer} is not in this model, which has {config.num_layers}")
    encoded = [encode_request(tokenizer, request, config=config) for request in requests]
    return KernelLoss(config, layer), encoded


def default_tuned_layer(config: ModelConfig) -> int:
    """The layer that is fine-tuned where none is given: two thirds up, as 21 of 32."""
    return 2 * config.num_layers // 3


def _batches(encoded: Sequence[EncodedRequest], rows: int) -> list[tuple[np.ndarray, Answers]]:
    return answer_batches(
        [request.prompt for request in encoded], [request.target for request in encoded], rows
    )


def _bound(settings: FineTune) -> Array:
    return jnp.float32(np.inf if settings.norm is None else settings.norm)


def _adam(settings: FineTune) -> Adam:
    return Adam(settings.steps, settings.learning_rate, settings.stop)


def _check(
    params: Params,
    descended: Descended,
    requests: Sequence[EditRequest],
    encoded: Sequence[EncodedRequest],
    config: ModelConfig,
    settings: FineTune,
) -> None:
    check_finite(
        params,
        descended,
        requests,
        [request.prompt for request in encoded],
        config=config,
        learning_rate=settings.learning_rate,
    )


def _edit(descended: Descended, objective: KernelLoss, settings: FineTune) -> Edit:
    """An edit that adds the change to the kernel, exactly: one of its factors is the identity."""
    change = np.asarray(descended.variables)
    width, hidden = change.shape
    same = np.eye(min(width, hidden), dtype=np.float32)
    left, right = (same, change) if width <= hidden else (change, same)
    return Edit(
        changes=(LowRank("ffn.down", objective.layer, left, right),),
        settings=settings,
        trace=trace(descended, stop=settings.stop),
        keys={},
        facts={"layers": [objective.layer]},
    )
