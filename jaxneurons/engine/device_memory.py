"""How much is run at once by what a device's memory has room for: the same for a plan and a run.

`plan` asks for a target's memory, a run for that of the devices that its parameters lie on; both
halve what is usual until the bound of `memory_bound` is within the room beside the parameters.
"""

import functools
import os
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.core import Tracer

from jaxneurons.engine.row_memory import memory_bound
from jaxneurons.model.config import ModelConfig
from jaxneurons.model.device_share import device_share, held_here
from jaxneurons.model.parameters import Params
from jaxneurons.processes.sharing import spread

FILL = 0.9
"""Share of a device's memory that is counted on: the rest is for what nobody foresees."""

ROW_BYTES = 1 << 30
"""Bytes that the rows of an attribution take, where there is room for them."""

LEAST_PLANNED = 1 << 26
"""Fewer are not planned: a pass of very few rows reads all weights for little."""

LEAST_ROW_BYTES = 1 << 20
"""Fewer are not tried where memory has run out."""

LIMITS = (
    Path("/sys/fs/cgroup/memory.max"),
    Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"),
)
"""Where Linux says what a container may have: cgroups, version 2 and 1."""


def machine_memory() -> int:
    """Bytes of this machine's memory, or of what this container may have of it."""
    if not hasattr(os, "sysconf"):
        return 8 << 30
    memory = int(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    for limit in LIMITS:
        try:
            memory = min(memory, int(limit.read_text()))
        except (OSError, ValueError):
            continue  # no such file, or "max"
    return memory


def device_memory(device: Any, sharing: int = 1) -> int | None:
    """Bytes that programs can have of a device of this process; None: it does not say.

    Of a GPU or TPU what its allocator may take; of a CPU device its share of the machine's memory.

    Args:
      device: of JAX.
      sharing: CPU devices that share the machine.
    """
    if device.platform == "cpu":
        return machine_memory() // max(1, sharing)
    stated = (device.memory_stats() or {}).get("bytes_limit")
    return int(stated) if stated else None


def room_beside(params: Params, config: ModelConfig) -> int | None:
    """Bytes that are left of a device beside its share of the parameters; None: it is not known.

    And beside the largest module that is put together from several devices' shares to be used. Of
    parameters that lie on no device yet, of the first one. Where they lie on the devices of several
    processes, all of these call it together and have the same answer.
    """
    leaves = jax.tree.leaves(params)
    if any(isinstance(leaf, Tracer) for leaf in leaves):
        return None
    sharding = getattr(leaves[0], "sharding", None)
    devices = sorted(
        sharding.addressable_devices if sharding else jax.local_devices()[:1], key=lambda d: d.id
    )
    memory = device_memory(devices[0], len(devices))
    if spread(params):
        memory = _least_of_processes(memory)
    if memory is None:
        return None
    kept = held_here(params, config)
    return max(0, int(FILL * memory) - kept.resting - kept.gathered)


@functools.cache
def _least_of_processes(mine: int | None) -> int | None:
    """The least that a device has in any process: they must not differ in what they run at once."""
    from jax.experimental import multihost_utils

    mebibytes = np.array(-1 if mine is None else mine >> 20, np.int32)
    least = int(multihost_utils.process_allgather(mebibytes).min())
    return None if least < 0 else least << 20


def row_bytes_that_fit(
    config: ModelConfig,
    room: int | None,
    *,
    prompts: int,
    tokens: int,
    answers: int = 1,
) -> int:
    """Bytes that the rows of a batch may take, of which its prompts are halved alike.

    Not below `LEAST_PLANNED`, where the bound is known to exceed what is needed.

    Args:
      config: the shape of what one device computes.
      room: bytes of a device beside the parameters; None: enough.
      prompts: of the batch, on one device.
      tokens: of a prompt, padded.
      answers: tokens of an answer.
    """
    size = ROW_BYTES
    while room is not None and size > LEAST_PLANNED:
        fewer = prompts_for(size, prompts)
        bound = memory_bound(config, tokens, prompts=fewer, answers=answers, memory_budget=size)
        if bound <= room:
            break
        size //= 2
    return size


def prompts_for(row_bytes: int, prompts: int, parts: int = 1) -> int:
    """Of a batch's prompts, how many are run at once where its rows have so many bytes.

    A multiple of the devices that share prompts (`parts`): fewer would be run by each of them.
    """
    each = max(1, -(-prompts // parts) * row_bytes // ROW_BYTES)
    return min(prompts, parts * each)


def prompts_that_fit(config: ModelConfig, room: int | None, *, prompts: int, tokens: int) -> int:
    """Prompts that are run at once without rows; arguments as of `row_bytes_that_fit`."""
    while room is not None and prompts > 1:
        if memory_bound(config, tokens, prompts=prompts, memory_budget=0) <= room:
            break
        prompts //= 2
    return prompts


def rows_here(
    params: Params, config: ModelConfig, *, prompts: int, tokens: int, answers: int = 1
) -> tuple[int, int]:
    """`row_bytes_that_fit` of a whole batch on the devices that the parameters lie on.

    Returns:
      The bytes, and how many devices share the prompts: see `prompts_for`.
    """
    local, parts = device_share(params, config)
    each, room = -(-prompts // parts), room_beside(params, config)
    return row_bytes_that_fit(local, room, prompts=each, tokens=tokens, answers=answers), parts


def prompts_here(
    params: Params, config: ModelConfig, *, prompts: int, tokens: int, sets: int = 1
) -> tuple[int, int]:
    """`prompts_that_fit` of a whole batch on the devices that the parameters lie on.

    Args:
      params: the model's parameters.
      config: the model's shape.
      prompts: of the batch, on all devices.
      tokens: of a prompt, padded, with those that are generated.
      sets: that each prompt is run with.

    Returns:
      Prompts, and how many devices share them.
    """
    local, parts = device_share(params, config)
    each, room = -(-prompts // parts), room_beside(params, config)
    fit = prompts_that_fit(local, room, prompts=sets * each, tokens=tokens) // sets
    return min(prompts, parts * max(1, fit)), parts
