"""Which mesh, rules and chunks a job gets on a target: the fastest that fits.

Every mesh shape of all devices with every preset is timed by counts; then the best are traced, in
that order, until one fits. Where none does, batches are halved down to one prompt a device.
"""

from collections.abc import Iterator

import jax.numpy as jnp
from jax.typing import DTypeLike

from jaxneurons.model.config import ModelConfig
from jaxneurons.scale.jobs import default_chunks
from jaxneurons.scale.placement import Placement, held, on_one_device
from jaxneurons.scale.prediction import Prediction, predict, quick_seconds
from jaxneurons.scale.programs import Chunks, Job, Work
from jaxneurons.scale.targets import Target

TRACED = 3
"""Placements that are traced for each size of batch, at most: the fastest ones."""
ORDER = ("data", "tensor", "fsdp-tensor", "fsdp")
"""Of equally fast rules the plainest is taken."""

Choice = tuple[Placement, Chunks, tuple[Prediction, ...]]


def choose(
    job: Job, config: ModelConfig, work: Work, target: Target, dtype: DTypeLike
) -> tuple[Choice, bool]:
    """The fastest placement that fits, with chunks and predictions; else the smallest one.

    Returns:
      The choice, and whether it fits.
    """
    smallest: Choice | None = None
    room = target.fill * target.device.memory
    for divisor in (1, 4, 16, 64):
        candidates = list(_ranked(job, config, work, target, dtype, divisor))
        for placement, chunks in candidates[:TRACED]:
            predictions = predict(
                job, config, work, chunks, placement, dtype=dtype, device=target.device
            )
            choice = placement, chunks, predictions
            if peak(predictions) <= room:
                return choice, True
            if smallest is None or peak(predictions) < peak(smallest[2]):
                smallest = choice
        if not candidates or all(c.prompts <= p.parts("batch") for p, c in candidates[:TRACED]):
            break
    if smallest is None:
        smallest = _least(job, config, work, target, dtype)
    return smallest, False


def peak(predictions: tuple[Prediction, ...]) -> int:
    """Bytes on a device of the largest program."""
    return max(prediction.peak for prediction in predictions)


def placements(config: ModelConfig, devices: int) -> Iterator[Placement]:
    """Every mesh shape of all devices with every preset that makes a difference there."""
    for model in range(1, devices + 1):
        if devices % model:
            continue
        data = devices // model
        for preset in ORDER:
            if preset in ("data", "fsdp") and model > 1:
                continue  # the same on every shape
            if preset == "tensor" and model == 1 and devices > 1:
                continue  # that is "data"
            if preset == "fsdp-tensor" and 1 in (data, model):
                continue  # that is "fsdp" or "tensor"
            placement = Placement(data, model, preset)
            local = on_one_device(config, placement)
            if preset in ("tensor", "fsdp-tensor") and model > 1:
                split = local.num_heads < config.num_heads
                if not split or local.intermediate_size == config.intermediate_size:
                    continue  # heads or neurons do not divide: computed whole on every device
            if preset in ("fsdp", "fsdp-tensor") and config.hidden_size % placement.parts("hidden"):
                continue
            yield placement


def _ranked(
    job: Job, config: ModelConfig, work: Work, target: Target, dtype: DTypeLike, divisor: int
) -> Iterator[tuple[Placement, Chunks]]:
    itemsize = jnp.dtype(dtype).itemsize
    room = target.fill * target.device.memory
    timed = []
    for placement in placements(config, target.count):
        kept = held(config, placement, itemsize)
        if kept.resting + kept.gathered > room:
            continue
        chunks = _chunks(job, config, work, target, placement, divisor)
        seconds = quick_seconds(
            job, config, work, chunks, placement, dtype=dtype, device=target.device
        )
        timed.append((seconds, ORDER.index(placement.preset), placement, chunks))
    timed.sort(key=lambda entry: entry[:2])
    for _, _, placement, chunks in timed:
        yield placement, chunks


def _chunks(
    job: Job, config: ModelConfig, work: Work, target: Target, placement: Placement, divisor: int
) -> Chunks:
    """Of every part of the mesh what one device does by default, divided; no more than there is."""
    parts, local = placement.parts("batch"), on_one_device(config, placement)
    chunks = default_chunks(job, local, work, platform=target.device.platform)
    prompts = min(max(1, chunks.prompts // divisor), -(-work.prompts // parts))
    return Chunks(
        parts * prompts,
        parts * max(1, chunks.rows // divisor),
        max(1, chunks.sets // divisor),
        max(1, chunks.trials // divisor),
    )


def _least(job: Job, config: ModelConfig, work: Work, target: Target, dtype: DTypeLike) -> Choice:
    """The placement with the fewest bytes of parameters on a device."""
    itemsize = jnp.dtype(dtype).itemsize
    best = min(placements(config, target.count), key=lambda p: held(config, p, itemsize)[:2])
    chunks = _chunks(job, config, work, target, best, 64)
    predictions = predict(job, config, work, chunks, best, dtype=dtype, device=target.device)
    return best, chunks, predictions
