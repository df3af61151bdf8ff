"""Tiny models with tokenizers, as directories that PyTorch reads too."""

import pytest


def write_tiny(directory, **changes):
    """A model of three layers whose activations do not saturate."""
    pytest.importorskip("torch")
    from support.checkpoints import hf_tensors, tiny, write_hf
    from support.fixtures import transformers_tokenizer

    tokenizer = transformers_tokenizer("bytes")
    config = tiny(num_hidden_layers=3, vocab_size=len(tokenizer), **changes)
    tensors = hf_tensors(config)
    for name, values in tensors.items():
        tensors[name] = 1 + values / 4 if "norm" in name else values / 4
    write_hf(directory, config, tensors)
    tokenizer.save_pretrained(directory)
    return directory


@pytest.fixture(scope="session")
def tiny_path(tmp_path_factory):
    """Grouped queries, biases of q, k and v, an unembedding of its own."""
    directory = tmp_path_factory.mktemp("edit") / "tiny"
    return write_tiny(directory, model_type="qwen2", tie_word_embeddings=False)


@pytest.fixture(scope="session")
def windowed_path(tmp_path_factory):
    """A window that is shorter than the prompts, the embedding as unembedding, no biases."""
    directory = tmp_path_factory.mktemp("edit") / "windowed"
    return write_tiny(directory, model_type="mistral", sliding_window=3)


@pytest.fixture(scope="session")
def tiny_lm(tiny_path):
    import jaxneurons

    return jaxneurons.load(tiny_path)


@pytest.fixture
def edited_loss(tiny_lm):
    """The loss of a model with edited parameters: mean over the answer's tokens, and sum."""
    import jax.numpy as jnp
    import numpy as np

    from jaxneurons import forward
    from jaxneurons.edit import apply
    from jaxneurons.edit.encoding import encode_request

    def loss(edit, request):
        ids = encode_request(tiny_lm.tokenizer, request, config=tiny_lm.config)
        params = apply(tiny_lm.params, edit.changes, config=tiny_lm.config)
        tokens = jnp.asarray([[*ids.prompt, *ids.target[:-1]]])
        logits = forward(params, tokens, config=tiny_lm.config, at="all").logits[0]
        logits = np.asarray(logits, np.float64)[len(ids.prompt) - 1 :]
        logp = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        total = -sum(row[token] for row, token in zip(logp, ids.target, strict=True))
        return total / len(ids.target), total

    return loss
