"""Learned edits of located neurons: multipliers of them, or additions to what they write.

Only the neurons of a set change. With optax's Adam, from the model as it is, this is minimised:

    -log p(new answer | prompt), mean over the answer's tokens
    + kl_factor * mean over other prompts of KL(next token, edited || unedited)

The other prompts are "{subject} is a" and neutral ones (`LearnedNeurons.others`); of the request,
the prompt alone is learned from: its paraphrases and neighbours are for measuring. Multipliers are
exp(theta), |theta| <= norm; the change of an output row is at most norm times the row. Both are
projected back after each step. Where multipliers are learned, a batch of edited models is a batch
of multipliers; where rows are, a batch of a few rows of each layer.
"""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from jaxneurons.edit.changes import Multipliers, Rows
from jaxneurons.edit.descent import (
    Adam,
    Descended,
    alone,
    check_finite,
    descend_each,
    descend_together,
    trace,
)
from jaxneurons.edit.encoding import EncodedRequest, encode_request
from jaxneurons.edit.method import Edit, LearnedNeurons
from jaxneurons.edit.neuron_loss import (
    NO_LAYER,
    Kept,
    Learning,
    NeuronLoss,
    PlacedNeurons,
    PlacedRows,
    next_log_probability,
)
from jaxneurons.edit.output_rows import OutputRows, output_rows, set_for_each
from jaxneurons.edit.requests import EditRequest
from jaxneurons.edit.teacher_forcing import Answers, answer_batches, entering, run_layers
from jaxneurons.errors import DataError
from jaxneurons.model.config import ModelConfig
from jaxneurons.model.parameters import Params
from jaxneurons.model.token_ids import check_ids
from jaxneurons.neurons.sets import NeuronSet
from jaxneurons.processes.sharing import fetch
from jaxneurons.prompts.answers import encode_prompt
from jaxneurons.prompts.batches import bucket
from jaxneurons.storage.progress import Progress

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ROWS = 8
"""Requests that are optimised side by side, at most."""

MEMORY = 1 << 30
"""Bytes that additions to rows of requests side by side, with moments and gradients, may take."""

_COPIES = 6
"""Arrays of the additions' size that a step needs."""


def learn_neurons(
    params: Params,
    requests: Sequence[EditRequest],
    *,
    config: ModelConfig,
    tokenizer: "PreTrainedTokenizerBase",
    settings: LearnedNeurons,
    progress: Progress | None = None,
) -> Edit:
    """Learn one change of neurons for all requests together: on the mean of their losses.

    Of several sets, one for each request, it is the union that changes. `trace.steps` is the same
    for all requests; one is `reached` if its own loss is below `stop` at the end. What the other
    prompts' next tokens were is held for all requests at once: 4 bytes for each token of the
    vocabulary and each such prompt.

    Args:
      params: the model's parameters.
      requests: what is to be edited.
      config: the model's shape.
      tokenizer: the model's.
      settings: of the method.
      progress: called with steps done and steps at most.

    Raises:
      DataError: no requests, one that cannot be encoded, no neurons or some that the model does not
        have or that have no row to learn, another number of sets than of requests, or numbers that
        are not finite.
    """
    plan = _plan(params, requests, config, tokenizer, settings)
    union = functools.reduce(NeuronSet.__or__, plan.sets)
    plan = dataclasses.replace(plan, sets=(union,) * len(requests))
    batches = [(index, plan.batch(index, answers)) for index, answers in plan.answers(ROWS)]
    descended = descend_together(
        plan.objective,
        params,
        plan.zeros(()),
        batches,
        jnp.float32(settings.norm),
        adam=plan.adam,
        progress=progress,
    )
    plan.check(descended, range(len(requests)))
    return plan.edit(descended, union)


def learn_neurons_each(
    params: Params,
    requests: Sequence[EditRequest],
    *,
    config: ModelConfig,
    tokenizer: "PreTrainedTokenizerBase",
    settings: LearnedNeurons,
    progress: Progress | None = None,
) -> list[Edit]:
    """Learn a change of neurons for each request alone, from the parameters as they are.

    As `learn_neurons` for every request by itself, but many side by side.

    Args:
      params: the model's parameters.
      requests: what is to be edited.
      config: the model's shape.
      tokenizer: the model's.
      settings: of the method.
      progress: called with requests done and how many there are.

    Raises:
      DataError: as `learn_neurons`.
    """
    plan = _plan(params, requests, config, tokenizer, settings)
    edits: dict[int, Edit] = {}
    for index, answers in plan.answers(plan.rows):
        data = plan.batch(index, answers)
        filled = len(answers.lengths)
        descended = descend_each(
            plan.objective,
            params,
            plan.zeros((filled,)),
            data,
            jnp.full(filled, settings.norm, jnp.float32),
            adam=plan.adam,
        )
        for row, i in enumerate(index.tolist()):
            single = alone(descended, row)
            plan.check(single, [i])
            edits[i] = plan.edit(single, plan.sets[i])
        if progress is not None:
            progress(len(edits), len(requests))
    return [edits[i] for i in range(len(requests))]


