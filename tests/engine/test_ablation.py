"""Ablations against PyTorch with the weights themselves zeroed, and a loop without a cache."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.fixtures import write_lm
from support.models import compiled, tiny_config, tiny_params

import jaxneurons
from jaxneurons import forward
from jaxneurons.engine.ablation import Shape, ablated
from jaxneurons.engine.texts import ablate, generate
from jaxneurons.errors import ConfigError, DataError
from jaxneurons.neurons.controls import random_neurons
from jaxneurons.neurons.sets import FFN, SITES, NeuronSet, stack_scales
from jaxneurons.prompts.batches import by_length

CONFIG = tiny_config()
RNG = np.random.default_rng(0)
PROMPTS = [tuple(RNG.integers(0, CONFIG.vocab_size, n).tolist()) for n in (3, 9, 5, 1, 5, 14, 4)]


@pytest.fixture(scope="module")
def params():
    return tiny_params(CONFIG)


@pytest.fixture(scope="module")
def sets():
    drawn = [random_neurons(CONFIG, SITES, 60, np.random.default_rng(seed)) for seed in range(4)]
    return [NeuronSet(), *drawn]


def run(params, sets, prompts=PROMPTS, **options):
    options = {"config": CONFIG, "shape": Shape(2, 4), "steps": 3, **options}
    found = dict(ablated(params, sets, prompts, **options))
    assert list(found) == list(range(len(sets)))
    return np.stack([found[number] for number in range(len(sets))])


def test_equals_a_loop_without_cache(params, sets):
    step = compiled(
        lambda tokens, scales: (
            forward(params, tokens, config=CONFIG, scales=scales).logits[0, 0].argmax()
        )
    )
    found = run(params, sets)
    for number, one in enumerate(sets):
        scales = one.scales(CONFIG, sites=SITES)
        for prompt, said in zip(PROMPTS, found[number], strict=True):
            tokens = list(prompt)
            for _ in range(3):
                tokens.append(int(step(jnp.asarray([tokens], jnp.int32), scales)))
            assert tokens[len(prompt) :] == said.tolist()
    assert len({found[number].tobytes() for number in range(len(sets))}) > 3


def test_what_shares_a_batch_changes_nothing(params, sets):
    """Bitwise: a resumed run must repeat what the first one would have said."""
    found = run(params, sets, sites=SITES)
    again = run(params, sets[::-1], sites=SITES)[::-1]
    np.testing.assert_array_equal(found, again)
    alone = np.concatenate([run(params, [one], sites=SITES) for one in sets])
    np.testing.assert_array_equal(found, alone)


def test_progress_counts_every_generation(params, sets):
    told = []
    run(params, sets, progress=told.append)
    assert sum(told) == len(sets) * len(PROMPTS)


def test_neurons_of_another_model(params):
    with pytest.raises(DataError, match="belong to another"):
        run(params, [NeuronSet.of(up=[(99, 0)])])


def test_scales_of_several_sets():
    one = NeuronSet.of(up=[(1, 2)])
    scales = stack_scales([one, NeuronSet()], CONFIG, sites=FFN)
    assert set(scales) == set(FFN)
    assert np.argwhere(scales["up"] == 0).tolist() == [[0, 1, 2]]
    assert all((values == 1).sum() >= values.size - 1 for values in scales.values())
    assert stack_scales([one], CONFIG, 2.5)["up"][0, 1, 2] == 2.5
    assert stack_scales([NeuronSet()], CONFIG) == {}


@pytest.mark.parametrize("rows", [1, 3, 64])
def test_batches_by_length(rows):
    found = by_length(PROMPTS, rows)
    assert sorted(np.concatenate([b.index for b in found]).tolist()) == list(range(len(PROMPTS)))
    for batch in found:
        assert len(batch.tokens) == len(batch.lengths) == rows
        for row, i in enumerate(batch.index):
            assert batch.tokens[row, : batch.lengths[row]].tolist() == list(PROMPTS[i])
    with pytest.raises(ConfigError, match="at least 1, got 0"):
        by_length(PROMPTS, 0)


def test_equals_pytorch_with_the_weights_zeroed(tmp_path):
    """Off means off: columns of the projections set to zero, in the other library."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    path = write_lm(tmp_path / "lm")
    lm = jaxneurons.load(path)
    texts = ["The capital of Rome is", "People who live in Paris speak", "Question: A. one", "one"]
    prompts = [tuple(lm.tokenizer(text)["input_ids"]) for text in texts]
    sets = [random_neurons(lm.config, FFN, 60, np.random.default_rng(n)) for n in range(3)]
    found = dict(ablated(lm.params, sets, prompts, config=lm.config, steps=3))
    for number, one in enumerate(sets):
        model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
        with torch.no_grad():
            for site, (layer, index) in one:
                getattr(model.model.layers[layer].mlp, f"{site}_proj").weight[index] = 0
            for row, prompt in enumerate(prompts):
                out = model.generate(
                    torch.tensor([prompt]), max_new_tokens=3, min_new_tokens=3, do_sample=False
                )
                assert out[0, len(prompt) :].tolist() == found[number][row].tolist()


