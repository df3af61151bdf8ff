"""A study's directory: how it was begun and is taken up again, its figures, two compared.

What people read is written anew by every stage from what `parts/` and `responses/` hold: `neurons/`
(a CSV per relation), `tables/` (CSV and Parquet), `figures/` and `run.json` (where everything came
from); `study.json` says how to go on.
"""

import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path

from jaxneurons.errors import DataError
from jaxneurons.neurons.sets import NeuronSet, read_neurons
from jaxneurons.processes.sharing import write_once
from jaxneurons.prompts.relations import Relation, bundled_relations, read_relations
from jaxneurons.relspec.figures import draw
from jaxneurons.relspec.method import RelSpecConfig
from jaxneurons.relspec.study import short_source
from jaxneurons.storage.store import write_json
from jaxneurons.storage.tables import Table, as_table, read_json, read_tables
from jaxneurons.storage.typed_json import typed

STUDY = "study.json"
BUNDLED = "bundled"


def bundled() -> list[Relation]:
    """The relations that ship with the package."""
    return bundled_relations()


def gather(sources: Sequence[str | os.PathLike[str]]) -> list[Relation]:
    """Relations of several sources: directories, or "bundled" for those of the package."""
    relations = []
    for source in sources:
        if str(source) != BUNDLED and not os.path.lexists(source):
            raise DataError(
                f"{source}: no such directory of relation files; {BUNDLED!r} are those that ship "
                "with the package"
            )
        relations += bundled() if str(source) == BUNDLED else read_relations(source)
    return relations


def begin(
    out: str | os.PathLike[str],
    model: str,
    relations: Sequence[str],
    settings: RelSpecConfig,
    ignore_keys: Sequence[str] = (),
) -> None:
    """Write how the study was begun, so that its later stages need only its directory."""
    record = {
        "model": os.path.abspath(model) if os.path.exists(model) else model,
        "relations": [s if s == BUNDLED else os.path.abspath(s) for s in map(str, relations)],
        "settings": dataclasses.asdict(settings),
        **({"ignored_keys": list(ignore_keys)} if ignore_keys else {}),
    }
    write_once("study.json", lambda: write_json(Path(out) / STUDY, record))


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
        values = typed(kind, read_json(path), str(path))
    except DataError as error:
        raise DataError(
            f"{error}; give --model and --relations to `jaxneurons relspec run` as before, which "
            "writes this file anew"
        ) from None
    return values["model"], list(values["relations"]), values["settings"]


def plot(out: str | os.PathLike[str]) -> list[Path]:
    """Stage 5: a figure of every table that has one; needs no model.

    Raises:
      DataError: no tables there.
    """
    directory = Path(out)
    tables = read_tables(directory / "tables")
    if not tables:
        raise DataError(f"{directory}: no tables here; run the analyses first")
    source = short_source(_source(directory / "run.json"))
    drawn: list[Path] = []
    write_once("figures", lambda: drawn.extend(draw(tables, directory / "figures", source=source)))
    return drawn


def _source(path: Path) -> str:
    """The model of a run, for titles; "" where run.json does not say."""
    try:
        return typed({"model": {"source": str}}, read_json(path), str(path))["model"]["source"]
    except DataError:
        return ""


def compare(run: str | os.PathLike[str], other: str | os.PathLike[str]) -> Table:
    """Neurons that relations of one name share in two runs, beside those of different names.

    A row for each relation that both runs know: its template in each, neurons in each, `shared`,
    and `shared_others`, the mean over the other run's other relations.

    Raises:
      DataError: a directory without neurons or tables, or no relation in both.
    """
    (sets, templates), (other_sets, other_templates) = (
        _neurons_of(Path(directory)) for directory in (run, other)
    )
    both = [name for name in sets if name in other_sets]
    if not both:
        raise DataError(f"{other}: knows none of the relations that {run} knows")
    rows = []
    for name in both:
        shared_others = [len(sets[name] & s) for key, s in other_sets.items() if key != name]
        rows.append(
            {
                "relation": name,
                "template": templates[name],
                "other_template": other_templates[name],
                "same_wording": templates[name] == other_templates[name],
                "neurons": len(sets[name]),
                "other_neurons": len(other_sets[name]),
                "shared": len(sets[name] & other_sets[name]),
                "shared_others": sum(shared_others) / len(shared_others) if shared_others else None,
            }
        )
    return as_table(rows)


def _neurons_of(directory: Path) -> tuple[dict[str, NeuronSet], dict[str, str]]:
    """A run's neurons and templates, by relation."""
    sets = {path.stem: read_neurons(path) for path in sorted((directory / "neurons").glob("*.csv"))}
    rows = read_tables(directory / "tables").get("relations", [])
    if not sets or not rows:
        raise DataError(f"{directory}: no neurons of a run; `jaxneurons relspec run` makes them")
    kind = {"relation": str, "template": str}
    rows = [typed(kind, row, f"{directory / 'tables'}: relations") for row in rows]
    templates = {row["relation"]: row["template"] for row in rows}
    for name in sets.keys() - templates.keys():
        raise DataError(f"{directory}: neurons of {name!r}, which is in none of its tables")
    return sets, templates
