"""Whole studies of a random model on relations made of what it says."""

import csv
import dataclasses
import inspect
import io
import json
import shutil

import matplotlib.image
import numpy as np
import pytest
from support.fixtures import write_lm
from support.known import KINDS, WORDINGS, write_relations
from support.pictures import ink
from support.study_checks import check_accuracies, check_neurons

import jaxneurons
from jaxneurons.errors import ConfigError, DataError
from jaxneurons.neurons.sets import FFN, NeuronSet, read_neurons
from jaxneurons.prompts.relations import Triple, read_relations
from jaxneurons.relspec import analyses, drops, figures, stages
from jaxneurons.relspec.method import RelSpecConfig
from jaxneurons.relspec.registry import DEFAULT, SkippedWarning, choose
from jaxneurons.relspec.study import Study
from jaxneurons.storage import store
from jaxneurons.storage import tables as tables_module
from jaxneurons.storage.tables import read_tables

SETTINGS = RelSpecConfig(k=24, minimum=5, minimum_right=1, seeds=2, sweep_seeds=2)


def run_study(lm, relations, out, *, settings, names=DEFAULT, counts=None, progress=None):
    """Every stage in a directory, as `relspec run` has them."""
    study = Study(lm, relations, settings=settings, out=out, progress=progress)
    study.collect()
    study.write_neurons()
    study.analyse(names, counts=counts)
    stages.plot(out)
    return study


@pytest.fixture(scope="module")
def lm(tmp_path_factory):
    return jaxneurons.load(write_lm(tmp_path_factory.mktemp("lm") / "model"))


@pytest.fixture(scope="module")
def relations(lm, tmp_path_factory):
    return write_relations(tmp_path_factory.mktemp("relations") / "known", lm)


def counts_of(relations):
    rng = np.random.default_rng(0)
    return {
        (one.name, triple): float(rng.integers(0, 10**6))
        for one in relations
        for triple in one.triples
    }


@pytest.fixture(scope="module")
def whole(lm, relations, tmp_path_factory):
    """Every analysis, in a directory that nobody changes."""
    out = tmp_path_factory.mktemp("study") / "run"
    found = read_relations(relations)
    return run_study(
        lm,
        found,
        out,
        settings=SETTINGS,
        names=choose("all", counts=True),
        counts=counts_of(found),
    )


def tables(study):
    return read_tables(study.out / "tables")


def test_everything_is_written(whole):
    found = tables(whole)
    assert set(found) >= {
        *("relations", "templates", "ablation", "layers", "overlap", "errors", "answers"),
        *("perplexity", "languages", "concepts", "concept_validation", "sizes", "cumulativity"),
        *("types", "type_layers", "frequency", "frequency_test", "summary"),
    }
    written = {path.stem for path in (whole.out / "figures").glob("*.png")}
    drawn = {name for name, (table, _) in figures.FIGURES.items() if table in found}
    assert drawn - written <= {"robustness", "multilingual"}  # nothing is counted there
    for path in (whole.out / "figures").glob("*.png"):
        assert ink(path) > 0.005, path.name
    run = json.loads((whole.out / "run.json").read_text())
    assert run["relations"]["known"] == sorted(WORDINGS)
    assert run["neurons"] == {"k": 24, "of": 480, "sites": list(FFN)}
    assert found["cumulativity_mean"][-1]["total"] > 0
    for row in found["relations"]:
        prompts = whole.prompts[row["relation"]].detection
        assert row["steps"] == max(whole.steps(prompts)) > 2  # words of several tokens
    # "Wien" as bytes: a token for the space, or " W", and the others.
    assert {row["steps"] for row in found["languages"]} <= {5, 6}
    assert set(run["tables"]) == set(found)
    for name, rows in found.items():
        with (whole.out / "tables" / f"{name}.csv").open() as file:
            assert len(list(csv.DictReader(file))) == len(rows) > 0


def test_accuracies_against_a_plain_loop(whole):
    check_accuracies(whole, tables(whole)["ablation"], facts=12)


def test_the_neurons_are_those_of_highest_average_precision(whole):
    check_neurons(whole)


