"""Which neurons of this LLM know that, and what happens if I change them?"""

from typing import TYPE_CHECKING

from jaxneurons.lazy import face

if TYPE_CHECKING:
    from jaxneurons import (
        checkpoints,
        convert,
        edit,
        engine,
        errors,
        lab,
        model,
        neurons,
        plots,
        prompts,
        qrnca,
        relspec,
        scale,
        storage,
    )
    from jaxneurons.checkpoints import LM, load, save
    from jaxneurons.citations import citation
    from jaxneurons.engine import (
        Attribution,
        Generations,
        Quadrature,
        ablate,
        generate,
        integrated_gradients,
    )
    from jaxneurons.errors import ConfigError, DataError, JaxneuronsError, SourceError
    from jaxneurons.model import (
        Cache,
        ModelConfig,
        Output,
        RopeConfig,
        ShardingRules,
        Transformer,
        forward,
        init_cache,
    )
    from jaxneurons.neurons import SITES, Neuron, NeuronSet

    __version__: str

__getattr__, __dir__ = face(__name__, __file__)

__all__ = [
    "LM",
    "SITES",
    "Attribution",
    "Cache",
    "ConfigError",
    "DataError",
    "Generations",
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
    "ablate",
    "checkpoints",
    "citation",
    "convert",
    "edit",
    "engine",
    "errors",
    "forward",
    "generate",
    "init_cache",
    "integrated_gradients",
    "lab",
    "load",
    "model",
    "neurons",
    "plots",
    "prompts",
    "qrnca",
    "relspec",
    "save",
    "scale",
    "storage",
]
