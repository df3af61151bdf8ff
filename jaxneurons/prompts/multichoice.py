"""Free-form questions made multiple-choice, so that any answer is one option letter.

Section "multi-choice QA transformation" of arXiv 2406.10868: distractors are answers of other
questions of the same group; the options are shuffled anew in every wording, so that a letter is not
what is found; the model is asked for the letter only. Written in the published format, which
`jaxneurons.prompts.queries` reads.
"""

import dataclasses
import hashlib
import itertools
import json
import os
import re
import unicodedata
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxneurons.errors import DataError, near_matches
from jaxneurons.storage.csv_file import read_csv
from jaxneurons.storage.json_file import read_values
from jaxneurons.storage.settings import as_path, check_argument, check_number

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


def _bundled_wordings(form: str) -> dict[str, tuple[str, ...]]:
    text = (resources.files("jaxneurons.data") / "wordings.json").read_text(encoding="utf-8")
    return {language: tuple(texts) for language, texts in json.loads(text)[form].items()}


TEMPLATES = _bundled_wordings("multi_choice")
"""By language, wordings with the question and its options, one to a line."""

FREE_TEMPLATES = _bundled_wordings("free_form")
"""By language, wordings that the whole answer follows."""


@dataclasses.dataclass(frozen=True)
class Question:
    """A question with a free answer.

    Attributes:
      id: unique.
      text: the question.
      answer: the right one.
      group: domain, relation or language: distractors come from it.
      language: of the wordings.
      relation: of the fact, where a group holds several: distractors are then of the same one.
    """

    id: str
    text: str
    answer: str
    group: str = "all"
    language: str = "en"
    relation: str = ""

    @property
    def pool(self) -> tuple[str, str, str]:
        """Questions that share it lend each other their answers as distractors."""
        return self.group, self.language, self.relation


TABLES = (".csv", ".tsv", ".tab")
"""How the names of files end that are tables; others are JSON."""
_FIELDS = ("id", "group", "language", "relation")


def read_questions(path: str | os.PathLike[str]) -> list[Question]:
    """Read questions: a table (see `TABLES`), a JSON list or JSON Lines.

    Fields: question, answer; if you like group, language, relation, id. Texts stay as they are
    written: "NaN", "None" and "007" are answers.

    Raises:
      DataError: a file that cannot be read, or a question without text or answer; says which.
    """
    path = as_path("path", path)
    questions: dict[str, Question] = {}
    for number, (where, record) in enumerate(_records(path), 1):
        try:
            question = _question(record, number)
        except DataError as error:
            raise DataError(f"{path}: {where}: {error}") from None
        if question.id in questions:
            raise DataError(f"{path}: {where}: the id {question.id!r} is there twice")
        questions[question.id] = question
    if not questions:
        raise DataError(f"{path}: holds no questions")
    return list(questions.values())


def _records(path: Path) -> list[tuple[str, Any]]:
    """What each question is called in messages, and what is written of it."""
    if path.suffix.lower() in TABLES:
        rows = read_csv(path, ("question", "answer"), _FIELDS)
        return [(f"line {line}", row) for line, row in rows]
    records = read_values(path)
    if isinstance(records, Mapping) and _lower(records).keys() & {"question", "answer"}:
        records = [records]  # JSON Lines of one line
    if not isinstance(records, list):
        raise DataError(f"{path}: a list of questions is needed")
    return [(f"question {number}", record) for number, record in enumerate(records, 1)]


def _lower(record: Mapping[str, Any]) -> dict[str, Any]:
    return {key.strip().casefold(): value for key, value in record.items()}


def _question(record: Any, number: int) -> Question:
    if not isinstance(record, Mapping):
        raise DataError(f"an object is needed, got {type(record).__name__}")
    fields = _lower(record)
    if len(fields) != len(record):
        raise DataError(f"two of the keys {', '.join(map(repr, record))} are one but for case")

    def get(key: str, default: str = "") -> str:
        value = fields.get(key)
        if value is None:
            return default
        # Only what is written down again as it was: not 1e5, which would become 100000.0.
        if isinstance(value, bool) or not isinstance(value, str | int):
            raise DataError(f"{key!r} must be a text; put it between quotes")
        return str(value).strip() or default

    question, answer = get("question"), get("answer")
    if not question or not answer:
        named = ", ".join(map(repr, record)) or "none"
        raise DataError(f"question and answer are needed; its fields are {named}")
    return Question(
        id=get("id", str(number)),
        text=question,
        answer=answer,
        group=get("group", "all"),
        language=get("language", "en"),
        relation=get("relation"),
    )


