"""Tables and figures of evaluations, from made-up rows."""

import itertools

import numpy as np
import pytest
from support.pictures import coloured, ink

from jaxneurons.edit import evaluation_views
from jaxneurons.edit.figures import draw
from jaxneurons.edit.outcomes import MEASURES
from jaxneurons.edit.sequential import CONTROLS
from jaxneurons.edit.summaries import averages, difference_rows, summary_rows
from jaxneurons.terminal.console import Plain

METHODS = (("unedited", ""), ("ROME", ""), ("ROME", "random"), ("FT_$L$", ""), ("FT_$L$", "random"))


def edits(count=12, *, portability=True):
    rng = np.random.default_rng(0)
    rows = []
    for place, (method, control) in enumerate(METHODS):
        for request in range(count):
            row = {name: float(rng.random() < place / 5) for name in MEASURES}
            row |= {"fluency": 5.0 - place / 3, "perplexity_ratio": 1.0 + place, "failed": ""}
            if not portability:
                row |= {"portability_forced": None, "portability_free": None}
            rows.append({"method": method, "control": control, "request": f"{request}", **row})
    return rows


def sequential():
    rng = np.random.default_rng(1)
    rows = []
    for method, control in (("unedited", ""), *itertools.product(("MEMIT", "AlphaEdit"), CONTROLS)):
        for size in (0,) if method == "unedited" else (1, 10, 100):
            for group in ("first", "last", "all"):
                made = [
                    {name: float(rng.random() < 1 / (1 + size / 50)) for name in MEASURES}
                    | {"failed": "", "perplexity_ratio": 1.0 + size, "fluency": 5.0}
                    for _ in range(8)
                ]
                line = {"method": method, "control": control, "edits": size, "group": group}
                rows.append({**line, **averages(made)})
    return rows


@pytest.fixture
def shown(monkeypatch):
    """What is printed, on 80 columns."""
    console = Plain(width=80, force_terminal=False)
    monkeypatch.setattr(evaluation_views, "console", console)

    def text(show, *arguments):
        with console.capture() as capture:
            show(*arguments)
        return capture.get()

    return text


def test_forced_stands_beside_free(shown):
    rows = edits()
    summary = summary_rows(rows)
    text = shown(evaluation_views.show_evaluation, summary, difference_rows(rows))
    lines = text.splitlines()
    assert max(map(len, lines)) <= 80
    assert not any("\u2026" in line or "~" in line for line in lines)
    assert "New answer given where it follows from the edit, exact match, % (12 edits)" in lines
    assert all("free, 95 %" in line for line in lines if "forced" in line and "method" in line)
    title = next(i for i, line in enumerate(lines) if "after the prompt" in line)
    table = lines[title : title + 12]
    assert any("forced" in line and "free" in line for line in table)
    (rome,) = (line for line in table if line.strip().startswith("ROME"))
    (expected,) = (row for row in summary if (row["method"], row["control"]) == METHODS[1])
    forced, free, low, _, high = rome.split()[1:]
    assert [forced, free, low, high] == [
        f"{100 * expected[name]:.0f}"
        for name in (
            "efficacy_forced",
            "efficacy_free",
            "efficacy_free_low",
            "efficacy_free_high",
        )
    ]
    assert text.count("  random") >= 8
    assert "where it follows" in text
    assert "Paired difference to the random control" in text
    assert "FT_$L$" in text


def test_what_there_are_no_prompts_for_is_not_shown(shown):
    text = shown(evaluation_views.show_evaluation, summary_rows(edits(portability=False)))
    assert "where it follows" not in text
    assert "Paired" not in text


def test_sequential_table(shown):
    text = shown(evaluation_views.show_sequential, sequential())
    first = [line.split()[0] for line in text.splitlines() if line.strip()]
    sizes = [word for word in first if word.isdigit() or word == "random"]
    assert sizes == ["1", "random", "10", "random", "100", "random"] * 2
    assert "unedited:" not in text
    assert text.count("fewer than 10 mean little") == 1


