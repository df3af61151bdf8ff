"""Mixtures of experts: the router, and feed-forwards of which each token runs a few.

The router reads the residual stream and chooses some experts for each token. A token and one of its
experts are a *pair*; pairs are sorted by expert and multiplied block by block with the one kernel
that each block needs (`grouped_product`). So what is computed and kept goes by the number of pairs,
never by tokens times experts, and every kernel is read where it lies. Nothing here depends on the
values of the router but how many blocks there are to run.

`jax.lax.ragged_dot` has the same meaning, but on a CPU (JAX 0.10) it becomes a product of every row
with every expert, masked.
"""

import functools
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.custom_batching import custom_vmap
from jaxtyping import Array, Float, Int

from jaxneurons.model.config import ModelConfig
from jaxneurons.model.parameters import Params

PRODUCTS = "products of experts"
"""The name, for `jax.checkpoint` policies, of what `grouped_product` returns."""

LOOP = "blocks_of_experts_"
"""What the names of loops over blocks begin with; the number of full blocks follows."""

FEW_ROWS = 32
"""Rows that a block may have for about the price of one: reading the kernel takes the time."""
MOST_ROWS = 512
"""Rows of a block at most."""


class Routing(NamedTuple):
    """The experts that each token runs.

    Attributes:
      experts: their numbers, the one with the largest weight first.
      weights: what their outputs are multiplied by before they are added.
    """

    experts: Int[Array, "batch seq choice"]
    weights: Float[Array, "batch seq choice"]

    def dense(self, experts: int) -> Float[Array, "batch seq experts"]:
        """The weights of all experts, 0 for those that a token does not run."""
        one_hot = jax.nn.one_hot(self.experts, experts, dtype=self.weights.dtype)
        return jnp.einsum("bsc,bsce->bse", self.weights, one_hot)

    def pick(self, values: Array, experts: int) -> Array:
        """Of values that broadcast to [batch, seq, neurons of all experts], those of the chosen.

        Returns:
          What broadcasts to [batch, seq, choice, neurons of an expert].
        """
        if values.shape[-1:] in ((), (1,)):
            return values[..., None] if values.ndim else values
        values = values.reshape(*(1,) * (3 - values.ndim), *values.shape[:-1], experts, -1)
        batch, seq = (jnp.arange(size) if size > 1 else 0 for size in values.shape[:2])
        batch = batch[:, None, None] if values.shape[0] > 1 else batch  # pyright: ignore
        seq = seq[None, :, None] if values.shape[1] > 1 else seq  # pyright: ignore
        return values[batch, seq, self.experts]


class Stacked(NamedTuple):
    """The kernels of one layer's experts, where they lie among those of all layers.

    A layer's part of the stack would be copied for the loop over blocks, all experts of it.

    Attributes:
      kernels: of every layer.
      layer: which one is meant.
    """

    kernels: Float[Array, "layer expert input output"]
    layer: Any


class ChosenNeurons(NamedTuple):
    """Activations of the neurons of chosen experts; all others of the layer are 0.

    Attributes:
      values: of each chosen expert.
      experts: which they are.
    """

    values: Float[Array, "batch seq choice width"]
    experts: Int[Array, "batch seq choice"]

    def at(self, positions: Int[Array, "batch at"]) -> "ChosenNeurons":
        """Those of some positions."""
        return ChosenNeurons(
            jnp.take_along_axis(self.values, positions[..., None, None], axis=1),
            jnp.take_along_axis(self.experts, positions[..., None], axis=1),
        )

    def pick(
        self, expert: Int[Array, " neuron"], index: Int[Array, " neuron"]
    ) -> Float[Array, "batch seq neuron"]:
        """Some neurons, by expert and index in it."""
        here = self.experts[..., None] == expert
        return jnp.where(here, self.values[..., index], 0).sum(-2)

    def dense(self, experts: int) -> Float[Array, "batch seq neurons"]:
        """All neurons of the layer: neuron i of expert e at e * width + i."""
        *tokens, _, width = self.values.shape
        rows = jnp.zeros((*tokens, experts, width), self.values.dtype)
        batch, seq = (jnp.arange(size) for size in tokens)
        rows = rows.at[batch[:, None, None], seq[None, :, None], self.experts].set(self.values)
        return rows.reshape(*tokens, experts * width)

    def total(self, weights: Float[Array, "batch seq"], experts: int) -> Array:
        """The weighted sum over positions of all neurons, float32 [batch, neurons].

        Positions of weight 0 add nothing, whatever their values.
        """
        batch, _, _, width = self.values.shape
        values = self.values.astype(jnp.float32)
        values = jnp.where(weights[..., None, None] == 0, 0, values * weights[..., None, None])
        total = jnp.zeros((batch, experts, width), jnp.float32)
        total = total.at[jnp.arange(batch)[:, None, None], self.experts].add(values)
        return total.reshape(batch, experts * width)