def _bare(text: str) -> str:
    """What two answers that are one have in common: all but case, spaces and outer punctuation.

    Punctuation inside stays, as do signs before a number: "-1" is not "1", "C++" not "C".
    """
    plain = " ".join(unicodedata.normalize("NFKC", text).casefold().split())
    return plain.strip(_OUTER) or plain


_OUTER = " .,;:!?\"'`()[]{}。、，．：；！？「」『』《》«»“”‘’؟،؛"


def _wordings(
    question: Question, templates: Mapping[str, Sequence[str]], count: int
) -> Sequence[str]:
    """The first so many templates of the question's language."""
    if question.language not in templates:
        raise DataError(
            f"question {question.id!r}: no wordings in language {question.language!r}; "
            + near_matches(question.language, templates)
        )
    wordings = templates[question.language]
    if not 1 <= count <= len(wordings):
        raise DataError(f"wordings must be from 1 to {len(wordings)}")
    return wordings[:count]


def multi_choice(
    questions: Sequence[Question],
    *,
    options: int = 4,
    wordings: int = 3,
    seed: int = 0,
    templates: Mapping[str, Sequence[str]] = TEMPLATES,
) -> tuple[dict[str, dict[str, Any]], dict[str, str]]:
    """Questions in the published multi-choice format, several wordings each.

    Args:
      questions: with free answers; distractors are other answers of their group, language and
        relation, never equal to the right one or to each other but for case, spaces and outer
        punctuation.
      options: options of a question.
      wordings: of the language's templates; the options are drawn and shuffled anew in each.
      seed: of the draws. A question's do not depend on the other questions' order.
      templates: by language, texts with `{question}` and `{options}`.

    Returns:
      By id, `sentences`, `obj_label`, `relation_name` (the group), `ori_label` (the answer) and
      `language` (and `relation`, where it has one); and by id, why a question is left out: its
      group has too few other answers.

    Raises:
      DataError: an unknown language, an empty answer, or numbers of options or wordings that there
        are not.
      ConfigError: arguments of other types.
    """
    check_argument("questions", Sequence[Question], questions)
    check_argument("options", int, options)
    check_argument("wordings", int, wordings)
    check_number("seed", seed, least=0)
    if not 2 <= options <= len(LETTERS):
        raise DataError(f"options must be from 2 to {len(LETTERS)}, got {options}")
    for question in questions:
        _wordings(question, templates, wordings)
        if not question.answer.strip():
            raise DataError(f"question {question.id!r}: its answer is empty")
    pools = _pools(questions)
    records, left_out = {}, {}
    for question in questions:
        pool = pools[question.pool].items()
        others = sorted(text for bare, text in pool if bare != _bare(question.answer))
        if len(others) < options - 1:
            left_out[question.id] = (
                f"group {question.group!r} has {len(others)} other answers, {options - 1} needed"
            )
            continue
        texts = _wordings(question, templates, wordings)
        sentences, labels = _shuffled(question, others, texts, options=options, seed=seed)
        records[question.id] = {
            "sentences": sentences,
            "obj_label": labels,
            "relation_name": question.group,
            "ori_label": question.answer,
            "language": question.language,
            **({"relation": question.relation} if question.relation else {}),
        }
    return records, left_out


def _pools(questions: Sequence[Question]) -> dict[tuple[str, str, str], dict[str, str]]:
    """Of each pool, the answers that differ: what they have in common, and how they are written."""
    pools: dict[tuple[str, str, str], dict[str, str]] = {}
    for question in questions:
        pool, key = pools.setdefault(question.pool, {}), _bare(question.answer)
        # Of equal answers the first in the alphabet: which it is must not depend on their order.
        pool[key] = min(pool.get(key, question.answer), question.answer)
    return pools


