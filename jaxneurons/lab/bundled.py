"""Query files that ship with the package, by name."""

import os
from collections.abc import Callable
from importlib import resources

from jaxneurons.errors import ConfigError, DataError, close_matches
from jaxneurons.lab import world as lab
from jaxneurons.prompts.queries import Query, parse_queries, read_queries
from jaxneurons.storage.settings import as_path, check_argument


def facts() -> list[Query]:
    """Facts of the real world that a small model may know, as texts to be completed."""
    with resources.as_file(resources.files("jaxneurons.data") / "facts.jsonl") as path:
        return read_queries(path)


def lab_choice() -> list[Query]:
    """What the lab model was asked in training too, as multi-choice questions by domain."""
    return parse_queries("lab", lab.choice([fact for fact in lab.facts() if fact.asked]))


def lab_all() -> list[Query]:
    """All facts of the lab world as multi-choice questions, the never told among them."""
    return parse_queries("lab-all", lab.choice(lab.facts()))


def lab_cloze() -> list[Query]:
    """What the lab model was told, as texts to be completed, by domain."""
    return lab.cloze([fact for fact in lab.facts() if fact.told])


def lab_languages() -> list[Query]:
    """What it was asked in both languages, as multi-choice questions by language."""
    both = [fact for fact in lab.facts() if fact.asked and fact.translation]
    records = {}
    for language in ("en", lab.VALDIC):
        records.update(lab.choice(both, language, group="language"))
    return parse_queries("lab-languages", records)


BUNDLED: dict[str, Callable[[], list[Query]]] = {
    "lab": lab_choice,
    "lab-all": lab_all,
    "lab-cloze": lab_cloze,
    "lab-languages": lab_languages,
    "facts": facts,
}


def bundled_queries(source: str | os.PathLike[str]) -> list[Query]:
    """Queries by the name of a bundled file, or from a path.

    Raises:
      DataError: as `read_queries`; where there is no such file it has the names that there are.
      ConfigError: no name and no path.
    """
    check_argument("source", str | os.PathLike, source)
    name = os.fspath(source)
    if isinstance(source, str) and not name.strip():
        raise ConfigError(f"no query file is named; give a path, or one of {', '.join(BUNDLED)}")
    if name in BUNDLED:
        return BUNDLED[name]()
    path = as_path("source", source)
    if not os.path.lexists(path):
        near = close_matches(name, BUNDLED)
        raise DataError(
            f"{path}: no such query file, nor one that ships with the package "
            f"({', '.join(BUNDLED)}){f'; {near}' if near else ''}"
        )
    return read_queries(path)