@pytest.fixture(scope="module")
def lm(tmp_path_factory):
    return jaxneurons.load(write_lm(tmp_path_factory.mktemp("lm")))


TEXTS = ["The capital of Rome is", "one", "People who live in Paris speak"]


@pytest.fixture(scope="module")
def plain_texts(lm):
    """One prompt at a time, padded, and no cache: what follows it, as text."""
    step = compiled(
        lambda tokens, length, scales: forward(
            lm.params, tokens, config=lm.config, lengths=length, scales=scales
        ).logits[0, 0]
    )

    def texts(scales, steps=4):
        found = []
        for text in TEXTS:
            ids = prompt = lm.tokenizer(text)["input_ids"]
            while len(ids) < len(prompt) + steps:
                padded = jnp.array([ids + [0] * (64 - len(ids))])
                following = int(step(padded, jnp.array([len(ids)]), scales).argmax())
                if following == lm.tokenizer.eos_token_id:
                    break
                ids = [*ids, following]
            found.append(lm.tokenizer.decode(ids[len(prompt) :]))
        return found

    return texts


def test_texts_of_a_scaled_model(lm, plain_texts):
    """Multipliers go into `forward` and `generate` as `NeuronSet.scales` gives them."""
    sets = [random_neurons(lm.config, FFN, 60, np.random.default_rng(n)) for n in range(2)]
    one, two = (neurons.scales(lm.config, -3.0, sites=FFN) for neurons in sets)
    off = plain_texts(one), plain_texts(two)
    untouched = plain_texts(NeuronSet().scales(lm.config, sites=FFN))
    assert len({untouched[0], off[0][0], off[1][0]}) == 3
    assert generate(lm, TEXTS, steps=4) == untouched
    assert generate(lm, TEXTS, steps=4, scales=one) == off[0]
    # A set for each prompt: [prompt, layer, width].
    rows = {site: np.stack([one[site], two[site], one[site]]) for site in one}
    assert generate(lm, TEXTS, steps=4, scales=rows) == [off[0][0], off[1][1], off[0][2]]


