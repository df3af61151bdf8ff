"""Tiny models with tokenizers, as directories that PyTorch reads too."""

import pytest


@pytest.fixture(scope="session")
def tiny_path(tmp_path_factory):
    """Grouped queries, biases of q, k and v, an unembedding of its own."""
    pytest.importorskip("torch")
    from support.fixtures import write_lm

    directory = tmp_path_factory.mktemp("edit") / "tiny"
    return write_lm(directory, model_type="qwen2", tie_word_embeddings=False)


@pytest.fixture(scope="session")
def tiny_lm(tiny_path):
    import jaxneurons

    return jaxneurons.load(tiny_path)


@pytest.fixture
def edited_loss(tiny_path, tiny_lm):
    """The loss of an edited model as PyTorch has it: mean over the answer's tokens, and sum."""
    import torch
    from support.tiny_edits import torch_loss, torch_model

    from jaxneurons.edit import apply
    from jaxneurons.edit.encoding import encode_request

    def loss(edit, request):
        model = torch_model(tiny_path)
        edited = apply(tiny_lm.params, edit.changes, config=tiny_lm.config)
        for layer, module in enumerate(model.model.layers):
            for name in ("down", "up", "gate"):
                kernel = edited["layers"]["ffn"][name]["kernel"][layer]
                getattr(module.mlp, f"{name}_proj").weight.copy_(torch.tensor(kernel.T.tolist()))
        ids = encode_request(tiny_lm.tokenizer, request, config=tiny_lm.config)
        mean = float(torch_loss(model, ids.prompt, ids.target))
        return mean, mean * len(ids.target)

    return loss
