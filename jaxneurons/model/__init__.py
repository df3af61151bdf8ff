"""The Llama block and what differs between families: configuration, parameters, forward pass."""

from jaxneurons.model.config import ModelConfig, RopeConfig
from jaxneurons.model.generation import greedy
from jaxneurons.model.sharding import ShardingRules, batch_sharding, param_shardings, shard_params
from jaxneurons.model.transformer import Cache, Output, Transformer, forward, init_cache

__all__ = [
    "Cache",
    "ModelConfig",
    "Output",
    "RopeConfig",
    "ShardingRules",
    "Transformer",
    "batch_sharding",
    "forward",
    "greedy",
    "init_cache",
    "param_shardings",
    "shard_params",
]
