"""Reading tables that users wrote."""

import csv
import io
from pathlib import Path

from jaxneurons.errors import DataError


def read_text(path: Path) -> str:
    """A text file in UTF-8, with or without a byte-order mark.

    Raises:
      DataError: it cannot be read, or is in another encoding.
    """
    try:
        return path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}") from None
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not in UTF-8 (byte {error.start}); save it as UTF-8") from None


def read_csv(path: Path) -> list[dict[str, str]]:
    """The rows of a CSV file by column name; the first is line 2. Cells that are missing are "".

    Raises:
      DataError: it cannot be read, is in another encoding, or is not CSV.
    """
    try:
        rows = list(csv.DictReader(io.StringIO(read_text(path), newline=""), restval=""))
    except csv.Error as error:
        raise DataError(f"{path}: not CSV: {error}") from None
    return [{key: value for key, value in row.items() if key is not None} for row in rows]
