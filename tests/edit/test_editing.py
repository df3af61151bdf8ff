"""The one interface to all methods; their settings."""

import dataclasses
import inspect
import math

import jax
import numpy as np
import pytest
from jax.sharding import Mesh
from support.editing_models import (
    OPTIMISATION,
    PREFIXES,
    REQUESTS,
    assert_close,
    covariances,
    kernel_change,
)
from support.fixtures import transformers_tokenizer
from support.models import tiny_config, tiny_params

from jaxneurons.edit.editing import METHODS, edit, edit_each, layers_of, values_of
from jaxneurons.edit.method import (
    MEMIT,
    ROME,
    AlphaEdit,
    FineTune,
    KnowledgeNeurons,
    LearnedNeurons,
    Optimisation,
    default_layer,
    default_layers,
)
from jaxneurons.errors import ConfigError, DataError
from jaxneurons.model.sharding import shard_params
from jaxneurons.neurons.sets import NeuronSet

TOKENIZER = transformers_tokenizer("bytes")
CONFIG = tiny_config(vocab_size=len(TOKENIZER) + len(TOKENIZER) % 2)
SETTINGS = MEMIT(layers=(0, 1), weight=2.0, optimisation=OPTIMISATION)
OPTIONS = {"config": CONFIG, "tokenizer": TOKENIZER, "prefixes": PREFIXES}


@pytest.fixture(scope="module")
def params():
    return tiny_params(CONFIG)


@pytest.mark.parametrize("settings", METHODS)
def test_every_method_has_the_one_signature(settings):
    method = METHODS[settings]
    for name, general in ((method.edit, edit), (method.edit_each, edit_each)):
        arguments = list(inspect.signature(method.function(name)).parameters)
        common = ["params", "requests", "config", "tokenizer", "settings"]
        assert arguments[:5] == common
        optional = set(arguments[5:])
        known = set(inspect.signature(general).parameters)
        assert optional <= known
        assert optional - {"progress"} == method.takes & known
        assert set(settings.__dataclass_fields__)


def test_sharded_parameters_give_the_same_edit(params):
    covariance = covariances(CONFIG, (0, 1))
    mesh = Mesh(np.array(jax.devices()[:2]).reshape(1, 2), ("data", "model"))
    sharded = shard_params(params, CONFIG, mesh)
    done = []
    got, want = (
        edit(
            tree,
            REQUESTS[:1],
            settings=SETTINGS,
            covariance=covariance,
            progress=lambda n, total: done.append((n, total)),
            **OPTIONS,
        )
        for tree in (sharded, params)
    )
    for layer in (0, 1):
        assert_close(kernel_change(got, layer), kernel_change(want, layer))
    assert done[-1] == (1, 1)
    assert want.facts["layers"] == [0, 1]
    assert want.facts["prefixes"] == list(PREFIXES)
    assert want.facts["covariance"]["1"]["text"] == "drawn"


def test_prefixes_are_the_models_own_and_come_from_the_seed(params):
    few = dataclasses.replace(OPTIMISATION, steps=0, prefixes=2, prefix_tokens=(3,))
    settings = ROME(layer=0, covariance="identity", optimisation=few)
    rest = {name: OPTIONS[name] for name in ("config", "tokenizer")}
    first, again = (
        values_of(params, REQUESTS[:1], settings=settings, **rest).prefixes for _ in range(2)
    )
    assert first == again
    assert len(first) == 2
    other = dataclasses.replace(settings, optimisation=dataclasses.replace(few, seed=1))
    assert values_of(params, REQUESTS[:1], settings=other, **rest).prefixes != first


def test_what_no_method_can_do_is_refused_at_once(params, as_users_call):
    def run(function=edit, requests=REQUESTS, settings=SETTINGS, **options):
        return function(params, requests, settings=settings, **{**OPTIONS, **options})

    with pytest.raises(DataError, match="no requests"):
        run(requests=[])
    with pytest.raises(ConfigError, match=r"requests\[0\] must be an EditRequest"):
        run(requests=["The capital of Italy is"])
    with pytest.raises(ConfigError, match=r"those of a method \(ROME, MEMIT"):
        run(settings=OPTIMISATION)
    with pytest.raises(ConfigError, match="layer 3 is not in this model, which has layers 0 to 2"):
        run(settings=MEMIT(layers=(1, 3)))
    with pytest.raises(ConfigError, match="layer 7 is not"):
        run(settings=ROME(layer=7, covariance="identity"))
    with pytest.raises(DataError, match=r"needs the covariance of layer 0"):
        run(edit_each, settings=ROME(layer=0))
    with pytest.raises(ConfigError, match="FineTune optimises no values"):
        values_of(params, REQUESTS, settings=FineTune(), **OPTIONS)


