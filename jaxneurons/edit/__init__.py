"""Editing by transformation of parameters: interventions, edits of facts, patches, measures."""

from typing import TYPE_CHECKING

from jaxneurons.lazy import face

if TYPE_CHECKING:
    from jaxneurons.edit.cases import MeasureSettings
    from jaxneurons.edit.changes import LowRank, Multipliers, Rows, apply
    from jaxneurons.edit.measures import measure
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
    "MeasureSettings",
    "Multipliers",
    "Optimisation",
    "Rows",
    "Trace",
    "apply",
    "measure",
]
