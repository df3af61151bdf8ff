"""Plans: shares of parameters by rule, what is chosen, what does not fit, headers only."""

import dataclasses
import json
import math

import jax
import pytest
from support.models import tiny_config

import jaxneurons as jn
from jaxneurons.errors import ConfigError, SourceError
from jaxneurons.model.parameters import count_parameters, list_parameters
from jaxneurons.model.sharding import PRESETS, partition_specs
from jaxneurons.scale import Placement, Work, plan
from jaxneurons.scale.choosing import placements
from jaxneurons.scale.placement import held, on_one_device
from jaxneurons.scale.programs import JOBS
from jaxneurons.scale.shapes import SHAPES, read_shape

PUBLISHED = {
    "1B": 1_235_814_400,
    "7B": 6_738_415_616,
    "8B": 8_030_261_248,
    "13B": 13_015_864_320,
    "70B": 68_976_648_192,
}
"""Parameters as the publishers' model cards and files count them."""
SMALL = Work(prompts=64, tokens=32)


@pytest.mark.parametrize("name", SHAPES)
def test_shapes_have_the_published_number_of_parameters(name):
    assert count_parameters(SHAPES[name]) == PUBLISHED[name]


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("mesh", [(1, 1), (8, 1), (2, 4), (1, 8)])
def test_bytes_that_a_device_holds_are_those_of_its_shards(preset, mesh):
    config = tiny_config(hidden_size=64, intermediate_size=64, num_heads=8, num_kv_heads=8)
    placement = Placement(*mesh, preset)
    specs = partition_specs(config, placement.sizes, placement.rules)
    expected = 0
    for parameter in list_parameters(config):
        spec = specs
        for key in parameter.path:
            spec = spec[key]
        names = [n for e in spec if e is not None for n in ((e,) if isinstance(e, str) else e)]
        expected += 2 * parameter.size // math.prod(placement.sizes[n] for n in names)
    kept = held(config, placement, 2)
    assert kept.resting == expected
    # Whatever is moved completes what one device computes with.
    assert kept.resting + kept.moved == 2 * count_parameters(on_one_device(config, placement))


def test_heads_that_do_not_divide_stay_whole():
    config = tiny_config(num_heads=8, num_kv_heads=2)
    local = on_one_device(config, Placement(1, 4, "tensor"))
    assert (local.num_heads, local.num_kv_heads) == (2, 2)
    assert local.intermediate_size == config.intermediate_size // 4
    assert on_one_device(config, Placement(4, 1, "tensor")) == config


def test_meshes_are_of_all_devices_and_none_is_there_twice():
    config = SHAPES["8B"]
    some = list(placements(config, 16))
    assert len(set(some)) == len(some)
    assert {p.devices for p in some} == {16}
    assert {p.preset for p in some} == set(PRESETS)
    assert all(32 % p.model == 0 for p in some)
    assert [p.mesh for p in placements(config, 1)] == ["1x1"] * len(list(placements(config, 1)))


@pytest.mark.parametrize("job", JOBS)
def test_every_job_has_a_plan(job):
    made = plan(tiny_config(), job=job, target="v5e:2x2", work=SMALL, dtype="float32")
    assert made.placement.devices == 4
    assert made.peak <= made.memory
    for program in made.programs:
        assert program.operations > 0
        assert program.bytes_moved > 0
        assert program.calls >= 1
        assert program.peak >= program.parameters + program.arguments
    assert made.bound in ("compute", "memory", "network")
    assert made.seconds.total > 0
    assert made.compilations == len(made.programs)
    assert json.loads(json.dumps(made.as_dict()))["job"] == job
    with pytest.raises(dataclasses.FrozenInstanceError):
        made.job = "edit"


