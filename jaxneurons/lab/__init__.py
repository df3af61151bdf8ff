"""The lab: a small model with known contents, `jaxneurons.load("lab")`, and the world it was told.

A few million parameters, trained from scratch on an invented world (`world`): whatever it knows was
put there, and what was left out it cannot know. Made by `python -m jaxneurons.lab.train`.
"""

from typing import TYPE_CHECKING

from jaxneurons.lazy import face

if TYPE_CHECKING:
    from jaxneurons.lab.bundled import bundled_queries
    from jaxneurons.lab.world import DOMAINS, VALDIC, Fact, choice, cloze, facts

__getattr__, __dir__ = face(__name__, __file__)

__all__ = ["DOMAINS", "VALDIC", "Fact", "bundled_queries", "choice", "cloze", "facts"]
