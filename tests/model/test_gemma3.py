"""Gemma 3 270M against PyTorch transformers' reading of the same file."""

import functools
import json
from importlib import resources

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxneurons import forward
from jaxneurons.checkpoints.known_models import GEMMA3
from jaxneurons.model.generation import greedy

pytestmark = [pytest.mark.gemma3, pytest.mark.slow]

PROMPTS = (
    "The capital of France is",
    "Die Hauptstadt von Italien ist",
    "La capitale de l'Allemagne est",
    "日本の首都は",
    "Столица России —",
    "Water boils at a temperature of",
    "In 1969, Neil Armstrong",
    "def fibonacci(n):\n    ",
    "import numpy as np\n\nx = np.",
    "for (int i = 0; i < n; i++) {\n    ",
    "<table>\n  <tr>\n    <td>",
    "Q: What is 12 + 30?\nA:",
    "1, 2, 3, 5, 8, 13,",
    "Es war einmal ein kleines Mädchen,",
    "Once upon a time, in a small village by the sea,",
    "The chemical symbol for gold is",
    "Sehr geehrte Damen und Herren,\n\n",
    "<start_of_turn>user\nName a colour.<end_of_turn>\n<start_of_turn>model\n",
    "   leading spaces and\ttabs",
    "Mount Everest is the highest",
)
NEW = 20


def ids_of(lm, text):
    return np.asarray(lm.tokenizer(text)["input_ids"], np.int32)


def long_prompt(lm, length):
    """So many tokens of statements, which say nothing twice."""
    lines = (resources.files("jaxneurons.data") / "facts.jsonl").read_text().splitlines()
    facts = [json.loads(line) for line in lines]
    text = " ".join(
        f"{fact['prompts'][wording]} {fact['answer'].strip()}."
        for wording in (0, 1, 2)
        for fact in facts
    )
    ids = ids_of(lm, text)
    assert len(ids) >= length
    return ids[:length]


def torch_logits(model, ids, at):
    import torch

    at = torch.as_tensor(np.asarray(at))
    tokens = torch.as_tensor(np.asarray(ids, np.int64))[None]
    return model(tokens, logits_to_keep=at).logits[0].numpy()


def test_what_is_loaded(gemma3):
    config = gemma3.config
    assert gemma3.source == "gemma3-270m"
    assert gemma3.hash == GEMMA3.sha256
    assert (config.num_layers, config.hidden_size, config.vocab_size) == (18, 640, 262_144)
    assert (config.num_heads, config.num_kv_heads, config.head_dim) == (4, 1, 256)
    assert config.sliding_window == 512
    assert [i for i, slides in enumerate(config.sliding_layers) if not slides] == [5, 11, 17]
    assert sum(leaf.size for leaf in jax.tree.leaves(gemma3.params)) == 268_098_176


@pytest.mark.parametrize("prompt", [0, 3, 7, 700], ids=["English", "Japanese", "code", "long"])
def test_logits(prompt, gemma3, torch_gemma3):
    ids = long_prompt(gemma3, prompt) if prompt > 99 else ids_of(gemma3, PROMPTS[prompt])
    at = np.unique(np.linspace(0, len(ids) - 1, 40).astype(np.int32))
    run = jax.jit(functools.partial(forward, config=gemma3.config))
    ours = run(gemma3.params, jnp.asarray(ids)[None], at=jnp.asarray(at)[None]).logits[0]
    np.testing.assert_allclose(ours, torch_logits(torch_gemma3, ids, at), atol=1e-3, rtol=0)


def continuations(lm, prompts):
    lengths = np.array([len(ids) for ids in prompts], np.int32)
    tokens = np.zeros((len(prompts), lengths.max()), np.int32)
    for row, ids in enumerate(prompts):
        tokens[row, : len(ids)] = ids
    run = jax.jit(functools.partial(greedy, config=lm.config, steps=NEW))
    return np.asarray(run(lm.params, jnp.asarray(tokens), lengths=jnp.asarray(lengths)))


@pytest.mark.parametrize("length", [0, 600], ids=["short", "past the window"])
def test_greedy_continuations(length, gemma3, torch_gemma3):
    """By induction: one pass of torch over our tokens picks each of them."""
    prompts = [ids_of(gemma3, text) for text in PROMPTS]
    if length:
        prompts = [long_prompt(gemma3, length)]
    continued = continuations(gemma3, prompts)
    for ids, following in zip(prompts, continued, strict=True):
        whole = np.concatenate([ids, following])
        logits = torch_logits(torch_gemma3, whole, np.arange(len(ids) - 1, len(whole) - 1))
        np.testing.assert_array_equal(following, logits.argmax(-1))
    if not length:
        assert gemma3.tokenizer.decode(continued[0]).startswith(" the capital of")
