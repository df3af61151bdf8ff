"""Attention in blocks: against plain loops, PyTorch and plain attention; memory of long prompts."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.models import compiled, random_tokens, tiny_config, tiny_params

from jaxneurons import Quadrature, forward, init_cache
from jaxneurons.convert.hf import read_hf
from jaxneurons.engine.attribution import attribute
from jaxneurons.engine.row_memory import memory_bound
from jaxneurons.engine.rows import prefill
from jaxneurons.model.blockwise import causal_attention
from jaxneurons.model.layers import attention, visible
from jaxneurons.model.sharding import batch_sharding, shard_params


@pytest.fixture
def small_blocks(monkeypatch):
    """So that a prompt of a few tokens is cut into many blocks."""
    monkeypatch.setattr("jaxneurons.model.blockwise.MOST_SCORES", 48)


# Query heads, key/value heads, window, queries, keys that a cache has room for, tokens in it.
CASES = {
    "mha": (2, 2, None, 24, 24, (0, 0)),
    "gqa": (4, 2, None, 24, 24, (0, 0)),
    "mqa": (3, 1, None, 24, 24, (0, 0)),
    "window": (4, 2, 5, 24, 24, (0, 0)),
    "window-of-one": (2, 2, 1, 24, 24, (0, 0)),
    "odd": (4, 2, None, 29, 29, (0, 0)),
    "five": (2, 1, None, 5, 11, (6, 1)),
    "cache": (4, 2, None, 23, 40, (17, 3)),
    "cache-window": (4, 2, 7, 23, 40, (17, 0)),
}


def drawn(case):
    heads, kv_heads, window, queries, held, start = CASES[case]
    rng = np.random.default_rng(len(case))
    draw = functools.partial(rng.normal, size=None)
    q = jnp.asarray(draw(scale=2, size=(2, queries, heads, 4)), jnp.float32)
    k = jnp.asarray(draw(scale=2, size=(2, held, kv_heads, 4)), jnp.float32)
    v = jnp.asarray(draw(size=(2, held, kv_heads, 4)), jnp.float32)
    positions = jnp.asarray(start)[:, None] + jnp.arange(queries)
    keys = jnp.broadcast_to(jnp.arange(held), (2, held))
    return q, k, v, positions, keys, window


def looped(q, k, v, positions, keys, window):
    """One query and one head at a time, in float64."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    out = np.zeros(q.shape)
    group = q.shape[2] // k.shape[2]
    for b, i, h in np.ndindex(q.shape[:3]):
        gap = int(positions[b, i]) - np.asarray(keys[b])
        seen = (gap >= 0) & (gap < (window or 10**9))
        scores = k[b, seen, h // group] @ q[b, i, h] / np.sqrt(q.shape[-1])
        weights = np.exp(scores - scores.max())
        out[b, i, h] = weights @ v[b, seen, h // group] / weights.sum()
    return out


SOON = ("gqa", "window", "five", "cache-window")


@pytest.mark.parametrize(
    "case",
    [case if case in SOON else pytest.param(case, marks=pytest.mark.slow) for case in CASES],
)
def test_values_and_gradients_are_those_of_plain_attention(case, small_blocks):
    q, k, v, positions, keys, window = drawn(case)
    config = tiny_config(head_dim=q.shape[-1])
    ways = {
        "blocks": lambda q, k, v: causal_attention(q, k, v, positions, keys, window, config),
        "plain": lambda q, k, v: attention(q, k, v, visible(positions, keys, window), config),
    }
    jaxpr = str(jax.make_jaxpr(ways["blocks"])(q, k, v))
    assert "scan" in jaxpr  # it is cut
    weights = jnp.asarray(np.random.default_rng(9).normal(size=q.shape), jnp.float32)
    found = {}
    for name, attend in ways.items():

        def run(q, k, v, attend=attend):
            out = attend(q, k, v)
            return (out * weights).sum(), out

        found[name] = compiled(jax.value_and_grad(run, argnums=(0, 1, 2), has_aux=True))(q, k, v)
    (_, values), gradients = found["blocks"]
    (_, expected), theirs = found["plain"]
    np.testing.assert_allclose(values, expected, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(values, looped(q, k, v, positions, keys, window), atol=3e-6)
    for one, other in zip(gradients, theirs, strict=True):
        # With a window of one, queries and keys have no gradient at all.
        assert jnp.linalg.norm(one - other) < 1e-6 * max(1.0, float(jnp.linalg.norm(other)))


def test_inside_vmap(small_blocks):
    q, k, v, positions, keys, window = drawn("cache-window")
    attend = functools.partial(
        causal_attention,
        positions=positions,
        keys=keys,
        window=window,
        config=tiny_config(head_dim=q.shape[-1]),
    )
    scaled = jnp.stack([q, 2 * q, -q])
    many = compiled(jax.vmap(lambda q: attend(q, k, v)))(scaled)
    one = compiled(lambda q: attend(q, k, v))
    for mine, q in zip(many, scaled, strict=True):
        np.testing.assert_allclose(mine, one(q), rtol=1e-6, atol=1e-6)


# --- the whole model ------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_a_long_prompt_has_the_logits_of_transformers(family, tmp_path):
    """Longer than what is not cut, with a window shorter and longer than a block."""
    torch = pytest.importorskip("torch")
    import transformers

    kind = {"llama": "Llama", "mistral": "Mistral"}[family]
    window = {"sliding_window": 700} if family == "mistral" else {}
    torch.manual_seed(0)
    model = getattr(transformers, f"{kind}ForCausalLM")(
        getattr(transformers, f"{kind}Config")(
            vocab_size=48,
            hidden_size=32,
            intermediate_size=40,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=2048,
            initializer_range=0.2,
            rms_norm_eps=1e-5,
            attn_implementation="eager",
            bos_token_id=None,
            eos_token_id=None,
            **window,
        )
    ).eval()
    model.save_pretrained(tmp_path)
    config, params = read_hf(tmp_path)
    tokens = random_tokens(config, (1, 1301))
    with torch.no_grad():
        ids = torch.tensor(np.asarray(tokens), dtype=torch.long)
        expected = model.double()(ids).logits.numpy()
    run = compiled(functools.partial(forward, config=config, at="all"))
    assert expected.std() > 0.5
    logits = run(params, tokens).logits
    np.testing.assert_allclose(logits, expected, atol=2e-5, rtol=1e-5)


MODELS = {
    "gqa": tiny_config(num_layers=2),
    "some-windows": tiny_config(num_layers=2, sliding_window=6, sliding_layers=(False, True)),
}


@pytest.mark.parametrize("name", MODELS)
def test_a_cache_that_holds_something_already(name, monkeypatch):
    config, params = MODELS[name], tiny_params(MODELS[name])
    tokens, lengths = random_tokens(config, (2, 40)), np.array([40, 31])
    plain = compiled(functools.partial(forward, config=config, at="all"))
    full = [plain(params, row[None, :n]).logits[0] for row, n in zip(tokens, lengths, strict=True)]
    monkeypatch.setattr("jaxneurons.model.blockwise.MOST_SCORES", 48)
    run = compiled(lambda *args, **options: forward(*args, config=config, at="all", **options))
    first = np.array([17, 9])
    begun = run(params, tokens[:, :17], lengths=jnp.asarray(first), cache=init_cache(config, 2, 45))
    rest = np.zeros((2, 23), np.int32)
    for row in range(2):
        rest[row, : lengths[row] - first[row]] = tokens[row, first[row] : lengths[row]]
    out = run(params, rest, lengths=jnp.asarray(lengths - first), cache=begun.cache)
    for row in range(2):
        got = np.concatenate(
            [begun.logits[row, : first[row]], out.logits[row, : lengths[row] - first[row]]]
        )
        np.testing.assert_allclose(got, full[row], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("shape", [(2, 1), (1, 2)], ids=["data", "model"])
@pytest.mark.parametrize("explicit", [False, True])
def test_over_two_devices(shape, explicit, monkeypatch):
    config = tiny_config(num_layers=2)
    params, tokens = tiny_params(config), random_tokens(config, (2, 21))
    expected = compiled(functools.partial(forward, config=config, at="all"))(params, tokens)
    monkeypatch.setattr("jaxneurons.model.blockwise.MOST_SCORES", 48)
    kind = jax.sharding.AxisType.Explicit if explicit else jax.sharding.AxisType.Auto
    mesh = jax.make_mesh(shape, ("data", "model"), axis_types=(kind, kind))
    run = compiled(lambda params, tokens: forward(params, tokens, config=config, at="all"))
    out = run(shard_params(params, config, mesh), jax.device_put(tokens, batch_sharding(mesh)))
    np.testing.assert_allclose(out.logits, expected.logits, atol=1e-5, rtol=1e-5)


# --- memory, from the compiled programs -----------------------------------------------------------

WIDE = tiny_config(num_layers=4, num_heads=8, num_kv_heads=2, max_position=16384)


@functools.cache
def shapes(config):
    return jax.eval_shape(functools.partial(tiny_params, config))


def needed(function, *args):
    memory = compiled(function).lower(*args).compile().memory_analysis()
    if memory is None:
        pytest.skip("this backend does not say")
    return memory.temp_size_in_bytes + memory.output_size_in_bytes


def ids(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.int32)


def run_prefill(params, tokens, targets, lengths):
    return prefill(params, tokens, targets, config=WIDE, lengths=lengths, capture=("up",))


def test_memory_of_the_forward_pass_grows_with_the_length():
    found = [needed(run_prefill, shapes(WIDE), ids(1, n), ids(1, 1), ids(1)) for n in (4096, 8192)]
    fixed = 3 * 4 * WIDE.num_heads << 20  # of a block
    assert found[1] < 2.1 * found[0]
    assert found[1] - fixed < memory_bound(WIDE, 8192, memory_budget=0)


@pytest.mark.slow
def test_memory_of_its_gradient_grows_with_the_length():
    def loss(params, tokens):
        return forward(params, tokens, config=WIDE).logits.sum()

    found = [needed(jax.grad(loss), shapes(WIDE), ids(1, n)) for n in (4096, 8192)]
    assert found[1] < 2.1 * found[0]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("prompts", "tokens", "rule"),
    [(8, 512, "gauss"), (4, 1024, "gauss"), (1, 2048, "gauss"), (1, 8192, "adaptive")],
)
def test_locating_stays_within_its_bound(prompts, tokens, rule):
    budget = 1 << 26

    def run(params, tokens, targets, lengths):
        pre = run_prefill(params, tokens, targets, lengths)
        quadrature = Quadrature(rule, steps=16)
        return attribute(params, pre, config=WIDE, quadrature=quadrature, memory_budget=budget)

    found = needed(run, shapes(WIDE), ids(prompts, tokens), ids(prompts, 1), ids(prompts))
    assert found < memory_bound(WIDE, tokens, prompts=prompts, memory_budget=budget)
