"""Second moment of keys: what a down projection reads while a model reads text.

C = E[k k^T], not centred, k the `act` activation of a layer (arXiv 2202.05262, section 3.1): an
edit is to change as little as possible what the layer writes for the keys of text. Gupta et al.
2025 (arXiv 2506.04226): a few times `width` keys do.

The first token of a text is left out. Attention gathers on it whatever it is, its activations are
hundreds of times as large as any other's (Sun et al. 2024, arXiv 2402.17762), and it would be most
of C while being no subject's key.
"""

import dataclasses
import functools
import io
import json
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import scipy.linalg
from jaxtyping import Array, Float, Int

from jaxneurons.checkpoints.loading import LM
from jaxneurons.edit.experts import check_one_kernel
from jaxneurons.edit.texts import CHUNK, chunks, default_text
from jaxneurons.errors import ConfigError, DataError
from jaxneurons.model.axis_types import any_axes
from jaxneurons.model.config import ModelConfig
from jaxneurons.model.parameters import LAYERS, Params
from jaxneurons.model.token_ids import check_ids
from jaxneurons.model.transformer import forward
from jaxneurons.processes.sharing import Unit, fetch, open_parts, share_units, spread
from jaxneurons.prompts.batches import bucket
from jaxneurons.storage.progress import Progress
from jaxneurons.storage.settings import as_path, check_argument, check_number
from jaxneurons.storage.store import Parts, digest, write_bytes

MULTIPLE = 4
"""Keys by default, in widths of the layer."""
TOKENS = 1024
"""Of a batch, about."""
KEPT = 16
"""Batches after which a run directory keeps the sums."""
FEW = 2
"""A C of fewer keys than so many widths counts as singular: its inverse is mostly noise."""
RIDGE = 0.3
"""What is added to the diagonal of a C that is singular, in mean eigenvalues: what disturbs unseen
text least on SmolLM2, for half to eight widths of keys (`benchmarks/covariance.py`)."""
PIVOT = 1e-9
"""A C is singular if a pivot of its Cholesky factor is below so many mean eigenvalues."""
FORMAT = 1


class SingularCovarianceWarning(UserWarning):
    """A second moment that cannot be inverted as it is: something was added to its diagonal."""


@dataclasses.dataclass(frozen=True, eq=False)
class Covariance:
    """Second moment of the keys of one layer.

    Attributes:
      layer: from 0.
      matrix: E[k k^T], not centred, as it was measured.
      count: keys that it is the mean over.
      identity: model, tokenizer, text and number of keys that it depends on.
      ridge: what `solve` adds to the diagonal; 0 where the matrix can be inverted as it is.
    """

    layer: int
    matrix: Float[np.ndarray, "width width"]
    count: int
    identity: Mapping[str, Any]
    ridge: float = 0.0

    def regularised(self) -> Float[np.ndarray, "width width"]:
        """The matrix with `ridge` added to its diagonal, float64."""
        matrix = self.matrix.astype(np.float64)
        matrix[np.diag_indices_from(matrix)] += self.ridge
        return matrix

    def solve(self, keys: Float[np.ndarray, "*keys width"]) -> Float[np.ndarray, "*keys width"]:
        """C^-1 k for each key, by a Cholesky factor in float64; float32.

        Raises:
          DataError: keys of another width, or a matrix that cannot be inverted.
        """
        keys = np.asarray(keys)
        if keys.shape[-1] != len(self.matrix):
            raise DataError(
                f"keys of width {keys.shape[-1]} for the covariance of layer {self.layer}, whose "
                f"width is {len(self.matrix)}"
            )
        flat = keys.reshape(-1, keys.shape[-1]).astype(np.float64)
        return scipy.linalg.cho_solve(self._factor, flat.T).T.reshape(keys.shape).astype(np.float32)

    @functools.cached_property
    def _factor(self) -> tuple[np.ndarray, bool]:
        try:
            return scipy.linalg.cho_factor(self.regularised(), lower=True)
        except (np.linalg.LinAlgError, ValueError):
            raise DataError(
                f"the covariance of layer {self.layer} is singular ({self.count} keys of width "
                f"{len(self.matrix)}); collect it over more text, or see `regularise`"
            ) from None


