"""ROME against plain PyTorch, and what a rank-one edit promises."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.editing_models import (
    OPTIMISATION,
    PREFIXES,
    REQUESTS,
    assert_close,
    covariances,
    kernel_change,
    torch_model,
    write_tame,
)

import jaxneurons
from jaxneurons import forward
from jaxneurons.edit.changes import apply
from jaxneurons.edit.contexts import encode_contexts
from jaxneurons.edit.editing import edit, edit_each, values_of
from jaxneurons.edit.encoding import encode_prefixed
from jaxneurons.edit.method import ROME, Optimisation
from jaxneurons.edit.requests import EditRequest
from jaxneurons.errors import DataError

LAYER = 1
SETTINGS = ROME(layer=LAYER, optimisation=OPTIMISATION)


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return write_tame(tmp_path_factory.mktemp("rome") / "tame")


@pytest.fixture(scope="module")
def lm(directory):
    return jaxneurons.load(directory)


@pytest.fixture(scope="module")
def options(lm):
    return {
        "config": lm.config,
        "tokenizer": lm.tokenizer,
        "covariance": covariances(lm.config, [LAYER]),
        "prefixes": PREFIXES,
    }


@pytest.fixture(scope="module")
def each(lm, options):
    return edit_each(lm.params, REQUESTS, settings=SETTINGS, **options)


@pytest.fixture(scope="module")
def values(lm, options):
    rest = {name: options[name] for name in ("config", "tokenizer", "prefixes")}
    return values_of(lm.params, REQUESTS, settings=SETTINGS, **rest)


def bits(params):
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(params)]


@pytest.mark.parametrize("moment", ["text", "identity"])
def test_the_update_is_that_of_plain_pytorch(lm, directory, options, each, moment):
    torch = pytest.importorskip("torch")
    from support.torch_editing import find_value, rome_update

    if moment == "identity":
        settings = dataclasses.replace(SETTINGS, covariance="identity")
        each = edit_each(lm.params, REQUESTS[:1], settings=settings, **options)
        matrix = np.eye(lm.config.intermediate_size)
    else:
        matrix = options["covariance"][LAYER].matrix
    model, request = torch_model(directory), REQUESTS[0]
    prompts = [
        encode_prefixed(lm.tokenizer, request, text, config=lm.config) for text in ("", *PREFIXES)
    ]
    target = tuple(lm.tokenizer(" Paris", add_special_tokens=False).input_ids)
    subject = tuple(lm.tokenizer("Italy", add_special_tokens=False).input_ids)
    essence = subject + tuple(lm.tokenizer(" is a", add_special_tokens=False).input_ids)
    o = OPTIMISATION
    want = find_value(
        model,
        prompts,
        target,
        (essence, len(subject) - 1),
        layer=LAYER,
        place="down",
        steps=o.steps,
        learning_rate=o.learning_rate,
        kl_factor=o.kl_factor,
        weight_decay=o.weight_decay,
        clamp=o.clamp,
        stop=o.stop,
    )
    kernel = model.model.layers[LAYER].mlp.down_proj.weight.T
    update = rome_update(
        kernel, 0.0, want.key, want.initial + want.delta, torch.tensor(matrix).double()
    )
    assert_close(kernel_change(each[0], LAYER), update)
    np.testing.assert_allclose(each[0].trace.loss[0, : len(want.losses)], want.losses, rtol=1e-4)
    assert each[0].trace.loss[0, -1] < each[0].trace.loss[0, 0] - 0.5


def test_the_key_is_mapped_to_its_value(lm, each, values):
    """K' k* = v*, in one layer, by one rank."""
    for n, one in enumerate(each):
        edited = apply(lm.params, one.changes, config=lm.config)
        kernel = np.asarray(edited["layers"]["ffn"]["down"]["kernel"][LAYER], np.float64)
        assert_close(values.keys[n] @ kernel, values.target[n], 1e-5)
        (change,) = one.changes
        assert change.left.shape == (lm.config.intermediate_size, 1)
        rest = np.asarray(lm.params["layers"]["ffn"]["down"]["kernel"])
        changed = np.flatnonzero(
            (np.asarray(edited["layers"]["ffn"]["down"]["kernel"]) != rest).any((1, 2))
        )
        np.testing.assert_array_equal(changed, [LAYER])


