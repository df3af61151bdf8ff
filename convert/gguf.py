"""GGUF files -> configuration and parameters.

The header is parsed here, because the `gguf` package makes an array object of every token and
merge (2 s for a vocabulary of 49,152); de-quantisation is the `gguf` package's.
"""

import dataclasses
import math
import mmap
import os
import struct
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from jaxneurons.convert.fill import Stored, fill
from jaxneurons.convert.gguf_config import RopeTensors, config_from_gguf
from jaxneurons.convert.rules import Place, gguf_biases
from jaxneurons.errors import SourceError
from jaxneurons.model.config import ModelConfig
from jaxneurons.model.parameters import Params
from jaxneurons.storage.progress import Advance
from jaxneurons.storage.settings import as_path

_SCALARS = {
    0: "<B",
    1: "<b",
    2: "<H",
    3: "<h",
    4: "<I",
    5: "<i",
    6: "<f",
    7: "<?",
    10: "<Q",
    11: "<q",
    12: "<d",
}
_STRING, _ARRAY = 8, 9
_MAX_DIMS = 8


@dataclasses.dataclass(frozen=True)
class GGUFTensor:
    """Where a tensor lies in a GGUF file.

    Attributes:
      name: its name.
      shape: slowest axis first (GGUF stores them the other way round).
      kind: the ggml type's number.
      offset: of its data, in bytes from the start of the file.
      nbytes: of its data.
    """

    name: str
    shape: tuple[int, ...]
    kind: int
    offset: int
    nbytes: int


@dataclasses.dataclass(frozen=True)
class GGUFFile:
    """The header of a GGUF file: everything but the weights.

    Attributes:
      path: the file.
      metadata: key -> Python value.
      tensors: name -> location.
    """

    path: Path
    metadata: dict[str, Any]
    tensors: dict[str, GGUFTensor]


class _Cursor:
    """Reads little-endian values off a buffer; every read past the end is a truncated file."""

    def __init__(self, data: mmap.mmap, where: str) -> None:
        self.data = data
        self.size = len(data)
        self.where = where
        self.at = 0

    def take(self, form: str) -> Any:
        end = self.at + struct.calcsize(form)
        self.check(end)
        values = struct.unpack_from(form, self.data, self.at)
        self.at = end
        return values[0] if len(values) == 1 else values

    def check(self, end: int) -> None:
        if end > self.size:
            raise SourceError(f"{self.where}: truncated GGUF file ({self.size} bytes)")

    def string(self) -> str:
        length = self.take("<Q")
        return self._text(length)

    def _text(self, length: int) -> str:
        end = self.at + length
        self.check(end)
        raw = self.data[self.at : end]
        self.at = end
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError:
            raise SourceError(f"{self.where}: corrupt GGUF file: a string is not UTF-8") from None

    def strings(self, count: int) -> list[str]:
        # The vocabulary: a hundred thousand strings, so the loop is spelled out.
        unpack, data, size, at = struct.Struct("<Q").unpack_from, self.data, self.size, self.at
        strings: list[str] = []
        try:
            for _ in range(count):
                end = at + 8 + unpack(data, at)[0]
                if end > size:
                    self.check(end)
                strings.append(data[at + 8 : end].decode("utf-8"))
                at = end
        except struct.error:
            self.check(self.size + 1)
        except UnicodeDecodeError:
            raise SourceError(f"{self.where}: corrupt GGUF file: a string is not UTF-8") from None
        self.at = at
        return strings

    def value(self, kind: int, depth: int = 0) -> Any:
        if kind in _SCALARS:
            return self.take(_SCALARS[kind])
        if kind == _STRING:
            return self.string()
        if kind != _ARRAY or depth > 3:
            raise SourceError(f"{self.where}: corrupt GGUF file: unknown value type {kind}")
        inner, count = self.take("<IQ")
        self.check(self.at + count)  # every element takes a byte or more
        if inner == _STRING:
            return self.strings(count)
        if inner in _SCALARS:
            code = _SCALARS[inner][1]
            self.check(self.at + count * struct.calcsize(_SCALARS[inner]))
            values = self.take(f"<{count}{code}") if count else ()
            return list(values) if isinstance(values, tuple) else [values]
        return [self.value(inner, depth + 1) for _ in range(count)]


