"""A model between two edits of many, and its way to disk and back: what was changed is kept."""

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxneurons.model.parameters import LAYERS, Params
from jaxneurons.processes.sharing import fetch
from jaxneurons.storage.tables import Row


@dataclasses.dataclass(frozen=True, eq=False)
class EditedModel:
    """A model after some edits.

    Attributes:
      params: edited.
      done: requests that were edited or refused.
      edited: which were edited.
      refused: the others, with the reason.
      keys: of the edits so far, as `Edit.keys`.
    """

    params: Params
    done: int
    edited: tuple[int, ...]
    refused: tuple[Row, ...]
    keys: Mapping[int, np.ndarray]


def to_arrays(state: EditedModel, base: Params) -> dict[str, np.ndarray]:
    """What differs from the unedited model `base`, the keys, and which requests are done."""
    about = {"done": state.done, "edited": state.edited, "refused": list(state.refused)}
    arrays = {"about": np.array(json.dumps(about))}
    for name, layer, values in _changed(base, state.params):
        arrays[f"{layer}:{name}"] = np.ascontiguousarray(values).view(np.uint8)
    return arrays | {f"keys:{layer}": np.asarray(keys) for layer, keys in state.keys.items()}


def done_in(arrays: Mapping[str, np.ndarray]) -> int:
    """How many requests are done in a state that was kept."""
    return json.loads(str(arrays["about"]))["done"]


def from_arrays(arrays: Mapping[str, np.ndarray], base: Params) -> EditedModel:
    """The state that `to_arrays` wrote."""
    about = json.loads(str(arrays["about"]))
    keys = {int(n[5:]): values for n, values in arrays.items() if n.startswith("keys:")}
    return EditedModel(
        _restored(base, arrays),
        about["done"],
        tuple(about["edited"]),
        tuple(about["refused"]),
        keys,
    )


def _changed(base: Params, params: Params) -> list[tuple[str, int, np.ndarray]]:
    """Layers of parameters that differ: name of the leaf, layer, values."""
    changed = []
    before = dict(jax.tree_util.tree_leaves_with_path(base[LAYERS]))
    for path, leaf in jax.tree_util.tree_leaves_with_path(params[LAYERS]):
        if leaf is before[path]:
            continue
        old, new = fetch(before[path]), fetch(leaf)
        changed += [
            (jax.tree_util.keystr(path), layer, new[layer])
            for layer in range(len(new))
            if old[layer].tobytes() != new[layer].tobytes()
        ]
    return changed


def _restored(base: Params, arrays: Mapping[str, np.ndarray]) -> Params:
    """The parameters with the layers that `_changed` gave."""
    by_name: dict[str, list[tuple[int, np.ndarray]]] = {}
    for name, values in arrays.items():
        layer, _, leaf = name.partition(":")
        if layer.isdecimal():
            by_name.setdefault(leaf, []).append((int(layer), values))

    def restore(path: Any, leaf: Any) -> Any:
        for layer, values in by_name.get(jax.tree_util.keystr(path), ()):
            values = values.view(leaf.dtype).reshape(leaf.shape[1:])
            leaf = leaf.at[layer].set(jnp.asarray(values))
        return leaf

    return {**base, LAYERS: jax.tree_util.tree_map_with_path(restore, base[LAYERS])}