def test_operations_are_those_of_the_model():
    """A forward pass: two for each weight and token, and attention's."""
    config = tiny_config(num_layers=8)
    made = plan(config, job="responses", target="cpu", work=Work(prompts=64, tokens=32))
    per_layer = sum(
        math.prod(p.layer_shape) for p in list_parameters(config) if p.path[-1] == "kernel"
    ) - math.prod((config.hidden_size, config.vocab_size))
    tokens = 64 * 32
    attention = 4 * 32 * config.query_width
    # The mean over tokens is a product too.
    means = 2 * (2 * config.intermediate_size + config.hidden_size)
    expected = tokens * config.num_layers * (2 * per_layer + attention + means)
    # The last position's logits are not needed.
    assert made.programs[0].operations == pytest.approx(expected, rel=0.01)


def test_more_prompts_take_longer_and_no_more_memory():
    few = plan("7B", target="h100:8", work=Work(prompts=3200, tokens=128))
    many = plan("7B", target="h100:8", work=Work(prompts=32000, tokens=128))
    assert many.seconds.total == pytest.approx(10 * few.seconds.total, rel=0.1)
    assert many.peak == pytest.approx(few.peak, rel=0.3)
    assert many.disk == 10 * few.disk


def test_what_fits_nowhere_says_by_how_much_and_on_what_it_would():
    with pytest.raises(ConfigError) as raised:
        plan("70B", job="responses", target="h100:1")
    text = str(raised.value)
    assert "does not fit for responses on h100:1" in text
    assert "of which parameters 138.0 GB" in text
    assert "GB too much; it would on h100:" in text
    assert "v5p:2x2x1" in text


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"model": "9B"}, SourceError, "no shape '9B'; did you mean"),
        ({"job": "locat"}, ConfigError, "unknown job 'locat'; did you mean 'locate'"),
        ({"target": "v5e:9x9"}, ConfigError, "no topology '9x9'"),
        ({"dtype": "float8"}, ConfigError, "unknown dtype 'float8'"),
        ({"work": Work(tokens=5000)}, ConfigError, "the model's context holds 4096"),
    ],
)
@pytest.mark.usefixtures("as_users_call")
def test_bad_input(options, error, message):
    options = {"model": "7B", "target": "h100:8", **options}
    with pytest.raises(error, match=message):
        plan(options.pop("model"), **options)


@pytest.mark.parametrize("field", ["prompts", "tokens", "answers", "steps", "sets", "generated"])
def test_work_is_checked_when_it_is_made(field):
    with pytest.raises(ConfigError, match=f"{field} must be at least 1"):
        Work(**{field: 0})


def test_a_model_is_read_by_its_headers(tmp_path):
    from support.fixtures import write_lm

    path = write_lm(tmp_path / "lm")
    for file in path.glob("*.safetensors"):
        file.unlink()
    shape = read_shape(path)
    assert shape.config == read_shape(path / "config.json").config
    assert jn.scale.plan(path, target="cpu", work=SMALL).parameters == count_parameters(
        shape.config
    )
    (path / "other.json").write_text("{}")
    with pytest.raises(SourceError, match=r"must be called config\.json"):
        read_shape(path / "other.json")


def test_the_command_shows_a_table_in_80_columns(run, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    options = ("--target", "v5e:16x16", "--job", "responses", "--dtype", "bfloat16")
    code, out, err = run("plan", "--model", "70B", *options)
    assert (code, err) == (0, "")
    for text in ("v5e:16x16 (256 devices)", "parameters", "collectives", "waits for", "disk"):
        assert text in out
    assert max(map(len, out.splitlines())) <= 80


def test_the_command_prints_json(run):
    options = ("--target", "cpu", "--job", "responses", "--tokens", "16", "--json")
    code, out, _ = run("plan", "--model", "lab", *options)
    values = json.loads(out)
    assert code == 0
    assert values["placement"] == {"data": 1, "model": 1, "preset": "data"}
    assert values["programs"][0]["name"] == "mean_responses"
    assert values["work"]["tokens"] == 16
    assert jax.devices()[0].platform == "cpu"


def test_the_command_says_what_is_wrong_in_a_line(run):
    code, _, err = run("plan", "--model", "7B", "--target", "v5e:3x4")
    assert code == 1
    assert err.startswith("error: target 'v5e:3x4': v5e has no topology '3x4'")
