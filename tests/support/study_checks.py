"""What a study found, against a plain loop and scikit-learn."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.models import compiled

import jaxneurons
from jaxneurons.neurons.sets import FFN, read_neurons
from jaxneurons.prompts.matching import any_answers
from jaxneurons.relspec.study import Study
from jaxneurons.storage.tables import Row


def check_accuracies(study: Study, rows: list[Row], *, facts: int) -> None:
    """By a plain loop: one prompt at a time, no cache, neurons read back from their files."""
    lm = study.lm
    step = compiled(
        lambda tokens, scales: (
            jaxneurons.forward(lm.params, tokens, config=lm.config, scales=scales)
            .logits[0, 0]
            .argmax()
        )
    )

    def right(prompt, scales):
        ids = list(lm.tokenizer(prompt.text)["input_ids"])
        length = len(ids)
        (wanted,) = prompt.objects
        needed = len(lm.tokenizer(f"{prompt.text} {wanted}")["input_ids"]) - length
        for _ in range(max(2, needed + 1)):
            padded = jnp.asarray([ids], jnp.int32)
            ids.append(int(step(padded, scales)))
        text, *ended = lm.tokenizer.decode(ids[length:]).split("</s>")
        return any_answers(text, prompt.objects, ended=bool(ended))

    for off in study.known[:2]:
        neurons = read_neurons(study.out / "neurons" / f"{off}.csv")
        scales = {
            site: jnp.asarray(values)[:, None, None]
            for site, values in neurons.scales(lm.config, sites=FFN).items()
        }
        for name in study.known:
            prompts = study.prompts[name].evaluation
            (row,) = (
                r for r in rows if (r["off"], r["relation"], r["evaluation"]) == (off, name, "eva")
            )
            assert row["prompts"] == len(prompts) == facts
            assert row["right_before"] == facts  # made of what it says
            assert row["right"] == sum(right(prompt, scales) for prompt in prompts)
            assert row["drop"] == pytest.approx((facts - row["right"]) / facts)


def check_neurons(study: Study) -> None:
    """By scikit-learn: a relation's neurons are those of highest average precision."""
    from sklearn.metrics import average_precision_score

    name = study.known[1]
    prompts = [one for of_relation in study.prompts.values() for one in of_relation.validated]
    positives = np.array([one.relation == name for one in prompts])
    tokens = study.encode(prompts)
    responses = {site: [] for site in FFN}
    run = jax.jit(
        functools.partial(jaxneurons.forward, config=study.lm.config, capture=FFN, reduce="mean")
    )
    for ids in tokens:
        out = run(study.lm.params, jnp.asarray([ids], jnp.int32))
        for site in FFN:
            responses[site].append(np.asarray(out.activations[site][:, 0]))
    # Three relations of twelve are all negatives that there are.
    best = []
    for site in FFN:
        values = np.array(responses[site])
        for layer in range(values.shape[1]):
            for index in range(values.shape[2]):
                score = average_precision_score(positives, values[:, layer, index])
                best.append((score, site, layer, index))
    scores = {(site, layer, index): score for score, site, layer, index in best}
    chosen = read_neurons(study.out / "neurons" / f"{name}.csv")
    lowest = min(scores[site, *neuron] for site, neuron in chosen)
    others = [score for key, score in scores.items() if (key[0], key[1:]) not in chosen]
    assert len(chosen) == study.settings.k
    assert max(others) <= lowest + 1e-5
