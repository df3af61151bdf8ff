"""Keys and values of requests against plain PyTorch, and what must hold of any optimisation."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from support.models import tiny_config, tiny_params

from jaxneurons import forward
from jaxneurons.convert.hf import read_hf
from jaxneurons.edit.contexts import Contexts, batches
from jaxneurons.edit.method import Optimisation
from jaxneurons.edit.optimising import optimise_batch
from jaxneurons.model.config import RopeConfig

SETTINGS = Optimisation(
    steps=6, learning_rate=0.1, kl_factor=0.5, weight_decay=0.3, clamp=0.8, stop=0.0
)


def contexts(seed=0, target=(7, 3), vocab=48, subject_first=False, behind=3):
    """Prompts of several lengths with the subject inside, ids drawn."""
    rng = np.random.default_rng(seed)

    def ids(length):
        return tuple(rng.integers(0, vocab, length).tolist())

    subject, after = ids(2), ids(behind)
    prompts = []
    for before in (ids(1), ids(6), ids(3)):
        prompts.append((before + subject + after, len(before) + 1))
    if subject_first:
        prompts[0] = (subject[-1:] + after, 0)
    return Contexts(tuple(prompts), target, (subject + ids(2), 1))


def optimised(params, each, config, *, layer=1, place="down", size=4, **changes):
    """Of each request, in the order given."""
    settings = dataclasses.replace(SETTINGS, **changes)
    rows = [None] * len(each)
    for batch in batches(each, size):
        result = optimise_batch(
            params, batch, config=config, layer=layer, place=place, optimisation=settings
        )
        for n, i in enumerate(batch.members.tolist()):
            if i >= 0:
                rows[i] = type(result)(*(array[n] for array in result))
    return rows


FAMILIES = {
    "llama-biases": ("default", "down", 1, {}),
    "qwen2-mixed": ("llama3", "residual", 0, {"subject_first": True}),
    "mistral-window": ("default", "residual", 1, {"target": (5,)}),
    "llama": ("yarn", "down", 2, {"target": (4, 4, 9), "behind": 0}),
}


@pytest.mark.parametrize(
    "family",
    [
        "qwen2-mixed",
        "llama",
        *(
            pytest.param(name, marks=pytest.mark.slow)
            for name in ("llama-biases", "mistral-window")
        ),
    ],
)
def test_as_plain_pytorch_with_whole_sequences(tmp_path, family):
    torch = pytest.importorskip("torch")
    from support.families import make
    from support.torch_editing import find_value

    rope, place, layer, drawn = FAMILIES[family]
    model = make(family, rope, "gqa", tied=family != "llama")
    model.save_pretrained(tmp_path)
    config, params = read_hf(tmp_path)
    model = model.double().requires_grad_(False)
    request = contexts(**drawn)
    (got,) = optimised(params, [request], config, layer=layer, place=place)
    options = dataclasses.asdict(SETTINGS)
    for name in ("prefixes", "prefix_tokens", "seed"):
        options.pop(name)
    want = find_value(
        model,
        list(request.prompts),
        request.target,
        request.essence,
        layer=layer,
        place=place,
        **options,
    )
    close = {"rtol": 1e-4, "atol": 1e-5}
    np.testing.assert_allclose(got.key, want.key, **close)
    np.testing.assert_allclose(got.initial, want.initial, **close)
    np.testing.assert_allclose(got.loss, want.losses, rtol=1e-4)
    apart = torch.linalg.norm(torch.tensor(got.delta).double() - want.delta)
    assert apart < 1e-4 * torch.linalg.norm(want.delta)
    assert want.losses[-1] < want.losses[0] - 0.03  # it does something


SHAPES = {
    "mixed-windows-dynamic": {
        "biases": ("q", "k", "v", "down"),
        "sliding_window": 3,
        "sliding_layers": (False, True, True),
        "rope": RopeConfig(rope_type="dynamic", factor=3.0, original_max_position=5),
    },
    "mqa-tied": {"num_kv_heads": 1, "tied": True},
}


@pytest.mark.slow
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("layer", [0, 2])
def test_before_the_first_step_it_is_the_model(shape, layer):
    config = tiny_config(**SHAPES[shape])
    params = tiny_params(config)
    request = contexts(subject_first=True)
    (got,) = optimised(params, [request], config, layer=layer, steps=0)
    nll, keys, values = [], [], []
    for ids, at in request.prompts:
        whole = jnp.array([ids + request.target[:-1]])
        ends = jnp.array([[len(ids) - 1, len(ids)]])
        out = forward(params, whole, config=config, at=ends)
        logits = np.asarray(out.logits[0], np.float64)
        logp = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        nll.append(-logp[[0, 1], list(request.target)].sum())
        seen = forward(
            params, whole, config=config, at=jnp.array([[at]]), capture=("act", "down")
        ).activations
        keys.append(seen["act"][layer, 0, 0])
        values.append(seen["down"][layer, 0, 0])
    np.testing.assert_allclose(got.loss, [np.mean(nll)], rtol=1e-5)
    np.testing.assert_allclose(got.probability, np.exp(-nll[0]), rtol=1e-4)
    np.testing.assert_allclose(got.key, np.mean(keys, axis=0), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(got.initial, np.mean(values, axis=0), rtol=1e-4, atol=1e-5)
    assert not got.delta.any()
    assert not got.reached
    assert got.steps == 0


@pytest.fixture(scope="module")
def model():
    config = tiny_config()
    return tiny_params(config), config


def test_a_delta_stays_within_its_bound_and_reaches_it(model):
    (got,) = optimised(*[model[0], [contexts()], model[1]], clamp=0.05, steps=3)
    length, norm = np.linalg.norm(got.delta), np.linalg.norm(got.initial)
    np.testing.assert_allclose(length, 0.05 * norm, rtol=1e-5)
    assert got.loss[-1] < got.loss[0]


@pytest.mark.slow
def test_a_request_that_is_done_no_longer_moves(model):
    params, config = model
    free = optimised(params, [contexts(n) for n in range(3)], config, steps=12)
    losses = [row.loss for row in free]
    # Reached by the first after a few steps and by none of the others at that point.
    stop = float(np.sort([loss[4] for loss in losses])[1])
    got = optimised(
        params,
        [contexts(n) for n in range(3)],
        config,
        steps=12,
        stop=stop,
        kl_factor=0.0,
        weight_decay=0.0,
    )
    free = optimised(
        params,
        [contexts(n) for n in range(3)],
        config,
        steps=12,
        kl_factor=0.0,
        weight_decay=0.0,
    )
    early = 0
    for stopped, whole in zip(got, free, strict=True):
        below = np.flatnonzero(whole.loss < stop)
        taken = int(below[0]) if len(below) else 12
        early += taken < 12
        assert stopped.steps == taken
        assert stopped.reached == bool(len(below))
        np.testing.assert_allclose(stopped.loss[: taken + 1], whole.loss[: taken + 1], rtol=1e-5)
        assert np.isnan(stopped.loss[taken + 1 :]).all()
        (alone,) = optimised(
            params, [contexts(0)], config, steps=taken, kl_factor=0.0, weight_decay=0.0
        )
        if stopped is got[0]:
            np.testing.assert_allclose(stopped.delta, alone.delta, rtol=1e-4, atol=1e-6)
    assert early


def test_a_request_is_the_same_whatever_else_is_in_its_batch(model):
    params, config = model
    target = contexts(1)
    (alone,) = optimised(params, [target], config)
    others = [contexts(5, target=(1, 2, 3, 4)), contexts(6, target=(9,)), contexts(7)]
    among = optimised(params, [*others, target], config)[-1]
    for a, b in zip(alone, among, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)