def regularise(covariance: Covariance, *, ridge: float = RIDGE) -> Covariance:
    """A second moment that `solve` can invert: itself, or with something added to its diagonal.

    It counts as singular if it is the mean over fewer keys than `FEW` times its width, or if a
    pivot of its Cholesky factor is below `PIVOT` mean eigenvalues. Warns if it is.

    Args:
      covariance: the second moment.
      ridge: what is added, in mean eigenvalues.

    Raises:
      DataError: a matrix that is zero or not finite.
    """
    width = len(covariance.matrix)
    mean = float(np.trace(covariance.matrix.astype(np.float64))) / width
    if not np.isfinite(covariance.matrix).all() or mean <= 0:
        raise DataError(
            f"the covariance of layer {covariance.layer} is zero or not finite; load the model in "
            "float32, or check its weights with `jaxneurons verify`"
        )
    if covariance.count >= FEW * width and _smallest_pivot(covariance.matrix) > PIVOT * mean:
        return dataclasses.replace(covariance, ridge=0.0)
    warnings.warn(
        f"the covariance of layer {covariance.layer} is singular, or nearly so "
        f"({covariance.count} keys of width {width}): {ridge:g} of its mean eigenvalue is added to "
        "the diagonal; more text makes it regular",
        SingularCovarianceWarning,
        stacklevel=2,
    )
    return dataclasses.replace(covariance, ridge=ridge * mean)


def _smallest_pivot(matrix: Float[np.ndarray, "width width"]) -> float:
    try:
        factor = scipy.linalg.cholesky(matrix.astype(np.float64), lower=True)
    except np.linalg.LinAlgError:
        return 0.0
    return float(np.diag(factor).min()) ** 2


# --- collecting -----------------------------------------------------------------------------------


@any_axes
def collect_covariance(
    lm: LM,
    layers: Sequence[int],
    *,
    text: Sequence[str] | None = None,
    vectors: int | None = None,
    out: str | os.PathLike[str] | None = None,
    progress: Progress | None = None,
) -> dict[int, Covariance]:
    """Second moments of the keys of some layers, in one pass over text.

    The text is cut into pieces of 128 tokens, whose order is drawn from a fixed seed, and the first
    `vectors` keys of them count. Sums are made in float32, a batch at a time; parameters on several
    devices stay there. Layers above the last of `layers` are not run.

    Args:
      lm: the model.
      layers: which.
      text: texts; None: see `texts.default_text`.
      vectors: how many keys; None: `MULTIPLE` times the layers' width, or as many as a given text
        has, if that is fewer.
      out: a directory to keep sums and results in: a stopped run goes on there, to the same result.
      progress: called with how many keys are done, and of how many.

    Returns:
      By layer, in the order of `layers`. Those that are singular are regularised, with a warning.

    Raises:
      DataError: too little text, keys that are not finite, or a directory of another run.
      ConfigError: layers that the model has not, or arguments of other types.
      WriteError: `out` cannot be written.
    """
    layers = _checked_layers(lm, layers)
    check_argument("text", Sequence[str] | None, text)
    if vectors is not None:
        check_number("vectors", vectors, least=1)
    wanted = vectors or MULTIPLE * lm.config.intermediate_size
    name, texts = ("given", list(text)) if text is not None else default_text(lm, wanted)
    pieces = _first(chunks(lm, texts), wanted)
    count = sum(len(piece) - 1 for piece in pieces)
    if count < (1 if vectors is None else vectors):
        raise DataError(
            f"the text gives {count} keys, {wanted} are needed; give more text, or fewer vectors"
        )
    for piece in pieces:
        check_ids(piece, lm.config.vocab_size, lm.tokenizer)
    identity = {
        **lm.identity(),
        "format": FORMAT,
        "text": name,
        "text_sha256": digest(texts),
        "vectors": count,
    }
    parts = open_parts(None if out is None else as_path("out", out), identity)

    def collect() -> None:
        missing = [layer for layer in layers if parts.load(_part(layer)) is None]
        if missing:
            _collect(lm, missing, pieces, parts, progress)

    share_units(parts, [Unit(tuple(map(_part, layers)), collect)], together=spread(lm.params))
    collect()
    covariances = {}
    for layer in layers:
        matrix = (parts.load(_part(layer)) or {})["matrix"]
        covariances[layer] = regularise(Covariance(layer, matrix, count, identity))
    return covariances


