"""Benchmarks whose real sizes CI never runs, on tiny shapes: they work, and their pages whole."""

import json
import runpy
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"

pytestmark = pytest.mark.slow


def run(monkeypatch, name, *arguments):
    monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
    runpy.run_path(str(BENCHMARKS / name), run_name="__main__")


def test_scaling_has_a_row_and_an_exponent_for_each_factor(monkeypatch, tmp_path):
    out, page, figure = (tmp_path / name for name in ("s.json", "s.md", "s.png"))
    options = "--small", "--repeats", 1, "--out", out, "--write", page, "--figure", figure
    run(monkeypatch, "scaling.py", *options)
    rows = json.loads(out.read_text("utf-8"))
    assert [row["factor"] for row in rows] == ["prompts", "layers", "nodes", "tokens", "width"]
    for row in rows:
        assert len(row["points"]) == len(row["values"]) == 2
        first, second = (point["temporaries"] for point in row["points"])
        # Twice as much of anything: more memory (of nodes no more than their multipliers), and
        # nowhere near what nodes x layers x tokens at once would take.
        assert first <= second < 5 * first
    lines = page.read_text("utf-8").splitlines()
    assert sum(line.startswith("| ") for line in lines) == 2 + len(rows)
    assert figure.read_bytes().startswith(b"\x89PNG")


def test_the_accelerator_page_has_every_measure(monkeypatch, tmp_path, capsys):
    out = tmp_path / "a.json"
    run(monkeypatch, "accelerator.py", "--small", "--out", out)
    (result,) = json.loads(out.read_text("utf-8"))
    assert result["model"] == "tiny"
    for rule in ("right", "adaptive"):
        measured = result["query"][rule]
        # Rows of three prompts and three layers, sixteen nodes or as many as the tolerance asks.
        assert measured["rows"] == 3 * 3 * 16 if rule == "right" else measured["rows"] >= 3 * 3
        assert measured["seconds"] > 0 < measured["share"]
    assert min(result[name] for name in ("matmul", "responses", "generations", "edit")) > 0
    printed = capsys.readouterr().out
    assert "| tiny |" in printed
    assert "Predicted for tiny: " in printed
