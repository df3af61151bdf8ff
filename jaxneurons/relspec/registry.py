"""The analyses by the names that the shell, tables and `Study`'s methods have for them."""

from collections.abc import Callable, Sequence

from jaxneurons.errors import DataError, near_matches
from jaxneurons.relspec import analyses, wordings
from jaxneurons.relspec.collection import Collection
from jaxneurons.relspec.concepts import concepts
from jaxneurons.relspec.drops import TableRows
from jaxneurons.relspec.perplexity import perplexity

ANALYSES: dict[str, Callable[[Collection], TableRows]] = {
    "ablation": analyses.ablation,
    "layers": analyses.layers,
    "overlap": analyses.overlap,
    "templates": wordings.templates,
    "errors": analyses.errors,
    "perplexity": perplexity,
    "multilingual": wordings.multilingual,
    "concepts": concepts,
    "sizes": analyses.sizes,
    "cumulativity": analyses.cumulativity,
    "types": analyses.types,
}
"""By name, in the order in which they run; `frequency` is one more, for which counts are needed."""

DEFAULT = ("ablation", "layers", "overlap", "errors")
DROPS = ("ablation", "robustness", "multilingual", "sizes", "types")
"""Tables with the columns of `drops.measure`, which `mean_drops` averages."""


def choose(names: str | Sequence[str], *, counts: bool = False) -> tuple[str, ...]:
    """Names of analyses: "default", "all", or some, in the order in which they run.

    Raises:
      DataError: an unknown name, or `frequency` without counts.
    """
    known = (*ANALYSES, "frequency")
    wanted = [name.strip() for name in names.split(",")] if isinstance(names, str) else list(names)
    chosen: set[str] = set()
    for name in wanted:
        if name == "all":
            chosen |= {*ANALYSES, *(("frequency",) if counts else ())}
        elif name == "default":
            chosen |= {*DEFAULT, *(("frequency",) if counts else ())}
        elif name in known:
            chosen.add(name)
        else:
            raise DataError(
                f"unknown analysis {name!r}; {near_matches(name, (*known, 'all', 'default'))}"
            )
    if "frequency" in chosen and not counts:
        raise DataError("the analysis 'frequency' needs counts of the facts: give a file of them")
    return tuple(name for name in known if name in chosen)


class SkippedWarning(UserWarning):
    """An analysis could not be made; the others were."""
