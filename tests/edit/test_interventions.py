"""Interventions as edits of parameters: against multipliers, numpy and PyTorch hooks."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh
from support.models import compiled, random_tokens, tiny_config, tiny_params

from jaxneurons import SITES, ConfigError, DataError, forward
from jaxneurons.checkpoints.provenance import hash_params
from jaxneurons.convert.hf import read_hf
from jaxneurons.edit import (
    ablate,
    add,
    force,
    interpolate,
    restore,
    scale,
    scale_at,
    set_rows,
    sparse_scales,
    swap,
    with_biases,
)
from jaxneurons.model.sharding import ShardingRules, param_shardings, shard_params
from jaxneurons.neurons.sets import NeuronSet, site_width, stack_scales

EVERYWHERE = ("q", "k", "v", "o", "gate", "up", "down")
CONFIGS = {
    "llama": tiny_config(),
    "qwen2": tiny_config(biases=("q", "k", "v"), tied=True, num_kv_heads=1),
    "biases": tiny_config(biases=EVERYWHERE, num_kv_heads=4),
}
WRITING = ("up", "gate", "act", "v")
CONFIG = CONFIGS["biases"]
PARAMS = {name: tiny_params(config) for name, config in CONFIGS.items()}
TOKENS = random_tokens(CONFIG, (2, 7))


def members(config, sites=SITES, seed=0, count=4):
    """Some neurons of each site, in several layers."""
    rng = np.random.default_rng(seed)
    flat = {site: config.num_layers * site_width(config, site) for site in sites}
    chosen = {site: rng.choice(size, count, replace=False) for site, size in flat.items()}
    return NeuronSet.of(
        **{
            site: np.stack(np.divmod(chosen[site], site_width(config, site)), axis=1)
            for site in sites
        }
    )


@functools.cache
def run(config):
    return compiled(functools.partial(forward, config=config, at="all", capture=SITES))


def logits(params, config, scales=None):
    """All sites have multipliers, or none has: two programs for each configuration."""
    if scales is not None:
        scales = {**NeuronSet().scales(config, sites=SITES), **scales}
    return np.asarray(run(config)(params, TOKENS, scales=scales).logits)


def relative(one, other):
    return np.linalg.norm(one - other) / np.linalg.norm(other)


def leaves(params):
    return {
        jax.tree_util.keystr(path): np.asarray(leaf)
        for path, leaf in jax.tree_util.tree_leaves_with_path(params)
    }


def assert_same_bits(one, other):
    mine, theirs = leaves(one), leaves(other)
    assert mine.keys() == theirs.keys()
    for name in mine:
        assert mine[name].dtype == theirs[name].dtype, name
        assert mine[name].tobytes() == theirs[name].tobytes(), name


def arrays_of(config):
    """Every array that a site's neurons lie along, with an index that picks one, written out."""
    table = {site: [((site, "kernel"), 2)] for site in SITES if site != "act"}
    for site in config.biases:
        table[site].append(((site, "bias"), 1))
    return {**table, "act": [(("down", "kernel"), 1)]}


def by_hand(params, neurons, function, config):
    """A copy in numpy in which the arrays of each neuron are `function` of them (and of their
    place, to look it up elsewhere)."""
    copy = jax.tree.map(np.array, params)
    for site, (layer, index) in neurons:
        for path, axis in arrays_of(config)[site]:
            group = "attn" if path[0] in ("q", "k", "v", "o") else "ffn"
            array = copy["layers"][group][path[0]][path[1]]
            place = (layer, index) if axis == 1 else (layer, slice(None), index)
            array[place] = function(array[place], (group, *path), place)
    return copy


# --- an edit is a multiplier ----------------------------------------------------------------------


@pytest.mark.parametrize("site", SITES)
@pytest.mark.parametrize("name", CONFIGS)
def test_scale_is_a_multiplier(name, site):
    config, params = CONFIGS[name], PARAMS[name]
    neurons = members(config, [site])
    factors = np.array([-1.5, 0.0, 0.3, 2.5], np.float32)
    tables = neurons.scales(config)
    tables[site][tuple(neurons.pairs(site).T)] = factors
    expected = logits(params, config, tables)
    edited = jax.jit(functools.partial(scale, config=config), static_argnums=1)(
        params, neurons, factors
    )
    assert relative(logits(edited, config), expected) < 1e-6
    assert relative(expected, logits(params, config)) > 1e-3
    assert relative(logits(scale(params, tables, config=config), config), expected) < 1e-6
    assert_same_bits(scale(params, neurons, factors, config=config), edited)
    off = ablate(params, neurons, config=config)
    assert relative(logits(off, config), logits(params, config, neurons.scales(config))) < 1e-6