def _part(layer: int) -> str:
    return f"layer-{layer:03d}"


def _checked_layers(lm: LM, layers: Sequence[int]) -> list[int]:
    check_argument("lm", LM, lm)
    check_argument("layers", Sequence[int], layers)
    check_one_kernel(lm.config, "what a covariance of keys is for")
    count = lm.config.num_layers
    for layer in layers:
        if not 0 <= layer < count:
            raise ConfigError(f"layer {layer}: the model has {count} layers, 0 to {count - 1}")
    if not layers:
        raise ConfigError("no layers to collect keys of; name one at least")
    return list(dict.fromkeys(layers))


def _first(pieces: Sequence[tuple[int, ...]], vectors: int) -> list[tuple[int, ...]]:
    """The first pieces, the last one cut, that give so many keys together (or all there are)."""
    chosen: list[tuple[int, ...]] = []
    for piece in pieces:
        if vectors <= 0:
            break
        chosen.append(piece[: vectors + 1])
        vectors -= len(chosen[-1]) - 1
    return chosen


def _batches(pieces: Sequence[tuple[int, ...]]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Right-padded ids and lengths of pieces, in few shapes; rows of length 1 only fill a shape."""
    by_shape: dict[int, list[tuple[int, ...]]] = {}
    for piece in pieces:
        by_shape.setdefault(min(bucket(len(piece)), CHUNK), []).append(piece)
    for length, members in sorted(by_shape.items()):
        rows = TOKENS // length
        for start in range(0, len(members), rows):
            tokens = np.zeros((rows, length), np.int32)
            lengths = np.ones(rows, np.int32)
            for row, piece in enumerate(members[start : start + rows]):
                tokens[row, : len(piece)], lengths[row] = piece, len(piece)
            yield tokens, lengths


def _collect(
    lm: LM,
    layers: Sequence[int],
    pieces: Sequence[tuple[int, ...]],
    parts: Parts,
    progress: Progress | None,
) -> None:
    """Take the keys of some layers and keep their second moments, a part for each layer."""
    total = sum(len(piece) - 1 for piece in pieces)
    config, params = _lower_layers(lm.config, lm.params, max(layers) + 1)
    width = config.intermediate_size
    state = f"sums-{digest(list(layers))[:16]}"
    kept = parts.load(state) or {}
    sums: Any = jnp.zeros((len(layers), width, width), jnp.float32)
    done, first = 0, 0
    if "keys" in kept:
        sums, done, first = jnp.asarray(kept["sums"]), int(kept["keys"]), int(kept["batches"])
    for number, (tokens, lengths) in enumerate(_batches(pieces), 1):
        if number <= first:
            continue
        sums = add_keys(sums, params, tokens, lengths, config=config, layers=tuple(layers))
        done += int((lengths - 1).sum())
        if number % KEPT == 0 and parts.path is not None:
            kept = {"sums": fetch(sums), "keys": np.array(done), "batches": np.array(number)}
            parts.save(state, kept)
        if progress is not None:
            progress(done, total)
    for layer, matrix in zip(layers, fetch(sums), strict=True):
        parts.save(_part(layer), {"matrix": matrix / np.float32(done)})
    if kept:  # what is finished needs no sums
        parts.save(state, {"sums": np.zeros(0, np.float32)})


def _lower_layers(config: ModelConfig, params: Params, count: int) -> tuple[ModelConfig, Params]:
    """The model up to some layer."""
    if count == config.num_layers:
        return config, params
    lower = jax.tree.map(lambda x: x[:count], params[LAYERS])
    return config.first_layers(count), {**params, LAYERS: lower}


@functools.partial(jax.jit, static_argnames=("config", "layers"))
def add_keys(
    sums: Float[Array, "layer width width"],
    params: Params,
    tokens: Int[Array, "batch seq"],
    lengths: Int[Array, " batch"],
    *,
    config: ModelConfig,
    layers: tuple[int, ...],
) -> Float[Array, "layer width width"]:
    """The sums with k k^T of every real token but the first of each row added."""
    out = forward(params, tokens, config=config, lengths=lengths, at="all", capture=("act",))
    place = jnp.arange(tokens.shape[1])
    counts = (place > 0) & (place < lengths[:, None])
    keys = out.activations["act"][jnp.array(layers)].astype(jnp.float32)
    keys = jnp.where(counts[..., None], keys, 0).reshape(len(layers), -1, keys.shape[-1])
    highest = jax.lax.Precision.HIGHEST
    return sums + jnp.einsum("ltw,ltv->lwv", keys, keys, precision=highest)


# --- files ----------------------------------------------------------------------------------------


def write_covariances(covariances: Mapping[int, Covariance], path: str | os.PathLike[str]) -> None:
    """Write second moments of one model with their identities to an `.npz` file.

    Raises:
      WriteError: it cannot be written; no half file is left.
    """
    check_argument("covariances", Mapping[int, Covariance], covariances)
    about = [
        {"layer": c.layer, "count": c.count, "ridge": c.ridge, "identity": dict(c.identity)}
        for c in covariances.values()
    ]
    buffer = io.BytesIO()
    arrays: dict[str, Any] = {_part(c.layer): c.matrix for c in covariances.values()}
    np.savez(buffer, about=np.array(json.dumps(about)), **arrays)
    write_bytes(as_path("path", path), buffer.getvalue())


def read_covariances(
    path: str | os.PathLike[str], *, lm: LM | None = None
) -> dict[int, Covariance]:
    """Read what `write_covariances` wrote, by layer.

    Args:
      path: the file.
      lm: the model that it must be of; None: any.

    Raises:
      DataError: no such file, a damaged one, or the keys of another model.
    """
    path = as_path("path", path)
    try:
        with np.load(io.BytesIO(path.read_bytes()), allow_pickle=False) as file:
            about = json.loads(str(file["about"]))
            covariances = {
                entry["layer"]: Covariance(
                    int(entry["layer"]),
                    file[_part(entry["layer"])].astype(np.float32),
                    int(entry["count"]),
                    dict(entry["identity"]),
                    float(entry["ridge"]),
                )
                for entry in about
            }
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}") from None
    except Exception as error:  # zipfile, numpy and json raise this and that
        raise DataError(f"{path}: no file of covariances, or damaged ({error})") from None
    if lm is not None:
        for covariance in covariances.values():
            check_covariance(covariance, lm, where=f"{path}: ")
    return covariances


def check_covariance(covariance: Covariance, lm: LM, *, where: str = "") -> None:
    """Raise `DataError` if a second moment is that of another model's keys.

    Of another dtype of the same weights is fine.
    """
    known = lm.identity()
    width = lm.config.intermediate_size
    other = [
        key
        for key in ("model", "tokenizer")
        if covariance.identity.get(key, known[key]) != known[key]
    ]
    if len(covariance.matrix) != width or covariance.layer >= lm.config.num_layers:
        other = other or ["shape"]
    if other:
        raise DataError(
            f"{where}the covariance of layer {covariance.layer} was collected with another "
            f"{' and '.join(other)}; collect it with this model"
        )
