"""Requests for tiny models, and what edits of them are compared with."""

from typing import Any

import jax
import numpy as np

from jaxneurons.edit import EditRequest, apply

REQUESTS = [
    EditRequest("The capital of Italy is", "Italy", "Paris", ground_truth="Rome", id="rome"),
    EditRequest("People who live in France speak", "France", "Greek", "Italian", id="french"),
    EditRequest(
        "Question: who is right? Of all the people in the world it is clearly that man,",
        "man",
        "who",
        ground_truth="option",
    ),
]


def torch_model(path: Any) -> Any:
    """The model of a directory as transformers loads it, without gradients."""
    import torch
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(
        path, dtype=torch.float32, attn_implementation="eager"
    )
    return model.eval().requires_grad_(False)


def torch_logits(model: Any, prompt: tuple[int, ...], target: tuple[int, ...]) -> Any:
    """Logits before each token of an answer, teacher-forced."""
    import torch

    ids = torch.tensor([[*prompt, *target[:-1]]])
    return model(ids).logits[0, len(prompt) - 1 :]


def torch_loss(model: Any, prompt: tuple[int, ...], target: tuple[int, ...]) -> Any:
    """Cross entropy of an answer, mean over its tokens."""
    import torch

    return torch.nn.functional.cross_entropy(
        torch_logits(model, prompt, target), torch.tensor(target)
    )


def layer_kernels(params: Any) -> np.ndarray:
    return np.asarray(params["layers"]["ffn"]["down"]["kernel"])


def assert_unchanged(lm: Any, edit: Any, *, except_for: tuple[str, ...]) -> Any:
    """The edited parameters, of which all arrays but one are bit-equal to the base's."""
    edited = apply(lm.params, edit.changes, config=lm.config)
    paths = jax.tree_util.tree_leaves_with_path(lm.params)
    after = dict(jax.tree_util.tree_leaves_with_path(edited))
    assert len(paths) == len(after)
    for path, leaf in paths:
        if tuple(key.key for key in path) != except_for:
            np.testing.assert_array_equal(np.asarray(leaf), np.asarray(after[path]))
    return edited
