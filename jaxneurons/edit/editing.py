"""The one interface to all methods of editing facts: requests and parameters in, edits out.

`edit` writes all requests into one model; `edit_each` makes as many edits as there are requests,
each of the parameters as they are. What a method is called with is decided by the type of its
settings: a row of `METHODS`.
"""

import dataclasses
import importlib
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from jaxneurons.edit import layered, rank_one
from jaxneurons.edit.covariance import Covariance
from jaxneurons.edit.experts import check_one_kernel
from jaxneurons.edit.fingerprint import fingerprint, places
from jaxneurons.edit.method import (
    MEMIT,
    ROME,
    AlphaEdit,
    Edit,
    FineTune,
    KnowledgeNeurons,
    LearnedNeurons,
    Settings,
)
from jaxneurons.edit.requests import EditRequest
from jaxneurons.edit.values import Values, check_layers
from jaxneurons.errors import ConfigError, DataError
from jaxneurons.model.axis_types import any_axes
from jaxneurons.model.config import ModelConfig
from jaxneurons.model.parameters import Params
from jaxneurons.storage.progress import Progress
from jaxneurons.storage.settings import check_argument

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Method(NamedTuple):
    """How requests are edited by one kind of settings.

    Attributes:
      module: below `jaxneurons.edit`; it is imported when it is needed.
      edit: its function that writes all requests into one model.
      edit_each: its function that edits each alone.
      takes: which of the optional arguments of `edit` it has a use for.
    """

    module: str
    edit: str
    edit_each: str
    takes: frozenset[str] = frozenset()

    def function(self, name: str) -> Callable[..., Any]:
        """`edit` or `edit_each` itself."""
        return getattr(importlib.import_module(f"jaxneurons.edit.{self.module}"), name)

    def taken(self, **given: Any) -> dict[str, Any]:
        """Those of some optional arguments that it has a use for."""
        return {name: value for name, value in given.items() if name in self.takes}


_VALUES = frozenset({"covariance", "values", "prefixes"})
METHODS: dict[type, Method] = {
    ROME: Method("rank_one", "rome", "rome_each", _VALUES),
    MEMIT: Method("layered", "layered", "layered_each", _VALUES | {"earlier"}),
    AlphaEdit: Method("layered", "layered", "layered_each", _VALUES | {"earlier"}),
    FineTune: Method("finetune", "fine_tune", "fine_tune_each"),
    KnowledgeNeurons: Method("knowledge_neurons", "operate", "operate_each"),
    LearnedNeurons: Method("learned", "learn_neurons", "learn_neurons_each"),
}
"""By the type of their settings."""


@any_axes
def edit(
    params: Params,
    requests: Sequence[EditRequest],
    *,
    config: ModelConfig,
    tokenizer: "PreTrainedTokenizerBase",
    settings: Settings,
    covariance: Mapping[int, Covariance] | None = None,
    earlier: Mapping[int, np.ndarray] | None = None,
    values: Values | None = None,
    prefixes: Sequence[str] | None = None,
    progress: Progress | None = None,
) -> Edit:
    """All requests in one edit. Pure: `params` are not touched; `apply` makes the edited ones.

    MEMIT and AlphaEdit write the requests together; ROME one after the other, each on what those
    before it left. Whether each optimisation reached its goal stands in `trace.reached`.

    Args:
      params: the parameters.
      requests: what is to be edited.
      config: the model's shape.
      tokenizer: the model's.
      settings: the method's.
      covariance: of the keys of text by layer, from `collect_covariance`; for ROME, MEMIT and
        AlphaEdit, at the layers that `layers_of` names.
      earlier: `Edit.keys` of the edits so far, for AlphaEdit and `MEMIT(accumulate=True)`.
      values: found before, on the same parameters and with the same settings, by `values_of`.
      prefixes: texts to put before prompts, instead of the model's own.
      progress: called with how many requests are done.

    Raises:
      DataError: no requests, one that cannot be encoded, a covariance that is missing or of no use,
        or a request whose optimisation or update is not finite.
      ConfigError: settings of no known method, or a layer that this model does not have.
    """
    method = _method(requests, config, settings)
    given = method.taken(covariance=covariance, earlier=earlier, values=values, prefixes=prefixes)
    made = method.function(method.edit)(
        params,
        list(requests),
        config=config,
        tokenizer=tokenizer,
        settings=settings,
        progress=progress,
        **given,
    )
    return _signed(params, [made], [requests], config)[0]


