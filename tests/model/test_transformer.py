"""The model against PyTorch transformers, and against itself."""

import functools
import json
from importlib import resources

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.models import compiled, random_tokens, tiny_config, tiny_params

from jaxneurons import SITES, ConfigError, forward, init_cache
from jaxneurons.convert.hf import read_hf
from jaxneurons.model import layers, rotary
from jaxneurons.model.transformer import Transformer
from jaxneurons.neurons.sets import site_width


def apply(config, **options):
    make = jax.jit if config.num_layers > 3 else compiled
    return make(functools.partial(forward, config=config, **options))


# --- PyTorch transformers on tiny random models ---------------------------------------------------


def torch_model(family="llama", **changes):
    torch = pytest.importorskip("torch")
    import transformers

    options = {
        "vocab_size": 48,
        "hidden_size": 32,
        "intermediate_size": 40,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "initializer_range": 0.2,
        "rms_norm_eps": 1e-5,
        "attn_implementation": "eager",
        "bos_token_id": None,
        "eos_token_id": None,
    } | changes
    kinds = {
        "llama": (transformers.LlamaConfig, transformers.LlamaForCausalLM),
        "mistral": (transformers.MistralConfig, transformers.MistralForCausalLM),
    }
    torch.manual_seed(0)
    make_config, make_model = kinds[family]
    model = make_model(make_config(**options)).eval().requires_grad_(False)
    for name, weights in model.named_parameters():
        if "norm" in name:
            weights.uniform_(0.5, 1.5)
    return model.double()  # the oracle's own rounding is not to count


def ours(model, directory):
    model.float().save_pretrained(directory)
    model.double()
    return read_hf(directory)


def torch_logits(model, tokens):
    import torch

    with torch.no_grad():
        return model(torch.tensor(np.asarray(tokens), dtype=torch.long)).logits.numpy()


@pytest.mark.parametrize("head_dim", [8, 12], ids=["heads", "wide-heads"])
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("kv_heads", [4, 2, 1], ids=["mha", "gqa", "mqa"])
@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_logits_are_those_of_transformers(family, kv_heads, tied, head_dim, tmp_path):
    window = {"sliding_window": 6} if family == "mistral" else {}
    model = torch_model(
        family, num_key_value_heads=kv_heads, tie_word_embeddings=tied, head_dim=head_dim, **window
    )
    config, params = ours(model, tmp_path)
    assert (config.head_dim, config.tied) == (head_dim, tied)
    assert config.sliding_window == window.get("sliding_window")
    tokens = random_tokens(config, (2, 20))
    expected = torch_logits(model, tokens)
    assert expected.std() > 0.5  # a model that says nothing proves nothing
    logits = apply(config, at="all")(params, tokens).logits
    assert logits.dtype == jnp.float32
    np.testing.assert_allclose(logits, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "default", "rope_theta": 500.0},
        {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0},
        {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 16,
            "rope_theta": 10000.0,
        },
    ],
    ids=lambda rope: rope["rope_type"],
)
def test_rope_scaling_beyond_the_original_context(rope, tmp_path):
    model = torch_model(rope_parameters=rope, max_position_embeddings=128, head_dim=16)
    config, params = ours(model, tmp_path)
    tokens = random_tokens(config, (1, 100))
    logits = apply(config, at="all")(params, tokens).logits
    np.testing.assert_allclose(logits, torch_logits(model, tokens), atol=2e-5, rtol=1e-5)
    # The test can tell: without the scaling the logits are others.
    plain = tiny_config(**{**config.__dict__, "rope": type(config.rope)(theta=config.rope.theta)})
    change = np.abs(apply(plain, at="all")(params, tokens).logits - logits).max()
    assert (change > 0.01) == (rope["rope_type"] != "default")