def test_tables_fit_80_columns_whole(shown):
    """The widest numbers, and the longest of our names."""
    rows = edits(count=2)
    for row in rows:
        row |= {"perplexity_ratio": 1.23e10, "fluency": 12.34, "locality_kl": 12.345}
        row["method"] = row["method"].replace("FT_$L$", "finetune-bounded")
    summary = [
        {**row, "failed": 2, "locality_free_low": 0.99, "locality_free": 1.0}
        for row in summary_rows(rows)
    ]
    gaps = [
        {**row, "difference_low": -1.0, "difference_high": 1.0} for row in difference_rows(rows)
    ]
    one = [
        {**row, "edits": 10 * row["edits"], "perplexity_ratio": 1.23e10, "efficacy_free_low": 0.99,
         "efficacy_free_high": 1.0, "efficacy_free": 1.0, "efficacy_forced": 1.0}
        for row in sequential()
    ]  # fmt: skip
    for text in (
        shown(evaluation_views.show_evaluation, summary, gaps),
        shown(evaluation_views.show_sequential, one),
    ):
        assert max(map(len, text.splitlines())) <= 80
        assert "\u2026" not in text
        assert "x 1.23e+10" in text
        assert "perplexity" in text


def test_intervals_of_few_requests_are_no_news(shown):
    few, many = (
        " ".join(shown(evaluation_views.show_evaluation, summary_rows(edits(count=n))).split())
        for n in (2, 10)
    )
    assert "intervals are over 2 requests: those of fewer than 10 mean little" in few
    assert "mean little" not in many
    assert "(2 edits)" in few
    alone = shown(evaluation_views.show_evaluation, summary_rows(edits(count=1)))
    assert "(1 edit)" in alone


def test_trace_table(shown):
    def state(kind, layer, position, effect):
        ends = {"low": effect - 0.05, "high": effect + 0.05}
        return {"kind": kind, "layer": layer, "position": position, "effect": effect, **ends}

    summary = [
        state(kind, layer, position, (layer + 1 + (position == "last")) / 10 % 0.4)
        for kind in ("residual", "down", "o")
        for layer in range(4)
        for position in ("first subject", "last subject", "last")
    ]
    facts = [
        {"clean": 0.9, "noised": 0.2, "total_effect": 0.7, "left_out": ""},
        {"clean": 0.7, "noised": 0.1, "total_effect": 0.6, "left_out": ""},
        {"clean": None, "noised": None, "total_effect": None, "left_out": "otherwise"},
    ]
    text = shown(evaluation_views.show_trace, summary, facts)
    lines = [line.split() for line in text.splitlines()]
    assert ["3", "2", "0.800", "0.150", "0.650"] in lines
    ends = ["0.300", "0.250", "to", "0.350"]
    for kind in ("residual stream", "feed-forward", "attention"):
        assert [*kind.split(), "subject's", "last", "2", *ends] in lines
        assert [*kind.split(), "last", "1", *ends] in lines
    assert "over 2 facts" in text


def test_left_out(shown):
    facts = {
        "left_out": [{"request": f"r{i}", "method": "ROME", "reason": "why"} for i in range(8)],
        "remarks": ["request 1 is request 2 once more"],
    }
    text = shown(evaluation_views.show_left_out, facts)
    assert "Left out (8)" in text
    assert "r4 (ROME): why" in text
    assert "r5" not in text
    assert "3 more" in text
    assert "once more" in text
    assert shown(evaluation_views.show_left_out, {"left_out": []}) == ""


def test_figures(tmp_path):
    tables = {"summary": summary_rows(edits()), "sequential": sequential()}
    paths = draw(tables, tmp_path, source="a_model")
    assert [path.name for path in paths] == ["efficacy.png", "locality.png", "sequential.png"]
    for path in paths:
        assert ink(path) > 0.02
        assert coloured(path) > 1000


def test_figures_need_numbers(tmp_path):
    rows = [row | dict.fromkeys(MEASURES) for row in edits(count=2)]
    assert draw({"summary": summary_rows(rows)}, tmp_path) == []


def test_candidate_layers_one_a_line_and_the_chosen_one_marked(shown):
    measured = {"efficacy_free": 0.9, "generalisation_free": 0.25, "locality_free": 1.0}
    rows = [
        {"layers": "0-4", "score": 0.5, "low": 0.25, "high": 0.75, "reached": 0.5, "failed": "",
         **measured},
        {"layers": "5-9", "score": 0.0, "low": 0.0, "high": 0.0, "reached": 0.0,
         "failed": "a covariance is missing", **dict.fromkeys(measured, 0.0)},
    ]  # fmt: skip
    lines = shown(evaluation_views.show_layers, rows, "MEMIT", "0-4").splitlines()
    (first,) = (line for line in lines if " 0-4 " in line)
    assert first.split() == ["*", "0-4", "0.50", "0.25", "to", "0.75", "90", "25", "100", "50"]
    (second,) = (line for line in lines if " 5-9 " in line)
    assert "*" not in second
    assert "5-9: a covariance is missing" in lines
