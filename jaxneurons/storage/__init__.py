"""Results on disk and in memory, and one reader of text, CSV and JSON that people wrote."""

from jaxneurons.storage.store import Memory, Parts, RunDirectory
from jaxneurons.storage.tables import read_tables, write_table

__all__ = ["Memory", "Parts", "RunDirectory", "read_tables", "write_table"]
