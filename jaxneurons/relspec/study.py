"""A study of relation-specific neurons: the paper's analyses, in memory or in a directory."""

import dataclasses
import html
import os
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxneurons.checkpoints.loading import LM
from jaxneurons.checkpoints.provenance import versions
from jaxneurons.errors import ConfigError, DataError
from jaxneurons.model.axis_types import any_axes
from jaxneurons.neurons.sets import NeuronSet, neuron_count, neuron_table
from jaxneurons.processes.sharing import write_once
from jaxneurons.prompts.relations import Relation
from jaxneurons.relspec import analyses, drops, wordings
from jaxneurons.relspec.analyses import Counts
from jaxneurons.relspec.collection import Collection
from jaxneurons.relspec.drops import TableRows, mean_drops, relation_sets
from jaxneurons.relspec.figures import make_figures
from jaxneurons.relspec.method import RelSpecConfig
from jaxneurons.relspec.registry import ANALYSES, DROPS, SkippedWarning, choose
from jaxneurons.storage.progress import StageProgress
from jaxneurons.storage.settings import check_argument
from jaxneurons.storage.store import make_directory, null_for_nan, write_json, write_text
from jaxneurons.storage.tables import Table, Tables, as_table, read_tables, write_table

if TYPE_CHECKING:
    from matplotlib.figure import Figure
else:  # imported where figures are drawn
    Figure = Any

NOTHING = "these relations have nothing to measure"


