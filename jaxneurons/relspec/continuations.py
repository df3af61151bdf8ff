"""What a model says after prompts with sets of neurons off, and whether it is right: kept in parts.

How many tokens are generated after a prompt is what its objects need (`RelSpecConfig.steps`). The
generations under a set of neurons are a part of the run, so that analyses share them and a stopped
run goes on where it was, with identical results.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Int

from jaxneurons.checkpoints.loading import LM
from jaxneurons.engine.ablation import Shape, ablated
from jaxneurons.errors import ConfigError, DataError
from jaxneurons.model.token_ids import check_ids
from jaxneurons.neurons.sets import NeuronSet
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

        # Of all sets, kept or not: a resumed run compiles and groups the same program.
        sites = tuple(
            dict.fromkeys([*self.settings.sites, *(s for neurons in sets for s in neurons.codes)])
        )
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

    def _make(
        self,
        group: Group,
        missing: Mapping[str, NeuronSet],
        sites: Sequence[str],
        shape: Shape | None,
        advance: Advance,
    ) -> dict[str, Int[np.ndarray, "prompt step"]]:
        """What the model says after a group's prompts with each of some sets off, by part."""
        most = max(group.steps)
        room = self.lm.config.max_position - max(map(len, group.tokens))
        results = ablated(
            self.lm.params,
            list(missing.values()),
            group.tokens,
            config=self.lm.config,
            steps=max(most, min(self._program(most), room)),
            shape=shape,
            sites=sites,
            progress=advance,
        )
        needed = np.arange(most) < np.array(group.steps)[:, None]

        def make_next() -> dict[str, np.ndarray]:
            _, values = next(results)
            return {KEY: np.where(needed, values[:, :most], NO_STEP).astype(np.int32)}

        # Sets come out in their order.
        return {name: self.parts.part(name, make_next)[KEY] for name in missing}

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