def test_it_is_the_smallest_change_by_the_covariance(each, values, options):
    """Any other change that maps the key to its value moves C's keys more (appendix A)."""
    matrix = options["covariance"][LAYER].matrix.astype(np.float64)
    rng = np.random.default_rng(0)
    best = kernel_change(each[0], LAYER)
    key = values.keys[0].astype(np.float64)
    for _ in range(20):
        other = 0.01 * rng.normal(size=best.shape)
        other -= np.outer(key, key @ other) / (key @ key)  # maps the key to nothing
        changed = best + other
        moved = np.trace(changed.T @ matrix @ changed)
        assert moved > np.trace(best.T @ matrix @ best)


def test_the_model_says_what_the_optimisation_promised(lm, options):
    """The prompt's own answer in the edited model, by the library's forward pass."""
    long = dataclasses.replace(OPTIMISATION, steps=30, weight_decay=0.0, clamp=20.0, stop=0.1)
    settings = ROME(layer=LAYER, covariance="identity", optimisation=long)
    request = EditRequest("The capital of Italy", "Italy", "Paris")
    one = edit(lm.params, [request], settings=settings, **{**options, "prefixes": ()})
    assert one.trace.reached[0]
    edited = apply(lm.params, one.changes, config=lm.config)
    ids = lm.tokenizer(request.prompt, return_tensors="np").input_ids
    target = lm.tokenizer(" Paris", add_special_tokens=False).input_ids

    def probability(params):
        whole = jnp.asarray(np.concatenate([ids[0], target[:-1]])[None].astype(np.int32))
        at = ids.shape[1] - 1 + jnp.arange(len(target))[None]
        logits = forward(params, whole, config=lm.config, at=at).logits[0]
        chosen = jnp.asarray(target, jnp.int32)[:, None]
        logp = jnp.take_along_axis(jax.nn.log_softmax(logits), chosen, axis=-1)
        return float(jnp.exp(logp.sum()))

    assert probability(lm.params) < 0.05
    assert one.trace.probability[0] > 0.9
    assert probability(edited) > 0.5


def test_no_steps_no_change(lm, options):
    still = dataclasses.replace(OPTIMISATION, steps=0)
    settings = dataclasses.replace(SETTINGS, optimisation=still)
    one = edit(lm.params, REQUESTS[:1], settings=settings, **options)
    assert not kernel_change(one, LAYER).any()
    assert not one.trace.reached.any()


def test_edits_leak_into_nothing(lm, options, each):
    """Parameters are untouched, and an edit is the same before and after another one."""
    before = bits(lm.params)
    turned = edit_each(lm.params, REQUESTS[::-1], settings=SETTINGS, **options)
    for one, again in zip(each, turned[::-1], strict=True):
        assert_close(kernel_change(again, LAYER), kernel_change(one, LAYER), 1e-5)
    (alone,) = edit_each(lm.params, REQUESTS[2:], settings=SETTINGS, **options)
    assert_close(kernel_change(alone, LAYER), kernel_change(each[2], LAYER), 1e-5)
    assert bits(lm.params) == before


def test_together_they_are_made_one_after_the_other(lm, options, each):
    """The second's value is found in the model that the first has edited."""
    both = edit(lm.params, REQUESTS[:2], settings=SETTINGS, **options)
    after_first = apply(lm.params, each[0].changes, config=lm.config)
    second = edit(after_first, REQUESTS[1:2], settings=SETTINGS, **options)
    want = kernel_change(each[0], LAYER) + kernel_change(second, LAYER)
    assert_close(kernel_change(both, LAYER), want, 1e-5)
    (change,) = both.changes
    assert change.left.shape == (lm.config.intermediate_size, 2)
    on_untouched = kernel_change(each[0], LAYER) + kernel_change(each[1], LAYER)
    apart = np.linalg.norm(want - on_untouched) / np.linalg.norm(want)
    assert apart > 1e-3  # it does make a difference


