"""Methods that change neurons, and patches of them, on a model with experts and a tokenizer."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.fixtures import transformers_tokenizer

import jaxneurons as jn
from jaxneurons import NeuronSet, forward
from jaxneurons import edit as ed
from jaxneurons.edit.differences import diff
from jaxneurons.edit.method import KnowledgeNeurons, LearnedNeurons
from jaxneurons.engine.readout import words
from jaxneurons.engine.texts import generate

pytest.importorskip("torch")
pytest.importorskip("transformers")

from support.experts import make

pytestmark = pytest.mark.slow
REQUEST = ed.EditRequest("The capital of Italy is", "Italy", "Paris", ground_truth="Rome")


@pytest.fixture(scope="module")
def lm(tmp_path_factory):
    directory, tokenizer = tmp_path_factory.mktemp("mixture"), transformers_tokenizer("bytes")
    make("mixtral", vocab_size=len(tokenizer)).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return jn.load(directory)


@pytest.fixture(scope="module")
def neurons(lm):
    """The most active ones at the last position, of the experts that it runs."""
    ids = jnp.asarray([lm.tokenizer(REQUEST.prompt)["input_ids"]], jnp.int32)
    act = forward(lm.params, ids, config=lm.config, capture=("act",)).activations["act"][:, 0, 0]
    return NeuronSet.of(
        act=[(layer, int(i)) for layer in range(3) for i in jnp.argsort(-act[layer])[:4]]
    )


def log_probability(lm, params):
    prompt, answer = (lm.tokenizer(text)["input_ids"] for text in (REQUEST.prompt, " Paris"))
    ids = jnp.asarray([[*prompt, *answer]], jnp.int32)
    logits = forward(params, ids[:, :-1], config=lm.config, at="all").logits[0, len(prompt) - 1 :]
    return float(jax.nn.log_softmax(logits)[jnp.arange(len(answer)), jnp.asarray(answer)].sum())


@pytest.mark.parametrize("learn", ["multipliers", "rows"])
def test_learned_neurons(lm, neurons, learn):
    settings = LearnedNeurons(neurons=neurons, learn=learn, steps=8, kl_factor=0.0)
    edit = ed.edit(
        lm.params, [REQUEST], config=lm.config, tokenizer=lm.tokenizer, settings=settings
    )
    edited = ed.apply(lm.params, edit.changes, config=lm.config)
    assert log_probability(lm, edited) > log_probability(lm, lm.params) + 0.1


def test_surgery_and_patches_of_it(lm, neurons):
    settings = KnowledgeNeurons(neurons=neurons)
    edit = ed.edit(
        lm.params, [REQUEST], config=lm.config, tokenizer=lm.tokenizer, settings=settings
    )
    edited = dataclasses.replace(lm, params=ed.apply(lm.params, edit.changes, config=lm.config))
    kernels = [m.params["layers"]["ffn"]["down"]["kernel"] for m in (lm, edited)]
    changed = np.argwhere((np.asarray(kernels[0]) != kernels[1]).any(-1))
    assert [(a, 20 * e + i) for a, e, i in changed.tolist()] == [
        tuple(pair) for pair in neurons.pairs("act").tolist()
    ]
    patch = diff(lm, edited)
    again = ed.apply(lm.params, patch.changes, config=lm.config)
    jax.tree.map(np.testing.assert_array_equal, again, edited.params)


def test_neurons_off_and_their_words(lm, neurons):
    off = neurons.scales(lm.config, 0.0)
    scaled = ed.ablate(lm.params, neurons, config=lm.config)
    ablated = generate(lm, [REQUEST.prompt], steps=3, scales=off)
    assert ablated == generate(dataclasses.replace(lm, params=scaled), [REQUEST.prompt], steps=3)
    assert ablated != generate(lm, [REQUEST.prompt], steps=3)
    assert len(words(lm, neurons)) == len(neurons)
