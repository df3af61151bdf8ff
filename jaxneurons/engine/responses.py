"""Responses of every neuron to every prompt, on disk: they need not fit into memory.

Section 2 of arXiv 2502.17355: a neuron's response is its output, averaged over the prompt's tokens.
One forward pass per prompt; the mean is taken inside the scan over layers. A zarr array
[example, layer, neuron] per site, a chunk for every batch and layer, with checksums.
"""

import functools
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Float, Int

from jaxneurons.errors import ConfigError, DataError, WriteError
from jaxneurons.model import finite
from jaxneurons.model.config import ModelConfig
from jaxneurons.model.token_ids import check_ids
from jaxneurons.model.transformer import forward
from jaxneurons.neurons.sets import check_site, site_width
from jaxneurons.prompts import batches
from jaxneurons.storage.store import digest, make_directory, write_json
from jaxneurons.storage.tables import read_json
from jaxneurons.storage.typed_json import typed

DTYPES = ("float32", "bfloat16")
ROWS = 64
"""Prompts in a batch (fewer where they are long), and examples in a chunk."""

Read = Callable[[str, int], Float[np.ndarray, "example width"]]
"""Responses of all examples at one site and layer."""


@functools.partial(jax.jit, static_argnames=("config", "sites"))
def mean_responses(
    params: Any,
    tokens: Int[Array, "batch seq"],
    lengths: Int[Array, " batch"],
    *,
    config: ModelConfig,
    sites: tuple[str, ...],
) -> dict[str, Float[Array, "layer batch width"]]:
    """Output of every neuron of `sites`, averaged over the real tokens of each prompt, float32.

    The beginning-of-sequence token counts, if the tokenizer puts one.
    """
    out = forward(
        params, tokens, config=config, lengths=lengths, capture=sites, reduce="mean", at="last"
    )
    return out.activations


