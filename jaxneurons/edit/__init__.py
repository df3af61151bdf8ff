"""Editing by transformation of parameters: interventions, edits of facts, patches, measures."""

from typing import TYPE_CHECKING

from jaxneurons.lazy import face

if TYPE_CHECKING:
    from jaxneurons.edit.changes import LowRank, Multipliers, Rows, apply
    from jaxneurons.edit.editing import edit, edit_each, layers_of, values_of
    from jaxneurons.edit.encoding import EncodedRequest, encode_prefixed, encode_request
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
    from jaxneurons.edit.values import Values

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
    "Multipliers",
    "Optimisation",
    "Rows",
    "Trace",
    "Values",
    "apply",
    "check_requests",
    "edit",
    "edit_each",
    "encode_prefixed",
    "encode_request",
    "generate_prefixes",
    "layers_of",
    "read_known",
    "read_requests",
    "values_of",
]