@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_captured_activations_are_those_of_torch_hooks(family, tmp_path):
    window = {"sliding_window": 4} if family == "mistral" else {}
    model = torch_model(family, **window)
    config, params = ours(model, tmp_path)
    lengths = [11, 7]
    tokens = random_tokens(config, (2, 11))
    seen = []
    for row, length in zip(tokens, lengths, strict=True):
        seen.append(record(model, row[:length]))
    at = jnp.array([[0, 10], [3, 6]])
    names = (*SITES, "residual")
    run = functools.partial(apply, config, capture=names)
    picked = run(at=at)(params, tokens, lengths=jnp.array(lengths)).activations
    mean = run(reduce="mean")(params, tokens, lengths=jnp.array(lengths)).activations
    assert set(picked) == set(mean) == set(names)
    for name in names:
        for row in range(2):
            for layer in range(config.num_layers):
                theirs = seen[row][name, layer]
                close = functools.partial(np.testing.assert_allclose, atol=1e-5, rtol=1e-5)
                close(picked[name][layer, row], theirs[np.asarray(at[row])], err_msg=name)
                close(mean[name][layer, row], theirs.mean(0), err_msg=name)


def record(model, tokens):
    """Every site's activations [seq, width] of one prompt, by (site, layer), from hooks."""
    seen, handles = {}, []

    def keep(key):
        return lambda value: seen.__setitem__(key, value[0].numpy().copy())

    def outputs(key):
        return lambda _module, _inputs, output, keep=keep(key): keep(output)

    def inputs(key):
        return lambda _module, args, keep=keep(key): keep(args[0])

    for index, layer in enumerate(model.model.layers):
        for module, sites in ((layer.self_attn, "qkvo"), (layer.mlp, ("up", "gate", "down"))):
            for site in sites:
                projection = getattr(module, f"{site}_proj")
                handles.append(projection.register_forward_hook(outputs((site, index))))
        handles.append(layer.mlp.down_proj.register_forward_pre_hook(inputs(("act", index))))
        handles.append(layer.input_layernorm.register_forward_pre_hook(inputs(("residual", index))))
    torch_logits(model, tokens[None])
    for handle in handles:
        handle.remove()
    return seen


# --- the cache, padding and positions -------------------------------------------------------------

SHAPES = {
    "gqa": tiny_config(),
    "mqa-tied-window": tiny_config(num_kv_heads=1, tied=True, sliding_window=3),
}


@pytest.mark.parametrize("shape", SHAPES)
def test_prefill_and_decode_equal_the_full_pass(shape):
    config = SHAPES[shape]
    params = tiny_params(config)
    tokens, lengths = random_tokens(config, (3, 12)), [12, 9, 10]
    full = [
        apply(config, at="all")(params, row[None, :n]).logits[0]
        for row, n in zip(tokens, lengths, strict=True)
    ]
    # Ragged chunks: of 5, 2 and 4 tokens, then of 3, 3 and 2, then one by one.
    starts = np.zeros(3, int)
    cache = init_cache(config, 3, 16)
    run = apply(config, at="all")
    for chunk in ([5, 2, 4], [3, 3, 2], *[[1, 1, 1]] * 4):
        piece = np.full((3, max(chunk)), 7, np.int32)  # padding is a token like any other
        for row in range(3):
            part = np.asarray(tokens[row, starts[row] : starts[row] + chunk[row]])
            piece[row, : len(part)] = part
        out = run(params, jnp.array(piece), lengths=jnp.array(chunk), cache=cache)
        cache = out.cache
        for row in range(3):
            ours = out.logits[row, : chunk[row]]
            theirs = full[row][starts[row] : starts[row] + chunk[row]]
            np.testing.assert_allclose(ours[: len(theirs)], theirs, atol=1e-5, rtol=1e-5)
        starts += chunk
    np.testing.assert_array_equal(cache.length, starts)


@pytest.mark.parametrize("shape", SHAPES)
def test_right_padding_and_company_change_nothing(shape):
    config = SHAPES[shape]
    params = tiny_params(config)
    tokens, lengths = random_tokens(config, (3, 9)), jnp.array([9, 4, 1])
    other = jnp.where(jnp.arange(9) < lengths[:, None], tokens, (tokens + 5) % config.vocab_size)
    names = ("up", "residual")
    run = apply(config, capture=names)
    one = run(params, tokens, lengths=lengths)
    two = run(params, other, lengths=lengths)
    chex.assert_trees_all_equal(one, two)
    for row in range(3):
        alone = run(params, tokens[row, None, : lengths[row]])
        np.testing.assert_allclose(alone.logits[0], one.logits[row], atol=1e-5, rtol=1e-5)
        for name in names:
            np.testing.assert_allclose(
                alone.activations[name][:, 0], one.activations[name][:, row], atol=1e-5, rtol=1e-5
            )
    mean = apply(config, capture=names, reduce="mean")
    jax.tree.map(
        np.testing.assert_array_equal,
        mean(params, tokens, lengths=lengths).activations,
        mean(params, other, lengths=lengths).activations,
    )


