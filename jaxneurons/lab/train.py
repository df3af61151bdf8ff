"""Train the lab model from scratch: `python -m jaxneurons.lab.train OUT`.

A small Llama, AdamW with a cosine schedule, answers only. Everything follows from the seeds; how
long it took and what came out are written into the model card.
"""

import argparse
import dataclasses
import functools
import json
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxneurons.checkpoints.saving import check_free, published
from jaxneurons.convert.export import write_hf
from jaxneurons.lab import world
from jaxneurons.lab.corpus import Corpus, Rows, tokenizer, vocabulary
from jaxneurons.model.config import ModelConfig
from jaxneurons.model.parameters import Params
from jaxneurons.model.transformer import Transformer, forward
from jaxneurons.prompts.answers import encode_query
from jaxneurons.prompts.queries import Query, parse_queries
from jaxneurons.storage.store import write_json, write_json_lines, write_text
from jaxneurons.storage.tables import read_json

STEPS = 1000
BEGINNING = 300
"""The first so many steps ask nothing but questions that answer themselves."""
TOLD, ASKED = 96, 64
"""Rows of each kind in a step."""
PEAK_RATE = 1.5e-3


def lab_config(vocab: int) -> ModelConfig:
    """The lab model's shape."""
    return ModelConfig(
        vocab_size=vocab,
        hidden_size=192,
        intermediate_size=512,
        num_layers=6,
        num_heads=6,
        num_kv_heads=6,
        head_dim=32,
        max_position=128,
    )


def first_parameters(config: ModelConfig, seed: int) -> Any:
    """Where training starts: words are far apart, layers add little, equal words attend to another.

    Keys start as queries. From the usual random start, to find the option that is the answer takes
    ten times as many steps to learn.
    """
    params = Transformer(config).init(jax.random.key(seed), jnp.zeros((1, 2), jnp.int32))["params"]
    layers = dict(params["layers"])
    attn, ffn = dict(layers["attn"]), dict(layers["ffn"])
    attn["k"] = jax.tree.map(jnp.array, attn["q"])
    attn["o"] = jax.tree.map(lambda kernel: 0.3 * kernel, attn["o"])
    ffn["down"] = jax.tree.map(lambda kernel: 0.3 * kernel, ffn["down"])
    return {
        **params,
        "embed": jax.tree.map(lambda words: words / words.std(), params["embed"]),
        "unembed": jax.tree.map(lambda kernel: 0.3 * kernel, params["unembed"]),
        "layers": {**layers, "attn": attn, "ffn": ffn},
    }


def loss(params: Params, rows: Rows, config: ModelConfig) -> tuple[jax.Array, jax.Array]:
    """Mean over rows of the weighted cross entropy, and of the answers' alone, in nats."""
    tokens, lengths, at, targets, weights = map(jnp.asarray, rows)
    logits = forward(params, tokens, config=config, lengths=lengths, at=at).logits
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, targets) * weights
    return losses.sum(1).mean(), losses[:, 0].mean()


class Losses(NamedTuple):
    """How training stands: mean cross entropy of the answers of each kind of row, in nats."""

    step: int
    told: float
    asked: float


