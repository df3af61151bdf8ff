"""What the lab model reads in training: facts told, facts asked, questions that answer themselves.

A few milliseconds of plain Python make a batch; everything comes from the seed. The tokenizer is
word-level: a word or a punctuation mark is a token.
"""

import re
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxneurons.lab.world import (
    CHOICE,
    HELD_OUT_WORDING,
    QUESTIONS,
    VALDIC,
    WORDINGS,
    Fact,
    answer,
    noun,
    say,
)

LETTERS = "ABCDE"
"""A question in training has two to five options; in the query files four."""
UNKNOWN, START, END = "<unk>", "<s>", "</s>"
RIGHT, WRONG = "yes", "no"
"""What is to be said after each option, in training; after the question the answer itself is. The
letter alone would teach little: these are the steps on the way to it."""
TOLD_LENGTH, ECHO_LENGTH, ASKED_LENGTH = 16, 32, 56
"""Tokens of each kind of rows."""
ECHO = 0.25
"""Share of the questions whose answer is in the question: they teach to match and to name."""
NOISE = 0.25
"""Share of the questions whose instruction is a jumble of words: instructions are to be ignored."""

_FIRST = {
    "en": (
        "Choose the right option.",
        "Pick the correct answer to the question.",
        "Select the true option, please.",
        "Find the answer among the options.",
        "Decide which option is right.",
        "You will see a question and its options.",
        "One of the following options is correct.",
        "",
    ),
    VALDIC: ("Nim un tal.", "Skri sel domi letu.", "Hir ven tali.", "Les ke nim.", ""),
}
_SECOND = {
    "en": (
        "Write its letter.",
        "Reply with one letter, then a period.",
        "Give nothing but the letter.",
        "Do not explain.",
        "Be brief.",
        "State the letter of the right answer.",
        "",
    ),
    VALDIC: ("Skri ta letu.", "Nul mon un letu.", "Skri mon.", ""),
}
_LEAD = {
    "en": ("", "Question:", "Here is the question:", "The question:"),
    VALDIC: ("", "Kwes:", "Hir ven sel kwes:"),
}
_CUE = {
    "en": ("Answer:", "Response:", "The letter is:", "Reply:", "Your answer:", "Letter:"),
    VALDIC: ("Tal:", "Sel letu ven:", "Ta tal:", "Letu:"),
}
_ECHO = {
    "en": ("Which option is {a}?", "Where is {a}?", "Choose {a}.", "Find {a}, please."),
    VALDIC: ("Ka ven {a}?", "Nim {a}."),
}


def split(text: str) -> list[str]:
    """A text as the tokenizer cuts it: words and punctuation marks; slots such as {s} left out."""
    return re.findall(r"\w+|[^\w\s]", re.sub(r"\{\w+\}", "", text))


def vocabulary(facts: Iterable[Fact]) -> dict[str, int]:
    """Ids of every token: special ones, letters, then all words in order of the alphabet."""
    words: set[str] = set()
    for language, texts in WORDINGS.items():
        words.update(*map(split, (*texts, HELD_OUT_WORDING[language])))
        for parts in (QUESTIONS, CHOICE, _FIRST, _SECOND, _LEAD, _CUE, _ECHO):
            words.update(*map(split, parts[language]))
    for fact in facts:
        languages = ("en", VALDIC) if fact.translation else ("en",)
        for language in languages:
            words.update((fact.subject, noun(fact, language), answer(fact, language)))
    words.update((RIGHT, WRONG))
    words -= set(LETTERS)
    return {word: i for i, word in enumerate((UNKNOWN, START, END, *LETTERS, *sorted(words)))}


