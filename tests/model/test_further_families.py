"""Further families against PyTorch transformers: logits, continuations, files in both directions.

Tiny random models made by transformers, written by it, read by this library, and back.
`python -m pytest tests/model/test_further_families.py -m "slow or not slow" --family-table` prints
the table of `docs/families.md`.
"""

import functools
import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.models import compiled

from jaxneurons.convert import export
from jaxneurons.convert.hf import read_hf
from jaxneurons.model.config import config_of_values, config_values
from jaxneurons.model.generation import greedy

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from support.families import (  # noqa: E402
    CONTEXT,
    IDS,
    VARIANTS,
    our_logits,
    torch_greedy,
    torch_logits,
    variant,
)

BOUND = 1e-5
"""Largest difference of logits, of the largest logit."""
STEPS, PROMPT = 8, 28  # the prompt is longer than the original context


def first_of_each(names):
    """All variants, of which only a family's first is not marked as slow."""
    seen: set[str] = set()
    for name in names:
        kind = VARIANTS[name][0]
        yield pytest.param(name, marks=[pytest.mark.slow] if kind in seen else [])
        seen.add(kind)


def difference(ours: np.ndarray, theirs: np.ndarray) -> float:
    """The largest, of the largest value."""
    return float(np.abs(ours - theirs).max() / np.abs(theirs).max())


def same(ours: Any, theirs: Any) -> bool:
    equal = jax.tree.map(lambda a, b: bool(np.array_equal(a, b)), ours, theirs)
    return all(jax.tree.leaves(equal))


@pytest.mark.parametrize("name", [*first_of_each(VARIANTS)])
def test_a_family_is_pytorchs(tmp_path, name, record_property):
    model = variant(name)
    model.save_pretrained(tmp_path / "theirs")
    config, params = read_hf(tmp_path / "theirs")
    assert config_of_values(json.loads(json.dumps(config_values(config)))) == config

    # A divisor of frequencies may depend on how long the sequence is.
    lengths = (CONTEXT - 1, IDS.shape[1]) if "longrope" in name else (IDS.shape[1],)
    apart = [
        difference(our_logits(params, ids, config), torch_logits(model, ids))
        for ids in (IDS[:, :length] for length in lengths)
    ]
    record_property("difference", max(apart))
    assert max(apart) < BOUND

    prompt = IDS[:, :PROMPT]
    run = compiled(functools.partial(greedy, config=config, steps=STEPS))
    ours = run(params, jnp.asarray(prompt), lengths=jnp.array([PROMPT]))
    assert ours[0].tolist() == torch_greedy(model, prompt, STEPS)


@pytest.mark.parametrize("name", VARIANTS)
def test_what_is_written_is_what_transformers_reads(tmp_path, name):
    model = variant(name)
    model.save_pretrained(tmp_path / "theirs")
    config, params = read_hf(tmp_path / "theirs")
    (tmp_path / "ours").mkdir()
    original = json.loads((tmp_path / "theirs" / "config.json").read_text())
    export.write_hf(tmp_path / "ours", params, config=config, original=original)
    assert read_hf(tmp_path / "ours")[0] == config
    assert same(read_hf(tmp_path / "ours")[1], params)

    again = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "ours", attn_implementation="eager"
    ).eval()
    assert type(again) is type(model)
    theirs, ours = model.state_dict(), again.state_dict()
    assert theirs.keys() == ours.keys()
    for key, values in theirs.items():
        assert torch.equal(values, ours[key]), key
    np.testing.assert_array_equal(torch_logits(again, IDS), torch_logits(model, IDS))
