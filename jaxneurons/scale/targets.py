"""What a program is planned for: this machine, GPUs in a row, a slice of a TPU pod.

Figures are the makers' stated peaks, of one device; none is measured here.
"""

import dataclasses
import math
import os
import re

from jaxneurons.engine.device_memory import FILL, device_memory, machine_memory
from jaxneurons.errors import ConfigError, close_matches, near_matches
from jaxneurons.storage.settings import check_fields

GIB = 1 << 30
HERE = "here"


@dataclasses.dataclass(frozen=True)
class Device:
    """One device of a kind.

    Attributes:
      name: as targets name it.
      platform: cpu, gpu or tpu.
      peak: operations a second in bfloat16, dense.
      memory: bytes that programs can have.
      bandwidth: of its memory, bytes a second.
      network: to the other devices, bytes a second, sent.
      axes: of a slice's topology; 0: devices are counted.
      most: devices in a row or slice whose network is this one.
      on_chip: bytes of temporaries that the compiler keeps beside the memory, on the chip.
    """

    name: str
    platform: str
    peak: float
    memory: int
    bandwidth: float
    network: float
    axes: int = 0
    most: int = 8
    on_chip: int = 0

    def __post_init__(self) -> None:
        check_fields(self)


# GPUs: NVIDIA's data sheets of the SXM modules: H100 (989.4 TFLOPS dense bfloat16, 80 GB, 3.35
# TB/s, NVLink 900 GB/s both ways together), H200 (the same chip, 141 GB, 4.8 TB/s), A100 80GB (312
# TFLOPS, 2,039 GB/s, NVLink 600 GB/s). Of the memory, 5 % is the driver's and NCCL's.
# TPUs: cloud.google.com/tpu/docs, "System architecture" of each version: peak compute and HBM of a
# chip, inter-chip interconnect (1,600, 3,200, 4,800, 2,400 Gbit/s, of all links together). What
# their compiler lets a program have of the 16 GB of a v5e is 15.75 GiB; the others' are taken to be
# in the same proportion. Vector memory (VMEM), where it puts what is small enough: 128 MiB of v5e
# and v6e, 64 of v5p, 16 of each of v4's two cores (docs.jax.dev, "TPU Hardware Reference").
DEVICES = {
    device.name: device
    for device in (
        Device("a100", "gpu", 312e12, int(0.95 * 80e9), 2.039e12, 300e9),
        Device("h100", "gpu", 989.4e12, int(0.95 * 80e9), 3.35e12, 450e9),
        Device("h200", "gpu", 989.4e12, int(0.95 * 141e9), 4.8e12, 450e9),
        Device("v4", "tpu", 275e12, int(31.5 * GIB), 1.228e12, 300e9, 3, 4096, 32 << 20),
        Device("v5e", "tpu", 197e12, int(15.75 * GIB), 0.819e12, 200e9, 2, 256, 128 << 20),
        Device("v5p", "tpu", 459e12, int(94 * GIB), 2.765e12, 600e9, 3, 8960, 64 << 20),
        Device("v6e", "tpu", 918e12, int(31.25 * GIB), 1.64e12, 400e9, 2, 256, 128 << 20),
    )
}
"""By name, what a target can be made of."""

PLANES = ((1, 1), (2, 2), (2, 4), (4, 4), (4, 8), (8, 8), (8, 16), (16, 16))
"""Slices of v5e and v6e: their pages' tables of supported configurations."""

CORE_PEAK, CORE_BANDWIDTH = 96e9, 10e9
"""Of a CPU's core: two AVX2 products and sums of eight float32 in each of 3e9 cycles; a share of a
server's memory. Assumed, not stated by any maker."""


@dataclasses.dataclass(frozen=True)
class Target:
    """Devices of one kind.

    Attributes:
      name: as it was given.
      device: one of them.
      count: how many there are.
      topology: of a slice of a TPU pod; () for others.
    """

    name: str
    device: Device
    count: int
    topology: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        check_fields(self)

    @property
    def fill(self) -> float:
        """Share of the memory that a plan may take: the rest is for what it does not foresee."""
        return FILL


