"""Fields of settings are held against their annotations."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
from beartype.door import is_bearable
from hypothesis import assume, given
from hypothesis import strategies as st

from jaxneurons.engine.quadrature import Quadrature
from jaxneurons.errors import ConfigError
from jaxneurons.storage.settings import check_argument, check_fields, mismatch


@dataclasses.dataclass(frozen=True)
class Settings:
    count: int = 1
    share: float = 0.5
    either: int | float = 3
    most: int | None = None
    dtype: Literal["float32", "float16", "bfloat16"] = "float32"
    names: tuple[str, ...] = ("up",)
    pair: tuple[int, str] = (1, "a")
    flag: bool = False
    rule: Quadrature = Quadrature()
    weights: Mapping[str, float] = dataclasses.field(default_factory=dict)
    anything: Any = None

    def __post_init__(self) -> None:
        check_fields(self)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"count": True}, "Settings.count must be an integer; got True"),
        ({"count": 2.0}, "Settings.count must be an integer; got 2.0"),
        ({"count": None}, "Settings.count must be an integer; got None"),
        ({"share": "x"}, "Settings.share must be a number; got 'x'"),
        ({"share": False}, "Settings.share must be a number; got False"),
        ({"share": 10**400}, f"Settings.share must be a number; got 1{'0' * 56}..."),
        ({"either": "all"}, "Settings.either must be a number; got 'all'"),
        ({"most": "7"}, "Settings.most must be an integer or None; got '7'"),
        (
            {"dtype": "float99"},
            "Settings.dtype must be one of float32, float16, bfloat16; got 'float99'; "
            "did you mean 'float32'?",
        ),
        ({"dtype": 3}, "Settings.dtype must be one of float32, float16, bfloat16; got 3"),
        ({"dtype": "xyz"}, "Settings.dtype must be one of float32, float16, bfloat16; got 'xyz'"),
        ({"names": "up"}, "Settings.names must be a tuple of strings; got 'up'"),
        ({"names": ["up"]}, "Settings.names must be a tuple of strings; got ['up']"),
        ({"names": ("up", 3)}, "Settings.names[1] must be a string; got 3"),
        ({"pair": (1,)}, "Settings.pair must be a tuple of an integer and a string; got (1,)"),
        ({"pair": (1, 2)}, "Settings.pair[1] must be a string; got 2"),
        ({"flag": 1}, "Settings.flag must be True or False; got 1"),
        ({"rule": "gauss"}, "Settings.rule must be a Quadrature; got 'gauss'"),
        ({"weights": []}, "Settings.weights must be a mapping of strings to numbers; got []"),
        ({"weights": {"a": "b"}}, "Settings.weights['a'] must be a number; got 'b'"),
        ({"weights": {1: 2}}, "Settings.weights keys must be a string; got 1"),
    ],
)
def test_a_wrong_field_is_named_with_what_it_needs(changes, message):
    with pytest.raises(ConfigError) as raised:
        Settings(**changes)
    assert str(raised.value) == message


def test_what_is_right_is_kept_as_it_is():
    Settings()
    kept = Settings(share=1, either=0.5, most=7, names=(), weights={"a": 1}, anything=object())
    assert type(kept.share) is int
    Settings(share=np.float64(0.25), pair=(2, "b"), dtype="bfloat16")


def test_arguments():
    check_argument("top", int, 3)
    with pytest.raises(ConfigError, match=r"^top must be an integer; got '3'$"):
        check_argument("top", int, "3")
    with pytest.raises(ConfigError, match=r"^paths must be a sequence of Paths; got 'a'$"):
        check_argument("paths", Sequence[Path], "a")


KINDS = st.recursive(
    st.sampled_from(
        [int, float, str, bool, None, Literal["a", "b"], Literal[1, 2], Literal[True], Quadrature]
    ),
    lambda inner: st.one_of(
        inner.map(lambda kind: tuple[kind, ...]),
        st.tuples(inner, inner).map(lambda kinds: tuple[kinds]),
        inner.map(lambda kind: Sequence[kind]),
        inner.map(lambda kind: Mapping[str, kind]),
        inner.map(lambda kind: (kind | None) if kind is not None else None),
    ),
    max_leaves=4,
)
VALUES = st.recursive(
    st.sampled_from([None, True, False, 0, 1, 2, 10**400, 0.5, "", "a", "b", Quadrature()]),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.lists(inner, max_size=3).map(tuple),
        st.dictionaries(st.sampled_from(["a", 1]), inner, max_size=2),
    ),
    max_leaves=6,
)


def entries(value):
    yield value
    if isinstance(value, dict):
        value = [*value, *value.values()]
    for entry in value if isinstance(value, list | tuple) else ():
        yield from entries(entry)


def has(kind, wanted):
    """Whether a type is made with another."""
    return kind is wanted or any(has(inner, wanted) for inner in getattr(kind, "__args__", ()))


@given(KINDS, VALUES)
def test_beartype_agrees(kind, value):
    """Where the two mean the same: no bool for an integer, no string for a sequence of strings."""
    held = list(entries(value))
    # It tries one entry of each collection, drawn by chance.
    assume(all(not isinstance(entry, list | tuple | dict) or len(entry) < 2 for entry in held))
    assume(not (has(kind, float) and any(isinstance(entry, int) for entry in held)))
    assume(not (has(kind, int) and any(isinstance(entry, bool) for entry in held)))
    assume(not ("Sequence" in str(kind) and any(isinstance(entry, str) for entry in held)))
    assert (mismatch(kind, value) is None) == is_bearable(value, kind)


@given(KINDS, VALUES)
def test_messages_are_one_line(kind, value):
    message = ""
    try:
        check_argument("x", kind, value)
    except ConfigError as error:
        message = str(error)
    assert (message == "") == (mismatch(kind, value) is None)
    assert message[:1] in ("", "x")
    assert len(message.splitlines()) < 2