def test_values_found_before_give_the_same_edit(lm, options, each, values):
    rest = {name: value for name, value in options.items() if name != "prefixes"}
    again = edit_each(lm.params, REQUESTS, settings=SETTINGS, values=values, **rest)
    for one, other in zip(each, again, strict=True):
        np.testing.assert_array_equal(kernel_change(one, LAYER), kernel_change(other, LAYER))


def test_values_of_something_else_are_refused(lm, options, values):
    with pytest.raises(DataError, match=r"values= serves one request at a time"):
        edit(lm.params, REQUESTS, settings=SETTINGS, values=values, **options)
    for settings, what in (
        (ROME(layer=2, covariance="identity", optimisation=OPTIMISATION), "layer"),
        (dataclasses.replace(SETTINGS, optimisation=dataclasses.replace(OPTIMISATION, seed=1)), ""),
    ):
        with pytest.raises(DataError, match=f"found for other {what}"):
            edit_each(lm.params, REQUESTS, settings=settings, values=values, **options)
    with pytest.raises(DataError, match="other requests"):
        edit_each(lm.params, REQUESTS[:2], settings=SETTINGS, values=values, **options)


def test_a_key_without_length_and_numbers_that_are_not_finite_name_their_request(lm, options):
    ffn = lm.params["layers"]["ffn"]
    for factor, message in ((0.0, "'italy'.*squared length of 0"), (np.nan, "'italy'.*not finite")):
        up = {**ffn["up"], "kernel": ffn["up"]["kernel"] * np.float32(factor)}
        broken = {**lm.params, "layers": {**lm.params["layers"], "ffn": {**ffn, "up": up}}}
        with pytest.raises(DataError, match=message):
            edit(broken, REQUESTS[:1], settings=SETTINGS, **options)


@pytest.mark.slow
@pytest.mark.smollm2
def test_smollm2_is_edited_as_by_plain_pytorch(smollm2, torch_smollm2):
    torch = pytest.importorskip("torch")
    from support.torch_editing import find_value, rome_update

    layer, prefixes = 5, ("The weather was fine today", "I like old books, and")
    request = EditRequest(
        "The mother tongue of Danielle Darrieux is", "Danielle Darrieux", "English"
    )
    optimisation = dataclasses.replace(Optimisation(), steps=3)
    covariance = covariances(smollm2.config, [layer])
    options = {"config": smollm2.config, "tokenizer": smollm2.tokenizer, "prefixes": prefixes}
    settings = ROME(layer=layer, optimisation=optimisation)
    values = values_of(smollm2.params, [request], settings=settings, **options)
    one = edit(smollm2.params, [request], settings=settings, covariance=covariance, **options)

    (contexts,) = encode_contexts(smollm2.tokenizer, [request], prefixes, config=smollm2.config)
    model, _ = torch_smollm2
    names = ("steps", "learning_rate", "kl_factor", "weight_decay", "clamp", "stop")
    want = find_value(
        model,
        list(contexts.prompts),
        contexts.target,
        contexts.essence,
        layer=layer,
        place="down",
        **{name: getattr(optimisation, name) for name in names},
    )
    np.testing.assert_allclose(values.trace.loss[0], want.losses, rtol=1e-3)
    assert want.losses[-1] < want.losses[0] - 1
    assert_close(values.keys[0], want.key)
    assert_close(values.target[0], want.initial + want.delta)
    update = rome_update(
        model.model.layers[layer].mlp.down_proj.weight.T.double(),
        0.0,
        want.key.double(),
        (want.initial + want.delta).double(),
        torch.tensor(covariance[layer].matrix).double(),
    )
    assert_close(kernel_change(one, layer), update)
