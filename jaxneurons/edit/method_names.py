"""Methods by the names that the shell knows, with the neurons that some of them need located."""

import dataclasses
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from jaxneurons.edit.method import (
    MEMIT,
    ROME,
    AlphaEdit,
    FineTune,
    KnowledgeNeurons,
    LearnedNeurons,
    Settings,
)
from jaxneurons.errors import ConfigError, near_matches
from jaxneurons.model.axis_types import any_axes
from jaxneurons.processes.sharing import open_parts, share_parts, spread
from jaxneurons.storage.settings import as_path, check_argument
from jaxneurons.storage.store import digest

if TYPE_CHECKING:
    from jaxneurons.checkpoints.loading import LM
    from jaxneurons.edit.requests import EditRequest
    from jaxneurons.neurons.sets import NeuronSet
    from jaxneurons.storage.progress import Progress

METHODS: dict[str, Settings | type] = {
    "rome": ROME(),
    "rome-identity": ROME(covariance="identity"),
    "memit": MEMIT(),
    "accumulate": MEMIT(accumulate=True),
    "alphaedit": AlphaEdit(),
    "finetune": FineTune(),
    "finetune-bounded": FineTune(norm=5e-4),
    "learn": LearnedNeurons,
    "surgery": KnowledgeNeurons,
}
"""The last two change the neurons of each fact."""
SEQUENTIAL = ("memit", "accumulate", "alphaedit")
"""Those that are made for many edits of one model."""
SINGLE = tuple(name for name in METHODS if name != "accumulate")
"""Those that differ for a first edit: with none before it, "accumulate" is "memit"."""
NEURONS = 20
"""Neurons that are located for each request."""


@any_axes
def named_methods(
    lm: "LM",
    requests: Sequence["EditRequest"],
    names: Sequence[str] = SINGLE,
    *,
    layer: int | None = None,
    layers: Sequence[int] | None = None,
    prefixes: int | None = None,
    out: str | os.PathLike[str] | None = None,
    progress: "Progress | None" = None,
) -> dict[str, Settings]:
    """Settings by name, for `evaluate` and `evaluate_sequential`.

    Args:
      lm: the model.
      requests: whose neurons are located, for the methods that change them.
      names: rome, rome-identity (which keeps no covariance), memit, accumulate (memit with the keys
        of earlier edits kept exactly), alphaedit, finetune, finetune-bounded, learn and surgery
        (both of the 20 neurons that the old answer depends on most).
      layer: for the methods that edit one; None: their default.
      layers: for those that edit several; None: their default.
      prefixes: texts of the model's own that values are optimised after, beside the prompt alone;
        None: the default.
      out: a directory that keeps located neurons, by model and requests: those that are there are
        not located again. Default: none.
      progress: called with how many requests' neurons are located.

    Raises:
      ConfigError: an unknown name, or arguments of other types.
      DataError: requests whose neurons cannot be located; a directory of something else.
    """
    from jaxneurons.edit.layers import with_layers

    check_argument("names", Sequence[str], names)
    for name in names:
        if name not in METHODS:
            raise ConfigError(f"unknown method {name!r}; {near_matches(name, METHODS)}")
    located: tuple[NeuronSet, ...] = ()
    if any(isinstance(METHODS[name], type) for name in names):
        located = _located(lm, requests, out, progress)
    settings: dict[str, Settings] = {}
    for name in names:
        of_name = METHODS[name]
        made: Any = of_name(neurons=located) if isinstance(of_name, type) else of_name
        if isinstance(made, ROME | FineTune) and layer is not None:
            made = with_layers(made, (layer,))
        if isinstance(made, MEMIT | AlphaEdit) and layers is not None:
            made = with_layers(made, tuple(layers))
        if isinstance(made, ROME | MEMIT | AlphaEdit) and prefixes is not None:
            optimisation = dataclasses.replace(made.optimisation, prefixes=prefixes)
            made = dataclasses.replace(made, optimisation=optimisation)
        settings[name] = made
    return settings


def _located(
    lm: "LM",
    requests: Sequence["EditRequest"],
    out: str | os.PathLike[str] | None,
    progress: "Progress | None",
) -> tuple["NeuronSet", ...]:
    """The neurons of each request, from a directory where they are kept."""
    from jaxneurons.checkpoints.loading import LM
    from jaxneurons.edit.located import locate_neurons
    from jaxneurons.edit.requests import EditRequest
    from jaxneurons.neurons.sets import NeuronSet

    check_argument("lm", LM, lm)
    check_argument("requests", Sequence[EditRequest], requests)

    def locate() -> dict[str, np.ndarray]:
        sets = locate_neurons(lm, requests, count=NEURONS, progress=progress)
        return {"neurons": np.array([members.pairs("act") for members in sets])}

    identity = {"kind": "located neurons", "format": 1, "count": NEURONS}
    store = open_parts(None if out is None else as_path("out", out), identity)
    name = digest([lm.identity(), [dataclasses.asdict(request) for request in requests]])
    share_parts(store, {name[:16]: locate}, together=spread(lm.params))
    part = store.part(name[:16], locate)
    return tuple(NeuronSet.of(act=pairs) for pairs in part["neurons"])
