"""Patches taken out of a model again, bit for bit."""

import dataclasses

from jaxneurons.checkpoints.loading import LM
from jaxneurons.checkpoints.provenance import Loaded, Patched, hash_values
from jaxneurons.edit.applying import apply_patches
from jaxneurons.edit.changes import apply
from jaxneurons.edit.entries import put, regions
from jaxneurons.edit.patch import Patch
from jaxneurons.errors import DataError
from jaxneurons.model.parameters import Params
from jaxneurons.storage.settings import check_argument


def revert(lm: LM, patch: Patch, *, base: LM | None = None) -> LM:
    """The model without a patch, as if it had never been applied: the same bits.

    Args:
      lm: a model with the patch: from `apply_patches`, or loaded from what was saved of it.
      patch: the patch.
      base: the model before any patch. Needed where the patch does not carry the base's entries
        (low-rank changes, unless made with `keep_base`), and where others touch the same entries.

    Raises:
      DataError: the patch is not in the model, another one was made on top of it, or the base is
        needed and not there, or another one.
    """
    check_argument("lm", LM, lm)
    check_argument("patch", Patch, patch)
    check_argument("base", LM | None, base)
    patched = lm.patched
    if patched is None or not patched.result.is_model(lm.config, lm.params):
        return _unlisted(lm, patch, base)
    applied: tuple[Patch, ...] = tuple(p for p in patched.patches if isinstance(p, Patch))
    digests = [other.digest for other in applied]
    if patch.digest not in digests:
        return _unlisted(lm, patch, base)
    at = digests.index(patch.digest)
    rest = (*applied[:at], *applied[at + 1 :])
    for later in applied[at + 1 :]:
        if later.base != patched.base:
            raise DataError(f"{later.name} was made on top of {patch.name}: revert it first")
    if base is not None:
        _check_base(base, patched.base)
        return apply_patches(base, rest, allow_conflicts=True)
    # What it carries are the values under the patches it was made on: of all others, none may have
    # touched these entries.
    beside = rest if patch.base == patched.base else rest[at:]
    return _listed(lm, patched, patch, rest, beside)


def _listed(
    lm: LM, patched: Patched, patch: Patch, rest: tuple[Patch, ...], beside: tuple[Patch, ...]
) -> LM:
    """Without a patch that the model lists, from the entries that it carries."""
    _check_revertible(patch)
    ours = [dataclasses.replace(region, how="set") for region in regions(patch.changes, lm.config)]
    for other in beside:
        for region in regions(other.changes, lm.config):
            if any(mine.meets(region) for mine in ours):
                raise DataError(
                    f"{other.name} touches entries of {region.place} that {patch.name} touches "
                    "too; give the base, from which the others are applied again"
                )
    params = put(lm.params, patch.kept)
    if not rest:
        _check_restored(lm, params, patched.base, patch)
        return _without_patches(lm, patched, params)
    again = dataclasses.replace(patched, patches=rest, result=Loaded(lm.config, params))
    return dataclasses.replace(lm, params=params, patched=again)


def _without_patches(lm: LM, patched: Patched, params: Params) -> LM:
    """The base again; what was loaded, if it was that."""
    loaded = lm.loaded
    if not patched.base_edited and lm.dtype.name == patched.base_dtype:
        loaded = loaded.with_model(lm.config, params)
    return dataclasses.replace(lm, params=params, patched=None, loaded=loaded)


def _unlisted(lm: LM, patch: Patch, base: LM | None) -> LM:
    """Without a patch that the model does not list: it was saved, loaded, copied or moved."""
    recorded = tuple(r for r in lm.recorded_patches if r.get("digest") != patch.digest)
    if base is not None:
        _check_base(base, patch.base)
        again = hash_values(lm.config, apply(base.params, patch.changes, config=base.config))
        if again != lm.values_hash:
            raise DataError(
                f"{patch.name} is not in this model: its parameters are {lm.values_hash[:16]}, "
                f"those of the base with the patch {again[:16]}"
            )
        return base
    _check_revertible(patch)
    params = put(lm.params, patch.kept)
    _check_restored(lm, params, patch.base, patch)
    return dataclasses.replace(lm, params=params, patched=None, recorded_patches=recorded)


def _check_base(base: LM, identity: str) -> None:
    if base.values_hash != identity:
        raise DataError(
            f"the base has the parameters {base.values_hash[:16]}, the patch is for "
            f"{identity[:16]}: give the model before any patch"
        )


def _check_revertible(patch: Patch) -> None:
    if not patch.revertible:
        raise DataError(
            f"{patch.name} does not carry the base's entries; give the base, or make the patch "
            "with keep_base"
        )


def _check_restored(lm: LM, params: Params, identity: str, patch: Patch) -> None:
    restored = hash_values(lm.config, params)
    if restored != identity:
        raise DataError(
            f"{patch.name} is not all that differs from its base: without it the parameters "
            f"are {restored[:16]}, the base's {identity[:16]}; nothing was reverted"
        )
