"""Patches taken out of a model that was saved with them: its files say which they are.

A record has each patch's digest and base, in the order in which they were applied, and not what it
changes: the patches themselves are given. What comes out is held against hashes of all parameters.
"""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxneurons.checkpoints.loading import LM
from jaxneurons.checkpoints.provenance import Loaded, hash_values
from jaxneurons.edit.applying import apply_patches
from jaxneurons.edit.changes import Change, apply
from jaxneurons.edit.entries import put
from jaxneurons.edit.patch import Patch, recorded_name
from jaxneurons.errors import DataError
from jaxneurons.model.parameters import Params

_NARROW = ("bfloat16", "float16")
"""Dtypes that a model may have been edited in that is loaded in a wider one now."""


def revert_recorded(
    lm: LM, patches: Sequence[Patch], base: LM | None, others: Sequence[Patch]
) -> LM:
    """The model without patches that stand in its record; see `reverting.revert`.

    Where there is no record (the model was merged elsewhere), the patches given are all it has.

    Raises:
      DataError: as `revert`.
    """
    recorded = list(lm.patch_facts().get("patches", ()))
    records = recorded or [patch.summary() for patch in (*others, *patches)]
    at_hand: dict[str, Patch] = {patch.digest: patch for patch in (*others, *patches)}
    _check_listed(lm, records, [*patches, *others])
    if lm.patched is not None:
        listed = (patch for patch in lm.patched.patches if isinstance(patch, Patch))
        at_hand = {**{patch.digest: patch for patch in listed}, **at_hand}
    out = {patch.digest for patch in patches}
    if base is None and (shorter := _last_ones(lm, records, patches)) is not None:
        return shorter
    start = _start(base, records, out) if base is not None and recorded else 0
    missing = [record for record in records[start:] if _digest(record) not in at_hand]
    if missing:
        raise _incomplete(lm, patches, missing, base)
    order = [at_hand[_digest(record)] for record in records[start:]]
    if base is None:
        base = _restored(lm, order)
    return _rest_on_base(lm, base, order, out)


def _digest(record: Mapping[str, Any]) -> str:
    return str(record.get("digest"))


def _check_listed(lm: LM, records: Sequence[Mapping[str, Any]], given: Sequence[Patch]) -> None:
    known = {_digest(record) for record in records}
    for patch in given:
        if patch.digest not in known:
            names = ", ".join(recorded_name(record) for record in records)
            raise DataError(f"{patch.name} is not in this model: {lm.source} holds {names}")


def _last_ones(lm: LM, records: Sequence[Mapping[str, Any]], patches: Sequence[Patch]) -> LM | None:
    """Without the last patches of a record, if they carry the entries of what was before them."""
    by_digest = {patch.digest: patch for patch in patches}
    before, last = records[: -len(patches)], records[-len(patches) :]
    if {_digest(record) for record in last} != by_digest.keys():
        return None
    order = [by_digest[_digest(record)] for record in last]
    if not all(patch.revertible for patch in order):
        return None
    params = _put_back(lm.params, order)
    if hash_values(lm.config, params) != order[0].base:
        return None
    return _with_record(lm, params, before)


def _put_back(params: Params, order: Sequence[Patch]) -> Params:
    for patch in reversed(order):
        params = put(params, patch.kept)
    return params


def _with_record(lm: LM, params: Params, records: Sequence[Mapping[str, Any]]) -> LM:
    return dataclasses.replace(lm, params=params, patched=None, recorded_patches=tuple(records))


def _start(base: LM, records: Sequence[Mapping[str, Any]], out: set[str]) -> int:
    """How many of the recorded patches are in the base already, as its own record says."""
    in_base = [_digest(record) for record in base.patch_facts().get("patches", ())]
    digests = [_digest(record) for record in records]
    if in_base != digests[: len(in_base)]:
        raise DataError(
            f"the base ({base.source}) holds {len(in_base)} patches that the model does not hold "
            "first: give the model before any patch"
        )
    for record in records[: len(in_base)]:
        if _digest(record) in out:
            raise DataError(
                f"{recorded_name(record)} is in the base ({base.source}) too: give the model "
                "before it"
            )
    return len(in_base)


