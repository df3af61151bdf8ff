"""`--mesh` and `--sharding`: one pair of options for every command that loads a model."""

import json

import pytest
import typer
from support.fixtures import cloze, write_lm, write_queries

from jaxneurons import cli
from jaxneurons.errors import SourceError


def commands(group, path=()):
    for name, command in group.commands.items():
        if hasattr(command, "commands"):
            yield from commands(command, (*path, name))
        else:
            yield (*path, name), {option for p in command.params for option in p.opts}


def test_every_command_that_loads_a_model_has_them():
    of_command = dict(commands(typer.main.get_command(cli.app)))
    loading = {name for name, options in of_command.items() if "--mesh" in options}
    assert {name for name in loading if "--sharding" not in of_command[name]} == set()
    with_a_model = {name for name, options in of_command.items() if "--ignore-key" in options}
    assert with_a_model - loading == {("inspect",)}
    assert loading - with_a_model == {
        ("relspec", name) for name in ("neurons", "ablate", "analyse")
    }


def test_they_reach_the_loader(run, monkeypatch):
    given = []

    def load(source, **options):
        given.append(options)
        raise SourceError("as far as this goes")

    monkeypatch.setattr("jaxneurons.checkpoints.loading.load", load)
    assert run("demo", "--mesh", "4x2", "--sharding", "fsdp-tensor")[0] == 1
    assert run("demo", "--mesh", "1x2")[0] == 1
    assert run("demo")[0] == 1
    assert given == [
        {"ignore_keys": (), "mesh": "4x2", "rules": "fsdp-tensor"},
        {"ignore_keys": (), "mesh": "1x2"},
        {"ignore_keys": ()},
    ]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--mesh", "4x4"], "a mesh of 4x4 needs 16 devices, but there are 8 devices (cpu)"),
        (["--mesh", "4,2"], "a mesh is written DATAxMODEL, such as 4x2; got '4,2'"),
        (["--mesh", "2x2", "--sharding", "fdsp"], "unknown sharding 'fdsp'; did you mean 'fsdp'"),
        (["--sharding", "fsdp"], "give --mesh too"),
    ],
)
def test_what_cannot_be_is_one_line(run, options, message):
    code, _, err = run("demo", *options)
    assert code == 1
    assert message in " ".join(err.split())
    assert err.count("error:") == 1


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::jaxneurons.qrnca.caveats.UnlikelyAnswerWarning")
@pytest.mark.filterwarnings("ignore:.*cannot be divided")
def test_located_on_a_mesh(run, tmp_path):
    model = write_lm(tmp_path / "model")
    queries = write_queries(tmp_path / "cloze.json", cloze(4))
    options = ["--model", model, "--queries", queries, "--rule", "gauss", "--steps", "2"]
    neurons = []
    for name, more in (("one", ()), ("mesh", ("--mesh", "2x2", "--sharding", "fsdp-tensor"))):
        code, _, err = run("qrnca", "locate", *options, "--out", tmp_path / name, *more)
        assert code == 0, err
        lines = (tmp_path / name / "neurons.jsonl").read_text().splitlines()
        neurons.append([json.loads(line)["neurons"] for line in lines])
    assert neurons[0] == neurons[1]
    assert any(neurons[0])
