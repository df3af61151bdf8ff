"""How the path of each layer is parametrised, and where the adaptive rule's first panels lie on it.

Most paths are short and have one panel in alpha. Where scaling a site turns the residual stream
over, the path is a curve through directions that bends near alpha = 0: it is parametrised by t, in
which it does not, and starts with several panels.

Where a norm divides what is scaled (post norms; norms of queries and keys), alpha drops out of it
but where it is so small that the norm's epsilon counts: the sum over neurons has changed by alpha
of about 0.001, while what single neurons turn goes on as log alpha. Such a path is parametrised by
t in which both are smooth, and starts with a few panels, shorter ones at small alpha.
"""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from jaxneurons.engine.rows import Prefill, normed_sites
from jaxneurons.model.config import ModelConfig
from jaxneurons.neurons.sets import Site

EXTRA = 7
"""Panels of the first pass beyond one for each layer: they go to the long ones."""

LONG = 1.0
"""Length (see `Parametrisation`) from which a layer's path is parametrised by t."""

STRETCH = 0.35
"""Length of a long path that one panel of the first pass covers."""

ENDS = (1.0, 2.2)
"""Lengths at which first panels of a path end that a norm bends; the last ends at alpha = 1."""

NORMED_PANELS = len(ENDS) + 1
"""Panels of the first pass of such a path."""


class Parametrisation(NamedTuple):
    """alpha as a function of t in [0, 1], for each (batch, answer, layer).

    With the site scaled by alpha the layer adds alpha * b to a stream a. What the layers above see,
    its direction and its size against what they add themselves, changes with |a + alpha b| as the
    unit of length: dt ~ dalpha / |a + alpha b|, so alpha(t) = (d sinh(start + t length) - ab) / bb
    with d^2 = aa bb - ab^2. Short paths (length below `LONG`) keep alpha = t.

    Where a norm follows, alpha * v leaves it as alpha v / sqrt(alpha^2 vv + eps), vv the mean
    square of v: with alpha = c sinh(t length), c^2 = eps / vv, that is tanh(t length) v / sqrt(vv),
    and turning v costs the same at every t.
    """

    start: Array
    length: Array
    scale: Array  # d / bb
    shift: Array  # ab / bb

    def alpha(self, t: Array) -> tuple[Array, Array]:
        """alpha and dalpha/dt at t; the two broadcast against each other."""
        angle = self.start + t * self.length
        bent = self.length > LONG
        alpha = jnp.clip(self.scale * jnp.sinh(angle) - self.shift, 0, 1)
        alpha = jnp.where(bent & (t > 0), alpha, t)
        slope = jnp.where(bent, self.scale * jnp.cosh(angle) * self.length, 1.0)
        return alpha, slope

    def of_layers(self, layer: Array) -> "Parametrisation":
        """Those of the layers of panels, with an axis for their nodes: [..., panel, 1]."""
        by_panel = (jnp.take_along_axis(a, layer, axis=-1)[..., None] for a in self)
        return Parametrisation(*by_panel)


def normed_site(site: Site, config: ModelConfig) -> str | None:
    """The site that a norm divides and that grows with the scale of `site`; None: there is none."""
    grows = "down" if site in ("up", "gate", "act") else site
    return grows if grows in normed_sites(config) else None


def panels_at_first(config: ModelConfig, site: Site) -> int:
    """Panels of the first pass, of all layers together."""
    if normed_site(site, config) is None:
        return config.num_layers + EXTRA
    return config.num_layers * NORMED_PANELS


def parametrise(pre: Prefill, site: Site, *, config: ModelConfig) -> Parametrisation:
    """How the path of each layer is parametrised."""
    normed = normed_site(site, config)
    if normed is not None:
        return _before_norm(pre, normed, config)
    if site in ("up", "act", "down") and not config.post_norms:
        a, b = pre.residual + pre.added["o"], pre.added["down"]
    elif site == "o" and not config.post_norms:
        a, b = pre.residual, pre.added["o"]
    else:  # not linear in alpha
        zero = jnp.zeros(pre.residual.shape[:-1], jnp.float32)
        a = b = zero[..., None]
    a, b = a.astype(jnp.float32), b.astype(jnp.float32)
    aa, bb, ab = (jnp.sum(x * y, axis=-1) for x, y in ((a, a), (b, b), (a, b)))
    tiny = jnp.finfo(jnp.float32).tiny
    bb = jnp.maximum(bb, tiny)
    d = jnp.sqrt(jnp.maximum(aa * bb - ab**2, 1e-6 * aa * bb + tiny))
    start = jnp.arcsinh(ab / d)
    length = jnp.arcsinh((bb + ab) / d) - start
    length = jnp.where(jnp.isfinite(length) & (bb > tiny), length, 0.0)
    return Parametrisation(*(jnp.moveaxis(x, 0, -1) for x in (start, length, d / bb, ab / bb)))


