"""Least squares over keys: what the methods that write keys' values into a kernel share.

Each of them has a matrix A that says how much it costs to change what a direction of keys maps to,
and an update `A^-1 K (I + K^T A^-1 K)^-1 R` for keys K [width, request] and residuals R
[request, hidden]: the solution `(A + K K^T)^-1 K R` by the identity of Woodbury, which is also that
of one request alone where K has one column. In float64 on the host: these matrices are small.
"""

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence

import jax.numpy as jnp
import numpy as np
import scipy.linalg
from jaxtyping import Float

from jaxneurons.edit.changes import LowRank
from jaxneurons.edit.contexts import name_of
from jaxneurons.edit.covariance import Covariance, regularise
from jaxneurons.edit.requests import EditRequest
from jaxneurons.errors import DataError
from jaxneurons.model.config import ModelConfig

Spread = Callable[[np.ndarray], np.ndarray]
"""Keys [width, request] to A^-1 keys, float64."""


def together(
    spread: Spread, keys: Float[np.ndarray, "request width"]
) -> Float[np.ndarray, "width request"]:
    """`left` of an update that writes all requests at once, float64."""
    k = np.asarray(keys, np.float64).T
    spread_keys = spread(k)
    gram = np.eye(k.shape[1]) + k.T @ spread_keys
    return scipy.linalg.solve(gram, spread_keys.T, assume_a="pos").T


def alone(
    spread: Spread, keys: Float[np.ndarray, "request width"]
) -> Float[np.ndarray, "width request"]:
    """`left` of updates that write one request each, float64."""
    k = np.asarray(keys, np.float64).T
    spread_keys = spread(k)
    return spread_keys / (1 + (k * spread_keys).sum(0))


@functools.lru_cache(maxsize=64)
def regular(covariance: Covariance) -> Covariance:
    """A covariance that can be inverted: itself, or regularised, with a warning that says so.

    Raises:
      DataError: it is zero or not finite.
    """
    return covariance if covariance.ridge else regularise(covariance)


@functools.lru_cache(maxsize=64)
def inverse_of(covariance: Covariance, weight: float = 1.0) -> Spread:
    """(weight C)^-1 as an operator.

    Raises:
      DataError: a covariance of nothing, or of numbers that are not finite.
    """
    return factorised(weight * regular(covariance).regularised(), covariance.layer)


def factorised(matrix: Float[np.ndarray, "width width"], layer: int) -> Spread:
    """The inverse of a symmetric, positive definite matrix as an operator.

    Raises:
      DataError: it is not positive definite.
    """
    try:
        factor = scipy.linalg.cho_factor(matrix, lower=True)
    except np.linalg.LinAlgError:
        raise DataError(
            f"layer {layer}: the covariance and the keys of earlier edits make a matrix that "
            "cannot be inverted; collect the covariance over more text"
        ) from None
    return functools.partial(scipy.linalg.cho_solve, factor)


def covariance_of(
    covariance: Mapping[int, Covariance] | None, layer: int, config: ModelConfig
) -> Covariance:
    """The covariance of a layer.

    Raises:
      DataError: there is none, or it is of another model's width.
    """
    if covariance is None or layer not in covariance:
        raise DataError(
            f"this method needs the covariance of layer {layer}: "
            f"covariance=collect_covariance(lm, [{layer}])"
        )
    shape = np.shape(covariance[layer].matrix)
    if shape != (config.intermediate_size,) * 2:
        raise DataError(
            f"the covariance of layer {layer} is of shape {shape}, this model's keys have "
            f"{config.intermediate_size} values; collect it from this model"
        )
    return covariance[layer]


def earlier_of(
    earlier: Mapping[int, np.ndarray] | None, layer: int, config: ModelConfig
) -> np.ndarray | None:
    """Sum of the outer products of the keys of earlier edits of a layer; None if there are none.

    Raises:
      DataError: it is of another model's width, or not finite.
    """
    if earlier is None or layer not in earlier:
        return None
    matrix = np.asarray(earlier[layer])
    if matrix.shape != (config.intermediate_size,) * 2 or not np.isfinite(matrix).all():
        raise DataError(
            f"earlier[{layer}] must be a finite matrix of {config.intermediate_size} x "
            f"{config.intermediate_size}, the keys of earlier edits of this model (`Edit.keys`); "
            f"its shape is {matrix.shape}"
        )
    return matrix


def low_rank(
    layer: int,
    left: Float[np.ndarray, "width rank"],
    right: Float[np.ndarray, "rank hidden"],
) -> LowRank:
    """What is added to a down kernel, in the smallest form: of many requests not one by one."""
    width, rank = left.shape
    hidden = right.shape[1]
    if not (np.isfinite(left).all() and np.isfinite(right).all()):
        raise DataError(
            f"the edit of layer {layer} is not finite; lower the learning rate or clamp"
        )
    if rank > min(width, hidden):
        delta = left @ right
        left, right = (delta, np.eye(hidden)) if hidden <= width else (np.eye(width), delta)
    return LowRank(
        "ffn.down", layer, jnp.asarray(left, jnp.float32), jnp.asarray(right, jnp.float32)
    )


def check_updates(
    requests: Sequence[EditRequest], left: np.ndarray, right: np.ndarray, layer: int
) -> None:
    """Raise `DataError` for a request whose column or row of an update is not finite."""
    bad = ~(np.isfinite(left).all(0) & np.isfinite(right).all(1))
    if bad.any():
        raise DataError(
            f"request {name_of(requests[int(bad.argmax())])}: its edit of layer {layer} is not "
            "finite; lower the learning rate or the clamp of the optimisation"
        )


class OuterProducts(Mapping[int, np.ndarray]):
    """By layer, the sum of the outer products of keys, made when it is asked for.

    A list of a hundred edits would otherwise hold a hundred times the keys' width squared.

    Attributes:
      vectors: keys by layer, [request, width].
      earlier: sums that are added.
    """

    def __init__(
        self, vectors: Mapping[int, np.ndarray], earlier: Mapping[int, np.ndarray] | None = None
    ):
        self.vectors = vectors
        # Sums and not what they are made of: edits after edits would sum all of them each time.
        self.earlier = earlier.sums if isinstance(earlier, OuterProducts) else earlier or {}

    @functools.cached_property
    def sums(self) -> dict[int, Float[np.ndarray, "width width"]]:
        """Of every layer, kept from now on: for all edits that come after."""
        return {layer: self[layer] for layer in self}

    def __getitem__(self, layer: int) -> Float[np.ndarray, "width width"]:
        if "sums" in vars(self):
            return self.sums[layer]
        keys = np.asarray(self.vectors[layer], np.float64)
        return (self.earlier.get(layer, 0) + keys.T @ keys).astype(np.float32)

    def __iter__(self) -> Iterator[int]:
        return iter(self.vectors)

    def __len__(self) -> int:
        return len(self.vectors)
