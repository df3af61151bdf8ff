"""General language modelling: what turning neurons off does to other text.

arXiv 2502.17355, section 5: perplexity of sentences that say nothing of the relation and end in one
of its objects, before and after.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxneurons.engine.ablation import default_shape
from jaxneurons.errors import DataError
from jaxneurons.model import finite, layers
from jaxneurons.model.config import ModelConfig
from jaxneurons.model.transformer import forward
from jaxneurons.neurons.sets import NeuronSet, stack_scales
from jaxneurons.prompts import batches
from jaxneurons.relspec.analyses import Tables
from jaxneurons.relspec.method import Prompt
from jaxneurons.relspec.study import Study


@functools.partial(jax.jit, static_argnames=("config",))
def sentence_loss(
    params: Any,
    tokens: Int[Array, "sentence seq"],
    lengths: Int[Array, " sentence"],
    scales: dict[str, Float[Array, "set layer width"]],
    *,
    config: ModelConfig,
) -> Float[Array, "set sentence"]:
    """Sum of -log p of every token after the first, with neurons off: natural logarithms."""

    def of_set(scales: Any) -> Array:
        out = forward(params, tokens, config=config, lengths=lengths, at="all", scales=scales)
        real = jnp.arange(1, tokens.shape[1]) < lengths[:, None]
        if tokens.shape[1] <= batches.LENGTH_TOKENS:
            losses = _losses(out.logits[:, :-1], tokens[:, 1:])
        else:  # never the logits of all positions at once
            losses = jax.lax.map(
                lambda each: _losses(layers.unembed(params, each[0], config), each[1]),
                (out.final[:, :-1].swapaxes(0, 1), tokens[:, 1:].T),
                batch_size=batches.LENGTH_TOKENS,
            ).T
        return jnp.sum(jnp.where(real, losses, 0), axis=-1)

    return jax.lax.map(of_set, scales)


def _losses(logits: Array, tokens: Array) -> Array:
    """-log p of each token."""
    chosen = jnp.take_along_axis(logits, tokens[..., None], axis=-1)[..., 0]
    return jax.nn.logsumexp(logits, axis=-1) - chosen


def perplexity(study: Study) -> Tables:
    """Perplexity of sentences that say nothing of the relation and end in an object."""
    config, rows = study.lm.config, []
    controls = study.random(study.settings.sweep_seeds)
    neurons = study.neurons()
    for number, (name, one) in enumerate(neurons.items()):
        relation, asked = study.relations[name], study.asked[name]
        said = dict.fromkeys(triple.object for triple in asked.split.evaluation)
        texts = [relation.neutral.replace("{}", each) for each in said][: study.settings.evaluation]
        sentences = study.encode([Prompt(name, "neutral", "", "", (), text) for text in texts])
        offs = [("none", None), (name, None), *(("random", seed) for seed in range(len(controls)))]
        part = f"perplexity-{name}"
        done = study.run.load(part)
        if done is None:
            sets = [NeuronSet(), one, *controls]
            masks = stack_scales(sets, config, sites=study.settings.sites)
            loss = np.zeros((len(offs), len(texts)))
            for batch in batches.by_length(sentences, default_shape().prompts):
                found = sentence_loss(
                    study.lm.params, batch.tokens, batch.lengths, masks, config=config
                )
                loss[:, batch.index] = np.asarray(found)[:, : len(batch.index)]
                for row, index in enumerate(batch.index.tolist()):
                    lost = np.flatnonzero(~np.isfinite(loss[:, index]))
                    if len(lost):
                        ids = batch.tokens[row, : batch.lengths[row]]
                        off = int(lost[0])
                        scales = {s: m[off] for s, m in masks.items()}
                        where = finite.explain(study.lm.params, ids, config=config, scales=scales)
                        raise DataError(f"{name!r}, sentence {texts[index]!r}: {where}")
            done = {"loss": loss}
            study.run.save(part, done)
        count = sum(len(sentence) - 1 for sentence in sentences)
        values = np.exp(done["loss"].sum(1) / count)
        rows += [
            {
                "relation": name,
                "off": off,
                "seed": seed,
                "sentences": len(texts),
                "tokens": count,
                "perplexity": float(value),
                "ratio": float(value / values[0]),
            }
            for (off, seed), value in zip(offs, values, strict=True)
        ]
        study.tell("perplexity", number + 1, len(neurons))
    return {"perplexity": rows}
