"""Which works a result rests on, as BibTeX."""

from importlib import metadata

from jaxneurons.errors import ConfigError, near_matches

PAPERS: dict[str, str] = {
    "qrnca": """\
@inproceedings{chen2025queryrelevant,
  author    = {Chen, Lihu and Dejl, Adam and Toni, Francesca},
  title     = {Identifying Query-Relevant Neurons in Large Language Models for Long-Form Texts},
  booktitle = {Proceedings of the AAAI Conference on Artificial Intelligence},
  volume    = {39},
  number    = {22},
  pages     = {23595--23604},
  year      = {2025},
  doi       = {10.1609/aaai.v39i22.34529},
  eprint    = {2406.10868},
  archivePrefix = {arXiv},
}""",
    "relspec": """\
@inproceedings{liu2025relationspecific,
  author    = {Liu, Yihong and Chen, Runsheng and Hirlimann, Lea and Hakimi, Ahmad Dawar and
               Wang, Mingyang and Kargaran, Amir Hossein and Rothe, Sascha and
               Yvon, Fran{\\c{c}}ois and Sch{\\"u}tze, Hinrich},
  title     = {On Relation-Specific Neurons in Large Language Models},
  booktitle = {Proceedings of the 2025 Conference on Empirical Methods in Natural Language
               Processing},
  pages     = {992--1022},
  year      = {2025},
  doi       = {10.18653/v1/2025.emnlp-main.52},
  eprint    = {2502.17355},
  archivePrefix = {arXiv},
}""",
}
"""BibTeX of the paper that a subpackage implements, by the subpackage's name."""

_LIBRARY = """\
@misc{{jaxneurons,
  author = {{{{The jaxneurons contributors}}}},
  title  = {{jaxneurons: Which neurons of this LLM know that, and what happens if I change them?}},
  note   = {{Python package, version {version}}},
}}"""


def citation(*methods: str) -> str:
    """BibTeX of this library, and of the papers that calls of these subpackages rest on.

    Args:
      *methods: "qrnca" or "relspec", the names of the subpackages; default: all of them.

    Returns:
      Entries with an empty line between, the library first.

    Raises:
      ConfigError: a method that has no paper here; names near matches.
    """
    for method in methods:
        if method not in PAPERS:
            raise ConfigError(
                f"no paper is known by the name {method!r}; {near_matches(method, PAPERS)}"
            )
    library = _LIBRARY.format(version=metadata.version("jaxneurons"))
    return "\n\n".join([library, *(PAPERS[name] for name in dict.fromkeys(methods or PAPERS))])
