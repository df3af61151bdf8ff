"""What neurons write to the residual stream, and the words they promote through the unembedding."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxneurons.checkpoints.loading import LM
from jaxneurons.errors import ConfigError
from jaxneurons.model import layers
from jaxneurons.model.axis_types import any_axes
from jaxneurons.model.config import ModelConfig
from jaxneurons.model.parameters import neuron_place
from jaxneurons.model.transformer import Params
from jaxneurons.neurons.sets import NeuronSet, Ranking

INNER = ("up", "gate", "act")
"""Sites whose neurons write through a row of the down projection, and share their numbering."""


@any_axes
def written_directions(
    params: Params, neurons: NeuronSet | Ranking, *, config: ModelConfig
) -> Float[Array, "neuron hidden"]:
    """What each neuron adds to the residual stream per unit of activation, in their order.

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
        layer, index = at
        place = (layer, *neuron_place(index, config))
        return jnp.asarray(params["layers"]["ffn"]["down"]["kernel"])[place]
    if site in ("down", "o"):
        return jax.nn.one_hot(at[1], config.hidden_size)
    raise ConfigError(
        f"neurons of site {site!r} write nothing to the residual stream by themselves"
    )


@any_axes
def words(
    lm: LM, neurons: NeuronSet | Ranking, *, count: int = 8
) -> list[tuple[list[str], list[str]]]:
    """Tokens that each neuron promotes and demotes most, through the unembedding, in their order.

    The neuron's row of the down projection, weighted by the final norm, times the unembedding: for
    a positive activation, and without what the layers above do to it.

    Raises:
      ConfigError: a site that writes nothing by itself (q, k, v).
    """
    if not len(neurons):
        return []
    direction = written_directions(lm.params, neurons, config=lm.config)
    logits = layers.project(lm.params, direction * lm.params["final_norm"]["scale"], lm.config)
    both = (jax.lax.top_k(logits, count)[1], jax.lax.top_k(-logits, count)[1])
    promoted, demoted = (np.asarray(ids).tolist() for ids in both)

    def texts(ids: list[int]) -> list[str]:
        return [str(lm.tokenizer.decode([i], clean_up_tokenization_spaces=False)) for i in ids]

    return [(texts(a), texts(b)) for a, b in zip(promoted, demoted, strict=True)]
