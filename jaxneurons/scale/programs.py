"""A job in numbers, and a program of it: what predictions and compilations are of."""

import dataclasses
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from jaxneurons.engine.quadrature import Rule
from jaxneurons.errors import ConfigError, near_matches
from jaxneurons.storage.settings import check_fields, check_number

Job = Literal["locate", "evaluate", "responses", "relspec", "edit", "sweep"]
JOBS: tuple[Job, ...] = get_args(Job)
"""`locate`: attribution of every prompt. `evaluate`: the answer with neurons scaled, in trials.
`responses`: of every neuron to every prompt. `sweep`: generation with each of some sets of neurons
off. `relspec`: both of these. `edit`: values of facts, moments of keys, and measures."""


@dataclasses.dataclass(frozen=True)
class Work:
    """How much of a job.

    Attributes:
      prompts: of the job; requests, for `edit`.
      tokens: of a prompt.
      answers: tokens of an answer.
      rule: of the attribution's path: adaptive, gauss, right, reference.
      steps: nodes of a fixed rule.
      sets: of neurons that are turned off (`relspec`, `sweep`), trials of a prompt (`evaluate`).
      generated: tokens that are generated after a prompt.
      layers: that an edit is spread over.
    """

    prompts: int = 1000
    tokens: int = 128
    answers: int = 1
    rule: Rule = "adaptive"
    steps: int = 16
    sets: int = 32
    generated: int = 2
    layers: int = 1

    def __post_init__(self) -> None:
        check_fields(self)
        for field in dataclasses.fields(self):
            if field.type is int:
                check_number(field.name, getattr(self, field.name), least=1)


class Chunks(NamedTuple):
    """How much of a job is done at once, on all devices together.

    Attributes:
      prompts: in a batch.
      rows: of an attribution (layer x node of every prompt) in a pass.
      sets: of neurons that are off, in a batch.
      trials: of a prompt, together.
    """

    prompts: int
    rows: int
    sets: int
    trials: int


class Argument(NamedTuple):
    """An array that a program takes.

    Attributes:
      shape: of it.
      dtype: of it.
      batch: its axis of prompts, which a mesh splits; None: every device has all of it.
    """

    shape: tuple[int, ...]
    dtype: DTypeLike
    batch: int | None = None

    @property
    def struct(self) -> jax.ShapeDtypeStruct:
        """Its shape for JAX."""
        return jax.ShapeDtypeStruct(self.shape, jnp.dtype(self.dtype))


@dataclasses.dataclass(frozen=True, eq=False)
class Program:
    """A compiled function of a job.

    Attributes:
      name: of the function that it is.
      function: of parameters and the arguments.
      arguments: a tree of `Argument` for each.
      calls: of it in the whole job.
      loops: turns of a loop of unknown length, of each call.
      positions: tokens or rows that pass all layers, forward, of a call.
      gradients: of them, those that pass back.
      passes: times that a call reads the layers.
    """

    name: str
    function: Callable[..., Any]
    arguments: tuple[Any, ...]
    calls: int
    loops: int = 1
    positions: int | float = 0
    gradients: int | float = 0
    passes: int | float = 1

    @property
    def structs(self) -> tuple[Any, ...]:
        """Its arguments for JAX."""
        return jax.tree.map(
            lambda argument: argument.struct,
            self.arguments,
            is_leaf=lambda node: isinstance(node, Argument),
        )


def check_job(job: str) -> Job:
    """A job's name.

    Raises:
      ConfigError: there is no such job, with near matches.
    """
    if job not in JOBS:
        raise ConfigError(f"unknown job {job!r}; {near_matches(str(job), JOBS)}")
    return job
