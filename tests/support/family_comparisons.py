"""The comparison of a tiny model with PyTorch's, which the tests make and benchmarks print."""

import dataclasses
import functools
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from support import gguf_families
from support.families import CONTEXT, IDS, our_logits, torch_greedy, torch_logits
from support.models import compiled

from jaxneurons.convert.gguf import read_gguf
from jaxneurons.convert.hf import read_hf
from jaxneurons.model.config import ModelConfig
from jaxneurons.model.generation import greedy

BOUND = 1e-5
"""Largest difference of logits, of the largest logit."""
STEPS, PROMPT = 8, 28  # the prompt is longer than the original context


@dataclasses.dataclass(frozen=True)
class Comparison:
    """What came of it.

    Attributes:
      config: as read.
      difference: the largest of logits, of the largest logit.
      continued: tokens of a greedy continuation that are the same.
    """

    config: ModelConfig
    difference: float
    continued: int


def compare(model: Any, config: ModelConfig, params: Any) -> Comparison:
    """Logits of short and long sequences, and a greedy continuation."""
    # First: the angles of `dynamic` depend on the longest sequence that PyTorch's has seen.
    prompt = IDS[:, :PROMPT]
    run = compiled(functools.partial(greedy, config=config, steps=STEPS))
    tokens = run(params, jnp.asarray(prompt), lengths=jnp.array([PROMPT]))[0].tolist()
    same = [a == b for a, b in zip(tokens, torch_greedy(model, prompt, STEPS), strict=True)]
    # Where divisors of frequencies depend on the length, the long sequence says nothing of a short.
    by_length = any(rope.rope_type in ("dynamic", "longrope") for rope in config.ropes)
    lengths = (CONTEXT - 1, IDS.shape[1]) if by_length else (IDS.shape[1],)
    apart = []
    for length in lengths:
        theirs = torch_logits(model, IDS[:, :length])
        ours = our_logits(params, IDS[:, :length], config)
        apart.append(float(np.abs(ours - theirs).max() / np.abs(theirs).max()))
    return Comparison(config, max(apart), sum(same))


def compare_directory(model: Any, directory: Path) -> Comparison:
    """A directory that transformers writes."""
    model.save_pretrained(directory)
    return compare(model, *read_hf(directory))


def compare_gguf(model: Any, path: Path) -> Comparison:
    """A file as llama.cpp's converter writes it."""
    return compare(model, *read_gguf(gguf_families.write(path, model)))
