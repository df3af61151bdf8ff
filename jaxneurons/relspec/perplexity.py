"""General language modelling: what turning neurons off does to other text.

arXiv 2502.17355, section 5: perplexity of sentences that say nothing of the relation and end in one
of its objects, before and after.
"""

import functools
from collections.abc import Sequence

import jax
import numpy as np
from jaxtyping import Array, Float, Int

from jaxneurons.engine.ablation import default_shape
from jaxneurons.engine.likelihood import sentence_loss
from jaxneurons.errors import DataError
from jaxneurons.model import finite
from jaxneurons.model.config import ModelConfig
from jaxneurons.model.device_share import spread_batch
from jaxneurons.model.transformer import Params, Scales
from jaxneurons.neurons.sets import NeuronSet, stack_scales
from jaxneurons.processes.sharing import fetch, share_parts, spread
from jaxneurons.prompts import batches
from jaxneurons.relspec.collection import Collection
from jaxneurons.relspec.drops import TableRows
from jaxneurons.relspec.method import Prompt


def perplexity(study: Collection) -> TableRows:
    """Perplexity of sentences that say nothing of the relation and end in an object."""
    rows = []
    controls = study.random(study.settings.sweep_seeds)
    neurons = study.neurons()
    labels = {
        name: [("none", None), (name, None), *(("random", i) for i in range(len(controls)))]
        for name in neurons
    }
    texts = {name: _texts(study, name) for name in neurons}
    sentences = {
        name: study.encode([Prompt(name, "neutral", "", "", (), text) for text in of_relation])
        for name, of_relation in texts.items()
    }
    jobs = {
        f"perplexity-{name}": functools.partial(
            _losses,
            study,
            name,
            [NeuronSet(), of_relation, *controls],
            sentences[name],
            texts[name],
        )
        for name, of_relation in neurons.items()
    }
    share_parts(study.parts, jobs, together=spread(study.lm.params))
    for number, (name, make) in enumerate(zip(neurons, jobs.values(), strict=True)):
        losses = study.parts.part(f"perplexity-{name}", make)["loss"]
        count = sum(len(sentence) - 1 for sentence in sentences[name])
        values = np.exp(losses.sum(1) / count)
        rows += [
            {
                "relation": name,
                "off": off,
                "seed": seed,
                "sentences": len(texts[name]),
                "tokens": count,
                "perplexity": float(value),
                "ratio": float(value / values[0]),
            }
            for (off, seed), value in zip(labels[name], values, strict=True)
        ]
        study.progress("perplexity", number + 1, len(neurons))
    return {"perplexity": rows}


def _texts(study: Collection, name: str) -> list[str]:
    """Sentences that end in an object of a relation and say nothing of it."""
    relation, prompts = study.relations[name], study.prompts[name]
    answers = dict.fromkeys(triple.object for triple in prompts.split.evaluation)
    texts = [relation.neutral.replace("{}", answer) for answer in answers]
    return texts[: study.settings.evaluation]


def _losses(
    study: Collection,
    relation: str,
    sets: Sequence[NeuronSet],
    sentences: Sequence[Sequence[int]],
    texts: Sequence[str],
) -> dict[str, Float[np.ndarray, "set sentence"]]:
    """`sentence_loss` with each set off; raises `DataError` for one that is not finite."""
    config, params = study.lm.config, study.lm.params
    stacked = stack_scales(sets, config, sites=study.settings.sites)
    losses = np.zeros((len(sets), len(sentences)))
    for batch in batches.by_length(sentences, default_shape().prompts):
        rows = spread_batch(params, (batch.tokens, batch.lengths), config=config)
        values = _losses_with_sets(params, *rows, stacked, config=config)
        losses[:, batch.index] = fetch(values)[:, : len(batch.index)]
        for row, index in enumerate(batch.index.tolist()):
            overflown = np.flatnonzero(~np.isfinite(losses[:, index]))
            if len(overflown):
                tokens = batch.tokens[row, : batch.lengths[row]]
                scales = {site: mask[int(overflown[0])] for site, mask in stacked.items()}
                where = finite.explain(params, tokens, config=config, scales=scales)
                raise DataError(f"{relation!r}, sentence {texts[index]!r}: {where}")
    return {"loss": losses}


@functools.partial(jax.jit, static_argnames=("config",))
def _losses_with_sets(
    params: Params,
    tokens: Int[Array, "sentence seq"],
    lengths: Int[Array, " sentence"],
    stacked: Scales,
    *,
    config: ModelConfig,
) -> Float[Array, "set sentence"]:
    """`sentence_loss` under each of some multipliers, [set, layer, width] by site."""
    return jax.lax.map(
        lambda scales: sentence_loss(params, tokens, lengths, config=config, scales=scales), stacked
    )
