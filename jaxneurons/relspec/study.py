"""A run directory for relation-specific neurons: every stage resumable, nothing computed twice.

What costs time is kept in parts: what the model said after each prompt under each set of neurons,
the responses, the average precisions. The same question asked again is read from disk, so that
analyses share their generations and a stopped run goes on where it was, with identical results.
"""

import dataclasses
import functools
import os
import platform
from collections.abc import Mapping, Sequence
from importlib import metadata
from typing import Any

import numpy as np

from jaxneurons.checkpoints.loading import LM
from jaxneurons.engine.ablation import Shape, default_shape
from jaxneurons.engine.experts import Examples, Expertise, expertise, resolve_k
from jaxneurons.engine.responses import ResponseStore
from jaxneurons.errors import DataError, near_matches
from jaxneurons.neurons.controls import random_sets
from jaxneurons.neurons.sets import NeuronSet, neuron_count
from jaxneurons.prompts.relations import Relation, Split, split
from jaxneurons.relspec import method as relspec
from jaxneurons.relspec.asking import Asking, Tell, check_steps
from jaxneurons.relspec.method import Prompt, RelSpecConfig
from jaxneurons.storage.store import RunDirectory, digest

RESERVED = ("none", "random", "matched", "own")
"""What the tables call the controls."""

FORMAT = 2
"""Counts up where the same settings give other contents: 2, answers of any length and script."""


