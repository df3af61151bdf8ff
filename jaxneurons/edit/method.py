"""The methods of editing facts: their settings, and what an edit is.

- `ROME`: Meng et al. 2022, arXiv 2202.05262. One layer, one rank-one term for each request.
- `MEMIT`: Meng et al. 2023, arXiv 2210.07229. Several layers, all requests together; with
  `accumulate`, the constraints of earlier edits are kept exactly (arXiv 2605.26670).
- `AlphaEdit`: Fang et al. 2025, arXiv 2410.02355. As MEMIT, in the null space of kept keys.
- `FineTune`: of one down kernel, plain or within an L-infinity ball (Zhu et al. 2020).
- `KnowledgeNeurons`: surgery on located neurons' output rows (Dai et al. 2022, arXiv 2104.08696).
- `LearnedNeurons`: multipliers of, or additions to, a located set, learnt.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

from jaxneurons.edit.changes import Change
from jaxneurons.errors import ConfigError
from jaxneurons.model.config import ModelConfig
from jaxneurons.neurons.sets import NeuronSet
from jaxneurons.storage.settings import check_fields

if TYPE_CHECKING:
    from jaxneurons.edit.requests import EditRequest


def _check_ranges(settings: Any, **least: float | int) -> None:
    """Raise unless numbers are finite and at least so much; None stays None."""
    for name, bound in least.items():
        value = getattr(settings, name)
        if value is None or (math.isfinite(value) and value >= bound):
            continue
        raise ConfigError(
            f"{type(settings).__name__}.{name} must be a finite number of at least {bound:g}, "
            f"got {value!r}"
        )


def _check_positive(settings: Any, *names: str) -> None:
    """Raise unless numbers are finite and above 0; None stays None."""
    for name in names:
        value = getattr(settings, name)
        if value is not None and not (math.isfinite(value) and value > 0):
            raise ConfigError(
                f"{type(settings).__name__}.{name} must be a finite number above 0, got {value!r}"
            )


def _check_ascending(settings: Any) -> None:
    """Raise unless `layers` is None or some layers in ascending order."""
    layers = settings.layers
    if layers is None:
        return
    if not layers or min(layers) < 0 or list(layers) != sorted(set(layers)):
        raise ConfigError(
            f"{type(settings).__name__}.layers must be layers from 0 on, ascending, each once; "
            f"got {layers!r}"
        )


@dataclasses.dataclass(frozen=True)
class Optimisation:
    """How the value v* of a request is found (ROME, section 3.1; MEMIT, section 4.3.1).

    Attributes:
      steps: of Adam, at most.
      learning_rate: of Adam.
      kl_factor: weight of the divergence after "{subject} is a".
      weight_decay: weight of |delta| / |v|^2.
      clamp: |delta| is at most so many |v|.
      stop: loss below which a request is done.
      prefixes: texts that the model wrote, put before the prompt; the prompt alone comes beside.
      prefix_tokens: their lengths, in turn.
      seed: of the prefixes.
    """

    steps: int = 25
    learning_rate: float = 0.5
    kl_factor: float = 0.0625
    weight_decay: float = 1e-3
    clamp: float = 4.0
    stop: float = 0.05
    prefixes: int = 10
    prefix_tokens: tuple[int, ...] = (5, 10)
    seed: int = 0

    def __post_init__(self) -> None:
        check_fields(self)
        _check_ranges(self, steps=0, kl_factor=0, weight_decay=0, stop=0, prefixes=0, seed=0)
        _check_positive(self, "learning_rate", "clamp")
        if not self.prefix_tokens or min(self.prefix_tokens) < 1:
            raise ConfigError(
                f"Optimisation.prefix_tokens must be some lengths of at least 1, "
                f"got {self.prefix_tokens!r}"
            )


@dataclasses.dataclass(frozen=True)
class ROME:
    """One rank-one term in one layer for each request.

    Attributes:
      layer: whose down kernel is edited; None: the default for a model of that depth.
      covariance: "text" for the second moment of keys over text, or "identity".
      optimisation: of the values.
    """

    layer: int | None = None
    covariance: Literal["text", "identity"] = "text"
    optimisation: Optimisation = Optimisation()

    def __post_init__(self) -> None:
        check_fields(self)
        _check_ranges(self, layer=0)


PUBLISHED_WEIGHT, PUBLISHED_WIDTH = 15_000.0, 11_008
"""MEMIT's weight of the covariance for Llama-2-7B, and the width of its feed-forward layers."""


@dataclasses.dataclass(frozen=True)
class MEMIT:
    """All requests together, spread over layers.

    Attributes:
      layers: whose down kernels are edited, ascending; None: the default for that depth.
      weight: of the covariance (lambda); None: 15,000 for each 11,008 of the layer's width, the
        published value for Llama-2-7B (k^T C^-1 k of keys of text is the width, in the mean).
      accumulate: keep the keys of earlier edits exactly, as constraints.
      optimisation: of the values.
    """

    layers: tuple[int, ...] | None = None
    weight: float | None = None
    accumulate: bool = False
    optimisation: Optimisation = Optimisation(clamp=0.75)

    def __post_init__(self) -> None:
        check_fields(self)
        _check_ascending(self)
        _check_positive(self, "weight")


@dataclasses.dataclass(frozen=True)
class AlphaEdit:
    """As MEMIT, within the null space of the keys of text.

    Attributes:
      layers: whose down kernels are edited, ascending; None: the default for that depth.
      threshold: eigenvalues of the covariance below it span the null space.
      weight: of the size of the update itself.
      optimisation: of the values.
    """

    layers: tuple[int, ...] | None = None
    threshold: float = 2e-2
    weight: float = 1.0
    optimisation: Optimisation = Optimisation(clamp=0.75)

    def __post_init__(self) -> None:
        check_fields(self)
        _check_ascending(self)
        _check_positive(self, "threshold", "weight")


