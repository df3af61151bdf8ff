"""Tidy tables on disk: one row per thing measured, as CSV for eyes and as Parquet for programs."""

import html
import io
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxneurons.errors import DataError
from jaxneurons.storage.store import make_directory, write_bytes

if TYPE_CHECKING:
    from pyarrow import Table
else:  # imported where a table is made: checks at run time need a name for it all the same
    Table = Any

Row = dict[str, Any]
"""A row of a tidy table: values by column."""
MOST_ROWS = 12
"""Rows of a table that a notebook shows."""


def as_table(rows: Iterable[Mapping[str, Any]]) -> Table:
    """Rows as a table: a column for each key; a missing value or None is null.

    A column of nothing but nulls is one of float64: what is missing is a number here.
    """
    import pyarrow as pa

    table = pa.Table.from_pylist([dict(row) for row in rows])
    fields = [
        pa.field(f.name, pa.float64() if pa.types.is_null(f.type) else f.type) for f in table.schema
    ]
    return table.cast(pa.schema(fields))


def write_table(directory: Path, name: str, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write `name.csv` and `name.parquet`, each atomically; None is an empty cell.

    Raises:
      WriteError: no room, say; names the file and the cause.
    """
    from pyarrow import csv, parquet

    table = as_table(rows)
    make_directory(directory)
    for suffix, write in (("csv", csv.write_csv), ("parquet", parquet.write_table)):
        buffer = io.BytesIO()
        write(table, buffer)
        write_bytes(directory / f"{name}.{suffix}", buffer.getvalue())


class Tables(Mapping[str, Table]):
    """Tidy tables by name, each a `pyarrow.Table`: `.to_pandas()` works for who has pandas.

    Args:
      rows: of each table, by its name.
      facts: what they were made with.
      path: the directory that they were written to, if they were.
    """

    def __init__(
        self,
        rows: Mapping[str, Sequence[Row]],
        *,
        facts: Mapping[str, Any] | None = None,
        path: Path | None = None,
    ):
        self.facts = dict(facts or {})
        self.path = path
        self._rows = {name: list(table) for name, table in rows.items()}

    def rows(self, name: str) -> list[Row]:
        """A table's rows, each a dict."""
        return self._rows[name]

    def __getitem__(self, name: str) -> Table:
        return as_table(self._rows[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self._rows)

    def __len__(self) -> int:
        return len(self._rows)

    def __repr__(self) -> str:
        sizes = (f"{name}: {len(rows)} rows" for name, rows in self._rows.items())
        return f"Tables({', '.join(sizes)})"

    def _repr_html_(self) -> str:
        return "".join(html_table(name, rows) for name, rows in self._rows.items())


def html_table(title: str, rows: Sequence[Row], *, most: int = MOST_ROWS) -> str:
    """Rows as a table of a notebook: the first `most` of them, and how many there are."""
    columns = list(dict.fromkeys(key for row in rows[:most] for key in row))
    head = "".join(f"<th>{html.escape(name)}</th>" for name in columns)
    body = "".join(
        "<tr>" + "".join(f"<td>{_cell(row.get(name))}</td>" for name in columns) + "</tr>"
        for row in rows[:most]
    )
    left_out = f" (the first {most})" if len(rows) > most else ""
    caption = f"{html.escape(title)}: {len(rows)} rows{left_out}"
    return (
        f"<table><caption>{caption}</caption>"
        f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
    )


def _cell(value: Any) -> str:
    if value is None:
        return ""
    return html.escape(f"{value:.4g}" if isinstance(value, float) else str(value))


def read_tables(directory: Path) -> dict[str, list[dict[str, Any]]]:
    """Every table of a directory, by name, as rows.

    Raises:
      DataError: a table that cannot be read.
    """
    from pyarrow import ArrowException, parquet

    tables = {}
    for path in sorted(directory.glob("*.parquet")):
        try:
            tables[path.stem] = parquet.read_table(path).to_pylist()
        except (OSError, ArrowException) as error:
            reason = " ".join(str(error).split())
            raise DataError(f"{path}: not a readable table ({reason}); run again") from None
    return tables


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object that this library has written; older ones hold NaN.

    Raises:
      DataError: it is not there, or not one.
    """
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}") from None
    except (ValueError, RecursionError):
        record = None
    if not isinstance(record, dict):
        raise DataError(f"{path}: not a JSON object")
    return record
