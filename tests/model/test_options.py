"""Every option of a configuration against a plain decoder: whole, padded, in pieces, generating."""

import functools

import jax.numpy as jnp
import numpy as np
import pytest
from support.models import compiled, random_tokens
from support.options import BUNDLES, params_of
from support.plain import Plain

from jaxneurons import forward
from jaxneurons.model import greedy, init_cache

SITES = ("q", "k", "v", "o", "up", "gate", "act", "down")
LENGTHS = np.array([14, 9, 1])  # past the window, and past phi's original context or within


@functools.cache
def run(name):
    config = BUNDLES[name]
    return compiled(functools.partial(forward, config=config, at="all", capture=SITES))


def tokens_of(name, shape=(3, 14)):
    return random_tokens(BUNDLES[name], shape, 3)


@functools.cache
def plain(name, row):
    ids = np.asarray(tokens_of(name))[row, : LENGTHS[row]]
    return Plain(params_of(name), ids, BUNDLES[name])


def close(ours, theirs, tolerance=1e-5):
    ours, theirs = np.asarray(ours, float), np.asarray(theirs, float)
    assert np.abs(ours - theirs).max() < tolerance * np.abs(theirs).max()


@pytest.mark.parametrize("name", BUNDLES)
def test_logits_and_sites_of_padded_rows(name):
    out = run(name)(params_of(name), tokens_of(name), lengths=jnp.asarray(LENGTHS))
    for row, length in enumerate(LENGTHS):
        theirs = plain(name, row)
        close(out.logits[row, :length], theirs.logits)
        close(out.final[row, :length], theirs.final)
        for site in SITES:
            for layer in range(BUNDLES[name].num_layers):
                close(out.activations[site][layer, row, :length], theirs.sites[site, layer])


@pytest.mark.parametrize("name", BUNDLES)
def test_in_pieces_with_a_cache(name):
    """A model whose angles depend on the whole length is told it by one piece only."""
    config, tokens = BUNDLES[name], tokens_of(name)[:1]
    # phi: all within the original context, or its first keys would be of other angles.
    end = 9 if name == "phi" else 14
    piece = compiled(functools.partial(forward, config=config, at="all"))
    theirs = Plain(params_of(name), np.asarray(tokens)[0, :end], config).logits
    cache, logits = init_cache(config, 1, 16), []
    for start, stop in ((0, 5), (5, end)):
        out = piece(params_of(name), tokens[:, start:stop], cache=cache)
        cache = out.cache
        logits.append(np.asarray(out.logits[0]))
    close(np.concatenate(logits), theirs)


@pytest.mark.parametrize("name", BUNDLES)
def test_greedy_continuations(name):
    config, tokens, lengths = BUNDLES[name], tokens_of(name)[:, :6], np.array([6, 4, 1])
    steps = 3
    ours = compiled(functools.partial(greedy, config=config, steps=steps))(
        params_of(name), tokens, lengths=jnp.asarray(lengths)
    )
    for row, length in enumerate(lengths):
        ids = np.asarray(tokens)[row, :length].tolist()
        for step in range(steps):
            ids.append(int(Plain(params_of(name), ids, config).logits[-1].argmax()))
            assert ids[-1] == int(ours[row, step])


@pytest.mark.parametrize("name", BUNDLES)
def test_every_option_matters(name):
    """What the comparison would not see if it were not computed is not compared."""
    import dataclasses

    config, defaults = BUNDLES[name], BUNDLES["qwen3"]
    ids = np.asarray(tokens_of(name))[0]
    whole = plain(name, 0).logits
    plain_values = {field.name: field.default for field in dataclasses.fields(defaults)}
    for option in (
        "activation",
        "embed_scale",
        "norm_offset",
        "query_scale",
        "attention_softcap",
        "final_softcap",
        "sliding_rope",
        "rotary_layers",
        "rope",
    ):
        if getattr(config, option) == plain_values[option]:
            continue
        changed = dataclasses.replace(config, **{option: plain_values[option]})
        other = Plain(params_of(name), ids, changed).logits
        assert np.abs(other - whole).max() > 1e-3 * np.abs(whole).max(), option
