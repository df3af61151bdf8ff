"""The loss of a learned edit of neurons, as a function of multipliers or of changes of rows."""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from jaxneurons.edit.descent import Loss
from jaxneurons.edit.teacher_forcing import Additions, answer_loss, run_layers
from jaxneurons.model import layers
from jaxneurons.model.config import ModelConfig
from jaxneurons.model.parameters import Params
from jaxneurons.neurons.sets import site_width

NO_LAYER = np.iinfo(np.int32).max
"""A layer that no model has: the neuron only fills the shape."""


class Kept(NamedTuple):
    """Other prompts, after which the distribution of the next token is to stay.

    Attributes:
      entering: the stream as it enters the first layer that changes.
      lengths: real tokens.
      log_probability: of every next token in the unedited model.
    """

    entering: Float[Array, "*batch prompt seq hidden"]
    lengths: Int[Array, "*batch prompt"]
    log_probability: Float[Array, "*batch prompt vocab"]


class PlacedNeurons(NamedTuple):
    """Which neurons' multipliers are learned, by site.

    Attributes:
      layer: of each, counted from the first layer that changes; `NO_LAYER` fills the shape.
      index: of each, in its layer.
    """

    layer: Mapping[str, Int[Array, "*batch neuron"]]
    index: Mapping[str, Int[Array, "*batch neuron"]]  # pyright: ignore[reportIncompatibleMethodOverride]


class PlacedRows(NamedTuple):
    """Which rows are learned, by layer from the first that changes.

    Attributes:
      index: of each, in its layer.
      unit: norm / sqrt(hidden), which its change is counted in; 0 fills the shape.
    """

    index: Int[Array, "*batch layer row"]  # pyright: ignore[reportIncompatibleMethodOverride]
    unit: Float[Array, "*batch layer row"]


class Learning(NamedTuple):
    """All that the loss of a request needs.

    Attributes:
      entering: the stream of the prompt with its answer as it enters the first layer that changes.
      lengths: real tokens.
      positions: before each token of the answer.
      targets: the answer's tokens.
      real: which of them are no padding.
      kept: other prompts; None where the divergence has no weight.
      placed: which neurons are learned.
    """

    entering: Float[Array, "*batch seq hidden"]
    lengths: Int[Array, "*batch"]
    positions: Int[Array, "*batch answer"]
    targets: Int[Array, "*batch answer"]
    real: Bool[Array, "*batch answer"]
    kept: Kept | None
    placed: PlacedNeurons | PlacedRows


@dataclasses.dataclass(frozen=True)
class NeuronLoss:
    """The loss of a request with multipliers of neurons, or additions to their rows.

    Attributes:
      config: the model's shape.
      first: the lowest layer with neurons.
      kl_factor: weight of the divergence.
    """

    config: ModelConfig
    first: int
    kl_factor: float

    def __call__(self, params: Params, variables: Any, data: Learning) -> Loss:
        """The loss of one request, whose arrays have no batch axis."""
        change = self._change(variables, data.placed)
        run = functools.partial(run_layers, params, config=self.config, first=self.first, **change)
        x = run(data.entering[None], data.lengths[None])[0]
        answer = data.positions, data.targets, data.real
        mean, total = answer_loss(params, x, *answer, config=self.config)
        if data.kept is None:
            return Loss(mean, mean, total)
        x = run(data.kept.entering, data.kept.lengths)
        edited = next_log_probability(params, x, data.kept.lengths, config=self.config)
        gap = edited - data.kept.log_probability
        divergence = jnp.mean(jnp.sum(jnp.exp(edited) * gap, axis=-1))
        return Loss(mean + self.kl_factor * divergence, mean, total)

    def project(self, variables: Any, bounds: Float[Array, ""]) -> Any:
        """Log multipliers, or rows' changes in their units, within the bound."""
        if isinstance(variables, Mapping):
            return jax.tree.map(lambda theta: jnp.clip(theta, -bounds, bounds), variables)
        most = bounds * np.sqrt(self.config.hidden_size)
        norm = jnp.linalg.norm(variables, axis=-1, keepdims=True)
        return variables * jnp.minimum(1, most / jnp.maximum(norm, most / 2))

    def _change(self, variables: Any, placed: PlacedNeurons | PlacedRows) -> dict[str, Any]:
        if isinstance(placed, PlacedRows):
            return {"additions": Additions(placed.index, variables * placed.unit[..., None])}
        scales = {}
        for site, theta in variables.items():
            shape = (self.config.num_layers - self.first, site_width(self.config, site))
            at = placed.layer[site], placed.index[site]
            scales[site] = jnp.ones(shape, jnp.float32).at[at].set(jnp.exp(theta), mode="drop")
        return {"scales": scales}


def next_log_probability(
    params: Params,
    x: Float[Array, "prompt seq hidden"],
    lengths: Int[Array, " prompt"],
    *,
    config: ModelConfig,
) -> Float[Array, "prompt vocab"]:
    """log p of every token after prompts, from the stream as it leaves the last layer, float32."""
    last = jnp.take_along_axis(x, (lengths - 1)[:, None, None], axis=1)[:, 0]
    return jax.nn.log_softmax(layers.unembed(params, last, config), axis=-1)