@any_axes
class Study(Collection):
    """Which neurons serve a relation, and what is lost without them?

    A method for each analysis gives its table; those that make further ones leave them in `tables`.
    What an analysis needs is computed when it is first asked for, and kept.

    Args:
      lm: the model.
      relations: at least two; `bundled` and `read_relations` give some.
      settings: hyper-parameters.
      out: a run directory: what is computed is kept there, tables are written there, and the same
        call takes a stopped run up again. None: nothing touches the disk.
      progress: called with (stage, done, of).

    Raises:
      ConfigError: an argument of another type; steps that leave no room in the model's context.
      DataError: unusable relations or settings, before anything is computed, or a directory that
        holds a run of another model, other relations or settings.
    """

    def __init__(
        self,
        lm: LM,
        relations: Sequence[Relation],
        *,
        settings: RelSpecConfig = RelSpecConfig(),
        out: str | os.PathLike[str] | None = None,
        progress: StageProgress | None = None,
    ):
        check_argument("lm", LM, lm)
        check_argument("relations", Sequence[Relation], relations)
        check_argument("settings", RelSpecConfig, settings)
        check_argument("out", str | os.PathLike | None, out)
        check_argument("progress", Callable | None, progress)
        super().__init__(
            lm,
            relations,
            settings=settings,
            out=None if out is None else Path(out),
            progress=progress,
        )
        self._rows: TableRows = {}

    # --- the stages -------------------------------------------------------------------------------

    def collect(self) -> Table:
        """Stage 1: the model answers every detection prompt; responses to those that it knows.

        Returns:
          A row for each relation: its template, its prompts, those answered, why it is unknown.

        Raises:
          DataError: the model knows none of the relations.
        """
        tables = wordings.relations(self)
        self._keep(tables)
        if self.known:
            self.experts()
        return as_table(tables["relations"])

    def write_neurons(self, directory: str | os.PathLike[str] | None = None) -> list[Path]:
        """Stage 2: the neurons of each relation with their scores, as CSV for `read_neurons`.

        Args:
          directory: made if it is missing; default: `neurons` in the run directory.

        Raises:
          ConfigError: no directory, neither here nor of the run.
        """
        if directory is None and self.out is None:
            raise ConfigError("no directory to write neurons to: this study is in memory; name one")
        place = Path(directory) if directory is not None else Path(self.out or "") / "neurons"
        experts, texts = self.experts(), {}
        for name, neurons in self.neurons().items():
            scores = experts[name]
            texts[place / f"{name}.csv"] = neuron_table(
                neurons,
                average_precision=scores.scores,
                separation=scores.separations,
                median_response=scores.medians,
            )

        def write() -> None:
            make_directory(place)
            for path, text in texts.items():
                write_text(path, text)

        write_once("neurons", write)
        return list(texts)

    def analyse(
        self, names: str | Sequence[str] = "default", *, counts: Counts | None = None
    ) -> Tables:
        """Stages 3 and 4: some analyses; their tables are written as they finish.

        One that cannot be made is skipped, with a `SkippedWarning` and the reason in run.json.

        Args:
          names: of analyses, "default" or "all".
          counts: how often each fact occurs, for the analysis "frequency".

        Raises:
          DataError: an unknown name, or the model knows none of the relations.
        """
        chosen = choose(names, counts=counts is not None)
        tables = wordings.relations(self)
        self._keep(tables)
        _ = self.known  # nothing can be made without
        seconds, skipped = {}, {}
        for name in chosen:
            start = time.perf_counter()
            try:
                rows = self._analysis(name, counts)
            except DataError as error:
                skipped[name] = str(error)
                warnings.warn(f"{name} skipped: {error}", SkippedWarning, stacklevel=2)
                continue
            seconds[name] = round(time.perf_counter() - start, 2)
            if not any(rows.values()):
                skipped[name] = NOTHING
                warnings.warn(f"{name} skipped: {NOTHING}", SkippedWarning, stacklevel=2)
            self._keep(rows)
            tables |= rows
        self._finish(seconds, skipped)
        return Tables(tables, path=self.out)

    # --- the analyses, each by itself -------------------------------------------------------------

    def ablation(self) -> Table:
        """Accuracy on held-out and detection facts with each relation's neurons off, or random."""
        return self._table("ablation")

    def layers(self) -> Table:
        """How many neurons of each relation are in each layer and site."""
        return self._table("layers")

    def overlap(self) -> Table:
        """How many neurons two relations share, and how many two random sets would."""
        return self._table("overlap")

    def errors(self) -> Table:
        """What wrong answers look like; every answer is in the table "answers"."""
        return self._table("errors")

    def templates(self) -> Table:
        """Accuracy in another wording, the same neurons off: the table "robustness".

        How often each wording is answered is in the table "templates".
        """
        return self._table("templates", "robustness")

    def perplexity(self) -> Table:
        """Perplexity of sentences that say nothing of a relation, its neurons off, or random."""
        return self._table("perplexity")

    def multilingual(self) -> Table:
        """Accuracy in other languages; which are known is in the table "languages"."""
        return self._table("multilingual")

    def concepts(self) -> Table:
        """Neurons that relations share with those of subjects' types.

        Also the tables "concept_validation" and "concept_ablation".
        """
        return self._table("concepts")

    def sizes(self) -> Table:
        """Accuracy with more and more neurons of each relation off."""
        return self._table("sizes")

    def cumulativity(self) -> Table:
        """Answers that more neurons break and the additions alone do not.

        Means are in the table "cumulativity_mean".
        """
        return self._table("cumulativity")

    def types(self) -> Table:
        """Accuracy with neurons of some sites only off; where they are: "type_layers"."""
        return self._table("types")

    def frequency(self, counts: Counts) -> Table:
        """Counts of the facts that survive and of those that are lost; test: "frequency_test".

        Args:
          counts: how often each fact occurs; `read_counts` reads them.
        """
        return self._table("frequency", counts=counts)

    def measure(self, sets: Mapping[str, NeuronSet]) -> Table:
        """Accuracy on the held-out facts of every known relation with sets of your own off.

        Args:
          sets: neurons, by the names that the column `off` gets.

        Returns:
          The columns of `ablation`; `mean_drops` averages its rows. The table is not kept.
        """
        for neurons in sets.values():
            neurons.check(self.lm.config)
        return as_table(drops.measure(self, "measure", relation_sets(sets), self.evaluation))

    # --- what has been found ----------------------------------------------------------------------

    @property
    def tables(self) -> Tables:
        """Every table that has been made so far; those of the run directory too."""
        return Tables(self._all_rows(), path=self.out)

    def summary(self) -> Table:
        """Mean drops over relations of every analysis made so far: see `mean_drops`."""
        rows = self._all_rows()
        return as_table(mean_drops([row for name in DROPS for row in rows.get(name, [])]))

    def figures(self) -> dict[str, Figure]:
        """A figure of every table made so far that has one."""
        return make_figures(self._all_rows(), source=short_source(self.lm.source))

    def __repr__(self) -> str:
        title, rows = self._overview()
        widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
        lines = ("  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)) for row in rows)
        return "\n".join([title, *(line.rstrip() for line in lines)])

    def _repr_html_(self) -> str:
        title, (head, *rows) = self._overview()
        body = "".join(
            "<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>"
            for row in rows
        )
        names = "".join(f"<th>{name}</th>" for name in head)
        return (
            f"<table><caption>{html.escape(title)}</caption>"
            f"<thead><tr>{names}</tr></thead><tbody>{body}</tbody></table>"
        )

    def _overview(self) -> tuple[str, list[list[str]]]:
        """A title and cells of what is known so far; computes nothing."""
        settings = self.settings
        count = neuron_count(self.lm.config, settings.sites)
        title = (
            f"Study of {self.lm.source}: {len(self.relations)} relations, {self.k:,} of "
            f"{count:,} neurons each ({', '.join(settings.sites)})"
        )
        rows = [["relation", "facts", "detection", "held out", "lost with them off", "known"]]
        lost = {
            row["relation"]: row
            for row in self._all_rows().get("ablation", [])
            if row["off"] == row["relation"] and row["evaluation"] == "eva"
        }
        prompts = vars(self).get("prompts", {})
        for name, relation in self.relations.items():
            cells = [name, f"{len(relation.triples)}", "", "", "", ""]
            if name in prompts:
                of_relation = prompts[name]
                cells[2] = f"{len(of_relation.validated)}/{len(of_relation.detection)}"
                cells[5] = f"no: {of_relation.unknown}" if of_relation.unknown else "yes"
            if name in lost:
                cells[3] = f"{lost[name]['right_before']}/{lost[name]['prompts']}"
                drop = lost[name]["drop"]
                cells[4] = "" if drop is None else f"{drop:.0%}"
            rows.append(cells)
        return title, rows

    # --- tables -----------------------------------------------------------------------------------

    def _analysis(self, name: str, counts: Counts | None) -> TableRows:
        if name == "frequency":
            return analyses.frequency(self, counts or {})
        return ANALYSES[name](self)

    def _table(self, name: str, table: str | None = None, *, counts: Counts | None = None) -> Table:
        """The table of one analysis; all that it makes is kept."""
        self._keep(wordings.relations(self))
        _ = self.known
        start = time.perf_counter()
        rows = self._analysis(name, counts)
        if not any(rows.values()):
            raise DataError(f"{name}: {NOTHING}")
        self._keep(rows)
        self._finish({name: round(time.perf_counter() - start, 2)}, {})
        return as_table(rows[table or name])

    def _all_rows(self) -> TableRows:
        return self._rows if self.out is None else read_tables(self.out / "tables")

    def _keep(self, tables: TableRows) -> None:
        out = self.out
        if out is None:
            self._rows |= {name: rows for name, rows in tables.items() if rows}
            return

        def write() -> None:
            for name, rows in tables.items():
                if rows:
                    write_table(out / "tables", name, rows)

        write_once("tables", write)

    def _finish(self, seconds: Mapping[str, float], skipped: Mapping[str, str]) -> None:
        """The summary over all tables that are there, and run.json."""
        tables = self._all_rows()
        means = mean_drops([row for name in DROPS for row in tables.get(name, [])])
        self._keep({"summary": means})
        if self.out is None:
            return
        record = {
            **self.facts(),
            "tables": sorted({*tables, *(["summary"] if means else [])}),
            "summary": null_for_nan([row for row in means if row["analysis"] == "ablation"]),
            "seconds_of_this_call": dict(seconds),
            "skipped_by_this_call": dict(skipped),
        }
        path = self.out / "run.json"
        write_once("run.json", lambda: write_json(path, record))

    def facts(self) -> dict[str, Any]:
        """What run.json says: model, settings, versions."""
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
                "unknown": {n: p.unknown for n, p in self.prompts.items() if p.unknown},
            },
            "seeds": {"splits, negatives, random sets": self.settings.seed},
            "versions": versions(),
        }


def short_source(source: str) -> str:
    """A model's source for titles: of a path, its last part."""
    return Path(source).name if os.path.isabs(source) else source
