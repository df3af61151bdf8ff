"""Every notebook runs from top to bottom, shortened."""

from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

NOTEBOOKS = Path(__file__).resolve().parent.parent / "notebooks"


@pytest.mark.parametrize(
    "name", ["query_neurons", pytest.param("relation_neurons", marks=pytest.mark.smollm2)]
)
def test_runs(name, request, monkeypatch, tmp_path):
    if name == "relation_neurons":
        request.getfixturevalue("smollm2_path")
    monkeypatch.setenv("JAXNEURONS_SHORT", "1")
    notebook = nbformat.read(NOTEBOOKS / f"{name}.ipynb", as_version=4)
    NotebookClient(notebook, timeout=600, resources={"metadata": {"path": tmp_path}}).execute()
    pictures = [
        output
        for cell in notebook.cells
        if cell.cell_type == "code"
        for output in cell.outputs
        if "image/png" in output.get("data", {})
    ]
    assert pictures


def test_every_notebook_is_tested():
    assert {path.stem for path in NOTEBOOKS.glob("*.ipynb")} == {
        "query_neurons",
        "relation_neurons",
    }
