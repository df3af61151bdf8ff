"""Studies of models with every option, and with experts, against a plain loop and scikit-learn."""

import dataclasses

import pytest
from support.fixtures import write_lm
from support.known import write_relations
from support.models import tiny_config, tiny_params
from support.options import BUNDLES
from support.study_checks import check_accuracies, check_neurons

import jaxneurons
from jaxneurons.prompts.relations import read_relations
from jaxneurons.relspec import RelSpecConfig, Study

pytestmark = pytest.mark.slow

SETTINGS = RelSpecConfig(k=24, minimum=5, minimum_right=1, seeds=2, sweep_seeds=2)
SEEDS = {"phi": 3}
"""Of models that say words more often."""
EXPERTS = tiny_config(num_layers=3, experts=4, experts_per_token=2)


@pytest.fixture(scope="module")
def lm(tmp_path_factory):
    return jaxneurons.load(write_lm(tmp_path_factory.mktemp("lm") / "model"))


@pytest.mark.parametrize("name", [*BUNDLES, "experts"])
def test_a_study(lm, name, tmp_path):
    shape = BUNDLES.get(name, EXPERTS)
    if name == "phi":  # all prompts beyond the original context: a cache is not rotated again
        short = dataclasses.replace(shape.rope, original_max_position=4)
        shape = dataclasses.replace(shape, rope=short)
    config = dataclasses.replace(shape, vocab_size=lm.config.vocab_size, max_position=256)
    model = dataclasses.replace(
        lm, config=config, params=tiny_params(config, seed=SEEDS.get(name, 1))
    )
    known = write_relations(
        tmp_path / "known", model, facts=12, names=("in", "speak", "capital"), tries=36
    )
    relations = read_relations(known)
    study = Study(model, relations, settings=SETTINGS, out=tmp_path / "run")
    study.collect()
    study.write_neurons()
    rows = study.ablation().to_pylist()
    assert len(study.known) == len(relations)
    check_neurons(study)
    check_accuracies(study, rows, facts=6)
