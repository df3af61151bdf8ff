"""Editing by transformation of parameters: interventions, edits of facts, patches, measures."""

from typing import TYPE_CHECKING

from jaxneurons.lazy import face

if TYPE_CHECKING:
    from jaxneurons.edit.cases import MeasureSettings
    from jaxneurons.edit.changes import LowRank, Multipliers, Rows, apply
    from jaxneurons.edit.encoding import EncodedRequest, encode_prefixed, encode_request
    from jaxneurons.edit.evaluation import evaluate
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
    from jaxneurons.edit.prefixes import generate_prefixes
    from jaxneurons.edit.requests import (
        EditRequest,
        KnownFact,
        check_requests,
        read_known,
        read_requests,
    )
    from jaxneurons.edit.sequential import evaluate_sequential

__getattr__, __dir__ = face(__name__, __file__)

__all__ = [
    "MEMIT",
    "ROME",
    "AlphaEdit",
    "Edit",
    "EditRequest",
    "EncodedRequest",
    "FineTune",
    "KnowledgeNeurons",
    "KnownFact",
    "LearnedNeurons",
    "LowRank",
    "MeasureSettings",
    "Multipliers",
    "Optimisation",
    "Rows",
    "Trace",
    "apply",
    "check_requests",
    "encode_prefixed",
    "encode_request",
    "evaluate",
    "evaluate_sequential",
    "generate_prefixes",
    "measure",
    "read_known",
    "read_requests",
]