def _plan(
    params: Params,
    requests: Sequence[EditRequest],
    config: ModelConfig,
    tokenizer: "PreTrainedTokenizerBase",
    settings: LearnedNeurons,
) -> "_Plan":
    """The requests as they are learned, checked."""
    if not requests:
        raise DataError("no requests: give at least one fact to edit")
    sets = set_for_each(settings.neurons, len(requests))
    for neurons in dict.fromkeys(sets):
        if not neurons:
            raise DataError("no neurons: give at least one that is to change")
        neurons.check(config)
        if settings.learn == "rows":
            output_rows(neurons, config)
    return _Plan(
        params=params,
        config=config,
        settings=settings,
        requests=requests,
        sets=sets,
        encoded=[encode_request(tokenizer, request, config=config) for request in requests],
        others=_other_prompts(tokenizer, settings, config) if settings.kl_factor else None,
        first=min(int(neurons.pairs(site)[0, 0]) for neurons in sets for site in neurons.codes),
    )


def _other_prompts(
    tokenizer: "PreTrainedTokenizerBase", settings: LearnedNeurons, config: ModelConfig
) -> list[tuple[int, ...]]:
    """Ids of the neutral prompts, but for those with words that the tokenizer does not know."""
    prompts = [encode_prompt(tokenizer, text) for text in settings.others]
    prompts = [ids for ids in prompts if tokenizer.unk_token_id not in ids]
    for ids in prompts:
        check_ids(ids, config.vocab_size, tokenizer)
    return prompts