def test_tables_agree_with_each_other(whole):
    found = tables(whole)
    for name in whole.known:
        assert sum(r["neurons"] for r in found["layers"] if r["relation"] == name) == 24
        (own,) = (r for r in found["overlap"] if r["relation"] == r["other"] == name)
        assert own["shared"] == 24
        rows = [r for r in found["ablation"] if (r["relation"], r["evaluation"]) == (name, "eva")]
        (off,) = (r for r in rows if r["off"] == name)
        wrong = {
            "none": off["prompts"] - off["right_before"],
            "own": off["prompts"] - off["right"],
            "random": sum(r["prompts"] - r["right"] for r in rows if r["off"] == "random"),
        }
        for condition, count in wrong.items():
            shares = [r for r in found["errors"] if (r["relation"], r["off"]) == (name, condition)]
            assert sum(r["answers"] for r in shares) == count
            assert sum(r["share"] for r in shares) == pytest.approx(1.0 if count else 0.0)
        perplexity = {r["off"]: r for r in found["perplexity"] if r["relation"] == name}
        for row in perplexity.values():
            ratio = row["perplexity"] / perplexity["none"]["perplexity"]
            assert row["ratio"] == pytest.approx(ratio)
            assert (row["ratio"] == 1) == (row["off"] == "none")
    right = {
        r["relation"]: r["right"]
        for r in found["ablation"]
        if r["off"] == r["relation"] and r["evaluation"] == "eva"
    }
    kinds = [r["kind"] for r in found["frequency"]]
    assert kinds.count("resilient") == sum(right.values())
    assert {r["concept"] for r in found["concepts"]} == set(KINDS.values())
    for row in found["concepts"]:
        assert row["own_type"] == (KINDS[row["relation"]] == row["concept"])
    assert not any(r["known"] for r in found["languages"])  # "Wien" is never said
    ffn = [r for r in found["types"] if r["type"] == "ffn" and r["off"] != "random"]
    same = {
        (r["off"], r["relation"]): r["right"]
        for r in found["ablation"]
        if r["evaluation"] == "eva" and r["off"] not in ("random", "matched")
    }
    assert {(r["off"], r["relation"]): r["right"] for r in ffn} == same


def test_perplexity_against_pytorch(whole, tmp_path):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    model = transformers.AutoModelForCausalLM.from_pretrained(whole.lm.source, dtype=torch.float32)
    name = whole.known[0]
    objects = dict.fromkeys(t.object for t in whole.prompts[name].split.evaluation)
    loss, count = 0.0, 0
    for one in objects:
        ids = torch.tensor([whole.lm.tokenizer(f"They talk about {one}")["input_ids"]])
        with torch.no_grad():
            loss += float(model(ids, labels=ids).loss) * (ids.shape[1] - 1)
        count += ids.shape[1] - 1
    (row,) = (r for r in tables(whole)["perplexity"] if (r["relation"], r["off"]) == (name, "none"))
    assert row["tokens"] == count
    assert row["perplexity"] == pytest.approx(np.exp(loss / count), rel=1e-4)


def test_the_summary_is_what_it_says():
    def row(off, relation, drop, seed=None, counted=True):
        fixed = {"analysis": "ablation", "type": "", "k": 5, "evaluation": "eva", "language": ""}
        label = {"off": off, "relation": relation, "seed": seed}
        return {**fixed, **label, "drop": drop, "counted": counted, "right_before": 7}

    rows = [
        *(row("a", "a", 0.8), row("a", "b", 0.2), row("b", "a", 0.0), row("b", "b", 0.4)),
        *(row("random", "a", 0.1, 0), row("random", "b", 0.3, 0)),
        *(row("random", "a", 0.0, 1), row("random", "b", 0.0, 1)),
        *(
            row("a", "c", None, counted=False),
            row("c", "a", 0.5),
            row("c", "c", 1.0, counted=False),
        ),
    ]
    (found,) = drops.mean_drops(rows)
    assert (found["relations"], found["right_before"]) == (2, 14)
    assert found["diagonal"] == pytest.approx(0.6)
    assert found["off_diagonal"] == pytest.approx((0.2 + 0.0 + 0.5) / 3)
    assert found["random"] == pytest.approx(0.1)
    assert found["random_spread"] == pytest.approx(np.std([0.2, 0.0], ddof=1))
    assert found["matched"] is None


# --- in memory ------------------------------------------------------------------------------------

SOME = ("ablation", "layers", "overlap", "errors", "perplexity", "concepts")


@pytest.fixture(scope="module")
def in_memory(lm, relations):
    """A study without a directory, and how far it said that it was."""
    reports = []
    study = Study(
        lm,
        read_relations(relations),
        settings=SETTINGS,
        progress=lambda *report: reports.append(report),
    )
    return study, reports


