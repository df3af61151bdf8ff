"""`jaxneurons relspec` as a new user runs it: whole, stage by stage, and with bad input."""

import json
import re
import shutil

import pytest
from support.fixtures import write_lm
from support.known import write_relations

import jaxneurons
from jaxneurons.errors import JaxneuronsError
from jaxneurons.neurons.sets import read_neurons
from jaxneurons.relspec.method import RelSpecConfig
from jaxneurons.relspec.stages import begin, compare, resume
from jaxneurons.storage.tables import read_tables, write_table

SMALL = ("--k", "5%", "--minimum", 5, "--seeds", 2)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_lm(tmp_path_factory.mktemp("lm") / "model")


@pytest.fixture(scope="module")
def relations(model, tmp_path_factory):
    lm = jaxneurons.load(model)
    return write_relations(tmp_path_factory.mktemp("relations") / "known", lm)


@pytest.fixture(scope="module")
def done(model, relations, tmp_path_factory):
    """A directory in which everything has been run, and what was said."""
    import contextlib
    import io
    import sys

    from jaxneurons import cli

    out = tmp_path_factory.mktemp("done") / "run"
    argv = ["jaxneurons", "relspec", "run", "--model", model, "--relations", relations]
    argv = [*argv, "--out", out, *SMALL]
    before, said = sys.argv, io.StringIO()
    sys.argv = list(map(str, argv))
    try:
        with contextlib.redirect_stdout(said), pytest.raises(SystemExit) as stop:
            cli.main()
    finally:
        sys.argv = before
    assert not stop.value.code
    return out, said.getvalue()


def fails(result, message):
    code, _, err = result
    assert code == 1, err
    (line,) = err.strip().splitlines()  # old versions of rich end a bar with an empty line
    assert line.startswith("error: ")
    assert re.search(message, line), line


def test_run(done):
    out, _ = done
    assert {path.name for path in out.iterdir()} == {
        *("neurons", "tables", "figures", "parts", "responses", "run.json", "study.json")
    }
    found = read_tables(out / "tables")
    assert {"ablation", "layers", "overlap", "errors", "summary"} <= set(found)
    assert "sizes" not in found
    run = json.loads((out / "run.json").read_text())
    assert run["neurons"]["k"] == 24
    assert run["settings"]["seeds"] == 2


def test_stage_by_stage_is_the_same(run, done, model, relations, tmp_path):
    whole, _ = done
    out = tmp_path / "run"
    begin = ("--model", model, "--relations", relations, "--out", out, *SMALL)
    code, said, err = run("relspec", "collect", *begin)
    assert (code, "error" in err) == (0, False)
    assert "12/12" in said
    for stage in ("neurons", "ablate", "analyse", "plot"):
        code, said, err = run("relspec", stage, "--out", out)
        assert (code, "Traceback" in err) == (0, False), err
        assert "Written" in said
    for folder in ("tables", "neurons"):
        for path in (whole / folder).iterdir():
            assert (out / folder / path.name).read_bytes() == path.read_bytes(), path.name
    assert {p.name for p in (out / "figures").iterdir()} == {
        p.name for p in (whole / "figures").iterdir()
    }


def test_compare(run, done, tmp_path):
    whole, _ = done
    code, said, err = run("relspec", "compare", whole, whole)
    assert code == 0, err
    assert said.count("the same") == len(list((whole / "neurons").iterdir()))
    rows = compare(whole, whole).to_pylist()
    for row in rows:
        assert row["shared"] == row["neurons"] == row["other_neurons"] == 24
        others = [
            len(read_neurons(whole / "neurons" / f"{row['relation']}.csv") & read_neurons(path))
            for path in (whole / "neurons").iterdir()
            if path.stem != row["relation"]
        ]
        assert row["shared_others"] == sum(others) / len(others)
    fails(run("relspec", "compare", whole, tmp_path), "no neurons of a run")


