"""Knowledge-neuron surgery, against its equation in NumPy."""

import dataclasses

import numpy as np
import pytest
from support.tiny_edits import REQUESTS, assert_unchanged, layer_kernels

from jaxneurons.edit import KnowledgeNeurons
from jaxneurons.edit.encoding import encode_request
from jaxneurons.edit.knowledge_neurons import operate, operate_each
from jaxneurons.errors import ConfigError, DataError
from jaxneurons.neurons import NeuronSet

SETS = (
    NeuronSet.of(act=[(1, 3), (1, 60), (2, 0)]),
    NeuronSet.of(up=[(1, 3), (0, 7)], gate=[(0, 7), (2, 5)]),
    NeuronSet.of(gate=[(1, 60)]),
)
ROWS = ([(1, 3), (1, 60), (2, 0)], [(1, 3), (0, 7), (2, 5)], [(1, 60)])
DOWN = ("layers", "ffn", "down", "kernel")


def by_hand(lm, cases, settings):
    """The down kernels after surgery: (request, rows) one after the other, all from the base."""
    before = layer_kernels(lm.params).astype(np.float64)
    embedding = np.asarray(lm.params["embed"]["embedding"], np.float64)
    after = before.copy()
    for request, rows in cases:
        ids = encode_request(lm.tokenizer, request, config=lm.config)
        old, new = embedding[ids.ground_truth[0]], embedding[ids.target[0]]
        for layer, index in rows:
            of_old = of_new = 1.0
            if settings.unit == "row":
                norm = np.sqrt((before[layer, index] ** 2).sum())
                of_old = norm / np.sqrt((old**2).sum())
                of_new = norm / np.sqrt((new**2).sum())
            after[layer, index] -= settings.old * of_old * old
            after[layer, index] += settings.new * of_new * new
    return after


@pytest.mark.parametrize("unit", ["row", "embedding"])
def test_each_as_the_equation_says(tiny_lm, unit):
    settings = KnowledgeNeurons(SETS, old=1.5, new=4.0, unit=unit)
    edits = operate_each(
        tiny_lm.params,
        REQUESTS,
        config=tiny_lm.config,
        tokenizer=tiny_lm.tokenizer,
        settings=settings,
    )
    for number, edit in enumerate(edits):
        edited = assert_unchanged(tiny_lm, edit, except_for=DOWN)
        theirs = by_hand(tiny_lm, [(REQUESTS[number], ROWS[number])], settings)
        np.testing.assert_allclose(layer_kernels(edited), theirs, rtol=1e-5, atol=1e-5)
        touched = set(ROWS[number])
        for layer, index in np.ndindex(theirs.shape[:2]):
            same = np.array_equal(
                layer_kernels(edited)[layer, index], layer_kernels(tiny_lm.params)[layer, index]
            )
            assert same != ((layer, index) in touched)
        assert edit.trace is None
        assert edit.settings == dataclasses.replace(settings, neurons=SETS[number])
        assert edit.facts["rows"] == len(touched)


def test_together_is_the_sum_on_the_rows_as_they_were(tiny_lm):
    settings = KnowledgeNeurons(SETS)
    assert (settings.old, settings.new) == (1, 8)
    edit = operate(
        tiny_lm.params,
        REQUESTS,
        config=tiny_lm.config,
        tokenizer=tiny_lm.tokenizer,
        settings=settings,
    )
    edited = assert_unchanged(tiny_lm, edit, except_for=DOWN)
    theirs = by_hand(tiny_lm, list(zip(REQUESTS, ROWS, strict=True)), settings)
    np.testing.assert_allclose(layer_kernels(edited), theirs, rtol=1e-5, atol=1e-5)
    assert edit.facts == {"layers": [0, 1, 2], "rows": 5}
    backwards = operate(
        tiny_lm.params,
        REQUESTS[::-1],
        config=tiny_lm.config,
        tokenizer=tiny_lm.tokenizer,
        settings=dataclasses.replace(settings, neurons=SETS[::-1]),
    )
    again = assert_unchanged(tiny_lm, backwards, except_for=DOWN)
    np.testing.assert_allclose(layer_kernels(again), layer_kernels(edited), rtol=1e-5, atol=1e-5)


def test_nothing_in_nothing_out(tiny_lm):
    settings = KnowledgeNeurons(SETS[0], old=0.0, new=0.0)
    for edit in operate_each(
        tiny_lm.params,
        REQUESTS,
        config=tiny_lm.config,
        tokenizer=tiny_lm.tokenizer,
        settings=settings,
    ):
        edited = assert_unchanged(tiny_lm, edit, except_for=())
        assert edited is not tiny_lm.params


@pytest.mark.parametrize(
    ("neurons", "message"),
    [
        (NeuronSet.of(down=[(0, 3)]), "'down' have no output row"),
        (NeuronSet.of(act=[(0, 3)], q=[(0, 3)]), "'q' have no output row"),
        (NeuronSet.of(act=[(0, 64)]), "neuron 64 is not in this model"),
        (NeuronSet(), "no neurons"),
        (SETS[:2], "2 sets of neurons for 3 requests"),
    ],
)
def test_neurons_without_output_rows_are_refused(tiny_lm, neurons, message):
    for function in (operate, operate_each):
        with pytest.raises(DataError, match=message):
            function(
                tiny_lm.params,
                REQUESTS,
                config=tiny_lm.config,
                tokenizer=tiny_lm.tokenizer,
                settings=KnowledgeNeurons(neurons),
            )


def test_the_old_answer_must_be_known(tiny_lm):
    unknown = dataclasses.replace(REQUESTS[1], ground_truth="")
    for requests, message in (([*REQUESTS[:1], unknown], "request 'french'"), ([], "no requests")):
        for function in (operate, operate_each):
            with pytest.raises(DataError, match=message):
                function(
                    tiny_lm.params,
                    requests,
                    config=tiny_lm.config,
                    tokenizer=tiny_lm.tokenizer,
                    settings=KnowledgeNeurons(SETS[0]),
                )


def test_an_unknown_unit_is_refused(as_users_call):
    with pytest.raises(ConfigError, match=r"KnowledgeNeurons\.unit must be .* did you mean 'row'"):
        KnowledgeNeurons(SETS[0], unit="rows")  # type: ignore[arg-type]
