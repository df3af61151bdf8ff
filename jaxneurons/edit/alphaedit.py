"""AlphaEdit: MEMIT in the null space of what is kept (Fang et al. 2025, arXiv 2410.02355).

P projects keys on the eigenvectors of the covariance whose eigenvalues are below a threshold: what
other keys of text map to then hardly changes. In each layer the update X of the down kernel solves

    (P (K1 K1^T + Kp Kp^T) + weight I) X = P K1 R^T

for keys K1 and residuals R of the requests and the keys Kp of earlier edits. X lies in P's range,
so with a basis U of it X = U (U^T (K1 K1^T + Kp Kp^T) U + weight I)^-1 U^T K1 R^T.
"""

import functools

import numpy as np
import scipy.linalg
from jaxtyping import Float

from jaxneurons.edit.covariance import Covariance
from jaxneurons.edit.method import AlphaEdit
from jaxneurons.edit.solving import Spread
from jaxneurons.errors import DataError


@functools.lru_cache(maxsize=64)
def _eigen(covariance: Covariance) -> tuple[np.ndarray, np.ndarray]:
    matrix = covariance.matrix.astype(np.float64)
    if not np.isfinite(matrix).all():
        raise DataError(
            f"the covariance of layer {covariance.layer} is not finite; collect it again, from a "
            "model in float32"
        )
    values, vectors = scipy.linalg.eigh((matrix + matrix.T) / 2)
    return values, vectors


def null_space(covariance: Covariance, threshold: float) -> Float[np.ndarray, "width kept"]:
    """An orthonormal basis of the directions in which keys of text have almost no length.

    Args:
      covariance: E[k k^T].
      threshold: eigenvalues below it count.

    Raises:
      DataError: there is no such direction.
    """
    values, vectors = _eigen(covariance)
    basis = vectors[:, values < threshold]
    if not basis.shape[1]:
        raise DataError(
            f"layer {covariance.layer}: no eigenvalue of the covariance is below {threshold:g} "
            f"(they are {values[0]:.3g} to {values[-1]:.3g}), so no direction is free for an edit; "
            "raise the threshold"
        )
    return basis


def spread(
    settings: AlphaEdit, covariance: Covariance, earlier: np.ndarray | None
) -> tuple[Spread, dict[str, int]]:
    """The inverse of the matrix of a layer as an operator, and what a patch records of it.

    Args:
      settings: the method's.
      covariance: of the layer.
      earlier: sum of the outer products of the keys of earlier edits.
    """
    basis = null_space(covariance, settings.threshold)
    operator = _operator(basis, settings.weight, earlier)
    return operator, {"null_space": basis.shape[1], "width": basis.shape[0]}


def _operator(basis: np.ndarray, weight: float, earlier: np.ndarray | None) -> Spread:
    """U (weight I + U^T Kp Kp^T U)^-1 U^T."""
    if earlier is None:
        return lambda keys: basis @ (basis.T @ keys) / weight
    kept = basis.T @ np.asarray(earlier, np.float64) @ basis
    factor = scipy.linalg.cho_factor(kept + weight * np.eye(len(kept)), lower=True)
    return lambda keys: basis @ scipy.linalg.cho_solve(factor, basis.T @ keys)
