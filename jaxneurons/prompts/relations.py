"""Relations: triples, templates, translations and splits.

Data of arXiv 2502.17355, section 3, in the format of LRE (Hernandez et al. 2024) with three keys
more: `templates` (further sets, by name), `neutral_template` (a sentence that ends in the object)
and `translations` (templates by language, and the subject and object of each sample). Templates are
data: a run names its set, since small models answer the plain form far better than the paper's.
"""

import dataclasses
import os
import re
from collections.abc import Iterable, Mapping
from importlib import resources
from typing import Any

import numpy as np

from jaxneurons.errors import DataError, near_matches
from jaxneurons.storage.csv_file import read_csv
from jaxneurons.storage.json_file import read_value
from jaxneurons.storage.settings import as_path, check_argument, check_number

TEMPLATE_SETS = ("plain", "zero-shot", "answer")
NEUTRAL = "After a while they were talking about {}"


@dataclasses.dataclass(frozen=True)
class Triple:
    """A fact: (subject, relation, object)."""

    subject: str
    object: str


@dataclasses.dataclass(frozen=True)
class Translation:
    """A relation in another language.

    Attributes:
      templates: by set, as in `Relation`.
      triples: by the triple in the relation's own language.
    """

    templates: Mapping[str, tuple[str, ...]]
    triples: Mapping[Triple, Triple]


@dataclasses.dataclass(frozen=True)
class Relation:
    """A relation and its facts.

    Attributes:
      name: unique in a run.
      triples: the facts, in file order, without duplicates.
      templates: by set, prompts with `{}` for the subject. `plain` and `zero-shot` are LRE's own;
        `answer` is the paper's "... is? Answer:" form, made of the plain one.
      subject_type: what the subjects are, "" if not said.
      neutral: a sentence that says nothing of the relation, with `{}` for the object at its end.
      translations: by language.
    """

    name: str
    triples: tuple[Triple, ...]
    templates: Mapping[str, tuple[str, ...]]
    subject_type: str = ""
    neutral: str = NEUTRAL
    translations: Mapping[str, Translation] = dataclasses.field(default_factory=dict)

    def __repr__(self) -> str:
        languages = f", languages: {1 + len(self.translations)}" if self.translations else ""
        return f"<Relation {self.name!r}, facts: {len(self.triples)}{languages}>"

    def wordings(self, sets: Iterable[str]) -> tuple[str, ...]:
        """The templates of some sets together, each once.

        Raises:
          DataError: no template in any of them.
        """
        sets = tuple(sets)
        templates = wordings(self.templates, sets)
        if not templates:
            raise DataError(
                f"relation {self.name!r} has no template set {', '.join(map(repr, sets))}; "
                + near_matches("".join(sets[:1]), self.templates)
            )
        return templates


def wordings(templates: Mapping[str, tuple[str, ...]], sets: Iterable[str]) -> tuple[str, ...]:
    """The templates of some sets together, each once; sets that are not there are passed over."""
    return tuple(dict.fromkeys(template for name in sets for template in templates.get(name, ())))


def prompt(template: str, subject: str) -> str:
    """The template with its subject; the object is never in it."""
    return template.replace("{}", subject)


def objects(triples: Iterable[Triple]) -> dict[str, tuple[str, ...]]:
    """Every right answer by subject: a relation may have several."""
    answers_by_subject: dict[str, dict[str, None]] = {}
    for triple in triples:
        answers_by_subject.setdefault(triple.subject, {})[triple.object] = None
    return {subject: tuple(answers) for subject, answers in answers_by_subject.items()}


def read_relation(path: str | os.PathLike[str]) -> Relation:
    """Read one relation file.

    Raises:
      DataError: a file that cannot be read or is not of this format; names file and entry.
    """
    path = as_path("path", path)
    values = read_value(path)
    if not isinstance(values, dict) or not isinstance(values.get("samples"), list):
        raise DataError(f"{path}: not a relation: an object with name and samples is needed")
    triples: dict[Triple, None] = {}
    others: dict[str, dict[Triple, Triple]] = {}
    for number, sample in enumerate(values["samples"], 1):
        where = f"{path}: sample {number}"
        triple = _triple(sample, where)
        triples[triple] = None
        for language, pair in _object(sample, "translations", where).items():
            others.setdefault(language, {})[triple] = _triple(pair, f"{where}: {language}")
    if not triples:
        raise DataError(f"{path}: no samples")
    templates = _template_sets(values, str(path))
    if not templates:
        raise DataError(f"{path}: no templates: prompt_templates is needed")
    translations = {}
    for language, texts in _object(values, "translations", str(path)).items():
        where = f"{path}: translations: {language}"
        if not isinstance(texts, dict):
            raise DataError(f"{where}: must be an object with prompt_templates")
        sets = _template_sets(texts, where, english=False)
        translations[language] = Translation(sets, others.get(language, {}))
    neutral = values.get("neutral_template", NEUTRAL)
    if not isinstance(neutral, str) or neutral.count("{}") != 1 or not neutral.endswith("{}"):
        raise DataError(f"{path}: neutral_template must be a text that ends in {{}}")
    kind = _object(values, "properties", str(path)).get("domain_name", "")
    return Relation(
        name=path.stem,
        triples=tuple(triples),
        templates=templates,
        subject_type=str(kind),
        neutral=neutral,
        translations=translations,
    )


