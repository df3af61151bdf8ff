"""What neurons write to the residual stream, and the words they promote through the unembedding."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxneurons.checkpoints.loading import LM
from jaxneurons.errors import ConfigError
from jaxneurons.model import layers
from jaxneurons.model.axis_types import any_axes
from jaxneurons.model.config import ModelConfig
from jaxneurons.model.transformer import Params
from jaxneurons.neurons.sets import NeuronSet, Ranking

INNER = ("up", "gate", "act")
"""Sites whose neurons write through a row of the down projection, and share their numbering."""


@any_axes
def written_directions(
    params: Params, neurons: NeuronSet | Ranking, *, config: ModelConfig
) -> Float[Array, "neuron hidden"]:
    """What each neuron adds to the residual stream per unit of activation, in their order.

    In models with post norms: weighted by the norm that it passes, and not divided by the root mean
    square that this norm divides all neurons of a layer by, which depends on the text.

    Raises:
      ConfigError: a site that writes nothing by itself (q, k, v).
    """
    pairs: dict[str, list[tuple[int, int]]] = {}
    for site, neuron in neurons:
        pairs.setdefault(site, []).append(neuron)
    directions = [
        _directions(params, site, np.array(p, np.int32).T, config) for site, p in pairs.items()
    ]
    return jnp.concatenate(directions) if directions else jnp.zeros((0, config.hidden_size))


def _directions(params: Params, site: str, at: np.ndarray, config: ModelConfig) -> Array:
    """[neuron, hidden] of neurons `at` [2, neuron] of a site."""
    if site in INNER:
        directions = jnp.asarray(params["layers"]["ffn"]["down"]["kernel"])[tuple(at)]
    elif site in ("down", "o"):
        directions = jax.nn.one_hot(at[1], config.hidden_size)
    else:
        raise ConfigError(
            f"neurons of site {site!r} write nothing to the residual stream by themselves"
        )
    if config.post_norms:
        norm = params["layers"]["attn_post_norm" if site == "o" else "ffn_post_norm"]
        weights = layers.norm_weight(norm, config)[at[0]]
        directions = directions * weights.astype(directions.dtype)
    return directions


@any_axes
def words(
    lm: LM, neurons: NeuronSet | Ranking, *, count: int = 8
) -> list[tuple[list[str], list[str]]]:
    """Tokens that each neuron promotes and demotes most, through the unembedding, in their order.

    The neuron's row of the down projection, weighted by the norms that it passes (the layer's post
    norm, where there is one, and the final norm), times the unembedding: for a positive activation,
    and without what the layers above do to it.

    Raises:
      ConfigError: a site that writes nothing by itself (q, k, v).
    """
    if not len(neurons):
        return []
    direction = written_directions(lm.params, neurons, config=lm.config)
    weight = layers.norm_weight(lm.params["final_norm"], lm.config)
    plain = dataclasses.replace(lm.config, final_softcap=None)  # which leaves the order as it is
    logits = layers.project(lm.params, direction * weight.astype(direction.dtype), plain)
    both = (jax.lax.top_k(logits, count)[1], jax.lax.top_k(-logits, count)[1])
    promoted, demoted = (np.asarray(ids).tolist() for ids in both)

    def texts(ids: list[int]) -> list[str]:
        return [str(lm.tokenizer.decode([i], clean_up_tokenization_spaces=False)) for i in ids]

    return [(texts(a), texts(b)) for a, b in zip(promoted, demoted, strict=True)]
