"""Editing by transformation of parameters: interventions, edits of facts, patches, measures."""

from typing import TYPE_CHECKING

from jaxneurons.lazy import face

if TYPE_CHECKING:
    from jaxneurons.edit.changes import LowRank, Multipliers, Rows, apply
    from jaxneurons.edit.constants import force, with_biases
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
    from jaxneurons.edit.requests import EditRequest

__getattr__, __dir__ = face(__name__, __file__)

__all__ = [
    "MEMIT",
    "ROME",
    "AlphaEdit",
    "Edit",
    "EditRequest",
    "FineTune",
    "KnowledgeNeurons",
    "LearnedNeurons",
    "LowRank",
    "Multipliers",
    "Optimisation",
    "Rows",
    "Trace",
    "ablate",
    "add",
    "apply",
    "force",
    "interpolate",
    "restore",
    "scale",
    "scale_at",
    "set_rows",
    "sparse_scales",
    "swap",
    "with_biases",
]
