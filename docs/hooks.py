"""Pages of the site that are made from files elsewhere in the repository."""

import re
import shutil
from pathlib import Path
from typing import Literal

import nbformat
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page
from nbconvert import MarkdownExporter

ROOT = Path(__file__).resolve().parent.parent
ELSEWHERE = re.compile(
    r"<(?:link|script|img|iframe|source)\b[^>]*(?:src|href|srcset)=[\"']?(?:https?:)?//[^>]*>"
)
"""What a page would load from another host."""
TEXTS = {"CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md"}


def on_startup(command: Literal["build", "gh-deploy", "serve"], dirty: bool) -> None:
    """Make the folder before mkdocstrings looks for it."""
    _lay_out()


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Renew it whenever the site is built; search from a folder with a script of our own."""
    _lay_out()
    config.extra["polyfills"] = ["file_search.js"]  # for what the plugin `offline` names there
    return config


def _lay_out() -> None:
    """The sources as they are installed: `jaxneurons.convert` lies beside `jaxneurons` here.

    mkdocstrings reads them and imports nothing.
    """
    package = ROOT / "build" / "docs" / "jaxneurons"
    shutil.rmtree(package, ignore_errors=True)
    leave = shutil.ignore_patterns("data", "__pycache__")
    shutil.copytree(ROOT / "jaxneurons", package, ignore=leave)
    shutil.copytree(ROOT / "convert", package / "convert", ignore=leave)


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


def on_post_page(output: str, page: Page, config: MkDocsConfig) -> str:
    """Hold the site to what it promises: it works without a network."""
    if loaded := ELSEWHERE.search(output):
        raise PluginError(f"{page.file.src_uri}: {loaded[0]} is loaded from elsewhere")
    return output