@dataclasses.dataclass(frozen=True)
class FineTune:
    """One layer's down kernel, by Adam on the new answers.

    Attributes:
      layer: whose down kernel; None: the default for that depth.
      norm: bound of every entry's change (L-infinity); None: no bound.
      steps: of Adam, at most.
      learning_rate: of Adam.
      stop: loss below which it is done.
    """

    layer: int | None = None
    norm: float | None = None
    steps: int = 25
    learning_rate: float = 5e-4
    stop: float = 0.05

    def __post_init__(self) -> None:
        check_fields(self)
        _check_ranges(self, layer=0, steps=0, stop=0)
        _check_positive(self, "norm", "learning_rate")


@dataclasses.dataclass(frozen=True)
class KnowledgeNeurons:
    """Output rows of located neurons lose the old answer's embedding and gain the new one's.

    Attributes:
      neurons: of site "act" or of one whose index is the row's ("up", "gate"); one set for all
        requests, or one for each.
      old: times the old answer's embedding is subtracted (lambda 1).
      new: times the new answer's embedding is added (lambda 2).
      unit: what an embedding is scaled to before: the norm of the neuron's row, as the paper's
        published code does, or its own, as its equation reads.
    """

    neurons: NeuronSet | tuple[NeuronSet, ...]
    old: float = 1.0
    new: float = 8.0
    unit: Literal["row", "embedding"] = "row"

    def __post_init__(self) -> None:
        check_fields(self)
        _check_ranges(self, old=0, new=0)


@dataclasses.dataclass(frozen=True)
class LearnedNeurons:
    """For a located set only: multipliers of it, or additions to its output rows, learnt.

    Attributes:
      neurons: one set for all requests, or one for each.
      learn: "multipliers" or "rows".
      kl_factor: weight of the divergence on other prompts.
      others: prompts that the divergence is of, beside "{subject} is a".
      norm: bound of the change: of |log multiplier|, or of a row's as a share of its norm.
      steps: of Adam, at most.
      learning_rate: of Adam, on log multipliers, or on a row's change as a share of its norm.
      stop: loss, with the divergence, below which it is done.
    """

    neurons: NeuronSet | tuple[NeuronSet, ...]
    learn: Literal["multipliers", "rows"] = "rows"
    kl_factor: float = 1.0
    others: tuple[str, ...] = ("The weather today is", "Once upon a time", "The company said that")
    norm: float = 1.0
    steps: int = 25
    learning_rate: float = 0.1
    stop: float = 0.05

    def __post_init__(self) -> None:
        check_fields(self)
        _check_ranges(self, kl_factor=0, steps=0, stop=0)
        _check_positive(self, "norm", "learning_rate")


Settings = ROME | MEMIT | AlphaEdit | FineTune | KnowledgeNeurons | LearnedNeurons


def default_layer(config: ModelConfig) -> int:
    """The layer that ROME edits in a model nobody has tuned: 5 of 32, as for Llama-2-7B.

    `choose_layers` finds out which serves best.
    """
    return min(round(5 / 32 * config.num_layers), config.num_layers - 1)


def default_layers(config: ModelConfig) -> tuple[int, ...]:
    """The layers that MEMIT edits in a model nobody has tuned: 4 to 8 of 32, as for Llama-2-7B."""
    first, last = (round(layer / 32 * config.num_layers) for layer in (4, 8))
    return tuple(range(first, min(last, config.num_layers - 1) + 1))


class Trace(NamedTuple):
    """How an optimisation went, request by request.

    Attributes:
      loss: -log p of the new answer (mean over its prefixes) before each step and after the last;
        NaN from there on.
      probability: of the new answer after the prompt alone, teacher-forced, at the end.
      steps: that were taken.
      reached: whether the whole loss, its other terms included, came below `stop`. Where it did
        not, the value that is written is the last one, and the edit may well have failed.
    """

    loss: Float[np.ndarray, "request step_or_end"]
    probability: Float[np.ndarray, " request"]
    steps: Int[np.ndarray, " request"]
    reached: Bool[np.ndarray, " request"]


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Edit:
    """What an edit changes, and how it was found.

    Attributes:
      changes: for `apply`, in order.
      settings: of the method.
      trace: of the optimisation; None where there is none.
      keys: by layer, sum of the outer products of all keys edited so far, float32 [width, width];
        what `earlier` of the next sequential edit takes. Empty where the method keeps none.
      facts: what a patch records beside: covariance's identity, seed, layers.
      requests: what was edited; what a patch shows of itself.
      computed_on: by array that the changes touch ("ffn.down.kernel") and layer, a hash of its
        values as they were (`fingerprint`): `make_patch` refuses an edit of other parameters.
        Empty where it is not known.
    """

    changes: tuple[Change, ...]
    settings: Settings
    trace: Trace | None
    keys: Mapping[int, Float[np.ndarray, "width width"]]
    facts: Mapping[str, Any]
    requests: Sequence["EditRequest"] = ()
    computed_on: Mapping[tuple[str, int], str] = dataclasses.field(default_factory=dict)

    def __repr__(self) -> str:
        of = f"of {len(self.requests)} request(s) " if self.requests else ""
        parts = [f"{len(self.changes)} change(s)"]
        if isinstance(layers := self.facts.get("layers"), list | tuple) and layers:
            parts.append(f"layers {', '.join(map(str, layers))}")
        if self.trace is not None:
            reached = self.trace.reached
            parts.append(f"{int(reached.sum())} of {len(reached)} below the stop loss")
        return f"<Edit {of}by {type(self.settings).__name__}: {'; '.join(parts)}>"
