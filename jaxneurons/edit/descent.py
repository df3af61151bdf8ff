"""Adam on the new answers: each request alone, many side by side, or all requests together.

One compiled step serves all requests of a shape. Side by side, every request has variables, moments
and a number of steps of its own and rests once it is done, so that what comes of it does not depend
on the others.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Bool, Float, Int

from jaxneurons.edit.method import Trace
from jaxneurons.edit.requests import EditRequest
from jaxneurons.errors import DataError
from jaxneurons.model.config import ModelConfig
from jaxneurons.model.finite import explain
from jaxneurons.model.parameters import Params
from jaxneurons.processes.sharing import fetch


class Loss(NamedTuple):
    """What an objective says of a request.

    Attributes:
      objective: what is minimised.
      answer: -log p of the new answer, mean over its tokens.
      log_probability: of the whole answer, teacher-forced.
    """

    objective: Float[Array, "*batch"]
    answer: Float[Array, "*batch"]
    log_probability: Float[Array, "*batch"]


@runtime_checkable
class Objective(Protocol):
    """What is minimised, with what bounds the variables. Hashable: a program is compiled for it."""

    def __call__(self, params: Params, variables: Any, data: Any) -> Loss:
        """The loss of one request."""
        ...

    def project(self, variables: Any, bounds: Any) -> Any:
        """The nearest variables within their bounds."""
        ...


@dataclasses.dataclass(frozen=True)
class Adam:
    """How far, how fast and until when.

    Attributes:
      steps: at most.
      learning_rate: of Adam, with its usual other constants.
      stop: objective below which no step is taken.
    """

    steps: int
    learning_rate: float
    stop: float


class Descent(NamedTuple):
    """Where an optimisation is; with a leading axis of requests where each goes alone."""

    variables: Any
    moments: Any
    steps: Int[Array, "*request"]


class Descended(NamedTuple):
    """Where an optimisation ended.

    Attributes:
      variables: with a leading axis of requests where each went alone.
      loss: -log p of the answer before each step and after the last, NaN beyond.
      objective: at the end.
      probability: of the answer at the end.
      steps: that were taken.
    """

    variables: Any
    loss: Float[np.ndarray, "request step_or_end"]
    objective: Float[np.ndarray, " request"]
    probability: Float[np.ndarray, " request"]
    steps: Int[np.ndarray, " request"]


_ADAM = optax.scale_by_adam()


def _start(variables: Any) -> Descent:
    return Descent(variables, _ADAM.init(variables), jnp.zeros((), jnp.int32))


def _moved(
    objective: Objective, state: Descent, gradient: Any, bounds: Any, rate: Array, go: Array
) -> Descent:
    """One step of Adam within the bounds, or where `go` is false the same as before."""
    with jax.numpy_dtype_promotion("standard"):  # optax multiplies floats with its step count
        updates, moments = _ADAM.update(gradient, state.moments)
    variables = jax.tree.map(lambda v, u: v - rate * u, state.variables, updates)
    moved = Descent(objective.project(variables, bounds), moments, state.steps + 1)
    return jax.tree.map(lambda new, old: jnp.where(go, new, old), moved, state)


@functools.partial(jax.jit, static_argnames=("objective",), donate_argnames=("state",))
def _step_each(
    params: Params,
    state: Descent,
    data: Any,
    bounds: Any,
    rate: Array,
    stop: Array,
    *,
    objective: Objective,
) -> tuple[Descent, Loss, Bool[Array, " request"]]:
    """Loss of each request, then a step of those that are not done; which of them took one."""

    def step(state: Descent, data: Any, bounds: Any) -> tuple[Descent, Loss, Array]:
        def total(variables: Any) -> tuple[Array, Loss]:
            loss = objective(params, variables, data)
            return loss.objective, loss

        (value, loss), gradient = jax.value_and_grad(total, has_aux=True)(state.variables)
        go = value >= stop
        return _moved(objective, state, gradient, bounds, rate, go), loss, go

    return jax.vmap(step)(state, data, bounds)


def descend_each(
    objective: Objective, params: Params, start: Any, data: Any, bounds: Any, *, adam: Adam
) -> Descended:
    """Minimise the objective of every request alone; all arrays but `params` lead with requests.

    Args:
      objective: of one request.
      params: the model's parameters.
      start: variables to start from.
      data: what the objective takes.
      bounds: what its projection takes.
      adam: how far, how fast and until when.
    """
    state = jax.vmap(_start)(start)
    rate, stop = jnp.float32(adam.learning_rate), jnp.float32(adam.stop)
    step = functools.partial(_step_each, objective=objective)
    history = []
    for _ in range(adam.steps):
        state, loss, went = step(params, state, data, bounds, rate, stop)
        history.append(fetch(loss.answer))
        if not fetch(went).any():
            break
    # The same program reads what came of it: nothing is above NaN, so that no step is taken.
    state, loss, _ = step(params, state, data, bounds, rate, jnp.float32(np.nan))
    steps = fetch(state.steps)
    return _descended(state.variables, history, loss, steps, adam)


@functools.partial(jax.jit, static_argnames=("objective",))
def _gradient(
    params: Params, variables: Any, data: Any, weight: Array, *, objective: Objective
) -> tuple[Any, Loss]:
    """Gradient of the weighted sum of a batch's objectives, and each one's loss."""

    def total(variables: Any) -> tuple[Array, Loss]:
        loss = jax.vmap(lambda data: objective(params, variables, data))(data)
        return jnp.sum(weight * loss.objective), loss

    return jax.grad(total, has_aux=True)(variables)


@functools.partial(jax.jit, static_argnames=("objective",), donate_argnames=("state",))
def _move(
    state: Descent, gradient: Any, bounds: Any, rate: Array, *, objective: Objective
) -> Descent:
    return _moved(objective, state, gradient, bounds, rate, jnp.array(True))


def descend_together(
    objective: Objective,
    params: Params,
    start: Any,
    batches: Sequence[tuple[np.ndarray, Any]],
    bounds: Any,
    *,
    adam: Adam,
    progress: Callable[[int, int], None] | None = None,
) -> Descended:
    """Minimise the mean of all requests' objectives.

    Args:
      objective: of one request.
      params: the model's parameters.
      start: variables to start from.
      batches: which requests the first rows of a batch are, and what the objective takes of each.
      bounds: what its projection takes.
      adam: how far, how fast and until when: `stop` is of the mean.
      progress: called with steps done and steps at most.
    """
    count = sum(len(index) for index, _ in batches)

    def evaluate(variables: Any) -> tuple[Any, Loss]:
        gradient, losses = None, []
        for index, data in batches:
            filled = len(jax.tree.leaves(data)[0])
            weight = jnp.where(jnp.arange(filled) < len(index), 1 / count, 0)
            part, loss = _gradient(params, variables, data, weight, objective=objective)
            gradient = part if gradient is None else jax.tree.map(jnp.add, gradient, part)
            losses.append(jax.tree.map(lambda value, n=len(index): value[:n], loss))
        order = np.argsort(np.concatenate([index for index, _ in batches]))
        return gradient, Loss(*(jnp.concatenate(part)[order] for part in zip(*losses, strict=True)))

    state = _start(start)
    rate = jnp.float32(adam.learning_rate)
    gradient, loss = evaluate(state.variables)
    history = [fetch(loss.answer)]
    for step in range(adam.steps):
        if not float(loss.objective.mean()) >= adam.stop:  # NaN is no reason to go on
            break
        state = _move(state, gradient, bounds, rate, objective=objective)
        gradient, loss = evaluate(state.variables)
        history.append(fetch(loss.answer))
        if progress is not None:
            progress(step + 1, adam.steps)
    if progress is not None:
        progress(adam.steps, adam.steps)
    steps = np.full(count, int(state.steps), np.int32)
    return _descended(state.variables, history, loss, steps, adam)


def _descended(
    variables: Any, history: list[np.ndarray], last: Loss, steps: np.ndarray, adam: Adam
) -> Descended:
    loss = np.full((len(steps), adam.steps + 1), np.nan, np.float32)
    for number, values in enumerate(history):
        taken = number <= steps
        loss[taken, number] = values[taken]
    loss[np.arange(len(steps)), steps] = fetch(last.answer)
    objective, logp = fetch((last.objective, last.log_probability))
    return Descended(fetch(variables), loss, objective, np.exp(logp), steps)


def alone(descended: Descended, row: int) -> Descended:
    """One of the requests that each went alone."""
    variables = jax.tree.map(lambda value: value[row], descended.variables)
    return Descended(variables, *(array[row : row + 1] for array in descended[1:]))


def trace(descended: Descended, *, stop: float) -> Trace:
    """What an optimisation records of itself."""
    return Trace(descended.loss, descended.probability, descended.steps, descended.objective < stop)


def check_finite(
    params: Params,
    descended: Descended,
    requests: Sequence[EditRequest],
    prompts: Sequence[Sequence[int]],
    *,
    config: ModelConfig,
    learning_rate: float,
) -> None:
    """Raise `DataError` for the first request whose loss stopped being finite.

    Args:
      params: the model's parameters.
      descended: of the requests.
      requests: whose names are said.
      prompts: their ids.
      config: the model's shape.
      learning_rate: that was used.
    """
    evaluated = np.arange(descended.loss.shape[1]) <= descended.steps[:, None]
    wrong = evaluated & ~np.isfinite(descended.loss)
    if not wrong.any():
        return
    step = int(np.argmax(wrong.any(0)))
    index = int(np.argmax(wrong[:, step]))
    request = requests[index]
    name = f"request {request.id or index + 1!r} ({request.prompt[:60]!r})"
    if step == 0:
        raise DataError(f"{name}: {explain(params, prompts[index], config=config)}")
    raise DataError(
        f"{name}: the loss is not finite after {step} steps; lower the learning rate "
        f"({learning_rate:g}) or bound the change by a smaller norm"
    )