@pytest.mark.parametrize("name", CONFIGS)
def test_scale_touches_what_the_table_says(name):
    config, params = CONFIGS[name], PARAMS[name]
    neurons = members(config)
    expected = by_hand(params, neurons, lambda x, *_: x * np.float32(0.7), config)
    assert_same_bits(scale(params, neurons, 0.7, config=config), expected)
    one_site = scale(params, members(config, ["up"]), 0.7, config=config)
    for key in ("embed", "final_norm"):
        assert one_site[key] is params[key]
    assert one_site["layers"]["attn"] is params["layers"]["attn"]
    assert one_site["layers"]["ffn"]["gate"] is params["layers"]["ffn"]["gate"]
    assert one_site["layers"]["ffn"]["up"] is not params["layers"]["ffn"]["up"]


@pytest.mark.parametrize("site", ["up", "v", "act"])
def test_bfloat16(site):
    params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), PARAMS["biases"])
    neurons = members(CONFIG, [site])
    edited = scale(params, neurons, 0.3, config=CONFIG)
    assert {str(x.dtype) for x in jax.tree.leaves(edited)} == {"bfloat16"}
    expected = logits(params, CONFIG, neurons.scales(CONFIG, 0.3))
    change = relative(expected, logits(params, CONFIG))
    assert relative(logits(edited, CONFIG), expected) < min(0.02, change / 3)
    # Rounded once, from float32.
    exact = by_hand(params, neurons, lambda x, *_: x.astype(np.float32) * np.float32(0.3), CONFIG)
    assert_same_bits(edited, exact)


def test_other_neurons_keep_bits_that_arithmetic_would_lose():
    kernel = PARAMS["llama"]["layers"]["ffn"]["up"]["kernel"]
    odd = kernel.at[:, 0].set(1e-40).at[:, 1].set(-0.0)  # a CPU flushes the first to zero
    layers = PARAMS["llama"]["layers"]
    ffn = {**layers["ffn"], "up": {"kernel": odd}}
    params = {**PARAMS["llama"], "layers": {**layers, "ffn": ffn}}
    neurons = members(CONFIGS["llama"], ["up"], count=1)
    edited = scale(params, neurons, 2.0, config=CONFIGS["llama"])
    assert_same_bits(restore(edited, params, neurons, config=CONFIGS["llama"]), params)


def test_a_batch_of_edited_models_is_a_batch_of_multipliers():
    sets = [members(CONFIG, seed=seed, count=1) for seed in range(3)]
    factors = np.array([0.0, -1.0, 3.0], np.float32)
    one_by_one = np.stack(
        [logits(scale(PARAMS["biases"], sets[0], f, config=CONFIG), CONFIG) for f in factors]
    )

    def of_scales(scales):
        return forward(PARAMS["biases"], TOKENS, config=CONFIG, scales=scales, at="all").logits

    def of_factor(factor):
        edited = scale(PARAMS["biases"], sets[0], factor, config=CONFIG)
        return forward(edited, TOKENS, config=CONFIG, at="all").logits

    tables = [sets[0].scales(CONFIG, f) for f in factors.tolist()]
    stacked = {site: np.stack([table[site] for table in tables]) for site in SITES}
    by_multipliers = compiled(jax.vmap(of_scales))
    assert relative(np.asarray(by_multipliers(stacked)), one_by_one) < 1e-6
    assert relative(np.asarray(compiled(jax.vmap(of_factor))(factors)), one_by_one) < 1e-6
    # Different neurons in each: the same program.
    several = np.asarray(by_multipliers(stack_scales(sets, CONFIG, 0.0)))
    for alone, neurons in zip(several, sets, strict=True):
        edited = ablate(PARAMS["biases"], neurons, config=CONFIG)
        assert relative(alone, logits(edited, CONFIG)) < 1e-6

    # And without a table for each outside of the program.
    def of_neuron(layer, index, factor):
        return of_scales(sparse_scales("up", layer, index, factor, config=CONFIG))

    pairs = np.array([[[0, 1], [2, 3]], [[1, 39], [0, 0]]])
    sparse = compiled(jax.vmap(of_neuron, in_axes=(0, 0, None)))(
        pairs[..., 0], pairs[..., 1], jnp.float32(0.5)
    )
    for alone, chosen in zip(np.asarray(sparse), pairs, strict=True):
        edited = scale(PARAMS["biases"], NeuronSet.of(up=chosen), 0.5, config=CONFIG)
        assert relative(alone, logits(edited, CONFIG)) < 1e-6