def test_positions_asked_for():
    config = tiny_config()
    params, tokens = tiny_params(config), random_tokens(config, (2, 6))
    everywhere = apply(config, at="all")(params, tokens)
    at = jnp.array([[1, 5, 0], [4, 4, 2]])
    some = apply(config)(params, tokens, at=at)
    rows = jnp.arange(2)[:, None]
    np.testing.assert_allclose(some.logits, everywhere.logits[rows, at], atol=1e-6)
    np.testing.assert_allclose(some.final, everywhere.final[rows, at], atol=1e-6)
    last = apply(config)(params, tokens, lengths=jnp.array([3, 6]))
    np.testing.assert_allclose(last.logits[0, 0], everywhere.logits[0, 2], atol=1e-5)
    assert last.cache is None


# --- scales ---------------------------------------------------------------------------------------

CONFIG = tiny_config(num_layers=2)
PARAMS = tiny_params(CONFIG)
RUN = apply(CONFIG, at="all")

# Where the neurons of a site live: the parameter, and the axis of its [layer, in, out] kernel.
HOME = {
    "up": ("ffn", "up", 2),
    "gate": ("ffn", "gate", 2),
    "act": ("ffn", "down", 1),
    "down": ("ffn", "down", 2),
    "q": ("attn", "q", 2),
    "k": ("attn", "k", 2),
    "v": ("attn", "v", 2),
    "o": ("attn", "o", 2),
}


def edited(params, site, scales):
    """The parameters with the site's rows or columns multiplied by scales [layer, width]."""
    group, name, axis = HOME[site]
    wide = scales[:, None, :] if axis == 2 else scales[:, :, None]
    edit = jax.tree.map(lambda x: x, params)
    edit["layers"][group][name]["kernel"] = params["layers"][group][name]["kernel"] * wide
    return edit


