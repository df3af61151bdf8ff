"""Errors that a user can act on: what was wrong, where, and the way out."""

import difflib
import errno
import os
from collections.abc import Iterable


class JaxneuronsError(Exception):
    """Base of every error that is the input's fault; the CLI prints it in one line and exits 1."""


class SourceError(JaxneuronsError):
    """A model source (directory, file, hub id, name) that cannot be loaded as asked."""


class ConfigError(JaxneuronsError):
    """A model or method configuration that is wrong or that this library does not handle."""


class DataError(JaxneuronsError):
    """Queries, facts or results on disk that cannot be used as they are."""


class WriteError(DataError):
    """A file that the system refuses to write; `reason` says why, and the way out if room is it."""

    def __init__(self, path: str | os.PathLike[str], error: BaseException):
        self.reason = _reason(error)
        super().__init__(f"{os.fspath(path)}: cannot be written: {self.reason}")


_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_REFUSALS = (*_FULL, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO, errno.ENOTDIR)


def _reason(error: BaseException) -> str:
    """The system's own words, without the paths that a library wraps them in."""
    text = " ".join(str(error).split())
    code = error.errno if isinstance(error, OSError) else None
    if code is None:
        code = next((code for code in _REFUSALS if os.strerror(code) in text), None)
    if code is None:
        return text[:200] or type(error).__name__
    hint = "; make room, and the same command goes on" if code in _FULL else ""
    return os.strerror(code) + hint


def close_matches(word: str, known: Iterable[str], *, most: int = 3) -> str:
    """Say which of `known` the user may have meant: a clause of a message; "" if none is near."""
    close = difflib.get_close_matches(word, list(known), n=most, cutoff=0.5)
    return f"did you mean {' or '.join(map(repr, close))}?" if close else ""


def near_matches(word: str, known: Iterable[str]) -> str:
    """Say which of `known` the user may have meant, or all: a clause to end a message with."""
    names = list(known)
    return close_matches(word, names) or "known: " + ", ".join(map(repr, names))


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out: Python's, or XLA's on any device."""
    if isinstance(error, MemoryError):
        return True
    message = str(error).lstrip()
    return isinstance(error, RuntimeError) and message.startswith("RESOURCE_EXHAUSTED")
