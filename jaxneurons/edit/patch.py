"""Patches: what an edit changed, of which model and how it was found; applied and reverted exactly.

A patch knows its base by the values of the parameters (`LM.values_hash`), so that it is never
applied to another model, and a model knows its patches (`LM.patches`). Nothing here changes a
model: every function returns another one.
"""

import dataclasses
import functools
import hashlib
import json
import math
import re
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxneurons.checkpoints.loading import LM
from jaxneurons.checkpoints.provenance import AnyPatch
from jaxneurons.edit.changes import (
    Change,
    LowRank,
    Multipliers,
    Rows,
    check_changes,
    multipliers,
)
from jaxneurons.edit.entries import Entries, check_entries, regions, take
from jaxneurons.edit.fingerprint import differing
from jaxneurons.edit.method import Edit
from jaxneurons.errors import ConfigError, DataError
from jaxneurons.model.axis_types import any_axes
from jaxneurons.model.config import ModelConfig, config_values
from jaxneurons.neurons.sets import NeuronSet, Ranking
from jaxneurons.processes.sharing import fetch
from jaxneurons.storage.printable import counted
from jaxneurons.storage.settings import check_argument
from jaxneurons.storage.store import digest, null_for_nan

FORMAT = 1
"""Of patch files."""
_SUMMARY = (
    "method",
    "settings",
    "seed",
    "layers",
    "covariance",
    "base_name",
    "base_dtype",
    "jaxneurons",
)
_OF_REQUESTS = ("id", "subject", "prompt", "target", "ground_truth")
_SHA256 = re.compile(r"[0-9a-f]{64}")

Editable = Edit | Change | Sequence[Change] | NeuronSet | Ranking | Mapping[str, Any]
"""What a patch can be made of; a mapping holds multipliers [layer, width] by site."""


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Patch(AnyPatch):
    """What an edit changes in one model; see `make_patch`.

    Attributes:
      changes: in the order in which they are applied, arrays on the host.
      base: `LM.values_hash` of the parameters that it is for.
      config: that model's shape, as JSON has it.
      facts: how it was found, as JSON has it: method, settings, seed, covariance's identity,
        targets, measures, version of this library.
      kept: the base's entries that are touched, so that it can be reverted without the base; empty
        if they are not carried.

    Raises:
      DataError: no changes, changes that do not fit the configuration, or numbers that are not
        finite.
    """

    changes: tuple[Change, ...]
    base: str
    config: Mapping[str, Any]
    facts: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    kept: tuple[Entries, ...] = ()

    def __post_init__(self) -> None:
        if not self.changes:
            raise DataError("a patch of no changes: nothing differs from its base")
        if not isinstance(self.base, str) or not _SHA256.fullmatch(self.base):
            raise DataError(f"the base of a patch is a SHA-256, got {self.base!r:.80}")
        config = self.model_config
        check_changes(self.changes, config=config, finite=True)
        check_entries(self.kept, config=config)

    @functools.cached_property
    def model_config(self) -> ModelConfig:
        """The shape of the model that it is for."""
        from jaxneurons.edit.patch_file import config_of

        return config_of(self.config)

    @property
    def digest(self) -> str:
        """SHA-256 of all that it is: changes, base, configuration, facts and kept entries."""
        return self._digest

    @functools.cached_property
    def _digest(self) -> str:
        from jaxneurons.edit.patch_file import contents

        description, arrays = contents(self)
        sha = hashlib.sha256(json.dumps(description, sort_keys=True).encode())
        for name, array in sorted(arrays.items()):
            sha.update(f"\n{name} {array.dtype.name} {array.shape}\n".encode())
            sha.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
        return sha.hexdigest()

    @property
    def config_digest(self) -> str:
        """SHA-256 of the configuration."""
        return digest(dict(self.config))

    @property
    def method(self) -> str:
        """How it was found: of `facts`."""
        return str(self.facts.get("method", "changes"))

    @property
    def nbytes(self) -> int:
        """Of all arrays, those of the base's entries included."""
        from jaxneurons.edit.patch_file import contents

        return sum(array.nbytes for array in contents(self)[1].values())

    @property
    def revertible(self) -> bool:
        """Whether it carries the base's entries, so that it can be reverted without the base."""
        return bool(self.kept)

    @property
    def name(self) -> str:
        """For messages."""
        return f"patch {self.digest[:12]} ({self.method})"

    def summary(self) -> dict[str, Any]:
        """What files of results and exported models say of it."""
        return {
            "digest": self.digest,
            "base": self.base,
            "config_digest": self.config_digest,
            "changes": [_describe(change) for change in self.changes],
            **{name: self.facts[name] for name in _SUMMARY if name in self.facts},
        }

    def table(self) -> list[dict[str, Any]]:
        """A row for each change: kind, place, layers, size and the norm of its numbers."""
        return [_row(change) for change in self.changes]

    def __repr__(self) -> str:
        model = self.facts.get("base_name", "a model")
        shown = "; ".join(_describe(change) for change in self.changes[:3])
        more = f" and {len(self.changes) - 3} more" if len(self.changes) > 3 else ""
        revertible = ", carries the base's entries" if self.revertible else ""
        return (
            f"<Patch {self.digest[:12]} by {self.method}, for {model} ({self.base[:12]}): "
            f"{shown}{more}; {self.nbytes:,} bytes{revertible}>"
        )


