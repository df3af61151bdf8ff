"""Requests about the lab world, and edits that are quick to make."""

import functools
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxneurons.edit.changes import LowRank
from jaxneurons.edit.method import ROME, Edit
from jaxneurons.edit.requests import EditRequest


@functools.cache
def lab() -> Any:
    import jaxneurons

    return jaxneurons.load("lab")


def capital_requests(count: int) -> list[EditRequest]:
    """Capitals of the lab's countries, each to become the next country's."""
    from jaxneurons.lab import bundled_queries

    queries = [q for q in bundled_queries("lab-cloze") if q.id.startswith("geography/capital/")]
    requests = []
    for i, query in enumerate(queries[:count]):
        following, after = queries[(i + 1) % len(queries)], queries[(i + 2) % len(queries)]
        requests.append(
            EditRequest(
                prompt=query.prompts[0],
                subject=query.id.rpartition("/")[2],
                target=following.answers[0],
                ground_truth=query.answers[0],
                paraphrases=query.prompts[1:2],
                neighbours=((after.prompts[0], after.answers[0]), (after.prompts[1], "")),
                portability=((query.prompts[2], following.answers[0]),),
                id=query.id,
            )
        )
    return requests


def low_rank(request: EditRequest, *, layer: int, size: float, config: Any) -> LowRank:
    """A rank-one change that depends on the request alone."""
    rng = np.random.default_rng([*request.id.encode()])
    left = rng.normal(size=(config.intermediate_size, 1)) / np.sqrt(config.intermediate_size)
    right = size * rng.normal(size=(1, config.hidden_size)) / np.sqrt(config.hidden_size)
    return LowRank(
        "ffn.down", layer, jnp.asarray(left, jnp.float32), jnp.asarray(right, jnp.float32)
    )


def stand_in(
    params: Any, requests: Any, *, config: Any, settings: ROME, **unused: Any
) -> list[Edit]:
    """`edit_each` without an optimisation: another size for another clamp."""
    size = 8.0 * settings.optimisation.clamp
    return [
        Edit(
            (low_rank(request, layer=settings.layer or 2, size=size, config=config),),
            settings,
            None,
            {},
            {},
        )
        for request in requests
    ]
