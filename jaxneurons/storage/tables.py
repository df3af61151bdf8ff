"""Tidy tables on disk: one row per thing measured, as CSV for eyes and as Parquet for programs."""

import io
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from jaxneurons.errors import DataError
from jaxneurons.storage.store import make_directory, write_bytes


def write_table(directory: Path, name: str, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write `name.csv` and `name.parquet`, each atomically; None is an empty cell.

    Raises:
      WriteError: no room, say; names the file and the cause.
    """
    import pyarrow as pa
    from pyarrow import csv, parquet

    table = pa.Table.from_pylist([dict(row) for row in rows])
    make_directory(directory)
    for suffix, write in (("csv", csv.write_csv), ("parquet", parquet.write_table)):
        buffer = io.BytesIO()
        # A column of nothing but None has no type; CSV does not write it otherwise.
        write(_typed(table), buffer)
        write_bytes(directory / f"{name}.{suffix}", buffer.getvalue())


def _typed(table: Any) -> Any:
    import pyarrow as pa

    fields = [
        pa.field(f.name, pa.float64() if pa.types.is_null(f.type) else f.type) for f in table.schema
    ]
    return table.cast(pa.schema(fields))


def read_tables(directory: Path) -> dict[str, list[dict[str, Any]]]:
    """Every table of a directory, by name, as rows.

    Raises:
      DataError: a table that cannot be read.
    """
    from pyarrow import ArrowException, parquet

    found = {}
    for path in sorted(directory.glob("*.parquet")):
        try:
            found[path.stem] = parquet.read_table(path).to_pylist()
        except (OSError, ArrowException) as error:
            reason = " ".join(str(error).split())
            raise DataError(f"{path}: not a readable table ({reason}); run again") from None
    return found


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object that this library has written; older ones hold NaN.

    Raises:
      DataError: it is not there, or not one.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}") from None
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise DataError(f"{path}: not a JSON object")
    return found