@pytest.mark.parametrize("at", [1.0, 0.4])
def test_gradient_of_a_factor(at):
    neurons, params = members(CONFIG, count=2), PARAMS["biases"]
    places = {site: tuple(neurons.pairs(site).T) for site in neurons.codes}

    def loss(logits):
        return jax.nn.logsumexp(logits, axis=-1).sum() - logits[..., 5].sum()

    def by_edit(factors):
        edited = scale(params, neurons, factors, config=CONFIG)
        return loss(forward(edited, TOKENS, config=CONFIG).logits)

    def by_multipliers(scales):
        return loss(forward(params, TOKENS, config=CONFIG, scales=scales).logits)

    gradients = np.asarray(compiled(jax.grad(by_edit))(jnp.full(len(neurons), at)))
    tables = compiled(jax.grad(by_multipliers))(
        jax.tree.map(jnp.asarray, neurons.scales(CONFIG, at))
    )
    expected = np.concatenate([np.asarray(tables[site])[places[site]] for site in neurons.codes])
    assert relative(gradients, expected) < 1e-5
    assert np.abs(expected).min() > 0


def test_scan_over_factors():
    neurons, factors = members(CONFIG), jnp.array([0.0, 1.0, -2.0])

    def step(total, factor):
        edited = scale(PARAMS["biases"], neurons, factor, config=CONFIG)
        out = forward(edited, TOKENS, config=CONFIG, at="all").logits
        return total + 1, out

    count, each = compiled(lambda f: jax.lax.scan(step, 0, f))(factors)
    assert count == 3
    for out, factor in zip(np.asarray(each), factors, strict=True):
        edited = scale(PARAMS["biases"], neurons, factor, config=CONFIG)
        assert relative(out, logits(edited, CONFIG)) < 1e-6


def test_traced_neurons():
    pairs = members(CONFIG, ["v"]).pairs("v")
    factors = np.array([0.0, 2.0, -1.0, 0.5], np.float32)
    edit = jax.jit(lambda p, l, i, f: scale_at(p, "v", l, i, f, config=CONFIG))  # noqa: E741
    expected = scale(PARAMS["biases"], NeuronSet.of(v=pairs), factors, config=CONFIG)
    assert_same_bits(edit(PARAMS["biases"], *pairs.T, factors), expected)
    # Another order is the same edit.
    back = edit(PARAMS["biases"], *pairs[::-1].T, factors[::-1])
    assert_same_bits(back, expected)


# --- what is not a multiplier ---------------------------------------------------------------------


@pytest.mark.parametrize("name", CONFIGS)
def test_interpolate(name):
    config, params, other = CONFIGS[name], PARAMS[name], tiny_params(CONFIGS[name], seed=9)
    neurons = members(config)

    def mix(x, path, place):
        y = functools.reduce(lambda node, key: node[key], path, other["layers"])
        return np.float32(0.75) * x + np.float32(0.25) * np.asarray(y)[place]

    # Neurons of `act` and `down` share entries of a kernel: site by site, as the set iterates.
    expected = by_hand(params, neurons, mix, config)
    half = interpolate(params, other, neurons, 0.25, config=config)
    for key, leaf in leaves(half).items():
        np.testing.assert_allclose(leaf, leaves(expected)[key], rtol=1e-6, atol=1e-7)
    assert_same_bits(interpolate(params, other, neurons, 0.0, config=config), params)
    theirs = by_hand(
        params,
        neurons,
        lambda x, path, place: np.asarray(
            functools.reduce(lambda node, key: node[key], path, other["layers"])
        )[place],
        config,
    )
    assert_same_bits(interpolate(params, other, neurons, 1.0, config=config), theirs)
    nothing = jax.tree.map(jnp.zeros_like, params)
    up = members(config, ["up"])
    weights = np.array([0.1, 0.5, 1.0, -1.0], np.float32)
    faded = interpolate(params, nothing, up, weights, config=config)
    scaled = scale(params, up, 1 - weights, config=config)
    assert relative(logits(faded, config), logits(scaled, config)) < 1e-6


