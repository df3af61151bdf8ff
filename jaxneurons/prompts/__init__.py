"""What a model is asked: query files, multiple choice, relations, tokens of answers, batches."""

from jaxneurons.prompts.answers import TokenPrompt, encode_prompt, encode_query
from jaxneurons.prompts.batches import Batch, bucket, plan
from jaxneurons.prompts.multichoice import Question, free_form, multi_choice, read_questions
from jaxneurons.prompts.queries import Query, parse_queries, read_queries
from jaxneurons.prompts.relations import (
    Relation,
    Triple,
    bundled_relations,
    prompt,
    read_counts,
    read_relation,
    read_relations,
)

__all__ = [
    "Batch",
    "Query",
    "Question",
    "Relation",
    "TokenPrompt",
    "Triple",
    "bucket",
    "bundled_relations",
    "encode_prompt",
    "encode_query",
    "free_form",
    "multi_choice",
    "parse_queries",
    "plan",
    "prompt",
    "read_counts",
    "read_queries",
    "read_questions",
    "read_relation",
    "read_relations",
]
