"""A tokenizer may be longer than its model; an id beyond the embedding is named in use."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.fixtures import cloze, write_lm, write_queries

from jaxneurons import DataError, forward, integrated_gradients, load
from jaxneurons.engine.ablation import ablated
from jaxneurons.engine.responses import ResponseStore
from jaxneurons.model.token_ids import check_ids
from jaxneurons.neurons.sets import NeuronSet
from jaxneurons.prompts.queries import read_queries
from jaxneurons.qrnca.locating import locate


@pytest.fixture(scope="module")
def lm(tmp_path_factory):
    """A model whose tokenizer has four more tokens than its embedding rows, as CodeLlama-34b."""
    directory = write_lm(tmp_path_factory.mktemp("longer") / "model")
    size = load(directory).config.vocab_size
    from tokenizers import Tokenizer

    path = str(directory / "tokenizer.json")
    tokenizer = Tokenizer.from_file(path)
    tokenizer.add_special_tokens(["<PRE>", "<MID>", "<SUF>", "<EOT>"])
    tokenizer.save(path)
    loaded = load(directory)
    assert len(loaded.tokenizer) == size + 4
    return loaded


def test_a_longer_tokenizer_is_no_reason_to_refuse_a_model(lm):
    ids = lm.tokenizer("The cat")["input_ids"]
    check_ids(ids, lm.config.vocab_size, lm.tokenizer)
    logits = forward(lm.params, jnp.array([ids]), config=lm.config).logits
    assert bool(jnp.isfinite(logits).all())


def test_the_token_its_id_and_the_size_are_named(lm):
    size = lm.config.vocab_size
    ids = lm.tokenizer("a<SUF>")["input_ids"]
    message = rf"'<SUF>' has the id {size + 2}, but the model's vocabulary has {size} tokens"
    with pytest.raises(DataError, match=message):
        check_ids(ids, size, lm.tokenizer)
    check_ids([], size)
    check_ids([size - 1, 0], size)
    with pytest.raises(DataError, match=f"the token has the id {size}, "):
        check_ids(np.array([[0, 1], [2, size]]), size)
    with pytest.raises(DataError, match="the token has the id -1, "):
        check_ids([-1], size, lm.tokenizer)


def test_every_door_that_takes_ids_checks_them(lm, tmp_path):
    size = lm.config.vocab_size
    beyond, fine = jnp.array([[1, size]]), jnp.array([[1, 2]])
    message = f"has the id {size}, but"
    with pytest.raises(DataError, match=message):
        forward(lm.params, beyond, config=lm.config)
    with pytest.raises(DataError, match=message):
        integrated_gradients(lm.params, beyond, jnp.array([1]), config=lm.config)
    with pytest.raises(DataError, match=message):
        integrated_gradients(lm.params, fine, jnp.array([size]), config=lm.config)
    with pytest.raises(DataError, match=message):
        next(ablated(lm.params, [NeuronSet()], [[1], [1, size]], config=lm.config))
    with pytest.raises(DataError, match=message):
        ResponseStore(tmp_path / "r", [[1], [size]], config=lm.config, identity={})


def test_inside_jit_nothing_is_checked(lm):
    def run(tokens):
        check_ids(tokens, lm.config.vocab_size)
        return tokens.sum()

    assert int(jax.jit(run)(jnp.array([lm.config.vocab_size]))) == lm.config.vocab_size


@pytest.mark.parametrize("where", ["prompts", "answer"])
def test_queries_are_checked_before_anything_runs(lm, tmp_path, where):
    records = cloze(4)
    records[2][where] = ["The <SUF> is", "A <SUF> is"] if where == "prompts" else "<SUF>"
    queries = read_queries(write_queries(tmp_path / "q.json", records))
    with pytest.raises(DataError, match=r"query 'fact-2', prompt 1: .*'<SUF>' has the id"):
        locate(lm, queries, out=tmp_path / "run")
    assert not (tmp_path / "run").exists()
