"""How much is run at once by what a device's memory has room for: the same for a plan and a run.

`plan` asks for a target's memory, a run for that of the devices that its parameters lie on; both
halve what is usual until the bound of `memory_bound` is within the room beside the parameters.
"""

import os
from pathlib import Path
from typing import Any

import jax

from jaxneurons.engine.row_memory import memory_bound
from jaxneurons.model.config import ModelConfig
from jaxneurons.model.device_share import device_share
from jaxneurons.model.parameters import Params

FILL = 0.9
"""Share of a device's memory that is counted on: the rest is for what nobody foresees."""

ROW_BYTES = 1 << 30
"""Bytes that the rows of an attribution take, where there is room for them."""

LEAST_ROW_BYTES = 1 << 20
"""Fewer are not tried."""

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


def device_memory(device: Any) -> int:
    """Bytes that programs can have of a device of this process.

    Of a GPU or TPU what its allocator may take; of a CPU device its share of the machine's memory.
    """
    stated = None if device.platform == "cpu" else (device.memory_stats() or {}).get("bytes_limit")
    return int(stated) if stated else machine_memory() // jax.local_device_count(device.platform)


def room_beside(params: Params) -> int:
    """Bytes that are left of a device beside its share of the parameters; 0: none.

    Of parameters that lie on no device yet, of the first one.
    """
    leaves = jax.tree.leaves(params)
    shards = [s for leaf in leaves if (s := getattr(leaf, "addressable_shards", ()))]
    device = shards[0][0].device if shards else jax.local_devices()[0]
    held = sum(of_leaf[0].data.nbytes for of_leaf in shards)
    if not shards:
        held = sum(leaf.nbytes for leaf in leaves)
    return max(0, int(FILL * device_memory(device)) - held)


def row_bytes_that_fit(
    config: ModelConfig, room: int, *, prompts: int, tokens: int, answers: int = 1
) -> int:
    """Bytes that the rows of a batch may take, of which its prompts are halved alike.

    Args:
      config: the shape of what one device computes.
      room: bytes of a device beside the parameters.
      prompts: of the batch, on one device.
      tokens: of a prompt, padded.
      answers: tokens of an answer.
    """
    size = ROW_BYTES
    while size > LEAST_ROW_BYTES:
        fewer = prompts_for(size, prompts)
        bound = memory_bound(config, tokens, prompts=fewer, answers=answers, memory_budget=size)
        if bound <= room:
            break
        size //= 2
    return size


def prompts_for(row_bytes: int, prompts: int) -> int:
    """Of a batch's prompts, how many are run at once where its rows have so many bytes."""
    return max(1, min(prompts, prompts * row_bytes // ROW_BYTES))


def prompts_that_fit(config: ModelConfig, room: int, *, prompts: int, tokens: int) -> int:
    """Prompts that are run at once without rows; arguments as of `row_bytes_that_fit`."""
    while prompts > 1:
        if memory_bound(config, tokens, prompts=prompts, memory_budget=0) <= room:
            break
        prompts //= 2
    return prompts


def rows_here(
    params: Params, config: ModelConfig, *, prompts: int, tokens: int, answers: int = 1
) -> int:
    """`row_bytes_that_fit` on the devices that the parameters lie on, of a whole batch."""
    local, parts = device_share(params, config)
    each = -(-prompts // parts)
    room = room_beside(params)
    return row_bytes_that_fit(local, room, prompts=each, tokens=tokens, answers=answers)


def prompts_here(params: Params, config: ModelConfig, *, prompts: int, tokens: int) -> int:
    """`prompts_that_fit` on the devices that the parameters lie on, of a whole batch."""
    local, parts = device_share(params, config)
    each = -(-prompts // parts)
    fit = prompts_that_fit(local, room_beside(params), prompts=each, tokens=tokens)
    return prompts if fit == each else parts * fit