@any_axes
def edit_each(
    params: Params,
    requests: Sequence[EditRequest],
    *,
    config: ModelConfig,
    tokenizer: "PreTrainedTokenizerBase",
    settings: Settings,
    covariance: Mapping[int, Covariance] | None = None,
    values: Values | None = None,
    prefixes: Sequence[str] | None = None,
    progress: Progress | None = None,
) -> list[Edit]:
    """Each request in an edit of its own of the parameters as they are, optimised side by side.

    Args:
      params: the parameters.
      requests: what is to be edited.
      config: the model's shape.
      tokenizer: the model's.
      settings: the method's.
      covariance: as of `edit`.
      values: as of `edit`.
      prefixes: as of `edit`.
      progress: called with how many requests are done.

    Raises:
      DataError: as `edit`.
      ConfigError: as `edit`.
    """
    method = _method(requests, config, settings)
    given = method.taken(covariance=covariance, values=values, prefixes=prefixes)
    made = method.function(method.edit_each)(
        params,
        list(requests),
        config=config,
        tokenizer=tokenizer,
        settings=settings,
        progress=progress,
        **given,
    )
    return _signed(params, made, [[request] for request in requests], config)


def _signed(
    params: Params,
    edits: Sequence[Edit],
    requests: Sequence[Sequence[EditRequest]],
    config: ModelConfig,
) -> list[Edit]:
    """Edits that know their requests and what they were computed on; each array is hashed once."""
    touched = [places(edit.changes, config=config) for edit in edits]
    known = fingerprint(params, sorted(set().union(*touched)))
    return [
        dataclasses.replace(
            edit,
            requests=tuple(of_edit),
            computed_on={place: known[place] for place in where if place in known},
        )
        for edit, of_edit, where in zip(edits, requests, touched, strict=True)
    ]


@any_axes
def values_of(
    params: Params,
    requests: Sequence[EditRequest],
    *,
    config: ModelConfig,
    tokenizer: "PreTrainedTokenizerBase",
    settings: ROME | MEMIT | AlphaEdit,
    prefixes: Sequence[str] | None = None,
    progress: Progress | None = None,
) -> Values:
    """Keys and values alone, which `edit` and `edit_each` take: for methods that share them.

    MEMIT, MEMIT with accumulation and AlphaEdit optimise the same thing where their last layer and
    their `optimisation` are the same.

    Raises:
      DataError: as `edit`.
      ConfigError: as `edit`; settings of a method that has no values.
    """
    _method(requests, config, settings)
    options: dict[str, Any] = {
        "config": config,
        "tokenizer": tokenizer,
        "prefixes": prefixes,
        "progress": progress,
    }
    if isinstance(settings, ROME):
        return rank_one.values_of(params, requests, settings=settings, **options)
    if isinstance(settings, MEMIT | AlphaEdit):
        return layered.values_of(params, requests, settings=settings, **options)
    raise ConfigError(f"{type(settings).__name__} optimises no values")


def layers_of(settings: Settings, config: ModelConfig) -> tuple[int, ...]:
    """The layers whose covariance a method needs; () if it needs none.

    Raises:
      ConfigError: a layer that this model does not have.
    """
    layers: tuple[int, ...] = ()
    if isinstance(settings, ROME) and settings.covariance == "text":
        layers = rank_one.layers_of(settings, config)
    elif isinstance(settings, MEMIT | AlphaEdit):
        layers = layered.layers_of(settings, config)
    check_layers(layers, config)
    return layers


def _method(requests: Sequence[EditRequest], config: ModelConfig, settings: Settings) -> Method:
    check_argument("requests", Sequence[EditRequest], requests)
    check_argument("config", ModelConfig, config)
    if type(settings) not in METHODS:
        names = ", ".join(kind.__name__ for kind in METHODS)
        raise ConfigError(f"settings must be those of a method ({names}), got {settings!r:.80}")
    if not requests:
        raise DataError("no requests: give at least one fact to edit")
    layers_of(settings, config)
    if isinstance(settings, ROME | MEMIT | AlphaEdit | FineTune):
        check_one_kernel(config, type(settings).__name__)
    return METHODS[type(settings)]