def rows_by_hand(config, site, layer, index):
    """Rows of which kernel read a neuron, one query head after the other."""
    if site != "v":
        return "ffn", "down", [(layer, index)]
    group = config.num_heads // config.num_kv_heads
    return (
        "attn",
        "o",
        [
            (layer, head * config.head_dim + index % config.head_dim)
            for head in range(config.num_heads)
            if head // group == index // config.head_dim
        ],
    )


@pytest.mark.parametrize("site", WRITING)
@pytest.mark.parametrize("name", CONFIGS)
def test_output_rows(name, site):
    config, params = CONFIGS[name], PARAMS[name]
    neurons = members(config, [site])
    rng = np.random.default_rng(1)
    vectors = rng.normal(size=(len(neurons), config.hidden_size)).astype(np.float32)
    added, written = jax.tree.map(np.array, params), jax.tree.map(np.array, params)
    for vector, (_, (layer, index)) in zip(vectors, neurons, strict=True):
        group, module, rows = rows_by_hand(config, site, layer, index)
        for row in rows:
            added["layers"][group][module]["kernel"][row] += vector
            written["layers"][group][module]["kernel"][row] = vector
    assert_same_bits(add(params, neurons, vectors, config=config), added)
    assert_same_bits(set_rows(params, neurons, vectors, config=config), written)


def test_vectors_in_the_order_in_which_the_set_iterates():
    neurons = NeuronSet.of(up=[(0, 1), (2, 3)], act=[(2, 1), (0, 3)], v=[(1, 4), (1, 8)])
    params = PARAMS["biases"]
    vectors = np.random.default_rng(2).normal(size=(len(neurons), CONFIG.hidden_size))
    together, added = (edit(params, neurons, vectors, config=CONFIG) for edit in (set_rows, add))
    by_row, plus = params, params
    for vector, (site, pair) in zip(vectors, neurons, strict=True):
        single = NeuronSet.of(**{site: [pair]})
        by_row = set_rows(by_row, single, vector, config=CONFIG)
        plus = add(plus, single, vector, config=CONFIG)
    assert_same_bits(together, by_row)
    assert_same_bits(added, plus)


def test_what_is_added_is_written_with_the_activation():
    params, neurons = PARAMS["biases"], NeuronSet.of(gate=[(1, 3)])
    vector = np.linspace(-1, 1, CONFIG.hidden_size).astype(np.float32)
    before = run(CONFIG)(params, TOKENS).activations
    after = run(CONFIG)(add(params, neurons, vector, config=CONFIG), TOKENS).activations
    written = np.asarray(before["act"][1, ..., 3])[..., None] * vector
    np.testing.assert_allclose(after["down"][1] - before["down"][1], written, atol=1e-5)
    np.testing.assert_array_equal(after["down"][0], before["down"][0])


def test_what_is_added_to_a_value_neuron():
    # One token: each query head's mix is its key/value head's value.
    config, params = CONFIGS["llama"], PARAMS["llama"]
    vector = np.linspace(-1, 1, config.hidden_size).astype(np.float32)
    edited = add(params, NeuronSet.of(v=[(0, 11)]), vector, config=config)
    first = functools.partial(run(config), tokens=TOKENS[:, :1])
    before, after = first(params).activations, first(edited).activations
    written = 2 * np.asarray(before["v"][0, ..., 11])[..., None] * vector
    np.testing.assert_allclose(after["o"][0] - before["o"][0], written, atol=1e-5)


def test_rows_of_nothing_are_ablation():
    neurons = members(CONFIG, ["act"])
    off = set_rows(PARAMS["biases"], neurons, np.zeros(CONFIG.hidden_size), config=CONFIG)
    expected = ablate(PARAMS["biases"], neurons, config=CONFIG)
    for key, leaf in leaves(expected).items():
        np.testing.assert_array_equal(leaf, leaves(off)[key])  # -0 is 0 here