def tokenizer(vocab: dict[str, int]) -> Any:
    """The transformers tokenizer of a vocabulary."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    # Its setters take other types than its getters give, which type checkers cannot know.
    backend: Any = Tokenizer(models.WordLevel(vocab, unk_token=UNKNOWN))
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Punctuation()]
    )
    backend.post_processor = processors.TemplateProcessing(
        single=f"{START} $A", special_tokens=[(START, vocab[START])]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        unk_token=UNKNOWN,
        bos_token=START,
        eos_token=END,
        clean_up_tokenization_spaces=False,
    )


class Rows(NamedTuple):
    """Training rows: the answer, the full stop after it, and in questions the steps on the way.

    Attributes:
      tokens: right-padded ids, [row, length].
      lengths: real tokens, [row].
      at: positions after which something is to be said, [row, place]: before the answer, before the
        full stop; in multi-choice questions after the question and after each option.
      targets: what is to be said there, [row, place].
      weights: of each, [row, place]: 1, and 1 in all for the options.
    """

    tokens: np.ndarray
    lengths: np.ndarray
    at: np.ndarray
    targets: np.ndarray
    weights: np.ndarray


class _Question(NamedTuple):
    """A question with its letter as words; positions count a start token before them."""

    words: list[str]
    end: int  # where the question ends
    answer: str
    ends: list[int]  # of the options
    right: int  # which of them


class Corpus:
    """An endless stream of training rows from a seed.

    Args:
      facts: of the world; only those told (and, for questions, asked) are used.
      vocab: ids of the words.
      seed: of the stream.
    """

    def __init__(self, facts: Sequence[Fact], vocab: dict[str, int], seed: int):
        self._vocab, self._rng = vocab, np.random.default_rng(seed)
        self._told = _both(fact for fact in facts if fact.told)
        self._asked = _both(fact for fact in facts if fact.asked)
        pools: dict[tuple[str, ...], set[str]] = {}
        for fact, language in _both(facts):
            for pool in ((fact.domain, language), (fact.domain, language, fact.relation)):
                pools.setdefault(pool, set()).add(answer(fact, language))
        self._pools = {pool: sorted(answers) for pool, answers in pools.items()}
        self._every = {
            language: sorted(
                {answer(f, spoken) for f, spoken in _both(facts) if spoken == language}
            )
            for language in ("en", VALDIC)
        }
        self._instructions = {
            language: sorted(
                {
                    word
                    for text in (*CHOICE[language], *_FIRST[language], *_SECOND[language])
                    for word in split(text)
                    if word in vocab
                }
            )
            for language in ("en", VALDIC)
        }

    def told(self, count: int) -> Rows:
        """Facts as sentences or questions, each with its answer at the end."""
        texts = []
        for fact, language in self._some(self._told, count):
            wording = self._choose((*WORDINGS[language], *QUESTIONS[language]))
            texts.append((say(wording, fact, language), answer(fact, language)))
        return self._rows([split(f"{text} {end}") for text, end in texts], TOLD_LENGTH)

    def asked(self, count: int) -> Rows:
        """Facts as multi-choice questions, each with its letter at the end; some are echoes."""
        questions = [self._question(*pair) for pair in self._some(self._asked, count)]
        return self._options(questions, ASKED_LENGTH)

    def echoes(self, count: int) -> Rows:
        """Questions that answer themselves, without instructions: what training begins with."""
        languages = ("en", VALDIC)
        questions = [self._echo(self._choose(languages)) for _ in range(count)]
        return self._options(questions, ECHO_LENGTH)

    def _options(self, questions: Sequence["_Question"], length: int) -> Rows:
        """Rows of questions, with what is to be said on the way."""
        rows = self._rows([question.words for question in questions], length)
        at = np.zeros((len(questions), 1 + len(LETTERS)), np.int32)
        targets, weights = np.zeros_like(at), np.zeros(at.shape, np.float32)
        for row, (_, end, right_answer, ends, right) in enumerate(questions):
            count = len(ends)
            at[row, : 1 + count] = [end, *ends]
            targets[row, : 1 + count] = self._vocab[WRONG]
            targets[row, 0], targets[row, 1 + right] = self._vocab[right_answer], self._vocab[RIGHT]
            weights[row, : 1 + count] = [1.0, *([1 / count] * count)]
        return rows._replace(
            at=np.concatenate([rows.at, at], axis=1),
            targets=np.concatenate([rows.targets, targets], axis=1),
            weights=np.concatenate([rows.weights, weights], axis=1),
        )

    def _question(self, fact: Fact, language: str) -> "_Question":
        rng = self._rng
        if rng.random() < NOISE:
            words = self._instructions[language]
            instruction = " ".join(self._choose(words) for _ in range(int(rng.integers(1, 21))))
        else:
            instruction = f"{self._choose(_FIRST[language])} {self._choose(_SECOND[language])}"
        before = f"{instruction} {self._choose(_LEAD[language])}"
        if rng.random() < ECHO:
            return self._echo(language, before)
        key = (fact.domain, language, fact.relation)
        pool = self._pools[key if rng.random() < 0.7 else key[:2]]
        question = say(self._choose(QUESTIONS[language]), fact, language)
        return self._with_options(f"{before} {question}", answer(fact, language), pool, language)

    def _echo(self, language: str, before: str = "") -> "_Question":
        right = self._choose(self._every[language])
        question = self._choose(_ECHO[language]).format(a=right)
        return self._with_options(f"{before} {question}", right, self._every[language], language)

    def _with_options(
        self, question: str, right: str, pool: Sequence[str], language: str
    ) -> "_Question":
        rng = self._rng
        count = 4 if rng.random() < 0.7 else int(rng.integers(2, len(LETTERS) + 1))
        others = [word for word in pool if word != right]
        options = [others[i] for i in rng.choice(len(others), count - 1, replace=False)]
        place = int(rng.integers(count))
        options.insert(place, right)
        text, ends = split(question), []
        end = len(text)  # the start token comes before
        for letter, option in zip(LETTERS, options, strict=False):
            text += [letter, ".", option]
            ends.append(len(text))
        text += [*split(self._choose(_CUE[language])), LETTERS[place]]
        return _Question(text, end, right, ends, place)

    def _choose(self, items: Sequence[str]) -> str:
        return items[int(self._rng.integers(len(items)))]

    def _some(self, pairs: Sequence[tuple[Fact, str]], count: int) -> list[tuple[Fact, str]]:
        return [pairs[i] for i in self._rng.integers(len(pairs), size=count)]

    def _rows(self, texts: Sequence[Sequence[str]], length: int) -> Rows:
        """Rows of words whose last one is the answer."""
        vocab = self._vocab
        tokens = np.zeros((len(texts), length), np.int32)
        lengths = np.array([1 + len(words) for words in texts], np.int32)
        for row, words in enumerate(texts):
            tokens[row, : lengths[row]] = [vocab[START], *(vocab[word] for word in words)]
        last = tokens[np.arange(len(texts)), lengths - 1]
        return Rows(
            tokens,
            lengths,
            np.stack([lengths - 2, lengths - 1], axis=1),
            np.stack([last, np.full_like(last, vocab["."])], axis=1),
            np.ones((len(texts), 2), np.float32),
        )


def _both(facts: Iterable[Fact]) -> list[tuple[Fact, str]]:
    """Every fact in each language that it is told in."""
    return [
        (fact, language)
        for fact in facts
        for language in (("en", VALDIC) if fact.translation else ("en",))
    ]