def _shuffled(
    question: Question,
    others: Sequence[str],
    templates: Sequence[str],
    *,
    options: int,
    seed: int,
) -> tuple[list[str], list[str]]:
    """Prompts of a question with options drawn and shuffled anew in each, and the right letters."""
    key = f"{question.group}\0{question.language}\0{question.text}".encode()
    rng = np.random.default_rng([seed, *hashlib.sha256(key).digest()[:8]])
    sentences, labels = [], []
    for template in templates:
        chosen = [others[int(i)] for i in rng.choice(len(others), options - 1, replace=False)]
        place = int(rng.integers(options))
        chosen.insert(place, question.answer)
        lines = (f" {LETTERS[i]}. {' '.join(text.split())}" for i, text in enumerate(chosen))
        filled = template.replace("{options}", "\n".join(lines))
        sentences.append(filled.replace("{question}", question.text))
        labels.append(LETTERS[place])
    return sentences, labels


def free_form(questions: Sequence[Question], *, wordings: int = 3) -> list[dict[str, Any]]:
    """Questions with their whole answers, in the cloze format of query files.

    The ids are those of `multi_choice`, so that both forms of a question can be compared.

    Raises:
      DataError: an unknown language, or numbers of wordings that there are not.
      ConfigError: arguments of other types.
    """
    check_argument("questions", Sequence[Question], questions)
    check_argument("wordings", int, wordings)
    return [
        {
            "id": question.id,
            "group": question.group,
            "prompts": [
                template.replace("{question}", question.text)
                for template in _wordings(question, FREE_TEMPLATES, wordings)
            ],
            "answer": question.answer,
        }
        for question in questions
    ]


class Parts(NamedTuple):
    """A multi-choice prompt taken apart; put together again it is the same text.

    Attributes:
      before: everything before the first option.
      options: their texts, in order.
      after: everything after the last option.
    """

    before: str
    options: tuple[str, ...]
    after: str


_OPTION_LINE = re.compile(r"^ ([A-Z])\. (.*)$", re.MULTILINE)


def take_apart(prompt: str) -> Parts:
    """A prompt in the published form (options as lines " A. ...") as its parts.

    Raises:
      DataError: no such options in it, from A on and each on a line of its own.
    """
    matches = list(_OPTION_LINE.finditer(prompt))
    starts = [i for i, match in enumerate(matches) if match.group(1) == "A"]
    run = matches[starts[-1] :] if starts else []
    letters = [match.group(1) for match in run]
    joined = all(b.start() == a.end() + 1 for a, b in itertools.pairwise(run))
    if len(run) < 2 or letters != list(LETTERS[: len(run)]) or not joined:
        raise DataError(f"no options as lines ' A. ...' in the prompt {prompt[-80:]!r}")
    return Parts(
        prompt[: run[0].start()],
        tuple(match.group(2) for match in run),
        prompt[run[-1].end() :],
    )


def put_together(parts: Parts) -> str:
    """The prompt that `take_apart` took apart."""
    lines = (f" {letter}. {text}" for letter, text in zip(LETTERS, parts.options, strict=False))
    return parts.before + "\n".join(lines) + parts.after


def free_questions(records: Mapping[str, Mapping[str, Any]]) -> list[Question]:
    """Multi-choice records of the published format as questions with free answers.

    The question is what the wordings have in common right before their options; what some repeat
    after them belongs to the wording. A group that is the name of a language says the language.

    Raises:
      DataError: a record whose wordings differ in their answer, or have no question in common.
    """
    questions = []
    for name, record in records.items():
        parts = [take_apart(sentence) for sentence in record["sentences"]]
        answers = {
            part.options[LETTERS.index(label)]
            for part, label in zip(parts, record["obj_label"], strict=True)
        }
        if len(answers) != 1:
            raise DataError(f"question {name!r}: its wordings have different right answers")
        texts = [part.before.rstrip("\n")[::-1] for part in parts]
        lengths = range(min(map(len, texts)) + 1)
        common = max(n for n in lengths if len({text[:n] for text in texts}) == 1)
        text = texts[0][:common][::-1]
        if len(texts) > 1 and "\n" in text:
            text = text.split("\n", 1)[1]  # the end of the instructions is no part of it
        if not text.strip():
            raise DataError(f"question {name!r}: its wordings have no question in common")
        group = str(record.get("relation_name", "all"))
        questions.append(
            Question(
                name,
                text.strip(),
                " ".join(answers.pop().split()),
                group,
                str(record.get("language", group if group in TEMPLATES else "en")),
                str(record.get("relation", "")),
            )
        )
    return questions
