"""Responses of every neuron to every prompt: on disk, if they do not fit into memory, or in it.

Section 2 of arXiv 2502.17355: a neuron's response is its output, averaged over the prompt's tokens.
One forward pass per prompt; the mean is taken inside the scan over layers. On disk: a zarr array
[example, layer, neuron] per site, a chunk for every batch and layer, with checksums.
"""

import functools
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxneurons.engine.device_memory import prompts_here
from jaxneurons.engine.out_of_memory import ChunkSize
from jaxneurons.errors import ConfigError, DataError, WriteError
from jaxneurons.model import finite
from jaxneurons.model.axis_types import any_axes
from jaxneurons.model.config import ModelConfig
from jaxneurons.model.device_share import spread_batch
from jaxneurons.model.token_ids import check_ids
from jaxneurons.model.transformer import Params, forward
from jaxneurons.neurons.sets import check_site, site_width
from jaxneurons.processes.sharing import spread
from jaxneurons.processes.team import ALONE, Processes, current
from jaxneurons.prompts import batches
from jaxneurons.prompts.batches import PromptBatch
from jaxneurons.storage.progress import Progress
from jaxneurons.storage.store import digest, make_directory, write_json
from jaxneurons.storage.tables import read_json
from jaxneurons.storage.typed_json import typed

DTYPES = ("float32", "bfloat16")
_ABOUT = "responses.json"
ROWS = 64
"""Prompts in a batch (fewer where they are long), and examples in a chunk."""


