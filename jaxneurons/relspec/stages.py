"""The whole study in a run directory: collect, neurons, analyses, figures.

What people read is written anew by every stage from what `parts/` and `responses/` hold: `neurons/`
(a CSV per relation), `tables/` (CSV and Parquet), `figures/` and `run.json` (where everything came
from); `study.json` says how to go on.
"""

import dataclasses
import os
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from jaxneurons.checkpoints.loading import LM
from jaxneurons.errors import DataError, near_matches
from jaxneurons.neurons.sets import neuron_table, read_neurons
from jaxneurons.prompts.relations import Relation, bundled_relations, read_relations
from jaxneurons.relspec import analyses
from jaxneurons.relspec import figures as relspec_plots
from jaxneurons.relspec.analyses import Counts, Tables
from jaxneurons.relspec.concepts import concepts
from jaxneurons.relspec.method import RelSpecConfig
from jaxneurons.relspec.perplexity import perplexity
from jaxneurons.relspec.study import Study, Tell
from jaxneurons.storage.store import make_directory, null_for_nan, write_json, write_text
from jaxneurons.storage.tables import read_json, read_tables, write_table
from jaxneurons.storage.typed_json import typed

ANALYSES: dict[str, Callable[[Study], Tables]] = {
    "ablation": analyses.ablation,
    "layers": analyses.layers,
    "overlap": analyses.overlap,
    "templates": analyses.templates,
    "errors": analyses.errors,
    "perplexity": perplexity,
    "multilingual": analyses.multilingual,
    "concepts": concepts,
    "sizes": analyses.sizes,
    "cumulativity": analyses.cumulativity,
    "types": analyses.types,
}
"""By name, in the order in which they run; `frequency` is one more, for which counts are needed."""

DEFAULT = ("ablation", "layers", "overlap", "errors")
DROPS = ("ablation", "robustness", "multilingual", "sizes", "types")
"""Tables with the columns of `analyses.measure`, which `summary` is made of."""

STUDY = "study.json"
BUNDLED = "bundled"


def choose(names: str | Sequence[str], *, counts: bool = False) -> tuple[str, ...]:
    """Names of analyses: "default", "all", or some, in the order in which they run.

    Raises:
      DataError: an unknown name, or `frequency` without counts.
    """
    known = (*ANALYSES, "frequency")
    asked = [name.strip() for name in names.split(",")] if isinstance(names, str) else list(names)
    found: set[str] = set()
    for name in asked:
        if name == "all":
            found |= {*ANALYSES, *(("frequency",) if counts else ())}
        elif name == "default":
            found |= {*DEFAULT, *(("frequency",) if counts else ())}
        elif name in known:
            found.add(name)
        else:
            raise DataError(
                f"unknown analysis {name!r}; {near_matches(name, (*known, 'all', 'default'))}"
            )
    if "frequency" in found and not counts:
        raise DataError("the analysis 'frequency' needs counts of the facts: give a file of them")
    return tuple(name for name in known if name in found)


def gather(sources: Sequence[str | os.PathLike[str]]) -> list[Relation]:
    """Relations of several sources: directories, or "bundled" for those of the package."""
    found = []
    for source in sources:
        found += bundled_relations() if str(source) == BUNDLED else read_relations(source)
    return found


def begin(
    out: str | os.PathLike[str],
    model: str,
    relations: Sequence[str],
    settings: RelSpecConfig,
    ignore_keys: Sequence[str] = (),
) -> None:
    """Write how the study was begun, so that its later stages need only its directory."""
    write_json(
        Path(out) / STUDY,
        {
            "model": os.path.abspath(model) if os.path.exists(model) else model,
            "relations": [s if s == BUNDLED else os.path.abspath(s) for s in map(str, relations)],
            "settings": dataclasses.asdict(settings),
            **({"ignored_keys": list(ignore_keys)} if ignore_keys else {}),
        },
    )


def ignored_keys_of(out: str | os.PathLike[str]) -> list[str]:
    """The keys of the model's configuration that a study was begun without."""
    path = Path(out) / STUDY
    keys = read_json(path).get("ignored_keys", [])
    return list(typed(tuple[str, ...], keys, f"{path}: ignored_keys"))


def resume(out: str | os.PathLike[str]) -> tuple[str, list[str], RelSpecConfig]:
    """How a study was begun: model source, relation sources and settings.

    Raises:
      DataError: no study in this directory, or a file that is damaged.
    """
    path = Path(out) / STUDY
    if not path.is_file():
        raise DataError(
            f"{out}: no study here; begin one with --model and --relations, or give its directory"
        )
    kind = {"model": str, "relations": tuple[str, ...], "settings": RelSpecConfig}
    try:
        found = typed(kind, read_json(path), str(path))
    except DataError as error:
        raise DataError(
            f"{error}; give --model and --relations to `jaxneurons relspec run` as before, which "
            "writes this file anew"
        ) from None
    return found["model"], list(found["relations"]), found["settings"]


def collect(study: Study) -> Tables:
    """Stage 1: ask every detection prompt, and take the responses to those answered."""
    tables = analyses.relations(study)
    _write(study, tables)
    if study.known:
        study.experts()
    return tables


def neurons(study: Study) -> None:
    """Stage 2: average precision, and the neurons of each relation as CSV."""
    directory = study.run.path / "neurons"
    make_directory(directory)
    found = study.experts()
    for name, one in study.neurons().items():
        text = neuron_table(
            one,
            average_precision=found[name].scores,
            separation=found[name].separations,
            median_response=found[name].medians,
        )
        write_text(directory / f"{name}.csv", text)


