"""Values of the kinds that are asked for, or an error that says where."""

import dataclasses
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxneurons.engine.quadrature import Quadrature
from jaxneurons.errors import DataError
from jaxneurons.prompts.queries import Query
from jaxneurons.qrnca.method import QRNCAConfig
from jaxneurons.relspec.method import RelSpecConfig
from jaxneurons.storage.typed_json import typed

VALUES = [
    QRNCAConfig(),
    QRNCAConfig.reference(top=3, site="down"),
    QRNCAConfig(quadrature=Quadrature("adaptive", tolerance=0.5)),
    RelSpecConfig(k=30, sites=("up",), detection=7),
    RelSpecConfig(templates=("a", "b")),
    Query("a", "g", ("p", "q"), ("x", "y"), (("A", "B"), ())),
]


@pytest.mark.parametrize("value", VALUES, ids=lambda value: type(value).__name__)
def test_dataclasses_read_back(value):
    written = json.loads(json.dumps(dataclasses.asdict(value)))
    assert typed(type(value), written, "f") == value


def places(value, path=()):
    yield path
    for key, inner in value.items() if isinstance(value, dict) else ():
        yield from places(inner, (*path, key))


ODD = [None, True, -1, 0, 1.5, float("nan"), 10**400, "x", "", [], {}, [1], [None], {"a": 1}]


@pytest.mark.parametrize("value", VALUES, ids=lambda value: type(value).__name__)
def test_every_value_replaced_or_missing(value):
    """Only our error, with the place; or a value of the same types."""
    text = json.dumps(dataclasses.asdict(value))
    refused = 0
    for path in places(json.loads(text)):
        for odd in [*ODD, KeyError]:
            changed = json.loads(text)
            if path:
                *most, last = path
                where = changed
                for key in most:
                    where = where[key]
                where[last] = odd
                if odd is KeyError:
                    del where[last]
            else:
                changed = None if odd is KeyError else odd
            try:
                found = typed(type(value), changed, "f")
            except DataError as error:
                said = str(error)
                refused += 1
                assert said.startswith("f: ")
                assert odd is KeyError or not path or path[-1] in said
            else:
                assert type(found) is type(value)
    assert refused > 50


def test_dicts_and_messages():
    kind = {"model": {"source": str}, "mass": float | None, "count": int}
    good = {"model": {"source": "x", "more": 1}, "mass": None, "count": 3, "more": []}
    want = {"model": {"source": "x"}, "mass": None, "count": 3}
    assert typed(kind, good, "f") == want
    assert isinstance(typed(kind, {**good, "mass": 1}, "f")["mass"], float)
    with pytest.raises(DataError, match="f: mass: 1000"):
        typed(kind, {**good, "mass": 10**400}, "f")
    for changes, message in (
        ({"model": {}}, "f: model: no source"),
        ({"model": 3}, "f: model: 3 where an object is needed"),
        ({"model": {"source": None}}, "f: model: source: None where str is needed"),
        ({"count": True}, "f: count: True where int is needed"),
        ({"count": 1.0}, "f: count: 1.0 where int is needed"),
        ({"mass": "x"}, r"f: mass: 'x' where float \| None is needed"),
    ):
        with pytest.raises(DataError, match=message):
            typed(kind, {**good, **changes}, "f")
    written = dataclasses.asdict(Quadrature())
    with pytest.raises(DataError, match="f: unknown key 'depth'"):
        typed(Quadrature, {**written, "depth": 1}, "f")
    with pytest.raises(DataError, match=r"f: .*'righ'.*did you mean 'right'"):
        typed(Quadrature, {**written, "rule": "righ"}, "f")
    with pytest.raises(DataError, match="f: no group or prompts or answers or options"):
        typed(Query, {"id": "a"}, "f")


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner),
    max_leaves=8,
)


@given(JSON, st.sampled_from([QRNCAConfig, RelSpecConfig, Query, {"a": int}, tuple[str, ...]]))
def test_any_json(value, kind):
    try:
        read = typed(kind, value, "f")
    except DataError as error:
        message = str(error)
        message.encode("utf-8", "surrogatepass")
        assert message.startswith(("f: ", "f["))
    else:
        assert isinstance(read, kind if isinstance(kind, type) else tuple | dict)