@pytest.mark.parametrize("site", SITES)
def test_swap(site):
    config, params = CONFIG, PARAMS["biases"]
    first, second = [(2, 3), (0, 5)], [(2, 7), (1, 6)]  # in one layer; in two
    swapped = swap(params, site, first, second, config=config)
    partner = {**dict(zip(first, second, strict=True)), **dict(zip(second, first, strict=True))}

    def of_partner(_, path, place):
        array = functools.reduce(lambda node, key: node[key], path, params["layers"])
        layer, index = partner[place[0], place[-1]]
        return np.asarray(array)[(layer, *place[1:-1], index)]

    both = NeuronSet.of(**{site: first + second})
    if site == "act":
        expected = jax.tree.map(np.array, params)
        kernel = np.asarray(params["layers"]["ffn"]["down"]["kernel"])
        for to, source in partner.items():
            expected["layers"]["ffn"]["down"]["kernel"][to] = kernel[source]
    else:
        expected = by_hand(params, both, of_partner, config)
    assert_same_bits(swapped, expected)
    assert_same_bits(swap(swapped, site, second, first, config=config), params)
    assert_same_bits(restore(swapped, params, both, config=config), params)


def test_what_a_swap_does():
    params = PARAMS["biases"]
    before = run(CONFIG)(params, TOKENS).activations
    order = np.arange(CONFIG.intermediate_size)
    order[[3, 5]] = 5, 3
    swapped = swap(params, "up", (0, 3), (0, 5), config=CONFIG)
    after = run(CONFIG)(swapped, TOKENS).activations
    np.testing.assert_allclose(after["up"][0], before["up"][0][..., order], rtol=1e-6)
    np.testing.assert_allclose(after["gate"][0], before["gate"][0], rtol=1e-6)
    swapped = swap(params, "act", (0, 3), (0, 5), config=CONFIG)
    kernel = np.asarray(params["layers"]["ffn"]["down"]["kernel"][0])
    bias = np.asarray(params["layers"]["ffn"]["down"]["bias"][0])
    expected = np.asarray(before["act"][0])[..., order] @ kernel + bias
    np.testing.assert_allclose(
        run(CONFIG)(swapped, TOKENS).activations["down"][0], expected, atol=1e-5
    )
    renamed = params
    for site in ("up", "gate", "act"):
        renamed = swap(renamed, site, (0, 3), (0, 5), config=CONFIG)
    assert relative(logits(renamed, CONFIG), logits(params, CONFIG)) < 1e-6


# --- constants ------------------------------------------------------------------------------------


@pytest.mark.parametrize("site", SITES)
def test_forced_to_constants(site):
    neurons, params = members(CONFIG, [site]), PARAMS["biases"]
    values = np.array([0.3, -2.0, 0.0, 1e-3], np.float32)
    edited = jax.jit(lambda p, v: force(p, neurons, v, config=CONFIG))(params, values)
    activations = np.asarray(run(CONFIG)(edited, TOKENS).activations[site])
    for value, (layer, index) in zip(values, neurons.pairs(site), strict=True):
        assert (activations[layer, ..., index] == value).all()
    assert_same_bits(restore(edited, params, neurons, config=CONFIG), params)


def test_a_model_without_biases_gets_some():
    config, params = CONFIGS["llama"], PARAMS["llama"]
    neurons = NeuronSet.of(act=[(1, 2)], q=[(0, 9)])
    with pytest.raises(ConfigError, match=r"'act'.* none at up and gate.*with_biases"):
        force(params, neurons, 0.5, config=config)
    with pytest.raises(ConfigError, match=r"site 'up'.* none at up"):
        force(PARAMS["qwen2"], NeuronSet.of(up=[(0, 1)]), 1.0, config=CONFIGS["qwen2"])
    wider, biased = with_biases(params, ["q", "gate", "up"], config=config)
    assert biased.biases == ("q", "gate", "up")
    assert jax.tree.map(np.shape, wider) == jax.tree.map(np.shape, tiny_params(biased))
    np.testing.assert_array_equal(logits(wider, biased), logits(params, config))
    edited = force(wider, neurons, 0.5, config=biased)
    activations = run(biased)(edited, TOKENS).activations
    assert (np.asarray(activations["act"][1, ..., 2]) == 0.5).all()
    assert (np.asarray(activations["q"][0, ..., 9]) == 0.5).all()
    same, unchanged = with_biases(wider, ["up"], config=biased)
    assert unchanged == biased
    assert_same_bits(same, wider)