def open_gguf(path: str | os.PathLike[str]) -> GGUFFile:
    """Read the header of a GGUF file (versions 2 and 3, little-endian).

    Raises:
      SourceError: no such file, not GGUF, truncated or corrupt.
    """
    path = as_path("path", path)
    where = str(path)
    try:
        with path.open("rb") as file:
            if file.read(4) != b"GGUF":
                raise SourceError(f"{where}: not a GGUF file (it does not begin with 'GGUF')")
            data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except OSError as error:
        raise SourceError(f"{where}: cannot be read: {error.strerror or error}") from None
    with data:
        cursor = _Cursor(data, where)
        cursor.at = 4
        version = cursor.take("<I")
        if version not in (2, 3):
            kind = "big-endian GGUF" if version and version & 0xFFFF == 0 else f"version {version}"
            raise SourceError(f"{where}: {kind} is not supported (only versions 2 and 3)")
        tensor_count, key_count = cursor.take("<QQ")
        metadata: dict[str, Any] = {}
        for _ in range(key_count):
            key = cursor.string()
            if key in metadata:
                raise SourceError(f"{where}: corrupt GGUF file: the key {key} appears twice")
            metadata[key] = cursor.value(cursor.take("<I"))
        infos: list[tuple[str, tuple[int, ...], int, int]] = []
        for _ in range(tensor_count):
            name = cursor.string()
            rank = cursor.take("<I")
            if rank > _MAX_DIMS:
                raise SourceError(f"{where}: corrupt GGUF file: tensor {name} has {rank} axes")
            shape = tuple(cursor.take("<Q") for _ in range(rank))[::-1]
            infos.append((name, shape, *cursor.take("<IQ")))
        alignment = metadata.get("general.alignment", 32)
        if not (isinstance(alignment, int) and alignment > 0):
            raise SourceError(f"{where}: corrupt GGUF file: general.alignment = {alignment!r}")
        start = -(-cursor.at // alignment) * alignment
        size = len(data)
    tensors: dict[str, GGUFTensor] = {}
    for name, shape, kind, offset in infos:
        if name in tensors:
            raise SourceError(f"{where}: tensor {name} is stored twice")
        nbytes = _byte_count(shape, kind, name, where)
        if start + offset + nbytes > size:
            raise SourceError(
                f"{where}: truncated GGUF file: tensor {name} ends at byte "
                f"{start + offset + nbytes}, the file at {size}"
            )
        tensors[name] = GGUFTensor(name, shape, kind, start + offset, nbytes)
    return GGUFFile(path, metadata, tensors)


def _byte_count(shape: tuple[int, ...], kind: int, name: str, where: str) -> int:
    from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

    try:
        block, nbytes = GGML_QUANT_SIZES[GGMLQuantizationType(kind)]
    except (ValueError, KeyError):
        raise SourceError(f"{where}: tensor {name} has the unknown ggml type {kind}") from None
    if not math.prod(shape) or not shape:
        raise SourceError(f"{where}: corrupt GGUF file: tensor {name} has shape {shape}")
    if shape[-1] % block:
        raise SourceError(
            f"{where}: corrupt GGUF file: rows of tensor {name} ({shape[-1]}) are not a "
            f"multiple of its block size ({block})"
        )
    return math.prod(shape) // block * nbytes


def read_tensor(
    file: GGUFFile, name: str, rows: slice = slice(None), columns: slice = slice(None)
) -> np.ndarray:
    """De-quantise a tensor, or some of its rows and columns, to float32 (float64 stays).

    Args:
      file: the header.
      name: of the tensor.
      rows: which of axis 0 (the slowest) to read; without a step.
      columns: which of axis 1, of a tensor of two axes; without a step. The quantisation blocks
        that hold them are read.

    Raises:
      SourceError: a ggml type that the `gguf` package cannot de-quantise.
    """
    from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
    from gguf.quants import dequantize

    info = file.tensors[name]
    kind = GGMLQuantizationType(info.kind)
    size, width = GGML_QUANT_SIZES[kind]
    first, last, _ = rows.indices(info.shape[0])
    begin, end = 0, info.nbytes // info.shape[0]
    inner, cut = info.shape[1:], slice(None)
    if len(inner) == 1:
        start, stop, _ = columns.indices(inner[0])
        begin, end = start // size * width, -(-stop // size) * width
        skipped = start // size * size
        inner, cut = ((end - begin) // width * size,), slice(start - skipped, stop - skipped)
    raw = _raw(file, info, (first, last), (begin, end))
    if kind == GGMLQuantizationType.F64:
        values = raw.view(np.float64)
    else:
        # `dequantize` works on sixteen rows at a time: with 256 blocks to a row its temporaries
        # fill the cache just about (measured: three times as fast as on the tensor's own rows).
        blocks = raw.reshape(-1, width * math.gcd(raw.size // width, 256))
        try:
            values = dequantize(blocks, kind)
        except NotImplementedError:
            raise SourceError(
                f"{file.path}: tensor {name} has the ggml type {kind.name}, which the gguf "
                "package cannot de-quantise"
            ) from None
    values = values.reshape(last - first, *inner)
    return values[:, cut] if len(inner) == 1 else values


def _raw(
    file: GGUFFile, info: GGUFTensor, rows: tuple[int, int], part: tuple[int, int]
) -> np.ndarray:
    """Bytes of a tensor's rows from `rows[0]` to `rows[1]`: of each those from part[0] to part[1].

    No other bytes of the file are read.
    """
    row_bytes = info.nbytes // info.shape[0]
    (first, last), (begin, end) = rows, part
    pieces = [(first * row_bytes, (last - first) * row_bytes)]
    if end - begin < row_bytes:
        pieces = [(row * row_bytes + begin, end - begin) for row in range(first, last)]
    with file.path.open("rb", buffering=0) as handle:
        raw = np.empty(sum(nbytes for _, nbytes in pieces), np.uint8)
        view = memoryview(raw.data)
        for start, nbytes in pieces:
            handle.seek(info.offset + start)
            into, view = view[:nbytes], view[nbytes:]
            while into:
                count = handle.readinto(into)
                if not count:
                    raise SourceError(
                        f"{file.path}: truncated GGUF file: tensor {info.name} is cut off"
                    )
                into = into[count:]
    return raw


def _reader(file: GGUFFile, name: str) -> Callable[..., np.ndarray]:
    return lambda *parts: read_tensor(file, name, *parts)


def config_of(file: GGUFFile, *, ignore_keys: Sequence[str] = ()) -> ModelConfig:
    """The configuration that a GGUF file's metadata and tensors state.

    Args:
      file: the header.
      ignore_keys: keys of the architecture to read as if they were not there.

    Raises:
      SourceError: another architecture than those of `families`.
      ConfigError: a key or value that this library does not handle.
    """
    embedding = file.tensors.get("token_embd.weight")

    def divisors(name: str) -> tuple[float, ...] | None:
        if f"{name}.weight" not in file.tensors:
            return None
        return tuple(float(v) for v in read_tensor(file, f"{name}.weight").ravel())

    return config_from_gguf(
        file.metadata,
        where=str(file.path),
        vocab_size=embedding.shape[0] if embedding is not None and embedding.shape else None,
        tied="output.weight" not in file.tensors,
        biases=gguf_biases(file.tensors),
        rope_tensors=RopeTensors(
            *map(divisors, ("rope_freqs", "rope_factors_short", "rope_factors_long"))
        ),
        ignore_keys=ignore_keys,
    )


def tensors_of(file: GGUFFile) -> list[Stored]:
    """Every tensor of a GGUF file, to be read by rows."""
    return [Stored(name, info.shape, _reader(file, name)) for name, info in file.tensors.items()]


def read_gguf(
    path: str | os.PathLike[str] | GGUFFile,
    *,
    dtype: DTypeLike = jnp.float32,
    place: Place | None = None,
    progress: Advance | None = None,
    ignore_keys: Sequence[str] = (),
) -> tuple[ModelConfig, Params]:
    """Load a GGUF model, de-quantised to `dtype`.

    Rows of q and k are put back into Hugging Face order (with the number of query and of
    key/value heads); without `output.weight` the model is tied.

    Args:
      path: the file, or its header from `open_gguf`.
      dtype: of the parameters.
      place: from the configuration, where each parameter goes, nested as they are; default: the
        default device.
      progress: called with the bytes (de-quantised) of every piece that has been read.
      ignore_keys: keys of the architecture to read as if they were not there.

    Raises:
      SourceError: not GGUF, truncated, another architecture, or tensors that do not fit.
      ConfigError: a configuration that this library does not handle.
    """
    file = path if isinstance(path, GGUFFile) else open_gguf(path)
    config = config_of(file, ignore_keys=ignore_keys)
    return config, fill(
        config,
        tensors_of(file),
        naming="gguf",
        dtype=dtype,
        where=str(file.path),
        shardings=place(config) if place else None,
        progress=progress,
    )
