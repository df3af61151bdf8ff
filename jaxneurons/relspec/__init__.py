"""Relation-specific neurons (arXiv 2502.17355): the neurons that serve a relation."""

from typing import TYPE_CHECKING

from jaxneurons.lazy import face

if TYPE_CHECKING:
    from jaxneurons.prompts.relations import (
        Relation,
        Triple,
        read_counts,
        read_relation,
        read_relations,
    )
    from jaxneurons.relspec.drops import mean_drops
    from jaxneurons.relspec.method import RelSpecConfig
    from jaxneurons.relspec.registry import SkippedWarning
    from jaxneurons.relspec.stages import bundled, compare
    from jaxneurons.relspec.study import Study

__getattr__, __dir__ = face(__name__, __file__)

__all__ = [
    "RelSpecConfig",
    "Relation",
    "SkippedWarning",
    "Study",
    "Triple",
    "bundled",
    "compare",
    "mean_drops",
    "read_counts",
    "read_relation",
    "read_relations",
]
