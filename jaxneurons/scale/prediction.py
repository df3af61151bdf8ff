"""What a program takes on each device of a mesh, and how long, without compiling it."""

import dataclasses
import math
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from jaxneurons.model.config import ModelConfig
from jaxneurons.model.parameters import count_active_parameters, count_parameters, parameter_tree
from jaxneurons.neurons.sets import FFN, site_width
from jaxneurons.prompts.batches import bucket
from jaxneurons.scale.jobs import programs_of
from jaxneurons.scale.placement import Held, Placement, held, on_one_device
from jaxneurons.scale.program_cost import Cost, cost
from jaxneurons.scale.programs import Chunks, Job, Program, Work
from jaxneurons.scale.targets import Device


@dataclasses.dataclass(frozen=True)
class Seconds:
    """Times that something takes at a device's stated peaks.

    Attributes:
      compute: of operations.
      memory: of bytes read and written.
      network: of bytes between devices.
    """

    compute: float
    memory: float
    network: float

    @property
    def total(self) -> float:
        """Operations and memory overlap; what is waited for from other devices comes on top."""
        return max(self.compute, self.memory) + self.network

    @property
    def bound(self) -> str:
        """The largest of them."""
        return max(("compute", "memory", "network"), key=lambda name: getattr(self, name))

    def __add__(self, other: "Seconds") -> "Seconds":
        return Seconds(
            self.compute + other.compute, self.memory + other.memory, self.network + other.network
        )


@dataclasses.dataclass(frozen=True)
class Prediction:
    """A program on one device.

    Attributes:
      name: of the function.
      calls: of it in the job.
      parameters: bytes of the device's share, which the program takes.
      arguments: bytes of what else it takes.
      outputs: bytes of its results.
      temporaries: bytes of all else that is alive at once, parameters that are gathered included.
      gathered: bytes of these.
      unread: bytes of parameters that the program does not read: there, but not its arguments.
      operations: of matrix products, of a call.
      bytes_moved: read and written by them, of a call.
      collectives: bytes that a call receives from other devices, by kind.
      seconds: of a call.
    """

    name: str
    calls: int
    parameters: int
    arguments: int
    outputs: int
    temporaries: int
    gathered: int
    unread: int
    operations: float
    bytes_moved: float
    collectives: Mapping[str, int | float]
    seconds: Seconds

    @property
    def peak(self) -> int:
        """Bytes of everything."""
        return self.parameters + self.arguments + self.outputs + self.temporaries


def batch_parts(job: Job, placement: Placement) -> int:
    """Devices that the prompts of a batch are split over; requests of edits are not split."""
    return 1 if job == "edit" else placement.parts("batch")


