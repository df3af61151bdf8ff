"""Every notebook runs from top to bottom, shortened, and is stored as it was executed."""

from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

NOTEBOOKS = Path(__file__).resolve().parent.parent / "notebooks"


def outputs_of(notebook):
    return [
        output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs
    ]


def pictures_of(notebook):
    return [output for output in outputs_of(notebook) if "image/png" in output.get("data", {})]


@pytest.mark.parametrize(
    "name",
    [
        "ablation",
        "edit_and_export",
        "query_neurons",
        pytest.param("relation_neurons", marks=pytest.mark.smollm2),
    ],
)
@pytest.mark.slow
def test_runs(name, request, monkeypatch, tmp_path):
    if name == "relation_neurons":
        request.getfixturevalue("smollm2_path")
    else:  # a tiny model: compiling takes most of the time
        monkeypatch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
    monkeypatch.setenv("JAXNEURONS_SHORT", "1")
    notebook = nbformat.read(NOTEBOOKS / f"{name}.ipynb", as_version=4)
    NotebookClient(notebook, timeout=600, resources={"metadata": {"path": tmp_path}}).execute()
    assert pictures_of(notebook)


@pytest.mark.parametrize(
    "name", ["ablation", "edit_and_export", "query_neurons", "relation_neurons"]
)
def test_is_stored_as_it_was_executed(name):
    notebook = nbformat.read(NOTEBOOKS / f"{name}.ipynb", as_version=4)
    counts = [cell.execution_count for cell in notebook.cells if cell.cell_type == "code"]
    assert counts == list(range(1, len(counts) + 1))
    assert pictures_of(notebook)
    # What a machine says of itself, or of a failure, is nothing for a page.
    assert {output.output_type for output in outputs_of(notebook)} <= {
        "stream",
        "execute_result",
        "display_data",
    }
    assert not [output for output in outputs_of(notebook) if output.get("name") == "stderr"]


def test_every_notebook_is_tested():
    assert {path.stem for path in NOTEBOOKS.glob("*.ipynb")} == {
        "ablation",
        "edit_and_export",
        "query_neurons",
        "relation_neurons",
    }