def test_further_analyses_and_counts(run, done, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(done[0], out)
    facts = read_tables(out / "tables")["answers"]
    lines = [f'{r["relation"]},{r["subject"]},"{r["object"]}",7' for r in facts]
    counts = tmp_path / "counts.csv"
    counts.write_text("relation,subject,object,count\n" + "\n".join(lines) + "\n")
    code, _, err = run(
        "relspec", "analyse", "--out", out, "--analyses", "frequency,sizes", "--counts", counts
    )
    assert code == 0, err
    found = read_tables(out / "tables")
    assert {row["count"] for row in found["frequency"]} == {7}
    assert {row["analysis"] for row in found["summary"]} == {"ablation", "sizes"}
    assert (out / "figures" / "sizes.png").exists()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--k", "0"), r"--k '0': give a number of neurons, or a share"),
        (("--k", "many"), "give a number of neurons"),
        (("--k", "481"), "give a number from 1 to 480"),
        (("--k", "100.5%"), "or a share such as 0.36%"),
        (("--templates", "plan"), "no template set 'plan' .* did you mean 'plain'"),
        (("--templates", ""), "templates must name"),
        (("--sites", "up,gates"), "unknown site 'gates'; did you mean 'gate'"),
        (("--analyses", "size"), "unknown analysis 'size'; did you mean 'sizes'"),
        (("--analyses", "frequency"), "'frequency' needs counts"),
        (("--counts", "none.csv"), "none.csv: cannot be read"),
        (("--dtype", "float8"), "unknown response dtype 'float8'"),
        (("--steps", 10**8), "steps 100000000: the model's context holds [0-9]+ tokens"),
    ],
)
def test_bad_options(run, model, relations, tmp_path, more, message):
    out = tmp_path / "run"
    options = ("--model", model, "--relations", relations, "--out", out, *more)
    fails(run("relspec", "run", *options), message)
    assert not out.exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"samples": [{"subject": "a"}]}, r"b\.json: sample 1: subject and object"),
        ({"samples": [{"subject": "a", "object": ""}]}, r"b\.json: sample 1: subject and object"),
        ({"prompt_templates": ["no slot"]}, r"'no slot' must have one \{\}"),
        ({"prompt_templates": []}, "'b' has no template set 'plain'; known: 'zero-shot'"),
        ({"samples": [{"subject": "a", "object": o} for o in "xyz"]}, "'b' has one subject"),
    ],
)
def test_bad_relations(run, model, relations, tmp_path, changes, message):
    """Before the model is loaded, and nothing is written."""
    folder = tmp_path / "relations"
    folder.mkdir()
    good = json.loads((relations / "in.json").read_text())
    (folder / "a.json").write_text(json.dumps(good))
    (folder / "b.json").write_text(json.dumps({**good, **changes}))
    out = tmp_path / "run"
    fails(run("relspec", "run", "--model", "none", "--relations", folder, "--out", out), message)
    assert not out.exists()


def test_one_relation(run, relations, tmp_path):
    folder = tmp_path / "relations"
    folder.mkdir()
    shutil.copy(relations / "in.json", folder)
    options = ("--model", "none", "--out", tmp_path / "run")
    fails(run("relspec", "run", "--relations", folder, *options), "one relation only")
    result = run("relspec", "run", "--relations", "lab", *options)
    fails(result, "lab: no such directory of relation files; 'bundled' are those that ship")
    twice = ("--relations", folder, "--relations", folder)
    fails(run("relspec", "run", *twice, *options), "'in' is there twice")


def test_directories_that_are_no_study(run, done, model, relations, tmp_path):
    for stage in ("neurons", "ablate", "analyse"):
        fails(run("relspec", stage, "--out", tmp_path / "none"), "no study here; begin one")
    fails(run("relspec", "plot", "--out", tmp_path / "none"), "no tables here")
    options = ("--model", model, "--relations", relations, "--out")
    fails(run("relspec", "run", *options, done[0], "--k", "7"), "other settings")
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "main.tex").write_text("x")
    fails(run("relspec", "run", *options, tmp_path / "thesis"), "no run of ours")
    shutil.copytree(done[0], tmp_path / "run")
    (tmp_path / "run" / "tables" / "ablation.parquet").write_bytes(b"PAR1")
    fails(run("relspec", "plot", "--out", tmp_path / "run"), r"ablation\.parquet: not a readable")
    (tmp_path / "run" / "study.json").write_text("{}")
    fails(
        run("relspec", "neurons", "--out", tmp_path / "run"),
        r"study\.json: no model or relations or settings; give --model",
    )


@pytest.mark.parametrize(
    ("steps", "exit_code", "message"),
    [
        ("1e8", 2, "--steps"),
        ("0", 1, "error: steps must be at least 1, or None, got 0"),
        ("x", 2, "--steps"),
        ("2.5", 2, "--steps"),
    ],
)
def test_steps_that_are_no_number_of_tokens(run, relations, tmp_path, steps, exit_code, message):
    options = ("--relations", relations, "--model", "none", "--out", tmp_path / "run")
    code, _, err = run("relspec", "run", *options, "--steps", steps)
    assert code == exit_code
    assert message in err
    assert "Traceback" not in err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "changes",
    [
        {"settings": None},
        {"settings": {"k": "many"}},
        {"settings": {"steps": [2]}},
        {"settings": {"seeds": True}},
        {"settings": {"colour": 1}},
        {"relations": "bundled"},
        {"relations": [7]},
        {"model": {}},
    ],
)
def test_an_edited_study(run, done, tmp_path, changes):
    """A key that is missing, a table where a number was: said so, whatever it is."""
    values = json.loads((done[0] / "study.json").read_text())
    for key, value in changes.items():
        table = isinstance(value, dict) and isinstance(values[key], dict)
        values[key] = {**values[key], **value} if table else value
    out = tmp_path / "run"
    out.mkdir()
    (out / "study.json").write_text(json.dumps(values))
    fails(run("relspec", "neurons", "--out", out), r"study\.json: .*; give --model and --relations")


