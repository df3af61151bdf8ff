"""What a study of relations rests on: answered prompts, responses, average precision, neurons.

What costs time is kept in parts: the model's generations under each set of neurons, the responses,
the average precisions. Nothing is computed twice, and a stopped run goes on where it was, with
identical results.
"""

import dataclasses
import functools
from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from jaxtyping import Bool

from jaxneurons.checkpoints.loading import LM
from jaxneurons.engine.ablation import Shape, default_shape
from jaxneurons.engine.experts import Examples, Expertise, expertise, resolve_k
from jaxneurons.engine.responses import ResponseStore
from jaxneurons.errors import DataError, near_matches
from jaxneurons.neurons.controls import random_sets
from jaxneurons.neurons.sets import NeuronSet
from jaxneurons.processes.sharing import agreed_missing, open_parts, share_parts
from jaxneurons.prompts.relations import Relation, Split, Triple, split
from jaxneurons.relspec import method
from jaxneurons.relspec.continuations import Continuations, check_steps
from jaxneurons.relspec.method import Prompt, RelSpecConfig
from jaxneurons.storage.progress import StageProgress
from jaxneurons.storage.store import digest

RESERVED = ("none", "random", "matched", "own")
"""What the tables call the controls."""

FORMAT = 2
"""Counts up where the same settings give other contents: 2, answers of any length and script."""

Key = TypeVar("Key", bound=Hashable)


@dataclasses.dataclass(frozen=True)
class RelationPrompts:
    """One relation's prompts, and which of them the model answers.

    Attributes:
      split: its facts.
      template: the template of its set that is answered most often, by number.
      accuracies: share of the detection facts answered with each template of the set.
      detection: detection prompts in that template, all of them.
      validated: those that the model answers.
      evaluation: prompts of the held-out facts.
      unknown: why its neurons are not looked for; "" if they are.
    """

    split: Split
    template: int
    accuracies: tuple[float, ...]
    detection: list[Prompt]
    validated: list[Prompt]
    evaluation: list[Prompt]
    unknown: str


