"""Controls: what an edit's changes would be if their direction, or their neurons, were random."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxneurons.edit.changes import Change, LowRank, Multipliers, Rows
from jaxneurons.model.config import ModelConfig
from jaxneurons.model.parameters import LAYERS, Params, get
from jaxneurons.neurons.sets import site_width
from jaxneurons.processes.sharing import fetch


def random_changes(
    params: Params, changes: Sequence[Change], rng: np.random.Generator, *, config: ModelConfig
) -> tuple[Change, ...]:
    """Changes of the same size in the same places, in random directions.

    A low-rank change keeps its left factor, what it answers to; what it writes is turned at random,
    which leaves its norm as it is, and that of each of its terms. Rows are moved as far, each in a
    random direction. Multipliers go to other neurons of the same layers.

    Args:
      params: the parameters before the changes.
      changes: of an edit.
      rng: draws the directions.
      config: the model's shape.
    """
    return tuple(_random_change(params, change, rng, config) for change in changes)


def turned_at_random(base: Params, params: Params, rng: np.random.Generator) -> Params:
    """Parameters whose difference from others is as large, in random directions.

    What each layer of each parameter writes is turned at random: a kernel's difference keeps its
    singular values and what it answers to, as a low-rank change does in `random_changes`.

    Args:
      base: the parameters before all edits.
      params: those after; only what lies in layers may differ.
      rng: draws the directions.
    """
    before = dict(jax.tree_util.tree_leaves_with_path(base[LAYERS]))

    def turn(path: Any, leaf: Any) -> Any:
        old = before[path]
        if leaf is old:
            return leaf
        kept, edited = fetch(old), fetch(leaf)
        for layer in range(leaf.shape[0]):
            unchanged = kept[layer].astype(np.float64)
            difference = edited[layer].astype(np.float64) - unchanged
            if not difference.any():
                continue
            rotation = _random_rotation(difference.shape[-1], difference.shape[-1], rng)
            turned = unchanged + difference @ rotation
            leaf = leaf.at[layer].set(jnp.asarray(turned, leaf.dtype))
        return leaf

    return {**params, LAYERS: jax.tree_util.tree_map_with_path(turn, params[LAYERS])}


def change_norm(params: Params, changes: Sequence[Change]) -> float | None:
    """Euclidean norm of what low-rank changes and rows add to kernels; None with multipliers."""
    total = 0.0
    for change in changes:
        if isinstance(change, Multipliers):
            return None
        if isinstance(change, LowRank):
            left, right = (np.asarray(x, np.float64) for x in (change.left, change.right))
            total += float(((left.T @ left) * (right @ right.T)).sum())
        else:
            total += float((_moved(params, change).astype(np.float64) ** 2).sum())
    return float(np.sqrt(max(total, 0.0)))


def _random_change(
    params: Params, change: Change, rng: np.random.Generator, config: ModelConfig
) -> Change:
    if isinstance(change, LowRank):
        right = np.asarray(change.right, np.float64)
        kept, mixed = np.linalg.qr(right.T)  # right = mixed.T @ kept.T
        turned = _random_rotation(len(kept), kept.shape[1], rng)
        return dataclasses.replace(change, right=jnp.asarray((turned @ mixed).T, jnp.float32))
    if isinstance(change, Rows):
        moved = _moved(params, change)
        drawn = rng.normal(size=moved.shape)
        drawn *= np.linalg.norm(moved, axis=1, keepdims=True) / np.linalg.norm(
            drawn, axis=1, keepdims=True
        )
        values = np.asarray(change.values, np.float64) - moved + drawn
        return dataclasses.replace(change, values=jnp.asarray(values, jnp.float32))
    width = site_width(config, change.site)
    layers, indices = np.asarray(change.layer), np.asarray(change.index)
    others = np.empty_like(indices)
    for layer in np.unique(layers):
        members = layers == layer
        free = np.setdiff1d(np.arange(width), indices[members])
        count = int(members.sum())
        # Where a layer has not enough others, all of it is drawn from.
        pool = free if len(free) >= count else np.arange(width)
        others[members] = rng.choice(pool, size=count, replace=False)
    return dataclasses.replace(change, index=jnp.asarray(others))


def _random_rotation(rows: int, columns: int, rng: np.random.Generator) -> np.ndarray:
    """Orthonormal columns, every direction alike, [rows, columns]."""
    turned, signs = np.linalg.qr(rng.normal(size=(rows, columns)))
    return turned * np.where(np.diagonal(signs) < 0, -1, 1)


def _moved(params: Params, change: Rows) -> np.ndarray:
    """How far each row is moved, [row, output]."""
    kernel = get(params, (LAYERS, *change.module.split("."), "kernel"))
    base = fetch(kernel[change.layer, np.asarray(change.index)]).astype(np.float64)
    return np.asarray(change.values, np.float64) - base
