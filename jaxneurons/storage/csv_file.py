"""Tables that people wrote, as spreadsheets and programs save them."""

import csv
import io
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from jaxneurons.errors import DataError
from jaxneurons.storage.text_file import read_text

DELIMITERS = (",", ";", "\t", "|")


def read_csv(
    path: Path, required: Sequence[str], optional: Sequence[str] = ()
) -> list[tuple[int, dict[str, str]]]:
    """The rows of a table, each with the number of its (last) line; cells that are missing are "".

    Cells are separated by commas, semicolons, tabs or bars, whichever the header is, or by what a
    first line `sep=;` says. Names of columns are taken without regard to case and spaces around
    them; other columns are passed over.

    Args:
      path: the file.
      required: columns that must be there, in lower case.
      optional: columns that may be there.

    Raises:
      DataError: it cannot be read, a column is missing or there twice, or a row has more cells than
        the header; says the columns that were found, or the line.
    """
    text, skipped, delimiter, _, names = _opened(path, required)
    for name in (*required, *optional):
        if names.count(name) > 1:
            raise DataError(f"{path}: the column {name!r} is there twice")
    places = {name: names.index(name) for name in (*required, *optional) if name in names}
    rows = []
    for line, cells in _rows(path, text, delimiter, skipped):
        if any(cell.strip() for cell in cells[len(names) :]):
            raise DataError(
                f"{path}: line {line}: {len(cells)} cells, the header has {len(names)}; put cells "
                f"that hold {delimiter!r} between double quotes"
            )
        row = dict.fromkeys((*required, *optional), "")
        rows.append((line, row | {n: cells[i] for n, i in places.items() if i < len(cells)}))
    return rows[1:]


def read_header(path: Path, required: Sequence[str]) -> tuple[int, list[str]]:
    """The number of the header's line, and all its columns as `read_csv` takes their names.

    Args:
      path: the file.
      required: as of `read_csv`.

    Raises:
      DataError: as `read_csv`, but for rows and for columns that are there twice.
    """
    *_, line, names = _opened(path, required)
    return line, names


def _opened(path: Path, required: Sequence[str]) -> tuple[str, int, str, int, list[str]]:
    """Text, lines that were skipped, delimiter, number of the header's line, columns."""
    text = read_text(path)
    first, _, rest = text.partition("\n")
    skipped, separator = 0, first.strip().strip('"')
    if separator[:4].lower() == "sep=" and len(separator) == 5:
        text, skipped, delimiters = rest, 1, (separator[4],)
    elif first.rstrip("\r\n").lower() == "sep=\t":
        text, skipped, delimiters = rest, 1, ("\t",)
    else:
        delimiters = DELIMITERS
    delimiter, line, names = _header(path, text, delimiters, required)
    return text, skipped, delimiter, line + skipped, names


def _header(
    path: Path, text: str, delimiters: Iterable[str], required: Sequence[str]
) -> tuple[str, int, list[str]]:
    """The delimiter with which the first row has the columns, its line, and their names."""
    best: list[str] = []
    for delimiter in delimiters:
        try:
            line, cells = next(_rows(path, text, delimiter), (0, []))
        except DataError:
            continue
        names = [" ".join(cell.split()).casefold() for cell in cells]
        if set(required) <= set(names):
            return delimiter, line, names
        best = max(best, names, key=len)
    description = "its first row is " + ", ".join(map(repr, best[:12])) if best else "it is empty"
    raise DataError(f"{path}: needs the columns {', '.join(required)}; {description}")


def _rows(
    path: Path, text: str, delimiter: str, skipped: int = 0
) -> Iterator[tuple[int, list[str]]]:
    """Rows that are not blank, with the number of the line that each ends on."""
    reader = csv.reader(
        io.StringIO(text, newline=""), delimiter=delimiter, skipinitialspace=True, strict=True
    )
    try:
        for cells in reader:
            if any(cell.strip() for cell in cells):
                yield reader.line_num + skipped, cells
    except csv.Error as error:
        raise DataError(
            f"{path}: line {reader.line_num + skipped}: not CSV ({error}); a cell with double "
            "quotes in it needs each doubled, and one around all of it"
        ) from None