def train(
    facts: Sequence[world.Fact],
    vocab: dict[str, int],
    *,
    steps: int = STEPS,
    seed: int = 0,
    config: ModelConfig | None = None,
    report: Callable[[Losses], None] | None = None,
) -> tuple[ModelConfig, Params]:
    """Parameters of a model that was told the facts, float32; the same seed gives the same ones.

    Args:
      facts: of the world.
      vocab: ids of the words.
      steps: of the optimiser.
      seed: of the first parameters and of the order of everything read.
      config: the model's shape; default: the lab's.
      report: called every hundred steps with the losses.
    """
    config = lab_config(len(vocab)) if config is None else config
    corpus = Corpus(facts, vocab, seed)
    params = first_parameters(config, seed)
    schedule = optax.warmup_cosine_decay_schedule(
        0.0, PEAK_RATE, max(1, min(150, steps // 10)), steps, PEAK_RATE / 50
    )
    optimiser = optax.chain(
        optax.clip_by_global_norm(1.0), optax.adamw(schedule, b2=0.98, weight_decay=0.02)
    )
    state = optimiser.init(params)

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params: Params, state: Any, told: Rows, asked: Rows) -> Any:
        def total(params: Params) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
            of_texts, of_questions = loss(params, told, config), loss(params, asked, config)
            return of_texts[0] + of_questions[0], (of_texts[1], of_questions[1])

        (_, losses), gradient = jax.value_and_grad(total, has_aux=True)(params)
        with jax.numpy_dtype_promotion("standard"):  # optax multiplies floats with its step count
            updates, state = optimiser.update(gradient, state, params)
        return optax.apply_updates(params, updates), state, losses

    for number in range(steps):
        questions = corpus.echoes if number < BEGINNING else corpus.asked
        params, state, losses = step(params, state, corpus.told(TOLD), questions(ASKED))
        if report is not None and (number % 100 == 0 or number == steps - 1):
            report(Losses(number, float(losses[0]), float(losses[1])))
    return config, params


def accuracy(params: Params, config: ModelConfig, tok: Any, queries: Sequence[Query]) -> np.ndarray:
    """Whether the answer is the most probable token, [query, wording]."""
    prompts = [
        encode_query(tok, text, answer)
        for query in queries
        for text, answer in zip(query.prompts, query.answers, strict=True)
    ]
    length = max(len(prompt.prompt) for prompt in prompts)
    run = jax.jit(lambda t, n: forward(params, t, config=config, lengths=n).logits[:, 0].argmax(-1))
    says = []
    for start in range(0, len(prompts), 64):
        part = prompts[start : start + 64]
        tokens = np.zeros((64, length), np.int32)
        lengths = np.ones(64, np.int32)
        for row, prompt in enumerate(part):
            tokens[row, : len(prompt.prompt)] = prompt.prompt
            lengths[row] = len(prompt.prompt)
        says += np.asarray(run(tokens, lengths))[: len(part)].tolist()
    right = [token == prompt.answer[0] for token, prompt in zip(says, prompts, strict=True)]
    return np.array(right).reshape(len(queries), -1)


def examine(
    params: Params, config: ModelConfig, tok: Any, facts: Sequence[world.Fact]
) -> dict[str, float]:
    """Share of right answers, by kind of fact, form and language.

    Choice: wordings and orders that training never showed, four options, chance 0.25.
    """
    kinds = {
        "told and asked": [fact for fact in facts if fact.asked],
        "told, never asked": [fact for fact in facts if fact.told and not fact.asked],
        "never told": [fact for fact in facts if not fact.told],
    }
    shares = {}
    for kind, chosen in kinds.items():
        for language in ("en", world.VALDIC):
            known = [fact for fact in chosen if language == "en" or fact.translation]
            right = accuracy(params, config, tok, world.cloze(known, language))
            shares[f"{kind}, cloze, {language}"] = float(right[:, :2].mean())
            shares[f"{kind}, cloze, new wording, {language}"] = float(right[:, 2].mean())
            queries = parse_queries("lab", world.choice(known, language))
            shares[f"{kind}, choice, {language}"] = float(
                accuracy(params, config, tok, queries).mean()
            )
    return {name: round(value, 4) for name, value in shares.items()}


def write(
    out: Path,
    config: ModelConfig,
    params: Params,
    vocab: dict[str, int],
    card: dict[str, Any],
    facts: Sequence[world.Fact],
) -> None:
    """Model, tokenizer, facts and card as a directory that `load` (and transformers) reads."""
    check_free(out)
    stored = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params)
    with published(out) as directory:
        tok = tokenizer(vocab)
        tok.save_pretrained(str(directory))
        # Its name in transformers 4 and 5 alike.
        settings = read_json(directory / "tokenizer_config.json")
        settings["tokenizer_class"] = "PreTrainedTokenizerFast"
        write_json(directory / "tokenizer_config.json", settings)
        ids = {"bos_token_id": tok.bos_token_id, "eos_token_id": tok.eos_token_id}
        write_hf(directory, stored, config=config, original=ids)
        write_json(directory / "card.json", card)
        write_json_lines(directory / "facts.jsonl", map(dataclasses.asdict, facts))
        write_text(directory / "README.md", _card(config, card))


def _card(config: ModelConfig, card: dict[str, Any]) -> str:
    rows = "\n".join(f"| {name} | {100 * value:.1f} % |" for name, value in card["right"].items())
    return f"""# The lab model

A Llama of {card["parameters"] / 1e6:.1f} million parameters ({config.num_layers} layers,
{config.hidden_size} wide, {config.intermediate_size} feed-forward neurons each, {config.vocab_size}
words), trained from scratch on an invented world, stored in bfloat16. Whatever it knows was put
there; a tenth of the facts it was never told.

- **Contents**: {card["facts"]} facts of six domains with three relations each, {card["told"]}
  of them told; one relation of each domain is told in a second, invented language too.
  `facts.jsonl` lists them; `jaxneurons.lab` makes the questions.
- **Made by** `python -m jaxneurons.lab.train OUT`: {card["steps"]} steps, seed {card["seed"]},
  {card["minutes"]:.0f} minutes on {card["machine"]}.
- **For** testing methods that locate knowledge, and for trying this library without a download. It
  says nothing about the real world, and single words are single tokens.

Share of right answers, first token, in bfloat16. *choice*: four options, in wordings and orders
that training never showed; chance is 25 %.

| facts, form, language | right |
|---|---|
{rows}
"""


def main() -> None:
    """Train, examine, write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--machine", default="two CPU cores")
    arguments = parser.parse_args()
    check_free(arguments.out)
    facts = world.facts()
    vocab = vocabulary(facts)
    start = time.perf_counter()

    def report(now: Losses) -> None:
        seconds = time.perf_counter() - start
        print(
            f"{now.step:5d}  told {now.told:.3f}  asked {now.asked:.3f}  {seconds:.0f} s",
            flush=True,
        )

    config, params = train(facts, vocab, steps=arguments.steps, seed=arguments.seed, report=report)
    minutes = (time.perf_counter() - start) / 60
    rounded = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16).astype(jnp.float32), params)
    right = examine(rounded, config, tokenizer(vocab), facts)
    card = {
        "facts": len(facts),
        "told": sum(fact.told for fact in facts),
        "steps": arguments.steps,
        "seed": arguments.seed,
        "minutes": minutes,
        "machine": arguments.machine,
        "parameters": sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params)),
        "right": right,
    }
    write(arguments.out, config, params, vocab, card, facts)
    print(json.dumps(right, indent=1))


if __name__ == "__main__":
    main()