def _incomplete(
    lm: LM, patches: Sequence[Patch], missing: Sequence[Mapping[str, Any]], base: LM | None
) -> DataError:
    needed = ", ".join(f"{recorded_name(record)}, digest {_digest(record)}" for record in missing)
    names = " and ".join(patch.name for patch in patches)
    also = "" if base is not None else "; and the base (base=, --base SRC), if one carries none"
    return DataError(
        f"{lm.source} holds other patches than {names}, which are needed too: {needed}. Give them "
        "to be reverted as well, or as those that stay (others=, --keep PATCH)" + also
    )


def _restored(lm: LM, order: Sequence[Patch]) -> LM:
    """The base, of the entries that all patches carry."""
    for patch in order:
        check_revertible(patch)
    params = _put_back(lm.params, order)
    restored = hash_values(lm.config, params)
    if restored != order[0].base:
        names = " and ".join(patch.name for patch in order)
        are = "are" if len(order) > 1 else "is"
        raise DataError(
            f"{names} {are} not all that differs from the base: without them the parameters are "
            f"{restored[:16]}, the base's {order[0].base[:16]}; nothing was reverted"
        )
    return _with_record(lm, params, ())


def _rest_on_base(lm: LM, base: LM, order: Sequence[Patch], out: set[str]) -> LM:
    """The base with those patches that stay, once all of them are known to make the model."""
    check_base(base, order[0].base)
    first = next(patch for patch in order if patch.digest in out)
    rest = [patch for patch in order if patch.digest not in out]
    for later in order[order.index(first) :]:
        if later.digest not in out and later.base != base.values_hash:
            raise made_on_top(later, first)
    seen = None
    for narrowed in _in_dtypes(base):
        for params in _applied(narrowed, order):
            made = hash_values(lm.config, params)
            if made == lm.values_hash:
                return _as_wide(apply_patches(narrowed, rest, allow_conflicts=True), base, rest)
            seen = seen or made
    names = " and ".join(patch.name for patch in order)
    them = "patches" if len(order) > 1 else "patch"
    raise DataError(
        f"{names}: what they make of the base is not in this model: its parameters are "
        f"{lm.values_hash[:16]}, those of the base with the {them} {str(seen)[:16]}"
    )


def _in_dtypes(base: LM) -> Iterator[LM]:
    """The base, and the base in each narrower dtype that holds its values."""
    yield base
    for dtype in _NARROW:
        if jnp.dtype(dtype).itemsize < base.dtype.itemsize:
            narrowed = _cast(base, dtype)
            if narrowed.values_hash == base.values_hash:
                yield narrowed


def _cast(lm: LM, dtype: Any) -> LM:
    return dataclasses.replace(lm, params=jax.tree.map(lambda x: x.astype(dtype), lm.params))


def _as_wide(lm: LM, base: LM, rest: Sequence[Patch]) -> LM:
    """What was made in a narrower dtype in the base's; the base itself where nothing was made."""
    if not rest:
        return base
    if lm.dtype == base.dtype or lm.patched is None:
        return lm
    wide = _cast(lm, base.dtype)
    result = Loaded(wide.config, wide.params)
    return dataclasses.replace(wide, patched=dataclasses.replace(lm.patched, result=result))


def _applied(base: LM, order: Sequence[Patch]) -> Iterator[Params]:
    """The base's parameters with patches: rounded once for all of one base, or after each."""
    for each in (False, True) if len(order) > 1 else (False,):
        params, pending = base.params, list[Change]()
        for patch in order:
            if each or patch.base != base.values_hash:
                params, pending = apply(params, pending, config=base.config), []
            pending += patch.changes
        yield apply(params, pending, config=base.config)


def check_base(base: LM, identity: str) -> None:
    """Raise unless a model's parameters have this hash."""
    if base.values_hash != identity:
        raise DataError(
            f"the base has the parameters {base.values_hash[:16]}, the patch is for "
            f"{identity[:16]}: give the model before any patch"
        )


def check_revertible(patch: Patch) -> None:
    """Raise unless a patch carries the base's entries."""
    if not patch.revertible:
        raise DataError(
            f"{patch.name} does not carry the base's entries: give the base (base=, --base SRC); "
            "a patch carries them that was made with keep_base"
        )


def made_on_top(later: Patch, patch: Patch) -> DataError:
    """The error where a patch is to stay that needs one which is to go."""
    return DataError(f"{later.name} was made on top of {patch.name}: revert it first, or both")
