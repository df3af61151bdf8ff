"""Targets as they are written, and what is refused, with the way out."""

import pytest

from jaxneurons.errors import ConfigError
from jaxneurons.scale.targets import DEVICES, GIB, parse_target


@pytest.mark.parametrize(
    ("text", "count", "topology"),
    [
        ("h100", 1, ()),
        ("h100:8", 8, ()),
        ("H200:4", 4, ()),
        ("v5e:1x1", 1, (1, 1)),
        ("v5e:16x16", 256, (16, 16)),
        ("v6e:8x8", 64, (8, 8)),
        ("v5p:4x4x4", 64, (4, 4, 4)),
        ("v4:2x2x1", 4, (2, 2, 1)),
        ("cpu:8", 8, ()),
    ],
)
def test_targets(text, count, topology):
    target = parse_target(text)
    assert (target.count, target.topology, target.name) == (count, topology, text)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("h10:8", "unknown target 'h10:8'; did you mean .*'h100'"),
        ("v5:4x4", "did you mean .*'v5e'"),
        ("abacus", "known: 'here', 'cpu'"),
        ("v5e:16x17", "no topology '16x17'.*did you mean '16x16'"),
        ("v5e:4x4x4", "of 2 axes; did you mean"),
        ("v5p:4x4", "of 3 axes"),
        ("v5e", "needs a topology: v5e:4x4"),
        ("v5e:0x0", "no topology"),
        ("h100:0", "a number of devices"),
        ("h100:x", "a number of devices"),
        ("h100:64", "8 of h100 are joined"),
    ],
)
def test_what_is_no_target_says_what_is(text, message):
    with pytest.raises(ConfigError, match=message):
        parse_target(text)


def test_virtual_devices_share_the_machine():
    one, four = parse_target("cpu").device, parse_target("cpu:4").device
    assert four.memory == one.memory // 4
    assert four.peak == pytest.approx(one.peak / 4)


def test_this_machine_is_what_jax_has():
    import jax

    target = parse_target("here")
    assert target.count == len(jax.devices())
    assert target.device.platform == jax.default_backend()


def test_stated_figures_are_of_the_right_size():
    for device in DEVICES.values():
        assert 1e14 < device.peak < 2e15
        assert 15 * GIB < device.memory < 200 * GIB
        assert 100 < device.peak / device.bandwidth < 1000  # operations a byte
