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
    "edit": """\
@inproceedings{meng2022locating,
  author    = {Meng, Kevin and Bau, David and Andonian, Alex and Belinkov, Yonatan},
  title     = {Locating and Editing Factual Associations in GPT},
  booktitle = {Advances in Neural Information Processing Systems},
  volume    = {35},
  pages     = {17359--17372},
  year      = {2022},
  eprint    = {2202.05262},
  archivePrefix = {arXiv},
}

@inproceedings{meng2023massediting,
  author    = {Meng, Kevin and Sharma, Arnab Sen and Andonian, Alex and Belinkov, Yonatan and
               Bau, David},
  title     = {Mass-Editing Memory in a Transformer},
  booktitle = {International Conference on Learning Representations},
  year      = {2023},
  eprint    = {2210.07229},
  archivePrefix = {arXiv},
}

@inproceedings{fang2025alphaedit,
  author    = {Fang, Junfeng and Jiang, Houcheng and Wang, Kun and Ma, Yunshan and Jie, Shi and
               Wang, Xiang and He, Xiangnan and Chua, Tat-Seng},
  title     = {AlphaEdit: Null-Space Constrained Knowledge Editing for Language Models},
  booktitle = {International Conference on Learning Representations},
  year      = {2025},
  eprint    = {2410.02355},
  archivePrefix = {arXiv},
}

@inproceedings{dai2022knowledge,
  author    = {Dai, Damai and Dong, Li and Hao, Yaru and Sui, Zhifang and Chang, Baobao and
               Wei, Furu},
  title     = {Knowledge Neurons in Pretrained Transformers},
  booktitle = {Proceedings of the 60th Annual Meeting of the Association for Computational
               Linguistics (Volume 1: Long Papers)},
  pages     = {8493--8502},
  year      = {2022},
  doi       = {10.18653/v1/2022.acl-long.581},
  eprint    = {2104.08696},
  archivePrefix = {arXiv},
}""",
}
"""BibTeX of the papers that a subpackage implements, by the subpackage's name."""

_LIBRARY = """\
@misc{{jaxneurons,
  author = {{{{The jaxneurons contributors}}}},
  title  = {{jaxneurons: Which neurons of this LLM know that, and what happens if I change them?}},
  note   = {{Python package, version {version}}},
}}"""


def citation(*methods: str) -> str:
    """BibTeX of this library, and of the papers that calls of these subpackages rest on.

    Args:
      *methods: "qrnca", "relspec" or "edit", the names of the subpackages; default: all of them.

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