@settings(max_examples=40, deadline=None, derandomize=True)
@given(data=st.data(), site=st.sampled_from(SITES))
def test_scaling_a_site_is_an_edit_of_parameters(data, site):
    width = site_width(CONFIG, site)
    value = st.sampled_from([0.0, 0.5, 2.0, -1.0])
    scales = np.ones((CONFIG.num_layers, width), np.float32)
    for _ in range(data.draw(st.integers(1, 4))):
        layer = data.draw(st.integers(0, CONFIG.num_layers - 1))
        scales[layer, data.draw(st.integers(0, width - 1))] = data.draw(value)
    tokens = random_tokens(CONFIG, (2, 5), seed=data.draw(st.integers(0, 99)))
    scaled = RUN(PARAMS, tokens, scales={site: jnp.asarray(scales)}).logits
    expected = RUN(edited(PARAMS, site, jnp.asarray(scales)), tokens).logits
    np.testing.assert_allclose(scaled, expected, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("site", SITES)
def test_every_site_matters_and_one_is_the_identity(site):
    tokens = random_tokens(CONFIG, (2, 5))
    plain = RUN(PARAMS, tokens).logits
    width = site_width(CONFIG, site)
    one = jnp.ones((CONFIG.num_layers, width))
    np.testing.assert_array_equal(RUN(PARAMS, tokens, scales={site: one}).logits, plain)
    half = RUN(PARAMS, tokens, scales={site: 0.5 * one}).logits
    assert np.abs(half - plain).max() > 1e-3


def test_scales_of_single_prompts_and_positions():
    tokens = random_tokens(CONFIG, (2, 5))
    plain = RUN(PARAMS, tokens).logits
    scales = jnp.ones((2, 2, 5, CONFIG.intermediate_size)).at[1, 1, 3].set(0.0)
    out = RUN(PARAMS, tokens, scales={"up": scales}).logits
    same = np.abs(out - plain).max(-1) < 1e-5
    # Layer 1 is the last: position 4 does not see what position 3 becomes there.
    assert same.tolist() == [[True] * 5, [True, True, True, False, True]]


def test_a_set_for_each_row():
    """A batch axis in front of [layer, width]: each row as if it were alone with its own."""
    tokens = random_tokens(CONFIG, (3, 5))  # more rows than layers: no axis taken for another
    scales = np.ones((3, 2, CONFIG.intermediate_size), np.float32)
    scales[0, 0, :9], scales[2, 1, 5:20] = 0, 3
    together = RUN(PARAMS, tokens, scales={"up": scales}).logits
    for row in range(3):
        alone = RUN(PARAMS, tokens[row : row + 1], scales={"up": scales[row]}).logits[0]
        np.testing.assert_allclose(together[row], alone, atol=1e-5)
    assert np.abs(together - RUN(PARAMS, tokens).logits).max((1, 2)).argmin() == 1


def test_batches_of_counterfactuals_by_vmap_and_gradients():
    tokens = random_tokens(CONFIG, (1, 5))
    scales = jnp.ones((3, 2, CONFIG.intermediate_size)).at[1, 0, 4].set(0).at[2, 1, 7].set(2)

    def logit(scales):
        return forward(PARAMS, tokens, config=CONFIG, scales={"act": scales}).logits[0, 0, 3]

    together = jax.jit(jax.vmap(logit))(scales)
    np.testing.assert_allclose(together, [jax.jit(logit)(s) for s in scales], rtol=1e-5)
    step = 1e-2
    gradient = jax.jit(jax.grad(logit))(scales[0])
    index = int(jnp.abs(gradient[0]).argmax())
    bump = jnp.zeros_like(scales[0]).at[0, index].set(step)
    slope = (logit(scales[0] + bump) - logit(scales[0] - bump)) / (2 * step)
    assert gradient[0, index] == pytest.approx(float(slope), rel=1e-2)


# --- the scan, the module, the dtype --------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES)
def test_scan_is_a_loop_over_blocks(shape):
    config = SHAPES[shape]
    params, tokens = tiny_params(config), random_tokens(config, (2, 7))
    positions = jnp.broadcast_to(jnp.arange(7), (2, 7))
    angles = rotary.rope_angles(positions, config, jnp.full(len(tokens), positions.shape[1]))
    mask = layers.visible(positions, positions, config.sliding_window)
    x = params["embed"]["embedding"][tokens]
    for index in range(config.num_layers):
        x, _ = layers.block(
            jax.tree.map(lambda a, index=index: a[index], params["layers"]),
            x,
            config=config,
            rotate=lambda heads: rotary.rotate(heads, angles),
            attend=lambda q, k, v: layers.attention(q, k, v, mask, config),
        )
    expected = layers.unembed(params, x, config)
    logits = apply(config, at="all")(params, tokens).logits
    np.testing.assert_allclose(logits, expected, atol=1e-5, rtol=1e-5)
    as_module = Transformer(config).apply({"params": params}, tokens, at="all")
    np.testing.assert_allclose(as_module.logits, expected, atol=1e-5, rtol=1e-5)


def test_probability_of_a_token_is_softmax():
    for tied in (False, True):
        config = tiny_config(tied=tied)
        params, tokens = tiny_params(config), random_tokens(config, (2, 4))
        out = apply(config, at="all")(params, tokens)
        targets = random_tokens(config, (2, 4), seed=1)
        p = layers.token_probability(params, out.final, targets, config)
        softmax = jax.nn.softmax(out.logits, axis=-1)
        expected = jnp.take_along_axis(softmax, targets[..., None], -1)[..., 0]
        np.testing.assert_allclose(p, expected, rtol=1e-5)


def test_bfloat16_parameters():
    config = tiny_config()
    params, tokens = tiny_params(config), random_tokens(config, (2, 6))
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
    names = ("up", "residual")
    cache = init_cache(config, 2, 8, jnp.bfloat16)
    out = apply(config, capture=names)(half, tokens, cache=cache)
    assert out.logits.dtype == jnp.float32
    assert out.final.dtype == out.activations["up"].dtype == out.cache.k.dtype == jnp.bfloat16
    wide = apply(config, capture=names)(params, tokens)
    # Bfloat16 has 8 bits: logits of a few units are right to a few percent of their spread.
    assert np.abs(out.logits - wide.logits).max() < 0.1 * np.std(wide.logits)


# --- SmolLM2 --------------------------------------------------------------------------------------

PROMPTS = (
    "The capital of France is",
    "The capital of Germany is the city of",
    "Water boils at a temperature of",
    "In 1969, Neil Armstrong",
    "def fibonacci(n):\n    ",
    "Q: What is 12 + 30?\nA:",
    "Once upon a time, in a small village by the sea,",
    "The chemical symbol for gold is",
    "import numpy as np\n\nx = np.",
    "Photosynthesis is the process by which",
    "Dear Sir or Madam,\n\n",
    "1, 2, 3, 5, 8, 13,",
    "Le chat est sur la",
    "The author of Romeo and Juliet is",
    "<|im_start|>user\nName a colour.<|im_end|>\n<|im_start|>assistant\n",
    "Response: The answer is B. Response: The answer is",
    "   leading spaces and\ttabs",
    "The opposite of hot is",
    "Mount Everest is the highest",
    "A triangle has three",
)


def packaged_facts():
    path = resources.files("jaxneurons.data") / "facts.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()]


def ids_of(lm, text):
    return np.asarray(lm.tokenizer(text)["input_ids"], np.int32)


@pytest.mark.slow
@pytest.mark.smollm2
def test_smollm2_logits(smollm2, torch_smollm2):
    model, _ = torch_smollm2
    facts = [fact for group in packaged_facts() for fact in group["prompts"]]
    long = ids_of(smollm2, " ".join(facts))[:500]
    assert len(long) == 500
    run = apply(smollm2.config, at="all")
    for ids in (ids_of(smollm2, PROMPTS[6]), long):
        logits = np.asarray(run(smollm2.params, jnp.asarray(ids)[None]).logits)
        np.testing.assert_allclose(logits, torch_logits(model, ids[None]), atol=1e-3, rtol=0)


@pytest.mark.slow
@pytest.mark.smollm2
def test_smollm2_greedy_continuations(smollm2, torch_smollm2):
    model, _ = torch_smollm2
    config, new = smollm2.config, 20
    prompts = [ids_of(smollm2, text) for text in PROMPTS]
    lengths = jnp.array([len(ids) for ids in prompts])
    longest = int(lengths.max())
    padded = jnp.array([np.pad(ids, (0, longest - len(ids))) for ids in prompts])

    @jax.jit
    def greedy(params, tokens, lengths):
        cache = init_cache(config, len(tokens), longest + new)
        out = forward(params, tokens, config=config, lengths=lengths, cache=cache)

        def step(carry, _):
            logits, cache = carry
            token = logits[:, -1].argmax(-1)
            out = forward(params, token[:, None], config=config, cache=cache)
            return (out.logits, out.cache), token

        _, tokens = jax.lax.scan(step, (out.logits, out.cache), None, length=new)
        return tokens.T

    continued = np.asarray(greedy(smollm2.params, padded, lengths))
    # Greedy by induction: one pass of torch over our tokens picks each of them.
    whole = [np.concatenate(pair) for pair in zip(prompts, continued, strict=True)]
    logits = torch_logits(model, [np.pad(ids, (0, longest + new - len(ids))) for ids in whole])
    for row, text in enumerate(PROMPTS):
        picked = logits[row, lengths[row] - 1 : len(whole[row]) - 1].argmax(-1)
        np.testing.assert_array_equal(continued[row], picked, err_msg=text)
    assert smollm2.tokenizer.decode(continued[0]).startswith(" Paris")


@pytest.mark.parametrize(
    ("scales", "capture", "message"),
    [
        ({"upp": (2, 24)}, (), "unknown site 'upp'; did you mean 'up'"),
        ({"up": (24,)}, (), r"scales of site 'up' are of shape \(24,\); this model needs"),
        ({"up": (2, 23)}, (), r"\[layer, width\] = \(2, 24\)"),
        ({"up": (3, 24)}, (), "of shape"),
        ({"down": (1, 3, 16)}, (), "of shape"),
        ({}, ("ups",), "unknown site 'ups'"),
    ],
)
def test_sites_and_multipliers_that_do_not_fit(scales, capture, message):
    """An unknown site would leave the model as it is, in silence."""
    config = tiny_config(num_layers=2, intermediate_size=24, hidden_size=16)
    ones = {site: np.ones(shape, np.float32) for site, shape in scales.items()}
    params, tokens = tiny_params(config), random_tokens(config, (1, 4))
    with pytest.raises(ConfigError, match=message):
        forward(params, tokens, config=config, scales=ones, capture=capture)