def recorded_name(record: Mapping[str, Any]) -> str:
    """For messages: the name of a patch of which there is a summary only."""
    return f"patch {str(record.get('digest', '?'))[:12]} ({record.get('method', 'changes')})"


def _row(change: Change) -> dict[str, Any]:
    if isinstance(change, Multipliers):
        return {
            "kind": "multipliers",
            "place": change.site,
            "layers": np.unique(np.asarray(change.layer)).tolist(),
            "size": len(change.factor),
            "norm": float(np.linalg.norm(np.asarray(change.factor, np.float64) - 1)),
        }
    row = {"place": change.module, "layers": [change.layer]}
    if isinstance(change, LowRank):
        left, right = np.asarray(change.left, np.float64), np.asarray(change.right, np.float64)
        # |L R|^2 = sum of (L^T L) * (R R^T): no matrix of the kernel's size.
        square = float(np.sum((left.T @ left) * (right @ right.T)))
        norm = math.sqrt(max(square, 0.0))
        return {"kind": "low-rank", **row, "size": left.shape[1], "norm": norm}
    values = np.asarray(change.values, np.float64)
    return {"kind": "rows", **row, "size": len(values), "norm": float(np.linalg.norm(values))}


def _describe(change: Change) -> str:
    row = _row(change)
    layers = ", ".join(map(str, row["layers"][:6])) + (", ..." if len(row["layers"]) > 6 else "")
    layers = f"layer{'s' if len(row['layers']) > 1 else ''} {layers}"
    if isinstance(change, Multipliers):
        return f"{counted(row['size'], 'neuron')} of site {row['place']!r} multiplied in {layers}"
    what = (
        f"rank {row['size']} added to"
        if isinstance(change, LowRank)
        else (f"{counted(row['size'], 'row')} set in")
    )
    return f"{what} {row['place']} of {layers}"


