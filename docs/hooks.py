"""Pages of the site that are made from files elsewhere in the repository."""

from pathlib import Path

import nbformat
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from nbconvert import MarkdownExporter

ROOT = Path(__file__).resolve().parent.parent
TEXTS = {"CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md"}


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the notebooks, with the outputs that are stored in them, and texts of the top level.

    Nothing is executed here: `tests/test_notebooks.py` does that.
    """
    for source, page in TEXTS.items():
        files.append(File.generated(config, page, content=(ROOT / source).read_text("utf-8")))
    for path in sorted((ROOT / "notebooks").glob("*.ipynb")):
        text, resources = MarkdownExporter().from_notebook_node(
            nbformat.read(path, as_version=4), resources={"unique_key": path.stem}
        )
        text = text.replace("![png](", f"![Figure of {path.name}](")
        files.append(File.generated(config, f"tutorials/{path.stem}.md", content=text))
        for name, picture in resources["outputs"].items():
            files.append(File.generated(config, f"tutorials/{name}", content=picture))
    return files
