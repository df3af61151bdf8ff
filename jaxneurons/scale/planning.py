"""`plan`: whether a job fits on a target, how it would run there, and how long it would take."""

import dataclasses
import os
from typing import Any

import jax.numpy as jnp

from jaxneurons.errors import ConfigError, near_matches
from jaxneurons.model.config import ModelConfig
from jaxneurons.model.parameters import count_parameters
from jaxneurons.model.sharding import undivided
from jaxneurons.scale.choosing import Choice, choose
from jaxneurons.scale.placement import Placement
from jaxneurons.scale.prediction import (
    Prediction,
    Seconds,
    cache_bytes,
    disk_bytes,
    total_seconds,
)
from jaxneurons.scale.programs import Chunks, Job, Work, check_job
from jaxneurons.scale.shapes import read_shape
from jaxneurons.scale.targets import HERE, Target, parse_target

DTYPES = ("float32", "bfloat16", "float16")

ELSEWHERE = {
    "h100": ("h100:1", "h100:2", "h100:4", "h100:8"),
    "h200": ("h200:1", "h200:2", "h200:4", "h200:8"),
    "v5e": ("v5e:1x1", "v5e:2x4", "v5e:4x4", "v5e:8x8", "v5e:16x16"),
    "v5p": ("v5p:2x2x1", "v5p:2x2x2", "v5p:4x4x4", "v5p:4x4x8"),
}
"""Targets that are looked at, smallest first, where a job does not fit."""


@dataclasses.dataclass(frozen=True)
class Plan:
    """How a job would run on a target.

    Attributes:
      model: name of the shape or source.
      parameters: values of the model.
      job: which.
      work: how much of it.
      target: as it was named.
      device: its devices' kind.
      devices: how many.
      memory: bytes of each that programs can have.
      dtype: of the parameters.
      placement: mesh and rules.
      chunks: how much is done at once.
      programs: on one device.
      cache: bytes of keys and values of a batch, on one device.
      seconds: of the whole job, at the stated peaks.
      compilations: programs that are compiled, for prompts of one length.
      disk: bytes that a run leaves.
      notes: what a reader should know of it.
    """

    model: str
    parameters: int
    job: Job
    work: Work
    target: str
    device: str
    devices: int
    memory: int
    dtype: str
    placement: Placement
    chunks: Chunks
    programs: tuple[Prediction, ...]
    cache: int
    seconds: Seconds
    compilations: int
    disk: int
    notes: tuple[str, ...] = ()

    @property
    def largest(self) -> Prediction:
        """The program that takes most."""
        return max(self.programs, key=lambda program: program.peak)

    @property
    def peak(self) -> int:
        """Bytes on each device, at most."""
        return self.largest.peak

    @property
    def bound(self) -> str:
        """What the job waits for most: compute, memory or network."""
        return self.seconds.bound

    def as_dict(self) -> dict[str, Any]:
        """The plan as plain values, for JSON."""
        values = dataclasses.asdict(self)
        values["chunks"] = self.chunks._asdict()
        values["programs"] = [
            {**dataclasses.asdict(p), "collectives": dict(p.collectives), "peak": p.peak}
            for p in self.programs
        ]
        return {**values, "peak": self.peak, "bound": self.bound}


def plan(
    model: str | os.PathLike[str] | ModelConfig,
    *,
    job: Job = "locate",
    target: str = HERE,
    work: Work = Work(),
    dtype: str | None = None,
) -> Plan:
    """Whether and how a job runs on a target; reads headers and traces, computes nothing.

    Args:
      model: "1B", "7B", "8B", "13B", "70B", a config.json, or what `load` takes; or a shape.
      job: locate, evaluate, responses, relspec, edit or sweep.
      target: `here`, `cpu:8`, `h100:8`, `v5e:16x16`, `v5p:4x4x4`.
      work: how much of the job.
      dtype: of the parameters; default: float32 on a CPU, else bfloat16.

    Raises:
      SourceError: a model that cannot be found.
      ConfigError: an unknown job, target or dtype; a job that does not fit: says by how much, and
        on what it would.
    """
    job, shape, there = check_job(job), read_shape(model), parse_target(target)
    dtype = dtype or ("float32" if there.device.platform == "cpu" else "bfloat16")
    if dtype not in DTYPES:
        raise ConfigError(f"unknown dtype {dtype!r}; {near_matches(dtype, DTYPES)}")
    config = shape.config
    check_length(config, work)
    choice, fits = choose(job, config, work, there, dtype)
    placement, chunks, programs = choice
    if not fits:
        raise ConfigError(_does_not_fit(shape.name, job, config, work, there, dtype, choice))
    itemsize = jnp.dtype(dtype).itemsize
    return Plan(
        model=shape.name,
        parameters=count_parameters(config),
        job=job,
        work=work,
        target=there.name,
        device=there.device.name,
        devices=there.count,
        memory=there.device.memory,
        dtype=dtype,
        placement=placement,
        chunks=chunks,
        programs=programs,
        cache=cache_bytes(job, config, work, chunks, placement, itemsize),
        seconds=total_seconds(programs),
        compilations=len(programs),
        disk=disk_bytes(job, config, work),
        notes=tuple(map(str, undivided(config, placement.sizes, placement.rules))),
    )


def check_length(config: ModelConfig, work: Work) -> None:
    """Raise `ConfigError` for prompts that the model's context does not hold."""
    longest = work.tokens + max(work.answers, work.generated)
    if longest > config.max_position:
        raise ConfigError(
            f"tokens: {work.tokens} and what follows them are {longest} tokens, the model's "
            f"context holds {config.max_position}"
        )


def _does_not_fit(
    name: str,
    job: Job,
    config: ModelConfig,
    work: Work,
    target: Target,
    dtype: str,
    choice: Choice,
) -> str:
    needed, room = choice.peak, target.fill * target.device.memory
    places = _where_it_fits(job, config, work, target, dtype)
    elsewhere = f"it would on {', '.join(places)}" if places else "it would on none of the targets"
    return (
        f"{name} in {dtype} does not fit for {job} on {target.name}: at the least "
        f"{needed / 1e9:.1f} GB on each device, of which parameters "
        f"{choice.programs[0].parameters / 1e9:.1f} GB, where {room / 1e9:.1f} GB can be had "
        f"({100 * target.fill:.0f} % of its memory): {(needed - room) / 1e9:.1f} GB too much; "
        f"{elsewhere}"
    )


def _where_it_fits(
    job: Job, config: ModelConfig, work: Work, target: Target, dtype: str
) -> list[str]:
    """The smallest target of each kind that holds the job, the same kind first."""
    kinds = [target.device.name, *(kind for kind in ELSEWHERE if kind != target.device.name)]
    names = []
    for kind in kinds:
        for name in ELSEWHERE.get(kind, ()):
            there = parse_target(name)
            if kind == target.device.name and there.count <= target.count:
                continue
            if choose(job, config, work, there, dtype)[1]:
                names.append(name)
                break
    return names
