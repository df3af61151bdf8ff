"""A tiny model on meshes of eight devices: what is computed, and what XLA made of it."""

import collections
import dataclasses
import functools
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from support.models import random_tokens, tiny_config, tiny_params

from jaxneurons import NeuronSet, Quadrature, forward, integrated_gradients
from jaxneurons.engine import average_precision, generate_ablated, mean_responses, prefill
from jaxneurons.engine.last_position import changes, last_position, scaled_answers
from jaxneurons.model import greedy, make_mesh, sample, shard_params
from jaxneurons.model.sharding import PRESETS, batch_sharding
from jaxneurons.neurons import stack_scales

MESHES = ("8x1", "4x2", "2x4", "1x8")
EVEN = tiny_config(
    vocab_size=64,
    hidden_size=64,
    intermediate_size=128,
    num_layers=3,
    num_heads=8,
    num_kv_heads=8,
    tied=False,
)
"""Eight devices divide everything."""
ODD = tiny_config(
    vocab_size=50, hidden_size=36, intermediate_size=42, num_layers=2, num_heads=6, num_kv_heads=3
)
"""Nothing is divided by eight; hidden and heads by two or four."""
BATCH, SEQ = 8, 7
SETS = [NeuronSet.of(up=[(0, 3), (1, 5)]), NeuronSet.of(act=[(1, 7)], gate=[(0, 2)])]


@dataclasses.dataclass(frozen=True)
class Inputs:
    """A model and prompts, on one device or on a mesh."""

    config: Any
    params: Any
    tokens: Any
    targets: Any
    lengths: Any

    def on(self, mesh: str, preset: str) -> "Inputs":
        made, rules = make_mesh(mesh), PRESETS[preset]
        tokens, targets, lengths = jax.device_put(
            (self.tokens, self.targets, self.lengths), batch_sharding(made, rules)
        )
        params = shard_params(self.params, self.config, made, rules)
        return Inputs(self.config, params, tokens, targets, lengths)


@functools.cache
def inputs(config: Any) -> Inputs:
    lengths = np.array([7, 5, 6, 7, 7, 4, 3, 7], np.int32)
    tokens, targets = random_tokens(config, (BATCH, SEQ)), jnp.arange(BATCH)
    return Inputs(config, tiny_params(config), tokens, targets, jnp.asarray(lengths))


@functools.partial(jax.jit, static_argnames="config")
def _passes(params, tokens, lengths, *, config):
    """Everything but attribution and edits, as one program."""
    out = forward(params, tokens, config=config, lengths=lengths, at="all", capture=("act", "q"))
    means = mean_responses(params, tokens, lengths, config=config, sites=("up", "down"))
    scales = stack_scales(SETS, config)
    return {
        "logits": out.logits,
        "activations": out.activations,
        "greedy": greedy(params, tokens, config=config, lengths=lengths, steps=3),
        "sampled": sample(
            params, tokens, jax.random.key(1), config=config, lengths=lengths, steps=3
        ),
        "responses": means,
        "precision": average_precision(means["up"][1][:3], means["up"][1][3:]),
        "ablated": generate_ablated(params, tokens, lengths, scales, config=config, steps=2),
    }


def passes(given: Inputs) -> Any:
    return _passes(given.params, given.tokens, given.lengths, config=given.config)


def trials(given: Inputs) -> Any:
    pre = jax.jit(prefill, static_argnames="config")(
        given.params,
        given.tokens,
        given.targets[:, None],
        config=given.config,
        lengths=given.lengths,
    )
    neurons = NeuronSet.of(up=[(0, 1), (1, 4)])
    change = changes([[(neurons, factor)] * BATCH for factor in (0.0, 2.0)], site="up")
    return scaled_answers(given.params, last_position(pre), change, config=given.config)


def attribution(given: Inputs, rule: str) -> Any:
    result = integrated_gradients(
        given.params,
        given.tokens,
        given.targets,
        config=given.config,
        lengths=given.lengths,
        quadrature=Quadrature(rule, steps=4),
    )
    # Gap and error are differences of these, and mostly rounding.
    return result.scores, result.probability, result.ablated, result.nodes


def assert_equal(out: Any, expected: Any, tolerance: float = 1e-5) -> None:
    """Integers are the same; floating-point arrays differ by a share of their norm at most."""
    pairs = zip(jax.tree_util.tree_leaves_with_path(out), jax.tree.leaves(expected), strict=True)
    for (path, ours), theirs in pairs:
        ours, theirs = np.asarray(ours), np.asarray(theirs)
        name = jax.tree_util.keystr(path)
        if np.issubdtype(ours.dtype, np.floating):
            assert not theirs.size or np.linalg.norm(theirs) > 0, name
            error = np.linalg.norm(ours - theirs)
            assert error <= tolerance * max(np.linalg.norm(theirs), 1e-3), (name, error)
        else:
            np.testing.assert_array_equal(ours, theirs, err_msg=name)


COLLECTIVE = re.compile(
    r"= (\(?)(\w+)\[([\d,]*)\][^=]*? "
    r"(all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter)(?:-start)?\("
)


def collectives(program: Any) -> tuple[dict[str, int], list[tuple[int, ...]]]:
    """Collectives of a compiled program by kind, and the shapes that all-gathers make."""
    count: collections.Counter[str] = collections.Counter()
    gathered = []
    for found in COLLECTIVE.finditer(program.as_text()):
        count[found[4]] += 1
        if found[4] == "all-gather":
            gathered.append(tuple(int(n) for n in found[3].split(",") if n))
    return dict(count), gathered