@dataclasses.dataclass(frozen=True)
class Asked:
    """One relation, asked.

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


class Study(Asking):
    """A model, relations and settings, and everything found out about them so far.

    Args:
      lm: the model.
      relations: at least two.
      out: the run directory.
      settings: hyper-parameters.
      tell: told how far each stage is.

    Raises:
      DataError: unusable relations or settings, before anything is computed, or a directory that
        holds a run of another model, other relations or settings.
      ConfigError: steps that leave no room in the model's context.
    """

    def __init__(
        self,
        lm: LM,
        relations: Sequence[Relation],
        out: str | os.PathLike[str],
        *,
        settings: RelSpecConfig = RelSpecConfig(),
        tell: Tell = lambda stage, done, total: None,
    ):
        check_relations(relations, settings)
        check_steps(lm, settings)
        self.relations = {relation.name: relation for relation in relations}
        self.k = resolve_k(settings.k, lm.config, settings.sites)
        self.identity = lm.identity()
        run = RunDirectory(
            out,
            {
                **self.identity,
                "format": FORMAT,
                "settings": dataclasses.asdict(settings),
                "relations": digest([_plain(relation) for relation in relations]),
            },
        )
        super().__init__(lm, run, settings, tell)

    # --- section 1: which prompts does the model answer? ------------------------------------------

    @functools.cached_property
    def asked(self) -> dict[str, Asked]:
        """Every relation, asked in every template of the set."""
        settings = self.settings
        splits = {}
        for name, relation in self.relations.items():
            parts = split(relation, evaluation=settings.evaluation, seed=settings.seed)
            detection = parts.detection
            if settings.detection is not None and len(detection) > settings.detection:
                rng = np.random.default_rng([settings.seed, *name.encode()])
                chosen = np.sort(rng.choice(len(detection), settings.detection, replace=False))
                detection = tuple(detection[i] for i in chosen)
            splits[name] = dataclasses.replace(parts, detection=detection)
        forms = [
            (name, number)
            for name, relation in self.relations.items()
            for number in range(len(relation.wordings(settings.templates)))
        ]
        prompts = {
            form: self.prompts(form[0], splits[form[0]].detection, form[1]) for form in forms
        }
        right = self.untouched("Asking", prompts)
        found = {}
        for name in self.relations:
            each = [right[form] for form in forms if form[0] == name]
            best = relspec.best_template(each)
            asked = prompts[name, best]
            validated = [one for one, yes in zip(asked, each[best], strict=True) if yes]
            found[name] = Asked(
                split=splits[name],
                template=best,
                accuracies=tuple(float(one.mean()) for one in each),
                detection=asked,
                validated=validated,
                evaluation=self.prompts(name, splits[name].evaluation, best, evaluation="eva"),
                unknown=relspec.too_few(len(validated), len(asked), settings),
            )
        return found

    def prompts(
        self, name: str, triples: Any, template: int, *, evaluation: str = "det"
    ) -> list[Prompt]:
        """Prompts of some triples in one template of the run's set."""
        relation = self.relations[name]
        wording = relation.wordings(self.settings.templates)[template]
        return relspec.asked(relation, triples, wording, evaluation=evaluation)

    def untouched(self, stage: str, prompts: Mapping[Any, list[Prompt]]) -> dict[Any, np.ndarray]:
        """Which prompts of several groups the model answers with no neuron off."""
        flat = [one for group in prompts.values() for one in group]
        if not flat:
            return {key: np.zeros(0, bool) for key in prompts}
        base = default_shape()
        shape = Shape(1, base.sets * base.prompts)
        right = self.right(self.said(stage, [NeuronSet()], flat, shape=shape)[0], flat)
        cuts = np.cumsum([len(group) for group in prompts.values()])[:-1]
        return dict(zip(prompts, np.split(right, cuts), strict=True))

    @functools.cached_property
    def known(self) -> list[str]:
        """Names of the relations whose neurons are looked for.

        Raises:
          DataError: none.
        """
        found = [name for name, asked in self.asked.items() if not asked.unknown]
        if not found:
            counts = {name: len(asked.validated) for name, asked in self.asked.items()}
            best = max(counts, key=counts.__getitem__)
            raise DataError(
                f"the model knows none of the {len(counts)} relations in the template sets "
                f"{', '.join(self.settings.templates)} (most: {best}, {counts[best]} prompts "
                "answered; too few): try other sets or a larger model"
            )
        return found

    @property
    def evaluation(self) -> list[Prompt]:
        """The held-out prompts of all known relations."""
        return [one for name in self.known for one in self.asked[name].evaluation]

    @property
    def detection(self) -> list[Prompt]:
        """Up to as many validated detection prompts of each known relation."""
        found = []
        for name in self.known:
            some = self.asked[name].validated
            rng = np.random.default_rng([self.settings.seed, 1, *name.encode()])
            count = min(len(some), self.settings.evaluation)
            found += [some[i] for i in np.sort(rng.choice(len(some), count, replace=False))]
        return found

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
            self.run.path / "responses" / kind,
            self.encode(prompts),
            config=self.lm.config,
            identity=self.identity,
            dtype=self.settings.dtype,
        )
        key = digest(
            [
                [(one.relation, one.text) for one in prompts],
                {name: [part.tolist() for part in one] for name, one in examples.items()},
            ]
        )[:24]
        parts = {site: self.run.load(f"experts-{kind}-{site}-{key}") for site in sites}
        missing = [site for site, part in parts.items() if part is None]
        if missing:
            responses.fill(
                self.lm.params,
                missing,
                progress=lambda done, total: self.tell(f"Responses ({kind})", done, total),
            )
            found = expertise(
                responses.read,
                examples,
                config=self.lm.config,
                sites=missing,
                progress=lambda done, total: self.tell(f"Average precision ({kind})", done, total),
            )
            for site in missing:
                part = {
                    f"{what}-{number}": getattr(one, what)[site]
                    for number, one in enumerate(found.values())
                    for what in ("scores", "separations", "medians")
                }
                self.run.save(f"experts-{kind}-{site}-{key}", part)
                parts[site] = part
        return {
            name: Expertise(
                *(
                    {site: part[f"{what}-{number}"] for site, part in parts.items() if part}
                    for what in ("scores", "separations", "medians")
                )
            )
            for number, name in enumerate(examples)
        }

    def experts(self, sites: Sequence[str] | None = None) -> dict[str, Expertise]:
        """Average precision of every neuron for every known relation."""
        prompts = [one for asked in self.asked.values() for one in asked.validated]
        owner = [one.relation for one in prompts]
        examples = {
            name: relspec.examples(owner, name, settings=self.settings) for name in self.known
        }
        return self.expertise("relations", prompts, examples, sites or self.settings.sites)

    def neurons(
        self, k: int | None = None, sites: Sequence[str] | None = None
    ) -> dict[str, NeuronSet]:
        """The neurons of every known relation: the k best, see `Expertise.ranked`."""
        sites = tuple(sites or self.settings.sites)
        return {
            name: one.top(sites, self.k if k is None else k, self.lm.config)
            for name, one in self.experts(sites).items()
        }

    def random(
        self, seeds: int, k: int | None = None, sites: Sequence[str] | None = None
    ) -> list[NeuronSet]:
        """As many sets of random neurons."""
        sites, k = tuple(sites or self.settings.sites), self.k if k is None else k
        return random_sets(self.lm.config, sites, k, seed=self.settings.seed, count=seeds)

    # --- provenance -------------------------------------------------------------------------------

    def facts(self) -> dict[str, Any]:
        """What run.json says: model, settings, versions."""
        packages = ("jaxneurons", "jax", "jaxlib", "flax", "transformers", "tokenizers", "numpy")
        return {
            "method": "relation-specific neurons (arXiv 2502.17355)",
            "model": self.lm.facts(),
            "settings": dataclasses.asdict(self.settings),
            "neurons": {
                "k": self.k,
                "of": neuron_count(self.lm.config, self.settings.sites),
                "sites": list(self.settings.sites),
            },
            "relations": {
                "asked": len(self.relations),
                "known": self.known,
                "unknown": {n: one.unknown for n, one in self.asked.items() if one.unknown},
            },
            "seeds": {"splits, negatives, random sets": self.settings.seed},
            "versions": {
                **{name: metadata.version(name) for name in packages},
                "python": platform.python_version(),
                "platform": platform.platform(),
            },
        }


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
    return [
        relation.name,
        [dataclasses.astuple(triple) for triple in relation.triples],
        {name: list(found) for name, found in relation.templates.items()},
        relation.subject_type,
        relation.neutral,
        {
            language: [
                {name: list(found) for name, found in one.templates.items()},
                [
                    [*dataclasses.astuple(own), *dataclasses.astuple(other)]
                    for own, other in one.triples.items()
                ],
            ]
            for language, one in relation.translations.items()
        },
    ]