def _object(values: Any, key: str, where: str) -> dict[str, Any]:
    value = values.get(key)
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise DataError(f"{where}: {key} must be an object")
    return value


def _triple(sample: Any, where: str) -> Triple:
    sample = sample if isinstance(sample, dict) else {}
    pair = [sample.get(key) for key in ("subject", "object")]
    pair = [value.strip() if isinstance(value, str) else "" for value in pair]
    if not all(pair):
        raise DataError(f"{where}: subject and object are needed, as texts")
    return Triple(*pair)


def _template_sets(
    values: dict[str, Any], where: str, *, english: bool = True
) -> dict[str, tuple[str, ...]]:
    plain = _templates(values.get("prompt_templates"), f"{where}: prompt_templates")
    sets = {
        "plain": plain,
        "zero-shot": _templates(values.get("prompt_templates_zs"), f"{where}: prompt_templates_zs"),
        "answer": tuple(map(answer_form, plain)) if english else (),
    }
    for name, templates in _object(values, "templates", where).items():
        sets[name] = _templates(templates, f"{where}: templates: {name}")
    return {name: templates for name, templates in sets.items() if templates}


def _templates(templates: Any, where: str) -> tuple[str, ...]:
    templates = [] if templates is None else templates
    if not isinstance(templates, list) or not all(isinstance(t, str) for t in templates):
        raise DataError(f"{where} must be a list of strings")
    for template in templates:
        if template.count("{}") != 1:
            raise DataError(f"{where}: {template!r} must have one {{}} for the subject")
    return tuple(templates)


def answer_form(template: str) -> str:
    """The paper's form of an English plain template: "The CEO of {} is" -> "... is? Answer:".

    An article, colon or quotation mark that the answer would follow is left out.
    """
    return re.sub(r'(\s+(a|an|the))?[\s?":]*$', "", template) + "? Answer:"


def read_relations(directory: str | os.PathLike[str]) -> list[Relation]:
    """Read every `.json` file of a directory, by name.

    Raises:
      DataError: no such directory, no relations in it, or a file that is not one.
    """
    directory = as_path("directory", directory)
    if not directory.is_dir():
        raise DataError(f"{directory}: no such directory")
    relations = [read_relation(path) for path in sorted(directory.glob("*.json"))]
    if not relations:
        raise DataError(f"{directory}: no relation files (*.json)")
    return relations


def read_counts(path: str | os.PathLike[str]) -> dict[tuple[str, Triple], float]:
    """Read how often facts occur: CSV with the columns relation, subject, object and count.

    Raises:
      DataError: a file that cannot be read or is not of this format; names the line.
    """
    path = as_path("path", path)
    counts: dict[tuple[str, Triple], float] = {}
    for line, row in read_csv(path, ("relation", "subject", "object", "count")):
        relation, subject, object_ = (row[key].strip() for key in ("relation", "subject", "object"))
        try:
            count = float(row["count"])
        except ValueError:
            count = -1.0
        if not (relation and subject and object_) or not 0 <= count < float("inf"):
            raise DataError(
                f"{path}: line {line}: needs relation, subject, object and a count of 0 or more"
            )
        fact = relation, Triple(subject, object_)
        if counts.setdefault(fact, count) != count:
            raise DataError(
                f"{path}: line {line}: the fact {', '.join((relation, subject, object_))} is there "
                f"twice, with the counts {counts[fact]:g} and {count:g}"
            )
    return counts


def bundled_relations() -> list[Relation]:
    """The relations that ship with the package."""
    with resources.as_file(resources.files("jaxneurons.data") / "relations") as directory:
        return read_relations(directory)


@dataclasses.dataclass(frozen=True)
class Split:
    """Facts to detect neurons with, and facts to evaluate on: no subject is in both."""

    detection: tuple[Triple, ...]
    evaluation: tuple[Triple, ...]


def split(relation: Relation, *, evaluation: int = 50, seed: int = 0) -> Split:
    """Hold out about `evaluation` facts, whole subjects at a time, at most half of all.

    Args:
      relation: with at least two subjects.
      evaluation: facts to hold out.
      seed: of the draw.

    Raises:
      DataError: a relation of one subject.
      ConfigError: `evaluation` below 1, or arguments of other types.
    """
    check_argument("relation", Relation, relation)
    check_number("evaluation", evaluation, least=1)
    check_number("seed", seed, least=0)
    subjects = sorted({triple.subject for triple in relation.triples})
    if len(subjects) < 2:
        raise DataError(f"relation {relation.name!r} has one subject; it cannot be split")
    counts = dict.fromkeys(subjects, 0)
    for triple in relation.triples:
        counts[triple.subject] += 1
    held_out = min(evaluation, len(relation.triples) // 2)
    held: set[str] = set()
    total = 0
    for number in np.random.default_rng(seed).permutation(len(subjects)):
        subject = subjects[int(number)]
        if total and total + counts[subject] > held_out:
            continue
        held.add(subject)
        total += counts[subject]
        if total >= held_out:
            break
    return Split(
        detection=tuple(t for t in relation.triples if t.subject not in held),
        evaluation=tuple(t for t in relation.triples if t.subject in held),
    )
