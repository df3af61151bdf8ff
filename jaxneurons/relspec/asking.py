"""Asking a model prompts with sets of neurons off, and judging what it says: kept in a directory.

How many tokens are generated after a prompt is what its objects need (`RelSpecConfig.steps`). What
the model said under a set of neurons is a part of the run directory, so that analyses share their
generations and a stopped run goes on where it was, with identical results.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from jaxneurons.checkpoints.loading import LM
from jaxneurons.engine.ablation import Shape, ablated
from jaxneurons.errors import ConfigError, DataError
from jaxneurons.model.token_ids import check_ids
from jaxneurons.neurons.sets import NeuronSet
from jaxneurons.prompts.answers import encode_answer, encode_prompt
from jaxneurons.prompts.matching import any_answers
from jaxneurons.relspec.method import FEWEST_STEPS, Prompt, RelSpecConfig
from jaxneurons.storage.store import RunDirectory, digest

NOTHING = -1
"""Fills the steps that are not generated after a prompt whose objects need fewer than another's."""

Tell = Callable[[str, int, int], None]
"""Called with (stage, done, of)."""


class Group(NamedTuple):
    """Prompts of one call that one program generates after: numbers, steps and tokens of each."""

    members: list[int]
    steps: list[int]
    tokens: list[tuple[int, ...]]


