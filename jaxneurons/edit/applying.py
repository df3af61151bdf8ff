"""Patches applied to a model, one or several; where they conflict.

Nothing here changes a model: what comes back is another one, which knows its patches.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp

from jaxneurons.checkpoints.loading import LM
from jaxneurons.checkpoints.provenance import Loaded, Patched, hash_values
from jaxneurons.edit.changes import Change, apply
from jaxneurons.edit.entries import Region, regions
from jaxneurons.edit.patch import Patch, plain, recorded_name
from jaxneurons.errors import DataError
from jaxneurons.model.axis_types import any_axes
from jaxneurons.model.config import config_values
from jaxneurons.model.parameters import LAYERS, Params, get
from jaxneurons.storage.settings import check_argument

_NOT_COMPUTED = ("family", "max_position")
"""Fields of a configuration that the values of a forward pass do not depend on."""


class Conflict(NamedTuple):
    """Two patches that touch the same entries, so that their order decides.

    Attributes:
      first: position of a patch.
      second: position of a later one.
      place: which array.
      size: rows, columns or arrays that both touch.
      how: what each does there: "set", "scale" or "add".
    """

    first: int
    second: int
    place: str
    size: int
    how: tuple[str, str]

    def __str__(self) -> str:
        return (
            f"patches {self.first + 1} and {self.second + 1} both touch {self.size} rows, columns "
            f"or neurons of {self.place} ({self.how[0]}, {self.how[1]})"
        )


def conflicts(patches: Sequence[Patch]) -> tuple[Conflict, ...]:
    """Where patches set or scale the same entries and do not know of each other.

    Low-rank terms of one kernel add up and do not conflict. A patch of another base than the first
    one's was made on the model with those before it, and does not conflict with them.

    Args:
      patches: in the order in which they are to be applied.
    """
    touched = [regions(patch.changes, patch.model_config) for patch in patches]
    places: dict[tuple[str, int], list[tuple[int, Region]]] = {}
    for number, of_patch in enumerate(touched):
        for region in of_patch:
            places.setdefault((region.array, region.layer), []).append((number, region))
    knows = [patch.base != patches[0].base for patch in patches]
    meeting = []
    for here in places.values():
        if all(region.how == "add" for _, region in here):
            continue
        for at, (second, region) in enumerate(here):
            for first, other in here[:at] if not knows[second] else ():
                if first != second and (size := other.meets(region)):
                    how = (other.how, region.how)
                    meeting.append(Conflict(first, second, region.place, size, how))
    return tuple(sorted(meeting))


@any_axes
def apply_patches(lm: LM, patches: Sequence[Patch] | Patch, *, allow_conflicts: bool = False) -> LM:
    """The model with patches applied in their order.

    Every patch must be for the model as it was before any patch, or for the model with those
    before it. Patches of one base are summed in float32 and rounded once, as `changes.apply` does.

    Args:
      lm: the base, or an edited model to which more is applied.
      patches: one, or several in order.
      allow_conflicts: apply patches that set or scale the same entries one after the other.

    Returns:
      A model of which `edited`, `patches` and `facts()` say what is in it.

    Raises:
      DataError: a patch of another model, one that is in the model already, patches that conflict,
        or parameters that would not be finite in their dtype.
    """
    check_argument("lm", LM, lm)
    patches = [patches] if isinstance(patches, Patch) else list(patches)
    for patch in patches:
        check_argument("patches", Patch, patch)
        _check_config(lm, patch)
    if not patches:
        return lm
    earlier = _in_model(lm)
    _check_repeated(lm, earlier, patches)
    if not allow_conflicts:
        _check_conflicts(earlier, patches)
    base = lm.patched.base if lm.patched is not None and earlier else lm.values_hash
    params, pending = lm.params, []
    for patch in patches:
        if patch.base != base:
            params, pending = apply(params, pending, config=lm.config), []
            same = params is lm.params
            if patch.base != (lm.values_hash if same else hash_values(lm.config, params)):
                raise _wrong_base(lm, patch)
        pending += patch.changes
    params = apply(params, pending, config=lm.config)
    _check_finite(params, [change for patch in patches for change in patch.changes], lm)
    before = lm.patched if earlier else None
    patched = Patched(
        patches=(*earlier, *patches),
        base=base,
        base_changed=before.base_changed if before else lm.changed,
        base_dtype=before.base_dtype if before else lm.dtype.name,
        result=Loaded(lm.config, params),
    )
    return dataclasses.replace(lm, params=params, patched=patched)


def _in_model(lm: LM) -> tuple[Any, ...]:
    """Patches that the parameters are the result of; none if they were changed since."""
    patched = lm.patched
    if patched is None or not patched.result.is_model(lm.config, lm.params):
        return ()
    return patched.patches


def _check_config(lm: LM, patch: Patch) -> None:
    ours = plain(config_values(lm.config))
    other = [
        name
        for name in sorted({*ours, *patch.config})
        if name not in _NOT_COMPUTED and ours.get(name) != patch.config.get(name)
    ]
    if other:
        values = "; ".join(
            f"{name} {patch.config.get(name)!r:.40}, here {ours.get(name)!r:.40}" for name in other
        )
        raise DataError(
            f"{patch.name} is for a model of another configuration ({values}): load the model "
            "that it was made on"
        )


def _check_repeated(lm: LM, earlier: Sequence[Patch], patches: Sequence[Patch]) -> None:
    known = {patch.digest for patch in earlier}
    known |= {str(record.get("digest")) for record in lm.recorded_patches}
    for patch in patches:
        if patch.digest in known:
            raise DataError(f"{patch.name} is in the model already ({lm.source}); apply it once")
        known.add(patch.digest)


def _check_conflicts(earlier: Sequence[Patch], patches: Sequence[Patch]) -> None:
    meeting = [c for c in conflicts([*earlier, *patches]) if c.second >= len(earlier)]
    if meeting:
        more = f", and {len(meeting) - 1} more such places" if len(meeting) > 1 else ""
        raise DataError(
            f"{meeting[0]}{more}: what comes out depends on their order; leave one out, make the "
            "later one on the model with the earlier, or apply them in the order given "
            "(allow_conflicts=True, --allow-conflicts)"
        )


def _check_finite(params: Params, changes: Sequence[Change], lm: LM) -> None:
    for array in {region.array for region in regions(changes, lm.config)}:
        if not bool(jnp.isfinite(get(params, (LAYERS, *array.split(".")))).all()):
            raise DataError(
                f"{array}: the edited parameters hold NaN or infinite numbers in {lm.dtype.name}; "
                "load the model in a wider dtype, or make a smaller edit"
            )


def _wrong_base(lm: LM, patch: Patch) -> DataError:
    records = lm.patch_facts().get("patches", ())
    of_base = [record for record in records if record.get("base") == patch.base]
    if of_base:
        names = ", ".join(recorded_name(record) for record in records)
        return DataError(
            f"{lm.source} is edited already: it holds {names}. {patch.name} is for the model "
            f"before that ({patch.facts.get('base_name', 'a model')}, {patch.base[:16]}): apply "
            "all patches together to that model"
        )
    name = patch.facts.get("base_name", "a model")
    return DataError(
        f"{patch.name} is for the parameters {patch.base[:16]} ({name}, "
        f"{patch.facts.get('base_dtype', 'float32')}), those of {lm.source} are "
        f"{lm.values_hash[:16]} ({lm.dtype.name}): load the model that it was made on, in that "
        "dtype; a patch that was made on an edited model comes after that model's patches"
    )
