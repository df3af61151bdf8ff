"""Attribution by automatic differentiation of whole forward passes: no cache, no rows, no layers."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from support.models import compiled

from jaxneurons import forward
from jaxneurons.neurons.sets import site_width


@functools.cache
def path_gradient(config, site):
    """P and dP/dscale at one alpha, over the whole sequence, for one prompt and one layer."""

    def run(params, tokens, length, target, layer, alpha):
        shape = (config.num_layers, 1, tokens.shape[0], site_width(config, site))

        def probability(own):
            scales = jnp.ones(shape).at[layer, 0, length - 1].set(own)
            out = forward(
                params, tokens[None], config=config, lengths=length[None], scales={site: scales}
            )
            return jax.nn.softmax(out.logits[0, 0])[target]

        own = jnp.full(shape[-1], alpha, jnp.float32)
        return jax.value_and_grad(probability)(own)

    return compiled(jax.vmap(jax.vmap(run, (None,) * 5 + (0,)), (None,) * 4 + (0, None)))


def oracle(params, tokens, lengths, targets, *, config, site, x, w):
    """Scores [batch, layers, width] and P(0), P(1): full sequences, no cache, no rows."""
    alphas = jnp.asarray([0.0, 1.0, *x], jnp.float32)
    weights = np.array([0.0, 0.0, *w])
    run = path_gradient(config, site)
    found = [
        run(params, row, n, target, jnp.arange(config.num_layers), alphas)
        for row, n, target in zip(tokens, lengths, targets, strict=True)
    ]
    p = np.stack([p for p, _ in found])
    scores = np.einsum("blmw,m->blw", np.stack([g for _, g in found]).astype(float), weights)
    return scores, p[..., 0], p[..., 1]


def difference(ours, theirs):
    """Relative L2 difference of every layer."""
    ours, theirs = np.asarray(ours, float), np.asarray(theirs, float)
    size = np.linalg.norm(theirs, axis=-1)
    return np.linalg.norm(ours - theirs, axis=-1) / np.maximum(size, 1e-30)
