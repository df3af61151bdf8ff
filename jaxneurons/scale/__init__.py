"""Whether a job fits on a machine or pod, how it would run there, and what the compiler says."""

from typing import TYPE_CHECKING

from jaxneurons.lazy import face

if TYPE_CHECKING:
    from jaxneurons.processes.joining import join
    from jaxneurons.processes.merging import merge_runs
    from jaxneurons.processes.team import Processes, current
    from jaxneurons.scale.ahead_of_time import Compiled, compile_ahead
    from jaxneurons.scale.placement import Placement
    from jaxneurons.scale.planning import Plan, plan
    from jaxneurons.scale.prediction import Prediction
    from jaxneurons.scale.programs import Work
    from jaxneurons.scale.shapes import Shape, read_shape
    from jaxneurons.scale.targets import Target, parse_target

__getattr__, __dir__ = face(__name__, __file__)

__all__ = [
    "Compiled",
    "Placement",
    "Plan",
    "Prediction",
    "Processes",
    "Shape",
    "Target",
    "Work",
    "compile_ahead",
    "current",
    "join",
    "merge_runs",
    "parse_target",
    "plan",
    "read_shape",
]
