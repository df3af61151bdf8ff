"""MEMIT and AlphaEdit against plain PyTorch, and what the equations promise."""

import dataclasses

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
from jaxneurons.edit.changes import apply
from jaxneurons.edit.contexts import encode_contexts
from jaxneurons.edit.covariance import SingularCovarianceWarning
from jaxneurons.edit.editing import edit, edit_each, values_of
from jaxneurons.edit.method import MEMIT, AlphaEdit, Optimisation
from jaxneurons.edit.requests import EditRequest
from jaxneurons.edit.solving import OuterProducts
from jaxneurons.errors import DataError

LAYERS = (1, 2)
WEIGHT = 3.0
MEMITS = MEMIT(layers=LAYERS, weight=WEIGHT, optimisation=OPTIMISATION)
KEPT = 40  # of 64 directions
ALPHA = AlphaEdit(layers=LAYERS, threshold=1e-4, optimisation=OPTIMISATION)


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return write_tame(tmp_path_factory.mktemp("memit") / "tame")


@pytest.fixture(scope="module")
def lm(directory):
    return jaxneurons.load(directory)


@pytest.fixture(scope="module")
def options(lm):
    return {"config": lm.config, "tokenizer": lm.tokenizer}


@pytest.fixture(scope="module")
def full(lm):
    return covariances(lm.config, LAYERS)


@pytest.fixture(scope="module")
def partial(lm):
    """With a null space."""
    return covariances(lm.config, LAYERS, kept=KEPT)


@pytest.fixture(scope="module")
def values(lm, options):
    """Which all methods here share: in the stream after the last of the layers."""
    return values_of(lm.params, REQUESTS, settings=MEMITS, prefixes=PREFIXES, **options)


@pytest.fixture(scope="module")
def earlier(lm):
    """Of three keys that were edited before."""
    keys = np.random.default_rng(5).normal(size=(2, 3, lm.config.intermediate_size))
    return {layer: (k.T @ k).astype(np.float32) for layer, k in zip(LAYERS, keys, strict=True)}


@pytest.mark.parametrize("method", ["memit", "accumulated", "alphaedit", "alphaedit-earlier"])
def test_the_updates_are_those_of_plain_pytorch(
    lm, directory, options, values, full, partial, earlier, method
):
    torch = pytest.importorskip("torch")
    from support.torch_editing import alphaedit_update, memit_update, spread

    settings = dataclasses.replace(MEMITS, accumulate=method == "accumulated")
    covariance = full
    if "alpha" in method:
        settings, covariance = ALPHA, partial
    kept = earlier if method in ("accumulated", "alphaedit-earlier") else None

    def solve(layer, keys, residuals):
        matrix = torch.tensor(covariance[layer].matrix).double()
        before = 0.0 if kept is None else torch.tensor(kept[layer]).double()
        if "alpha" in method:
            return alphaedit_update(matrix, 1e-4, keys, residuals, before)
        return memit_update(WEIGHT * matrix, keys, residuals, before)

    contexts = encode_contexts(lm.tokenizer, REQUESTS, PREFIXES, config=lm.config)
    want = spread(
        torch_model(directory),
        [list(each.prompts) for each in contexts],
        torch.tensor(values.target).double(),
        LAYERS,
        solve,
    )
    got = edit(
        lm.params,
        REQUESTS,
        settings=settings,
        covariance=covariance,
        earlier=kept,
        values=values,
        **options,
    )
    for layer in LAYERS:
        assert_close(kernel_change(got, layer), want[layer])


def test_values_are_those_of_plain_pytorch(lm, directory, values):
    pytest.importorskip("torch")
    from support.torch_editing import find_value

    contexts = encode_contexts(lm.tokenizer, REQUESTS, PREFIXES, config=lm.config)
    names = ("steps", "learning_rate", "kl_factor", "weight_decay", "clamp", "stop")
    for n in (0, 2):
        want = find_value(
            torch_model(directory),
            list(contexts[n].prompts),
            contexts[n].target,
            contexts[n].essence,
            layer=LAYERS[-1],
            place="residual",
            **{name: getattr(OPTIMISATION, name) for name in names},
        )
        assert_close(values.delta[n], want.delta)
        assert_close(values.initial[n], want.initial)
        assert_close(values.keys[n], want.key)


@pytest.mark.parametrize("method", [MEMITS, ALPHA], ids=["memit", "alphaedit"])
def test_each_is_as_if_it_were_alone(lm, options, values, full, partial, method):
    covariance = full if method is MEMITS else partial
    each = edit_each(
        lm.params, REQUESTS, settings=method, covariance=covariance, values=values, **options
    )
    for n, one in enumerate(each):
        alone = edit(
            lm.params,
            REQUESTS[n : n + 1],
            settings=method,
            covariance=covariance,
            prefixes=PREFIXES,
            **options,
        )
        for layer in LAYERS:
            assert_close(kernel_change(one, layer), kernel_change(alone, layer), 1e-5)
            np.testing.assert_allclose(one.keys[layer], alone.keys[layer], rtol=1e-4, atol=1e-5)


