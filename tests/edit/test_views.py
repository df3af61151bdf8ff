"""What is shown of edits, and what of it is a warning."""

import numpy as np
from support.tiny_edits import REQUESTS

from jaxneurons.edit import FineTune, LearnedNeurons, Trace, apply
from jaxneurons.edit.answer_probabilities import answer_probabilities
from jaxneurons.edit.method import Edit
from jaxneurons.edit.views import show_edit
from jaxneurons.neurons.sets import NeuronSet


def shown(capsys, probability, reached, steps, settings):
    loss = np.full((len(steps), 4), np.nan)
    loss[np.arange(len(steps)), steps] = -np.log(probability)
    trace = Trace(loss, np.array(probability), np.array(steps), np.array(reached))
    show_edit(REQUESTS[: len(steps)], Edit((), settings, trace, {}, {}))
    out, err = capsys.readouterr()
    return " ".join(out.split()), " ".join(err.split())


def test_a_probable_answer_above_the_stop_loss_is_no_warning(capsys):
    settings = LearnedNeurons(NeuronSet.of(up=[(0, 1)]), stop=0.02)
    out, err = shown(capsys, [0.935, 0.99], [False, True], [3, 2], settings)
    assert "(stop loss 0.02)" in out
    assert "P(new) loss steps below stop" in out
    assert "0.935 0.067 3 no" in out
    assert "0.990 0.010 2 yes" in out
    assert "1 of 2 optimisations ended above the stop loss of 0.02" in out
    assert "what the model says already" not in out
    assert err == ""


def test_an_improbable_answer_is_a_warning(capsys):
    out, err = shown(capsys, [0.499, 0.51], [True, True], [3, 1], FineTune())
    assert "1 of 2 new answers have a probability below 0.5" in err
    assert "ended above" not in out


def test_an_answer_that_was_there(capsys):
    out, err = shown(capsys, [0.99, 0.99], [True, True], [0, 1], FineTune())
    assert "1 of 2 new answers are what the model says already" in out
    assert err == ""


def test_answers_after_an_edit_are_scored(tiny_lm, edited_loss):
    rng = np.random.default_rng(0)
    from jaxneurons.edit import LowRank

    width, hidden = tiny_lm.config.intermediate_size, tiny_lm.config.hidden_size
    left, right = (rng.normal(size=s).astype("float32") for s in ((width, 1), (1, hidden)))
    edit = Edit((LowRank("ffn.down", 1, left, right),), FineTune(), None, {}, {})
    shared = {"config": tiny_lm.config, "tokenizer": tiny_lm.tokenizer}
    requests = [REQUESTS[n % 3] for n in range(17)]  # of more than a batch
    got = answer_probabilities(tiny_lm.params, requests, edit.changes, **shared)
    want = [np.exp(-edited_loss(edit, request)[1]) for request in REQUESTS]
    np.testing.assert_allclose(got, [want[n % 3] for n in range(17)], rtol=2e-3)
    before = answer_probabilities(tiny_lm.params, REQUESTS, **shared)
    assert not np.allclose(before, got[:3], rtol=0.05)
    params = apply(tiny_lm.params, edit.changes, config=tiny_lm.config)
    np.testing.assert_allclose(answer_probabilities(params, REQUESTS, **shared), got[:3], rtol=1e-3)
