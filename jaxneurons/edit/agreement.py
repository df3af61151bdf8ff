"""Do located things predict where edits work best? Rank correlations over layers, per fact.

Causal tracing says at which layers a subject's last token carries a fact; attribution says in which
layers neurons at the end of the prompt hold the answer's probability; edits of the same facts say
where they work. Hase et al. 2023 (arXiv 2301.04213) found no relation between the first and the
last for GPT-J; here it is measured for any model.
"""

import functools
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import scipy.stats
from jaxtyping import Float

from jaxneurons.checkpoints.loading import LM
from jaxneurons.edit.requests import KnownFact
from jaxneurons.edit.traced_facts import encode_fact
from jaxneurons.engine import bootstrap
from jaxneurons.engine.attribution import integrated_gradients
from jaxneurons.engine.quadrature import Quadrature
from jaxneurons.errors import DataError
from jaxneurons.model.axis_types import any_axes
from jaxneurons.neurons.sets import Site
from jaxneurons.processes.sharing import fetch
from jaxneurons.prompts import batches
from jaxneurons.prompts.answers import TokenPrompt
from jaxneurons.storage.progress import Progress
from jaxneurons.storage.tables import Row


class Correlation(NamedTuple):
    """How far two quantities by layer agree in their order.

    Attributes:
      of_facts: mean over facts of each fact's rank correlation over layers.
      of_means: rank correlation over layers of the means over facts.
      facts: that count in `of_facts`: those for which neither quantity is the same at all layers.
    """

    of_facts: bootstrap.Interval
    of_means: bootstrap.Interval
    facts: int


def rank_correlation(
    a: Float[np.ndarray, "*batch layer"], b: Float[np.ndarray, "*batch layer"]
) -> Float[np.ndarray, "*batch"]:
    """Spearman's rank correlation over the last axis; equal values share their mean rank.

    NaN where either is the same at all layers.
    """
    ranks = (scipy.stats.rankdata(values, axis=-1) for values in (a, b))
    x, y = (rank - rank.mean(-1, keepdims=True) for rank in ranks)
    norm = np.sqrt((x * x).sum(-1) * (y * y).sum(-1))
    return np.where(norm > 0, (x * y).sum(-1) / np.where(norm > 0, norm, 1), np.nan)


def correlate(
    predicted: Float[np.ndarray, "fact layer"],
    measured: Float[np.ndarray, "fact layer"],
    *,
    seed: int = 0,
) -> Correlation:
    """Rank correlation over layers, with 95 % bootstrap intervals over facts.

    Args:
      predicted: a quantity of each fact by layer.
      measured: another, of the same facts and layers.
      seed: of the bootstrap.

    Raises:
      DataError: of other shapes, no facts, or fewer than three layers.
    """
    if predicted.shape != measured.shape or predicted.ndim != 2 or not len(predicted):
        raise DataError(
            f"the same facts and layers are needed, got {predicted.shape} and {measured.shape}"
        )
    if predicted.shape[1] < 3:
        raise DataError(f"{predicted.shape[1]} layers have no order to speak of; try three or more")
    each = rank_correlation(predicted, measured)
    there = ~np.isnan(each)
    nothing = bootstrap.Interval(float("nan"), float("nan"), float("nan"))
    of_facts = bootstrap.mean(each[there], seed=seed) if there.any() else nothing
    index = bootstrap.resamples(len(predicted), seed=seed)
    draws = rank_correlation(predicted[index].mean(1), measured[index].mean(1))
    whole = float(rank_correlation(predicted.mean(0), measured.mean(0)))
    return Correlation(of_facts, bootstrap.interval(whole, draws), int(there.sum()))


def agreement_table(
    predicted: Mapping[str, Float[np.ndarray, "fact layer"]],
    measured: Mapping[str, Float[np.ndarray, "fact layer"]],
    *,
    layers: Sequence[int],
    seed: int = 0,
) -> list[Row]:
    """A row for each pair of a predictor and a measure.

    Beside the correlations: the layer where the predictor is highest on average, the mean measure
    there (`at_predicted`), the highest mean over layers (`best`) and the mean over layers
    (`at_random`): what choosing by the predictor brings.

    Args:
      predicted: by name.
      measured: by name; NaN where a fact has none: the fact is left out of these rows.
      layers: which these are.
      seed: of the bootstrap.
    """
    rows = []
    for measure, values in measured.items():
        there = ~np.isnan(values).any(1)
        if not there.any():
            continue
        means = values[there].mean(0)
        for name, by_layer in predicted.items():
            found = correlate(by_layer[there], values[there], seed=seed)
            highest = int(by_layer[there].mean(0).argmax())
            rows.append(
                {
                    "predictor": name,
                    "measure": measure,
                    "facts": int(there.sum()),
                    **dict(zip(("of_facts", "low", "high"), found.of_facts, strict=True)),
                    "facts_counted": found.facts,
                    "of_means": found.of_means.value,
                    "means_low": found.of_means.low,
                    "means_high": found.of_means.high,
                    "layer": layers[highest],
                    "at_predicted": float(means[highest]),
                    "best": float(means.max()),
                    "at_random": float(means.mean()),
                }
            )
    return rows


@any_axes
def attribution_by_layer(
    lm: LM,
    facts: Sequence[KnownFact],
    *,
    site: Site = "act",
    quadrature: Quadrature = Quadrature(),
    progress: Progress | None = None,
) -> Float[np.ndarray, "fact layer"]:
    """How much of an answer's probability the neurons of each layer hold at the prompt's end.

    The sum over a layer's neurons of their absolute attributions (integrated gradients, arXiv
    2406.10868), at the last position of each fact's prompt; mean over the answer's tokens.

    Args:
      lm: the model.
      facts: with the answer as attribute.
      site: whose neurons.
      quadrature: of the path.
      progress: called with how many facts are done, of how many.

    Raises:
      DataError: a fact that cannot be encoded.
    """
    encoded = [encode_fact(lm.tokenizer, fact, config=lm.config) for fact in facts]
    prompts = [TokenPrompt(fact.prompt, fact.answer) for fact in encoded]
    attribute = jax.jit(
        functools.partial(integrated_gradients, config=lm.config, site=site, quadrature=quadrature)
    )
    result = np.zeros((len(facts), lm.config.num_layers))
    done = 0
    for batch in batches.plan(prompts):
        arrays = (jnp.asarray(x) for x in (batch.tokens, batch.targets, batch.lengths))
        tokens, targets, lengths = arrays
        scores = attribute(lm.params, tokens, targets, lengths=lengths).scores
        sums = np.abs(fetch(scores).astype(np.float64)).sum(-1)
        real = batch.index >= 0
        result[batch.index[real]] = sums[real]
        done += int(real.sum())
        if progress is not None:
            progress(done, len(facts))
    return result