def share(job: Job, work: Work, chunks: Chunks, placement: Placement) -> tuple[Work, Chunks]:
    """What of a job, and of a batch, is one device's."""
    parts = batch_parts(job, placement)
    fewer = dataclasses.replace(work, prompts=-(-work.prompts // parts))
    return fewer, chunks._replace(
        prompts=max(1, chunks.prompts // parts), rows=max(1, chunks.rows // parts)
    )


def predict(
    job: Job,
    config: ModelConfig,
    work: Work,
    chunks: Chunks,
    placement: Placement,
    *,
    dtype: DTypeLike,
    device: Device,
) -> tuple[Prediction, ...]:
    """Every main program of a job on one device; traces them, with shapes in place of arrays.

    Args:
      job: which.
      config: the whole model's shape.
      work: how much.
      chunks: how much at once, on all devices.
      placement: of the model.
      dtype: of the parameters.
      device: one of the mesh.
    """
    itemsize = jnp.dtype(dtype).itemsize
    local = on_one_device(config, placement)
    kept = held(config, placement, itemsize)
    params = parameter_tree(local, lambda p: jax.ShapeDtypeStruct(p.shape, jnp.dtype(dtype)))
    predictions = []
    for program in programs_of(job, local, *share(job, work, chunks, placement), dtype):
        taken = cost(
            program.function,
            params,
            *program.structs,
            loops=program.loops,
            copies=device.platform == "cpu",
        )
        predictions.append(_prediction(program, taken, kept, config, placement, itemsize, device))
    return tuple(predictions)


def _prediction(
    program: Program,
    taken: Cost,
    kept: Held,
    config: ModelConfig,
    placement: Placement,
    itemsize: int,
    device: Device,
) -> Prediction:
    moved = _collectives(program, kept, config, placement, itemsize)
    arguments = arguments_of(program)
    values = itemsize * count_parameters(on_one_device(config, placement))
    unread = (values + arguments - taken.arguments) * kept.resting // values
    temporaries = taken.temporaries + kept.gathered
    seconds = Seconds(
        taken.operations / device.peak,
        taken.bytes_moved / device.bandwidth,
        sum(moved.values()) / device.network,
    )
    return Prediction(
        program.name,
        program.calls,
        kept.resting,
        arguments,
        taken.outputs,
        max(0, temporaries - device.on_chip),
        kept.gathered,
        unread,
        taken.operations,
        taken.bytes_moved,
        moved,
        seconds,
    )


def arguments_of(program: Program) -> int:
    """Bytes of a program's arguments beside the parameters."""
    leaves = jax.tree.leaves(program.structs)
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in leaves)


def _collectives(
    program: Program, kept: Held, config: ModelConfig, placement: Placement, itemsize: int
) -> dict[str, int | float]:
    """Bytes that a device receives in one call: rings, in which each passes on what it has."""
    moved: dict[str, int | float] = {}
    width = placement.parts("heads")
    if width > 1:
        # Of each token: after attention and after the feed-forward, and after the embedding.
        times = 2 * config.num_layers + 1
        tokens = program.positions + program.gradients
        summed = times * tokens * config.hidden_size * itemsize
        moved["all-reduce"] = 2 * (width - 1) / width * summed
    if kept.moved:
        moved["all-gather"] = kept.moved * program.passes
    return moved


def quick_seconds(
    job: Job,
    config: ModelConfig,
    work: Work,
    chunks: Chunks,
    placement: Placement,
    *,
    dtype: DTypeLike,
    device: Device,
) -> float:
    """About how long a job takes, from counts alone: enough to compare meshes by."""
    itemsize = jnp.dtype(dtype).itemsize
    local, kept = on_one_device(config, placement), held(config, placement, itemsize)
    values, active = count_parameters(local), count_active_parameters(local)
    total = Seconds(0.0, 0.0, 0.0)
    for program in programs_of(job, local, *share(job, work, chunks, placement), dtype):
        moved = _collectives(program, kept, config, placement, itemsize)
        seconds = Seconds(
            2 * active * (program.positions + program.gradients) / device.peak,
            values * itemsize * program.passes / device.bandwidth,
            sum(moved.values()) / device.network,
        )
        total += _times(seconds, program.calls)
    return total.total


def _times(seconds: Seconds, calls: int) -> Seconds:
    return Seconds(seconds.compute * calls, seconds.memory * calls, seconds.network * calls)


def total_seconds(predictions: tuple[Prediction, ...]) -> Seconds:
    """Of all calls of a job."""
    total = Seconds(0.0, 0.0, 0.0)
    for prediction in predictions:
        total += _times(prediction.seconds, prediction.calls)
    return total


def cache_bytes(
    job: Job, config: ModelConfig, work: Work, chunks: Chunks, placement: Placement, itemsize: int
) -> int:
    """Keys and values of a batch on one device; 0 where a job has none."""
    if job == "responses":
        return 0
    local, prompts = (
        on_one_device(config, placement),
        share(job, work, chunks, placement)[1].prompts,
    )
    sets = chunks.sets if job in ("sweep", "relspec") else 1
    after = work.generated if job in ("sweep", "relspec") else work.answers
    keys = bucket(work.tokens) + after - 1
    return 2 * local.num_layers * prompts * sets * keys * local.kv_width * itemsize


def disk_bytes(job: Job, config: ModelConfig, work: Work) -> int:
    """What a run leaves on disk, about: results, and responses."""
    layers = config.num_layers
    if job == "locate":  # by layer gap and error, some hundred neurons with their scores
        return work.prompts * (8 * layers + 4096)
    if job in ("responses", "relspec"):
        return 4 * work.prompts * layers * sum(site_width(config, site) for site in FFN)
    if job == "edit":  # a covariance for each layer, and a row and column for each request
        width = config.intermediate_size
        return work.layers * 4 * (width**2 + work.prompts * (width + config.hidden_size))
    return work.prompts * work.sets * 16
