"""The neurons of the facts that requests change: a set for each, for methods that change neurons.

A fact's neurons are those of the highest attribution of the old answer (QRNCA, arXiv 2406.10868,
equation 5, without its clusters and inverse cluster attribution, which take many queries).
"""

from collections.abc import Sequence

import jax
import numpy as np

from jaxneurons.checkpoints.loading import LM
from jaxneurons.edit.requests import EditRequest
from jaxneurons.engine.attribution import integrated_gradients
from jaxneurons.engine.quadrature import Quadrature
from jaxneurons.errors import DataError
from jaxneurons.model.axis_types import any_axes
from jaxneurons.neurons.sets import NeuronSet, Site
from jaxneurons.processes.sharing import fetch
from jaxneurons.prompts.answers import encode_query
from jaxneurons.prompts.batches import plan
from jaxneurons.storage.progress import Progress
from jaxneurons.storage.settings import check_argument, check_number

_attribute = jax.jit(integrated_gradients, static_argnames=("config", "site", "quadrature"))


@any_axes
def locate_neurons(
    lm: LM,
    requests: Sequence[EditRequest],
    *,
    count: int = 20,
    site: Site = "act",
    quadrature: Quadrature = Quadrature(),
    progress: Progress | None = None,
) -> tuple[NeuronSet, ...]:
    """The neurons that the old answer of each request depends on most.

    Args:
      lm: the model.
      requests: with their old answers.
      count: neurons of a set.
      site: where they are.
      quadrature: of the attribution.
      progress: called with how many requests are done.

    Returns:
      A set for each request, in order: what `LearnedNeurons` and `KnowledgeNeurons` take.

    Raises:
      DataError: a request without an old answer, or one that cannot be encoded; attribution that
        is not finite.
      ConfigError: arguments of other types.
    """
    check_argument("lm", LM, lm)
    check_argument("requests", Sequence[EditRequest], requests)
    check_number("count", count, least=1)
    prompts = []
    for number, request in enumerate(requests, 1):
        if not request.ground_truth:
            raise DataError(
                f"request {request.id or number!r} says no old answer (ground_truth), whose "
                "neurons could be located; add it, or give a set of neurons"
            )
        query = encode_query(
            lm.tokenizer,
            request.prompt,
            request.ground_truth,
            max_length=lm.config.max_position,
            vocab_size=lm.config.vocab_size,
        )
        prompts.append(query)
    sets = [NeuronSet()] * len(prompts)
    done = 0
    for batch in plan(prompts):
        attribution = _attribute(
            lm.params,
            batch.tokens,
            batch.targets,
            config=lm.config,
            lengths=batch.lengths,
            answer_lengths=batch.answer_lengths,
            site=site,
            quadrature=quadrature,
        )
        for scores, index in zip(fetch(attribution.scores), batch.index.tolist(), strict=True):
            if index < 0:
                continue
            if not np.isfinite(scores).all():
                raise DataError(
                    f"request {requests[index].id or index + 1!r}: attribution is not finite, as "
                    "float16's may be; load the model in float32"
                )
            best = np.argsort(-scores, axis=None, kind="stable")[:count]
            sets[index] = NeuronSet.of_flat(best, lm.config, (site,))
            done += 1
        if progress is not None:
            progress(done, len(prompts))
    return tuple(sets)