class Collection(Continuations):
    """A model, relations and settings, and what the analyses of `Study` rest on.

    Args:
      lm: the model.
      relations: at least two.
      settings: hyper-parameters.
      out: the run directory; None: in memory.
      progress: called with how far each stage is.

    Raises:
      DataError: unusable relations or settings, before anything is computed, or a directory that
        holds a run of another model, other relations or settings.
      ConfigError: steps that leave no room in the model's context.
    """

    def __init__(
        self,
        lm: LM,
        relations: Sequence[Relation],
        *,
        settings: RelSpecConfig,
        out: Path | None,
        progress: StageProgress | None,
    ):
        check_relations(relations, settings)
        check_steps(lm, settings)
        self.relations = {relation.name: relation for relation in relations}
        self.k = resolve_k(settings.k, lm.config, settings.sites)
        self.out = out
        self.identity = {} if out is None else lm.identity()
        contents = {
            **self.identity,
            "format": FORMAT,
            "settings": dataclasses.asdict(settings),
            "relations": digest([_plain(relation) for relation in relations]),
        }
        parts = open_parts(out, contents)
        super().__init__(lm, parts, settings, progress)

    # --- section 1: which prompts does the model answer? ------------------------------------------

    @functools.cached_property
    def prompts(self) -> dict[str, RelationPrompts]:
        """Every relation's prompts: the model answers those of every template of the set once."""
        splits = {name: self._split(relation) for name, relation in self.relations.items()}
        detection = {
            (name, number): method.relation_prompts(
                relation, splits[name].detection, template, evaluation="det"
            )
            for name, relation in self.relations.items()
            for number, template in enumerate(relation.wordings(self.settings.templates))
        }
        correct = self.answered("Asking", detection)
        prompts = {}
        for name, relation in self.relations.items():
            of_templates = [answers for (owner, _), answers in correct.items() if owner == name]
            best = method.best_template(of_templates)
            validated = [
                prompt
                for prompt, is_right in zip(detection[name, best], of_templates[best], strict=True)
                if is_right
            ]
            prompts[name] = RelationPrompts(
                split=splits[name],
                template=best,
                accuracies=tuple(float(answers.mean()) for answers in of_templates),
                detection=detection[name, best],
                validated=validated,
                evaluation=method.relation_prompts(
                    relation,
                    splits[name].evaluation,
                    relation.wordings(self.settings.templates)[best],
                    evaluation="eva",
                ),
                unknown=method.too_few(len(validated), len(detection[name, best]), self.settings),
            )
        return prompts

    def _split(self, relation: Relation) -> Split:
        """A relation's facts; of those to detect with, no more than the settings say."""
        settings = self.settings
        parts = split(relation, evaluation=settings.evaluation, seed=settings.seed)
        detection: tuple[Triple, ...] = parts.detection
        if settings.detection is not None and len(detection) > settings.detection:
            rng = np.random.default_rng([settings.seed, *relation.name.encode()])
            chosen = np.sort(rng.choice(len(detection), settings.detection, replace=False))
            detection = tuple(detection[i] for i in chosen)
        return dataclasses.replace(parts, detection=detection)

    def answered(
        self, stage: str, prompts: Mapping[Key, list[Prompt]]
    ) -> dict[Key, Bool[np.ndarray, " prompt"]]:
        """Which prompts of several groups the model answers with no neuron off."""
        flat = [prompt for group in prompts.values() for prompt in group]
        if not flat:
            return {key: np.zeros(0, bool) for key in prompts}
        base = default_shape()
        shape = Shape(1, base.sets * base.prompts)
        correct = self.judge(self.generate(stage, [NeuronSet()], flat, shape=shape)[0], flat)
        cuts = np.cumsum([len(group) for group in prompts.values()])[:-1]
        return dict(zip(prompts, np.split(correct, cuts), strict=True))

    @functools.cached_property
    def known(self) -> list[str]:
        """Names of the relations whose neurons are looked for.

        Raises:
          DataError: none.
        """
        names = [name for name, prompts in self.prompts.items() if not prompts.unknown]
        if not names:
            counts = {name: len(prompts.validated) for name, prompts in self.prompts.items()}
            best = max(counts, key=counts.__getitem__)
            raise DataError(
                f"the model knows none of the {len(counts)} relations in the template sets "
                f"{', '.join(self.settings.templates)} (most: {best}, {counts[best]} prompts "
                "answered; too few): try other sets or a larger model"
            )
        return names

    @property
    def evaluation(self) -> list[Prompt]:
        """The held-out prompts of all known relations."""
        return [prompt for name in self.known for prompt in self.prompts[name].evaluation]

    @property
    def detection(self) -> list[Prompt]:
        """Up to as many validated detection prompts of each known relation."""
        drawn = []
        for name in self.known:
            validated = self.prompts[name].validated
            rng = np.random.default_rng([self.settings.seed, 1, *name.encode()])
            count = min(len(validated), self.settings.evaluation)
            chosen = np.sort(rng.choice(len(validated), count, replace=False))
            drawn += [validated[i] for i in chosen]
        return drawn

    # --- sections 2 and 3: responses and expertise ------------------------------------------------

    def expertise(
        self,
        kind: str,
        prompts: Sequence[Prompt],
        examples: Mapping[str, Examples],
        sites: Sequence[str],
    ) -> dict[str, Expertise]:
        """Average precision of every neuron for every concept, from responses to `prompts`."""
        responses = ResponseStore(
            None if self.out is None else self.out / "responses" / kind,
            self.encode(prompts),
            config=self.lm.config,
            identity=self.identity,
            dtype=self.settings.dtype,
        )
        key = digest(
            [
                [(prompt.relation, prompt.text) for prompt in prompts],
                {name: [rows.tolist() for rows in rows_of] for name, rows_of in examples.items()},
            ]
        )[:24]
        names = {site: f"experts-{kind}-{site}-{key}" for site in sites}
        missing = agreed_missing(self.parts, names)
        if missing:  # all of it goes through the model once
            responses.fill(
                self.lm.params,
                missing,
                progress=lambda done, total: self.progress(f"Responses ({kind})", done, total),
            )

        def make(site: str) -> dict[str, np.ndarray]:
            before, stage = missing.index(site), f"Average precision ({kind})"
            experts = expertise(
                responses.read,
                examples,
                config=self.lm.config,
                sites=[site],
                progress=lambda done, total: self.progress(
                    stage, before * total + done, len(missing) * total
                ),
            )
            return {
                f"{table}-{number}": getattr(values, table)[site]
                for number, values in enumerate(experts.values())
                for table in _TABLES
            }

        jobs = {site: functools.partial(make, site) for site in names}
        share_parts(self.parts, {names[site]: job for site, job in jobs.items()})
        parts = {site: self.parts.part(names[site], job) for site, job in jobs.items()}
        return {
            name: Expertise(
                *({site: part[f"{table}-{i}"] for site, part in parts.items()} for table in _TABLES)
            )
            for i, name in enumerate(examples)
        }

    def experts(self, sites: Sequence[str] | None = None) -> dict[str, Expertise]:
        """Average precision of every neuron for every known relation."""
        prompts = [prompt for of_one in self.prompts.values() for prompt in of_one.validated]
        names = [prompt.relation for prompt in prompts]
        examples = {
            name: method.examples(names, name, settings=self.settings) for name in self.known
        }
        return self.expertise("relations", prompts, examples, sites or self.settings.sites)

    def neurons(
        self, k: int | None = None, sites: Sequence[str] | None = None
    ) -> dict[str, NeuronSet]:
        """The neurons of every known relation: the k best, see `Expertise.ranked`.

        Args:
          k: how many; default: as the settings say.
          sites: where; default: as the settings say.
        """
        sites = tuple(sites or self.settings.sites)
        return {
            name: scores.top(sites, self.k if k is None else k, self.lm.config)
            for name, scores in self.experts(sites).items()
        }

    def random(
        self, seeds: int, k: int | None = None, sites: Sequence[str] | None = None
    ) -> list[NeuronSet]:
        """As many sets of random neurons."""
        sites, k = tuple(sites or self.settings.sites), self.k if k is None else k
        return random_sets(self.lm.config, sites, k, seed=self.settings.seed, count=seeds)