def test_without_weight_every_key_is_mapped_to_its_value(lm, options, full):
    """lambda -> 0, one layer: the equations of all requests hold together."""
    settings = dataclasses.replace(MEMITS, layers=(1,), weight=1e-9)
    values = values_of(lm.params, REQUESTS, settings=settings, prefixes=PREFIXES, **options)
    all_of_them = edit(
        lm.params, REQUESTS, settings=settings, covariance=full, values=values, **options
    )
    assert_close(values.keys @ kernel_change(all_of_them, 1), values.delta, 1e-5)
    # With much weight, next to nothing is written.
    heavy = dataclasses.replace(settings, weight=1e9)
    nothing = edit(lm.params, REQUESTS, settings=heavy, covariance=full, values=values, **options)
    assert np.abs(kernel_change(nothing, 1)).max() < 1e-6


def test_alphaedit_leaves_what_is_kept(lm, options, values, partial):
    one = edit(lm.params, REQUESTS, settings=ALPHA, covariance=partial, values=values, **options)
    for layer in LAYERS:
        change = kernel_change(one, layer)
        matrix = partial[layer].matrix.astype(np.float64)
        moved = np.trace(change.T @ matrix @ change) / np.trace(matrix)
        assert np.sqrt(max(moved, 0)) < 1e-5 * np.linalg.norm(change, 2)
        assert np.linalg.norm(change) > 1e-2
    edited = apply(lm.params, one.changes, config=lm.config)
    kernels = [np.asarray(p["layers"]["ffn"]["down"]["kernel"][1]) for p in (lm.params, edited)]
    eigen = np.linalg.eigh(partial[1].matrix)
    kept = eigen.eigenvectors[:, eigen.eigenvalues > 1e-4]
    assert kept.shape[1] == KEPT
    np.testing.assert_allclose(kept.T @ kernels[0], kept.T @ kernels[1], atol=1e-5)
    assert one.facts["covariance"]["1"]["null_space"] == lm.config.intermediate_size - KEPT


def test_accumulation_is_exact(lm, options, full):
    """Two edits after each other are the one edit of both, where nothing else differs."""
    settings = dataclasses.replace(MEMITS, layers=(2,), accumulate=True)

    def values(requests):
        return values_of(lm.params, requests, settings=settings, prefixes=PREFIXES, **options)

    def edited(params, requests, earlier, settings=settings):
        return edit(
            params,
            requests,
            settings=settings,
            covariance=full,
            earlier=earlier,
            values=values(requests),
            **options,
        )

    both = edited(lm.params, REQUESTS, None)
    first = edited(lm.params, REQUESTS[:1], None)
    after = apply(lm.params, first.changes, config=lm.config)
    second = edited(after, REQUESTS[1:], first.keys)
    total = kernel_change(first, 2) + kernel_change(second, 2)
    assert_close(total, kernel_change(both, 2))
    np.testing.assert_allclose(second.keys[2], both.keys[2], rtol=1e-4, atol=1e-4)
    # Without it, the second edit forgets the first one's constraints.
    plain = dataclasses.replace(settings, accumulate=False)
    forgetful = edited(after, REQUESTS[1:], first.keys, plain)
    total = kernel_change(first, 2) + kernel_change(forgetful, 2)
    apart = np.linalg.norm(total - kernel_change(both, 2)) / np.linalg.norm(total)
    assert apart > 1e-3


def test_many_requests_come_out_as_one_small_change(lm, options, full):
    """Of more requests than the kernel has outputs, the change itself and the identity."""
    from jaxneurons.edit.solving import low_rank

    rng = np.random.default_rng(0)
    left, right = rng.normal(size=(64, 40)), rng.normal(size=(40, 32))
    change = low_rank(1, left, right)
    assert change.left.shape == (64, 32)
    np.testing.assert_allclose(change.left @ change.right, left @ right, rtol=1e-4, atol=1e-4)
    narrow = low_rank(1, left.T[:20], left)  # more outputs than inputs
    assert narrow.left.shape == (20, 20)
    np.testing.assert_allclose(narrow.left @ narrow.right, left.T[:20] @ left, rtol=1e-4, atol=1e-4)