@dataclasses.dataclass(frozen=True, eq=False)
class _Plan:
    """Requests with their neurons, ready to be learned.

    Attributes:
      params: the model's parameters.
      config: the model's shape.
      settings: of the method.
      requests: what is to be edited.
      sets: the neurons of each request.
      encoded: each request as ids.
      others: ids of neutral prompts; None where the divergence has no weight.
      first: the lowest layer that changes.
    """

    params: Params
    config: ModelConfig
    settings: LearnedNeurons
    requests: Sequence[EditRequest]
    sets: tuple[NeuronSet, ...]
    encoded: list[EncodedRequest]
    others: list[tuple[int, ...]] | None
    first: int

    @property
    def objective(self) -> NeuronLoss:
        """What is minimised."""
        return NeuronLoss(self.config, self.first, float(self.settings.kl_factor))

    @property
    def adam(self) -> Adam:
        """How far, how fast and until when."""
        return Adam(self.settings.steps, self.settings.learning_rate, self.settings.stop)

    @property
    def rows(self) -> int:
        """Requests side by side, a power of two."""
        if self.settings.learn == "multipliers":
            return ROWS
        bytes_each = _COPIES * 4 * int(np.prod((*self._row_shape, self.config.hidden_size)))
        return 1 << (max(1, min(ROWS, MEMORY // bytes_each)).bit_length() - 1)

    def answers(self, rows: int) -> list[tuple[np.ndarray, Answers]]:
        """The requests' prompts with their answers, in batches."""
        prompts = [request.prompt for request in self.encoded]
        return answer_batches(prompts, [request.target for request in self.encoded], rows)

    def zeros(self, shape: tuple[int, ...]) -> Any:
        """Variables that change nothing, with leading axes of a shape."""
        if self.settings.learn == "rows":
            return jnp.zeros((*shape, *self._row_shape, self.config.hidden_size), jnp.float32)
        return {
            site: jnp.zeros((*shape, count), jnp.float32)
            for site, count in self._neuron_counts.items()
        }

    def batch(self, index: np.ndarray, answers: Answers) -> Learning:
        """What the loss of each request of a batch needs."""
        padded = [*index.tolist(), *[int(index[0])] * (len(answers.lengths) - len(index))]
        x = entering(
            self.params, answers.tokens, answers.lengths, config=self.config, end=self.first
        )
        place = self._placed_rows if self.settings.learn == "rows" else self._placed_neurons
        return Learning(x, *answers[1:], self._kept(padded), place(padded))

    def edit(self, descended: Descended, neurons: NeuronSet) -> Edit:
        """What was learned of one set."""
        learn = self._row_changes if self.settings.learn == "rows" else self._multipliers
        layers = {int(layer) for site in neurons.codes for layer in neurons.pairs(site)[:, 0]}
        return Edit(
            changes=learn(descended.variables, neurons),
            settings=dataclasses.replace(self.settings, neurons=neurons),
            trace=trace(descended, stop=self.settings.stop),
            keys={},
            facts={"layers": sorted(layers), "neurons": len(neurons)},
        )

    def check(self, descended: Descended, index: Sequence[int]) -> None:
        """Raise `DataError` for a request whose loss stopped being finite."""
        check_finite(
            self.params,
            descended,
            [self.requests[i] for i in index],
            [self.encoded[i].prompt for i in index],
            config=self.config,
            learning_rate=self.settings.learning_rate,
        )

    def _kept(self, padded: list[int]) -> Kept | None:
        if self.others is None:
            return None
        prompts = [ids for i in padded for ids in (self.encoded[i].essence, *self.others)]
        longest = max(len(ids) for ids in (*self.others, *(r.essence for r in self.encoded)))
        tokens = np.zeros((len(prompts), bucket(longest, step=4)), np.int32)
        for row, ids in enumerate(prompts):
            tokens[row, : len(ids)] = ids
        lengths = jnp.asarray([len(ids) for ids in prompts], jnp.int32)
        x, logp = _unedited(
            self.params, jnp.asarray(tokens), lengths, config=self.config, first=self.first
        )
        each = (len(padded), 1 + len(self.others))
        return Kept(*(array.reshape(*each, *array.shape[1:]) for array in (x, lengths, logp)))

    @functools.cached_property
    def _neuron_counts(self) -> dict[str, int]:
        """Room for the multipliers of each site: powers of two, as other sets may fill too."""
        sites = dict.fromkeys(site for neurons in self.sets for site in neurons.codes)
        return {
            site: _power_of_two(max(len(neurons.codes.get(site, ())) for neurons in self.sets))
            for site in sorted(sites)
        }

    @functools.cached_property
    def _row_shape(self) -> tuple[int, int]:
        """Layers from the first that changes, and room for the rows of each."""
        rows = {neurons: output_rows(neurons, self.config) for neurons in dict.fromkeys(self.sets)}
        most = max(int(np.bincount(of_set.layer).max()) for of_set in rows.values())
        return self.config.num_layers - self.first, _power_of_two(most)

    def _placed_neurons(self, padded: list[int]) -> PlacedNeurons:
        layer, index = {}, {}
        for site, count in self._neuron_counts.items():
            layer[site] = np.full((len(padded), count), NO_LAYER, np.int32)
            index[site] = np.zeros((len(padded), count), np.int32)
            for row, i in enumerate(padded):
                pairs = self.sets[i].pairs(site)
                layer[site][row, : len(pairs)] = pairs[:, 0] - self.first
                index[site][row, : len(pairs)] = pairs[:, 1]
        return PlacedNeurons(_on_device(layer), _on_device(index))

    def _placed_rows(self, padded: list[int]) -> PlacedRows:
        index = np.zeros((len(padded), *self._row_shape), np.int32)
        unit = np.zeros(index.shape, np.float32)
        for row, i in enumerate(padded):
            rows = output_rows(self.sets[i], self.config)
            at = (row, rows.layer - self.first, _slots(rows))
            index[at] = rows.index
            norms = np.linalg.norm(fetch(rows.values(self.params)), axis=-1)
            unit[at] = norms / np.sqrt(self.config.hidden_size)
        return PlacedRows(jnp.asarray(index), jnp.asarray(unit))

    def _multipliers(self, theta: Mapping[str, Any], neurons: NeuronSet) -> tuple[Multipliers, ...]:
        changes = []
        for site in neurons.codes:
            layer, index = neurons.pairs(site).T.astype(np.int32)
            factor = jnp.exp(theta[site][: len(layer)])
            changes.append(Multipliers(site, jnp.asarray(layer), jnp.asarray(index), factor))
        return tuple(changes)

    def _row_changes(self, change: Any, neurons: NeuronSet) -> tuple[Rows, ...]:
        rows = output_rows(neurons, self.config)
        old = jnp.asarray(fetch(rows.values(self.params)))
        unit = jnp.linalg.norm(old, axis=-1, keepdims=True) / np.sqrt(self.config.hidden_size)
        return rows.changes(old + change[rows.layer - self.first, _slots(rows)] * unit)


@functools.partial(jax.jit, static_argnames=("config", "first"))
def _unedited(
    params: Params, tokens: Array, lengths: Array, *, config: ModelConfig, first: int
) -> tuple[Array, Array]:
    """The stream as it enters a layer, and log p of every next token."""
    x = entering(params, tokens, lengths, config=config, end=first)
    y = run_layers(params, x, lengths, config=config, first=first)
    return x, next_log_probability(params, y, lengths, config=config)


def _power_of_two(count: int) -> int:
    return 1 << max(0, count - 1).bit_length()


def _slots(rows: OutputRows) -> np.ndarray:
    """The number of each row among those of its layer; rows are sorted by layer."""
    return np.arange(len(rows.layer)) - np.searchsorted(rows.layer, rows.layer)


def _on_device(arrays: Mapping[str, np.ndarray]) -> dict[str, Array]:
    return {name: jnp.asarray(array) for name, array in arrays.items()}