def test_figures_and_comparisons_of_edited_runs(run, done, tmp_path):
    shutil.copytree(done[0], tmp_path / "run")
    (tmp_path / "run" / "run.json").write_text('{"model": 7}')
    code, said, err = run("relspec", "plot", "--out", tmp_path / "run")
    assert (code, "Written" in said) == (0, True), err  # titles without the model's name
    shutil.copy(tmp_path / "run" / "neurons" / "in.csv", tmp_path / "run" / "neurons" / "x.csv")
    message = "neurons of 'x', which is in none of its tables"
    fails(run("relspec", "compare", done[0], tmp_path / "run"), message)


def test_every_value_of_the_study_file_replaced(tmp_path):
    """Read as it was begun, or refused with the way out."""
    begin(tmp_path, "lab", ["bundled"], RelSpecConfig(k=7))
    path = tmp_path / "study.json"
    good = json.loads(path.read_text())
    assert resume(tmp_path) == ("lab", ["bundled"], RelSpecConfig(k=7))
    odd = [None, True, -1, 0, 1.5, float("nan"), 10**400, "x", [], {}, [1], {"a": 1}]
    texts = ["", "[", "[]", "3", "[" * 10**5]
    texts += [json.dumps({**good, key: value}) for key in good for value in odd]
    texts += [
        json.dumps({**good, "settings": {**good["settings"], key: value}})
        for key in [*good["settings"], "unknown"]
        for value in odd
    ]
    said = []
    for text in texts:
        path.write_text(text)
        try:
            assert isinstance(resume(tmp_path)[2], RelSpecConfig)
        except JaxneuronsError as error:
            said.append(str(error))
    assert len(texts) // 2 < len(said) < len(texts) - 10
    for one in said:
        assert re.search(r"study\.json: .*; give --model and --relations to", one), one


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (f"up,1,{10**30},0.5", r"in\.csv: line 3: needs a site"),
        (f"up,1,{2**33 + 2},0.5", r"in\.csv: line 3: neuron 8589934594 is in no model"),
        (f"up,{2**40},1,0.5", r"in\.csv: line 3: layer 1099511627776 is in no model"),
        ("up,1e9,1,0.5", r"in\.csv: line 3: needs a site"),
        ("up,1", r"in\.csv: line 3: needs a site"),
        ('up,"1,2', r"in\.csv: line \d: not CSV"),
    ],
)
def test_damaged_neurons_are_not_compared(run, tmp_path, line, message):
    for name in ("a", "b"):
        write_table(tmp_path / name / "tables", "relations", [{"relation": "in", "template": "x"}])
        (tmp_path / name / "neurons").mkdir()
        text = "site,layer,index,average_precision\nup,0,1,0.5\n"
        (tmp_path / name / "neurons" / "in.csv").write_text(text)
    assert [row["shared"] for row in compare(tmp_path / "a", tmp_path / "b").to_pylist()] == [1]
    (tmp_path / "b" / "neurons" / "in.csv").write_text(text + line + "\n")
    fails(run("relspec", "compare", tmp_path / "a", tmp_path / "b"), message)
    write_table(tmp_path / "a" / "tables", "relations", [{"relation": "in", "wording": "x"}])
    fails(run("relspec", "compare", tmp_path / "a", tmp_path / "b"), "relations: no template")


def test_the_output_is_no_directory_of_relations(run, model, tmp_path, relations):
    """Nothing of what is read is written over."""
    before = {path: path.read_bytes() for path in relations.iterdir()}
    options = ("--model", model, "--relations", relations, "--out", relations)
    fails(run("relspec", "run", *options, *SMALL), "holds files but no run of ours")
    assert {path: path.read_bytes() for path in relations.iterdir()} == before


def test_neurons_straight_into_a_patch(run, done, model, tmp_path):
    out, _ = done
    copy = tmp_path / "run"
    shutil.copytree(out, copy)
    name = sorted(path.stem for path in (copy / "neurons").glob("*.csv"))[0]
    patch = tmp_path / "off.safetensors"
    code, _, err = run("relspec", "neurons", "--out", copy, "--write", patch, "--relation", name)
    assert code == 0, err
    members = read_neurons(copy / "neurons" / f"{name}.csv")
    lm = jaxneurons.load(model)
    written = jaxneurons.edit.read_patch(patch)
    facts = {"run": str(copy), "relations": [name]}
    assert written.digest == jaxneurons.edit.make_patch(lm, members, facts=facts).digest
    shutil.rmtree(copy / "neurons")
    options = ("relspec", "neurons", "--out", copy, "--write")
    result = run(*options, tmp_path / "none", "--relation", "nobody")
    fails(result, "no neurons of 'nobody'")
    assert not (copy / "neurons").exists()
    fails(run("relspec", "neurons", "--out", copy, "--relation", name), "--write")
