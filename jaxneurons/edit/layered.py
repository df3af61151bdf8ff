"""Values spread over layers: what MEMIT and AlphaEdit share (arXiv 2210.07229, section 4.3).

The value of a request stands in the residual stream after the last edited layer. From the first
edited layer on, each writes an equal share of what is missing there, and keys and what is missing
are taken anew after each layer. Where a norm follows the down projection, what a layer is to write
is divided by that norm's weights and multiplied by what it divides by at the key. The parameters
are not edited for that: what has been decided runs beside them, at its rank, for all requests
together or for each alone.
"""

import functools
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxneurons.edit import alphaedit, memit
from jaxneurons.edit.contexts import Contexts, batches, encode_contexts
from jaxneurons.edit.covariance import Covariance
from jaxneurons.edit.experts import check_one_kernel
from jaxneurons.edit.method import MEMIT, AlphaEdit, Edit, Trace, default_layers
from jaxneurons.edit.passes import Split, at_subject
from jaxneurons.edit.requests import EditRequest
from jaxneurons.edit.solving import (
    OuterProducts,
    Spread,
    alone,
    check_updates,
    covariance_of,
    earlier_of,
    low_rank,
    together,
)
from jaxneurons.edit.values import Values, check_layers, check_values, find_values
from jaxneurons.model.config import ModelConfig
from jaxneurons.model.layers import norm_weight
from jaxneurons.model.parameters import Params
from jaxneurons.processes.sharing import fetch
from jaxneurons.storage.progress import Progress

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ROWS = 16
"""Requests that are run together."""

PASSED = 1e-5
"""Squares of a post norm's weights, relative to their mean, far below which nothing is written."""


class Update(NamedTuple):
    """What is added to one layer's down kernel: a column and a row for each request.

    Attributes:
      keys: of the requests, in the model that is edited below this layer.
      left: inputs by requests.
      right: requests by outputs.
    """

    keys: Float[np.ndarray, "request width"]
    left: Float[np.ndarray, "width request"]
    right: Float[np.ndarray, "request hidden"]


def layers_of(settings: MEMIT | AlphaEdit, config: ModelConfig) -> tuple[int, ...]:
    """The layers that are edited."""
    check_one_kernel(config, type(settings).__name__)
    return default_layers(config) if settings.layers is None else settings.layers


def spread_over_layers(
    params: Params,
    values: Values,
    *,
    config: ModelConfig,
    tokenizer: "PreTrainedTokenizerBase",
    spread: Mapping[int, Spread],
    each: bool,
) -> dict[int, Update]:
    """The updates of all layers, by layer.

    Args:
      params: the parameters.
      values: of the requests, in the stream after the last layer.
      config: the model's shape.
      tokenizer: the model's.
      spread: the method's inverse matrix for each layer to edit, ascending.
      each: every request is edited alone, rather than all together.
    """
    contexts = encode_contexts(tokenizer, values.requests, values.prefixes, config=config)
    updates: dict[int, Update] = {}
    for n, (layer, operator) in enumerate(spread.items()):
        keys, stream, unit = _keys_and_stream(
            params, contexts, updates, config=config, layer=layer, last=values.layer, each=each
        )
        left = (alone if each else together)(operator, keys)
        right = unit * (values.target - stream) / (len(spread) - n)
        check_updates(values.requests, left, right, layer)
        updates[layer] = Update(keys, left, right)
    return updates


