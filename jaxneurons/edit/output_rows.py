"""Rows of down kernels: what located neurons of the feed-forward layer write."""

from collections.abc import Sequence
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxneurons.edit.changes import Rows
from jaxneurons.edit.experts import rows_at
from jaxneurons.errors import DataError
from jaxneurons.model.config import ModelConfig
from jaxneurons.model.parameters import Params
from jaxneurons.neurons.sets import NeuronSet

WRITERS = ("act", "up", "gate")
"""Sites whose neurons have the index of the row of the down kernel that they write by."""


class OutputRows(NamedTuple):
    """Rows of down kernels, ascending and unique.

    Attributes:
      layer: of each row.
      index: in the layer's kernel.
    """

    layer: np.ndarray
    index: np.ndarray  # pyright: ignore[reportIncompatibleMethodOverride]

    def values(self, params: Params) -> Float[Array, "row hidden"]:
        """What the rows hold, float32."""
        kernel = params["layers"]["ffn"]["down"]["kernel"]
        return kernel[rows_at(kernel, self.layer, self.index)].astype(jnp.float32)

    def places(self, members: "OutputRows") -> np.ndarray:
        """Where some of these rows are among all of them."""
        place = {pair: i for i, pair in enumerate(zip(*map(np.ndarray.tolist, self), strict=True))}
        pairs = zip(*map(np.ndarray.tolist, members), strict=True)
        return np.array([place[pair] for pair in pairs], np.int32)

    def changes(self, values: Float[Array, "row hidden"]) -> tuple[Rows, ...]:
        """Changes that set the rows, one for each layer."""
        return tuple(
            Rows("ffn.down", int(layer), jnp.asarray(self.index[at]), values[at])
            for layer in np.unique(self.layer)
            for at in [np.flatnonzero(self.layer == layer)]
        )


def output_rows(neurons: NeuronSet, config: ModelConfig) -> OutputRows:
    """The rows that neurons write by, each once, though neurons of several sites may share it.

    Raises:
      DataError: no neurons, one that the model does not have, or of a site without such a row.
    """
    if not neurons:
        raise DataError("no neurons: give at least one whose output row is to change")
    neurons.check(config)
    if others := [site for site in neurons.codes if site not in WRITERS]:
        raise DataError(
            f"neurons of site {others[0]!r} have no output row; rows of the down kernel belong to "
            f"those of {', '.join(WRITERS)}"
        )
    pairs = np.unique(np.concatenate([neurons.pairs(site) for site in neurons.codes]), axis=0)
    return OutputRows(pairs[:, 0].astype(np.int32), pairs[:, 1].astype(np.int32))


def set_for_each(neurons: NeuronSet | Sequence[NeuronSet], requests: int) -> tuple[NeuronSet, ...]:
    """A set for every request: the same for all of them, or each one's.

    Raises:
      DataError: another number of sets than of requests.
    """
    if isinstance(neurons, NeuronSet):
        return (neurons,) * requests
    if len(neurons) != requests:
        raise DataError(
            f"{len(neurons)} sets of neurons for {requests} requests; give one set for all of "
            "them, or one for each"
        )
    return tuple(neurons)
