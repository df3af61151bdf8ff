"""The adaptive rule: panels of the path, refined only where they are not resolved yet.

A panel is a Gauss-Lobatto rule on a part of a layer's path. Its ends are nodes, so its integral,
summed over neurons, is checked against the difference of its end values (the completeness gap, for
every panel, for free). A panel that is not good enough gets the nodes of Kronrod's extension, which
keeps those it has; one that is not good enough with them is cut at its nodes, which leaves parts
whose ends are known: see `panels`. The end at alpha = 1 is the untouched model, one row for all
layers.

Layers whose path is smooth cost one panel. Where scaling the site turns the residual stream over (a
small embedding and a large first layer), the path is a curve through directions that bends near
alpha = 0; it is parametrised by t, in which it does not, and starts with several panels. So are the
paths of all layers where a norm follows the site: see `parametrisation`.

What waits after the first pass is evaluated together, whatever prompt and layer it is of (see
`pooled`), and every prompt decides on its own panels only, so that its result does not depend on
the prompts beside it.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from jaxneurons.engine.panels import (
    CAPACITY,
    INNER,
    Panels,
    Search,
    X,
    empty,
    evaluated,
    next_nodes,
    noise_of,
    refine,
)
from jaxneurons.engine.parametrisation import (
    EXTRA,
    NORMED_PANELS,
    FirstPanels,
    Parametrisation,
    first_panels,
    normed_panels,
    normed_site,
    parametrise,
)
from jaxneurons.engine.pooled import evaluate_pooled
from jaxneurons.engine.quadrature import Quadrature
from jaxneurons.engine.rows import Prefill, evaluate_with_untouched, grouped
from jaxneurons.model.config import ModelConfig
from jaxneurons.model.parameters import Params, params_dtype
from jaxneurons.neurons.sets import Site, site_width


def adaptive(
    params: Params,
    pre: Prefill,
    *,
    config: ModelConfig,
    site: Site,
    quadrature: Quadrature,
    rows: int,
) -> tuple[Array, Array, Array, Array]:
    """Panels of Gauss-Lobatto nodes, cut at their nodes where the estimated error is too large.

    Returns:
      Integrals [batch, answer, layer, width]; probability at alpha = 0, errors of the accepted
      panels added up, and nodes spent, each [batch, answer, layer].
    """
    count, width = config.num_layers, site_width(config, site)
    shape = pre.targets.shape
    path = parametrise(pre, site, config=config)
    each = 1 if normed_site(site, config) is None else NORMED_PANELS
    quadrature = dataclasses.replace(quadrature, max_nodes=each * quadrature.max_nodes)
    if each > 1:
        first, extra = normed_panels(path), 0
    else:
        extra = min(EXTRA, (quadrature.max_nodes - (INNER + 1)) * count // (INNER + 1))
        first = first_panels(path, extra=extra)
    panels = _first_pass(params, pre, path, first, config=config, site=site, each=each, rows=rows)
    valid, ablated = first.valid, panels.p[..., extra::each, 0]

    noise = noise_of(params_dtype(params))
    refine_all = jax.vmap(jax.vmap(functools.partial(refine, quadrature=quadrature, noise=noise)))
    nodes = _per_layer(panels.layer, valid, count).astype(jnp.int32)
    capacity = max(CAPACITY, 2 * count) if each > 1 else CAPACITY
    search = refine_all(empty(nodes, width, capacity), path, panels, valid, None)

    def one_round(search: Search) -> Search:
        """Whatever waits is evaluated: accepted, extended, or cut into parts, which wait."""
        panels, valid = search.waiting, jnp.arange(capacity) < search.size[..., None]
        alpha, _ = path.of_layers(panels.layer).alpha(next_nodes(panels))
        p, gradient = evaluate_pooled(
            params,
            pre,
            panels.layer,
            alpha,
            valid,
            config=config,
            site=site,
            rows=rows * shape[0] * shape[1],
        )
        search = search._replace(size=jnp.zeros_like(search.size))
        panels, extension = evaluated(panels, p, gradient)
        return refine_all(search, path, panels, valid, extension)

    search = jax.lax.while_loop(lambda search: jnp.any(search.size > 0), one_round, search)
    return search.total, ablated, search.error, search.nodes


def _per_layer(layer: Array, valid: Array, count: int) -> Array:
    """Nodes of first-pass panels [..., panel], added up by layer."""
    where = jax.nn.one_hot(layer, count)
    return (INNER + 1) * jnp.where(valid[..., None], where, 0).sum(-2)


def _first_pass(
    params: Params,
    pre: Prefill,
    path: Parametrisation,
    first: FirstPanels,
    *,
    config: ModelConfig,
    site: Site,
    each: int,
    rows: int,
) -> Panels:
    """The panels of the first pass, evaluated; the last `each` * layers are as many of each."""
    layer, _, left, right, following, last = first
    t = left[..., None] + (right - left)[..., None] * X[:-1]
    alpha, _ = path.of_layers(layer).alpha(t)
    p, gradient, untouched = _at_left_and_inner_nodes(
        params, pre, layer, alpha, config=config, site=site, each=each, rows=rows
    )
    # A panel's right end is the left end of its layer's next panel, or the untouched model.
    of_layer = jnp.take_along_axis(untouched, layer[..., None], axis=-2)
    of_next = jnp.take_along_axis(gradient[..., 0, :], following[..., None], axis=-2)
    p_right = jnp.where(
        last, pre.probability[..., None], jnp.take_along_axis(p[..., 0], following, axis=-1)
    )
    g_right = jnp.where(last[..., None], of_layer, of_next)
    return Panels(
        layer=layer,
        left=left,
        right=right,
        known=jnp.zeros(layer.shape, bool),
        p=jnp.concatenate([p, p_right[..., None]], axis=-1),
        gradient=jnp.concatenate([gradient, g_right[..., None, :]], axis=-2),
    )


def _at_left_and_inner_nodes(
    params: Params,
    pre: Prefill,
    layer: Array,
    alpha: Array,
    *,
    config: ModelConfig,
    site: Site,
    each: int,
    rows: int,
) -> tuple[Array, Array, Array]:
    """The panels of the first pass at alpha [batch, answer, panel, node], `rows` rows at a time.

    Returns:
      P [..., panel, node], dP/dscale [..., panel, node, width], and dP/dscale of the untouched
      model [batch, answer, layer, width].
    """
    shape, total = pre.targets.shape, layer.shape[-1]
    extra = total - each * config.num_layers
    # Nodes of every panel evaluated together; at least one.
    together = int(np.clip(rows // total, 1, INNER + 1))
    passes = -(-(INNER + 1) // together)
    alpha = jnp.pad(alpha, ((0, 0),) * 3 + ((0, passes * together - alpha.shape[-1]),))
    alpha = alpha.reshape(*shape, total, passes, together)

    def one_pass(alpha: Array) -> tuple[Array, Array, Array]:
        p, gradient, untouched = evaluate_with_untouched(
            params,
            pre,
            jnp.repeat(layer, together, axis=-1),
            alpha.reshape(*shape, total * together),
            config=config,
            site=site,
            entries=grouped(config.num_layers, each * together, extra * together),
        )
        p = p.reshape(*shape, total, together)
        return p, gradient.reshape(*shape, total, together, -1), untouched

    if passes == 1:
        return one_pass(alpha[..., 0, :])
    p, gradient, untouched = jax.lax.map(one_pass, jnp.moveaxis(alpha, -2, 0))
    p = jnp.moveaxis(p, 0, -2).reshape(*shape, total, -1)
    gradient = jnp.moveaxis(gradient, 0, -3).reshape(*shape, total, passes * together, -1)
    return p[..., : INNER + 1], gradient[..., : INNER + 1, :], untouched[0]
