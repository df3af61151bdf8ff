"""Figures: names are data, sizes are bounded, fonts are found or missed once."""

import ast
import functools
import io
import warnings
from pathlib import Path

import numpy as np
import pytest
from matplotlib.colors import to_rgba
from matplotlib.font_manager import FontProperties, findfont
from matplotlib.text import Text
from support.drawn import qrnca_tables, relspec_tables
from support.pictures import coloured, pixels

from jaxneurons.errors import DataError
from jaxneurons.neurons.sets import Neuron
from jaxneurons.plots import figures as plots
from jaxneurons.plots import fonts, lettering
from jaxneurons.plots.figures import (
    MOST,
    check_places,
    draw_tables,
    heat_map,
    neuron_map,
    save_figure,
)
from jaxneurons.plots.fonts import LetteredFigure, MissingFontWarning, families_for, script_of
from jaxneurons.qrnca import figures as qrnca_plots
from jaxneurons.relspec import figures as relspec_plots
from jaxneurons.storage.printable import columns, printable, shortened

HOSTILE = (
    "$x$",
    r"\frac{1}{2}",
    "$\\undefined{$",
    "_private",
    "100 % {a}^b_c~&#",
    "two\nlines\x1b[31m",
    "\u202eright to left",
    "name " * 60,
    "cost: $5 \\$6",
    "[bold]x[/]",
)
MODULES = (qrnca_plots, relspec_plots)
FIGURES = [(module, name) for module in MODULES for name in module.FIGURES]
IDS = [f"{module.__name__.split('.')[1]}-{name}" for module, name in FIGURES]
NAMES_NOTHING = {"pcr", "editing", "kinds", "sizes", "cumulativity", "errors"}
"""Figures of all groups or relations together."""


@functools.cache
def tables_of(module, names):
    make = qrnca_tables if module is qrnca_plots else relspec_tables
    return make(list(names))


