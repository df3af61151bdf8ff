"""Further families against PyTorch transformers: logits, continuations, files in both directions.

Tiny random models made by transformers, written by it, read by this library, and back.
`python benchmarks/families.py` prints the table of `docs/families.md` from the same comparison.
"""

import dataclasses
import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxneurons.convert import export
from jaxneurons.convert.hf import read_hf
from jaxneurons.model.config import config_of_values, config_values
from jaxneurons.model.layers import embed

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from support.families import IDS, VARIANTS, our_logits, torch_logits, variant  # noqa: E402
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
    comparison = compare_directory(variant(name), tmp_path)
    assert comparison.difference < BOUND
    assert comparison.continued == STEPS
    config = comparison.config
    assert config_of_values(json.loads(json.dumps(config_values(config)))) == config


@pytest.mark.parametrize("name", ["gemma", "gemma2", "gemma3, linear"])
def test_the_embedding_is_scaled_in_its_own_dtype(tmp_path, name):
    """The factor is rounded before it multiplies: every bit is PyTorch's."""
    model = variant(name).to(torch.bfloat16)
    model.save_pretrained(tmp_path)
    config, params = read_hf(tmp_path, dtype=jnp.bfloat16)
    ours = np.asarray(embed(params, jnp.asarray(IDS), config), np.float32)
    theirs = model.model.embed_tokens(torch.tensor(IDS)).detach().float().numpy()
    np.testing.assert_array_equal(ours, theirs)
    wide = np.asarray(params["embed"]["embedding"], np.float32)[IDS] * np.sqrt(32)
    assert not np.array_equal(np.asarray(jnp.asarray(wide, jnp.bfloat16), np.float32), theirs)


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


def rope(**changes: Any) -> Any:
    return lambda config: {"rope": dataclasses.replace(config.rope, **changes)}


def sliding_rope(**changes: Any) -> Any:
    return lambda config: {"sliding_rope": dataclasses.replace(config.sliding_rope, **changes)}


def plain(**changes: Any) -> Any:
    return lambda config: changes


BY_DEFAULT = (0, 4, 10, 13)
MUTATIONS = [
    ("gemma", plain(embed_scale=1.0)),
    ("gemma", plain(norm_offset=0.0)),
    ("gemma", plain(activation="silu")),
    ("gemma2", plain(post_norms=False)),
    ("gemma2", plain(query_scale=None)),
    ("gemma2", plain(attention_softcap=None)),
    ("gemma2", plain(final_softcap=None)),
    ("gemma2", plain(sliding_layers=(False, True, False))),
    ("gemma2", plain(sliding_window=6)),
    ("gemma3, linear", plain(qk_norm=None)),
    ("gemma3, linear", plain(sliding_rope=None)),
    ("gemma3, linear", sliding_rope(theta=21.0)),
    ("gemma3, linear", rope(factor=7.5)),
    ("smollm3", plain(rotary_layers=None)),
    ("smollm3", plain(rotary_layers=(True, True, False, True, True))),
    ("qwen3", plain(qk_norm=None)),
    ("olmo2", plain(qk_norm=None)),
    ("phi3, longrope, partial", rope(long_divisors=(1.5, 2.5, 3.1))),
    ("phi3, longrope, partial", rope(attention_factor=1.0)),
    ("phi3, longrope, partial", rope(original_max_position=48)),
    ("phi3, longrope, partial", rope(theta=510.0)),
    ("phi3, partial", rope(dim=None)),
]


@pytest.mark.parametrize(
    ("name", "change"),
    [
        pytest.param(*case, marks=[] if number in BY_DEFAULT else [pytest.mark.slow])
        for number, case in enumerate(MUTATIONS)
    ],
)
def test_a_wrong_value_is_noticed(tmp_path, name, change):
    """Break it on purpose: the bound must not hold any more."""
    model = variant(name)
    model.save_pretrained(tmp_path)
    config, params = read_hf(tmp_path)
    theirs = torch_logits(model, IDS)
    ours = our_logits(params, IDS, dataclasses.replace(config, **change(config)))
    assert np.abs(ours - theirs).max() > 10 * BOUND * np.abs(theirs).max()
