"""Several processes, on one host or many, that share a job: joined once, watched, parts shared."""

from typing import TYPE_CHECKING

from jaxneurons.lazy import face

if TYPE_CHECKING:
    from jaxneurons.processes.joining import join
    from jaxneurons.processes.merging import merge_runs
    from jaxneurons.processes.team import Processes, current

__getattr__, __dir__ = face(__name__, __file__)

__all__ = ["Processes", "current", "join", "merge_runs"]
