"""Programs compiled for devices that need not be there: a TPU topology, or virtual CPU devices.

Shapes with shardings stand in for all arrays; what is compiled is the real program, and what is
returned is the compiler's own analysis of it. For TPUs `libtpu` is needed (the extra `tpu-plan`).
"""

import dataclasses
import importlib.util
import os
import re
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jax.typing import DTypeLike

from jaxneurons.errors import ConfigError
from jaxneurons.model.config import ModelConfig
from jaxneurons.model.parameters import get, parameter_tree
from jaxneurons.model.sharding import MESH_AXES, param_shardings
from jaxneurons.scale.jobs import programs_of
from jaxneurons.scale.placement import Placement
from jaxneurons.scale.planning import Plan
from jaxneurons.scale.prediction import Prediction, batch_parts, predict
from jaxneurons.scale.programs import Argument, Chunks, Job, Program, Work, check_job
from jaxneurons.scale.shapes import read_shape
from jaxneurons.scale.targets import Target, parse_target

KINDS = ("all-gather", "all-reduce", "all-to-all", "collective-permute", "reduce-scatter")
_KIND = re.compile(rf"= .*? ({'|'.join(KINDS)})(?:-start)?\(")


@dataclasses.dataclass(frozen=True)
class Compiled:
    """The compiler's analysis of a program, on one device.

    Attributes:
      name: of the program.
      arguments: bytes of parameters and all else that it takes.
      outputs: bytes of its results.
      temporaries: bytes of what else it needs.
      aliased: bytes of results that take the place of arguments.
      collectives: operations between devices in the program's text, by kind; a loop's count once.
      seconds: that compiling took.
    """

    name: str
    arguments: int
    outputs: int
    temporaries: int
    aliased: int
    collectives: Mapping[str, int]
    seconds: float

    @property
    def peak(self) -> int:
        """Bytes of everything."""
        return self.arguments + self.outputs + self.temporaries - self.aliased


def compile_plan(plan: Plan, model: str | os.PathLike[str] | ModelConfig) -> Iterator[Compiled]:
    """Compile every program of a plan for its target, with its mesh and chunks.

    Raises:
      ConfigError: a target that nothing here can compile for; a program that the compiler refuses.
    """
    target = parse_target(plan.target)
    yield from compile_job(
        plan.job,
        read_shape(model).config,
        plan.work,
        plan.chunks,
        plan.placement,
        dtype=plan.dtype,
        devices=devices_of(target),
    )


def compile_ahead(
    model: str | os.PathLike[str] | ModelConfig,
    placement: Placement,
    *,
    job: Job,
    target: str,
    prompts: int,
    work: Work = Work(),
    dtype: str = "bfloat16",
    only: Sequence[str] = (),
) -> Iterator[tuple[Compiled, Prediction]]:
    """Compile a job's programs for a target with a mesh of your own, beside what is predicted.

    Args:
      model: as `plan` takes it.
      placement: the mesh and the preset.
      job: which.
      target: "v5e:2x4", "cpu:8".
      prompts: that are run at once.
      work: how much of the job.
      dtype: of the parameters.
      only: names of the programs that are wanted; (): all.

    Raises:
      ConfigError: a target that nothing here can compile for; a program that the compiler refuses.
    """
    there, config = parse_target(target), read_shape(model).config
    chunks = Chunks(prompts, rows=1024, sets=8, trials=8)
    how = (check_job(job), config, work, chunks, placement)
    predicted = {p.name: p for p in predict(*how, dtype=dtype, device=there.device)}
    for compiled in compile_job(*how, dtype=dtype, devices=devices_of(there), only=only):
        yield compiled, predicted[compiled.name]


