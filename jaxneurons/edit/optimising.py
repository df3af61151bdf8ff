"""The optimisation of values: Adam on deltas, all steps of a batch of requests in one program.

For each request, a delta is added at the subject's last token to what one layer writes there, in
every context. It minimises

    mean of -log p(new answer | context) + kl_factor * KL(after "{subject} is a" || unedited)
    + weight_decay * |delta| / |v|^2,    |delta| <= clamp * |v|

(ROME, arXiv 2202.05262, equation 4). Where a norm follows the down projection, the delta is added
before it, also where the value is the stream after the layer, and |v| is that of what is normed: a
norm lets only some changes of the stream through, and these are the ones that an edit can make. A
request whose loss is below `stop` no longer moves, whatever
the others of its batch do; the program ends when none does.
"""

import functools
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Bool, Float, Int

from jaxneurons.edit.contexts import ContextBatch
from jaxneurons.edit.method import Optimisation
from jaxneurons.edit.passes import Split, above, before_subject, from_subject
from jaxneurons.model import layers
from jaxneurons.model.config import ModelConfig
from jaxneurons.model.parameters import Params
from jaxneurons.processes.sharing import fetch

Place = Literal["down", "residual"]
"""Where a value stands: what the down projection writes, or the stream after its layer."""


class Optimised(NamedTuple):
    """A batch's keys, values and how they were found; of one request without the first axis."""

    key: Float[Array | np.ndarray, "*request width"]
    initial: Float[Array | np.ndarray, "*request hidden"]
    delta: Float[Array | np.ndarray, "*request hidden"]
    loss: Float[Array | np.ndarray, "*request step_or_end"]
    probability: Float[Array | np.ndarray, "*request"]
    steps: Int[Array | np.ndarray, "*request"]
    reached: Bool[Array | np.ndarray, "*request"]


def optimise_batch(
    params: Params,
    batch: ContextBatch,
    *,
    config: ModelConfig,
    layer: int,
    place: Place,
    optimisation: Optimisation,
) -> Optimised:
    """Keys and values of a batch of requests, on the host."""
    weights = Weights(
        *(
            jnp.float32(getattr(optimisation, name))
            for name in ("learning_rate", "kl_factor", "weight_decay", "clamp", "stop")
        )
    )
    return fetch(
        optimise_values(
            params,
            batch.split,
            jnp.asarray(batch.ends),
            jnp.asarray(batch.targets),
            weights,
            config=config,
            layer=layer,
            place=place,
            steps=optimisation.steps,
        )
    )


class Weights(NamedTuple):
    """The numbers of an `Optimisation`."""

    learning_rate: Array
    kl_factor: Array
    weight_decay: Array
    clamp: Array
    stop: Array


class _Terms(NamedTuple):
    """The loss at some deltas: the whole of it, its first term, and what else is read off."""

    loss: Float[Array, " request"]
    nll: Float[Array, " request"]
    alone: Float[Array, " request"]
    essence: Float[Array, "request vocab"]


class _State(NamedTuple):
    step: Int[Array, ""]
    delta: Float[Array, "request hidden"]
    adam: optax.OptState
    essence: Float[Array, "request vocab"]
    done: Bool[Array, " request"]
    taken: Int[Array, " request"]
    loss: Float[Array, "request step_or_end"]
    alone: Float[Array, " request"]


