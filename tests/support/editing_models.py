"""A tiny model that edits can be optimised on, its requests, and second moments of keys for it."""

from pathlib import Path
from typing import Any

import numpy as np
from support.checkpoints import hf_tensors, tiny, write_hf
from support.fixtures import transformers_tokenizer

from jaxneurons.edit.covariance import Covariance
from jaxneurons.edit.method import Optimisation
from jaxneurons.edit.requests import EditRequest

REQUESTS = [
    EditRequest("The capital of Italy is", "Italy", "Paris", ground_truth="Rome", id="italy"),
    EditRequest("People who live in France speak", "France", "Italian", id="france"),
    EditRequest("The answer is A or", "answer", "Response", id="answer"),
]
PREFIXES = ("which option", "Response: B or D")
STEPS = 5
OPTIMISATION = Optimisation(
    steps=STEPS, learning_rate=1.0, kl_factor=0.2, weight_decay=0.1, clamp=4.0, stop=0.01
)


def write_tame(directory: Path) -> Path:
    """Biases of q, k and v, grouped queries; weights of a size that trained models have."""
    tokenizer = transformers_tokenizer("bytes")
    config = tiny(
        model_type="qwen2",
        vocab_size=len(tokenizer),
        num_hidden_layers=4,
        tie_word_embeddings=False,
        eos_token_id=tokenizer.eos_token_id,
    )
    rng = np.random.default_rng(0)
    tensors = hf_tensors(config)
    for name, values in tensors.items():
        if name.endswith("norm.weight"):
            tensors[name] = rng.uniform(0.5, 1.5, values.shape).astype(np.float32)
        elif values.ndim == 2:
            spread = 0.4 if "embed" in name else 1.5 / np.sqrt(values.shape[1])
            tensors[name] = values * np.float32(spread)
    write_hf(directory, config, tensors)
    tokenizer.save_pretrained(directory)
    return directory


def torch_model(directory: Path) -> Any:
    """The same as transformers reads it, in float64, without gradients of its own."""
    import torch
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.float64, attn_implementation="eager"
    )
    return model.eval().requires_grad_(False)


def covariances(config: Any, layers: Any, *, kept: int | None = None) -> dict[int, Covariance]:
    """Second moments of drawn keys; `kept`: of so many directions only, and nothing in others."""
    found = {}
    for layer in layers:
        rng = np.random.default_rng(layer)
        width = config.intermediate_size
        keys = rng.normal(size=(4 * width, width)) * rng.uniform(0.3, 1.5, width)
        if kept is not None:
            basis, _ = np.linalg.qr(rng.normal(size=(width, width)))
            keys = keys @ basis[:, :kept] @ basis[:, :kept].T
        matrix = (keys.T @ keys / len(keys)).astype(np.float32)
        found[layer] = Covariance(layer, matrix, len(keys), {"text": "drawn"})
    return found


def kernel_change(edit: Any, layer: int) -> np.ndarray:
    """What an edit adds to the down kernel of a layer, [inputs, outputs], float64."""
    return sum(
        np.asarray(c.left, np.float64) @ np.asarray(c.right, np.float64)
        for c in edit.changes
        if c.layer == layer
    )


def assert_close(ours: Any, theirs: Any, tolerance: float = 1e-4) -> None:
    """Equal relative to the size of the whole."""
    ours, theirs = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
    apart = np.linalg.norm(ours - theirs) / np.linalg.norm(theirs)
    assert apart < tolerance, apart