def test_before_anything_is_computed(in_memory):
    study, reports = in_memory
    head, columns, *lines = repr(study).splitlines()
    assert head.endswith("4 relations, 24 of 480 neurons each (up, gate, down)")
    assert columns.split()[:2] == ["relation", "facts"]
    assert [line.split() for line in lines] == [[name, "24"] for name in sorted(WORDINGS)]
    assert not study.tables
    assert not study.figures()
    assert not reports


def test_in_memory_it_is_the_same_and_nothing_is_written(whole, in_memory, tmp_path, monkeypatch):
    import pyarrow as pa

    study, reports = in_memory
    monkeypatch.chdir(tmp_path)
    for module in (store, tables_module):
        monkeypatch.setattr(module, "write_bytes", None)
    on_disk = tables(whole)
    assert study.collect().to_pylist() == on_disk["relations"]
    for name in SOME:
        table = getattr(study, name)()
        assert isinstance(table, pa.Table)
        assert table.to_pylist() == on_disk[name]
    for name in ("templates", "answers", "concept_validation", "concept_ablation"):
        assert study.tables[name].to_pylist() == on_disk[name]
    for name, neurons in study.neurons().items():
        assert neurons == read_neurons(whole.out / "neurons" / f"{name}.csv")
    means = {(r["analysis"], r["evaluation"]): r for r in study.summary().to_pylist()}
    for row in on_disk["summary"]:
        if row["analysis"] == "ablation":
            assert means["ablation", row["evaluation"]] == row
    assert set(study.figures()) >= {"inter_relation", "layers", "overlap", "errors", "perplexity"}
    assert not list(tmp_path.iterdir())
    for stage in {stage for stage, *_ in reports}:
        done, total = [report[1:] for report in reports if report[0] == stage][-1]
        assert done == total > 0, stage


def test_what_a_study_shows(whole, in_memory):
    """The numbers of its tables, without and with a directory."""
    ablation = tables(whole)["ablation"]
    for study in (in_memory[0], whole):
        for line, name in zip(repr(study).splitlines()[2:], sorted(WORDINGS), strict=True):
            (row,) = (
                r
                for r in ablation
                if r["off"] == r["relation"] == name and r["evaluation"] == "eva"
            )
            lost = f"{row['drop']:.0%}"
            assert line.split() == [name, "24", "12/12", "12/12", lost, "yes"]
            cells = "".join(f"<td>{c}</td>" for c in (name, "24", "12/12", "12/12", lost, "yes"))
            assert f"<tr>{cells}</tr>" in study._repr_html_()


def test_sets_of_ones_own(whole, in_memory):
    """A relation's neurons by another name: its drops; under its own, the means' diagonal."""
    study, _ = in_memory
    neurons = study.neurons()
    rows = study.measure({"mine": neurons["speak"]}).to_pylist()
    expected = [
        {**row, "analysis": "measure", "off": "mine"}
        for row in tables(whole)["ablation"]
        if row["off"] == "speak" and row["evaluation"] == "eva"
    ]
    assert rows == expected
    (line,) = drops.mean_drops(study.measure(neurons).to_pylist())
    (same,) = (
        row
        for row in tables(whole)["summary"]
        if (row["analysis"], row["evaluation"]) == ("ablation", "eva")
    )
    for key in ("diagonal", "off_diagonal", "right_before"):
        assert line[key] == same[key]
    with pytest.raises(DataError, match="layer 99 is not in this model"):
        study.measure({"far": NeuronSet.of(up=[(99, 0)])})


def test_figures_show_themselves(in_memory):
    for figure in in_memory[0].figures().values():
        image = matplotlib.image.imread(io.BytesIO(figure._repr_png_()))
        assert image.std() > 0.05  # not one colour


def test_neurons_are_written_where_they_are_wanted(whole, in_memory, tmp_path):
    study, _ = in_memory
    with pytest.raises(ConfigError, match="no directory to write neurons to"):
        study.write_neurons()
    written = study.write_neurons(tmp_path / "neurons")
    assert [path.name for path in written] == [f"{name}.csv" for name in study.known]
    for path in written:
        assert path.read_bytes() == (whole.out / "neurons" / path.name).read_bytes()


def test_an_analysis_with_nothing_to_measure(lm, relations):
    alike = [
        dataclasses.replace(relation, translations={}, subject_type="")
        for relation in read_relations(relations)
    ]
    study = Study(lm, alike, settings=SETTINGS)
    for name in ("multilingual", "concepts"):
        with pytest.raises(DataError, match=f"{name}: these relations have nothing to measure"):
            getattr(study, name)()


