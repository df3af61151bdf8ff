"""Tokens that are drawn: from the model's distribution, reproducibly, of those that are allowed."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.fixtures import transformers_tokenizer
from support.models import compiled, random_tokens, tiny_config, tiny_params

import jaxneurons
from jaxneurons.edit import generate_prefixes
from jaxneurons.errors import ConfigError, DataError
from jaxneurons.model.generation import NO_TOKEN, sample
from jaxneurons.model.transformer import forward

CONFIG = tiny_config(num_layers=2)
PARAMS = tiny_params(CONFIG)
LENGTHS = jnp.array([7, 4, 1])
KEY = jax.random.key(3)


def drawn(steps=4, key=KEY, lengths=LENGTHS, params=PARAMS, tokens=None, **options):
    tokens = random_tokens(CONFIG, (3, 7)) if tokens is None else tokens
    run = functools.partial(sample, config=CONFIG, steps=steps, **options)
    return np.asarray(compiled(run)(params, tokens, key, lengths=lengths))


def test_it_is_the_loop_without_a_cache():
    got = drawn()
    assert got.shape == (3, 4)
    run = compiled(functools.partial(forward, config=CONFIG))
    for row, (prompt, length) in enumerate(
        zip(random_tokens(CONFIG, (3, 7)), LENGTHS, strict=True)
    ):
        ids = prompt[: int(length)].tolist()
        for step in range(4):
            padded = jnp.array([ids + [0] * (12 - len(ids))])
            logits = run(PARAMS, padded, lengths=jnp.array([len(ids)])).logits[0, 0]
            key = jax.random.fold_in(jax.random.fold_in(KEY, step), row)
            ids.append(int(jax.random.categorical(key, logits)))
        assert got[row].tolist() == ids[-4:]


def test_tokens_come_as_often_as_the_model_says():
    prompt = random_tokens(CONFIG, (1, 3))
    rows = jnp.broadcast_to(prompt, (6000, 3))
    tokens = drawn(1, tokens=rows, lengths=jnp.full(6000, 3))[:, 0]
    logits = forward(PARAMS, prompt, config=CONFIG).logits[0, 0]
    expected = np.asarray(jax.nn.softmax(logits))
    counts = np.bincount(tokens, minlength=len(expected)) / 6000
    assert 0.05 < expected.max() < 0.95
    assert np.abs(counts - expected).max() < 4 * np.sqrt(expected.max() / 6000)


def test_only_allowed_tokens_and_the_same_key():
    allowed = jnp.arange(CONFIG.vocab_size) % 3 == 1
    tokens = drawn(6, allowed=allowed)
    assert (tokens % 3 == 1).all()
    np.testing.assert_array_equal(tokens, drawn(6, allowed=allowed))
    assert (tokens != drawn(6, allowed=allowed, key=jax.random.key(4))).any()


def test_no_token_where_logits_are_not_finite():
    broken = {**PARAMS, "final_norm": {"scale": PARAMS["final_norm"]["scale"] * jnp.inf}}
    assert (drawn(2, params=broken) == NO_TOKEN).all()


# --- texts before prompts -------------------------------------------------------------------------


def prefixes(kind, **options):
    tokenizer = transformers_tokenizer(kind)
    config = tiny_config(vocab_size=len(tokenizer) + 5, num_layers=1)
    params = options.pop("params", tiny_params(config))
    return tokenizer, generate_prefixes(params, tokenizer, config=config, **options)


@pytest.mark.parametrize("kind", ["bytes", "sentencepiece"])
def test_prefixes_begin_with_words_and_have_no_special_tokens(kind):
    tokenizer, texts = prefixes(kind, count=20, lengths=(6, 12))
    openings = ("The", "Therefore", "Because", "I", "You")
    assert len(texts) == 20
    for number, text in enumerate(texts):
        opening = openings[number // 2 % 5]
        assert text.startswith(opening) or len(tokenizer.tokenize(opening)) > (6, 12)[number % 2]
        assert not any(special in text for special in ("<s>", "</s>", "<unk>"))
        assert text == " ".join(text.split())
    assert len({*texts}) > 10
    assert prefixes(kind, count=3, lengths=(6, 12))[1] == texts[:3]
    assert prefixes(kind, count=20, lengths=(6, 12), seed=1)[1] != texts


def test_prefixes_of_a_broken_model_and_wrong_numbers():
    tokenizer = transformers_tokenizer("bytes")
    config = tiny_config(vocab_size=len(tokenizer) + 5, num_layers=1)
    broken = tiny_params(config)
    broken["final_norm"] = {"scale": broken["final_norm"]["scale"] * jnp.nan}
    with pytest.raises(DataError, match="the model's logits are not finite"):
        prefixes("bytes", params=broken)
    for wrong in ({"count": 0}, {"lengths": ()}, {"lengths": (5, 0)}):
        with pytest.raises(ConfigError, match="must be at least 1"):
            prefixes("bytes", **wrong)


def test_the_lab_model_begins_with_words_that_it_knows():
    lm = jaxneurons.load("lab")
    texts = generate_prefixes(lm.params, lm.tokenizer, config=lm.config, count=4)
    assert [text.split()[0] for text in texts] == ["The", "The", "You", "You"]
    assert [len(text.split()) for text in texts] == [5, 10, 5, 10]
