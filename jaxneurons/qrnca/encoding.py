"""Queries as token prompts: which of a query's prompts are used, and what a query must have."""

from collections.abc import Sequence

from jaxneurons.checkpoints.loading import LM
from jaxneurons.errors import DataError
from jaxneurons.prompts.answers import TokenPrompt, encode_query
from jaxneurons.prompts.queries import Query
from jaxneurons.qrnca.method import QRNCAConfig

NO_GROUP = "all"
"""The group of queries that name none, and of rows over every query."""


def prompt_count(query: Query, settings: QRNCAConfig) -> int:
    """Prompts of a query that are used."""
    return min(len(query.prompts), settings.prompts)


def encode_queries(lm: LM, queries: Sequence[Query], settings: QRNCAConfig) -> list[TokenPrompt]:
    """Token prompts of all queries, `settings.prompts` of each, in order.

    Raises:
      DataError: a prompt that is empty or longer than the context; says which query.
    """
    encoded = []
    for query in queries:
        for i in range(prompt_count(query, settings)):
            try:
                prompt = encode_query(
                    lm.tokenizer,
                    query.prompts[i],
                    query.answers[i],
                    options=query.options[i],
                    form=settings.form,
                    separator=query.separator(i),
                    max_length=lm.config.max_position,
                    vocab_size=lm.config.vocab_size,
                )
                encoded.append(prompt)
            except DataError as error:
                raise DataError(f"query {query.id!r}, prompt {i + 1}: {error}") from None
    return encoded


def check_queries(queries: Sequence[Query]) -> None:
    """Raise `DataError` unless every query has a right answer for each of its prompts.

    What `queries.read_queries` reads has; people make queries in Python too.
    """
    seen: set[str] = set()
    for query in queries:
        if query.id in seen:
            raise DataError(f"query {query.id!r} is there twice; ids must be unique")
        seen.add(query.id)
        columns = (query.prompts, query.answers, query.options, query.separators)
        if not all(isinstance(column, tuple | list) for column in columns):
            raise DataError(
                f"query {query.id!r}: prompts, answers, options and separators are tuples with an "
                "entry for each wording"
            )
        between = query.separators or (None,) * len(query.prompts)
        counts = {len(query.prompts), len(query.answers), len(query.options), len(between)}
        if len(counts) > 1 or not query.prompts:
            raise DataError(
                f"query {query.id!r}: as many prompts as answers are needed, one at least"
            )


def check_groups(queries: Sequence[Query]) -> None:
    """Raise `DataError` if some queries are in a group and some in none."""
    loose = [query.id for query in queries if query.group == NO_GROUP]
    if 0 < len(loose) < len(queries):
        raise DataError(
            f"query {loose[0]!r} is in no group (or in one called {NO_GROUP!r}), as are "
            f"{len(loose)} of {len(queries)}: give each a group, or none of them"
        )