@functools.partial(jax.jit, static_argnames=("config", "layer", "place", "steps"))
def optimise_values(
    params: Params,
    split: Split,
    ends: Int[Array, "request context"],
    targets: Int[Array, "request token"],
    weights: Weights,
    *,
    config: ModelConfig,
    layer: int,
    place: Place,
    steps: int,
) -> Optimised:
    """One program for all steps: it ends when every request of the batch is done."""
    requests, each = ends.shape
    cached = before_subject(params, split, config=config)
    x, seen = from_subject(params, split, cached, layer=layer, config=config)

    def mean(values: Array) -> Array:
        """Over a request's prompts: [request, width]."""
        return values.reshape(requests, each, -1)[:, :-1].mean(1)

    def edited(delta: Array) -> Array:
        """The stream as it leaves the layer at the subject's last token."""
        change = jnp.repeat(delta, each, axis=0)
        return layers.change_down(of_layer, x[:, 0], seen.down[layer], change, config)

    of_layer = jax.tree.map(lambda stack: stack[layer], params["layers"])
    normed = config.post_norms and place == "residual"
    initial = mean((seen.down if place == "down" else seen.stream)[layer])
    norm = jnp.linalg.norm(mean(seen.down[layer]) if normed else initial, axis=-1)
    adam = optax.scale_by_adam()

    def evaluate(delta: Array, essence: Array, first: Array) -> tuple[Array, _Terms]:
        """The loss at some deltas; where they are the first ones, they are the unedited model."""
        y = x.at[:, 0].set(edited(delta))
        y = above(params, y, split, cached, layer=layer, config=config)
        y = y.reshape(requests, each, *y.shape[1:])
        nll, after_essence = _answers(params, y, ends, targets, config)
        unedited = jnp.where(first, jax.lax.stop_gradient(after_essence), essence)
        kl = (jnp.exp(after_essence) * (after_essence - unedited)).sum(-1)
        decay = weights.weight_decay * _safe_norm(delta) / jnp.square(norm)
        loss = nll.mean(1) + weights.kl_factor * kl + decay
        return loss.sum(), _Terms(loss, nll.mean(1), nll[:, 0], unedited)

    def go_on(state: _State) -> Array:
        return (state.step <= steps) & ~state.done.all()

    def step(state: _State) -> _State:
        gradient, terms = jax.grad(evaluate, has_aux=True)(
            state.delta, state.essence, state.step == 0
        )
        running = ~state.done
        done = state.done | (terms.loss < weights.stop)
        moves = ~done & (state.step < steps)
        change: Any
        with jax.numpy_dtype_promotion("standard"):  # optax raises floats to integers
            change, adam_state = adam.update(gradient, state.adam)
        delta = state.delta - weights.learning_rate * change
        most = weights.clamp * norm
        delta *= jnp.minimum(1, most / jnp.maximum(_safe_norm(delta), 1e-30))[:, None]
        return _State(
            state.step + 1,
            jnp.where(moves[:, None], delta, state.delta),
            adam_state,
            terms.essence,
            done,
            state.taken + moves.astype(jnp.int32),
            state.loss.at[:, state.step].set(jnp.where(running, terms.nll, jnp.nan)),
            jnp.where(running, terms.alone, state.alone),
        )

    start = jnp.zeros_like(initial)
    end = jax.lax.while_loop(
        go_on,
        step,
        _State(
            jnp.int32(0),
            start,
            adam.init(start),
            jnp.zeros((requests, config.vocab_size), jnp.float32),
            jnp.zeros(requests, bool),
            jnp.zeros(requests, jnp.int32),
            jnp.full((requests, steps + 1), jnp.nan, jnp.float32),
            jnp.full(requests, jnp.nan, jnp.float32),
        ),
    )
    delta = end.delta
    if normed:  # of the value
        delta = mean(edited(delta).astype(jnp.float32) - seen.stream[layer])
    key, probability = mean(seen.act[layer]), jnp.exp(-end.alone)
    return Optimised(key, initial, delta, end.loss, probability, end.taken, end.done)


def _answers(
    params: Params,
    x: Float[Array, "request context after hidden"],
    ends: Int[Array, "request context"],
    targets: Int[Array, "request token"],
    config: ModelConfig,
) -> tuple[Float[Array, "request prompt"], Float[Array, "request vocab"]]:
    """-log p of the new answer after each prompt, and log-probabilities after the essence."""
    # Past a short answer's end whatever stands there is read, and not counted.
    at = jnp.minimum(ends[:, :-1, None] + jnp.arange(targets.shape[1]), x.shape[2] - 1)
    before = jnp.take_along_axis(x[:, :-1], at[..., None], axis=2)
    last = jnp.take_along_axis(x[:, -1], ends[:, -1, None, None], axis=1)[:, 0]
    logits = layers.unembed(params, before, config)
    chosen = jnp.maximum(targets, 0)[:, None, :, None]
    logit = jnp.take_along_axis(logits, chosen, axis=-1)[..., 0]
    nll = jnp.where(targets[:, None] >= 0, jax.nn.logsumexp(logits, axis=-1) - logit, 0.0).sum(-1)
    return nll, jax.nn.log_softmax(layers.unembed(params, last, config), axis=-1)


def _safe_norm(x: Float[Array, "request hidden"]) -> Float[Array, " request"]:
    """Lengths of rows, whose gradient at 0 is 0."""
    square = jnp.square(x).sum(-1)
    zero = square == 0
    return jnp.where(zero, 0.0, jnp.sqrt(jnp.where(zero, 1.0, square)))