# --- PyTorch hooks --------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama-biases", "qwen2"])
def test_edits_equal_pytorch_hooks(tmp_path, family):
    pytest.importorskip("torch")
    from support.families import IDS, make, our_logits, torch_logits

    model = make(family, "default", "gqa", False)
    model.save_pretrained(tmp_path)
    config, params = read_hf(tmp_path)
    layers = model.model.layers

    def times(index, factor):
        def hook(_, __, out):
            out = out.clone()
            out[..., index] *= factor
            return out

        return hook

    def act_times(index, factor):
        def hook(_, inputs):
            act = inputs[0].clone()
            act[..., index] *= factor
            return (act,)

        return hook

    def constant(index, value):
        def hook(_, __, out):
            out = out.clone()
            out[..., index] = value
            return out

        return hook

    hooks = [
        layers[1].mlp.up_proj.register_forward_hook(times(7, -2.0)),
        layers[2].self_attn.v_proj.register_forward_hook(times(9, 3.0)),
        layers[0].self_attn.o_proj.register_forward_hook(times(4, 0.0)),
        layers[2].mlp.down_proj.register_forward_pre_hook(act_times(11, 4.0)),
        layers[1].self_attn.k_proj.register_forward_hook(constant(3, 1.5)),
    ]
    theirs = torch_logits(model, IDS)
    for hook in hooks:
        hook.remove()
    edited = params
    for site, pair, factor in (
        ("up", (1, 7), -2.0),
        ("v", (2, 9), 3.0),
        ("o", (0, 4), 0.0),
        ("act", (2, 11), 4.0),
    ):
        edited = scale(edited, NeuronSet.of(**{site: [pair]}), factor, config=config)
    edited = force(edited, NeuronSet.of(k=[(1, 3)]), 1.5, config=config)
    np.testing.assert_allclose(our_logits(edited, IDS, config), theirs, atol=1e-5, rtol=1e-5)
    plain = torch_logits(model, IDS)
    assert np.abs(plain - theirs).max() > 0.05
    np.testing.assert_allclose(our_logits(params, IDS, config), plain, atol=1e-5, rtol=1e-5)


# --- no state, no gathering -----------------------------------------------------------------------

VECTOR = np.linspace(-1, 1, CONFIG.hidden_size).astype(np.float32)
OTHER = tiny_params(CONFIG, seed=9)
EDITS = {
    "scale": lambda p, n: scale(p, n, 0.7, config=CONFIG),
    "tables": lambda p, n: scale(p, n.scales(CONFIG, 0.7), config=CONFIG),
    "ablate": lambda p, n: ablate(p, n, config=CONFIG),
    "interpolate": lambda p, n: interpolate(p, OTHER, n, 0.3, config=CONFIG),
    "restore": lambda p, n: restore(p, OTHER, n, config=CONFIG),
    "add": lambda p, n: add(p, of_sites(n, ("act", "v")), VECTOR, config=CONFIG),
    "set_rows": lambda p, n: set_rows(p, of_sites(n, ("up", "v")), VECTOR, config=CONFIG),
    "swap": lambda p, n: functools.reduce(
        lambda q, s: swap(q, s, n.pairs(s)[:2], n.pairs(s)[2:], config=CONFIG), SITES, p
    ),
    "force": lambda p, n: force(p, n, 0.25, config=CONFIG),
}


def of_sites(neurons, sites):
    return NeuronSet({site: neurons.codes[site] for site in sites})


@pytest.mark.parametrize("name", EDITS)
def test_edits_leave_no_state(name):
    edit, params = EDITS[name], PARAMS["biases"]
    codes = members(CONFIG, seed=3, count=8).codes
    one, two = (NeuronSet({site: codes[site][start::2] for site in SITES}) for start in (0, 1))
    before, alone = hash_params(CONFIG, params), edit(params, two)
    assert hash_params(CONFIG, alone) != before
    first = edit(params, one)
    assert hash_params(CONFIG, params) == before  # the base is what it was
    assert_same_bits(edit(params, two), alone)  # one edit does not know of another
    # Undone, bit for bit; and so is one of two on other neurons, whichever came first.
    assert_same_bits(restore(first, params, one, config=CONFIG), params)
    for site in ("up", "v"):
        mine, theirs = of_sites(one, (site,)), of_sites(two, (site,))
        half = scale(scale(params, mine, 0.3, config=CONFIG), theirs, 2.0, config=CONFIG)
        other = scale(scale(params, theirs, 2.0, config=CONFIG), mine, 0.3, config=CONFIG)
        assert_same_bits(half, other)
        left = restore(half, params, mine, config=CONFIG)
        assert_same_bits(left, scale(params, theirs, 2.0, config=CONFIG))


