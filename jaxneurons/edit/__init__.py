"""Editing by transformation of parameters: interventions, edits of facts, patches, measures."""

from typing import TYPE_CHECKING

from jaxneurons.lazy import face

if TYPE_CHECKING:
    from jaxneurons.edit.adapter import write_adapter
    from jaxneurons.edit.applying import Conflict, apply_patches, conflicts
    from jaxneurons.edit.changes import LowRank, Multipliers, Rows, apply
    from jaxneurons.edit.constants import force, with_biases
    from jaxneurons.edit.diff import diff
    from jaxneurons.edit.interventions import (
        ablate,
        add,
        interpolate,
        restore,
        scale,
        scale_at,
        set_rows,
        sparse_scales,
        swap,
    )
    from jaxneurons.edit.method import (
        MEMIT,
        ROME,
        AlphaEdit,
        Edit,
        FineTune,
        KnowledgeNeurons,
        LearnedNeurons,
        Optimisation,
        Trace,
    )
    from jaxneurons.edit.patch import Patch, make_patch
    from jaxneurons.edit.patch_file import read_patch, write_patch
    from jaxneurons.edit.requests import EditRequest
    from jaxneurons.edit.reverting import revert

__getattr__, __dir__ = face(__name__, __file__)

__all__ = [
    "MEMIT",
    "ROME",
    "AlphaEdit",
    "Conflict",
    "Edit",
    "EditRequest",
    "FineTune",
    "KnowledgeNeurons",
    "LearnedNeurons",
    "LowRank",
    "Multipliers",
    "Optimisation",
    "Patch",
    "Rows",
    "Trace",
    "ablate",
    "add",
    "apply",
    "apply_patches",
    "conflicts",
    "diff",
    "force",
    "interpolate",
    "make_patch",
    "read_patch",
    "restore",
    "revert",
    "scale",
    "scale_at",
    "set_rows",
    "sparse_scales",
    "swap",
    "with_biases",
    "write_adapter",
    "write_patch",
]