SiteOfExperts = Callable[[str, Array, Routing], Array]
"""What `layers.block` does at a site: scales the activation of the chosen experts and keeps it."""


def route(params: Params, h: Float[Array, "batch seq hidden"], config: ModelConfig) -> Routing:
    """The experts of each token, by the router's probabilities.

    Logits and their softmax over all experts are float32. Where experts tie, the one with the
    lower number comes first, as `jax.lax.top_k` has it.
    """
    logits = jnp.einsum(
        "bsh,he->bse", h, params["kernel"], preferred_element_type=jnp.float32
    ).astype(jnp.float32)
    weights, experts = jax.lax.top_k(jax.nn.softmax(logits, axis=-1), config.experts_per_token)
    if config.normalise_experts:
        weights = weights / weights.sum(-1, keepdims=True)
    return Routing(experts, weights.astype(h.dtype))


def feed_forward(
    params: Params,
    h: Float[Array, "batch seq hidden"],
    *,
    config: ModelConfig,
    activate: Callable[[Array], Array],
    site: SiteOfExperts,
) -> tuple[Float[Array, "batch seq hidden"], Routing]:
    """What the chosen experts add to the stream, each times its weight, and the routing.

    Args:
      params: `router`, and `gate`, `up` and `down` of all experts.
      h: what the router and the experts read.
      config: the model's shape.
      activate: the activation function of the gate.
      site: scales the activations inside of the experts, before the router's weight.
    """
    routing = route(params["router"], h, config)
    pairs = (*routing.experts.shape, h.shape[-1])
    expert = routing.experts.reshape(-1)

    def linear(name: str, x: Array) -> Array:
        y = grouped_product(x.reshape(-1, x.shape[-1]), params[name]["kernel"], expert)
        return y.reshape(*routing.experts.shape, -1)

    each = jnp.broadcast_to(h[:, :, None], pairs)
    up = site("up", linear("up", each), routing)
    gate = site("gate", linear("gate", each), routing)
    act = site("act", up * activate(gate), routing)
    return jnp.einsum("bsch,bsc->bsh", linear("down", act), routing.weights), routing


def grouped_product(
    x: Float[Array, "pair input"],
    kernels: Float[Array, "expert input output"] | Stacked,
    expert: Int[Array, " pair"],
) -> Float[Array, "pair output"]:
    """Each row times the kernel of its expert.

    Differentiable (in reverse mode) in rows and kernels, any number of times. Under `vmap` the rows
    of all entries are sorted together, so that kernels which are the same for all are never copied.

    Args:
      x: rows, in any order.
      kernels: of all experts.
      expert: of each row.
    """
    if isinstance(kernels, Stacked):
        count = kernels.kernels.shape[1]
        expert = expert + count * kernels.layer
        kernels = kernels.kernels.reshape(-1, *kernels.kernels.shape[2:])
    else:
        count = len(kernels)
    kind = _ProductKind(count, transposed=False)
    return checkpoint_name(_product(kind, x, kernels, expert), PRODUCTS)