LAYOUTS = {
    "model": ShardingRules(),
    "hidden": ShardingRules(
        vocab=None, hidden="model", intermediate=None, heads=None, kv_heads=None
    ),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", EDITS)
def test_sharded_parameters_are_not_gathered(name, layout):
    mesh = Mesh(np.array(jax.devices()[:2]).reshape(1, 2), ("data", "model"))
    placed = param_shardings(CONFIG, mesh, LAYOUTS[layout])
    params = shard_params(PARAMS["biases"], CONFIG, mesh, LAYOUTS[layout])
    other = shard_params(OTHER, CONFIG, mesh, LAYOUTS[layout])
    neurons, edit = members(CONFIG, seed=3), EDITS[name]
    expected = edit(PARAMS["biases"], neurons)
    if name in ("interpolate", "restore"):  # with the other tree as an argument
        call = {
            "interpolate": lambda p, o: interpolate(p, o, neurons, 0.3, config=CONFIG),
            "restore": lambda p, o: restore(p, o, neurons, config=CONFIG),
        }[name]
        arguments = (params, other)
    else:
        call, arguments = (lambda p: edit(p, neurons)), (params,)
    program = jax.jit(call).lower(*arguments).compile()
    text = program.as_text() or ""
    assert "fusion" in text or "select" in text
    assert "all-gather" not in text
    assert "all-to-all" not in text
    edited = program(*arguments)
    for out in (edited, call(*arguments)):  # compiled as one, and step by step
        for leaf, place in zip(jax.tree.leaves(out), jax.tree.leaves(placed), strict=True):
            assert leaf.sharding.is_equivalent_to(place, leaf.ndim), (leaf.sharding, place)
        for key, leaf in leaves(out).items():
            np.testing.assert_allclose(leaf, leaves(expected)[key], rtol=2e-7, atol=1e-7)
    if name == "scale" and layout == "model":
        out = run(CONFIG)(edited, TOKENS).logits
        scaled = run(CONFIG)(
            params,
            TOKENS,
            scales={
                **NeuronSet().scales(CONFIG, sites=SITES),
                **neurons.scales(CONFIG, 0.7),
            },
        ).logits
        assert relative(np.asarray(out), np.asarray(scaled)) < 1e-6


# --- bad input ------------------------------------------------------------------------------------


def test_neurons_that_there_are_not():
    config, params = CONFIGS["llama"], PARAMS["llama"]
    for neurons in (NeuronSet.of(up=[(3, 0)]), NeuronSet.of(k=[(0, 16)])):
        for edit in (
            lambda n: scale(params, n, 0.0, config=config),
            lambda n: ablate(params, n, config=config),
            lambda n: interpolate(params, params, n, 0.5, config=config),
            lambda n: restore(params, params, n, config=config),
            lambda n: add(params, n, VECTOR, config=config),
            lambda n: set_rows(params, n, VECTOR, config=config),
        ):
            with pytest.raises(DataError, match="not in this model"):
                edit(neurons)
    with pytest.raises(DataError, match="neuron 40 is not in this model"):
        scale_at(params, "act", np.array([0]), np.array([40]), 0.0, config=config)
    with pytest.raises(DataError, match=f"neuron {2**32 - 1} is not in this model"):
        scale_at(params, "act", np.array([0]), np.array([2**32 - 1]), 0.0, config=config)
    with pytest.raises(ConfigError, match="counted from 0, got -1"):
        scale_at(params, "act", np.array([0]), np.array([-1]), 0.0, config=config)
    with pytest.raises(DataError, match="not in this model"):
        swap(params, "up", (0, 1), (3, 1), config=config)


def test_neurons_that_are_there_twice():
    params = PARAMS["biases"]
    with pytest.raises(DataError, match=r"\(1, 2\) is there more than once"):
        scale_at(params, "up", np.array([1, 0, 1]), np.array([2, 2, 2]), 0.0, config=CONFIG)
    with pytest.raises(DataError, match=r"\(0, 1\) is there more than once"):
        swap(params, "up", [(0, 1), (0, 2)], [(0, 3), (0, 1)], config=CONFIG)
    shared = NeuronSet.of(up=[(0, 1), (0, 2)], act=[(0, 2)])
    with pytest.raises(DataError, match="sites up, act have the same output rows"):
        add(params, shared, VECTOR, config=CONFIG)
    with pytest.raises(DataError, match=r"neuron \(0, 2\) is to be forced at 'act' and at 'up'"):
        force(params, shared, 1.0, config=CONFIG)


@pytest.mark.parametrize("site", ["q", "k", "o", "down"])
def test_neurons_without_an_output_row(site):
    for edit in (add, set_rows):
        with pytest.raises(ConfigError, match=f"'{site}' has no output row"):
            edit(PARAMS["biases"], NeuronSet.of(**{site: [(0, 1)]}), VECTOR, config=CONFIG)


def test_wrong_shapes_and_names(as_users_call):
    params, up = PARAMS["biases"], NeuronSet.of(up=[(0, 1), (2, 3)])
    with pytest.raises(ConfigError, match="unknown site 'upp'; did you mean 'up'"):
        scale(params, {"upp": np.ones((3, 40))}, config=CONFIG)
    with pytest.raises(ConfigError, match="unknown site 'ffn'"):
        scale_at(params, "ffn", np.array([0]), np.array([0]), 0.0, config=CONFIG)
    with pytest.raises(ConfigError, match="unknown site"):
        swap(params, "ffn", (0, 1), (0, 2), config=CONFIG)
    for shape in ((3, 32), (2, 40), (2, 3, 40), (40,), ()):
        with pytest.raises(ConfigError, match=r"'up' are of shape .*\(3, 40\).*jax.vmap"):
            scale(params, {"up": np.ones(shape)}, config=CONFIG)
    with pytest.raises(ConfigError, match=r"factors are of shape \(3,\); 2 neurons need"):
        scale(params, up, np.ones(3), config=CONFIG)
    with pytest.raises(ConfigError, match="weights are of shape"):
        interpolate(params, params, up, np.ones(1), config=CONFIG)
    with pytest.raises(ConfigError, match="values are of shape"):
        force(params, up, np.ones((2, 1)), config=CONFIG)
    with pytest.raises(ConfigError, match="a set of neurons needs a factor"):
        scale(params, up, config=CONFIG)
    with pytest.raises(ConfigError, match="leave `factor` out"):
        scale(params, up.scales(CONFIG), 0.0, config=CONFIG)
    for shape in ((31,), (3, 32), (1, 32), (2, 33), ()):
        with pytest.raises(ConfigError, match=r"vectors are of shape .*\[hidden\] = \(32,\)"):
            add(params, up, np.ones(shape), config=CONFIG)
        with pytest.raises(ConfigError, match="vectors are of shape"):
            set_rows(params, up, np.ones(shape), config=CONFIG)
    with pytest.raises(ConfigError, match="layer, index and values"):
        scale_at(params, "up", np.array([0]), np.array([0, 1]), 0.0, config=CONFIG)
    with pytest.raises(ConfigError, match="whole numbers"):
        scale_at(params, "up", np.array([0.0]), np.array([0]), 0.0, config=CONFIG)
    with pytest.raises(ConfigError, match="make no pairs"):
        swap(params, "up", [(0, 1), (0, 2)], [(0, 3)], config=CONFIG)
    with pytest.raises(ConfigError, match="got shape"):
        swap(params, "up", (0, 1, 2), (0, 3, 1), config=CONFIG)
    with pytest.raises(ConfigError, match="unknown projection 'act'"):
        with_biases(params, ["act"], config=CONFIG)


def test_parameters_of_another_model():
    up = NeuronSet.of(up=[(0, 1)])
    with pytest.raises(DataError, match=r"layers.ffn.up.kernel of shape .*the config that belongs"):
        scale(PARAMS["biases"], up, 0.0, config=tiny_config(intermediate_size=48))
    with pytest.raises(DataError, match=r"have no layers.ffn.up.bias, which"):
        scale(PARAMS["llama"], up, 0.0, config=CONFIG)
    with pytest.raises(DataError, match="the other parameters have"):
        restore(PARAMS["biases"], PARAMS["llama"], up, config=CONFIG)


def test_nothing_to_edit():
    params = PARAMS["llama"]
    for edited in (
        scale(params, NeuronSet(), 0.0, config=CONFIGS["llama"]),
        scale(params, {}, config=CONFIGS["llama"]),
        add(params, NeuronSet(), VECTOR, config=CONFIGS["llama"]),
        restore(params, params, NeuronSet(), config=CONFIGS["llama"]),
    ):
        assert_same_bits(edited, params)
