"""Changes as low-rank terms beside the kernels, so that many edits are measured on one copy.

Applied under `vmap`, a change of one layer's kernel makes a copy of the kernels of all layers for
each edit, and a decoder reads all of them for every token. As `left @ right` beside the kernel it
is a few vectors. In exact arithmetic the two are the same.
"""

from collections import Counter
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp

from jaxneurons.edit.changes import Change, LowRank, Rows, kernel_path
from jaxneurons.model.config import ModelConfig
from jaxneurons.model.parameters import Params, get, params_dtype
from jaxneurons.model.transformer import LowRankTerms

_WORTH = 4
"""Factors must be that much smaller than the kernels that they stand for."""
_Factors = tuple[jax.Array, jax.Array]


def low_rank_terms(
    params: Params, changes: Sequence[Change], *, config: ModelConfig
) -> LowRankTerms | None:
    """The changes as `forward` takes them, or None where `apply` serves better. Pure.

    Args:
      params: the parameters before the changes; float32, since an edit of narrower ones is what is
        left of it after rounding.
      changes: low-rank ones, and rows of kernels that nothing else changes.
      config: the model's shape.

    Returns:
      By module, factors [layer, input, rank] and [layer, rank, output], zero where a layer is not
      changed; None for other dtypes, other kinds of changes, and ranks that save no memory.
    """
    if not changes or params_dtype(params) != jnp.float32:
        return None
    kept = [change for change in changes if isinstance(change, LowRank | Rows)]
    uses = Counter((change.module, change.layer) for change in kept)
    if config.experts and any(change.module.startswith("ffn.") for change in kept):
        return None
    shared = any(isinstance(c, Rows) and uses[c.module, c.layer] > 1 for c in kept)
    if shared or len(kept) < len(changes):
        return None
    factors: dict[str, dict[int, list[_Factors]]] = {}
    for change in kept:
        layers = factors.setdefault(change.module, {})
        layers.setdefault(change.layer, []).append(_factors(params, change))
    terms = {}
    for module, layers in factors.items():
        stacked = _stacked(layers, config.num_layers)
        if _WORTH * sum(factor.size for factor in stacked) > get(params, kernel_path(module)).size:
            return None
        terms[module] = stacked
    return terms


def stacked_terms(terms: Sequence[LowRankTerms]) -> LowRankTerms:
    """Terms of several edits of the same modules on a new first axis, of one rank.

    The rank is a power of two, for few shapes.
    """
    stacked = {}
    for module in terms[0]:
        most = max(of_edit[module][0].shape[-1] for of_edit in terms)
        rank = 1 << (most - 1).bit_length()
        left, right = [], []
        for of_edit in terms:
            more = rank - of_edit[module][0].shape[-1]
            left.append(jnp.pad(of_edit[module][0], ((0, 0), (0, 0), (0, more))))
            right.append(jnp.pad(of_edit[module][1], ((0, 0), (0, more), (0, 0))))
        stacked[module] = (jnp.stack(left), jnp.stack(right))
    return stacked


def _factors(params: Params, change: LowRank | Rows) -> _Factors:
    if isinstance(change, LowRank):
        return jnp.asarray(change.left, jnp.float32), jnp.asarray(change.right, jnp.float32)
    kernel = get(params, kernel_path(change.module))
    index = jnp.asarray(change.index)
    left = jax.nn.one_hot(index, kernel.shape[1], dtype=jnp.float32, axis=0)
    return left, change.values - kernel[change.layer, index]


def _stacked(layers: Mapping[int, Sequence[_Factors]], num_layers: int) -> _Factors:
    """Factors of some layers, joined in each and filled up with zeros to one rank."""
    joined = {
        layer: (
            jnp.concatenate([left for left, _ in factors], axis=1),
            jnp.concatenate([right for _, right in factors], axis=0),
        )
        for layer, factors in layers.items()
    }
    left, right = next(iter(joined.values()))
    rank = max(left.shape[1] for left, _ in joined.values())
    all_left = jnp.zeros((num_layers, left.shape[0], rank), jnp.float32)
    all_right = jnp.zeros((num_layers, rank, right.shape[1]), jnp.float32)
    for layer, (left, right) in joined.items():
        all_left = all_left.at[layer, :, : left.shape[1]].set(left)
        all_right = all_right.at[layer, : right.shape[0]].set(right)
    return all_left, all_right
