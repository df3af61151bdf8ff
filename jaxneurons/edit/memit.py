"""MEMIT: all requests at once, spread over layers (arXiv 2210.07229, section 4.3, equation 14).

In each layer, for keys K1 and residuals R of the requests, the update of the down kernel is

    (weight C + K1 K1^T)^-1 K1 R^T

With `accumulate` the keys of earlier edits stand beside them, weight C + Kp Kp^T + K1 K1^T, so that
each edit is the exact solution of all so far (arXiv 2605.26670).
"""

import numpy as np

from jaxneurons.edit.covariance import Covariance
from jaxneurons.edit.method import MEMIT, PUBLISHED_WEIGHT, PUBLISHED_WIDTH
from jaxneurons.edit.solving import Spread, factorised, inverse_of, regular


def spread(
    settings: MEMIT, covariance: Covariance, earlier: np.ndarray | None
) -> tuple[Spread, dict[str, float]]:
    """The inverse of the matrix of a layer as an operator, and what a patch records of it.

    Args:
      settings: the method's.
      covariance: of the layer.
      earlier: sum of the outer products of the keys of earlier edits.
    """
    covariance = regular(covariance)
    weight = settings.weight
    if weight is None:
        weight = PUBLISHED_WEIGHT * len(covariance.matrix) / PUBLISHED_WIDTH
    if settings.accumulate and earlier is not None:
        kept = weight * covariance.regularised() + np.asarray(earlier, np.float64)
        operator = factorised(kept, covariance.layer)
    else:
        operator = inverse_of(covariance, weight)
    return operator, {"ridge": covariance.ridge, "weight": weight}
