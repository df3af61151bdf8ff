"""What parameters were that an edit was computed on: hashes of the arrays that it changes."""

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

import jax

from jaxneurons.checkpoints.provenance import hash_array
from jaxneurons.edit.changes import Change
from jaxneurons.edit.entries import regions
from jaxneurons.model.config import ModelConfig
from jaxneurons.model.parameters import LAYERS, Params, get

_THREADS = 4  # that hash arrays: each holds one layer's
Place = tuple[str, int]
"""An array below `layers`, joined by dots, and a layer."""


def places(changes: Sequence[Change], *, config: ModelConfig) -> list[Place]:
    """The arrays that changes touch, each once, in order."""
    return sorted({(region.array, region.layer) for region in regions(changes, config)})


def fingerprint(params: Params, where: Sequence[Place]) -> dict[Place, str]:
    """SHA-256 of some layers' arrays, of their values as float32.

    Args:
      params: the parameters.
      where: which arrays.

    Returns:
      By array; those that lie on other processes' devices too are left out.
    """
    leaves = {array: get(params, (LAYERS, *array.split("."))) for array, _ in where}
    here = [place for place in where if _addressable(leaves[place[0]])]
    with ThreadPoolExecutor(_THREADS) as pool:
        hashes = pool.map(lambda place: hash_array(leaves[place[0]], place[1]), here)
        return dict(zip(here, hashes, strict=True))


def differing(params: Params, known: Mapping[Place, str]) -> list[Place]:
    """The arrays whose values are not those of a fingerprint."""
    return [at for at, now in fingerprint(params, list(known)).items() if now != known[at]]


def _addressable(leaf: object) -> bool:
    return not isinstance(leaf, jax.Array) or leaf.is_fully_addressable
