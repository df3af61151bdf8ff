"""What a model says after prompts with sets of neurons off, and whether it is right: kept in parts.

How many tokens are generated after a prompt is what its objects need (`RelSpecConfig.steps`). The
generations under a set of neurons are a part of the run, so that analyses share them and a stopped
run goes on where it was, with identical results.
"""

import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Int

from jaxneurons.checkpoints.loading import LM
from jaxneurons.engine.ablation import Shape, ablated, default_shape
from jaxneurons.errors import ConfigError, DataError
from jaxneurons.model.token_ids import check_ids
from jaxneurons.neurons.sets import NeuronSet
from jaxneurons.processes.sharing import agreed_missing, share_parts, spread, write_once
from jaxneurons.processes.team import current
from jaxneurons.prompts import batches
from jaxneurons.prompts.answers import encode_answer, encode_prompt
from jaxneurons.prompts.matching import any_answers
from jaxneurons.relspec.method import FEWEST_STEPS, Prompt, RelSpecConfig
from jaxneurons.storage.progress import Advance, StageProgress
from jaxneurons.storage.store import Parts, digest

NO_STEP = -1
"""Fills the steps that are not generated after a prompt whose objects need fewer than another's."""

KEY = "said"
"""Of the array in a part, and how the names of these parts begin: as format 2 has it."""


class Group(NamedTuple):
    """Prompts that one program generates after: their numbers, steps and tokens."""

    members: list[int]
    steps: list[int]
    tokens: list[tuple[int, ...]]


class Piece(NamedTuple):
    """What one process generates at a time: names of the parts, and prompts of the group."""

    sets: tuple[str, ...]
    rows: tuple[int, ...]


class Pieces(NamedTuple):
    """A group's generations in pieces: a batch of prompts with as many sets as go through together.

    A batch holds the same prompts, in the same shape, whoever runs it: see `batches.by_length`.

    Attributes:
      group: the prompts.
      sets: neurons to turn off, by the name of the part.
      sites: that are scaled.
      shape: sets and prompts in a batch; None: what suits the platform.
    """

    group: Group
    sets: dict[str, NeuronSet]
    sites: tuple[str, ...]
    shape: Shape | None

    def pieces(self, missing: Sequence[str]) -> dict[str, Piece]:
        """The pieces of some of the parts, by names of their own."""
        shape = self.shape or default_shape()
        plan = batches.by_length(self.group.tokens, shape.prompts)
        # In chunks of all sets: a piece is the same one in a run that goes on.
        names = list(self.sets)
        chunks = [names[start : start + shape.sets] for start in range(0, len(names), shape.sets)]
        return {
            f"piece-{digest([chunk, batch.index.tolist()])[:40]}": Piece(
                tuple(chunk), tuple(batch.index.tolist())
            )
            for chunk in chunks
            if set(chunk) & set(missing)
            for batch in plan
        }


def _joined(
    pieces: Mapping[str, Piece], made: Mapping[str, np.ndarray], name: str
) -> dict[str, np.ndarray]:
    """The part of one set, from its pieces."""
    of_set = [(piece, made[each]) for each, piece in pieces.items() if name in piece.sets]
    count = sum(len(piece.rows) for piece, _ in of_set)
    tokens = np.zeros((count, of_set[0][1].shape[-1]), np.int32)
    for piece, values in of_set:
        tokens[list(piece.rows)] = values[piece.sets.index(name)]
    return {KEY: tokens}


