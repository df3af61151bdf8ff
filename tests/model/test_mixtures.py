"""Mixtures of experts against PyTorch transformers and against every expert for every token."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.models import compiled, random_tokens, tiny_config, tiny_params

from jaxneurons import ConfigError, forward
from jaxneurons.model import experts, greedy, make_mesh, shard_params
from jaxneurons.model.parameters import site_widths
from jaxneurons.model.sharding import PRESETS, ShardingRules, partition_specs

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from support.experts import MODELS, config_of, dense_forward, make, params_of  # noqa: E402

IDS = jnp.asarray(np.random.default_rng(0).integers(0, 50, (2, 20)), jnp.int32)
SITES = ("up", "gate", "act", "down")


def slow(*values):
    return pytest.param(*values, marks=pytest.mark.slow)


@functools.cache
def model_of(name):
    model = make(name)
    return model, config_of(model), params_of(model)


def close(ours, theirs, tolerance=1e-5):
    ours, theirs = np.asarray(ours), np.asarray(theirs)
    assert np.abs(ours - theirs).max() <= tolerance * np.abs(theirs).max()


@pytest.mark.parametrize(
    "name", ["mixtral", "qwen3-moe", *map(slow, sorted(MODELS.keys() - {"mixtral", "qwen3-moe"}))]
)
def test_logits_and_continuations_equal_pytorch(name):
    model, config, params = model_of(name)
    with torch.no_grad():
        theirs = model(torch.tensor(np.asarray(IDS)), output_router_logits=True)
        generated = model.generate(
            torch.tensor(np.asarray(IDS[:, :9])), max_new_tokens=8, do_sample=False
        )
    run = compiled(functools.partial(forward, config=config, at="all", capture=("router",)))
    out = run(params, IDS)
    close(out.logits, theirs.logits.numpy())
    chosen = torch.topk(torch.stack(theirs.router_logits), config.experts_per_token).indices
    chosen = np.sort(chosen.numpy().reshape(config.num_layers, *IDS.shape, -1))
    ours = np.asarray(out.activations["router"])
    assert ours.shape == (config.num_layers, *IDS.shape, config.experts)
    found = np.argwhere(ours > 0)[:, -1].reshape(chosen.shape)
    np.testing.assert_array_equal(found, chosen)
    if config.normalise_experts:
        np.testing.assert_allclose(ours.sum(-1), 1, rtol=1e-6)
    run = functools.partial(greedy, config=config, lengths=jnp.array([9, 9]), steps=8)
    ours = compiled(run)(params, IDS[:, :9])
    np.testing.assert_array_equal(ours, generated[:, 9:])


@pytest.mark.parametrize("name", [slow("mixtral"), "qwen3-moe-probabilities"])
def test_activations_are_rows_of_all_experts(name):
    _, config, params = model_of(name)
    run = functools.partial(forward, params, IDS, config=config, capture=(*SITES, "router"))
    at = jnp.array([[3, 19], [0, 7]])
    some, mean = compiled(lambda: run(at=at))(), compiled(lambda: run(reduce="mean"))()
    for row, ids in enumerate(IDS):
        logits, theirs = dense_forward(params, ids, config)
        close(some.logits[row], logits[at[row]])
        for site, values in theirs.items():
            assert some.activations[site].shape[-1] == values.shape[-1]
            close(some.activations[site][:, row], values[:, at[row]])
            close(mean.activations[site][:, row], values.mean(1))
    assert site_widths(config)["up"] == config.experts * config.intermediate_size
    np.testing.assert_array_equal(some.activations["act"] == 0, some.activations["up"] == 0)
    shown = np.asarray(some.activations["up"] != 0).reshape(
        -1, config.experts, config.intermediate_size
    )
    assert (shown.any(-1).sum(-1) == config.experts_per_token).all()


def test_multipliers_reach_the_chosen_experts_only_after_routing():
    _, config, params = model_of("mixtral")
    rng = np.random.default_rng(0)
    widths = site_widths(config)
    scales = {
        s: rng.uniform(0, 2, (config.num_layers, widths[s])).astype(np.float32) for s in SITES
    }
    by_row = {s: np.stack([v, v[:, ::-1]]) for s, v in scales.items()}
    by_token = {
        s: rng.uniform(0, 2, (config.num_layers, 1, IDS.shape[1], widths[s])).astype(np.float32)
        for s in SITES
    }
    run = compiled(
        lambda scales: forward(params, IDS, config=config, at="all", scales=scales, capture=SITES)
    )
    for given, values_of in (
        (scales, lambda site, row: scales[site][:, None]),
        (by_row, lambda site, row: by_row[site][row][:, None]),
        (by_token, lambda site, row: by_token[site][:, 0]),
        ({"up": np.full((config.num_layers, 1), 0.5, np.float32)}, None),
    ):
        out = run(given)
        for row, ids in enumerate(IDS):

            def scale(site, layer, values, row=row, values_of=values_of):
                if values_of is None:
                    return values * 0.5 if site == "up" else values
                return values * values_of(site, row)[layer]

            logits, seen = dense_forward(params, ids, config, scale)
            close(out.logits[row], logits)
            close(out.activations["act"][:, row], seen["act"])


@pytest.mark.parametrize("several", [False, slow(True)])
def test_gradients_equal_the_dense_model(several):
    """With respect to multipliers, kernels and the embedding, through the router too."""
    _, config, params = model_of("qwen3-moe")
    ids = IDS[0, :9]
    ones = jnp.ones((config.num_layers, site_widths(config)["act"]))

    def ours(params, scales):
        out = forward(params, ids[None], config=config, scales={"act": scales})
        return jax.nn.log_softmax(out.logits[0, 0])[7]

    def theirs(params, scales):
        def scale(site, layer, values):
            return values * scales[layer] if site == "act" else values

        return jax.nn.log_softmax(dense_forward(params, ids, config, scale)[0][-1])[7]

    found = compiled(jax.grad(ours, (0, 1)))(params, ones)
    wanted = compiled(jax.grad(theirs, (0, 1)))(params, ones)
    jax.tree.map(lambda a, b: close(a, b, 1e-4), found, wanted)
    if several:
        scales = jnp.stack([ones, 0.5 * ones])
        both = compiled(jax.vmap(jax.grad(ours, (0, 1)), (None, 0)))(params, scales)
        for number in range(2):
            one = compiled(jax.grad(theirs, (0, 1)))(params, scales[number])
            jax.tree.map(lambda a, b, n=number: close(a[n], b, 1e-4), both, one)


@pytest.mark.parametrize(
    ("rows", "kind"),
    [
        (64, "random"),
        (64, "one expert"),
        *(slow(rows, kind) for rows in (1, 5, 300) for kind in ("random", "one expert")),
    ],
)
def test_products_by_expert(rows, kind):
    rng = np.random.default_rng(rows)
    count, width = (3, 6) if rows == 300 else (8, 6)
    x = jnp.asarray(rng.normal(size=(rows, width)), jnp.float32)
    kernels = jnp.asarray(rng.normal(size=(count, width, 5)), jnp.float32)
    expert = rng.integers(0, count, rows) if kind == "random" else np.full(rows, 2)

    def theirs(x, kernels):
        return jnp.einsum("pi,pio->po", x, kernels[expert])

    def ours(x, kernels):
        return experts.grouped_product(x, kernels, jnp.asarray(expert))

    def both(function):
        def total(x, kernels):
            return (function(x, kernels) ** 3).sum()

        def of_gradient(x):
            return sum((g**2).sum() for g in jax.grad(total, (0, 1))(x, kernels))

        xs, several = jnp.stack([x, 2 * x]), jnp.stack([kernels, kernels[::-1]])
        batched = [
            jax.vmap(jax.value_and_grad(total, (0, 1)), axes)(*given)
            for axes, given in (
                ((0, None), (xs, kernels)),
                ((None, 0), (x, several)),
                ((0, 0), (xs, several)),
            )
        ]
        return (
            function(x, kernels),
            jax.grad(total, (0, 1))(x, kernels),
            jax.grad(of_gradient)(x),
            batched,
        )

    found, wanted = compiled(lambda: both(ours))(), compiled(lambda: both(theirs))()
    jax.tree.map(lambda a, b: close(a, b, 1e-4), found, wanted)
    size = experts.block_size(rows, count)
    number = sum(-(-n // size) for n in np.bincount(expert))
    assert number <= min(rows, -(-rows // size) + count)


def test_a_tie_goes_to_the_expert_with_the_lower_number():
    _, config, params = model_of("mixtral")
    layers = dict(params["layers"])
    kernel = layers["ffn"]["router"]["kernel"]
    layers["ffn"] = {**layers["ffn"], "router": {"kernel": jnp.zeros_like(kernel)}}
    tied = {**params, "layers": layers}
    out = forward(tied, IDS, config=config, at="all", capture=("router",))
    expected = np.broadcast_to([0.5, 0.5, 0, 0], out.activations["router"].shape)
    np.testing.assert_array_equal(out.activations["router"], expected)
    close(out.logits[0], dense_forward(tied, IDS[0], config)[0])


def test_all_tokens_choose_one_expert():
    _, config, params = model_of("mixtral-window")
    layers = dict(params["layers"])
    kernel = np.zeros_like(layers["ffn"]["router"]["kernel"])
    layers["ffn"] = {**layers["ffn"], "router": {"kernel": jnp.asarray(kernel)}}
    same = {**params, "layers": layers}
    out = forward(same, IDS, config=config, at="all", capture=("router",))
    assert (np.asarray(out.activations["router"]) == [1, 0, 0, 0]).all()
    close(out.logits[1], dense_forward(same, IDS[1], config)[0])


RULES = {
    **{name: PRESETS[name] for name in ("tensor", "fsdp", "data")},
    "experts": ShardingRules(intermediate=None, experts="model"),
}


def shown(spec):
    """A `PartitionSpec` in short: "-" an axis that is whole, "dm" one over data and model."""
    entries = [(entry,) if isinstance(entry, str) else entry or ("-",) for entry in spec]
    return ",".join("".join(name[0] for name in entry) for entry in entries)


@pytest.mark.parametrize(
    ("rules", "router", "up", "down"),
    [
        (PRESETS["tensor"], "-,-,-", "-,-,-,m", "-,-,m,-"),
        (PRESETS["fsdp"], "-,dm,-", "-,-,dm,-", "-,-,-,dm"),
        (PRESETS["fsdp-tensor"], "-,d,-", "-,-,d,m", "-,-,m,d"),
        (PRESETS["data"], "-,-,-", "-,-,-,-", "-,-,-,-"),
        (RULES["experts"], "-,-,m", "-,m,-,-", "-,m,-,-"),
    ],
)
def test_shardings_of_experts(rules, router, up, down):
    config = tiny_config(experts=8, experts_per_token=2, intermediate_size=12)
    ffn = partition_specs(config, {"data": 2, "model": 4}, rules)["layers"]["ffn"]
    found = {name: shown(module["kernel"]) for name, module in ffn.items()}
    assert found == {"router": router, "up": up, "gate": up, "down": down}


@pytest.mark.parametrize("preset", ["tensor", "experts", slow("fsdp"), slow("data")])
def test_a_mesh_of_two_devices(preset):
    _, config, params = model_of("qwen3-moe")
    mesh = make_mesh("2x1" if preset in ("fsdp", "data") else "1x2")
    there = shard_params(params, config, mesh, RULES[preset])
    kernel = there["layers"]["ffn"]["down"]["kernel"]
    whole = kernel.sharding.shard_shape(kernel.shape)
    split = {"tensor": 2, "fsdp": 3, "experts": 1}.get(preset)
    assert [n for n, size in enumerate(whole) if size != kernel.shape[n]] == [
        axis for axis in (split,) if axis is not None
    ]
    scales = {"up": np.linspace(0, 1, 96, dtype=np.float32)[None].repeat(3, 0)}

    def run(params):
        def total(scales):
            out = forward(params, IDS, config=config, scales=scales, capture=("act",))
            return out.logits.std(), out

        return jax.value_and_grad(total, has_aux=True)(scales)

    found, wanted = compiled(run)(there), compiled(run)(params)
    jax.tree.map(lambda a, b: close(a, b, 1e-4), found, wanted)


@pytest.mark.parametrize("what", ["forward", slow("gradient")])
def test_memory_does_not_grow_with_experts(what):
    """What a program needs beside its arguments, at a fixed number of chosen experts."""

    def needed(count):
        config = tiny_config(experts=count, experts_per_token=2, num_layers=2)
        config = dataclasses.replace(config, hidden_size=64, intermediate_size=128)
        params = jax.eval_shape(lambda: tiny_params(config))
        ids = jax.ShapeDtypeStruct((1, 128), jnp.int32)

        def run(params, ids):
            def logits(embedding):
                changed = {**params, "embed": {"embedding": embedding}}
                return forward(changed, ids, config=config).logits.sum()

            value = logits if what == "forward" else jax.grad(logits)
            return value(params["embed"]["embedding"])

        program = jax.jit(run).lower(params, ids).compile()
        return program.memory_analysis().temp_size_in_bytes

    kernel = 4 * 64 * 128
    few, many = needed(4), needed(32)
    # Of 28 experts more, the router's own probabilities, and no copies of kernels.
    assert many - few < 28 * kernel / 4


def test_what_a_configuration_with_experts_cannot_have():
    with pytest.raises(ConfigError, match="experts_per_token"):
        tiny_config(experts=4)
    with pytest.raises(ConfigError, match="add no bias"):
        tiny_config(experts=4, experts_per_token=2, biases=("up",))
    config = tiny_config(experts=4, experts_per_token=2)
    params, ids = tiny_params(config), random_tokens(config, (1, 3))
    terms = {"ffn.down": (jnp.zeros((3, 160, 1)), jnp.zeros((3, 1, 32)))}
    with pytest.raises(ConfigError, match="each expert of this model has its own"):
        forward(params, ids, config=config, low_rank=terms)
    with pytest.raises(ConfigError, match=r"\(3, 160\)"):
        forward(params, ids, config=config, scales={"up": np.ones((3, 40), np.float32)})
    with pytest.raises(ConfigError, match="router"):
        forward(tiny_params(tiny_config()), ids, config=tiny_config(), capture=("router",))
