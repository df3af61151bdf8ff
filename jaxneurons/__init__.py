"""Which neurons of this LLM know that, and what happens if I change them?"""

from importlib.metadata import version as _version

from jaxneurons.attribution import Attribution, integrated_gradients
from jaxneurons.citations import citation
from jaxneurons.config import ModelConfig, RopeConfig
from jaxneurons.errors import ConfigError, DataError, JaxneuronsError, SourceError
from jaxneurons.load import LM, load
from jaxneurons.neurons import SITES, Neuron, NeuronSet
from jaxneurons.quadrature import Quadrature
from jaxneurons.save import save
from jaxneurons.sharding import ShardingRules
from jaxneurons.transformer import Cache, Output, Transformer, forward, init_cache

__version__ = _version("jaxneurons")

__all__ = [
    "LM",
    "SITES",
    "Attribution",
    "Cache",
    "ConfigError",
    "DataError",
    "JaxneuronsError",
    "ModelConfig",
    "Neuron",
    "NeuronSet",
    "Output",
    "Quadrature",
    "RopeConfig",
    "ShardingRules",
    "SourceError",
    "Transformer",
    "__version__",
    "citation",
    "forward",
    "init_cache",
    "integrated_gradients",
    "load",
    "save",
]