class Continuations:
    """A model's answers to prompts, with sets of neurons off; none is generated twice.

    Args:
      lm: the model.
      parts: where the generations are kept.
      settings: how many tokens are generated; the sites that are switched off.
      progress: called with how far each stage is.
    """

    def __init__(
        self,
        lm: LM,
        parts: Parts,
        settings: RelSpecConfig,
        progress: StageProgress | None = None,
    ):
        self.lm, self.parts, self.settings = lm, parts, settings
        self.progress: StageProgress = progress or (lambda stage, done, total: None)
        self._texts: dict[bytes, tuple[str, bool]] = {}
        self._steps: dict[tuple[str, tuple[str, ...]], int] = {}

    def encode(self, prompts: Sequence[Prompt]) -> list[tuple[int, ...]]:
        """Token ids; says which prompt is empty or leaves no room in the model's context."""
        most = self.lm.config.max_position
        tokens = []
        for prompt, steps in zip(prompts, self.steps(prompts), strict=True):
            ids = encode_prompt(self.lm.tokenizer, prompt.text)
            if len(ids) + steps > most:
                raise DataError(
                    f"relation {prompt.relation!r}: the prompt {prompt.text[:60]!r} has {len(ids)} "
                    f"tokens and {steps} are generated after it, the model's context holds {most}"
                )
            check_ids(ids, self.lm.config.vocab_size, self.lm.tokenizer)
            tokens.append(ids)
        return tokens

    def steps(self, prompts: Sequence[Prompt]) -> list[int]:
        """Tokens that are generated after each prompt; 0 for one that has no objects.

        A function of prompt and objects alone: an answer is judged alike in any company.
        """
        counts = []
        for prompt in prompts:
            key = prompt.text, prompt.objects
            if key not in self._steps:
                self._steps[key] = self._needed(*key) if prompt.objects else 0
            counts.append(self._steps[key])
        return counts

    def _needed(self, prompt: str, objects: Sequence[str]) -> int:
        if self.settings.steps is not None:
            return self.settings.steps
        # One more than its tokens shows whether the last word ends there.
        return max(FEWEST_STEPS, *(self._length(prompt, answer) + 1 for answer in objects))

    def _length(self, prompt: str, answer: str) -> int:
        """Tokens of an answer as it follows its prompt; without a boundary there, one for it."""
        tokenizer = self.lm.tokenizer
        try:
            return len(encode_answer(tokenizer, prompt, answer))
        except DataError:
            return 1 + len(tokenizer(answer, add_special_tokens=False)["input_ids"])  # type: ignore[arg-type]

    def generate(
        self,
        stage: str,
        sets: Sequence[NeuronSet],
        prompts: Sequence[Prompt],
        *,
        shape: Shape | None = None,
    ) -> Int[np.ndarray, "set prompt step"]:
        """What the model says after each prompt with each set off; as kept, if it is there.

        Args:
          stage: what `progress` is called with.
          sets: neurons to turn off.
          prompts: to be continued.
          shape: sets and prompts in a batch; default: what suits the platform.

        Returns:
          Token ids; steps that a prompt does not need are `NO_STEP`.
        """
        steps = self.steps(prompts)
        tokens = np.full((len(sets), len(prompts), max(steps, default=0)), NO_STEP, np.int32)
        groups = self._groups(prompts, steps)
        names = [_part_names(group, sets) for group in groups]
        # Of all sets, kept or not: a resumed run compiles and groups the same program.
        sites = tuple(
            dict.fromkeys([*self.settings.sites, *(s for neurons in sets for s in neurons.codes)])
        )
        for group, of_group in zip(groups, names, strict=True):
            work = Pieces(group, dict(zip(of_group, sets, strict=True)), sites, shape)
            self._share(work, stage)
        kept = [{name: self._load(name) for name in of_group} for of_group in names]
        done = 0
        total = sum(
            len(group.members) * sum(values is None for values in parts.values())
            for group, parts in zip(groups, kept, strict=True)
        )

        def advance(count: int) -> None:
            nonlocal done
            done += count
            self.progress(stage, done, total)

        for group, of_group, parts in zip(groups, names, kept, strict=True):
            missing = {
                name: neurons
                for name, neurons in zip(of_group, sets, strict=True)
                if parts[name] is None
            }
            made = self._make(group, missing, sites, shape, advance)
            for number, name in enumerate(of_group):
                values = made[name] if name in made else parts[name]
                assert values is not None
                tokens[number, group.members, : values.shape[1]] = values
        return tokens

    def _groups(self, prompts: Sequence[Prompt], steps: Sequence[int]) -> list[Group]:
        members: dict[int, list[int]] = {}
        for i, count in enumerate(steps):
            members.setdefault(self._program(count), []).append(i)
        tokens = self.encode(prompts)
        return [
            Group(numbers, [steps[i] for i in numbers], [tokens[i] for i in numbers])
            for _, numbers in sorted(members.items())
        ]

    def _program(self, steps: int) -> int:
        """Steps of the program that generates for a prompt: 2, 4, 8, ...: few are compiled."""
        return steps if self.settings.steps is not None else 1 << (steps - 1).bit_length()

    def _load(self, name: str) -> np.ndarray | None:
        part = self.parts.load(name)
        return None if part is None else part[KEY]

    def _share(self, work: "Pieces", stage: str) -> None:
        """Generate with the other processes what is missing of a group, piece by piece.

        Where this one is alone, only what pieces of a stopped or merged run are there for.
        """
        if self.parts.path is None:
            return
        missing = agreed_missing(self.parts, {name: name for name in work.sets})
        pieces = work.pieces(missing) if missing else {}
        if not pieces:
            return
        alone = current().count == 1
        if alone and all(self.parts.load(name) is None for name in pieces):
            return
        jobs = {name: functools.partial(self._piece, work, piece) for name, piece in pieces.items()}
        share_parts(
            self.parts,
            jobs,
            together=spread(self.lm.params),
            sizes=[len(piece.sets) * len(piece.rows) for piece in pieces.values()],
            progress=functools.partial(self.progress, stage),
        )
        made = {name: self.parts.part(name, make)[KEY] for name, make in jobs.items()}
        whole = {name: functools.partial(_joined, pieces, made, name) for name in missing}
        share_parts(self.parts, whole)
        for name, make in whole.items():
            self.parts.part(name, make)
        write_once("pieces", lambda: [self.parts.remove(name) for name in pieces])

    def _piece(self, work: "Pieces", piece: "Piece") -> dict[str, np.ndarray]:
        tokens = [work.group.tokens[row] for row in piece.rows]
        results = self._generations(
            work.group, [work.sets[name] for name in piece.sets], tokens, work.sites, work.shape
        )
        values = np.stack([ids for _, ids in results])
        return {KEY: self._needed_steps(work.group, piece.rows, values)}

    def _make(
        self,
        group: Group,
        missing: Mapping[str, NeuronSet],
        sites: Sequence[str],
        shape: Shape | None,
        advance: Advance,
    ) -> dict[str, Int[np.ndarray, "prompt step"]]:
        """What the model says after a group's prompts with each of some sets off, by part."""
        results = self._generations(
            group, list(missing.values()), group.tokens, sites, shape, advance
        )
        rows = range(len(group.members))

        def make_next() -> dict[str, np.ndarray]:
            _, values = next(results)
            return {KEY: self._needed_steps(group, rows, values)}

        # Sets come out in their order.
        return {name: self.parts.part(name, make_next)[KEY] for name in missing}

    def _generations(
        self,
        group: Group,
        sets: Sequence[NeuronSet],
        tokens: Sequence[tuple[int, ...]],
        sites: Sequence[str],
        shape: Shape | None,
        advance: Advance | None = None,
    ) -> Iterator[tuple[int, Int[np.ndarray, "prompt step"]]]:
        """What the model says after some of a group's prompts, by the group's program."""
        most = max(group.steps)
        room = self.lm.config.max_position - max(map(len, group.tokens))
        return ablated(
            self.lm.params,
            sets,
            tokens,
            config=self.lm.config,
            steps=max(most, min(self._program(most), room)),
            shape=shape,
            sites=sites,
            progress=advance,
        )

    def _needed_steps(
        self, group: Group, rows: Sequence[int], values: Int[np.ndarray, "*sets prompt step"]
    ) -> Int[np.ndarray, "*sets prompt most"]:
        """Generations as they are kept: without the steps that a prompt does not need."""
        steps = np.array([group.steps[row] for row in rows])
        most = max(group.steps)
        needed = np.arange(most) < steps[:, None]
        return np.where(needed, values[..., :most], NO_STEP).astype(np.int32)

    def decode(self, tokens: Int[np.ndarray, " step"]) -> str:
        """Generated tokens as text, up to the end-of-sequence token."""
        return self._decode(tokens)[0]

    def _decode(self, tokens: np.ndarray) -> tuple[str, bool]:
        """Generated tokens as text, and whether the model ended it."""
        key = tokens.tobytes()
        if key not in self._texts:
            ids = [token for token in tokens.tolist() if token != NO_STEP]
            eos = self.lm.tokenizer.eos_token_id
            ended = eos in ids
            if ended:
                ids = ids[: ids.index(eos)]
            self._texts[key] = str(self.lm.tokenizer.decode(ids)), ended
        return self._texts[key]

    def judge(
        self, generations: Int[np.ndarray, "*sets prompt step"], prompts: Sequence[Prompt]
    ) -> Bool[np.ndarray, "*sets prompt"]:
        """Whether each answer is right."""
        flat = generations.reshape(-1, len(prompts), generations.shape[-1])
        correct = [
            [
                self._is_right(tokens, prompt.objects)
                for tokens, prompt in zip(row, prompts, strict=True)
            ]
            for row in flat
        ]
        return np.array(correct, bool).reshape(generations.shape[:-1])

    def _is_right(self, tokens: np.ndarray, objects: Sequence[str]) -> bool:
        text, ended = self._decode(tokens)
        return any_answers(text, objects, ended=ended)


def _part_names(group: Group, sets: Sequence[NeuronSet]) -> list[str]:
    """Names of the parts: a function of the tokens, their steps and the neurons."""
    where = digest([group.tokens, group.steps])
    return [f"{KEY}-{digest([neurons.digest, where])[:40]}" for neurons in sets]


def check_steps(lm: LM, settings: RelSpecConfig) -> None:
    """Raise `ConfigError` for steps that leave no room for a prompt."""
    most = lm.config.max_position
    if settings.steps is not None and settings.steps >= most:
        raise ConfigError(
            f"steps {settings.steps}: the model's context holds {most} tokens, prompt included; "
            "generate fewer"
        )
