"""Learned edits of neurons, against hooks, autograd and Adam of PyTorch on transformers' models."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.tree_util import tree_leaves_with_path as leaves
from support.tiny_edits import REQUESTS, assert_unchanged, layer_kernels, torch_loss, torch_model

from jaxneurons import forward
from jaxneurons.edit import (
    FineTune,
    KnowledgeNeurons,
    LearnedNeurons,
    Multipliers,
    editing,
    learned,
)
from jaxneurons.edit import descent as descents
from jaxneurons.edit.encoding import encode_request
from jaxneurons.edit.learned import learn_neurons, learn_neurons_each
from jaxneurons.errors import DataError
from jaxneurons.neurons import NeuronSet
from jaxneurons.prompts.answers import encode_prompt

EVERY_SITE = NeuronSet.of(
    up=[(1, 2), (2, 60)],
    gate=[(1, 7)],
    act=[(1, 0), (1, 1), (2, 9)],
    down=[(1, 5)],
    q=[(1, 3)],
    k=[(2, 4)],
    v=[(2, 0)],
    o=[(1, 31)],
)
WRITERS = NeuronSet.of(act=[(1, 0), (1, 1), (2, 9)], up=[(1, 0), (1, 33)], gate=[(2, 10)])
WRITTEN = [(1, 0), (1, 1), (1, 33), (2, 9), (2, 10)]
MULTIPLIERS = LearnedNeurons(
    EVERY_SITE,
    learn="multipliers",
    kl_factor=0.5,
    others=("The answer is", "People who live in Rome"),
    norm=0.12,
    steps=4,
    learning_rate=0.05,
    stop=0.0,
)
ROWS = dataclasses.replace(MULTIPLIERS, neurons=WRITERS, learn="rows")
MODULES = {"up": "mlp.up_proj", "gate": "mlp.gate_proj", "down": "mlp.down_proj"} | {
    name: f"self_attn.{name}_proj" for name in "qkvo"
}


def tune(lm, settings, **changes):
    return {
        "config": lm.config,
        "tokenizer": lm.tokenizer,
        "settings": dataclasses.replace(settings, **changes),
    }


class Learner:
    """What is learned in PyTorch: hooks that change the model, bounds, results."""

    def __init__(self, model, settings):
        import torch

        self.torch, self.settings = torch, settings
        self.parameters, self.norms = {}, {}
        for layer, module in enumerate(model.model.layers):
            if settings.learn == "rows":
                self._rows(layer, module.mlp.down_proj)
                continue
            for site in settings.neurons.codes:
                index = [i for at, i in settings.neurons.pairs(site).tolist() if at == layer]
                if index:
                    self._multipliers(site, layer, module, index)

    def _multipliers(self, site, layer, module, index):
        theta = self.torch.zeros(len(index), requires_grad=True)
        self.parameters[site, layer] = theta

        def scaled(x):
            scale = self.torch.ones(x.shape[-1])
            return x * scale.index_put((self.torch.tensor(index),), theta.exp())

        if site == "act":
            module.mlp.down_proj.register_forward_pre_hook(lambda m, x: (scaled(x[0]),))
        else:
            where = module.get_submodule(MODULES[site])
            where.register_forward_hook(lambda m, x, y: scaled(y))

    def _rows(self, layer, down):
        index = [i for at, i in WRITTEN if at == layer]
        if not index:
            return
        change = self.torch.zeros(len(index), down.out_features, requires_grad=True)
        self.parameters["rows", layer] = change
        norms = down.weight[:, index].norm(dim=0)[:, None]
        self.norms["rows", layer] = norms
        unit = norms / math.sqrt(down.out_features)
        down.register_forward_hook(lambda m, x, y: y + x[0][..., index] @ (change * unit))

    def project(self):
        bound = self.settings.norm
        for (kind, _), values in self.parameters.items():
            with self.torch.no_grad():
                if kind == "rows":
                    most = bound * math.sqrt(values.shape[1])
                    norm = values.norm(dim=1, keepdim=True)
                    values.mul_(self.torch.where(norm > most, most / norm, 1.0))
                else:
                    values.clamp_(-bound, bound)

    def results(self):
        """Multipliers by (site, layer), or what is added to rows by ("rows", layer)."""
        with self.torch.no_grad():
            return {
                (kind, layer): (values * self.norms[kind, layer] / math.sqrt(values.shape[1]))
                if kind == "rows"
                else values.exp()
                for (kind, layer), values in self.parameters.items()
            }


def torch_learned(path, lm, requests, settings):
    """What PyTorch learns, and -log p before each step and after the last."""
    import torch

    model, plain = torch_model(path), torch_model(path)
    learner = Learner(model, settings)
    adam = torch.optim.Adam(list(learner.parameters.values()), lr=settings.learning_rate)
    others = [encode_prompt(lm.tokenizer, text) for text in settings.others]
    losses = []

    def next_logp(which, ids):
        return which(torch.tensor([ids])).logits[0, -1].log_softmax(-1)

    def total():
        objectives, answers = [], []
        for request in requests:
            ids = encode_request(lm.tokenizer, request, config=lm.config)
            answer = torch_loss(model, ids.prompt, ids.target)
            divergences = []
            for prompt in [ids.essence, *others]:
                edited, unedited = next_logp(model, prompt), next_logp(plain, prompt)
                divergences.append((edited.exp() * (edited - unedited)).sum())
            divergence = torch.stack(divergences).mean()
            objectives.append(answer + settings.kl_factor * divergence)
            answers.append(float(answer.detach()))
        losses.append(answers)
        return torch.stack(objectives).mean()

    for _ in range(settings.steps):
        adam.zero_grad()
        total().backward()
        adam.step()
        learner.project()
    total()
    return learner.results(), np.array(losses).T


def compare(lm, edit, theirs, neurons):
    """The changes of an edit with what PyTorch learned; nothing else changes."""
    if edit.settings.learn == "multipliers":
        ours = {
            (change.site, int(layer), int(index)): float(factor)
            for change in edit.changes
            for layer, index, factor in zip(change.layer, change.index, change.factor, strict=True)
        }
        assert len(ours) == len(neurons)
        for site in neurons.codes:
            for layer in {at for at, _ in neurons.pairs(site).tolist()}:
                index = [i for at, i in neurons.pairs(site).tolist() if at == layer]
                values = [ours[site, layer, i] for i in index]
                np.testing.assert_allclose(values, theirs[site, layer].numpy(), atol=1e-4)
                assert not np.allclose(values, 1)
        return
    edited = assert_unchanged(lm, edit, except_for=("layers", "ffn", "down", "kernel"))
    added = layer_kernels(edited) - layer_kernels(lm.params)
    for (_, layer), values in theirs.items():
        index = [i for at, i in WRITTEN if at == layer]
        np.testing.assert_allclose(added[layer, index], values.numpy(), atol=1e-4)
        assert np.abs(values.numpy()).max() > 0.02
        added[layer, index] = 0
    assert not added.any()


@pytest.mark.parametrize("settings", [MULTIPLIERS, ROWS], ids=["multipliers", "rows"])
def test_each_alone_as_pytorch_does(tiny_path, tiny_lm, settings):
    edits = learn_neurons_each(tiny_lm.params, REQUESTS, **tune(tiny_lm, settings))
    for edit, request in list(zip(edits, REQUESTS, strict=True))[1:]:
        theirs, losses = torch_learned(tiny_path, tiny_lm, [request], settings)
        compare(tiny_lm, edit, theirs, settings.neurons)
        np.testing.assert_allclose(edit.trace.loss, losses, rtol=1e-3)
        assert edit.facts == {"layers": [1, 2], "neurons": len(settings.neurons)}


@pytest.mark.parametrize("settings", [MULTIPLIERS, ROWS], ids=["multipliers", "rows"])
def test_together_as_pytorch_does(tiny_path, tiny_lm, settings):
    edit = learn_neurons(tiny_lm.params, REQUESTS, **tune(tiny_lm, settings))
    theirs, losses = torch_learned(tiny_path, tiny_lm, REQUESTS, settings)
    compare(tiny_lm, edit, theirs, settings.neurons)
    np.testing.assert_allclose(edit.trace.loss, losses, rtol=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("settings", [MULTIPLIERS, ROWS], ids=["multipliers", "rows"])
def test_the_edited_model_has_the_loss_that_the_trace_says(tiny_lm, edited_loss, settings):
    settings = dataclasses.replace(settings, norm=1.0, steps=6, learning_rate=0.2, stop=4.0)
    edits = learn_neurons_each(tiny_lm.params, REQUESTS, **tune(tiny_lm, settings))
    for edit, request in zip(edits, REQUESTS, strict=True):
        mean, total = edited_loss(edit, request)
        steps = int(edit.trace.steps[0])
        np.testing.assert_allclose(edit.trace.loss[0, steps], mean, rtol=1e-4)
        np.testing.assert_allclose(edit.trace.probability[0], np.exp(-total), rtol=1e-3)
        assert edit.trace.loss.shape == (1, 7)
        assert np.isnan(edit.trace.loss[0, steps + 1 :]).all()
        assert edit.trace.loss[0, steps] < edit.trace.loss[0, 0]
        # The divergence is part of what has to come below.
        assert not edit.trace.reached[0] or mean < settings.stop
        assert edit.trace.reached[0] or steps == 6


@pytest.mark.parametrize("settings", [MULTIPLIERS, ROWS], ids=["multipliers", "rows"])
def test_the_bound_holds_after_every_step(tiny_lm, settings):
    kernels = layer_kernels(tiny_lm.params)
    for steps in range(1, 5):
        for edit in learn_neurons_each(
            tiny_lm.params, REQUESTS, **tune(tiny_lm, settings, steps=steps)
        ):
            if settings.learn == "multipliers":
                sizes = [np.abs(np.log(change.factor)).max() for change in edit.changes]
            else:
                sizes = []
                for change in edit.changes:
                    old = kernels[change.layer, change.index]
                    moved = np.linalg.norm(change.values - old, axis=-1)
                    sizes.append((moved / np.linalg.norm(old, axis=-1)).max())
            assert max(sizes) <= settings.norm * (1 + 1e-4)
            assert max(sizes) > 0.9 * min(settings.norm, 0.05 * steps)


@pytest.mark.parametrize("settings", [MULTIPLIERS, ROWS], ids=["multipliers", "rows"])
def test_no_steps_change_nothing(tiny_lm, settings):
    for edit in learn_neurons_each(tiny_lm.params, REQUESTS, **tune(tiny_lm, settings, steps=0)):
        assert_unchanged(tiny_lm, edit, except_for=())
        assert edit.trace.loss.shape == (1, 1)
        assert not edit.trace.reached.any()


def values(edit):
    """All numbers that an edit sets, by site and layer or by layer."""
    if isinstance(edit.changes[0], Multipliers):
        return {change.site: np.asarray(change.factor) for change in edit.changes}
    return {change.layer: np.asarray(change.values) for change in edit.changes}


@pytest.mark.parametrize("settings", [MULTIPLIERS, ROWS], ids=["multipliers", "rows"])
def test_a_set_for_each_request_and_none_feels_the_others(tiny_lm, settings):
    sets = (
        settings.neurons,
        NeuronSet.of(act=[(1, 5)]),
        NeuronSet.of(act=[(2, 9), (2, 1)], up=[(1, 4)]),
    )
    edits = learn_neurons_each(tiny_lm.params, REQUESTS, **tune(tiny_lm, settings, neurons=sets))
    same = learn_neurons_each(tiny_lm.params, REQUESTS, **tune(tiny_lm, settings))
    last = learn_neurons_each(
        tiny_lm.params, REQUESTS[::-1], **tune(tiny_lm, settings, neurons=sets[::-1])
    )[::-1]
    for pair in ((edits[0], same[0]), *zip(edits, last, strict=True)):
        ours, theirs = map(values, pair)
        assert ours.keys() == theirs.keys()
        for key in ours:
            np.testing.assert_allclose(ours[key], theirs[key], atol=1e-4)
    for edit, neurons in zip(edits, sets, strict=True):
        assert edit.settings.neurons == neurons
        if settings.learn == "multipliers":
            changed = NeuronSet.of(
                **{
                    change.site: list(
                        zip(change.layer.tolist(), change.index.tolist(), strict=True)
                    )
                    for change in edit.changes
                }
            )
            assert changed == neurons
    assert [int(np.ravel(change.layer)[0]) for change in edits[1].changes] == [1]
    together = learn_neurons(tiny_lm.params, REQUESTS, **tune(tiny_lm, settings, neurons=sets))
    assert together.settings.neurons == sets[0] | sets[1] | sets[2]


def test_without_a_divergence_other_prompts_do_not_matter(tiny_lm):
    first, second = (
        learn_neurons_each(
            tiny_lm.params, REQUESTS[:1], **tune(tiny_lm, ROWS, kl_factor=0.0, others=others)
        )[0]
        for others in ((), ("anything", "goes"))
    )
    for key, ours in values(first).items():
        np.testing.assert_array_equal(ours, values(second)[key])


@pytest.mark.parametrize("settings", [MULTIPLIERS, ROWS], ids=["multipliers", "rows"])
def test_one_program_for_sets_of_a_size(tiny_lm, settings):
    learn_neurons_each(tiny_lm.params, REQUESTS, **tune(tiny_lm, settings))
    programs = descents._step_each._cache_size()
    moved = NeuronSet.of(
        **{
            site: [(layer, index ^ 1) for layer, index in settings.neurons.pairs(site).tolist()]
            for site in settings.neurons.codes
        }
    )
    assert moved != settings.neurons
    others = [
        dataclasses.replace(r, target=o.target)
        for r, o in zip(REQUESTS, REQUESTS[::-1], strict=True)
    ]
    numbers = {"norm": 0.3, "learning_rate": 0.01, "stop": 0.1, "steps": 2}
    learn_neurons_each(tiny_lm.params, others, **tune(tiny_lm, settings, neurons=moved, **numbers))
    assert descents._step_each._cache_size() == programs


@pytest.mark.parametrize(
    ("neurons", "learn", "message"),
    [
        (NeuronSet.of(q=[(0, 3)]), "rows", "'q' have no output row"),
        (NeuronSet.of(act=[(3, 3)]), "multipliers", "layer 3 is not in this model"),
        (NeuronSet.of(act=[(0, 64)]), "rows", "neuron 64 is not in this model"),
        (NeuronSet(), "multipliers", "no neurons"),
        ((WRITERS,), "rows", "1 sets of neurons for 3 requests"),
    ],
)
def test_neurons_that_cannot_be_learned_are_refused(tiny_lm, neurons, learn, message):
    settings = LearnedNeurons(neurons, learn=learn)
    for function in (learn_neurons, learn_neurons_each):
        with pytest.raises(DataError, match=message):
            function(tiny_lm.params, REQUESTS, **tune(tiny_lm, settings))


def test_numbers_that_are_not_finite_name_the_request(tiny_lm):
    kernel = tiny_lm.params["layers"]["ffn"]["up"]["kernel"].at[2, 0, 0].set(jnp.nan)
    ffn = {**tiny_lm.params["layers"]["ffn"], "up": {"kernel": kernel}}
    damaged = {**tiny_lm.params, "layers": {**tiny_lm.params["layers"], "ffn": ffn}}
    with pytest.raises(DataError, match=r"request 'rome' .* not finite from layer 2 on"):
        learn_neurons_each(damaged, REQUESTS, **tune(tiny_lm, MULTIPLIERS))
    with pytest.raises(DataError, match="no requests"):
        learn_neurons(tiny_lm.params, [], **tune(tiny_lm, MULTIPLIERS))


def test_the_base_stays_as_it_was(tiny_lm):
    before = {path: np.array(leaf) for path, leaf in leaves(tiny_lm.params)}
    settings = (MULTIPLIERS, ROWS, KnowledgeNeurons(WRITERS), FineTune(layer=1, steps=1))
    for of_method in settings:
        common = {"config": tiny_lm.config, "tokenizer": tiny_lm.tokenizer}
        for function in (editing.edit, editing.edit_each):
            function(tiny_lm.params, REQUESTS, settings=of_method, **common)
    after = leaves(tiny_lm.params)
    assert len(after) == len(before)
    for path, leaf in after:
        np.testing.assert_array_equal(before[path], leaf)


def test_the_divergence_is_from_the_unedited_model_and_counts(tiny_lm):
    """KL(edited || unedited) in NumPy, far from where both directions are the same."""
    neurons = NeuronSet.of(act=[(1, index) for index in range(32)])
    settings = dataclasses.replace(MULTIPLIERS, neurons=neurons, norm=3.0)
    plan = learned._plan(tiny_lm.params, REQUESTS[:1], tiny_lm.config, tiny_lm.tokenizer, settings)
    ((index, answers),) = plan.answers(1)
    data = jax.tree.map(lambda array: array[0], plan.batch(index, answers))
    theta = {"act": jnp.full(32, 2.0)}
    loss = plan.objective(tiny_lm.params, theta, data)

    def next_token(ids, scales):
        tokens = jnp.asarray([ids])
        logits = forward(tiny_lm.params, tokens, config=tiny_lm.config, scales=scales).logits
        exact = np.exp(np.asarray(logits[0, 0], np.float64))
        return exact / exact.sum()

    scales = neurons.scales(tiny_lm.config, np.exp(2.0))
    ids = encode_request(tiny_lm.tokenizer, REQUESTS[0], config=tiny_lm.config)
    prompts = [ids.essence, *(encode_prompt(tiny_lm.tokenizer, text) for text in settings.others)]
    pairs = [(next_token(prompt, scales), next_token(prompt, None)) for prompt in prompts]
    divergence = np.mean([(p * np.log(p / q)).sum() for p, q in pairs])
    backwards = np.mean([(q * np.log(q / p)).sum() for p, q in pairs])
    assert abs(divergence - backwards) > 0.01 * divergence
    np.testing.assert_allclose(loss.objective - loss.answer, 0.5 * divergence, rtol=1e-3)