def png(figure):
    """What matplotlib writes: mathematics are parsed and fonts looked for only then."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    file = io.BytesIO()
    FigureCanvasAgg(figure).print_figure(file, dpi=40)
    return file.getvalue()


def texts(figure):
    return [text.get_text() for text in figure.findobj(Text) if text.get_text()]


def shown(name, module):
    label = name.replace("_", " ") if module is relspec_plots else name
    return shortened(label, lettering.NAME)


@pytest.mark.parametrize(("module", "name"), FIGURES, ids=IDS)
def test_names_are_drawn_as_they_are(module, name):
    table, function = module.FIGURES[name]
    figure = function(tables_of(module, HOSTILE)[table], "$a_model$ \\x {")
    assert png(figure).startswith(b"\x89PNG")
    there = texts(figure)
    joined = " ".join(" ".join(there).split())
    assert "$a_model$ \\x {" in joined
    if name not in NAMES_NOTHING:
        few = HOSTILE[:6] if name == "multilingual" else HOSTILE
        for hostile in few:
            own = shown(hostile, module).strip()
            assert any(own in text or own[:12] in text for text in there), (own, there)
    ticks = [t for a in figure.axes for t in (*a.get_xticklabels(), *a.get_yticklabels())]
    for text in figure.findobj(Text):
        assert not {"\x1b", "\u202e"} & set(text.get_text())
        if "$" in text.get_text() and text not in ticks:
            assert not text.get_parse_math()
    assert all(not t.get_parse_math() for t in ticks if any(h in t.get_text() for h in HOSTILE))


def test_a_dollar_is_ink_like_any_other(tmp_path):
    """Drawn: "$x$" is as wide as the three characters, not as an italic x."""
    widths = []
    for text in ("$x$", "xxx"):
        figure = LetteredFigure()
        mark = figure.text(0.5, 0.5, text, fontfamily="DejaVu Sans Mono")
        png(figure)
        widths.append(mark.get_window_extent().width)
    assert widths[0] == pytest.approx(widths[1], rel=0.1)


def test_the_demo_map(tmp_path):
    found = {name: {Neuron(1, i): 0.5} for i, name in enumerate(HOSTILE)}
    path = neuron_map(found, tmp_path / "map.png", num_layers=3, width=64, title="$t$_{")
    assert coloured(path) > 100


def test_names_that_begin_with_an_underscore_are_in_the_legend():
    figure = qrnca_plots.layers(qrnca_tables(["_one", "__two", "three"])["layers"], "lab")
    png(figure)
    (legend,) = [axes.get_legend() for axes in figure.axes]
    assert [text.get_text() for text in legend.get_texts()] == ["_one", "__two", "three"]
    colours = [to_rgba(handle.get_color()) for handle in legend.legend_handles]
    assert colours == [to_rgba(colour) for colour in plots.PALETTE[:3]]


def test_text_is_written_in_one_place():
    """No drawing module writes words but through `lettering`."""
    forbidden = {"annotate", "legend", "set_title", "suptitle", "text", "set_text"} | {
        f"set_{axis}{what}" for axis in "xy" for what in ("ticks", "ticklabels", "label")
    }
    forbidden |= {"xlabel", "ylabel", "title", "bar_label", "table"}
    for module in (plots, *MODULES):
        tree = ast.parse(Path(module.__file__).read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
                continue
            keywords = {k.arg for k in node.keywords} if node.func.attr == "set" else set()
            wrong = forbidden & ({node.func.attr} | keywords)
            assert not wrong, f"{module.__name__}, line {node.lineno}: {wrong}"
    (own,) = [
        node
        for node in ast.walk(ast.parse(Path(plots.__file__).read_text(encoding="utf-8")))
        if isinstance(node, ast.ImportFrom) and node.module == "jaxneurons.plots.lettering"
    ]
    assert {"entitle", "head", "legend", "name_x", "name_y", "note"} <= {a.name for a in own.names}


# --- many names -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("module", "name"), FIGURES, ids=IDS)
def test_figures_of_many_names_are_bounded(module, name):
    """As large, and with as many labels, as a figure of a hundred names; none of them overlap."""
    table, function = module.FIGURES[name]
    names = tuple(f"group {i}" for i in range(150))
    figure = function(tables_of(module, names)[table], "lab")
    assert max(figure.get_size_inches()) <= MOST
    for axes in figure.axes:
        for axis, side in ((axes.xaxis, 0), (axes.yaxis, 1)):
            labels = [t for t in axis.get_ticklabels() if t.get_text().startswith("group")]
            most = figure.get_size_inches()[side] / lettering.PITCH
            assert len(labels) <= most
        notes = [t for t in axes.texts if t.get_text()]
        assert len(notes) < 100
        if axes.get_legend():
            assert len(axes.get_legend().get_texts()) <= lettering.ENTRIES


def test_numbers_are_in_the_cells_of_small_maps_alone():
    def drawn(count):
        names = [f"n{i}" for i in range(count)]
        values = np.eye(count)
        figure = heat_map(
            values, rows=names, columns=names, title="t", limits=(0.0, 1.0), colours="Blues"
        )
        return figure, [text.get_text() for text in figure.axes[0].texts]

    _, numbers = drawn(7)
    assert numbers == [f"{value:.0f}" for value in np.eye(7).ravel()]
    figure, numbers = drawn(plots.NUMBERED + 1)
    assert numbers == []
    shade = figure.axes[0].images[0].get_array()
    np.testing.assert_array_equal(np.asarray(shade), np.eye(plots.NUMBERED + 1))


def test_thinned_names_stand_where_they_belong():
    names = [f"n{i}" for i in range(500)]
    figure = heat_map(
        np.zeros((500, 3)),
        rows=names,
        columns=["a", "b", "c"],
        title="t",
        limits=(0.0, 1.0),
        colours="Blues",
        ylabel="row",
    )
    axes = figure.axes[0]
    places, labels = axes.get_yticks(), [t.get_text() for t in axes.get_yticklabels()]
    assert 50 < len(labels) < 200
    assert labels == [f"n{int(place)}" for place in places]
    assert axes.get_ylabel() == f"row (1 in {int(places[1] - places[0])} named)"


def test_many_groups_become_a_map_of_layers():
    names = [f"g{i}" for i in range(30)]
    rows = qrnca_tables(names)["layers"]
    grid = np.asarray(qrnca_plots.layers(rows, "lab").axes[0].images[0].get_array())
    expected = [[100 * r["share"] for r in rows if r["group"] == name] for name in names]
    np.testing.assert_allclose(grid, expected)


def test_the_heaviest_groups_have_panels():
    rows = qrnca_tables([f"g{i}" for i in range(30)])["neurons"]
    weights = {}
    for row in rows:
        weights[row["group"]] = weights.get(row["group"], 0.0) + row["naica"]
    figure = qrnca_plots.neuron_map(rows, "lab")
    titles = {a.get_title(loc="left") for a in figure.axes if a.images and a.get_title(loc="left")}
    assert titles == set(sorted(weights, key=weights.get)[-qrnca_plots.PANELS :])
    assert "the 24 heaviest of 30 groups" in figure.get_suptitle()


# --- fonts ----------------------------------------------------------------------------------------


@pytest.fixture
def nothing_warned(monkeypatch):
    monkeypatch.setattr(fonts, "_warned", set())
    fonts._search.cache_clear()
    yield
    fonts._search.cache_clear()


DEJAVU = findfont(FontProperties(family=["DejaVu Sans"]))


@pytest.mark.usefixtures("nothing_warned")
def test_scripts_without_a_font_are_named_once(monkeypatch, tmp_path):
    monkeypatch.setattr(fonts, "_installed", lambda: [("DejaVu Sans", DEJAVU)])
    rows = qrnca_tables(["生物学", "물리학", "ひらがな"])["overlap"]
    figures = dict.fromkeys(("one", "two"), ("t", qrnca_plots.overlap))
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        made = draw_tables(figures, {"t": rows}, tmp_path / "figures", source="模型")
    assert [path.name for path in made] == ["one.png", "two.png"]
    (only,) = said
    assert only.category is MissingFontWarning
    message = str(only.message)
    for script in ("Chinese characters (", "Hangul (", "Hiragana (", "fonts-noto-cjk"):
        assert script in message
    assert message.count("fonts-noto-cjk") == 1


@pytest.mark.usefixtures("nothing_warned")
def test_a_font_of_the_system_is_found_for_what_the_first_one_lacks(monkeypatch):
    """STIX, which matplotlib ships, has letters that Computer Modern lacks."""
    base = findfont(FontProperties(family=["cmr10"]))
    other = findfont(FontProperties(family=["STIXGeneral"]))
    monkeypatch.setattr(
        fonts, "_installed", lambda: [("cmr10", base), ("STIXGeneral", other), ("DejaVu", DEJAVU)]
    )
    assert families_for("Ж", base) == (["STIXGeneral"], "")
    assert families_for("abc", base) == ([], "")
    assert families_for("Ж生", base) == (["STIXGeneral"], "生")
    figure = LetteredFigure()
    text = figure.text(0.1, 0.5, "Ж", fontfamily="cmr10")
    png(figure)  # a missing glyph would be a warning, which is an error here
    assert text.get_fontfamily() == ["cmr10", "STIXGeneral"]


def test_fonts_that_are_gone_or_hold_no_letters_are_passed_over(monkeypatch, tmp_path):
    broken = tmp_path / "broken.ttf"
    broken.write_bytes(b"not a font")
    monkeypatch.setattr("matplotlib.font_manager.findSystemFonts", lambda: [str(broken)])
    found = fonts._installed.__wrapped__()
    assert ("DejaVu Sans", DEJAVU) in [(name, str(path)) for name, path in found]
    assert not [name for name, _ in found if "last resort" in name.lower()]


@pytest.mark.parametrize(
    ("character", "script"),
    [("生", "Chinese characters"), ("가", "Hangul"), ("ع", "Arabic"), ("🦜", "emoji and symbols")],
)
def test_scripts_have_names(character, script):
    assert script_of(character) == script


# --- places ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["tables", "figures"])
def test_a_file_where_results_belong_is_found_before_the_work(run, tmp_path, name):
    """No model is loaded and nothing is computed; the error names what the user can move."""
    (tmp_path / name).write_text("mine")
    for command in (
        ("qrnca", "evaluate", "--run", tmp_path, "--model", "none"),
        ("relspec", "run", "--model", "none", "--relations", "bundled", "--out", tmp_path),
    ):
        code, out, err = run(*command)
        assert (code, out) == (1, "")
        assert err.startswith(f"error: {tmp_path / name}: not a directory, but results are ")
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_links_to_directories_are_places_and_dead_ones_are_not(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "tables").symlink_to(tmp_path / "elsewhere")
    check_places(tmp_path, "tables", "figures")
    (tmp_path / "figures").symlink_to(tmp_path / "nowhere")
    with pytest.raises(DataError, match="figures: not a directory"):
        check_places(tmp_path, "tables", "figures")


def test_a_directory_that_is_gone(run, tmp_path, monkeypatch):
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    code, _, err = run("inspect", "lab")
    assert (code, err) == (
        1,
        "error: the current directory is no longer there; change to another one\n",
    )


# --- texts ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("plain", "plain"),
        ("a\nb\tc\r", "a b c "),
        ("\x1b[31mred\x07\x9b", "\\x1b[31mred\\x07\\x9b"),
        ("\u202eabc\u2066", "\\u202eabc\\u2066"),
        ("می\u200cخواهم", "می\u200cخواهم"),
        ("\udcff", "\\udcff"),
        ("生物 ± é e\u0301", "生物 ± é e\u0301"),
        ("\u2028\xa0\ufeff", "\\u2028 \\ufeff"),
    ],
)
def test_printable(text, expected):
    assert printable(text) == expected
    assert printable(expected) == expected
    expected.encode("utf-8")


@pytest.mark.parametrize("text", ["a" * 99, "生" * 99, "ab生" * 40, "short"])
@pytest.mark.parametrize("width", [5, 36])
def test_shortened_keeps_both_ends(text, width):
    from rich.cells import cell_len

    found = shortened(text, width)
    assert columns(found) == cell_len(found)
    assert cell_len(found) <= width
    if found != text:
        first, last = found.split("…")
        assert text.startswith(first)
        assert text.endswith(last)
        assert cell_len(found) >= width - 2


def test_a_figure_that_is_saved_by_hand_has_its_fonts_too(tmp_path):
    figure = qrnca_plots.overlap(qrnca_tables(["$\\bad{$", "b"])["overlap"], "lab")
    figure.savefig(tmp_path / "own.png")
    ours = pixels(save_figure(figure, tmp_path / "ours.png"))
    assert coloured(tmp_path / "ours.png") > 100
    assert coloured(tmp_path / "own.png") > 100
    assert ours.ndim == 3