class _ProductKind(NamedTuple):
    """What is known of a product before it is traced.

    Attributes:
      experts: that rows are of, at most; there may be more kernels.
      transposed: rows are multiplied by the kernels' transposes.
    """

    experts: int
    transposed: bool


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _product(kind: _ProductKind, x: Array, kernels: Array, expert: Array) -> Array:
    """`grouped_product`, with the kernels or their transposes."""
    return _mapped_product(kind)(x, kernels, expert)


def _product_forward(kind: _ProductKind, x: Array, kernels: Array, expert: Array) -> Any:
    return _product(kind, x, kernels, expert), (x, kernels, expert)


def _product_backward(kind: _ProductKind, saved: Any, dy: Array) -> Any:
    x, kernels, expert = saved
    left, right = (dy, x) if kind.transposed else (x, dy)
    d_kernels = _outer(kind.experts, left, right, expert, jnp.zeros_like(kernels))
    other = kind._replace(transposed=not kind.transposed)
    return _product(other, dy, kernels, expert), d_kernels, None


_product.defvjp(_product_forward, _product_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _outer(experts: int, x: Array, y: Array, expert: Array, start: Array) -> Array:
    """`start` [expert, ...] and the outer products of rows, added up by expert."""
    return _mapped_outer(experts)(x, y, expert, start)


def _outer_forward(experts: int, x: Array, y: Array, expert: Array, start: Array) -> Any:
    return _outer(experts, x, y, expert, start), (x, y, expert)


def _outer_backward(experts: int, saved: Any, d_sum: Array) -> Any:
    x, y, expert = saved
    dx = _product(_ProductKind(experts, transposed=True), y, d_sum, expert)
    return dx, _product(_ProductKind(experts, transposed=False), x, d_sum, expert), None, d_sum


_outer.defvjp(_outer_forward, _outer_backward)


class _Blocks(NamedTuple):
    """Rows sorted by expert, cut into blocks of one size that each belong to one expert.

    Attributes:
      order: the rows, sorted; [row + size], so that every block is whole.
      place: where each row is among the sorted ones.
      size: rows of a block.
      offsets: the first row of each expert.
      counts: rows of each expert.
      ends: blocks of each expert and all before it.
    """

    order: Array
    place: Array
    size: int
    offsets: Array
    counts: Array
    ends: Array

    @property
    def number(self) -> Array:
        """How many blocks there are: at most rows / size + experts, and at most the rows."""
        return self.ends[-1]

    @property
    def scope(self) -> AbstractContextManager[Any]:
        """Names the loop over the blocks, with how many there are if all are full."""
        return jax.named_scope(f"{LOOP}{-(-len(self.place) // self.size)}")

    def block(self, index: Array) -> tuple[Array, Array, Array]:
        """Expert and first row of a block, and how many rows are the expert's."""
        expert = jnp.sum(self.ends <= index)
        before = jnp.where(expert == 0, 0, self.ends[expert - 1])
        done = (index - before) * self.size
        return expert, self.offsets[expert] + done, self.counts[expert] - done


def block_size(rows: int, experts: int) -> int:
    """Rows of a block: small enough that blocks which are not full waste little."""
    share = max(1, rows // max(1, experts))
    if share > FEW_ROWS:
        share = max(FEW_ROWS, share // 4)
    return min(MOST_ROWS, 1 << (share - 1).bit_length())


def _blocks(expert: Array, kernels: int, experts: int) -> _Blocks:
    """Blocks of rows of so many experts at most, whose numbers are below that of the kernels."""
    rows, size = len(expert), block_size(len(expert), experts)
    order = jnp.argsort(expert, stable=True)
    counts = jnp.zeros(kernels, jnp.int32).at[expert].add(1)
    return _Blocks(
        jnp.pad(order, (0, size)),
        jnp.zeros(rows, jnp.int32).at[order].set(jnp.arange(rows, dtype=jnp.int32)),
        size,
        jnp.cumsum(counts) - counts,
        counts,
        jnp.cumsum(-(-counts // size)),
    )


def _run_product(kind: _ProductKind, x: Array, kernels: Array, expert: Array) -> Array:
    blocks = _blocks(expert, len(kernels), kind.experts)
    rows = x[blocks.order]
    outputs = kernels.shape[1 if kind.transposed else 2]

    def add_block(index: Array, out: Array) -> Array:
        which, start, _ = blocks.block(index)
        kernel = jax.lax.dynamic_index_in_dim(kernels, which, 0, keepdims=False)
        part = jax.lax.dynamic_slice_in_dim(rows, start, blocks.size)
        y = part @ (kernel.T if kind.transposed else kernel)
        # What a block that is not full writes behind its rows, the next one writes anew.
        return jax.lax.dynamic_update_slice_in_dim(out, y, start, 0)

    out = jnp.zeros((len(rows), outputs), jnp.result_type(x, kernels))
    with blocks.scope:
        out = jax.lax.fori_loop(0, blocks.number, add_block, out)
    return out[blocks.place].astype(x.dtype)


def _run_outer(experts: int, x: Array, y: Array, expert: Array, start: Array) -> Array:
    blocks = _blocks(expert, len(start), experts)
    left, right = x[blocks.order], y[blocks.order]

    def add_block(index: Array, total: Array) -> Array:
        which, first, count = blocks.block(index)
        a = jax.lax.dynamic_slice_in_dim(left, first, blocks.size)
        b = jax.lax.dynamic_slice_in_dim(right, first, blocks.size)
        a = jnp.where((jnp.arange(blocks.size) < count)[:, None], a, 0)
        part = jnp.einsum("ri,ro->io", a, b, preferred_element_type=jnp.float32)
        before = jax.lax.dynamic_index_in_dim(total, which, 0, keepdims=False)
        return jax.lax.dynamic_update_index_in_dim(total, before + part, which, 0)

    with blocks.scope:
        total = jax.lax.fori_loop(0, blocks.number, add_block, start.astype(jnp.float32))
    return total.astype(start.dtype)


def _with_batch(batched: bool, size: int, value: Array) -> Array:
    return value if batched else jnp.broadcast_to(value, (size, *value.shape))


@functools.cache
def _mapped_product(kind: _ProductKind) -> Callable[..., Array]:
    """`_run_product` whose `vmap` is itself, of the rows of all entries."""
    mapped = custom_vmap(functools.partial(_run_product, kind))

    @mapped.def_vmap
    def _(size: int, batched: Any, x: Array, kernels: Array, expert: Array) -> Any:
        x, expert = _with_batch(batched[0], size, x), _with_batch(batched[2], size, expert)
        experts = 1
        if batched[1]:
            expert = expert + kernels.shape[1] * jnp.arange(size)[:, None]
            kernels, experts = kernels.reshape(-1, *kernels.shape[2:]), size
        run = _mapped_product(kind._replace(experts=kind.experts * experts))
        y = run(x.reshape(-1, x.shape[-1]), kernels, expert.reshape(-1))
        return y.reshape(*x.shape[:2], -1), True

    return mapped


@functools.cache
def _mapped_outer(experts: int) -> Callable[..., Array]:
    """`_run_outer` whose `vmap` is itself, of the rows and sums of all entries."""
    mapped = custom_vmap(functools.partial(_run_outer, experts))

    @mapped.def_vmap
    def _(size: int, batched: Any, x: Array, y: Array, expert: Array, start: Array) -> Any:
        x, y = _with_batch(batched[0], size, x), _with_batch(batched[1], size, y)
        start = _with_batch(batched[3], size, start)
        expert = _with_batch(batched[2], size, expert) + start.shape[1] * jnp.arange(size)[:, None]
        rows = (a.reshape(-1, a.shape[-1]) for a in (x, y))
        run = _mapped_outer(experts * size)
        total = run(*rows, expert.reshape(-1), start.reshape(-1, *start.shape[2:]))
        return total.reshape(start.shape), True

    return mapped
