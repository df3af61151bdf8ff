"""What people pass to the functions of QRNCA, checked before anything runs."""

import os
from pathlib import Path

import numpy as np

from jaxneurons.checkpoints.loading import LM
from jaxneurons.errors import ConfigError


def check_whole(name: str, value: object, *, least: int) -> None:
    """Raise `ConfigError` unless this is an integer, Python's or NumPy's, of at least so much."""
    whole = isinstance(value, int | np.integer) and not isinstance(value, bool)
    if not whole or int(value) < least:  # type: ignore[call-overload]
        raise ConfigError(f"{name} must be an integer of at least {least}, got {value!r:.80}")


def check_model(lm: object) -> None:
    """Raise `ConfigError` unless this is a loaded model."""
    if not isinstance(lm, LM):
        raise ConfigError(f"lm is a model as jaxneurons.load gives it, got {lm!r:.80}")


def checked_directory(out: object) -> Path | None:
    """A directory to write to; raise `ConfigError` unless it is a path, or None."""
    if out is None:
        return None
    if not isinstance(out, str | os.PathLike):
        raise ConfigError(f"out is the path of a directory, or None, got {out!r:.80}")
    return Path(out)


def check_progress(progress: object) -> None:
    """Raise `ConfigError` unless this can be called, or is None."""
    if progress is not None and not callable(progress):
        raise ConfigError(f"progress is a function of (done, of), or None, got {progress!r:.80}")