class Asking:
    """A model that is asked, and what it has said so far.

    Args:
      lm: the model.
      run: where what it says is kept.
      settings: how many tokens are generated; the sites that are switched off.
      tell: told how far each stage is.
    """

    def __init__(self, lm: LM, run: RunDirectory, settings: RelSpecConfig, tell: Tell):
        self.lm, self.run, self.settings, self.tell = lm, run, settings, tell
        self._texts: dict[bytes, tuple[str, bool]] = {}
        self._steps: dict[tuple[str, tuple[str, ...]], int] = {}

    def encode(self, prompts: Sequence[Prompt]) -> list[tuple[int, ...]]:
        """Token ids; says which prompt is empty or leaves no room in the model's context."""
        most = self.lm.config.max_position
        found = []
        for one, steps in zip(prompts, self.steps(prompts), strict=True):
            ids = encode_prompt(self.lm.tokenizer, one.text)
            if len(ids) + steps > most:
                raise DataError(
                    f"relation {one.relation!r}: the prompt {one.text[:60]!r} has {len(ids)} "
                    f"tokens and {steps} are generated after it, the model's context holds {most}"
                )
            check_ids(ids, self.lm.config.vocab_size, self.lm.tokenizer)
            found.append(ids)
        return found

    def steps(self, prompts: Sequence[Prompt]) -> list[int]:
        """Tokens that are generated after each prompt; 0 for one that has no objects.

        A function of prompt and objects alone: a prompt is judged alike whatever is asked with it.
        """
        found = []
        for one in prompts:
            key = one.text, one.objects
            if key not in self._steps:
                self._steps[key] = self._needed(*key) if one.objects else 0
            found.append(self._steps[key])
        return found

    def _needed(self, prompt: str, objects: Sequence[str]) -> int:
        if self.settings.steps is not None:
            return self.settings.steps
        # One more than its tokens shows whether the last word ends there.
        return max(FEWEST_STEPS, *(self._length(prompt, each) + 1 for each in objects))

    def _length(self, prompt: str, answer: str) -> int:
        """Tokens of an answer as it follows its prompt; without a boundary there, one for it."""
        tokenizer = self.lm.tokenizer
        try:
            return len(encode_answer(tokenizer, prompt, answer))
        except DataError:
            return 1 + len(tokenizer(answer, add_special_tokens=False)["input_ids"])  # type: ignore[arg-type]

    def said(
        self,
        stage: str,
        sets: Sequence[NeuronSet],
        prompts: Sequence[Prompt],
        *,
        shape: Shape | None = None,
    ) -> np.ndarray:
        """What the model says with each set off, [set, prompt, step]; from disk if it is there.

        Steps that a prompt does not need are `NOTHING`.
        """
        steps = self.steps(prompts)
        said = np.full((len(sets), len(prompts), max(steps, default=0)), NOTHING, np.int32)
        groups = self._groups(prompts, steps)
        names = [self._names(group, sets) for group in groups]
        kept = [
            {name: self._load(name, group) for name in some}
            for group, some in zip(groups, names, strict=True)
        ]
        done = 0
        total = sum(
            len(group.members) * sum(part is None for part in parts.values())
            for group, parts in zip(groups, kept, strict=True)
        )

        def progress(count: int) -> None:
            nonlocal done
            done += count
            self.tell(stage, done, total)

        # Of all sets, found or not: a resumed run compiles and groups the same program.
        sites = dict.fromkeys([*self.settings.sites, *(site for one in sets for site in one.codes)])
        for group, some, parts in zip(groups, names, kept, strict=True):
            missing = {n: one for n, one in zip(some, sets, strict=True) if parts[n] is None}
            parts |= self._generate(group, missing, tuple(sites), shape, progress)
            for number, name in enumerate(some):
                values = parts[name]
                assert values is not None
                said[number, group.members, : values.shape[1]] = values
        return said

    def _groups(self, prompts: Sequence[Prompt], steps: Sequence[int]) -> list[Group]:
        members: dict[int, list[int]] = {}
        for i, count in enumerate(steps):
            members.setdefault(self._program(count), []).append(i)
        tokens = self.encode(prompts)
        return [
            Group(some, [steps[i] for i in some], [tokens[i] for i in some])
            for _, some in sorted(members.items())
        ]

    def _program(self, steps: int) -> int:
        """Steps of the program that generates for a prompt: 2, 4, 8, ...: few are compiled."""
        return steps if self.settings.steps is not None else 1 << (steps - 1).bit_length()

    def _names(self, group: Group, sets: Sequence[NeuronSet]) -> list[str]:
        where = digest([group.tokens, group.steps])
        return [f"said-{digest([one.digest, where])[:40]}" for one in sets]

    def _load(self, name: str, group: Group) -> np.ndarray | None:
        part = self.run.load(name)
        if part is None or part["said"].shape != (len(group.members), max(group.steps)):
            return None
        return part["said"]

    def _generate(
        self,
        group: Group,
        missing: Mapping[str, NeuronSet],
        sites: Sequence[str],
        shape: Shape | None,
        progress: Callable[[int], None],
    ) -> dict[str, np.ndarray]:
        """What the model says after a group's prompts with each of some sets off."""
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
            progress=progress,
        )
        needed = np.arange(most) < np.array(group.steps)[:, None]
        found = {}
        for (name, _), (_, values) in zip(missing.items(), results, strict=True):
            found[name] = np.where(needed, values[:, :most], NOTHING).astype(np.int32)
            self.run.save(name, {"said": found[name]})
        return found

    def text(self, tokens: np.ndarray) -> str:
        """Generated tokens as text, up to the end-of-sequence token."""
        return self._decoded(tokens)[0]

    def _decoded(self, tokens: np.ndarray) -> tuple[str, bool]:
        """Generated tokens as text, and whether the model ended it."""
        key = tokens.tobytes()
        if key not in self._texts:
            ids = [token for token in tokens.tolist() if token != NOTHING]
            eos = self.lm.tokenizer.eos_token_id
            ended = eos in ids
            if ended:
                ids = ids[: ids.index(eos)]
            self._texts[key] = str(self.lm.tokenizer.decode(ids)), ended
        return self._texts[key]

    def right(self, said: np.ndarray, prompts: Sequence[Prompt]) -> np.ndarray:
        """Whether each answer is right, [..., prompt]."""
        flat = said.reshape(-1, len(prompts), said.shape[-1])
        judged = [
            [self._right(one, p.objects) for one, p in zip(row, prompts, strict=True)]
            for row in flat
        ]
        return np.array(judged, bool).reshape(said.shape[:-1])

    def _right(self, tokens: np.ndarray, objects: Sequence[str]) -> bool:
        text, ended = self._decoded(tokens)
        return any_answers(text, objects, ended=ended)


def check_steps(lm: LM, settings: RelSpecConfig) -> None:
    """Raise `ConfigError` for steps that leave no room for a prompt."""
    most = lm.config.max_position
    if settings.steps is not None and settings.steps >= most:
        raise ConfigError(
            f"steps {settings.steps}: the model's context holds {most} tokens, prompt included; "
            "generate fewer"
        )
