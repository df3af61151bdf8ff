"""From Python a wrong argument is the library's own error, at once, and says what is needed."""

from types import SimpleNamespace

import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import jaxneurons
from jaxneurons import checkpoints, convert, lab, prompts
from jaxneurons.errors import ConfigError, JaxneuronsError
from jaxneurons.prompts.batches import by_length
from jaxneurons.prompts.relations import split
from jaxneurons.storage.settings import as_path

NOT_PATHS = [None, 3, 2.5, True, ["a"], b"a", object(), np.zeros(2), "", " ", "a\0b"]
PATHS = [
    prompts.read_queries,
    prompts.read_questions,
    prompts.read_relation,
    prompts.read_relations,
    prompts.read_counts,
    lab.bundled_queries,
    convert.open_gguf,
    convert.read_gguf,
    convert.read_hf,
    convert.read_config,
    convert.read_native,
    convert.open_safetensors,
    convert.tokenizer_from_directory,
    checkpoints.load,
    checkpoints.describe,
    checkpoints.locate_source,
]


@pytest.fixture(autouse=True)
def as_users_have_it(monkeypatch):
    """In tests types are checked before a function is called: not here."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)


@pytest.mark.parametrize("function", PATHS, ids=lambda function: function.__name__)
@pytest.mark.parametrize("value", NOT_PATHS, ids=lambda value: type(value).__name__)
def test_what_is_no_path(function, value):
    with pytest.raises(JaxneuronsError) as raised:
        function(value)
    assert len(str(raised.value).splitlines()) == 1


RELATION = prompts.Relation("r", (prompts.Triple("a", "b"), prompts.Triple("c", "d")), {})
QUESTIONS = [prompts.Question("1", "What?", "this"), prompts.Question("2", "Which?", "that")]
PROMPTS = [prompts.TokenPrompt((1, 2), (3,))]
LM = SimpleNamespace(params={}, config=None)  # looks like one


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: jaxneurons.load("lab", dtype="float99"), "unknown dtype 'float99'"),
        (lambda: jaxneurons.load("lab", dtype=3), "unknown dtype 3"),
        (lambda: jaxneurons.load("lab", dtype={"a": 1}), "unknown dtype"),
        (lambda: jaxneurons.load("lab", dtype=jnp.int8), "cannot have dtype int8"),
        (
            lambda: jaxneurons.load("lab", mesh=[2, 4]),
            "mesh must be a Mesh or a string or a",
        ),
        (
            lambda: jaxneurons.load("lab", rules={}),
            "rules must be ShardingRules or a preset",
        ),
        (lambda: jaxneurons.load("lab", progress=3), "progress must be a function or None"),
        (lambda: jaxneurons.load("lab", revision=1), "revision must be a string or None"),
        (lambda: jaxneurons.load("lab", ignore_keys=[1]), "ignore_keys.0. must be a string"),
        (
            lambda: jaxneurons.load("lab", ignore_keys=None),
            "ignore_keys must be a collection",
        ),
        (lambda: checkpoints.describe("lab", ignore_keys="a"), "is a sequence of names"),
        (lambda: jaxneurons.save(LM, "x"), "lm must be an LM; got"),
        (lambda: checkpoints.verify(LM, "x"), "lm must be an LM; got"),
        (lambda: prompts.plan(PROMPTS, "8"), "batch size must be an integer; got '8'"),
        (lambda: prompts.plan(PROMPTS, 0), "batch size must be at least 1, got 0"),
        (lambda: prompts.plan(["a b"]), r"prompts\[0\] must be a TokenPrompt; got 'a b'"),
        (lambda: by_length([[1]], 2.0), "batch size must be an integer; got 2.0"),
        (lambda: split(RELATION, evaluation=0), "evaluation must be at least 1, got 0"),
        (lambda: split(RELATION, seed=-1), "seed must be at least 0, got -1"),
        (lambda: split(3), "relation must be a Relation; got 3"),
        (lambda: prompts.multi_choice(["a"]), r"questions\[0\] must be a Question; got 'a'"),
        (lambda: prompts.multi_choice(QUESTIONS, options="4"), "options must be an integer"),
        (lambda: prompts.multi_choice(QUESTIONS, seed=-1), "seed must be at least 0"),
        (lambda: prompts.free_form(QUESTIONS, wordings=1.0), "wordings must be an integer"),
        (lambda: prompts.parse_queries("x", []), "records must be a Mapping; got"),
        (lambda: prompts.encode_prompt(None, 3), "the prompt must be a string; got 3"),
        (lambda: convert.config_from_hf([], where="x"), r"config must be a dict; got \[\]"),
    ],
)
def test_other_arguments(call, message):
    with pytest.raises(ConfigError, match=message):
        call()


@given(st.one_of(st.none(), st.integers(), st.text(), st.binary(), st.lists(st.text())))
def test_a_path_or_our_error(value):
    try:
        path = as_path("path", value)
    except ConfigError:
        return
    assert isinstance(value, str)
    assert str(path)
