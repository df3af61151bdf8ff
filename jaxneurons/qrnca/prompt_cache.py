"""Prompts that locating has run, kept on disk, so that later stages need not run them again.

What a stage needs of a prompt is its keys and values and the site's activations at the last
position. They are large (SmolLM2-135M in float32: 45 KiB a token) and can be made again, so they
are kept within a limit, in `caches/` of a run directory, and may be deleted at any time.
"""

import json
import math
import os
import shutil
import zlib
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import jax
import ml_dtypes  # noqa: F401  (numpy knows bfloat16 by name with it)
import numpy as np
from jaxtyping import Array, Float

from jaxneurons.engine.last_position import LastPosition, last_position
from jaxneurons.engine.rows import Prefill
from jaxneurons.processes.sharing import fetch
from jaxneurons.prompts.batches import Batch
from jaxneurons.storage.store import digest

MOST = 16 << 30
"""Bytes that are kept by default, at most."""
SHARE = 5
"""By default at most one part in so many of what is free on the disk."""


class Prompts(NamedTuple):
    """A batch of prompts, run once.

    Attributes:
      last: all that scaling the last position needs.
      active: the site's activations there.
    """

    last: LastPosition
    active: Float[Array, "layer batch width"]


def prompts_of(pre: Prefill, *, site: str, seq: int) -> Prompts:
    """What is kept of a prefill whose prompts have `seq` positions: nothing of the answers."""
    last = last_position(pre)
    return Prompts(
        last._replace(k=last.k[:, :, :seq], v=last.v[:, :, :seq]), pre.captured[site][:, :, 0]
    )


def joined(parts: Sequence[Prompts]) -> Prompts:
    """The prompts of all parts, in order, on the host where there are several."""
    if len(parts) == 1:
        return parts[0]
    fetched = [fetch(part) for part in parts]
    axes = Prompts(LastPosition(1, 1, 0, 0, 0, 0), 1)  # pyright: ignore[reportArgumentType]
    return jax.tree.map(lambda axis, *arrays: np.concatenate(arrays, axis), axes, *fetched)


def default_limit(path: str | os.PathLike[str]) -> int:
    """Bytes to keep at `path`: on a CPU `MOST`, and at most one in `SHARE` of those that are free.

    None on an accelerator: it runs a prompt in less time than a disk reads what it would keep.
    """
    if jax.default_backend() != "cpu":
        return 0
    return min(MOST, shutil.disk_usage(path).free // SHARE)


class Caches:
    """The batches that a run directory keeps, by number.

    Args:
      path: the run directory; None: a run in memory, of which nothing is kept.
      limit: bytes that all of them may take; default: `default_limit`.
    """

    def __init__(self, path: str | os.PathLike[str] | None, limit: int | None = None):
        self.path = None if path is None else Path(path) / "caches"
        self.limit = limit if path is None or limit is not None else default_limit(path)

    def size(self) -> int:
        """Bytes kept."""
        if self.path is None:
            return 0
        return sum(file.stat().st_size for file in self.path.glob("*.bin"))

    def keep(self, number: int, batch: Batch, prompts: Prompts) -> bool:
        """Write a batch, unless the limit (or the disk) has no room for it; whether it did."""
        if self.path is None or self.limit is None:
            return False
        leaves = jax.tree.leaves(prompts)
        if self.size() + sum(leaf.nbytes for leaf in leaves) > self.limit:
            return False
        arrays = [np.ascontiguousarray(leaf) for leaf in jax.device_get(leaves)]
        head = json.dumps([_subject(batch), *([a.dtype.name, a.shape] for a in arrays)]).encode()
        check = zlib.crc32(head)
        file = _file(self.path, number)
        writing = file.with_suffix(".tmp")
        try:
            self.path.mkdir(exist_ok=True)
            with writing.open("wb") as out:
                out.write(head + b"\n")
                for array in arrays:
                    raw = array.reshape(-1).view(np.uint8).data
                    check = zlib.crc32(raw, check)
                    out.write(raw)
                out.write(check.to_bytes(4, "big"))
            writing.replace(file)
        except OSError:
            writing.unlink(missing_ok=True)
            return False
        except BaseException:
            writing.unlink(missing_ok=True)
            raise
        return True

    def load(self, number: int, batch: Batch) -> Prompts | None:
        """A batch, or None where it is not kept, or not as it was written, or is another."""
        if self.path is None:
            return None
        try:
            with _file(self.path, number).open("rb") as file:
                head = file.readline()[:-1]
                raw = np.fromfile(file, np.uint8)
        except OSError:
            return None
        if len(raw) < 4:
            return None
        if zlib.crc32(raw[:-4].data, zlib.crc32(head)) != int.from_bytes(raw[-4:].tobytes(), "big"):
            return None
        subject, *arrays = json.loads(head)
        if subject != _subject(batch):
            return None
        leaves, at = [], 0
        for name, shape in arrays:
            dtype = np.dtype(name)
            size = math.prod(shape) * dtype.itemsize
            leaves.append(raw[at : at + size].view(dtype).reshape(shape))
            at += size
        count = len(LastPosition._fields)
        return Prompts(LastPosition(*leaves[:count]), *leaves[count:])

    def ahead(self, wanted: Sequence[tuple[int, Batch]]) -> Iterator[Prompts | None]:
        """`load` of each, the next one being read while its user works on one."""
        with ThreadPoolExecutor(1) as reader:
            reading: deque[Future[Prompts | None]] = deque()
            for number, batch in wanted:
                reading.append(reader.submit(self.load, number, batch))
                if len(reading) > 1:
                    yield reading.popleft().result()
            while reading:
                yield reading.popleft().result()


def _file(directory: Path, number: int) -> Path:
    return directory / f"{number:05d}.bin"


def _subject(batch: Batch) -> str:
    """What a file is about: its layout and its prompts."""
    prompts = [batch.tokens.tolist(), batch.lengths.tolist(), batch.targets.tolist()]
    return digest([LastPosition._fields, Prompts._fields, prompts])
