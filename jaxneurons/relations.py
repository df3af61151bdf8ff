"""Relations: triples, templates, splits and when an answer counts as right.

Data of arXiv 2502.17355, section 3, in the format of LRE (Hernandez et al. 2024). Templates are
data: a run names its set, since small models answer the plain form far better than the paper's.
"""

import dataclasses
import json
import os
import re
import unicodedata
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxneurons.errors import DataError, near_matches

TEMPLATE_SETS = ("plain", "zero-shot", "answer")


@dataclasses.dataclass(frozen=True)
class Triple:
    """A fact: (subject, relation, object)."""

    subject: str
    object: str


@dataclasses.dataclass(frozen=True)
class Relation:
    """A relation and its facts.

    Attributes:
      name: unique in a run.
      triples: the facts, in file order, without duplicates.
      templates: by set, prompts with `{}` for the subject. `plain` and `zero-shot` are LRE's own;
        `answer` is the paper's "... is? Answer:" form, made of the plain one.
      subject_type: what the subjects are, "" if not said.
    """

    name: str
    triples: tuple[Triple, ...]
    templates: dict[str, tuple[str, ...]]
    subject_type: str = ""

    def template(self, name: str, number: int = 0) -> str:
        """One template of a set.

        Raises:
          DataError: no such set, or not so many templates in it.
        """
        if name not in self.templates:
            raise DataError(
                f"relation {self.name!r} has no template set {name!r}; "
                + near_matches(name, self.templates)
            )
        found = self.templates[name]
        if not 0 <= number < len(found):
            raise DataError(
                f"relation {self.name!r}: template {number} of {name!r}, there are {len(found)}"
            )
        return found[number]


def prompt(template: str, subject: str) -> str:
    """The template with its subject; the object is never in it."""
    return template.replace("{}", subject)


def read_relation(path: str | os.PathLike[str]) -> Relation:
    """Read one LRE file.

    Raises:
      DataError: a file that cannot be read or is not of this format; names file and entry.
    """
    path = Path(path)
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}") from None
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: not valid JSON: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict) or not isinstance(values.get("samples"), list):
        raise DataError(f"{path}: not a relation: an object with name and samples is needed")
    triples: dict[Triple, None] = {}
    for number, sample in enumerate(values["samples"], 1):
        sample = sample if isinstance(sample, dict) else {}
        pair = [sample.get(key) for key in ("subject", "object")]
        pair = [value.strip() if isinstance(value, str) else "" for value in pair]
        if not all(pair):
            raise DataError(f"{path}: sample {number}: subject and object are needed")
        triples[Triple(*pair)] = None
    if not triples:
        raise DataError(f"{path}: no samples")
    plain = _templates(values, "prompt_templates", path)
    sets = {
        "plain": plain,
        "zero-shot": _templates(values, "prompt_templates_zs", path),
        "answer": tuple(map(answer_form, plain)),
    }
    properties = values.get("properties")
    kind = properties.get("domain_name", "") if isinstance(properties, dict) else ""
    return Relation(
        name=path.stem,
        triples=tuple(triples),
        templates={name: found for name, found in sets.items() if found},
        subject_type=str(kind),
    )


def _templates(values: dict[str, Any], key: str, path: Path) -> tuple[str, ...]:
    found = values.get(key, [])
    if not isinstance(found, list) or not all(isinstance(t, str) for t in found):
        raise DataError(f"{path}: {key} must be a list of strings")
    for template in found:
        if template.count("{}") != 1:
            raise DataError(f"{path}: {key}: {template!r} must have one {{}} for the subject")
    return tuple(found)


def answer_form(template: str) -> str:
    """The paper's form of a plain template: "The CEO of {} is" -> "The CEO of {} is? Answer:"."""
    return template.rstrip(" ?") + "? Answer:"


def read_relations(directory: str | os.PathLike[str]) -> list[Relation]:
    """Read every `.json` file of a directory, by name.

    Raises:
      DataError: no such directory, no relations in it, or a file that is not one.
    """
    directory = Path(directory)
    if not directory.is_dir():
        raise DataError(f"{directory}: no such directory")
    found = [read_relation(path) for path in sorted(directory.glob("*.json"))]
    if not found:
        raise DataError(f"{directory}: no relation files (*.json)")
    return found


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
    """
    subjects = sorted({triple.subject for triple in relation.triples})
    if len(subjects) < 2:
        raise DataError(f"relation {relation.name!r} has one subject; it cannot be split")
    counts = dict.fromkeys(subjects, 0)
    for triple in relation.triples:
        counts[triple.subject] += 1
    wanted = min(evaluation, len(relation.triples) // 2)
    held: set[str] = set()
    total = 0
    for number in np.random.default_rng(seed).permutation(len(subjects)):
        subject = subjects[int(number)]
        if total and total + counts[subject] > wanted:
            continue
        held.add(subject)
        total += counts[subject]
        if total >= wanted:
            break
    return Split(
        detection=tuple(t for t in relation.triples if t.subject not in held),
        evaluation=tuple(t for t in relation.triples if t.subject in held),
    )


def answers(generated: str, expected: str) -> bool:
    """Whether generated text gives the expected object.

    Both are normalised: Unicode compatibility form, case folded, everything but letters and digits
    taken as spaces. Then the words must agree from the first on, until one of the two ends; the
    last word compared may be cut short on the generated side (two tokens rarely end a word), if at
    least three of its letters are there. So " Poland." and "poland and" give "Poland", " new yor"
    gives "New York"; "the Poland", "Polish" and "New" followed by "Jersey" do not.
    """
    said, wanted = _words(generated), _words(expected)
    if not said or not wanted:
        return False
    length = min(len(said), len(wanted))
    if said[: length - 1] != wanted[: length - 1]:
        return False
    last, full = said[length - 1], wanted[length - 1]
    if last == full:
        return True
    return length == len(said) and len(last) >= 3 and full.startswith(last)


def _words(text: str) -> list[str]:
    folded = unicodedata.normalize("NFKC", text).casefold()
    return re.findall(r"[^\W_]+", folded)


def objects(triples: Iterable[Triple], subject: str) -> list[str]:
    """Every right answer for a subject: a relation may have several."""
    return [triple.object for triple in triples if triple.subject == subject]


def any_answers(generated: str, expected: Sequence[str]) -> bool:
    """Whether generated text gives one of the expected objects."""
    return any(answers(generated, one) for one in expected)