def analyse(study: Study, names: Sequence[str], *, counts: Counts | None = None) -> Tables:
    """Stages 3 and 4: the analyses, a table or more of each, written as they finish.

    One that cannot be made is skipped, with a `SkippedWarning` and the reason in run.json.
    """
    found = analyses.relations(study)
    _write(study, found)
    _ = study.known  # nothing can be made without
    seconds, skipped = {}, {}
    for name in names:
        start = time.perf_counter()
        try:
            if name == "frequency":
                tables = analyses.frequency(study, counts or {})
            else:
                tables = ANALYSES[name](study)
        except DataError as error:
            skipped[name] = str(error)
            warnings.warn(f"{name} skipped: {error}", SkippedWarning, stacklevel=2)
            continue
        seconds[name] = round(time.perf_counter() - start, 2)
        if not any(tables.values()):
            skipped[name] = "these relations have nothing to measure"
            warnings.warn(f"{name} skipped: {skipped[name]}", SkippedWarning, stacklevel=2)
        _write(study, tables)
        found |= tables
    _finish(study, seconds, skipped)
    return found


class SkippedWarning(UserWarning):
    """An analysis could not be made; the others were."""


def _write(study: Study, tables: Tables) -> None:
    for name, rows in tables.items():
        if rows:
            write_table(study.run.path / "tables", name, rows)


def _finish(study: Study, seconds: dict[str, float], skipped: dict[str, str]) -> None:
    """The summary over all tables that are there, and run.json."""
    tables = read_tables(study.run.path / "tables")
    drops = [row for name in DROPS for row in tables.get(name, [])]
    total = analyses.summary(drops)
    if total:
        write_table(study.run.path / "tables", "summary", total)
    write_json(
        study.run.path / "run.json",
        {
            **study.facts(),
            "tables": sorted({*tables, *(["summary"] if total else [])}),
            "summary": null_for_nan([row for row in total if row["analysis"] == "ablation"]),
            "seconds_of_this_call": seconds,
            "skipped_by_this_call": skipped,
        },
    )


def plot(out: str | os.PathLike[str]) -> list[Path]:
    """Stage 5: a figure of every table that has one; needs no model.

    Raises:
      DataError: no tables there.
    """
    directory = Path(out)
    tables = read_tables(directory / "tables")
    if not tables:
        raise DataError(f"{directory}: no tables here; run the analyses first")
    source = _source(directory / "run.json")
    if os.path.isabs(source):
        source = Path(source).name  # titles are short
    return relspec_plots.draw(tables, directory / "figures", source=source)


def _source(path: Path) -> str:
    """The model of a run, for titles; "" where run.json does not say."""
    try:
        return typed({"model": {"source": str}}, read_json(path), str(path))["model"]["source"]
    except DataError:
        return ""


def compare(run: str | os.PathLike[str], other: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """Neurons that relations of one name share in two runs, beside those of different names.

    A row for each relation that both runs know: its wording in each, neurons in each, `shared`, and
    `shared_others`, the mean over the other run's other relations.

    Raises:
      DataError: a directory without neurons or tables, or no relation in both.
    """
    sets, wordings = [], []
    for directory in map(Path, (run, other)):
        found = {
            path.stem: read_neurons(path) for path in sorted((directory / "neurons").glob("*.csv"))
        }
        rows = read_tables(directory / "tables").get("relations", [])
        if not found or not rows:
            raise DataError(
                f"{directory}: no neurons of a run; `jaxneurons relspec run` makes them"
            )
        sets.append(found)
        kind = {"relation": str, "template": str}
        rows = [typed(kind, row, f"{directory / 'tables'}: relations") for row in rows]
        wordings.append({row["relation"]: row["template"] for row in rows})
        for name in found.keys() - wordings[-1].keys():
            raise DataError(f"{directory}: neurons of {name!r}, which is in none of its tables")
    both = [name for name in sets[0] if name in sets[1]]
    if not both:
        raise DataError(f"{other}: knows none of the relations that {run} knows")
    rows = []
    for name in both:
        others = [len(sets[0][name] & one) for key, one in sets[1].items() if key != name]
        rows.append(
            {
                "relation": name,
                "template": wordings[0][name],
                "other_template": wordings[1][name],
                "same_wording": wordings[0][name] == wordings[1][name],
                "neurons": len(sets[0][name]),
                "other_neurons": len(sets[1][name]),
                "shared": len(sets[0][name] & sets[1][name]),
                "shared_others": sum(others) / len(others) if others else None,
            }
        )
    return rows


def run_study(
    lm: LM,
    relations: Sequence[Relation],
    out: str | os.PathLike[str],
    *,
    settings: RelSpecConfig = RelSpecConfig(),
    names: Sequence[str] = DEFAULT,
    counts: Counts | None = None,
    tell: Tell = lambda stage, done, total: None,
) -> Study:
    """Every stage; a stopped call goes on where it was, with identical results.

    Args:
      lm: the model.
      relations: at least two.
      out: the run directory.
      settings: hyper-parameters.
      names: analyses, see `ANALYSES`.
      counts: of facts, for the analysis "frequency".
      tell: told how far each stage is.

    Raises:
      DataError: unusable relations or directory, before anything is computed; or a model that
        knows none of the relations.
    """
    study = Study(lm, relations, out, settings=settings, tell=tell)
    collect(study)
    neurons(study)
    analyse(study, names, counts=counts)
    plot(study.run.path)
    return study
