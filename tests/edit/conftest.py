"""Tiny models with tokenizers, as directories that PyTorch reads too."""

import pytest


@pytest.fixture(scope="session")
def tiny_path(tmp_path_factory):
    """Grouped queries, biases of q, k and v, an unembedding of its own; nothing saturates."""
    pytest.importorskip("torch")
    from support.checkpoints import hf_tensors, tiny, write_hf
    from support.fixtures import transformers_tokenizer

    tokenizer = transformers_tokenizer("bytes")
    config = tiny(
        model_type="qwen2",
        tie_word_embeddings=False,
        num_hidden_layers=3,
        vocab_size=len(tokenizer),
    )
    tensors = hf_tensors(config)
    for name, values in tensors.items():
        tensors[name] = 1 + values / 4 if "norm" in name else values / 4
    directory = write_hf(tmp_path_factory.mktemp("edit") / "tiny", config, tensors)
    tokenizer.save_pretrained(directory)
    return directory


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
