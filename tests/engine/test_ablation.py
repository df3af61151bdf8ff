"""Ablations against PyTorch with the weights themselves zeroed, and a loop without a cache."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.fixtures import write_lm
from support.models import compiled, tiny_config, tiny_params

import jaxneurons
from jaxneurons import forward
from jaxneurons.engine.ablation import Shape, ablated, kept
from jaxneurons.errors import ConfigError, DataError
from jaxneurons.neurons.sets import FFN, SITES, NeuronSet, random_neurons
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
        scales = {
            s: jnp.asarray(v)[:, None, None] for s, v in one.scales(CONFIG, sites=SITES).items()
        }
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


def test_masks():
    one = NeuronSet.of(up=[(1, 2)])
    masks = kept([one, NeuronSet()], CONFIG, FFN)
    assert set(masks) == set(FFN)
    assert np.argwhere(~masks["up"]).tolist() == [[0, 1, 2]]
    assert masks["gate"].all()


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


def test_composes_with_a_users_jit(params):
    """Multipliers are arguments: one program for every set."""
    from jaxneurons.model.generation import greedy

    count = 0

    @jax.jit
    def said(tokens, lengths, keep):
        nonlocal count
        count += 1
        return greedy(params, tokens, config=CONFIG, lengths=lengths, steps=2, scales=keep)

    for seed in range(3):
        one = random_neurons(CONFIG, FFN, 40, np.random.default_rng(seed))
        keep = {site: mask[0] for site, mask in kept([one], CONFIG, FFN).items()}
        said(jnp.ones((2, 4), jnp.int32), jnp.array([4, 2]), keep)
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