def test_arguments_of_another_kind(lm, relations):
    """At once, before anything is hashed or generated."""
    make, known = inspect.unwrap(Study.__init__), read_relations(relations)
    for arguments, message in (
        ({"lm": "lab"}, "lm must be an? LM; got 'lab'"),
        ({"relations": "bundled"}, "relations must be a sequence of Relation"),
        ({"relations": [known[0], "speak"]}, r"relations\[1\] must be a Relation; got 'speak'"),
        ({"settings": {"k": 24}}, "settings must be a RelSpecConfig"),
        ({"out": 7}, "out must be"),
        ({"progress": True}, "progress must be"),
    ):
        good = {"lm": lm, "relations": known}
        with pytest.raises(ConfigError, match=message):
            make(Study.__new__(Study), **{**good, **arguments})


# --- stops and resumes ----------------------------------------------------------------------------


def contents(path):
    return {
        one.relative_to(path): one.read_bytes()
        for folder in ("tables", "neurons")
        for one in sorted((path / folder).iterdir())
    }


@pytest.mark.parametrize(
    "after", [5, *(pytest.param(after, marks=pytest.mark.slow) for after in (2, 9, 14))]
)
def test_stopped_anywhere_it_ends_the_same(whole, lm, relations, tmp_path, after):
    """Killed at the `after`-th report, then once more later, then left to finish."""
    names = choose("default")
    found = read_relations(relations)
    for limit in (after, after + 1):
        left = limit

        def stop(stage, done, total):
            nonlocal left
            left -= 1
            if left < 0:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            run_study(lm, found, tmp_path / "run", settings=SETTINGS, names=names, progress=stop)
    told = []
    run_study(
        lm,
        found,
        tmp_path / "run",
        settings=SETTINGS,
        names=names,
        progress=lambda *what: told.append(what),
    )
    assert told  # there was something left to do
    mine, theirs = contents(tmp_path / "run"), contents(whole.out)
    for path, content in mine.items():
        if path.stem != "summary":
            assert content == theirs[path], path


def test_a_finished_study_computes_nothing(whole, lm, relations, tmp_path, monkeypatch):
    shutil.copytree(whole.out, tmp_path / "run")
    before = contents(tmp_path / "run")

    def never(*_, **__):
        raise AssertionError("computed again")

    monkeypatch.setattr("jaxneurons.engine.ablation.generate_ablated", never)
    monkeypatch.setattr("jaxneurons.engine.responses.mean_responses", never)
    monkeypatch.setattr("jaxneurons.engine.experts.average_precision", never)
    monkeypatch.setattr("jaxneurons.relspec.perplexity._losses", never)
    run_study(
        lm, read_relations(relations), tmp_path / "run", settings=SETTINGS, names=choose("all")
    )
    assert contents(tmp_path / "run") == before


def test_spoilt_parts_are_made_again(whole, lm, relations, tmp_path):
    shutil.copytree(whole.out, tmp_path / "run")
    before = contents(tmp_path / "run")
    spoilt = sorted((tmp_path / "run" / "parts").glob("said-*.npz"))[::7]
    for path in spoilt:
        path.write_bytes(path.read_bytes()[:-40] + b"x" * 40)
    run_study(
        lm, read_relations(relations), tmp_path / "run", settings=SETTINGS, names=choose("all")
    )
    assert contents(tmp_path / "run") == before


def test_another_study_is_refused(whole, lm, relations):
    found = read_relations(relations)
    with pytest.raises(DataError, match="holds a run with other relations"):
        Study(lm, found[1:], out=whole.out, settings=SETTINGS)
    other = RelSpecConfig(k=25, minimum=5, minimum_right=1, seeds=2, sweep_seeds=2)
    with pytest.raises(DataError, match="holds a run with other settings"):
        Study(lm, found, out=whole.out, settings=other)


# --- what cannot be studied -----------------------------------------------------------------------


def test_an_unknown_relation_is_said_to_be_and_left_out(lm, tmp_path):
    found = read_relations(write_relations(tmp_path / "r", lm, unknown=21))
    study = run_study(lm, found, tmp_path / "run", settings=SETTINGS, names=("ablation", "overlap"))
    rows = {r["relation"]: r for r in tables(study)["relations"]}
    assert not rows["in"]["known"]
    assert "detection prompts answered, 5 needed" in rows["in"]["reason"]
    assert "in" not in study.known
    assert len(study.known) == 3
    for name in ("ablation", "overlap"):
        assert all("in" not in (r["relation"], r.get("off")) for r in tables(study)[name])
    assert not (tmp_path / "run" / "neurons" / "in.csv").exists()


