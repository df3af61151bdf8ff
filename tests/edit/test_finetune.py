"""Fine-tuning of a down kernel, against autograd and Adam of PyTorch on transformers' Llama."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from support.tiny_edits import REQUESTS, assert_unchanged, layer_kernels, torch_loss, torch_model

from jaxneurons.edit import FineTune
from jaxneurons.edit import descent as descents
from jaxneurons.edit.encoding import encode_request
from jaxneurons.edit.finetune import fine_tune, fine_tune_each, up_to_layer
from jaxneurons.errors import ConfigError, DataError

FREE = FineTune(layer=1, steps=4, learning_rate=0.01, stop=0.0)
BOUND = dataclasses.replace(FREE, norm=0.015)


def change(edit):
    """What an edit adds to the kernel, [width, hidden]."""
    (low_rank,) = edit.changes
    assert low_rank.module == "ffn.down"
    return np.asarray(low_rank.left, np.float64) @ np.asarray(low_rank.right, np.float64)


def torch_fine_tuned(path, lm, requests, settings):
    """The change of the kernel, losses before each step and after the last, by PyTorch."""
    import torch

    model = torch_model(path)
    encoded = [encode_request(lm.tokenizer, request, config=lm.config) for request in requests]
    weight = model.model.layers[settings.layer].mlp.down_proj.weight
    weight.requires_grad_(True)
    before = weight.detach().clone()
    adam = torch.optim.Adam([weight], lr=settings.learning_rate)
    losses = []

    def read():
        each = [torch_loss(model, ids.prompt, ids.target) for ids in encoded]
        losses.append([float(loss.detach()) for loss in each])
        return torch.stack(each).mean()

    for _ in range(settings.steps):
        loss = read()
        if float(loss.detach()) < settings.stop:
            break
        adam.zero_grad()
        loss.backward()
        adam.step()
        if settings.norm is not None:
            with torch.no_grad():
                weight.copy_(before + (weight - before).clamp(-settings.norm, settings.norm))
    read()
    return (weight.detach() - before).numpy().T, np.array(losses).T


@pytest.mark.parametrize("settings", [FREE, BOUND], ids=["free", "bound"])
def test_together_as_pytorch_does(tiny_path, tiny_lm, settings):
    edit = fine_tune(
        tiny_lm.params,
        REQUESTS,
        config=tiny_lm.config,
        tokenizer=tiny_lm.tokenizer,
        settings=settings,
    )
    theirs, losses = torch_fine_tuned(tiny_path, tiny_lm, REQUESTS, settings)
    np.testing.assert_allclose(change(edit), theirs, atol=1e-4)
    assert np.abs(theirs).max() > 0.01
    np.testing.assert_allclose(edit.trace.loss, losses, rtol=1e-3)
    assert edit.changes[0].layer == 1
    assert edit.facts == {"layers": [1]}
    assert edit.keys == {}


@pytest.mark.parametrize("settings", [FREE, BOUND], ids=["free", "bound"])
def test_each_alone_as_pytorch_does(tiny_path, tiny_lm, settings):
    edits = fine_tune_each(
        tiny_lm.params,
        REQUESTS,
        config=tiny_lm.config,
        tokenizer=tiny_lm.tokenizer,
        settings=settings,
    )
    assert len(edits) == len(REQUESTS)
    for edit, request in zip(edits, REQUESTS, strict=True):
        theirs, losses = torch_fine_tuned(tiny_path, tiny_lm, [request], settings)
        np.testing.assert_allclose(change(edit), theirs, atol=1e-4)
        np.testing.assert_allclose(edit.trace.loss, losses, rtol=1e-3)
        assert edit.trace.steps.tolist() == [settings.steps]


def test_the_edited_model_has_the_loss_that_the_trace_says(tiny_lm, edited_loss):
    settings = dataclasses.replace(FREE, steps=8, learning_rate=0.03, stop=0.5)
    edits = fine_tune_each(
        tiny_lm.params,
        REQUESTS,
        config=tiny_lm.config,
        tokenizer=tiny_lm.tokenizer,
        settings=settings,
    )
    for edit, request in zip(edits, REQUESTS, strict=True):
        mean, total = edited_loss(edit, request)
        steps = int(edit.trace.steps[0])
        np.testing.assert_allclose(edit.trace.loss[0, steps], mean, rtol=1e-3, atol=1e-5)
        np.testing.assert_allclose(edit.trace.probability[0], np.exp(-total), rtol=1e-3)
        assert np.isnan(edit.trace.loss[0, steps + 1 :]).all()
        assert np.isfinite(edit.trace.loss[0, : steps + 1]).all()
        assert bool(edit.trace.reached[0]) == (mean < settings.stop)
        # It rests as soon as it is there, and not before.
        assert (edit.trace.loss[0, :steps] >= settings.stop).all()
    assert any(edit.trace.reached[0] for edit in edits)


def test_the_last_layer_and_one_that_is_given_by_depth(tiny_path, tiny_lm):
    last = dataclasses.replace(FREE, layer=tiny_lm.config.num_layers - 1, steps=2)
    (edit,) = fine_tune_each(
        tiny_lm.params,
        REQUESTS[:1],
        config=tiny_lm.config,
        tokenizer=tiny_lm.tokenizer,
        settings=last,
    )
    theirs, _ = torch_fine_tuned(tiny_path, tiny_lm, REQUESTS[:1], last)
    np.testing.assert_allclose(change(edit), theirs, atol=1e-4)
    (default,) = fine_tune_each(
        tiny_lm.params,
        REQUESTS[:1],
        config=tiny_lm.config,
        tokenizer=tiny_lm.tokenizer,
        settings=dataclasses.replace(last, layer=None),
    )
    assert default.changes[0].layer == 2 * tiny_lm.config.num_layers // 3
    np.testing.assert_array_equal(change(default), change(edit))


def test_no_steps_change_nothing_and_only_the_kernel_changes(tiny_lm):
    still = dataclasses.replace(FREE, steps=0)
    for settings, equal in ((still, True), (BOUND, False)):
        for edit in fine_tune_each(
            tiny_lm.params,
            REQUESTS[:2],
            config=tiny_lm.config,
            tokenizer=tiny_lm.tokenizer,
            settings=settings,
        ):
            edited = assert_unchanged(tiny_lm, edit, except_for=("layers", "ffn", "down", "kernel"))
            before, after = layer_kernels(tiny_lm.params), layer_kernels(edited)
            np.testing.assert_array_equal(np.delete(before, 1, 0), np.delete(after, 1, 0))
            assert np.array_equal(before[1], after[1]) == equal


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_the_bound_holds_after_every_step(tiny_lm, steps):
    settings = dataclasses.replace(BOUND, steps=steps)
    edit = fine_tune(
        tiny_lm.params,
        REQUESTS,
        config=tiny_lm.config,
        tokenizer=tiny_lm.tokenizer,
        settings=settings,
    )
    assert 0.9 * min(0.01 * steps, BOUND.norm) < np.abs(change(edit)).max() <= np.float32(0.015)


def test_a_request_does_not_feel_the_others(tiny_lm):
    tune = {"config": tiny_lm.config, "tokenizer": tiny_lm.tokenizer, "settings": FREE}
    together = fine_tune_each(tiny_lm.params, REQUESTS, **tune)
    backwards = fine_tune_each(tiny_lm.params, REQUESTS[::-1], **tune)[::-1]
    (single,) = fine_tune_each(tiny_lm.params, REQUESTS[:1], **tune)
    np.testing.assert_allclose(change(together[0]), change(single), atol=2e-5)
    for edit, other in zip(together, backwards, strict=True):
        np.testing.assert_allclose(change(edit), change(other), atol=2e-5)


def test_one_program_for_requests_of_a_shape(tiny_lm):
    tune = {"config": tiny_lm.config, "tokenizer": tiny_lm.tokenizer}
    fine_tune_each(tiny_lm.params, REQUESTS, settings=FREE, **tune)
    programs = descents._step_each._cache_size(), up_to_layer._cache_size()
    others = [
        dataclasses.replace(r, target=o.target)
        for r, o in zip(REQUESTS, REQUESTS[::-1], strict=True)
    ]
    settings = dataclasses.replace(FREE, learning_rate=0.02, norm=0.1, stop=0.01, steps=3)
    fine_tune_each(tiny_lm.params, others, settings=settings, **tune)
    assert (descents._step_each._cache_size(), up_to_layer._cache_size()) == programs


def test_bad_input_is_refused(tiny_lm, as_users_call):
    tune = {"config": tiny_lm.config, "tokenizer": tiny_lm.tokenizer}
    with pytest.raises(DataError, match="no requests"):
        fine_tune(tiny_lm.params, [], settings=FREE, **tune)
    with pytest.raises(ConfigError, match="layer 3 is not in this model, which has 3"):
        fine_tune(tiny_lm.params, REQUESTS, settings=dataclasses.replace(FREE, layer=3), **tune)


def test_numbers_that_are_not_finite_are_an_error_that_names_the_request(tiny_lm):
    tune = {"config": tiny_lm.config, "tokenizer": tiny_lm.tokenizer}
    wild = dataclasses.replace(FREE, learning_rate=1e38)
    for function in (fine_tune, fine_tune_each):
        with pytest.raises(DataError, match=r"request 'rome' .* after 1 steps; lower the learning"):
            function(tiny_lm.params, REQUESTS[:1], settings=wild, **tune)
    kernel = tiny_lm.params["layers"]["ffn"]["up"]["kernel"].at[0, 0, 0].set(jnp.nan)
    ffn = {**tiny_lm.params["layers"]["ffn"], "up": {"kernel": kernel}}
    damaged = {**tiny_lm.params, "layers": {**tiny_lm.params["layers"], "ffn": ffn}}
    for function in (fine_tune, fine_tune_each):
        with pytest.raises(DataError, match=r"request 'rome' .* not finite from layer 0 on"):
            function(damaged, REQUESTS[:2], settings=FREE, **tune)


def test_an_answer_that_is_already_given_takes_no_step(tiny_lm):
    easy = dataclasses.replace(FREE, stop=1e6)
    tune = {"config": tiny_lm.config, "tokenizer": tiny_lm.tokenizer, "settings": easy}
    together = fine_tune(tiny_lm.params, REQUESTS, **tune)
    for edit in (together, *fine_tune_each(tiny_lm.params, REQUESTS, **tune)):
        assert not change(edit).any()
        assert edit.trace.reached.all()
        assert not edit.trace.steps.any()


def test_progress_is_told_of_steps_and_of_requests(tiny_lm):
    calls = []
    tune = {"config": tiny_lm.config, "tokenizer": tiny_lm.tokenizer, "settings": FREE}
    fine_tune(tiny_lm.params, REQUESTS, progress=lambda *call: calls.append(call), **tune)
    assert calls[-1] == (4, 4)
    calls.clear()
    fine_tune_each(tiny_lm.params, REQUESTS, progress=lambda *call: calls.append(call), **tune)
    assert calls[-1] == (len(REQUESTS), len(REQUESTS))