def test_a_singular_covariance_is_regularised_and_that_is_told(lm, options, values, partial):
    with pytest.warns(SingularCovarianceWarning, match="layer . is singular"):
        one = edit(
            lm.params, REQUESTS, settings=MEMITS, covariance=partial, values=values, **options
        )
    for layer in LAYERS:
        assert np.isfinite(kernel_change(one, layer)).all()
        assert one.facts["covariance"][str(layer)]["ridge"] > 0


def test_what_cannot_be_used_is_refused(lm, options, values, full, partial):
    def run(settings=MEMITS, covariance=full, earlier=None):
        return edit(
            lm.params,
            REQUESTS,
            settings=settings,
            covariance=covariance,
            earlier=earlier,
            values=values,
            **options,
        )

    with pytest.raises(DataError, match=r"needs the covariance of layer 1.*collect_covariance"):
        run(covariance=None)
    wide = dataclasses.replace(full[2], matrix=np.eye(3, dtype=np.float32))
    with pytest.raises(DataError, match=r"layer 2 is of shape \(3, 3\)"):
        run(covariance={**full, 2: wide})
    nothing = dataclasses.replace(full[2], matrix=full[2].matrix * np.float32(np.nan))
    for settings, covariance in ((MEMITS, full), (ALPHA, partial)):
        with pytest.raises(DataError, match=r"layer 2 is.*not finite"):
            run(settings, covariance={**covariance, 2: nothing})
    with pytest.raises(DataError, match=r"no eigenvalue.*is below 0\.0001"):
        run(ALPHA)
    with pytest.raises(DataError, match=r"earlier\[1\] must be a finite matrix of 64 x 64"):
        run(dataclasses.replace(MEMITS, accumulate=True), earlier={1: np.eye(3)})


@pytest.mark.slow
@pytest.mark.smollm2
def test_smollm2_is_edited_as_by_plain_pytorch(smollm2, torch_smollm2):
    torch = pytest.importorskip("torch")
    from support.torch_editing import find_value, memit_update, spread

    layers, prefixes = (4, 6), ("The weather was fine today", "I like old books, and")
    requests = [
        EditRequest("The mother tongue of Danielle Darrieux is", "Danielle Darrieux", "English"),
        EditRequest("The capital of France is", "France", "Rome"),
    ]
    optimisation = Optimisation(steps=3, clamp=0.75)
    covariance = covariances(smollm2.config, layers)
    options = {"config": smollm2.config, "tokenizer": smollm2.tokenizer}
    settings = MEMIT(layers=layers, weight=WEIGHT, optimisation=optimisation)
    values = values_of(smollm2.params, requests, settings=settings, prefixes=prefixes, **options)
    got = edit(
        smollm2.params, requests, settings=settings, covariance=covariance, values=values, **options
    )
    contexts = encode_contexts(smollm2.tokenizer, requests, prefixes, config=smollm2.config)
    model, _ = torch_smollm2
    names = ("steps", "learning_rate", "kl_factor", "weight_decay", "clamp", "stop")
    targets = []
    for n, each in enumerate(contexts):
        want = find_value(
            model,
            list(each.prompts),
            each.target,
            each.essence,
            layer=layers[-1],
            place="residual",
            **{name: getattr(optimisation, name) for name in names},
        )
        assert want.losses[-1] < want.losses[0] - 0.5
        assert_close(values.keys[n], want.key)
        targets.append(want.initial + want.delta)
        assert_close(values.target[n], targets[-1])

    def solve(layer, keys, residuals):
        matrix = WEIGHT * torch.tensor(covariance[layer].matrix).double()
        return memit_update(matrix, keys.double(), residuals.double()).float()

    before = [model.model.layers[layer].mlp.down_proj.weight.clone() for layer in layers]
    try:
        updates = spread(
            model, [list(each.prompts) for each in contexts], torch.stack(targets), layers, solve
        )
    finally:
        with torch.no_grad():
            for layer, weight in zip(layers, before, strict=True):
                model.model.layers[layer].mlp.down_proj.weight.copy_(weight)
    for layer in layers:
        assert_close(kernel_change(got, layer), updates[layer])


def test_sums_of_keys_over_thousands_of_edits():
    """What each edit adds is added once; a chain of all edits so far would be too deep."""
    rng = np.random.default_rng(3)
    drawn = rng.normal(size=(3000, 2, 4))
    sums, middle = None, None
    for number, keys in enumerate(drawn):
        sums = OuterProducts({7: keys}, sums)
        middle = sums if number == 1499 else middle
    np.testing.assert_allclose(sums[7], np.einsum("nki,nkj->ij", drawn, drawn), rtol=1e-4)
    half = drawn[:1500]
    np.testing.assert_allclose(middle[7], np.einsum("nki,nkj->ij", half, half), rtol=1e-4)
