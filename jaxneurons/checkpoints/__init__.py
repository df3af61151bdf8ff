"""Models in and out: load, save, describe, verify."""

from typing import TYPE_CHECKING

from jaxneurons.lazy import face

if TYPE_CHECKING:
    from jaxneurons.checkpoints.certificate import verify
    from jaxneurons.checkpoints.description import Description, describe
    from jaxneurons.checkpoints.fetch import fetch_model, fetch_smollm2
    from jaxneurons.checkpoints.loading import LM, load, locate_source
    from jaxneurons.checkpoints.saving import save

__getattr__, __dir__ = face(__name__, __file__)

__all__ = [
    "LM",
    "Description",
    "describe",
    "fetch_model",
    "fetch_smollm2",
    "load",
    "locate_source",
    "save",
    "verify",
]