def _before_norm(pre: Prefill, normed: str, config: ModelConfig) -> Parametrisation:
    """Of paths whose end a norm divides."""
    tiny = float(jnp.finfo(jnp.float32).tiny)
    scale = jnp.sqrt(config.norm_eps / jnp.maximum(pre.squares[normed], tiny))
    if normed in ("o", "down"):  # what is normed turns a smaller stream over sooner
        before = pre.residual + pre.added["o"] if normed == "down" else pre.residual
        sizes = (
            jnp.linalg.norm(x.astype(jnp.float32), axis=-1) for x in (before, pre.added[normed])
        )
        stream, added = sizes
        scale = scale * jnp.clip(stream / jnp.maximum(added, tiny), 1e-3, 1)
    scale = jnp.moveaxis(scale, 0, -1)
    zero = jnp.zeros_like(scale)
    return Parametrisation(zero, jnp.arcsinh(1 / scale), scale, zero)


class FirstPanels(NamedTuple):
    """Where the panels of the first pass are: [batch, answer, panel].

    `extra` of the long paths, lowest layers first, then the first panel of every layer, so that
    layers are sorted in both parts. Of paths that a norm bends: those of each layer side by side.
    """

    layer: Array
    valid: Array  # real; what the long paths leave of `extra` is not
    left: Array  # in t
    right: Array
    following: Array  # the panel that begins where this one ends
    last: Array  # ends at alpha = 1


def first_panels(path: Parametrisation, *, extra: int) -> FirstPanels:
    """One panel for each layer and `extra` more for the long paths."""
    *shape, count = path.length.shape
    wanted = jnp.where(path.length > LONG, jnp.ceil(path.length / STRETCH), 1.0).astype(jnp.int32)
    wanted = wanted - 1
    before = jnp.cumsum(wanted, axis=-1) - wanted
    given = jnp.clip(extra - before, 0, wanted)
    ends = jnp.cumsum(given, axis=-1)
    place = jnp.arange(extra)
    layer = (ends[..., None, :] <= place[:, None]).sum(-1)
    valid = layer < count
    layer = jnp.minimum(layer, count - 1)
    first = jnp.take_along_axis(ends - given, layer, axis=-1)
    number = jnp.where(valid, place - first + 1, 0)

    layer = jnp.concatenate([layer, jnp.broadcast_to(jnp.arange(count), (*shape, count))], axis=-1)
    number = jnp.concatenate([number, jnp.zeros((*shape, count), number.dtype)], axis=-1)
    valid = jnp.concatenate([valid, jnp.ones((*shape, count), bool)], axis=-1)
    parts = 1 + jnp.take_along_axis(given, layer, axis=-1)
    after = jnp.concatenate([jnp.broadcast_to(place + 1, (*shape, extra)), ends - given], axis=-1)
    return FirstPanels(
        layer=layer,
        valid=valid,
        left=number / parts,
        right=(number + 1) / parts,
        following=jnp.minimum(after, extra + count - 1),
        last=number + 1 == parts,
    )


def normed_panels(path: Parametrisation) -> FirstPanels:
    """`NORMED_PANELS` panels for each layer, of paths that a norm bends."""
    *shape, count = path.length.shape
    parts, total = NORMED_PANELS, count * NORMED_PANELS
    even = np.arange(1, parts, dtype=np.float32) / np.float32(parts)
    length = jnp.maximum(path.length, LONG)[..., None]
    ends = jnp.minimum(np.array(ENDS, np.float32) / length, even)
    zero = jnp.zeros((*shape, count, 1), jnp.float32)
    left = jnp.concatenate([zero, ends], axis=-1)
    right = jnp.concatenate([ends, zero + 1], axis=-1)

    def everywhere(values: np.ndarray) -> Array:
        return jnp.broadcast_to(values, (*shape, total))

    return FirstPanels(
        layer=everywhere(np.repeat(np.arange(count, dtype=np.int32), parts)),
        valid=everywhere(np.ones(total, bool)),
        left=left.reshape(*shape, total),
        right=right.reshape(*shape, total),
        following=everywhere(np.minimum(np.arange(1, total + 1, dtype=np.int32), total - 1)),
        last=everywhere(np.arange(total) % parts == parts - 1),
    )
