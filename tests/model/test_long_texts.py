"""Long texts in generation, responses and perplexity: the numbers of short ones, in less memory."""

import jax
import jax.numpy as jnp
import numpy as np
from support.models import compiled, random_tokens, tiny_config, tiny_params

from jaxneurons import forward
from jaxneurons.engine.ablation import generate_ablated
from jaxneurons.engine.likelihood import sentence_loss
from jaxneurons.engine.responses import ResponseStore, mean_responses
from jaxneurons.neurons.controls import random_neurons
from jaxneurons.neurons.sets import FFN, NeuronSet, stack_scales
from jaxneurons.prompts import batches

CONFIG = tiny_config(num_layers=2, max_position=512)
PARAMS = tiny_params(CONFIG)
LONG = batches.LENGTH_TOKENS + 22


OFF = random_neurons(CONFIG, FFN, 30, np.random.default_rng(0))


def masks():
    return stack_scales([NeuronSet(), OFF], CONFIG, sites=FFN)


def test_perplexity_of_long_sentences():
    """Never the logits of all positions at once, and the same sum."""
    tokens, lengths = random_tokens(CONFIG, (2, LONG)), np.array([LONG, 90])
    found = [
        sentence_loss(PARAMS, tokens, jnp.asarray(lengths), config=CONFIG, scales=scales)
        for scales in (None, OFF.scales(CONFIG))
    ]
    logits = compiled(lambda tokens: forward(PARAMS, tokens, config=CONFIG, at="all").logits)
    expected = [
        -sum(float(row[i, ids[i + 1]]) for i in range(length - 1))
        for row, ids, length in zip(
            np.asarray(jax.nn.log_softmax(logits(tokens))), np.asarray(tokens), lengths, strict=True
        )
    ]
    np.testing.assert_allclose(found[0], expected, rtol=1e-5)
    assert (np.abs(found[1] - found[0]) > 1e-3).all()


def test_sets_one_after_the_other(monkeypatch):
    tokens, lengths = random_tokens(CONFIG, (2, LONG)), jnp.array([LONG, 90])
    one = generate_ablated(PARAMS, tokens, lengths, masks(), config=CONFIG, steps=3)
    monkeypatch.setattr(batches, "LENGTH_TOKENS", LONG)
    jax.clear_caches()
    together = generate_ablated(PARAMS, tokens, lengths, masks(), config=CONFIG, steps=3)
    np.testing.assert_array_equal(one, together)


def test_responses_to_prompts_of_any_length(tmp_path):
    rng = np.random.default_rng(0)
    lengths = [5, 300, LONG, 7, 260, 200]
    prompts = [rng.integers(0, CONFIG.vocab_size, n).tolist() for n in lengths]
    store = ResponseStore(tmp_path / "r", prompts, config=CONFIG, identity={})
    told = []
    store.fill(PARAMS, ("up",), progress=lambda *step: told.append(step))
    assert told[0] == (2, 6)  # the short ones
    assert told[-1] == (6, 6)
    for number, prompt in enumerate(prompts):
        ids = np.array([prompt], np.int32)
        alone = mean_responses(PARAMS, ids, np.array([len(prompt)]), config=CONFIG, sites=("up",))
        for layer in range(CONFIG.num_layers):
            np.testing.assert_allclose(
                store.read("up", layer)[number], alone["up"][layer, 0], rtol=1e-4, atol=1e-5
            )
