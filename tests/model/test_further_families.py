"""Further families against PyTorch transformers: logits, continuations, files in both directions.

Tiny random models made by transformers, written by it, read by this library, and back.
`python benchmarks/families.py` prints the table of `docs/families.md` from the same comparison.
"""

import json
from typing import Any

import jax
import numpy as np
import pytest

from jaxneurons.convert import export
from jaxneurons.convert.hf import read_hf
from jaxneurons.model.config import config_of_values, config_values

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from support.families import IDS, VARIANTS, torch_logits, variant  # noqa: E402
from support.family_comparisons import BOUND, STEPS, compare_directory  # noqa: E402


def first_of_each(names):
    """All variants, of which only a family's first is not marked as slow."""
    seen: set[str] = set()
    for name in names:
        kind = VARIANTS[name][0]
        yield pytest.param(name, marks=[pytest.mark.slow] if kind in seen else [])
        seen.add(kind)


def same(ours: Any, theirs: Any) -> bool:
    equal = jax.tree.map(lambda a, b: bool(np.array_equal(a, b)), ours, theirs)
    return all(jax.tree.leaves(equal))


@pytest.mark.parametrize("name", [*first_of_each(VARIANTS)])
def test_a_family_is_pytorchs(tmp_path, name):
    found = compare_directory(variant(name), tmp_path)
    assert found.difference < BOUND
    assert found.continued == STEPS
    again = config_of_values(json.loads(json.dumps(config_values(found.config))))
    assert again == found.config


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