def test_which_layers_need_a_covariance():
    assert layers_of(ROME(layer=2), CONFIG) == (2,)
    assert layers_of(ROME(layer=2, covariance="identity"), CONFIG) == ()
    assert layers_of(SETTINGS, CONFIG) == (0, 1)
    assert layers_of(FineTune(), CONFIG) == ()


@pytest.mark.parametrize(
    ("depth", "layer", "layers"),
    [(32, 5, (4, 5, 6, 7, 8)), (30, 5, (4, 5, 6, 7, 8)), (16, 2, (2, 3, 4)), (1, 0, (0,))],
)
def test_default_layers_follow_the_depth(depth, layer, layers):
    config = tiny_config(num_layers=depth)
    assert default_layer(config) == layer
    assert default_layers(config) == layers


NEURONS = NeuronSet.of(act=[(0, 1)])
WRONG = [
    (Optimisation, {"steps": -1}, "steps must be a finite number of at least 0"),
    (Optimisation, {"learning_rate": 0.0}, "learning_rate must be a finite number above 0"),
    (Optimisation, {"clamp": math.inf}, "clamp must be"),
    (Optimisation, {"kl_factor": math.nan}, "kl_factor must be"),
    (Optimisation, {"prefix_tokens": (5, 0)}, "prefix_tokens must be"),
    (Optimisation, {"seed": 0.5}, "seed must be an integer"),
    (ROME, {"layer": -1}, "layer must be"),
    (ROME, {"covariance": "wikipedia"}, "covariance must be one of text, identity"),
    (ROME, {"optimisation": 3}, "optimisation must be an Optimisation"),
    (MEMIT, {"layers": (5, 4)}, "layers must be layers from 0 on, ascending"),
    (MEMIT, {"layers": ()}, "layers must be"),
    (MEMIT, {"layers": [4]}, "layers must be a tuple of integers or None"),
    (MEMIT, {"weight": 0}, "weight must be"),
    (MEMIT, {"accumulate": 1}, "accumulate must be True or False"),
    (AlphaEdit, {"layers": (-1, 4)}, "layers must be"),
    (AlphaEdit, {"threshold": -1e-3}, "threshold must be"),
    (FineTune, {"norm": 0}, "norm must be"),
    (FineTune, {"learning_rate": "fast"}, "learning_rate must be a number"),
    (KnowledgeNeurons, {"neurons": [(0, 1)]}, "neurons must be a NeuronSet"),
    (LearnedNeurons, {"neurons": NEURONS, "learn": "all"}, "learn must be one of"),
    (LearnedNeurons, {"neurons": NEURONS, "norm": -1.0}, "norm must be"),
]


@pytest.mark.parametrize(("kind", "fields", "message"), WRONG)
def test_wrong_settings_are_refused_when_they_are_made(as_users_call, kind, fields, message):
    with pytest.raises(ConfigError, match=f"{kind.__name__}.{message}"):
        kind(**fields)


def test_an_edit_belongs_to_the_parameters_it_was_computed_on(tiny_lm):
    from jaxneurons.edit import apply_patches, make_patch

    settings = FineTune(layer=1, steps=1)
    shared = {"config": tiny_lm.config, "tokenizer": tiny_lm.tokenizer, "settings": settings}
    made = edit(tiny_lm.params, REQUESTS[:1], **shared)
    (each, _) = edit_each(tiny_lm.params, REQUESTS[:2], **shared)
    assert made.computed_on.keys() == each.computed_on.keys() == {("ffn.down.kernel", 1)}
    assert tuple(made.requests) == tuple(each.requests) == (REQUESTS[0],)
    edited = apply_patches(tiny_lm, make_patch(tiny_lm, made))
    for late in (made, each):
        with pytest.raises(DataError, match=r"computed on other parameters.*down\.kernel of layer"):
            make_patch(edited, late)
    # Made by hand it is of no parameters; layers that it does not touch may be others.
    by_hand = dataclasses.replace(made, computed_on={})
    assert make_patch(edited, by_hand).base == edited.values_hash
    elsewhere = edit(tiny_lm.params, REQUESTS[:1],
                     **{**shared, "settings": dataclasses.replace(settings, layer=0)})  # fmt: skip
    assert make_patch(edited, elsewhere).base == edited.values_hash
    said = "<Edit of 1 request(s) by FineTune: 1 change(s); layers 1; 0 of 1 below the stop loss>"
    assert repr(made) == said


def test_each_array_is_hashed_once(tiny_lm, monkeypatch):
    from jaxneurons.edit import fingerprint

    hashed = []

    def count(leaf, layer):
        hashed.append(layer)
        return "0" * 64

    monkeypatch.setattr(fingerprint, "hash_array", count)
    edit_each(tiny_lm.params, REQUESTS, config=tiny_lm.config, tokenizer=tiny_lm.tokenizer,
              settings=FineTune(layer=2, steps=1))  # fmt: skip
    assert hashed == [2]