@any_axes
@functools.partial(jax.jit, static_argnames=("config", "sites"))
def mean_responses(
    params: Params,
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


@any_axes
class ResponseStore:
    """Responses of prompts, written batch by batch, read layer by layer.

    Args:
      path: a directory for nothing else; None keeps them in memory.
      prompts: token ids of the examples.
      config: the model's shape.
      identity: what the responses on disk depend on beside the prompts: the model's hash, say.
      dtype: as stored: float32 or bfloat16.

    Raises:
      DataError: the directory holds responses of another model, of other prompts or dtype; or a
        prompt holds a token that the model does not have.
    """

    def __init__(
        self,
        path: str | os.PathLike[str] | None,
        prompts: Sequence[Sequence[int]],
        *,
        config: ModelConfig,
        identity: Mapping[str, Any] | None = None,
        dtype: str = "float32",
    ):
        if dtype not in DTYPES:
            raise ConfigError(f"unknown response dtype {dtype!r}; known: {', '.join(DTYPES)}")
        if not prompts:
            raise DataError("no prompts to take responses of")
        for prompt in prompts:
            check_ids(prompt, config.vocab_size)
        self.path = None if path is None else Path(path)
        self.config, self.dtype = config, dtype
        self._plan = batches.by_length(prompts, ROWS)
        order = np.concatenate([batch.index for batch in self._plan])
        self._starts = np.cumsum([0, *(len(batch.index) for batch in self._plan)]).tolist()
        self._row_of = np.argsort(order)
        self._identity = {
            **(identity or {}),
            "prompts": digest([list(map(int, prompt)) for prompt in prompts]),
            "stored_as": dtype,
            "shape": [config.num_layers, *(site_width(config, s) for s in ("up", "down", "q"))],
        }
        self._arrays: dict[str, np.ndarray] = {}  # in memory
        self._done = {} if self.path is None else self._read_done(self.path)

    def _read_done(self, path: Path) -> dict[str, int]:
        """Batches finished, by site."""
        about = path / _ABOUT
        if not about.is_file():
            others = path.is_dir() and any(p.name[0] != "." for p in path.iterdir())
            if others and not about.is_file():  # another process may have begun meanwhile
                raise DataError(f"{path}: holds files but no responses; give a new directory")
            return {}
        try:
            kind = {"identity": dict, "done": dict}
            values = typed(kind, read_json(about), str(about))
            known, done = values["identity"], values["done"]
            other = [key for key in self._identity if known.get(key) != self._identity[key]]
            for site, count in done.items():
                typed(int, count, f"{about}: {site}")
                if not other and not 0 <= count <= len(self._plan):
                    raise DataError(f"{about}: {site}: {count} of {len(self._plan)} batches")
        except DataError as error:
            raise DataError(f"{error}: unreadable; delete {path}") from None
        if other:
            raise DataError(
                f"{path}: holds responses with another {', '.join(other)}; "
                "delete it, or give a new directory"
            )
        return done

    def __len__(self) -> int:
        return len(self._row_of)

    def fill(
        self,
        params: Params,
        sites: Sequence[str],
        *,
        progress: Progress | None = None,
    ) -> None:
        """Take and write the responses at `sites` that are not there yet.

        Args:
          params: the model's parameters.
          sites: which outputs.
          progress: called with how many prompts are done, and of how many.

        Raises:
          DataError: responses that are not finite; says to which prompt, and from which layer on.
          WriteError: no room, say; what was written stays.
        """
        for site in sites:
            check_site(site)
        team = self._team(params)
        self._done = team.of_first("responses", lambda: self._done)
        self._write_about()  # before anything else: a stop leaves nothing that is nobody's
        chunk = ChunkSize(ROWS, what="prompts")
        # Sites that have come equally far go through the model together.
        for done in sorted({self._done.get(site, 0) for site in sites}):
            together = tuple(site for site in sites if self._done.get(site, 0) == done)
            arrays = self._arrays_of(together, team)
            for first in range(done, len(self._plan), team.count):
                number = first + team.index
                with team.all_or_none("responses"):
                    if number < len(self._plan):
                        self._take(params, number, arrays, chunk)
                last = min(first + team.count, len(self._plan))
                self._done |= dict.fromkeys(together, last)
                self._write_about()
                if progress is not None:
                    progress(self._starts[last], len(self))
        team.wait("responses are there")

    def _team(self, params: Params) -> Processes:
        """The processes that take a batch each; only this one where none sees the others' disks."""
        alone = self.path is None or current().local_disks or spread(params)
        return ALONE if alone else current()

    def _arrays_of(self, sites: Sequence[str], team: Processes) -> dict[str, Any]:
        """The arrays of some sites; process 0 creates them before the others open them."""
        if team.first:
            arrays = {site: self._open(site, create=True) for site in sites}
            team.wait("arrays")
            return arrays
        team.wait("arrays")
        return {site: self._open(site) for site in sites}

    def _take(
        self, params: Params, number: int, arrays: Mapping[str, Any], chunk: ChunkSize
    ) -> None:
        """Take the responses of a batch and write them."""
        batch = self._plan[number]
        means = self._means(params, batch, tuple(arrays), chunk)
        self._check(params, batch, means)
        self._write(number, len(batch.index), arrays, means)

    def _means(
        self, params: Params, batch: PromptBatch, sites: tuple[str, ...], chunk: ChunkSize
    ) -> Mapping[str, Any]:
        """`mean_responses` of a batch, in parts where memory does not hold all of it."""
        count, tokens = batch.tokens.shape

        def of_rows(start: int, end: int) -> Mapping[str, Any]:
            rows = (batch.tokens[start:end], batch.lengths[start:end])
            rows = spread_batch(params, rows, config=self.config)
            return mean_responses(params, *rows, config=self.config, sites=sites)

        fit, parts = prompts_here(params, self.config, prompts=count, tokens=tokens)
        return chunk.run_rows(of_rows, count, axis=1, most=fit, parts=parts)

    def _check(self, params: Params, batch: PromptBatch, means: Mapping[str, Any]) -> None:
        """Raise `DataError` for the first prompt of a batch whose responses are not finite."""
        for row, index in enumerate(batch.index.tolist()):
            if not all(np.isfinite(np.asarray(values)[:, row]).all() for values in means.values()):
                where = finite.explain(
                    params, batch.tokens[row, : batch.lengths[row]], config=self.config
                )
                raise DataError(f"prompt {index + 1} of {len(self)}: no responses: {where}")

    def write(self, number: int, means: Mapping[str, Array]) -> None:
        """Write one batch of the plan, [layer, batch, width] by site, made elsewhere.

        Raises:
          WriteError: no room, say.
        """
        self._write_about()
        arrays = {site: self._open(site, create=True) for site in means}
        self._write(number, len(self._plan[number].index), arrays, means)
        self._done |= dict.fromkeys(means, number + 1)
        self._write_about()

    def _write(
        self, number: int, count: int, arrays: Mapping[str, Any], means: Mapping[str, Any]
    ) -> None:
        start = self._starts[number]
        pending = {}
        for site, array in arrays.items():
            values = np.asarray(means[site])[:, :count].swapaxes(0, 1)
            if isinstance(array, np.ndarray):
                array[start : start + count] = values.astype(array.dtype)
            else:
                pending[site] = array[start : start + count].write(
                    values.astype(array.dtype.numpy_dtype)
                )
        refused = {site: write.exception() for site, write in pending.items()}
        for site, error in refused.items():  # all of them have ended
            if error is not None:
                raise WriteError(self._place(site), error) from None

    def _write_about(self) -> None:
        if self.path is not None and current().writes:
            make_directory(self.path)
            write_json(self.path / _ABOUT, {"identity": self._identity, "done": self._done})

    def _place(self, site: str) -> Path:
        """Where a site's responses are, for messages too."""
        return (self.path or Path("responses in memory")) / site

    def _open(self, site: str, *, create: bool = False) -> Any:
        """The array [example, layer, width] of a site: NumPy's in memory, TensorStore's on disk."""
        shape = (len(self), self.config.num_layers, site_width(self.config, site))
        if self.path is None:
            if site not in self._arrays:
                self._arrays[site] = np.zeros(shape, jnp.dtype(self.dtype))
            return self._arrays[site]
        import tensorstore as ts

        place = self._place(site)
        spec = {
            "driver": "zarr3",
            "kvstore": {"driver": "file", "path": str(place)},
            "metadata": {
                "shape": list(shape),
                "chunk_grid": {
                    "name": "regular",
                    "configuration": {"chunk_shape": [ROWS, 1, shape[2]]},
                },
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
            if create and not (place / "zarr.json").exists():
                raise WriteError(place, error) from None
            reason = str(error).split(" [")[0]
            raise DataError(f"{place}: unreadable ({reason}); delete it") from None

    def read(self, site: str, layer: int) -> Float[np.ndarray, "example width"]:
        """Responses of all examples, in their order, at one site and layer, as float32.

        Raises:
          DataError: not all written, damaged, or not finite.
        """
        if self._done.get(site, 0) < len(self._plan):
            where = self.path or "in memory"
            raise DataError(f"{where}: the responses at {site!r} are not complete")
        array = self._open(site)
        try:
            values = array[:, layer] if self.path is None else array[:, layer].read().result()
        except ValueError as error:
            raise DataError(
                f"{self._place(site)}: damaged at layer {layer} ({str(error).split(' [')[0]}); "
                f"delete {self.path} and run again"
            ) from None
        values = values.astype(np.float32)[self._row_of]
        overflown = np.flatnonzero(~np.isfinite(values).all(axis=1))
        if len(overflown):
            delete = "" if self.path is None else f"delete {self.path}, and "
            raise DataError(
                f"{self._place(site)}: responses to prompt {overflown[0] + 1} are not finite at "
                f"layer {layer}; {delete}run again in bfloat16 or float32"
            )
        return values
