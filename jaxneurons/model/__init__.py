"""The Llama block and what differs between families: configuration, parameters, forward pass."""

from jaxneurons.model.config import ModelConfig, RopeConfig
from jaxneurons.model.generation import greedy, sample
from jaxneurons.model.parameters import (
    Params,
    count_parameters,
    list_parameters,
    param_shapes,
    site_widths,
)
from jaxneurons.model.sharding import (
    PRESETS,
    ShardingRules,
    batch_sharding,
    make_mesh,
    param_shardings,
    partition_specs,
    shard_params,
    undivided,
    whole_parameters,
)
from jaxneurons.model.transformer import Cache, Output, Transformer, forward, init_cache

__all__ = [
    "PRESETS",
    "Cache",
    "ModelConfig",
    "Output",
    "Params",
    "RopeConfig",
    "ShardingRules",
    "Transformer",
    "batch_sharding",
    "count_parameters",
    "forward",
    "greedy",
    "init_cache",
    "list_parameters",
    "make_mesh",
    "param_shapes",
    "param_shardings",
    "partition_specs",
    "sample",
    "shard_params",
    "site_widths",
    "undivided",
    "whole_parameters",
]
