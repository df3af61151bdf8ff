"""Every supported family of models: one file each, and the one place that finds them."""

from collections.abc import Mapping

from jaxneurons.convert.families.gemma import GEMMA
from jaxneurons.convert.families.gemma2 import GEMMA2
from jaxneurons.convert.families.gemma3 import GEMMA3
from jaxneurons.convert.families.llama import LLAMA
from jaxneurons.convert.families.mistral import MISTRAL
from jaxneurons.convert.families.olmo2 import OLMO2
from jaxneurons.convert.families.phi3 import PHI3
from jaxneurons.convert.families.qwen2 import QWEN2
from jaxneurons.convert.families.qwen3 import QWEN3
from jaxneurons.convert.families.smollm3 import SMOLLM3
from jaxneurons.convert.family import Family, GGUFForm

__all__ = ["ARCHITECTURES", "FAMILIES", "MODEL_TYPES", "gguf_form"]

FAMILIES: Mapping[str, Family] = {
    family.name: family
    for family in (
        LLAMA,
        MISTRAL,
        QWEN2,
        QWEN3,
        GEMMA,
        GEMMA2,
        GEMMA3,
        SMOLLM3,
        OLMO2,
        PHI3,
    )
}
"""By the name that `ModelConfig.family` has."""

MODEL_TYPES: Mapping[str, Family] = {
    model_type: family for family in FAMILIES.values() for model_type in family.types
}
"""By `model_type` of config.json."""

ARCHITECTURES: Mapping[str, Family] = {
    family.gguf.architecture: family for family in FAMILIES.values() if family.gguf is not None
}
"""By the architecture that GGUF files name."""


def gguf_form(family: Family) -> GGUFForm:
    """How GGUF files state a family that they name."""
    assert family.gguf is not None, family.name
    return family.gguf