_TABLES = ("scores", "separations", "medians")
"""Fields of `Expertise`, in their order."""


def check_relations(relations: Sequence[Relation], settings: RelSpecConfig) -> None:
    """Raise `DataError` for relations that cannot make a run, before a model is loaded."""
    names = [relation.name for relation in relations]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise DataError(f"relation {twice[0]!r} is there twice; rename one of the files")
    for name in names:
        if name in RESERVED or "/" in name or not name:
            raise DataError(f"a relation cannot be called {name!r}; rename it")
    if len(names) < 2:
        raise DataError(
            "one relation only: the others' prompts are the negatives that its neurons are told "
            "from; give at least two relations"
        )
    sets = {name: None for relation in relations for name in relation.templates}
    for name in settings.templates:
        if name not in sets:
            raise DataError(f"no template set {name!r} in any relation; {near_matches(name, sets)}")
    for relation in relations:
        relation.wordings(settings.templates)
        split(relation, evaluation=settings.evaluation, seed=settings.seed)


def _plain(relation: Relation) -> Any:
    """A relation as JSON has it, for the run's identity."""
    return [
        relation.name,
        [dataclasses.astuple(triple) for triple in relation.triples],
        {name: list(templates) for name, templates in relation.templates.items()},
        relation.subject_type,
        relation.neutral,
        {
            language: [
                {name: list(templates) for name, templates in translation.templates.items()},
                [
                    [*dataclasses.astuple(triple), *dataclasses.astuple(translated)]
                    for triple, translated in translation.triples.items()
                ],
            ]
            for language, translation in relation.translations.items()
        },
    ]
