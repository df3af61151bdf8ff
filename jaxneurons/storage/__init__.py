"""Results on disk and in memory, and one reader of text, CSV and JSON that people wrote."""

from jaxneurons.storage.store import Memory, Parts, RunDirectory
from jaxneurons.storage.tables import Tables, as_table, read_tables, write_table

__all__ = ["Memory", "Parts", "RunDirectory", "Tables", "as_table", "read_tables", "write_table"]
