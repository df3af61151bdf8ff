"""How many rows, and how much memory: what attribution keeps, counted from a model's shape."""

import jax

from jaxneurons.engine.rows import MANY_KEYS
from jaxneurons.model.blockwise import MOST_SCORES
from jaxneurons.model.config import ModelConfig
from jaxneurons.model.parameters import axes, list_parameters, outputs_per_token


def rows_in_budget(
    config: ModelConfig, keys: int, memory_budget: int, *, platform: str | None = None
) -> int:
    """Rows that can be evaluated together within `memory_budget` bytes of activations.

    Counts what the backward pass keeps for each row (the matmul results of every layer and the
    vocabulary's logits and probabilities), in float32; of more than `MANY_KEYS` keys the scores of
    one layer, with their weights and gradients. More rows than keep the platform busy bring
    nothing, and small chunks skip more layers. The platform is cpu, gpu or tpu; None: this one.
    """
    per_row = 4 * sum(_kept_of_row(config, keys))
    busy = 640 if (platform or jax.default_backend()) == "cpu" else 1024
    return max(1, min(memory_budget // per_row, busy))


def _kept_of_row(config: ModelConfig, keys: int) -> tuple[int, int]:
    """Values that the backward pass keeps of a row: in its layers, and at the vocabulary."""
    # The outputs of a layer's projections, and of attention before the last of its own.
    per_layer = axes(config)["heads"].size + sum(
        outputs_per_token(parameter, config)
        for parameter in list_parameters(config)
        if parameter.per_layer and parameter.path[-1] == "kernel"
    )
    scores = config.num_heads * (keys + 1)
    scores *= config.num_layers if keys <= MANY_KEYS else 6
    of_layers = config.num_layers * per_layer + scores
    if config.experts:  # multipliers of all neurons, which a layer picks from, and their gradient
        of_layers += 3 * config.neurons_per_layer
    return of_layers, 3 * config.vocab_size


def logits_are_most(config: ModelConfig, keys: int) -> bool:
    """Whether the vocabulary takes more of a row's memory than all layers do."""
    of_layers, of_vocabulary = _kept_of_row(config, keys)
    return of_vocabulary > of_layers


def memory_bound(
    config: ModelConfig,
    tokens: int,
    *,
    prompts: int = 1,
    answers: int = 1,
    memory_budget: int = 1 << 30,
) -> int:
    """Bytes above the float32 parameters that locating a batch of prompts needs at most.

    What is compiled and computed with, not what the process itself takes: keys and values, twice;
    what a layer computes of every token; the scores of a block of queries; logits of the answer
    tokens, their probabilities and those of the options; the rows.

    Args:
      config: the model's shape.
      tokens: of a prompt, padded.
      prompts: in the batch.
      answers: tokens of an answer.
      memory_budget: bytes that the rows may take.
    """
    sizes = axes(config)
    kept = 2 * config.num_layers * sizes["kv_heads"].size
    widths = sum(sizes[name].size for name in ("hidden", "intermediate", "heads", "kv_heads"))
    # A token's row comes once for each expert that it runs.
    widths += max(0, config.experts_per_token - 1) * (
        sizes["hidden"].size + sizes["intermediate"].size
    )
    scores = config.num_heads * min(tokens**2, MOST_SCORES)
    logits = 3 * answers * config.vocab_size
    return 4 * prompts * (tokens * (2 * kept + 4 * widths) + 4 * scores + logits) + memory_budget