def parse_target(text: str) -> Target:
    """A target as it is written: `here`, `cpu:8`, `h100:8`, `v5e:16x16`, `v5p:4x4x4`.

    Raises:
      ConfigError: an unknown kind or topology, with near matches; a number of devices that is none.
    """
    name, _, size = text.strip().lower().partition(":")
    if name in (HERE, "cpu") and not (name == HERE and size):
        return _cpu(text, _count(text, size) if size else 1) if name == "cpu" else _here()
    if name not in DEVICES:
        raise ConfigError(f"unknown target {text!r}; {near_matches(name, (HERE, 'cpu', *DEVICES))}")
    device = DEVICES[name]
    if device.axes:
        topology = _topology(text, device, size)
        return Target(text, device, math.prod(topology), topology)
    count = _count(text, size) if size else 1
    if count > device.most:
        raise ConfigError(
            f"target {text!r}: {device.most} of {name} are joined by NVLink, at most; plans of "
            "several machines of GPUs are not made yet"
        )
    return Target(text, device, count)


def _count(text: str, size: str) -> int:
    if not re.fullmatch(r"\d{1,5}", size) or not int(size):
        raise ConfigError(f"target {text!r}: a number of devices is needed after the colon")
    return int(size)


def _topology(text: str, device: Device, size: str) -> tuple[int, ...]:
    example = "4x4" if device.axes == 2 else "2x2x4"
    if not size:
        raise ConfigError(f"target {text!r} needs a topology: {device.name}:{example}, say")
    known = PLANES if device.axes == 2 else _cubes(device.most)
    names = {"x".join(map(str, shape)): shape for shape in known}
    if size not in names:
        close = close_matches(size, names)
        some = list(names) if device.axes == 2 else [*list(names)[:8], "..."]
        raise ConfigError(
            f"target {text!r}: {device.name} has no topology {size!r}, which are of "
            f"{device.axes} axes; {close or 'known: ' + ', '.join(some)}"
        )
    return names[size]


def _cubes(most: int) -> list[tuple[int, int, int]]:
    """Topologies of v4 and v5p: ascending, of 1 (last axis first), 2 or multiples of 4 chips."""
    sides = (1, 2, *range(4, 33, 4))
    shapes = [
        (a, b, c)
        for a in sides
        for b in sides
        for c in sides
        if 2 <= a <= b and (b <= c or (a, b, c) == (2, 2, 1)) and a * b * c <= most
    ]
    return sorted(shapes, key=lambda shape: (math.prod(shape), shape))


def _cpu(name: str, count: int) -> Target:
    cores, memory = max(1, (os.cpu_count() or 1)), machine_memory()
    device = Device(
        "cpu",
        "cpu",
        CORE_PEAK * cores / count,
        memory // count,
        CORE_BANDWIDTH * cores / count,
        CORE_BANDWIDTH,
        most=count,
    )
    return Target(name, device, count)


def _here() -> Target:
    """The devices that JAX has in this process."""
    import jax

    devices = jax.devices()
    if devices[0].platform == "cpu":
        return _cpu(HERE, len(devices))
    kind = devices[0].device_kind.lower()
    name = next((n for n in DEVICES if n in kind), None) or _TPUS.get(kind)
    if name is None:
        raise ConfigError(
            f"this machine has {kind!r}, whose peak is not known here; name a target like it: "
            + ", ".join(DEVICES)
        )
    stated = device_memory(jax.local_devices()[0])
    device = DEVICES[name]
    if stated is not None:
        device = dataclasses.replace(device, memory=stated)
    return Target(HERE, device, len(devices))


_TPUS = {"tpu v4": "v4", "tpu v5 lite": "v5e", "tpu v5": "v5p", "tpu v6 lite": "v6e"}
"""What JAX calls them."""
