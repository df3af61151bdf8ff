"""Learned edits of neurons, against hooks, autograd and Adam of PyTorch on transformers' models."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.edits import REQUESTS, assert_unchanged, layer_kernels, torch_loss, torch_model

from jaxneurons import forward
from jaxneurons.edit import LearnedNeurons, Multipliers
from jaxneurons.edit import descent as descents
from jaxneurons.edit.encoding import encode_request
from jaxneurons.edit.learned import learn_neurons, learn_neurons_each
from jaxneurons.errors import ConfigError, DataError
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
    for edit, request in zip(edits, REQUESTS, strict=True):
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
