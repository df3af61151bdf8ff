"""QRNCA (arXiv 2406.10868): the neurons that the answer to a query depends on."""

from typing import TYPE_CHECKING

from jaxneurons.lazy import face

if TYPE_CHECKING:
    from jaxneurons.qrnca.analyses import (
        against_rows,
        count_rows,
        kind_rows,
        layer_rows,
        neuron_rows,
        overlap_rows,
        word_rows,
    )
    from jaxneurons.qrnca.caveats import (
        CaveatWarning,
        LowOptionMassWarning,
        UnlikelyAnswerWarning,
        UnresolvedWarning,
    )
    from jaxneurons.qrnca.effects import change_rows, editing_rows, evaluation_rows
    from jaxneurons.qrnca.locating import Located, locate
    from jaxneurons.qrnca.method import QRNCAConfig, QueryNeurons
    from jaxneurons.qrnca.prediction import predict
    from jaxneurons.qrnca.run import Run, make_run, open_run
    from jaxneurons.qrnca.trials import run_trials

__getattr__, __dir__ = face(__name__, __file__)

__all__ = [
    "CaveatWarning",
    "Located",
    "LowOptionMassWarning",
    "QRNCAConfig",
    "QueryNeurons",
    "Run",
    "UnlikelyAnswerWarning",
    "UnresolvedWarning",
    "against_rows",
    "change_rows",
    "count_rows",
    "editing_rows",
    "evaluation_rows",
    "kind_rows",
    "layer_rows",
    "locate",
    "make_run",
    "neuron_rows",
    "open_run",
    "overlap_rows",
    "predict",
    "run_trials",
    "word_rows",
]