def test_a_model_that_knows_nothing(lm, tmp_path):
    found = read_relations(write_relations(tmp_path / "r", lm, names=("in", "option")))
    strict = RelSpecConfig(k=24, minimum=99)
    with pytest.raises(DataError, match="knows none of the 2 relations"):
        run_study(lm, found, tmp_path / "run", settings=strict)
    rows = tables_of(tmp_path / "run")["relations"]  # what was found out is kept
    assert [r["validated"] for r in rows] == [12, 12]


def tables_of(path):
    return read_tables(path / "tables")


def test_one_known_relation_has_no_negatives(lm, tmp_path):
    found = read_relations(write_relations(tmp_path / "r", lm, names=("in", "option"), unknown=24))
    with pytest.raises(DataError, match="'option' has no negatives"):
        run_study(lm, found, tmp_path / "run", settings=SETTINGS)


def test_relations_that_make_no_study(lm, relations, tmp_path):
    found = read_relations(relations)
    for some, settings, message in (
        (found[:1], SETTINGS, "one relation only"),
        ([found[0], found[0]], SETTINGS, "'capital' is there twice"),
        (
            found,
            RelSpecConfig(templates=("plan",)),
            "no template set 'plan'.* did you mean 'plain'",
        ),
        (
            [dataclasses.replace(found[0], name="random"), found[1]],
            SETTINGS,
            "cannot be called 'random'",
        ),
        (found, RelSpecConfig(k=481), "give a number from 1 to 480"),
    ):
        with pytest.raises(DataError, match=message):
            Study(lm, some, out=tmp_path / "run", settings=settings)
        assert not (tmp_path / "run").exists()


def test_an_analysis_that_cannot_be_made_is_skipped(whole, lm, relations, tmp_path):
    """Said so; the others are made, and everything is written."""
    shutil.copytree(whole.out, tmp_path / "run")
    (tmp_path / "run" / "run.json").unlink()
    study = Study(lm, read_relations(relations), out=tmp_path / "run", settings=SETTINGS)
    counts = {("in", Triple("x", "y")): 1.0}
    with pytest.warns(SkippedWarning, match="frequency skipped: none of the held-out"):
        study.analyse(("layers", "frequency"), counts=counts)
    run = json.loads((tmp_path / "run" / "run.json").read_text())
    assert list(run["skipped_by_this_call"]) == ["frequency"]
    assert "layers" in run["tables"]


def test_relations_without_a_second_wording(lm, relations, tmp_path):
    found = [
        dataclasses.replace(one, templates={"plain": one.templates["plain"]}, translations={})
        for one in read_relations(relations)
    ]
    with pytest.warns(SkippedWarning, match="skipped: these relations have nothing"):
        run_study(
            lm,
            found,
            tmp_path / "run",
            settings=SETTINGS,
            names=("layers", "templates", "multilingual"),
        )


def test_more_than_half_of_the_neurons(lm, relations, tmp_path):
    """No random neurons of the same layers are left: no such control, and no error."""
    many = dataclasses.replace(SETTINGS, k=300)
    study = run_study(
        lm, read_relations(relations), tmp_path / "run", settings=many, names=("ablation",)
    )
    assert {r["off"] for r in tables(study)["ablation"]} == {*WORDINGS, "random"}


def test_means_of_cumulativity():
    rows = [
        {"relation": "x", "a": 1, "b": 2, "total": 4, "affected": 1, "cumulativity": 0.75},
        {"relation": "x", "a": 2, "b": 3, "total": 2, "affected": 2, "cumulativity": 0.0},
        {"relation": "y", "a": 1, "b": 2, "total": 2, "affected": 1, "cumulativity": 0.5},
        {"relation": "y", "a": 2, "b": 3, "total": 0, "affected": 0, "cumulativity": None},
    ]
    first, second, every = analyses.cumulativity_means(rows)
    assert (first["macro"], first["micro"], first["relations"]) == (0.625, pytest.approx(4 / 6), 2)
    assert (second["macro"], second["micro"], second["total"]) == (0.0, 0.0, 2)
    assert every["macro"] == pytest.approx((0.375 + 0.5) / 2)
    assert every["micro"] == pytest.approx(4 / 8)


def test_names_of_analyses():
    assert choose("default") == DEFAULT
    assert choose("layers,ablation") == ("ablation", "layers")
    assert choose("all", counts=True)[-1] == "frequency"
    assert "frequency" not in choose("all")
    with pytest.raises(DataError, match="unknown analysis 'layer'; did you mean 'layers'"):
        choose("layer")
    with pytest.raises(DataError, match="'frequency' needs counts"):
        choose("frequency")