class ResponseStore:
    """Responses of prompts on disk, written batch by batch, read layer by layer.

    Args:
      path: a directory of its own.
      prompts: token ids of the examples.
      config: the model's shape.
      identity: what the responses depend on beside the prompts: the model's hash, say.
      dtype: as stored: float32 or bfloat16.

    Raises:
      DataError: the directory holds responses of another model, of other prompts or dtype; or a
        prompt holds a token that the model does not have.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        prompts: Sequence[Sequence[int]],
        *,
        config: ModelConfig,
        identity: Mapping[str, Any],
        dtype: str = "float32",
    ):
        if dtype not in DTYPES:
            raise ConfigError(f"unknown response dtype {dtype!r}; known: {', '.join(DTYPES)}")
        if not prompts:
            raise DataError("no prompts to take responses of")
        for prompt in prompts:
            check_ids(prompt, config.vocab_size)
        self.path, self.config, self.dtype = Path(path), config, dtype
        self._plan = batches.by_length(prompts, ROWS)
        order = np.concatenate([batch.index for batch in self._plan])
        self._starts = np.cumsum([0, *(len(batch.index) for batch in self._plan)]).tolist()
        self._row_of = np.argsort(order)
        self._about = self.path / "responses.json"
        self._identity = {
            **identity,
            "prompts": digest([list(map(int, prompt)) for prompt in prompts]),
            "stored_as": dtype,
            "shape": [config.num_layers, *(site_width(config, s) for s in ("up", "down", "q"))],
        }
        self._done = self._read_done()

    def _read_done(self) -> dict[str, int]:
        """Batches finished, by site."""
        if not self._about.is_file():
            if self.path.is_dir() and any(p.name[0] != "." for p in self.path.iterdir()):
                raise DataError(f"{self.path}: holds files but no responses; give a new directory")
            return {}
        try:
            kind = {"identity": dict, "done": dict}
            about = typed(kind, read_json(self._about), str(self._about))
            known, done = about["identity"], about["done"]
            other = [key for key in self._identity if known.get(key) != self._identity[key]]
            for site, count in done.items():
                typed(int, count, f"{self._about}: {site}")
                if not other and not 0 <= count <= len(self._plan):
                    raise DataError(f"{self._about}: {site}: {count} of {len(self._plan)} batches")
        except DataError as error:
            raise DataError(f"{error}: unreadable; delete {self.path}") from None
        if other:
            raise DataError(
                f"{self.path}: holds responses with another {', '.join(other)}; "
                "delete it, or give a new directory"
            )
        return done

    def __len__(self) -> int:
        return len(self._row_of)

    def fill(
        self,
        params: Any,
        sites: Sequence[str],
        *,
        progress: Callable[[int, int], None] | None = None,
    ) -> None:
        """Take and write the responses at `sites` that are not there yet.

        Args:
          params: the model's parameters.
          sites: which outputs.
          progress: told how many prompts are done, and of how many.

        Raises:
          DataError: responses that are not finite; says to which prompt, and from which layer on.
          WriteError: no room, say; what was written stays.
        """
        for site in sites:
            check_site(site)
        self._write_about()  # before anything else: a stop leaves nothing that is nobody's
        # Sites that have come equally far go through the model together.
        for done in sorted({self._done.get(site, 0) for site in sites}):
            together = tuple(site for site in sites if self._done.get(site, 0) == done)
            arrays = {site: self._open(site, create=True) for site in together}
            for number in range(done, len(self._plan)):
                batch = self._plan[number]
                found = mean_responses(
                    params, batch.tokens, batch.lengths, config=self.config, sites=together
                )
                self._check(params, batch, found)
                self._write(number, len(batch.index), arrays, found)
                if progress is not None:
                    progress(self._starts[number + 1], len(self))

    def _check(self, params: Any, batch: batches.PromptBatch, found: Mapping[str, Array]) -> None:
        """Raise `DataError` for the first prompt of a batch whose responses are not finite."""
        for row, index in enumerate(batch.index.tolist()):
            if not all(np.isfinite(np.asarray(values)[:, row]).all() for values in found.values()):
                where = finite.explain(
                    params, batch.tokens[row, : batch.lengths[row]], config=self.config
                )
                raise DataError(f"prompt {index + 1} of {len(self)}: no responses: {where}")

    def write(self, number: int, found: Mapping[str, Array]) -> None:
        """Write one batch of the plan, [layer, batch, width] by site, made elsewhere.

        Raises:
          WriteError: no room, say.
        """
        self._write_about()
        arrays = {site: self._open(site, create=True) for site in found}
        self._write(number, len(self._plan[number].index), arrays, found)

    def _write(
        self, number: int, count: int, arrays: Mapping[str, Any], found: Mapping[str, Array]
    ) -> None:
        start = self._starts[number]
        pending = {}
        for site, array in arrays.items():
            values = np.asarray(found[site])[:, :count].swapaxes(0, 1)
            pending[site] = array[start : start + count].write(
                values.astype(array.dtype.numpy_dtype)
            )
        refused = {site: one.exception() for site, one in pending.items()}
        for site, error in refused.items():  # all of them have ended
            if error is not None:
                raise WriteError(self.path / site, error) from None
        for site in arrays:
            self._done[site] = number + 1
        self._write_about()

    def _write_about(self) -> None:
        make_directory(self.path)
        write_json(self._about, {"identity": self._identity, "done": self._done})

    def _open(self, site: str, *, create: bool = False) -> Any:
        import tensorstore as ts

        width = site_width(self.config, site)
        shape = [len(self), self.config.num_layers, width]
        chunk = [ROWS, 1, width]
        spec = {
            "driver": "zarr3",
            "kvstore": {"driver": "file", "path": str(self.path / site)},
            "metadata": {
                "shape": shape,
                "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": chunk}},
                "chunk_key_encoding": {"name": "default"},
                "data_type": self.dtype,
                "codecs": [
                    {"name": "bytes", "configuration": {"endian": "little"}},
                    {"name": "crc32c"},
                ],
            },
        }
        try:
            return ts.open(spec, create=create, open=True).result()
        except (ValueError, OSError) as error:
            if create and not (self.path / site / "zarr.json").exists():
                raise WriteError(self.path / site, error) from None
            reason = str(error).split(" [")[0]
            raise DataError(f"{self.path / site}: unreadable ({reason}); delete it") from None

    def read(self, site: str, layer: int) -> Float[np.ndarray, "example width"]:
        """Responses of all examples, in their order, at one site and layer, as float32.

        Raises:
          DataError: not all written, damaged, or not finite.
        """
        if self._done.get(site, 0) < len(self._plan):
            raise DataError(f"{self.path}: the responses at {site!r} are not complete")
        try:
            values = self._open(site)[:, layer].read().result()
        except ValueError as error:
            raise DataError(
                f"{self.path / site}: damaged at layer {layer} ({str(error).split(' [')[0]}); "
                f"delete {self.path} and run again"
            ) from None
        values = values.astype(np.float32)[self._row_of]
        lost = np.flatnonzero(~np.isfinite(values).all(axis=1))
        if len(lost):
            raise DataError(
                f"{self.path / site}: responses to prompt {lost[0] + 1} are not finite at layer "
                f"{layer}; delete {self.path}, and run again in bfloat16 or float32"
            )
        return values
