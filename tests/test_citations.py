"""`jn.citation()` and CITATION.cff name the same works."""

import re
from importlib.metadata import version
from pathlib import Path

import pytest
import yaml

import jaxneurons as jn
from jaxneurons.citations import PAPERS

ROOT = Path(__file__).resolve().parent.parent


def fields(entry: str) -> dict[str, str]:
    """The fields of a BibTeX entry, line breaks and TeX accents away."""
    plain = re.sub(r"\\(?:c|\")\{(\w)\}", r"\1", re.sub(r"\{\\c\{(\w)\}\}", r"\1", entry))
    plain = re.sub(r"\{\\\"(\w)\}", r"\1", plain)
    found = re.findall(r"(\w+) *= \{(.*?)\},\n", plain.replace(",\n}", ",\n\n}"), flags=re.S)
    return {name: " ".join(value.split()) for name, value in found}


def without_accents(name: str) -> str:
    return name.replace("ç", "c").replace("ü", "u")


@pytest.fixture(scope="module")
def cff():
    return yaml.safe_load((ROOT / "CITATION.cff").read_text("utf-8"))


def test_default_is_the_library_and_every_paper():
    entries = jn.citation().split("\n\n")
    papers = [entry for of_method in PAPERS.values() for entry in of_method.split("\n\n")]
    assert len(entries) == 1 + len(papers)
    assert entries[0].startswith("@misc{jaxneurons,")
    assert f"version {version('jaxneurons')}" in entries[0]
    assert entries[1:] == papers
    for entry in entries:
        assert entry.count("{") == entry.count("}")


@pytest.mark.parametrize(("method", "number"), [("qrnca", "2406.10868"), ("relspec", "2502.17355")])
def test_of_one_method(method, number):
    text = jn.citation(method)
    assert len(text.split("\n\n")) == 2
    assert fields(text.split("\n\n")[1])["eprint"] == number


def test_a_method_of_several_papers():
    text = jn.citation("edit")
    numbers = [fields(entry)["eprint"] for entry in text.split("\n\n")[1:]]
    assert numbers == ["2202.05262", "2210.07229", "2410.02355", "2104.08696"]


def test_a_method_named_twice_is_cited_once():
    assert jn.citation("qrnca", "qrnca") == jn.citation("qrnca")


def test_an_unknown_method_names_the_near_one():
    with pytest.raises(jn.ConfigError, match="'relspec'"):
        jn.citation("relspecs")


def test_citation_file_agrees(cff):
    assert cff["version"] == version("jaxneurons")
    references = cff["references"]
    papers = [entry for of_method in PAPERS.values() for entry in of_method.split("\n\n")]
    for reference, entry in zip(references, papers, strict=True):
        bibtex = fields(entry)
        assert bibtex["title"] == reference["title"]
        assert bibtex["year"] == str(reference["year"])
        assert bibtex.get("doi") == reference.get("doi")
        assert f"arXiv:{bibtex['eprint']}" in [i["value"] for i in reference["identifiers"]]
        pages = f"{reference['start']}--{reference['end']}" if "start" in reference else None
        assert bibtex.get("pages") == pages
        assert bibtex["booktitle"] == reference["collection-title"]
        names = [f"{a['family-names']}, {a['given-names']}" for a in reference["authors"]]
        assert bibtex["author"] == " and ".join(map(without_accents, names))


def test_the_papers_are_those_that_pyproject_links(cff):
    project = (ROOT / "pyproject.toml").read_text("utf-8")
    for reference in cff["references"]:
        number = reference["identifiers"][0]["value"].removeprefix("arXiv:")
        assert f"arxiv.org/abs/{number}" in project
