"""Rows of all prompts of a batch from one pool: few, wide passes whatever each prompt needs.

What the adaptive rule refines differs from prompt to prompt: this one needs six panels of layer 0,
that one none. Panels of the whole batch are sorted by layer and evaluated some at a time; a pass
runs the layers from its lowest panel's on. Which pass a panel falls into changes rounding only.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from jaxneurons.engine.rows import Prefill, evaluate
from jaxneurons.model.config import ModelConfig
from jaxneurons.model.parameters import Params
from jaxneurons.neurons.sets import Site, site_width

FEWEST, MOST = 5, 32
"""Panels of a pass: two for each (prompt, answer), within these bounds and the row budget."""

STARTS = (0.0, 0.4, 0.8)
"""Depths from which a pass can run on: each is a program of its own, all of them in one."""


def evaluate_pooled(
    params: Params,
    pre: Prefill,
    layer: Int[Array, "batch answer panel"],
    alpha: Float[Array, "batch answer panel node"],
    valid: Bool[Array, "batch answer panel"],
    *,
    config: ModelConfig,
    site: Site,
    rows: int,
) -> tuple[Float[Array, "batch answer panel node"], Float[Array, "batch answer panel node width"]]:
    """P and dP/dscale at the nodes of panels, wherever in the batch they are.

    Args:
      params: the model's parameters.
      pre: the prompts, run once.
      layer: of each panel.
      alpha: of its nodes.
      valid: which panels there are; the others cost nothing and give zeros.
      config: the model's shape.
      site: which activation is scaled.
      rows: most rows of a pass.
    """
    *shape, nodes = alpha.shape
    batch, answers, capacity = shape
    total, queries = batch * answers * capacity, batch * answers
    size = int(np.clip(2 * queries, FEWEST, MOST))
    size = min(size, total, max(1, rows // nodes))
    layer, alpha, valid = layer.reshape(-1), alpha.reshape(-1, nodes), valid.reshape(-1)
    order = jnp.argsort(jnp.where(valid, layer, config.num_layers))
    order = jnp.pad(order, (0, size - 1))
    count = valid.sum()

    def one_pass(state: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        start, p, gradient = state
        panel = jax.lax.dynamic_slice_in_dim(order, start, size)
        real = start + jnp.arange(size) < count
        # A place that is empty must name some layer, and no lower one than the others do.
        layer_of = jnp.where(real, layer[panel], config.num_layers - 1)
        found_p, found_gradient = _evaluate(
            params, pre, panel // capacity, layer_of, alpha[panel], config=config, site=site
        )
        place = jnp.where(real, panel, total)
        p = p.at[place].set(found_p, mode="drop")
        return start + size, p, gradient.at[place].set(found_gradient, mode="drop")

    width = site_width(config, site)
    none = jnp.zeros((total, nodes)), jnp.zeros((total, nodes, width))
    _, p, gradient = jax.lax.while_loop(
        lambda state: state[0] < count, one_pass, (jnp.zeros_like(count), *none)
    )
    return p.reshape(*shape, nodes), gradient.reshape(*shape, nodes, width)


def _evaluate(
    params: Params,
    pre: Prefill,
    query: Int[Array, " panel"],
    layer: Int[Array, " panel"],
    alpha: Float[Array, "panel node"],
    *,
    config: ModelConfig,
    site: Site,
) -> tuple[Float[Array, "panel node"], Float[Array, "panel node width"]]:
    """P and dP/dscale of panels of the given (prompt, answer), counted prompt by prompt."""
    batch, answers = pre.targets.shape
    residual = pre.residual.reshape(config.num_layers, batch * answers, -1)[:, query]
    # Panels of one prompt share its cache, as its answer positions do; else each reads its own.
    one = batch == 1
    picked = pre._replace(
        residual=residual[:, None] if one else residual[:, :, None],
        **{
            name: getattr(pre, name).reshape(-1)[query].reshape((1, -1) if one else (-1, 1))
            for name in ("positions", "targets", "probability")
        },
    )
    shape, nodes = picked.targets.shape, alpha.shape[-1]
    rows = jnp.broadcast_to(layer.reshape(*shape, 1), (*shape, nodes)), alpha.reshape(*shape, -1)

    def start_at(first: int) -> Callable[[], tuple[Array, Array]]:
        return lambda: evaluate(
            params,
            picked,
            *rows,
            config=config,
            site=site,
            entries=((first, nodes),),
            owner=None if one else query // answers,
        )

    starts = np.unique([int(part * config.num_layers) for part in STARTS])
    which = (starts <= layer.min()).sum() - 1
    p, gradient = jax.lax.switch(which, [start_at(first) for first in starts.tolist()])
    return p.reshape(alpha.shape), gradient.reshape(*alpha.shape, -1)