def test_many_sets_off_at_once(lm):
    drawn = [random_neurons(lm.config, FFN, 90, np.random.default_rng(n)) for n in range(5)]
    sets = {f"set {number}": neurons for number, neurons in enumerate(drawn)}
    ablated = ablate(lm, TEXTS, sets, steps=4)
    assert list(ablated.untouched) == generate(lm, TEXTS, steps=4)
    assert list(ablated.off) == list(sets)
    for name, neurons in sets.items():
        assert list(ablated[name]) == generate(lm, TEXTS, steps=4, scales=neurons.scales(lm.config))
    assert len(set(ablated.off.values())) > 1
    rows = ablated.table().to_pylist()
    assert len(rows) == len(sets) * len(TEXTS)
    assert rows[4] == {
        "off": "set 1",
        "prompt": TEXTS[1],
        "untouched": ablated.untouched[1],
        "text": ablated["set 1"][1],
    }
    shown = repr(ablated).splitlines()
    assert shown[0] == "3 prompts, untouched and with 5 sets off"
    assert shown[1] == repr(TEXTS[0])
    assert shown[3] == f"  set 0      {ablated['set 0'][0]!r}"
    assert ablate(lm, TEXTS, {"nothing": NeuronSet()}, steps=4)["nothing"] == ablated.untouched


@pytest.mark.parametrize(
    ("prompts", "options", "error", "message"),
    [
        ("one", {}, ConfigError, "a list of texts is needed, got 'one'"),
        ([3], {}, ConfigError, r"a list of texts is needed, got \[3\]"),
        (["one"], {"steps": "2"}, ConfigError, "steps must be at least 1, got '2'"),
        (["one"], {"steps": 0}, ConfigError, "steps must be at least 1, got 0"),
        (["one", " "], {}, DataError, "prompt 2: the prompt is empty"),
        (["one"], {"steps": 10**6}, DataError, "prompt 1: 'one' has .* tokens and 1000000 are"),
        (["one"], {"scales": {"upp": np.ones((3, 64))}}, ConfigError, "did you mean 'up'"),
        (["one"], {"scales": {"up": np.ones((3, 1, 1, 64))}}, ConfigError, "are of shape"),
    ],
)
def test_what_cannot_be_generated(lm, as_users_call, prompts, options, error, message):
    with pytest.raises(error, match=message):
        generate(lm, prompts, **options)


def test_sets_that_are_none(lm, as_users_call):
    with pytest.raises(ConfigError, match="set 'mine': a NeuronSet is needed, got"):
        ablate(lm, TEXTS, {"mine": [(0, 1)]})
    with pytest.raises(DataError, match="belong to another"):
        ablate(lm, TEXTS, {"mine": NeuronSet.of(up=[(99, 1)])})


def test_words_that_overflow(lm):
    scales = {"up": np.full((lm.config.num_layers, lm.config.intermediate_size), 1e38, np.float32)}
    with pytest.raises(DataError, match="nothing can be generated after 'one': activations"):
        generate(lm, ["one"], scales=scales)


def test_composes_with_a_users_jit(params):
    """Multipliers are arguments: one program for every set."""
    from jaxneurons.model.generation import greedy

    count = 0

    @jax.jit
    def said(tokens, lengths, scales):
        nonlocal count
        count += 1
        return greedy(params, tokens, config=CONFIG, lengths=lengths, steps=2, scales=scales)

    for seed in range(3):
        one = random_neurons(CONFIG, FFN, 40, np.random.default_rng(seed))
        said(jnp.ones((2, 4), jnp.int32), jnp.array([4, 2]), one.scales(CONFIG, sites=FFN))
    assert count == 1


@pytest.mark.parametrize("data_model", [(1, 2), (2, 1)])
def test_on_a_mesh(params, sets, data_model):
    """Parameters cut over two devices say the same, and respond the same."""
    from jax.sharding import Mesh

    from jaxneurons.engine.responses import mean_responses
    from jaxneurons.model.sharding import shard_params

    mesh = Mesh(np.array(jax.devices()[:2]).reshape(data_model), ("data", "model"))
    cut = shard_params(params, CONFIG, mesh)
    np.testing.assert_array_equal(run(cut, sets), run(params, sets))
    batch = by_length(PROMPTS, 8)[0]
    found, wanted = (
        mean_responses(p, batch.tokens, batch.lengths, config=CONFIG, sites=SITES)
        for p in (cut, params)
    )
    for site in SITES:
        np.testing.assert_allclose(found[site], wanted[site], rtol=1e-5, atol=1e-5)
