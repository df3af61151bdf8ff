"""Patches taken out of a model again, bit for bit: of one that knows them from memory."""

import dataclasses
from collections.abc import Sequence

from jaxneurons.checkpoints.loading import LM
from jaxneurons.checkpoints.provenance import Loaded, Patched, hash_values
from jaxneurons.edit.applying import apply_patches
from jaxneurons.edit.entries import put, regions
from jaxneurons.edit.patch import Patch
from jaxneurons.edit.recorded import (
    check_base,
    check_revertible,
    made_on_top,
    revert_recorded,
)
from jaxneurons.errors import DataError
from jaxneurons.model.axis_types import any_axes
from jaxneurons.model.parameters import Params
from jaxneurons.storage.settings import check_argument


@any_axes
def revert(
    lm: LM,
    patches: Patch | Sequence[Patch],
    *,
    base: LM | None = None,
    others: Patch | Sequence[Patch] = (),
) -> LM:
    """The model without some patches, as if they had never been applied: the same bits.

    Args:
      lm: a model with the patches: from `apply_patches`, or loaded from what was saved of it.
      patches: one, or several in any order.
      base: the model before any patch. Needed where a patch does not carry the base's entries
        (low-rank changes, unless made with `keep_base`), and where others touch the same entries.
      others: the patches that stay in the model, where it was loaded from what was saved: its files
        say which they are, and do not hold them.

    Returns:
      The base, or the base with the patches that stay.

    Raises:
      DataError: a patch is not in the model, another one was made on top of it, others are in the
        model that were not given, or the base is needed and not there, or another one.
    """
    check_argument("lm", LM, lm)
    check_argument("base", LM | None, base)
    out, stay = as_patches("patches", patches), as_patches("others", others)
    if not out:
        return lm
    patched = lm.patched
    if patched is None or not patched.result.is_model(lm.config, lm.params):
        return revert_recorded(lm, out, base, stay)
    applied: tuple[Patch, ...] = tuple(p for p in patched.patches if isinstance(p, Patch))
    digests = {patch.digest for patch in out}
    if not digests <= {patch.digest for patch in applied}:
        return revert_recorded(lm, out, base, stay)
    rest = tuple(patch for patch in applied if patch.digest not in digests)
    first = min(n for n, patch in enumerate(applied) if patch.digest in digests)
    for later in applied[first + 1 :]:
        if later.digest not in digests and later.base != patched.base:
            raise made_on_top(later, applied[first])
    if base is not None:
        check_base(base, patched.base)
        return apply_patches(base, rest, allow_conflicts=True)
    return _from_entries(lm, patched, applied, rest)


def as_patches(name: str, patches: Patch | Sequence[Patch]) -> list[Patch]:
    """One or several patches as a list, each once.

    Raises:
      ConfigError: something else is among them.
    """
    several = [patches] if isinstance(patches, Patch) else patches
    check_argument(name, Sequence[Patch], several)
    return list({patch.digest: patch for patch in several}.values())


def _from_entries(
    lm: LM, patched: Patched, applied: Sequence[Patch], rest: tuple[Patch, ...]
) -> LM:
    """Without patches that the model lists, from the entries that they carry."""
    out = [patch for patch in applied if patch not in rest]
    for patch in out:
        check_revertible(patch)
        # What it carries are the values under the patches it was made on: of all others, none may
        # have touched these entries.
        below = applied[: applied.index(patch)] if patch.base != patched.base else ()
        _check_apart(patch, [other for other in rest if other not in below], lm)
    params = lm.params
    for patch in reversed(out):
        params = put(params, patch.kept)
    if not rest:
        _check_restored(lm, params, patched.base, out)
        return _without_patches(lm, patched, params)
    again = dataclasses.replace(patched, patches=rest, result=Loaded(lm.config, params))
    return dataclasses.replace(lm, params=params, patched=again)


def _check_apart(patch: Patch, others: Sequence[Patch], lm: LM) -> None:
    """Raise if others touch entries that a patch touches."""
    ours = [dataclasses.replace(region, how="set") for region in regions(patch.changes, lm.config)]
    for other in others:
        for region in regions(other.changes, lm.config):
            if any(mine.meets(region) for mine in ours):
                raise DataError(
                    f"{other.name} touches entries of {region.place} that {patch.name} touches "
                    "too; give the base (base=, --base SRC), to which the others are applied again"
                )


def _without_patches(lm: LM, patched: Patched, params: Params) -> LM:
    """The base again; what was loaded, if it was that."""
    loaded = lm.loaded
    if not patched.base_changed and lm.dtype.name == patched.base_dtype:
        loaded = loaded.with_model(lm.config, params)
    return dataclasses.replace(lm, params=params, patched=None, loaded=loaded)


def _check_restored(lm: LM, params: Params, identity: str, out: Sequence[Patch]) -> None:
    restored = hash_values(lm.config, params)
    if restored != identity:
        names = " and ".join(patch.name for patch in out)
        raise DataError(
            f"{names}: not all that differs from the base: without it the parameters are "
            f"{restored[:16]}, the base's {identity[:16]}; nothing was reverted"
        )
