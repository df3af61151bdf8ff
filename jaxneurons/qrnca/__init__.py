"""QRNCA (arXiv 2406.10868): the neurons that the answer to a query depends on."""

from typing import TYPE_CHECKING

from jaxneurons.lazy import face

if TYPE_CHECKING:
    from jaxneurons.lab.bundled import bundled_queries
    from jaxneurons.prompts.queries import Query, parse_queries, read_queries
    from jaxneurons.qrnca.analyses import balanced
    from jaxneurons.qrnca.caveats import (
        CaveatWarning,
        LowOptionMassWarning,
        UnlikelyAnswerWarning,
        UnresolvedWarning,
    )
    from jaxneurons.qrnca.demonstration import Demo, demo, known
    from jaxneurons.qrnca.locating import locate
    from jaxneurons.qrnca.method import QRNCAConfig, QueryNeurons
    from jaxneurons.qrnca.opening import open_run
    from jaxneurons.qrnca.run import Run
    from jaxneurons.qrnca.stages import analyse, edit, evaluate, predict
    from jaxneurons.storage.tables import Tables

__getattr__, __dir__ = face(__name__, __file__)

__all__ = [
    "CaveatWarning",
    "Demo",
    "LowOptionMassWarning",
    "QRNCAConfig",
    "Query",
    "QueryNeurons",
    "Run",
    "Tables",
    "UnlikelyAnswerWarning",
    "UnresolvedWarning",
    "analyse",
    "balanced",
    "bundled_queries",
    "demo",
    "edit",
    "evaluate",
    "known",
    "locate",
    "open_run",
    "parse_queries",
    "predict",
    "read_queries",
]
