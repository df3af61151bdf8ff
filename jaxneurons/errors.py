"""Errors that a user can act on: what was wrong, where, and the way out."""

import difflib
from collections.abc import Iterable


class JaxneuronsError(Exception):
    """Base of every error that is the input's fault; the CLI prints it in one line and exits 1."""


class SourceError(JaxneuronsError):
    """A model source (directory, file, hub id, name) that cannot be loaded as asked."""


class ConfigError(JaxneuronsError):
    """A model or method configuration that is wrong or that this library does not handle."""


class DataError(JaxneuronsError):
    """Queries, facts or results on disk that cannot be used as they are."""


def near_matches(word: str, known: Iterable[str]) -> str:
    """Say which of `known` the user may have meant: a clause to end an error message with."""
    names = list(known)
    close = difflib.get_close_matches(word, names, n=3, cutoff=0.5)
    if close:
        return f"did you mean {' or '.join(map(repr, close))}?"
    return "known: " + ", ".join(map(repr, names))
