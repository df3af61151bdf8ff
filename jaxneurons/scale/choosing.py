"""Which mesh, rules and chunks a job gets on a target: the fastest that fits.

Every mesh shape of all devices, with every preset and some sizes of batches, is timed by counts;
then they are traced in that order until one fits.
"""

import math
from collections.abc import Iterator
from typing import NamedTuple

import jax.numpy as jnp
from jax.typing import DTypeLike

from jaxneurons.model.config import ModelConfig
from jaxneurons.scale.jobs import default_chunks
from jaxneurons.scale.placement import Placement, held, on_one_device
from jaxneurons.scale.prediction import Prediction, batch_parts, predict, quick_seconds
from jaxneurons.scale.programs import Chunks, Job, Work
from jaxneurons.scale.targets import Target

TRACED = 8
"""Candidates that are traced, at most: the fastest ones that may fit."""
DIVISORS = (1, 2, 4, 8, 16, 32, 64)
"""Parts of a batch of the usual size that are tried."""
ALIKE = 1.2
"""Times within this factor are the same, as far as counts can tell."""
ORDER = ("data", "tensor", "fsdp-tensor", "fsdp")
"""Of equally fast rules the plainest are taken."""


class Choice(NamedTuple):
    """A way to run a job."""

    placement: Placement
    chunks: Chunks
    programs: tuple[Prediction, ...]

    @property
    def peak(self) -> int:
        """Bytes on a device of the largest program."""
        return max(program.peak for program in self.programs)


class _Candidate(NamedTuple):
    """A way to run a job, sorted by its time in steps, then as it is plain and its batch large."""

    step: int
    order: int
    divisor: int
    placement: Placement
    chunks: Chunks


def choose(
    job: Job, config: ModelConfig, work: Work, target: Target, dtype: DTypeLike
) -> tuple[Choice, bool]:
    """The fastest way that fits; else the smallest of those that were traced.

    Returns:
      The choice, and whether it fits.
    """
    room = target.fill * target.device.memory
    traced: list[Choice] = []
    rest: dict[Placement, float] = {}  # bytes beside parameters, times the divisor

    def trace(placement: Placement, chunks: Chunks) -> Choice:
        programs = predict(job, config, work, chunks, placement, dtype=dtype, device=target.device)
        traced.append(Choice(placement, chunks, programs))
        return traced[-1]

    for each in sorted(_candidates(job, config, work, target, dtype), key=lambda c: c[:3]):
        kept = held(config, each.placement, jnp.dtype(dtype).itemsize).resting
        if kept + HOPE * rest.get(each.placement, 0) / each.divisor > room:
            continue
        choice = trace(each.placement, each.chunks)
        if choice.peak <= room:
            return choice, True
        rest[each.placement] = (choice.peak - kept) * each.divisor
        if len(traced) >= TRACED:
            break
    least = _least(job, config, work, target, dtype)
    if not any(choice[:2] == least for choice in traced):
        choice = trace(*least)
        if choice.peak <= room:
            return choice, True
    return min(traced, key=lambda choice: choice.peak), False


HOPE = 0.8
"""Of what is expected of a smaller batch after a larger one was too large."""


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


def _candidates(
    job: Job, config: ModelConfig, work: Work, target: Target, dtype: DTypeLike
) -> Iterator[_Candidate]:
    itemsize = jnp.dtype(dtype).itemsize
    for placement in placements(config, target.count):
        kept = held(config, placement, itemsize)
        if kept.resting + kept.gathered > target.fill * target.device.memory:
            continue
        seen = set()
        for divisor in DIVISORS:
            chunks = _chunks(job, config, work, target, placement, divisor, itemsize)
            if chunks in seen:
                continue
            seen.add(chunks)
            seconds = quick_seconds(
                job, config, work, chunks, placement, dtype=dtype, device=target.device
            )
            step = round(math.log(max(seconds, 1e-9)) / math.log(ALIKE))
            order = ORDER.index(placement.preset)
            yield _Candidate(step, order, divisor, placement, chunks)


def _chunks(
    job: Job,
    config: ModelConfig,
    work: Work,
    target: Target,
    placement: Placement,
    divisor: int,
    itemsize: int,
) -> Chunks:
    """Of every part of the mesh what one device runs at once, divided; no more than there is."""
    parts, local = batch_parts(job, placement), on_one_device(config, placement)
    kept = held(config, placement, itemsize)
    room = int(target.fill * target.device.memory) - kept.resting - kept.gathered
    chunks = default_chunks(job, local, work, platform=target.device.platform, room=max(0, room))
    prompts = min(max(1, chunks.prompts // divisor), -(-work.prompts // parts))
    return Chunks(
        parts * prompts,
        parts * max(1, chunks.rows // divisor),
        max(1, chunks.sets // divisor),
        max(1, chunks.trials // divisor),
    )


def _least(
    job: Job, config: ModelConfig, work: Work, target: Target, dtype: DTypeLike
) -> tuple[Placement, Chunks]:
    """The placement with the fewest bytes of parameters on a device, and the smallest batch."""
    itemsize = jnp.dtype(dtype).itemsize

    def size(placement: Placement) -> int:
        kept = held(config, placement, itemsize)
        return kept.resting + kept.gathered

    best = min(placements(config, target.count), key=size)
    return best, _chunks(job, config, work, target, best, DIVISORS[-1], itemsize)