def _keys_and_stream(
    params: Params,
    contexts: Sequence[Contexts],
    updates: Mapping[int, Update],
    *,
    config: ModelConfig,
    layer: int,
    last: int,
    each: bool,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Keys of a layer, the stream after the last one, and what adds 1 to it, of every request.

    The last: what the layer's down projection must put out more for its feed-forward part to add 1
    more to the stream, value by value. All are means over prompts.
    """
    keys = np.zeros((len(contexts), config.intermediate_size), np.float32)
    stream = np.zeros((len(contexts), config.hidden_size), np.float32)
    unit = np.ones_like(stream)
    size = len(contexts[0].prompts) + 1
    for batch in batches(contexts, ROWS):
        members = np.where(batch.members < 0, batch.members[0], batch.members)
        left, right = _stacked(
            updates, members, requests=len(contexts), config=config, last=last, each=each
        )
        of_batch = fetch(
            _mean_states(params, batch.split, left, right, layer, config=config, each=size)
        )
        keys[members], stream[members], unit[members] = of_batch
    return keys, stream, unit


def _stacked(
    updates: Mapping[int, Update],
    members: np.ndarray,
    *,
    requests: int,
    config: ModelConfig,
    last: int,
    each: bool,
) -> tuple[Array, Array]:
    """`left` and `right` of every layer up to the last: [layer, group, ...]; 0 where none is yet.

    The shapes are those of all later layers too, so that one program serves them all.
    """
    groups, rank = (len(members), 1) if each else (1, requests)
    left = np.zeros((last + 1, groups, config.intermediate_size, rank), np.float32)
    right = np.zeros((last + 1, groups, rank, config.hidden_size), np.float32)
    for layer, update in updates.items():
        if each:
            left[layer, :, :, 0] = update.left.T[members]
            right[layer, :, 0] = update.right[members]
        else:
            left[layer, 0], right[layer, 0] = update.left, update.right
    return jnp.asarray(left), jnp.asarray(right)


@functools.partial(jax.jit, static_argnames=("config", "each"))
def _mean_states(
    params: Params,
    split: Split,
    left: Float[Array, "layer group width rank"],
    right: Float[Array, "layer group rank hidden"],
    layer: Int[Array, ""] | int,
    *,
    config: ModelConfig,
    each: int,
) -> tuple[
    Float[Array, "request width"], Float[Array, "request hidden"], Float[Array, "request hidden"]
]:
    """Means over a request's prompts; its essence, the last of `each` rows, does not count."""
    seen = at_subject(params, split, left, right, config=config)

    def mean(rows: Array) -> Array:
        return rows.reshape(-1, each, rows.shape[-1])[:, :-1].mean(1)

    unit = jnp.ones_like(seen.down[layer])
    if config.post_norms:
        norm = jax.tree.map(lambda stack: stack[layer], params["layers"]["ffn_post_norm"])
        weight = norm_weight(norm, config).astype(jnp.float32)
        # What a weight of nearly 0 lets through cannot be written.
        inverse = weight / (weight**2 + PASSED * jnp.mean(weight**2))
        square = jnp.square(seen.down[layer]).mean(-1, keepdims=True)
        unit = jnp.sqrt(square + config.norm_eps) * inverse
    return mean(seen.act[layer]), mean(seen.stream[-1]), mean(unit)


def values_of(
    params: Params,
    requests: Sequence[EditRequest],
    *,
    config: ModelConfig,
    tokenizer: "PreTrainedTokenizerBase",
    settings: MEMIT | AlphaEdit,
    prefixes: Sequence[str] | None = None,
    progress: Progress | None = None,
) -> Values:
    """Keys and values of requests, each alone, in the stream after the last edited layer."""
    return find_values(
        params,
        requests,
        config=config,
        tokenizer=tokenizer,
        layer=layers_of(settings, config)[-1],
        place="residual",
        optimisation=settings.optimisation,
        prefixes=prefixes,
        progress=progress,
    )


def layered(
    params: Params,
    requests: Sequence[EditRequest],
    *,
    config: ModelConfig,
    tokenizer: "PreTrainedTokenizerBase",
    settings: MEMIT | AlphaEdit,
    covariance: Mapping[int, Covariance] | None = None,
    earlier: Mapping[int, np.ndarray] | None = None,
    values: Values | None = None,
    prefixes: Sequence[str] | None = None,
    progress: Progress | None = None,
) -> Edit:
    """All requests together; see `edit`."""
    operators, facts = _spreads(settings, covariance, earlier, config)
    values = _checked_values(
        params, requests, config, tokenizer, settings, values, prefixes, progress
    )
    updates = spread_over_layers(
        params, values, config=config, tokenizer=tokenizer, spread=operators, each=False
    )
    facts = _facts(settings, values, facts)
    return _edit(updates, settings, values.trace, facts, rows=slice(None), earlier=earlier)


def layered_each(
    params: Params,
    requests: Sequence[EditRequest],
    *,
    config: ModelConfig,
    tokenizer: "PreTrainedTokenizerBase",
    settings: MEMIT | AlphaEdit,
    covariance: Mapping[int, Covariance] | None = None,
    values: Values | None = None,
    prefixes: Sequence[str] | None = None,
    progress: Progress | None = None,
) -> list[Edit]:
    """Each request alone; see `edit_each`."""
    operators, facts = _spreads(settings, covariance, None, config)
    values = _checked_values(
        params, requests, config, tokenizer, settings, values, prefixes, progress
    )
    updates = spread_over_layers(
        params, values, config=config, tokenizer=tokenizer, spread=operators, each=True
    )
    facts = _facts(settings, values, facts)
    return [
        _edit(updates, settings, values.trace, facts, rows=slice(n, n + 1))
        for n in range(len(requests))
    ]


def _spreads(
    settings: MEMIT | AlphaEdit,
    covariance: Mapping[int, Covariance] | None,
    earlier: Mapping[int, np.ndarray] | None,
    config: ModelConfig,
) -> tuple[dict[int, Spread], dict[str, Any]]:
    """The method's inverse matrices by layer, and what a patch records of them by layer."""
    layers = layers_of(settings, config)
    check_layers(layers, config)
    operators, facts = {}, {}
    for layer in layers:
        of_layer = covariance_of(covariance, layer, config)
        kept = earlier_of(earlier, layer, config)
        if isinstance(settings, MEMIT):
            operators[layer], more = memit.spread(settings, of_layer, kept)
        else:
            operators[layer], more = alphaedit.spread(settings, of_layer, kept)
        facts[str(layer)] = {**of_layer.identity, **more}
    return operators, facts


def _checked_values(
    params: Params,
    requests: Sequence[EditRequest],
    config: ModelConfig,
    tokenizer: "PreTrainedTokenizerBase",
    settings: MEMIT | AlphaEdit,
    values: Values | None,
    prefixes: Sequence[str] | None,
    progress: Progress | None,
) -> Values:
    """Values that were given, if they are of this edit; else found now."""
    if values is None:
        return values_of(
            params,
            requests,
            config=config,
            tokenizer=tokenizer,
            settings=settings,
            prefixes=prefixes,
            progress=progress,
        )
    check_values(
        values,
        requests,
        layer=layers_of(settings, config)[-1],
        place="residual",
        optimisation=settings.optimisation,
        prefixes=values.prefixes if prefixes is None else prefixes,
    )
    return values


def _facts(
    settings: MEMIT | AlphaEdit, values: Values, covariance: Mapping[str, Any]
) -> dict[str, Any]:
    """What a patch records beside its changes."""
    return {
        "layers": [int(layer) for layer in covariance],
        "seed": settings.optimisation.seed,
        "covariance": covariance,
        "prefixes": list(values.prefixes),
    }


def _edit(
    updates: Mapping[int, Update],
    settings: MEMIT | AlphaEdit,
    trace: Trace,
    facts: Mapping[str, Any],
    *,
    rows: slice,
    earlier: Mapping[int, np.ndarray] | None = None,
) -> Edit:
    """An `Edit` of some of the requests."""
    return Edit(
        changes=tuple(
            low_rank(layer, update.left[:, rows], update.right[rows])
            for layer, update in updates.items()
        ),
        settings=settings,
        trace=Trace(*(array[rows] for array in trace)),
        keys=OuterProducts({n: update.keys[rows] for n, update in updates.items()}, earlier),
        facts=facts,
    )
