"""A run of QRNCA: the neurons of every query, with all that later stages work on.

`locating.locate` makes one; `opening.open_run` reads one from its directory.
"""

import dataclasses
import functools
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxneurons.checkpoints.loading import LM
from jaxneurons.errors import DataError
from jaxneurons.neurons.sets import Neuron, site_width
from jaxneurons.prompts.answers import TokenPrompt
from jaxneurons.prompts.queries import Query
from jaxneurons.qrnca.encoding import encode_queries, prompt_count
from jaxneurons.qrnca.method import PromptScores, QRNCAConfig, QueryNeurons
from jaxneurons.storage.store import Parts, digest
from jaxneurons.storage.tables import Row, html_table

SHOWN = 8
"""Queries that the `repr` of a run shows."""


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Run(Mapping[str, QueryNeurons]):
    """Query-relevant neurons by query id, with everything that later stages need.

    Attributes:
      lm: the model that the neurons were located in.
      queries: in order, with their separators.
      settings: of the method.
      batch_size: prompts per batch, as `batches.plan` takes it.
      neurons: by query id; what the run is a mapping of.
      common: common neurons with the number of clusters each is in, most frequent first.
      prompts: by query id, the scores of each of its prompts.
      facts: the contents of run.json.
      identity: what the parts depend on.
      store: finished parts of this run and of its later stages.
      path: the directory that it was written to; None: it is in memory alone.
    """

    lm: LM
    queries: list[Query]
    settings: QRNCAConfig
    batch_size: int
    neurons: Mapping[str, QueryNeurons]
    common: list[tuple[Neuron, int]]
    prompts: Mapping[str, Sequence[PromptScores]]
    facts: dict[str, Any]
    identity: dict[str, Any]
    store: Parts
    path: Path | None = None

    def __getitem__(self, query: str) -> QueryNeurons:
        return self.neurons[query]

    def __iter__(self) -> Iterator[str]:
        return iter(self.neurons)

    def __len__(self) -> int:
        return len(self.neurons)

    @functools.cached_property
    def encoded(self) -> list[TokenPrompt]:
        """The token prompts of all queries, in order.

        Raises:
          DataError: the tokenizer makes other tokens of them than when they were located.
        """
        prompts = encode_queries(self.lm, self.queries, self.settings)
        if digest(prompts) != self.identity["prompts"]:
            raise DataError(
                f"{self.path or 'this run'}: its queries become other tokens than those that were "
                "located, so the files or versions have changed; locate again into a new directory"
            )
        return prompts

    @property
    def name(self) -> str:
        """The model's name, short enough for a title."""
        return Path(self.lm.source).name

    @property
    def layers(self) -> int:
        """Layers of the model."""
        return self.lm.config.num_layers

    @property
    def width(self) -> int:
        """Neurons of the site in a layer."""
        return site_width(self.lm.config, self.settings.site)

    @property
    def groups(self) -> dict[str, list[str]]:
        """Ids of the queries of each group, in order."""
        members: dict[str, list[str]] = {}
        for query in self.queries:
            members.setdefault(query.group, []).append(query.id)
        return members

    def owners(self) -> list[str]:
        """The query of each prompt, in the order of `encoded`."""
        return [q.id for q in self.queries for _ in range(prompt_count(q, self.settings))]

    def rows(self) -> list[Row]:
        """A row for each query: how many neurons, how probable its answer, how exact its scores.

        `neurons` is their number, `best` the layer and index of the first; `probability` (of the
        answer) is a mean over its prompts, `gap` the largest completeness gap, in probability.
        """
        rows = []
        for query in self.queries:
            ranking, scores = self.neurons[query.id].ranking, self.prompts[query.id]
            rows.append(
                {
                    "query": query.id,
                    "group": query.group,
                    "neurons": len(ranking),
                    "best": "{}, {}".format(*ranking[0]) if ranking else None,
                    "probability": float(np.mean([prompt.probability for prompt in scores])),
                    "gap": float(max(prompt.gap.max() for prompt in scores)),
                }
            )
        return rows

    def __repr__(self) -> str:
        lines = [self._summary()]
        rows = self.rows()
        wide = max((len(row["query"]) for row in rows[:SHOWN]), default=0)
        lines += [
            f"  {row['query']:{wide}}  {row['neurons']:3} neurons, probability "
            f"{row['probability']:.3f}, gap {row['gap']:.0e}"
            for row in rows[:SHOWN]
        ]
        if len(rows) > SHOWN:
            lines.append(f"  ... and {len(rows) - SHOWN} more")
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        return html_table(self._summary(), self.rows())

    def _summary(self) -> str:
        counts, exact = self.facts["neurons_per_query"], self.facts["completeness"]
        return (
            f"Run on {self.name}, site {self.settings.site!r}: {len(self)} queries, "
            f"{counts['mean']:.1f} neurons each, {len(self.common)} common ones left out, "
            f"completeness gap {exact['gap_max']:.0e} at most"
        )