def compile_job(
    job: Job,
    config: ModelConfig,
    work: Work,
    chunks: Chunks,
    placement: Placement,
    *,
    dtype: DTypeLike,
    devices: Sequence[Any],
    only: Sequence[str] = (),
) -> Iterator[Compiled]:
    """Compile a job's programs over the first of some devices.

    Args:
      job: which.
      config: the model's shape.
      work: how much.
      chunks: how much at once.
      placement: of the model.
      dtype: of the parameters.
      devices: real ones, or a topology's; as many as the mesh needs are taken.
      only: names of the programs that are wanted; (): all.

    Raises:
      ConfigError: a program that the compiler refuses, with its words.
    """
    grid = np.array(devices[: placement.devices]).reshape(placement.data, placement.model)
    mesh = Mesh(grid, MESH_AXES)
    shardings = param_shardings(config, mesh, placement.rules)
    params = parameter_tree(
        config,
        lambda p: jax.ShapeDtypeStruct(p.shape, jnp.dtype(dtype), sharding=get(shardings, p.path)),
    )
    split = batch_parts(job, placement) > 1
    batch_axes = placement.rules.mesh_axes("batch") if split else ()
    for program in programs_of(job, config, work, chunks, dtype):
        if only and program.name not in only:
            continue
        yield _compile(program, params, mesh, batch_axes)


def _compile(program: Program, params: Any, mesh: Mesh, batch_axes: tuple[str, ...]) -> Compiled:
    def struct(argument: Argument) -> jax.ShapeDtypeStruct:
        spec: list[Any] = [None] * len(argument.shape)
        if argument.batch is not None and batch_axes:
            spec[argument.batch] = batch_axes
        sharding = NamedSharding(mesh, PartitionSpec(*spec))
        return jax.ShapeDtypeStruct(argument.shape, jnp.dtype(argument.dtype), sharding=sharding)

    arguments = jax.tree.map(
        struct, program.arguments, is_leaf=lambda node: isinstance(node, Argument)
    )
    start = time.perf_counter()
    try:
        compiled = jax.jit(program.function).lower(params, *arguments).compile()
    except jax.errors.JaxRuntimeError as error:
        text = " ".join(str(error).split())
        raise ConfigError(f"{program.name} does not compile: {text[:400]}") from None
    analysis: Any = compiled.memory_analysis()
    return Compiled(
        program.name,
        analysis.argument_size_in_bytes,
        analysis.output_size_in_bytes,
        analysis.temp_size_in_bytes,
        analysis.alias_size_in_bytes,
        _collectives(compiled),
        time.perf_counter() - start,
    )


def _collectives(compiled: Any) -> dict[str, int]:
    """Counts by kind; none where the compiler cannot print the program."""
    try:
        text = compiled.as_text()
    except (jax.errors.JaxRuntimeError, UnicodeDecodeError):
        return {}
    return dict(sorted(Counter(match[1] for match in _KIND.finditer(text)).items()))


def devices_of(target: Target) -> Sequence[Any]:
    """Devices to compile for: this process's, or those of a TPU topology.

    Raises:
      ConfigError: too few CPU devices, no libtpu, or a GPU target on another machine.
    """
    device = target.device
    if device.platform == "tpu" and jax.default_backend() != "tpu":
        return _topology(target)
    devices = [d for d in jax.devices() if d.platform in (device.platform, "cuda", "rocm")]
    if device.platform == "gpu" and not devices:
        raise ConfigError(
            f"--compile for {target.name} needs such a GPU in this machine; TPU topologies and "
            "cpu compile anywhere"
        )
    if len(devices) < target.count:
        raise ConfigError(
            f"{target.name} needs {target.count} devices, this process has {len(devices)}"
            + (f": JAX_NUM_CPU_DEVICES={target.count}" if device.platform == "cpu" else "")
        )
    return devices


def _topology(target: Target) -> Sequence[Any]:
    if importlib.util.find_spec("libtpu") is None:
        raise ConfigError(
            "compiling for a TPU needs its compiler: pip install 'jaxneurons[tpu-plan]'"
        )
    # Or the compiler looks for the machine's own TPUs and its metadata server.
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    # No TPU is used: several processes may compile at once.
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    from jax.experimental import topologies

    size = "x".join(map(str, target.topology))
    try:
        topology = topologies.get_topology_desc(f"{target.device.name}:{size}", platform="tpu")
    except (jax.errors.JaxRuntimeError, NotImplementedError) as error:
        text = " ".join(str(error).split())
        raise ConfigError(f"{target.name}: the compiler refuses it: {text[:300]}") from None
    if len(topology.devices) != target.count:
        raise ConfigError(
            f"{target.name}: the compiler makes {len(topology.devices)} devices of it, not "
            f"{target.count}; plans of it cannot be compiled"
        )
    return topology.devices