@any_axes
def make_patch(
    lm: LM,
    edit: Editable,
    *,
    factor: float | int = 0.0,
    facts: Mapping[str, Any] | None = None,
    keep_base: bool | None = None,
) -> Patch:
    """A patch of a model.

    Args:
      lm: the model that is changed, before the change.
      edit: an `Edit`, changes, a set of neurons, or multipliers [layer, width] by site.
      factor: that the neurons of a set are multiplied by.
      facts: to record beside what an `Edit` says of itself: targets, measures, seed.
      keep_base: carry the touched entries of the base, so that the patch can be reverted without
        it. None: those of rows and multipliers, which are few, and those of low-rank changes, whole
        kernels, not: reverting these takes the base.

    Raises:
      DataError: nothing is changed, the model has not what is changed, numbers are not finite, an
        edit was computed on other parameters, or facts that have no place in JSON.
      SourceError: the parameters are spread over several processes.
    """
    check_argument("lm", LM, lm)
    changes, known = _changes(lm, edit, factor)
    changes = tuple(_on_host(change) for change in changes)
    check_changes(changes, config=lm.config, finite=True)
    if isinstance(edit, Edit):
        _check_computed_on(lm, edit)
    if keep_base is None:
        keep_base = not any(isinstance(change, LowRank) for change in changes)
    kept = take(lm.params, regions(changes, lm.config), lm.config) if keep_base and changes else ()
    return Patch(
        changes=changes,
        base=lm.values_hash,
        config=plain(config_values(lm.config)),
        facts=plain(
            {
                **known,
                **(facts or {}),
                "base_name": Path(lm.source).name or lm.source,
                "base_dtype": lm.dtype.name,
                "jaxneurons": version("jaxneurons"),
            }
        ),
        kept=kept,
    )


def _check_computed_on(lm: LM, edit: Edit) -> None:
    if other := differing(lm.params, edit.computed_on):
        array, layer = other[0]
        raise DataError(
            f"the edit was computed on other parameters than {lm.source} has now: {array} of layer "
            f"{layer} differs; give the model as it was then, or edit this one"
        )


def _changes(lm: LM, edit: Editable, factor: float) -> tuple[tuple[Change, ...], dict[str, Any]]:
    """The changes of an edit, and what it says of itself."""
    if isinstance(edit, NeuronSet | Ranking | Mapping):
        of_set = {} if isinstance(edit, Mapping) else {"settings": {"factor": float(factor)}}
        return multipliers(edit, factor, config=lm.config), {"method": "multipliers", **of_set}
    if isinstance(edit, Edit):
        known = {
            "method": type(edit.settings).__name__,
            "settings": edit.settings,
            **_seed(edit.settings),
            **edit.facts,
        }
        if edit.requests:
            known["requests"] = [
                {name: getattr(request, name) for name in _OF_REQUESTS} for request in edit.requests
            ]
        if (trace := edit.trace) is not None:
            known["optimisation"] = {
                "probability": trace.probability,
                "steps": trace.steps,
                "reached": trace.reached,
            }
        return tuple(edit.changes), known
    if isinstance(edit, LowRank | Rows | Multipliers):
        return (edit,), {}
    check_argument("edit", Sequence, edit)
    return tuple(edit), {}


def _seed(settings: Any) -> dict[str, int]:
    seed = getattr(getattr(settings, "optimisation", settings), "seed", None)
    return {} if seed is None else {"seed": seed}


def _on_host(change: Change) -> Change:
    if isinstance(change, LowRank):
        return dataclasses.replace(change, left=_float(change.left), right=_float(change.right))
    if isinstance(change, Rows):
        return dataclasses.replace(change, index=_int(change.index), values=_float(change.values))
    if isinstance(change, Multipliers):
        layer, index = _int(change.layer), _int(change.index)
        return dataclasses.replace(change, layer=layer, index=index, factor=_float(change.factor))
    raise ConfigError(f"edit must hold LowRank, Rows or Multipliers; got {type(change).__name__}")


def _float(array: Any) -> np.ndarray:
    return fetch(array).astype(np.float32)


def _int(array: Any) -> np.ndarray:
    return fetch(array).astype(np.int32)


def plain(value: Any) -> Any:
    """A value as JSON has it: settings by their fields, arrays as lists, NaN as null.

    Raises:
      DataError: something that JSON has no place for.
    """
    if isinstance(value, NeuronSet):
        return {site: value.pairs(site).tolist() for site in value.codes}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): plain(inner) for key, inner in value.items()}
    if isinstance(value, np.ndarray | np.generic | jnp.ndarray):
        return plain(np.asarray(value).tolist())
    if isinstance(value, list | tuple):
        return [plain(inner) for inner in value]
    if isinstance(value, Path):
        return str(value)
    if value is None or isinstance(value, str | int | float):
        return null_for_nan(value)
    raise DataError(f"facts of a patch: {type(value).__name__} has no place in JSON")
